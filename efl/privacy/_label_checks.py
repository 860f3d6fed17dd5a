"""Looks for uses of a label beside its randomisation: what the graph can show of the promise of ``LabelDP``.

A label is followed upwards from where it is randomised to all that it is made of, as that comes into the graph, and
from there downwards to everything that leaves a step: losses (and the updates and messages that follow from them),
metrics, messages, variables, Python functions. Of a wider tensor that it is cut out of, and of a record, its own part
is followed (``_label_columns``). What is done with it before it comes into the graph, or by hooks that fetch it, no
graph shows.

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
from efl.privacy._label_columns import Part, part_ahead
from efl.privacy._label_sources import SIZES, Sources, add, changes, computed_from, plain, sources_of
from efl.privacy._label_use import LabelUse
from efl.privacy.per_example.layouts.by_number import BROADCAST, UNARY

if TYPE_CHECKING:
    from efl.model import Model

_log = logging.getLogger("efl")
_OF_ASSERTIONS = frozenset({"Assert", "Const", "Identity", "NoOp"})
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
        sources = sources_of(use)
        _check_ids(use, sources, known)
        reached = _reached(sources.found.values(), {(op, 1) for op in randomisers})
        asked = [who for op, who in randomisers.items() if op in reached]
        if asked:
            raise ModelError(
                f"{use.who}: sample ids or prior of {asked[0]} are made from the label itself ({sources.name}), so "
                "nothing is promised of it: they have to be known without it"
            )
        for program in model._programs.values():
            found = _leaves(program, reached, sources.makers)
            if found and program.scope.mode is MODE.TRAIN:
                raise ModelError(
                    f"{use.who}: the label itself ({sources.name}) is used in {program.scope.wire} for {found}, not "
                    "only the randomised one, so nothing is promised of it. Use what was returned in its place; "
                    "metrics of training rows too. (Is something else in the same tensor, or made by the same Python "
                    "function? Let the input split it before)"
                )
            if found:
                _log.warning(
                    "%s: the label itself (%s) is used in %s for %s: whatever of this is published, of rows that are "
                    "trained on, is outside the promise",
                    use.who,
                    sources.name,
                    program.scope.wire,
                    found,
                )


def _check_ids(use: LabelUse, sources: Sources, known: Iterable[LabelUse]) -> None:
    """Looks whether a row can have several ids, under each of which its label would be released anew.

    Raises:
      ModelError: Ids are computed from what changes, or two uses of one name take one label under different ids.
    """
    assert use.op is not None
    ids = use.op.inputs[0]
    for op in computed_from(ids):
        if changes(op):
            raise ModelError(
                f"{use.who}: sample ids depend on {op.name} ({op.type}), which changes while the model is trained. A "
                "row that comes under a new id has its label released once more, without end: hand over ids that the "
                "data have"
            )
    for other in known:
        if other is use or other.question.name != use.question.name or other.op is None or other.labels is None:
            continue
        theirs = other.op.inputs[0]
        if plain(theirs) is not plain(ids) and _overlap(sources, sources_of(other)):
            raise ModelError(
                f"{use.who}: the label {sources.name} is randomised under the ids {ids.name} "
                f"and under {theirs.name}, which releases it twice: take the same ids everywhere, or give the second "
                "use another name="
            )


def _overlap(one: Sources, other: Sources) -> bool:
    """Whether two labels have something in common that they are made of."""
    for ref in one.found.keys() & other.found.keys():
        mine, theirs = one.found[ref][1], other.found[ref][1]
        if mine is None or theirs is None or mine & theirs:
            return True
    return False


def _reached(
    sources: Iterable[tuple[tf.Tensor, Part]], may_have: set[tuple[tf.Operation | None, int]]
) -> dict[tf.Operation, None]:
    """All ops that are handed something made of parts of tensors, or a size that they decide, nearest first."""
    found: dict[tf.Operation, None] = {}
    sized: set[object] = set()  # tensors whose size follows from these values
    parts: dict[object, Part] = {}
    frontier = [tensor for tensor, part in sources if add(parts, tensor, part)]
    while frontier:
        following: dict[object, tf.Tensor] = {}
        for tensor in frontier:
            is_sized, part = tensor.ref() in sized, parts[tensor.ref()]
            for op in dict.fromkeys(tensor.consumers()):
                handed = [number for number, t in enumerate(op.inputs) if t is tensor]
                if (op.type in SIZES and not is_sized) or all((op, number) in may_have for number in handed):
                    continue
                decides = is_sized or not all(_keeps_sizes(op, number) for number in handed)
                if not op.outputs:
                    found[op] = None
                for out in op.outputs:
                    more = [None] if is_sized else [part_ahead(out, part, number) for number in handed]
                    more = [each for each in more if each is None or each]
                    grows = sum(add(parts, out, each) for each in more) > 0
                    if decides and more and not out.shape.is_fully_defined():
                        grows = grows or out.ref() not in sized
                        sized.add(out.ref())
                    if grows:
                        found[op] = None
                        following[out.ref()] = out
        frontier = list(following.values())
    return found


def _keeps_sizes(op: tf.Operation, number: int) -> bool:
    """Whether what an op gives is as large as before if other numbers are in one of its inputs, equally many."""
    if op.type == "ConcatV2":
        return number < len(op.inputs) - 1
    return op.type in _ALIKE or number in _NO_SIZES.get(op.type, ())


def _asserts(op: tf.Operation) -> bool:
    """Whether an op only ends the step where something does not hold."""
    if op.type not in ("If", "StatelessIf"):
        return op.type == "Assert"
    for branch in ("then_branch", "else_branch"):
        held = op.graph._get_function(op.get_attr(branch).name)
        if held is None or not {node.op for node in held.cached_definition.node_def} <= _OF_ASSERTIONS:
            return False
    return True


def _leaves(program: Program, reached: dict[tf.Operation, None], makers: frozenset[tf.Operation]) -> str:
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
        tells = op.type == "PyFuncStateless" or (op._is_stateful and not op.type.startswith("LookupTableFind"))
        if op in runs and tells and op not in makers and not _asserts(op):
            return f"the operation {op.name!r} ({op.type})"
    return ""
