"""Finds the layout of every tensor that a loss depends on, and says where examples are mixed.

The rules of the ops are in the modules beside this one, by type. An op without a rule that is handed an example is
refused, since nobody can say what it does with it; ops that see no example need none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import tensorflow.compat.v1 as tf

from efl._program import ancestors
from efl.errors import ModelError
from efl.privacy.per_example.layouts.kept import CONDITIONALS, VARIABLES, of_table, of_variable
from efl.privacy.per_example.layouts.layout import (
    EXAMPLES,
    SHARED,
    Chosen,
    Layout,
    Mixed,
    Partition,
    Pooled,
    Rows,
    Shared,
    Sizes,
)
from efl.privacy.per_example.layouts.own_gradient import check_gradient
from efl.privacy.per_example.layouts.sizes import of_sizes
from efl.privacy.per_example.layouts.sources import SOURCES, in_order

Rule: TypeAlias = "Callable[[tf.Operation, list[Layout], Walk], Layout | list[Layout]]"
RULES: dict[str, Rule] = {}
_RuleOfOne: TypeAlias = "Callable[[tf.Operation, Layout, Walk], Layout | list[Layout]]"
# What to do where an op has no rule; by how its type begins.
_OVER_TIME = "of a loop over time? Unroll it: unroll=True of a Keras layer, tf.nn.static_rnn"
_BRANCH = "of tf.cond as TensorFlow 1 builds it? Write tf.enable_control_flow_v2() before the model"
_FUNCTION = (
    "a function that TensorFlow calls; write what is in it without one. In place of Keras' Conv2D with groups, "
    "tf.nn.conv2d takes a kernel of [height, width, channels / groups, filters]"
)
_REMEDIES = {
    "TensorList": _OVER_TIME, "TensorArray": _OVER_TIME, "Switch": _BRANCH, "Merge": _BRANCH,
    "PartitionedCall": _FUNCTION, "StatefulPartitionedCall": _FUNCTION,
}  # fmt: skip

# Where the sizes of a tensor stay what they were.
_KEEP_ELEMENTS = frozenset(
    {
        "Identity", "IdentityN", "Snapshot", "StopGradient", "PreventGradient", "CheckNumerics", "EnsureShape", "Cast",
        "Reshape", "Relu", "Relu6", "Elu", "Selu", "LeakyRelu", "Softplus", "Tanh", "Sigmoid", "Neg", "Square", "Exp",
        "Log", "FusedBatchNorm", "FusedBatchNormV2", "FusedBatchNormV3", "BiasAdd",
    }
)  # fmt: skip
# Ops with a state that no row gets into: random numbers, handles, tables that are filled once.
_HARMLESS = frozenset(
    {
        "TruncatedNormal", "Multinomial", "ReadVariableOp", "ResourceGather", "ResourceGatherNd", "VarIsInitializedOp",
        "HashTable", "HashTableV2", "LookupTableFind", "LookupTableFindV2", "Assert", "Print", "PrintV2", "Iterator",
        "IteratorV2", "OneShotIterator", "AnonymousIterator", "AnonymousIteratorV2", "AnonymousIteratorV3",
        "FIFOQueueV2", "PaddingFIFOQueueV2", "RandomShuffleQueueV2", "LogUniformCandidateSampler",
        "UniformCandidateSampler",
    }
)  # fmt: skip
# Sizes are no secret here: how many rows a batch has, everybody who takes part in a step knows. Unless it is a sample.
_SIZES = frozenset({"Shape", "ShapeN", "Rank", "Size"})


def rule(*types: str) -> Callable[[Rule], Rule]:
    """Registers the rule of op types."""

    def register(function: Rule) -> Rule:
        for name in types:
            RULES[name] = function
        return function

    return register


def rule_of_one(*types: str, data: int = 0) -> Callable[[_RuleOfOne], _RuleOfOne]:
    """Registers the rule of op types that work on one of their inputs; the others say how (a shape, sizes, paddings).

    The rule is handed the layout of that input alone: where another one depends on examples, all that comes out does.

    Args:
      types: Of the ops.
      data: Which input they work on.
    """

    def register(function: _RuleOfOne) -> _RuleOfOne:
        def of_all(op: tf.Operation, ins: list[Layout], walk: Walk) -> Layout | list[Layout]:
            if all(isinstance(layout, Shared) for place, layout in enumerate(ins) if place != data):
                return function(op, ins[data], walk)
            return Mixed(op, "what it does with an example (a shape, sizes, places) depends on other examples")

        rule(*types)(of_all)
        return function

    return register


@dataclass(frozen=True)
class Expectation:
    """Something about sizes that only the running program can confirm.

    Attributes:
      holds: Scalar bool.
      text: What it means when it does not hold.
      numbers: Scalars to show beside the text.
    """

    holds: tf.Tensor
    text: str
    numbers: tuple[tf.Tensor, ...] = ()


class Walk:
    """The layouts of all tensors above some targets.

    Args:
      targets: Loss and sent tensors.
      examples: Tensors whose first axis is the examples although they look like no input (received tensors).
      sampled: Whether how many rows there are is chance, and tells of a row whether it was drawn.

    Attributes:
      size: int64 scalar, the number of examples: the length of the first target.
      expectations: What has to hold at run time for the layouts to be right.

    Raises:
      ModelError: An op that is handed rows has a gradient of the user's own, or a size is known to be wrong.
    """

    def __init__(self, targets: Sequence[tf.Tensor], examples: Iterable[tf.Tensor] = (), sampled: bool = False) -> None:
        self.sampled = sampled
        self.size = tf.shape(targets[0], out_type=tf.int64)[0]
        self.static_size: int | None = targets[0].shape[0] if targets[0].shape.rank else None
        self.expectations: list[Expectation] = []
        self._layouts: dict[Any, Layout] = {}
        self._parts: dict[Any, Partition] = {}
        self._targets = list(targets)
        # What writes into these is an optimizer: that is who makes it private, or is told that it does not.
        self._trained = {v.handle.op for v in tf.trainable_variables() if getattr(v, "handle", None) is not None}
        examples = list(examples)
        self._has_examples = bool(examples)
        for tensor in examples:
            self._source(tensor)
        self._visit(targets)

    def _visit(self, targets: Sequence[tf.Tensor]) -> None:
        self.ops = in_order(targets)
        self._members = set(self.ops)
        for op in self.ops:
            known = [self._layouts.get(t.ref()) for t in op.outputs]
            if all(layout is not None for layout in known) and known:
                continue
            for tensor, layout in zip(op.outputs, self._of_op(op), strict=True):
                self._layouts.setdefault(tensor.ref(), layout)

    def layout(self, tensor: tf.Tensor) -> Layout:
        """The layout of a tensor; ``Shared`` where it is above none of the targets."""
        known = self._layouts.get(tensor.ref())
        if known is None and tensor.op in self._members:  # it comes round in a loop
            return Mixed(tensor.op, "a loop, of which nothing is known")
        return SHARED if known is None else known

    def knows(self, op: tf.Operation) -> bool:
        """Whether a target depends on the op."""
        return op in self._members

    def readers(self, tensor: tf.Tensor) -> list[tf.Operation]:
        """The ops by which a target depends on a tensor; none where it is a target itself."""
        is_target = any(tensor is target for target in self._targets)
        return [] if is_target else [op for op in tensor.consumers() if op in self._members]

    def expect(self, holds: tf.Tensor, text: str, *numbers: tf.Tensor) -> None:
        """Adds an expectation."""
        self.expectations.append(Expectation(holds, text, numbers))

    def expect_rows(self, tensor: tf.Tensor, what: str) -> None:
        """Expects that axis 0 of a tensor is as long as the batch.

        Raises:
          ModelError: It can be seen already that it is not.
        """
        text = (
            f"{what} has another number of rows than the loss has values; a private optimizer needs one value of the "
            "loss for each row of the batch. Rows, and values"
        )
        static = tensor.shape[0] if tensor.shape.rank else None
        if static is not None and self.static_size is not None:
            if static != self.static_size:
                raise ModelError(f"{text}: {static}, {self.static_size}")
            return
        rows = tf.shape(tensor, out_type=tf.int64)[0]
        self.expect(tf.equal(rows, self.size), text, rows, self.size)

    def part_of(self, chosen: Chosen) -> Partition:
        """The partition of chosen entries; one and the same for equal numbers."""
        key = chosen.numbers.ref()
        if key not in self._parts:
            self._parts[key] = Partition(tf.gather(chosen.part.owner, tf.reshape(chosen.numbers, [-1])))
        return self._parts[key]

    def _reads(self, tensor: tf.Tensor) -> bool:
        """Whether a target depends on the tensor, and not only on others of its op."""
        return any(op in self._members for op in tensor.consumers()) or any(tensor is t for t in self._targets)

    def _source(self, tensor: tf.Tensor) -> Layout:
        if tensor.dtype in (tf.resource, tf.variant):
            layout: Layout = EXAMPLES if tensor.dtype == tf.variant else SHARED
        elif tensor.shape.rank == 0:
            layout = (
                SHARED
                if tensor.op.type.startswith("Placeholder")  # fed: a rate, a flag
                else Mixed(tensor.op, "a single value that comes with a whole batch")
            )
        elif tensor.shape.rank is not None and None in tensor.shape.as_list()[1:]:
            layout = Mixed(
                tensor.op,
                f"an input of shape {tensor.shape}: in a padded batch the length of an axis is that of the longest "
                "row. Pad to a fixed length (padded_shapes); tf.ensure_shape tells it where TensorFlow does not know",
            )
        else:
            layout = EXAMPLES
            self.expect_rows(tensor, f"the input {tensor.op.name!r}")
        self._layouts[tensor.ref()] = layout
        return layout

    def _of_op(self, op: tf.Operation) -> list[Layout]:
        if op.type in SOURCES and all(isinstance(self.layout(t), Shared) for t in op.inputs):
            why = self._of_python(op) if "PyFunc" in op.type else ""
            if why:
                return [Mixed(op, why)] * len(op.outputs)
            return [self._source(t) if self._reads(t) else SHARED for t in op.outputs]
        if op.type in VARIABLES:
            return [of_variable(op, op in self._trained)] * len(op.outputs)
        ins = [self.layout(t) for t in op.inputs]
        only = of_sizes(op, ins, self)
        if only is not None:
            return [only] * len(op.outputs)
        if all(isinstance(layout, Shared) for layout in ins) and op.type not in CONDITIONALS:
            return [_without_rows(op)] * len(op.outputs)
        check_gradient(op)
        if op.type in _SIZES and not any(isinstance(layout, Pooled) for layout in ins):
            return [self._size_of(op, t, layout) for t, layout in zip(op.inputs, ins, strict=True)]
        for layout in ins:
            if isinstance(layout, Mixed) and not _normalises_by_the_batch(op):  # which says more than its averages
                return [layout] * len(op.outputs)
        known = RULES.get(op.type)
        if known is None:
            remedy = next((f" ({text})" for start, text in _REMEDIES.items() if op.type.startswith(start)), "")
            why = f"nothing is known of what {op.type} does with the rows of a batch{remedy}"
            return [Mixed(op, why)] * len(op.outputs)
        found = known(op, ins, self)
        layouts = found if isinstance(found, list) else [found] * len(op.outputs)
        if op.type in _KEEP_ELEMENTS:
            return layouts
        return [replace(x, elements=None) if isinstance(x, Rows) and x.elements else x for x in layouts]

    def _of_python(self, op: tf.Operation) -> str:
        """Why what a Python function brings may be of other rows than it seems; empty where it is the only input."""
        others = [each for each in self.ops if each.type in SOURCES and each is not op and not _is_fed_number(each)]
        if others or self._has_examples:
            return (
                "a Python function that is handed no rows, beside other input: it may bring what it has kept of other "
                "rows, or rows that came before. Let tf.data bring everything, in one batch"
            )
        if self._trained & set(ancestors(op)):
            return "a Python function of a variable: nothing is known of its gradient"
        return ""

    def _size_of(self, op: tf.Operation, tensor: tf.Tensor, layout: Layout) -> Layout:
        if op.type == "Rank" or tensor.shape.is_fully_defined():
            return SHARED
        if isinstance(layout, (Shared, Rows)):
            return Sizes("how many rows were drawn") if self.sampled and isinstance(layout, Rows) else SHARED
        if isinstance(layout, Mixed):
            return layout
        return Mixed(op, "how many entries all examples have together")


def _is_fed_number(op: tf.Operation) -> bool:
    return op.type.startswith("Placeholder") and op.outputs[0].shape.rank == 0


def _normalises_by_the_batch(op: tf.Operation) -> bool:
    return op.type.startswith("FusedBatchNorm") and bool(op.get_attr("is_training"))


def _without_rows(op: tf.Operation) -> Layout:
    """What an op gives that is handed no example: it may have kept some, or bring some."""
    if all(t.dtype in (tf.resource, tf.variant) for t in op.outputs):
        return SHARED
    if op.type in ("Merge", "RefMerge"):
        return Mixed(op, "which branch was taken may depend on examples")
    if any(attr.type in ("func", "list(func)") for attr in op.op_def.attr):
        return Mixed(op, f"nothing is known of what a function does that {op.type} calls")
    if op.type.startswith("LookupTableFind"):
        return of_table(op.inputs[0], op)
    if op.op_def.is_stateful and op.type not in _HARMLESS and not op.type.startswith("Random"):
        return Mixed(op, f"{op.type} keeps a state, of which nobody knows whether rows are in it")
    return SHARED
