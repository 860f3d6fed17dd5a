"""Refuses ops to which the program has given another gradient than TensorFlow does.

Norms are taken from what an op computes, sums from the gradient that is registered for it (``gradient_override_map``,
``tf.custom_gradient``). Where these are not the same, what is added up may be longer than the norm that it was clipped
by; and of a gradient that is not linear, the sum over clipped rows is not the sum of what each row contributes.
"""

from __future__ import annotations

import contextlib
from typing import Any

import tensorflow.compat.v1 as tf
from tensorflow.python.framework import ops

from efl.errors import ModelError

_ATTRIBUTE = "_gradient_op_type"


def check_gradient(op: tf.Operation) -> None:
    """Looks at an op between rows and loss, or between a variable and rows.

    Raises:
      ModelError: Its gradient is one of the user's own.
    """
    if not has_known_gradient(op):
        raise ModelError(
            f"{op.name!r} ({op.type}) has a gradient of the user's own (tf.custom_gradient, gradient_override_map). It "
            "may mix rows, or be larger than the gradient that the op has, by which rows are clipped: nothing would "
            "bound what one row can do to the weights. (To pass gradients by a function f, write "
            "x + tf.stop_gradient(f(x) - x))"
        )


def has_known_gradient(op: tf.Operation) -> bool:
    """Whether an op's gradient is that of its type, or another of which it is known that rows stay apart in it."""
    if not is_overridden(op):
        return True
    name = op.get_attr(_ATTRIBUTE).decode()
    if name == "Identity":  # passes by an op that rounds, say; no op of one input reads a variable beside rows
        return len(op.inputs) == len(op.outputs) == 1 and _of_one_shape(*op.inputs, *op.outputs)
    if op.type != "IdentityN":
        return False
    try:  # made by tf.custom_gradient, with which TensorFlow and Keras write some of their own functions
        registered: Any = ops.gradient_registry.lookup(name)
    except LookupError:
        return False
    return all(module.split(".")[0] in ("tensorflow", "tf_keras", "keras") for module in _modules(registered, set()))


def is_overridden(op: tf.Operation) -> bool:
    """Whether an op has another gradient than that of its type."""
    return _ATTRIBUTE in op.node_def.attr


def _of_one_shape(one: tf.Tensor, other: tf.Tensor) -> bool:
    """Whether two tensors have equal sizes, as far as these are known."""
    return None not in (one.shape.rank, other.shape.rank) and one.shape.as_list() == other.shape.as_list()


def _modules(function: Any, seen: set[int]) -> set[str]:
    """The modules of a function and of all those that it holds on to: the user's is wrapped in TensorFlow's."""
    if id(function) in seen or not callable(function):
        return set()
    seen.add(id(function))
    found = {str(getattr(function, "__module__", ""))}
    for cell in getattr(function, "__closure__", None) or ():
        with contextlib.suppress(ValueError):  # an empty cell
            found |= _modules(cell.cell_contents, seen)
    return found
