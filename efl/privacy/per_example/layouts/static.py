"""Values that are known when the graph is built, among them some that ``tf.get_static_value`` gives up on.

TensorFlow's own layers compute axes and permutations from a tensor's rank (``tf.nn.softmax(axis=1)`` does).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow.compat.v1 as tf

_COMPUTED: dict[str, Callable[..., Any]] = {
    "Add": np.add,
    "AddV2": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "FloorMod": np.mod,
    "FloorDiv": np.floor_divide,
    "Maximum": np.maximum,
    "Minimum": np.minimum,
    "Neg": np.negative,
    "Identity": np.asarray,
    "Cast": np.asarray,
    "Range": np.arange,
    "ConcatV2": lambda *parts: np.concatenate(parts[:-1], int(parts[-1])),
    "Pack": lambda *parts: np.stack(parts),
    "GatherV2": lambda values, places, axis: np.take(values, places, int(axis)),
    "ExpandDims": lambda value, axis: np.expand_dims(value, int(axis)),
    "ListDiff": lambda x, y: x[~np.isin(x, y)],
}
_DEPTH = 12


def value_of(tensor: tf.Tensor, depth: int = _DEPTH) -> np.ndarray | None:
    """The value of an integer tensor that follows from constants and static ranks; None where it does not."""
    known = tf.get_static_value(tensor)
    if known is not None or depth == 0:
        return known
    op = tensor.op
    if op.type == "Rank" and op.inputs[0].shape.rank is not None:
        return np.asarray(op.inputs[0].shape.rank, np.int32)
    if op.type not in _COMPUTED or tensor is not op.outputs[0] or not tensor.dtype.is_integer:
        return None
    if op.type == "Pack" and op.get_attr("axis") != 0:
        return None
    inputs = [value_of(t, depth - 1) for t in op.inputs]
    if any(value is None for value in inputs):
        return None
    return np.asarray(_COMPUTED[op.type](*inputs)).astype(tensor.dtype.as_numpy_dtype)  # which may wrap round
