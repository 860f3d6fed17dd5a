"""Where shapes are broadcast, a batch of one row becomes as many rows as whatever it meets has.

Each of them would be clipped as if it were the only one, and all of them are of that row.
"""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow.compat.v1 as tf

from efl.privacy.per_example.layouts.by_number import BROADCAST, UNARY
from efl.privacy.per_example.layouts.layout import Mixed, Rows
from efl.privacy.per_example.layouts.walk import Walk

_MADE = ("Fill", "TruncatedNormal")
_WHY = "it repeats the row of a batch of one"


def repeats(
    op: tf.Operation, walk: Walk, tensor: tf.Tensor, layout: Rows, axis: int, others: Sequence[tf.Tensor]
) -> Mixed | None:
    """Sees to it that the axis of the examples is as long behind an op as before.

    Args:
      op: Broadcasts its inputs; its first output is looked at.
      walk: Notes what only the running program knows.
      tensor: Its input that holds rows.
      layout: Of that.
      axis: Of the examples in the output.
      others: Its inputs without examples.

    Returns:
      None, or what the output is where it is known to be longer.
    """
    rank, out = op.outputs[0].shape.rank, op.outputs[0]
    before = None if tensor.shape.rank is None else tensor.shape[layout.axis]
    if before is not None and before != 1:
        return None
    if rank is not None and all(
        _is_one(other, axis, rank) or _is_like_rows(other, axis, rank, walk) for other in others
    ):
        return None
    after = None if rank is None else out.shape[axis]
    if before is not None and after is not None:
        return None if before == after else Mixed(op, _WHY)
    sizes = [tf.shape(tensor, out_type=tf.int64)[layout.axis], tf.shape(out, out_type=tf.int64)[axis]]
    walk.expect(tf.equal(*sizes), f"{op.name!r} ({op.type}) repeats the row of a batch of one. Before, after", *sizes)
    return None


def differ(op: tf.Operation, walk: Walk, one: tuple[tf.Tensor, Rows], other: tuple[tf.Tensor, Rows]) -> Mixed | None:
    """Sees to it that two inputs have as many places on the axis of the examples, so that none repeats the other's.

    Args:
      op: Broadcasts its inputs, which have their examples on one axis of the output, in the same order.
      walk: Notes what only the running program knows.
      one: An input, and its layout.
      other: Another one.

    Returns:
      None, or what the output is where they are known to have different ones.
    """
    if one[1].within is not None and other[1].within is not None:
        return None  # as many as there are examples, times what these have
    known = [tensor.shape[layout.axis] for tensor, layout in (one, other)]
    if None not in known:
        return None if known[0] == known[1] else Mixed(op, _WHY)
    sizes = [tf.shape(tensor, out_type=tf.int64)[layout.axis] for tensor, layout in (one, other)]
    walk.expect(
        tf.equal(*sizes), f"{op.name!r} ({op.type}) repeats the row of a batch of one. Places in its inputs", *sizes
    )
    return None


def _is_one(tensor: tf.Tensor, axis: int, rank: int) -> bool:
    """Whether a tensor has one place, or none, on an axis of what it is broadcast to."""
    if tensor.shape.rank is None:
        return False
    place = axis - (rank - tensor.shape.rank)
    return place < 0 or tensor.shape[place] == 1


def _is_like_rows(tensor: tf.Tensor, axis: int, rank: int, walk: Walk) -> bool:
    """Whether a tensor has been made as large as one with rows on the axis, as the mask of a dropout is."""
    while tensor.shape.rank == rank:
        if tensor.op.type in _MADE or tensor.op.type.startswith(("Random", "StatelessRandom")):
            shape = tensor.op.inputs[0].op
            layout = walk.layout(shape.inputs[0]) if shape.type == "Shape" else None
            return isinstance(layout, Rows) and layout.axis == axis and shape.inputs[0].shape.rank == rank
        if tensor.op.type not in (*UNARY, *BROADCAST):
            return False
        larger = [t for t in tensor.op.inputs if t.shape.rank != 0]
        if len(larger) != 1:
            return False
        tensor = larger[0]
    return False
