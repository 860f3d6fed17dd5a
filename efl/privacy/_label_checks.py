"""Looks for uses of a label beside its randomisation: what the graph can show of the promise of ``LabelDP``.

A label is followed upwards from where it is randomised, through casts, reshapes and whatever else works on it alone, to
where it comes into the graph; and from there downwards to everything that leaves a step: losses (and the updates and
messages that follow from them), metrics, messages, variables, Python functions. A label that is cut out of a wider
tensor is followed from where it is cut out. What is done with it before it comes into the graph, or by hooks that fetch
it, no graph shows.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import tensorflow.compat.v1 as tf

from efl._program import Program, ancestors
from efl._task_scope import MODE
from efl.errors import ModelError
from efl.privacy._label_use import LabelUse

if TYPE_CHECKING:
    from efl.model import Model

_log = logging.getLogger("efl")
# Ops that tell how many rows there are, and nothing of what is in them.
_SIZES = frozenset({"Shape", "ShapeN", "Size", "Rank", "ZerosLike", "OnesLike"})
_CUTS = frozenset({"StridedSlice", "Slice", "Gather", "GatherV2", "GatherNd"})
_SOURCES = ("IteratorGetNext", "Placeholder", "PyFunc", "EagerPyFunc", "QueueDequeue", "ReaderRead", "OptionalGetValue")


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
        reached = _reached(root, {(op, 1) for op in randomisers})
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


def _origin(labels: tf.Tensor) -> tf.Tensor:
    """The tensor as which a label comes into the graph, or is cut out of something wider."""
    tensor = labels
    while True:
        op = tensor.op
        before = [t for t in op.inputs if _is_of_batch(t)]
        if len(before) != 1 or len(op.outputs) != 1 or op.type.startswith((*_SOURCES, "Parse", "Decode")):
            return tensor
        if op.type in _CUTS and not _is_column(before[0]):
            return tensor
        tensor = before[0]


def _is_column(tensor: tf.Tensor) -> bool:
    return tensor.shape.rank is not None and tensor.shape[1:].num_elements() == 1


def _is_of_batch(tensor: tf.Tensor) -> bool:
    """Whether a tensor's values depend on those of a batch."""
    seen, stack = {tensor.op}, [tensor]
    while stack:
        here = stack.pop()
        if here.op.type in _SIZES:
            continue
        if here.op.type.startswith(_SOURCES) and here.shape.rank != 0:  # a single number is a rate, or a flag
            return True
        for before in here.op.inputs:
            if before.op not in seen:
                seen.add(before.op)
                stack.append(before)
    return False


def _reached(root: tf.Tensor, may_have: set[tuple[tf.Operation | None, int]]) -> dict[tf.Operation, None]:
    """All ops that are handed something made of a tensor's values, nearest first."""
    found: dict[tf.Operation, None] = {}
    frontier = [root]
    while frontier:
        following = []
        for tensor in frontier:
            for op in tensor.consumers():
                handed = [number for number, t in enumerate(op.inputs) if t is tensor]
                if op in found or op.type in _SIZES or all((op, number) in may_have for number in handed):
                    continue
                found[op] = None
                following.extend(op.outputs)
        frontier = following
    return found


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
    runs = set(ancestors(program.op, *told))
    for op in reached:
        if op in runs and op._is_stateful and op.type != "Assert":
            return f"the operation {op.name!r} ({op.type})"
    return ""
