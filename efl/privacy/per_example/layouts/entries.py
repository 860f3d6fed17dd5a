"""Which entries of a shape are known when the graph is built, where others of it say how many rows there are.

Of ``[rows, 3]`` the 3 is no secret, whatever slices, gathers, products and new shapes are made of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow.compat.v1 as tf

from efl.privacy.per_example.layouts.layout import Rows, Shared, Sized
from efl.privacy.per_example.layouts.static import value_of

if TYPE_CHECKING:
    from efl.privacy.per_example.layouts.walk import Walk

_DEPTH = 16


def entries_of(tensor: tf.Tensor, walk: Walk, depth: int = _DEPTH) -> np.ndarray | None:
    """The entries of an integer tensor: a number where it follows from the graph alone, None where it may not.

    Args:
      tensor: A shape, or what was computed of one.
      walk: Knows which axes hold rows: what a static shape says of them is not believed.
      depth: How many ops to look back.

    Returns:
      Objects in the tensor's shape; None where not even that is known.
    """
    op = tensor.op
    if not depth or not tensor.dtype.is_integer:
        return None
    if op.type == "Shape":
        return _of_shape(op.inputs[0], walk)
    if op.type not in _MADE:
        known = value_of(tensor)
        return None if known is None else np.asarray(known, object)
    of_data = [entries_of(t, walk, depth - 1) for t in _data(op)]
    if any(entries is None for entries in of_data):
        return None
    try:
        made = _MADE[op.type](op, tensor, *of_data)
    except (IndexError, ValueError):  # which the op itself will say when it runs
        return None
    return None if made is None else _in_dtype(np.asarray(made, object), tensor.dtype)


def are_known(tensor: tf.Tensor, walk: Walk) -> bool:
    """Whether all entries of a tensor follow from the graph alone."""
    entries = entries_of(tensor, walk)
    return entries is not None and all(entry is not None for entry in entries.reshape(-1))


def is_long_along_one_axis(tensor: tf.Tensor, shape: tf.Tensor, walk: Walk) -> bool:
    """Whether of what is made in a shape only the first axis, but for some of one place, has a size that is not known.

    A size of -1 is none: it follows from the others.
    """
    entries = entries_of(shape, walk)
    if entries is None or entries.ndim != 1 or tensor.shape.rank != len(entries):
        return False
    unknown = [place for place, size in enumerate(entries) if size is None]
    if len(unknown) != 1:
        return False
    before, after = entries[: unknown[0]], entries[unknown[0] + 1 :]
    # The rule of the op goes by the static shape.
    alike = tensor.shape.as_list()[: len(before)] == [1] * len(before)
    return alike and all(size == 1 for size in before) and all(size >= 0 for size in after)


def _of_shape(tensor: tf.Tensor, walk: Walk) -> np.ndarray | None:
    layout = walk.layout(tensor)
    if tensor.shape.rank is None or not isinstance(layout, (Rows, Shared)):
        return None
    sizes = np.asarray(tensor.shape.as_list(), object)
    if isinstance(layout, (Rows, Sized)) and len(sizes):
        sizes[layout.axis if isinstance(layout, Rows) else 0] = None
    return sizes


def _in_dtype(entries: np.ndarray, dtype: tf.DType) -> np.ndarray:
    """Numbers as the op computes them, which may wrap round."""
    wrapped = [None if e is None else int(np.asarray(int(e)).astype(dtype.as_numpy_dtype)) for e in entries.reshape(-1)]
    return np.asarray(wrapped, object).reshape(entries.shape)


def _data(op: tf.Operation) -> list[tf.Tensor]:
    """Inputs that hold entries; the others say which are meant."""
    if op.type in ("Pack", "Mul"):
        return list(op.inputs)
    return list(op.inputs)[:-1] if op.type == "ConcatV2" else [op.inputs[0]]


def _slice(op: tf.Operation, tensor: tf.Tensor, sizes: np.ndarray) -> Any:
    begin, size = value_of(op.inputs[1]), value_of(op.inputs[2])
    if begin is None or size is None or sizes.ndim != 1:
        return None
    first, count = int(begin[0]), int(size[0])
    return sizes[first:] if count < 0 else sizes[first : first + count]


def _strided_slice(op: tf.Operation, tensor: tf.Tensor, sizes: np.ndarray) -> Any:
    bounds = [value_of(t) for t in op.inputs[1:4]]
    if sizes.ndim != 1 or any(bound is None or len(bound) != 1 for bound in bounds):
        return None
    if op.get_attr("ellipsis_mask") or op.get_attr("new_axis_mask"):
        return None
    begin, end, stride = (int(bound[0]) for bound in bounds if bound is not None)
    if op.get_attr("shrink_axis_mask"):
        return sizes[begin]
    return sizes[None if op.get_attr("begin_mask") else begin : None if op.get_attr("end_mask") else end : stride]


def _gather(op: tf.Operation, tensor: tf.Tensor, sizes: np.ndarray) -> Any:
    places, axis = value_of(op.inputs[1]), value_of(op.inputs[2])
    if places is None or axis is None or sizes.ndim != 1 or op.get_attr("batch_dims"):
        return None
    within = all(0 <= place < len(sizes) for place in places.reshape(-1))
    return sizes[places.astype(np.int64)] if within else None


def _product(op: tf.Operation, tensor: tf.Tensor, sizes: np.ndarray) -> Any:
    axes = value_of(op.inputs[1])
    if sizes.ndim != 1 or axes is None or not axes.size:
        return None
    product = None if any(size is None for size in sizes) else int(np.prod([1, *sizes], dtype=object))
    return np.asarray([product] if op.get_attr("keep_dims") else product, object)


def _times(op: tf.Operation, tensor: tf.Tensor, one: np.ndarray, other: np.ndarray) -> Any:
    return np.frompyfunc(lambda a, b: None if a is None or b is None else a * b, 2, 1)(one, other)


def _pack(op: tf.Operation, tensor: tf.Tensor, *parts: np.ndarray) -> Any:
    return np.stack(parts) if op.get_attr("axis") == 0 else None


def _concat(op: tf.Operation, tensor: tf.Tensor, *parts: np.ndarray) -> Any:
    return np.concatenate(parts) if all(part.ndim == 1 for part in parts) else None


def _unpack(op: tf.Operation, tensor: tf.Tensor, sizes: np.ndarray) -> Any:
    return sizes[tensor.value_index] if sizes.ndim == 1 else None


_MADE: dict[str, Any] = {
    "Identity": lambda op, tensor, sizes: sizes,
    "Cast": lambda op, tensor, sizes: sizes,
    "Slice": _slice,
    "StridedSlice": _strided_slice,
    "GatherV2": _gather,
    "Prod": _product,
    "Mul": _times,
    "Pack": _pack,
    "ConcatV2": _concat,
    "Unpack": _unpack,
}
