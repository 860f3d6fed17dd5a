"""Looks for uses of a label beside its randomisation: what the graph can show of the promise of ``LabelDP``.

A label is followed upwards from where it is randomised, through casts, reshapes and whatever else works on it alone, to
where it comes into the graph; and from there downwards to everything that leaves a step: losses (and the updates and
messages that follow from them), metrics, messages, variables, Python functions. A label that is cut out of a wider
tensor is followed from where it is cut out, and from wherever else it may be (``_label_cuts``). What is done with it
before it comes into the graph, or by hooks that fetch it, no graph shows.

Sizes tell nothing of labels where they are those of the batch; those of what a label chooses (``tf.boolean_mask``,
``tf.unique``) count labels, so these are followed as values are.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import tensorflow.compat.v1 as tf

from efl._program import Program, ancestors
from efl._task_scope import MODE
from efl.errors import ModelError
from efl.privacy import _beside
from efl.privacy._label_cuts import other_ways
from efl.privacy._label_use import LabelUse
from efl.privacy.per_example.layouts.by_number import BROADCAST, UNARY

if TYPE_CHECKING:
    from efl.model import Model

_log = logging.getLogger("efl")
# Ops that tell how large a tensor is, and nothing of what is in it.
_SIZES = frozenset({"Shape", "ShapeN", "Size", "Rank", "ZerosLike", "OnesLike"})
_CUTS = frozenset({"StridedSlice", "Slice", "Gather", "GatherV2", "GatherNd"})
_CHANGES = ("ReadVariable", "Variable", "VarHandle", "ResourceGather", "Multinomial", "StatelessMultinomial")
_RESHAPES = frozenset({"Cast", "Reshape", "ExpandDims", "Squeeze", "Identity", "StopGradient"})
_SOURCES = ("IteratorGetNext", "Placeholder", "PyFunc", "EagerPyFunc", "QueueDequeue", "ReaderRead", "OptionalGetValue")
# Inputs whose numbers do not decide how large an output is: others choose entries, or say sizes and axes. Of an op that
# is in none of these it is taken that every input does.
_NO_SIZES: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(
        (
            "Reshape", "ExpandDims", "Squeeze", "Transpose", "StridedSlice", "Slice", "Tile", "BroadcastTo", "Pad",
            "PadV2", "MirrorPad", "ReverseV2", "Roll", "Sum", "Mean", "Prod", "Max", "Min", "All", "Any", "ArgMax",
            "ArgMin", "EuclideanNorm", "Softmax", "LogSoftmax", "L2Loss", "Cumsum", "Cumprod", "TopKV2", "Unpack",
            "SplitV", "RandomShuffle", "Print", "PrintV2",
        ),
        (0,),
    ),
    **dict.fromkeys(
        (
            "MatMul", "BatchMatMul", "BatchMatMulV2", "BatchMatMulV3", "BiasAdd", "Gather", "GatherV2", "GatherNd",
            "InTopK", "InTopKV2", "SoftmaxCrossEntropyWithLogits", "SparseSoftmaxCrossEntropyWithLogits", "ScatterNd",
            "UnsortedSegmentSum",
        ),
        (0, 1),
    ),
    "Select": (0, 1, 2),
    "OneHot": (0, 2, 3),
    "Split": (1,),
    "ResourceGather": (1,),
    "LookupTableFind": (1, 2),
    "LookupTableFindV2": (1, 2),
    "SparseToDense": (0, 2, 3),
}  # fmt: skip
_ALIKE = frozenset({*UNARY, *BROADCAST, "ZerosLike", "OnesLike", "Pack", "Einsum"})  # no input's numbers do


def check(model: Model, uses: Sequence[LabelUse], known: Iterable[LabelUse]) -> None:
    """Looks at all programs of a model.

    Args:
      model: Compiled.
      uses: Whose labels are looked for.
      known: All uses in the graph: what they randomise, they may be handed.

    Raises:
      ModelError: A label leaves a training step as it is. (One that an evaluation reads is logged.)
    """
    randomisers = {use.op: use.who for use in known}
    for use in uses:
        assert use.labels is not None
        root = _origin(use.labels)
        _check_ids(use, root, known)
        reached: dict[tf.Operation, None] = {}
        for way in (root, *other_ways(root)):
            if way is not root and way.op not in randomisers:
                reached[way.op] = None
            reached |= _reached(way, {(op, 1) for op in randomisers})
        asked = [who for op, who in randomisers.items() if op in reached]
        if asked:
            raise ModelError(
                f"{use.who}: sample ids or prior of {asked[0]} are made from the label itself ({root.name}), so "
                "nothing is promised of it: they have to be known without it"
            )
        for program in model._programs.values():
            found = _leaves(program, reached)
            if found and program.scope.mode is MODE.TRAIN:
                raise ModelError(
                    f"{use.who}: the label itself ({root.name}) is used in {program.scope.wire} for {found}, not only "
                    "the randomised one, so nothing is promised of it. Use what was returned in its place; metrics of "
                    "training rows too. (Is something else in the same tensor? Let the input split it before)"
                )
            if found:
                _log.warning(
                    "%s: the label itself (%s) is used in %s for %s: whatever of this is published, of rows that are "
                    "trained on, is outside the promise",
                    use.who,
                    root.name,
                    program.scope.wire,
                    found,
                )


def _check_ids(use: LabelUse, root: tf.Tensor, known: Iterable[LabelUse]) -> None:
    """Looks whether a row can have several ids, under each of which its label would be released anew.

    Raises:
      ModelError: Ids are computed from what changes, or two uses of one name take one label under different ids.
    """
    assert use.op is not None
    ids = use.op.inputs[0]
    for op in ancestors(ids.op):
        if op.type.startswith(_CHANGES) or "Random" in op.type:
            raise ModelError(
                f"{use.who}: sample ids depend on {op.name} ({op.type}), which changes while the model is trained. A "
                "row that comes under a new id has its label released once more, without end: hand over ids that the "
                "data have"
            )
    for other in known:
        if other is use or other.question.name != use.question.name or other.op is None or other.labels is None:
            continue
        theirs = other.op.inputs[0]
        if _plain(theirs) is not _plain(ids) and _origin(other.labels) is root:
            raise ModelError(
                f"{use.who}: the label {root.name} is randomised under the ids {ids.name} and under {theirs.name}, "
                "which releases it twice: take the same ids everywhere, or give the second use another name="
            )


def _plain(tensor: tf.Tensor) -> tf.Tensor:
    """Whose numbers a tensor has, in another shape or dtype at most."""
    while tensor.op.type in _RESHAPES:
        tensor = tensor.op.inputs[0]
    return tensor


def _origin(labels: tf.Tensor) -> tf.Tensor:
    """The tensor as which a label comes into the graph, or is cut out of something wider."""
    known: dict[object, tf.Tensor] = {}

    def of(tensor: tf.Tensor) -> tf.Tensor:
        if tensor.ref() not in known:
            known[tensor.ref()] = tensor  # where the way goes in a circle
            known[tensor.ref()] = climbed(tensor)
        return known[tensor.ref()]

    def climbed(tensor: tf.Tensor) -> tf.Tensor:
        op = tensor.op
        before = {t.ref(): t for t in op.inputs if _is_of_batch(t)}
        before = before or {t.ref(): t for t in op.inputs if _is_of_batch(t, scalars=True)}  # a row by itself
        if not before or len(op.outputs) != 1 or op.type.startswith((*_SOURCES, "Parse", "Decode")):
            return tensor
        if op.type in _CUTS and not all(map(_is_column, before.values())):
            return tensor
        # What is made of several things is the label itself, unless all of them are made of one.
        above = {root.ref(): root for root in map(of, before.values())}
        return tensor if len(above) > 1 else above.popitem()[1]

    return of(labels)


def _is_column(tensor: tf.Tensor) -> bool:
    return tensor.shape.rank is not None and tensor.shape[1:].num_elements() == 1


def _is_of_batch(tensor: tf.Tensor, scalars: bool = False) -> bool:
    """Whether a tensor's values depend on those of a batch; with ``scalars`` also on a single number that is read."""
    seen, stack = {tensor.op}, [tensor]
    while stack:
        here = stack.pop()
        if here.op.type in _SIZES:
            continue
        if here.op.type.startswith(_SOURCES) and (scalars or here.shape.rank != 0):  # a number may be a rate, or a flag
            return True
        for before in here.op.inputs:
            if before.op not in seen:
                seen.add(before.op)
                stack.append(before)
    return False


