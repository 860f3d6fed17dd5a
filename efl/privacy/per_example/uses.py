"""Where a variable's values meet examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import tensorflow.compat.v1 as tf

from efl.privacy.per_example.layout import Pooled, Shared
from efl.privacy.per_example.walk import Walk

# Ops that leave a variable's numbers, and their order, as they are.
_SAME_NUMBERS = frozenset(
    {"Identity", "ReadVariableOp", "Reshape", "ExpandDims", "Squeeze", "EnsureShape", "StopGradient"}
)
_LOOKUPS = frozenset({"Gather", "GatherV2", "ResourceGather"})


@dataclass(frozen=True)
class Meeting:
    """An op that reads something of a variable and something of examples.

    Attributes:
      op: It.
      index: Which of its inputs comes from the variable.
      direct: That input holds the variable's own numbers in their order (or, of an op that combines looked up rows,
        rows of it by the ids that were made distinct).
    """

    op: tf.Operation
    index: int
    direct: bool


def source(variable: tf.Variable) -> tf.Tensor:
    """The tensor from which everything that reads a variable is reached."""
    return variable.handle


def meetings(variable: tf.Variable, walk: Walk) -> list[Meeting]:
    """All meetings of a variable, below the walk's targets."""
    found: list[Meeting] = []
    seen = {source(variable).ref()}
    frontier = [source(variable)]
    while frontier:
        tensor = frontier.pop()
        for op in tensor.consumers():
            if not walk.knows(op):
                continue
            if all(isinstance(walk.layout(t), (Shared, Pooled)) for t in op.outputs):
                for out in op.outputs:
                    if out.ref() not in seen:
                        seen.add(out.ref())
                        frontier.append(out)
                continue
            for index, t in enumerate(op.inputs):
                meeting = Meeting(op, index, _is_direct(t, variable, walk))
                if t is tensor and meeting not in found:
                    found.append(meeting)
    return found


def _is_direct(tensor: tf.Tensor, variable: tf.Variable, walk: Walk) -> bool:
    pooled = walk.layout(tensor)
    while isinstance(pooled, Pooled):
        if tensor.op.type == "Identity":
            tensor = tensor.op.inputs[0]
        elif tensor.op.type in _LOOKUPS and tensor.op.inputs[1] is pooled.unique.outputs[0]:
            tensor = tensor.op.inputs[0]
            break
        else:
            return False
    while tensor is not source(variable):
        if tensor.op.type not in _SAME_NUMBERS:
            return False
        tensor = tensor.op.inputs[0]
    return True


def examples_of(op: tf.Operation, walk: Walk) -> Sequence[tf.Tensor]:
    """The inputs of an op that hold examples."""
    return [t for t in op.inputs if not isinstance(walk.layout(t), (Shared, Pooled))]
