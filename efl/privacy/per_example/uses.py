"""Where a variable's values meet examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import tensorflow.compat.v1 as tf

from efl.errors import ModelError
from efl.privacy.per_example.layouts.layout import Pooled, Shared
from efl.privacy.per_example.layouts.own_gradient import check_gradient, is_overridden
from efl.privacy.per_example.layouts.walk import Walk

# Ops that leave a variable's numbers, and their order, as they are.
_SAME_NUMBERS = frozenset({"Identity", "ReadVariableOp", "Reshape", "ExpandDims", "Squeeze", "EnsureShape"})
_UNARY = frozenset(
    {"Neg", "Square", "Exp", "Expm1", "Log", "Log1p", "Sqrt", "Rsqrt", "Abs", "Tanh", "Sigmoid", "Softplus", "Relu",
     "Elu", "Reciprocal", "Inv", "Sin", "Cos", "Erf"}
)  # fmt: skip
_BINARY = frozenset(
    {"Add", "AddV2", "Sub", "Mul", "RealDiv", "Maximum", "Minimum", "Pow", "SquaredDifference", "DivNoNan", "MulNoNan"}
)
_NO_GRADIENT = frozenset({"StopGradient", "PreventGradient"})
_LOOKUPS = frozenset({"Gather", "GatherV2", "ResourceGather"})


@dataclass(frozen=True)
class Meeting:
    """An op that reads something of a variable and something of examples.

    Attributes:
      op: It.
      index: Which of its inputs comes from the variable.
      direct: That input holds the variable's own numbers in their order (or, of an op that combines looked up rows,
        rows of it by the ids that were made distinct).
      diagonal: Number k of that input is made of number k of the variable, and of no other.
    """

    op: tf.Operation
    index: int
    direct: bool
    diagonal: bool


def source(variable: tf.Variable) -> tf.Tensor:
    """The tensor from which everything that reads a variable is reached."""
    return variable.handle


def meetings(variable: tf.Variable, walk: Walk) -> list[Meeting]:
    """All meetings of a variable, below the walk's targets.

    Raises:
      ModelError: On the way to one an op has a gradient of the user's own, or rows and variable come out of one op.
    """
    found: list[Meeting] = []
    seen = {source(variable).ref()}
    frontier = [source(variable)]
    while frontier:
        tensor = frontier.pop()
        for op in tensor.consumers():
            if not walk.knows(op) or op.type in _NO_GRADIENT:
                continue
            check_gradient(op)
            shared = [t for t in op.outputs if isinstance(walk.layout(t), (Shared, Pooled))]
            for out in shared:  # an op of several outputs may read examples too, and hand these on apart
                if out.ref() not in seen and _has_gradient(out.dtype):
                    seen.add(out.ref())
                    frontier.append(out)
            if len(shared) == len(op.outputs):
                continue
            for index, t in enumerate(op.inputs):
                if t is tensor and not any(m.op is op and m.index == index for m in found):
                    diagonal = _is_diagonal(t, variable, {})
                    found.append(Meeting(op, index, _is_direct(t, variable, walk), diagonal))
    for meeting in found:
        for rows in examples_of(meeting.op, walk):
            if any(out.ref() in seen for out in rows.op.outputs):
                # Where the gradient is to stop, it would stop on its way to the variable too.
                raise ModelError(
                    f"{rows.op.name!r} ({rows.op.type}) hands on numbers of {variable.op.name} together with rows of "
                    f"the batch, and {meeting.op.name!r} reads both: a gradient of single rows cannot be told from it. "
                    "Hand them on apart"
                )
    return found


def _has_gradient(dtype: tf.DType) -> bool:
    """Whether gradients go through tensors of a type; in resources and variants there are others."""
    return dtype.is_floating or dtype.is_complex or dtype in (tf.resource, tf.variant)


def _is_direct(tensor: tf.Tensor, variable: tf.Variable, walk: Walk) -> bool:
    pooled = walk.layout(tensor)
    while isinstance(pooled, Pooled):
        if tensor.op.type == "Identity" and not is_overridden(tensor.op):
            tensor = tensor.op.inputs[0]
        elif tensor.op.type in _LOOKUPS and tensor.op.inputs[1] is pooled.unique.outputs[0]:
            tensor = tensor.op.inputs[0]
            break
        else:
            return False
    while tensor is not source(variable):
        if tensor.op.type not in _SAME_NUMBERS or is_overridden(tensor.op):
            return False
        tensor = tensor.op.inputs[0]
    return True


def _is_diagonal(tensor: tf.Tensor, variable: tf.Variable, known: dict[object, bool | None]) -> bool:
    return _depends(tensor, variable, known) is True


def _depends(tensor: tf.Tensor, variable: tf.Variable, known: dict[object, bool | None]) -> bool | None:
    """True: number by number; False: in another way; None: not at all."""
    if tensor is source(variable):
        return True
    if tensor.ref() not in known:
        known[tensor.ref()] = None  # a loop would come back here
        op = tensor.op
        inputs = {t.ref(): _depends(t, variable, known) for t in op.inputs}
        of_it = [t for t in op.inputs if inputs[t.ref()] is not None]
        same = op.type in _SAME_NUMBERS and (op.type == "ReadVariableOp" or of_it == [op.inputs[0]])
        size = variable.shape.num_elements()
        whole = all(t.dtype == tf.resource or t.shape.num_elements() == size for t in of_it)
        by_number = same or op.type in _UNARY or op.type in _BINARY
        fits = by_number and whole and tensor.shape.num_elements() == size
        known[tensor.ref()] = None if not of_it else fits and all(inputs[t.ref()] for t in of_it)
    return known[tensor.ref()]


def examples_of(op: tf.Operation, walk: Walk) -> Sequence[tf.Tensor]:
    """The inputs of an op that hold examples."""
    return [t for t in op.inputs if not isinstance(walk.layout(t), (Shared, Pooled))]
