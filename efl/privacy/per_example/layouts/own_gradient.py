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
    held = _held(registered, {})
    gradients = [function for name, function in held if name == "grad_fn"]
    # A function of TensorFlow's that anybody can name (tf.sign) is as good as one of the user's own.
    inner = all("<locals>" in getattr(function, "__qualname__", "") for function in gradients)
    return bool(gradients) and inner and all(_is_tensorflows(function) for _, function in held)


def _is_tensorflows(function: Any) -> bool:
    return str(getattr(function, "__module__", "")).split(".")[0] in ("tensorflow", "tf_keras", "keras")


def is_overridden(op: tf.Operation) -> bool:
    """Whether an op has another gradient than that of its type."""
    return _ATTRIBUTE in op.node_def.attr


def _of_one_shape(one: tf.Tensor, other: tf.Tensor) -> bool:
    """Whether two tensors have equal sizes, as far as these are known."""
    return None not in (one.shape.rank, other.shape.rank) and one.shape.as_list() == other.shape.as_list()


def _held(function: Any, seen: dict[int, Any], name: str = "") -> list[tuple[str, Any]]:
    """A function and all those that it holds on to, with their names there: the user's is wrapped in TensorFlow's."""
    if id(function) in seen or not callable(function):
        return []
    seen[id(function)] = function
    found = [(name, function)]
    code, cells = getattr(function, "__code__", None), getattr(function, "__closure__", None) or ()
    for variable, cell in zip(() if code is None else code.co_freevars, cells):
        with contextlib.suppress(ValueError):  # an empty cell
            found += _held(cell.cell_contents, seen, variable)
    return found