def _reached(root: tf.Tensor, may_have: set[tuple[tf.Operation | None, int]]) -> dict[tf.Operation, None]:
    """All ops that are handed something made of a tensor's values, or a size that they decide, nearest first."""
    found: dict[tf.Operation, None] = {}
    sized: set[object] = set()  # tensors whose size follows from these values
    frontier = [root]
    while frontier:
        following: list[tf.Tensor] = []
        for tensor in frontier:
            is_sized = tensor.ref() in sized
            for op in tensor.consumers():
                handed = [number for number, t in enumerate(op.inputs) if t is tensor]
                if (op.type in _SIZES and not is_sized) or all((op, number) in may_have for number in handed):
                    continue
                decides = is_sized or not all(_keeps_sizes(op, number) for number in handed)
                new = [t for t in op.outputs if decides and t.ref() not in sized and not t.shape.is_fully_defined()]
                sized.update(t.ref() for t in new)
                following.extend(new if op in found else op.outputs)
                found[op] = None
        frontier = following
    return found


def _keeps_sizes(op: tf.Operation, number: int) -> bool:
    """Whether what an op gives is as large as before if other numbers are in one of its inputs, equally many."""
    if op.type == "ConcatV2":
        return number < len(op.inputs) - 1
    return op.type in _ALIKE or number in _NO_SIZES.get(op.type, ())


def _leaves(program: Program, reached: dict[tf.Operation, None]) -> str:
    """By what a label leaves a step of a program, in words; empty where it does not."""
    if program.op is None:
        return ""
    told = {m.value.op: f"metric {m.name!r}" for m in program.metrics.values()}
    if program.loss is not None:
        told[program.loss.op] = "the loss"
    for op, what in told.items():
        if op in reached:
            return what
    runs = set(ancestors(program.op, *told)).difference(_beside.notes())
    for op in reached:
        if op in runs and op._is_stateful and op.type != "Assert":
            return f"the operation {op.name!r} ({op.type})"
    return ""
