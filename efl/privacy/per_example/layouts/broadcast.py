"""Where shapes are broadcast, a batch of one row becomes as many rows as whatever it meets has.

Each of them would be clipped as if it were the only one, and all of them are of that row.
"""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow.compat.v1 as tf

from efl.privacy.per_example.layouts.layout import Mixed, Rows
from efl.privacy.per_example.layouts.walk import Walk

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
    if rank is not None and all(_is_one(other, axis, rank) for other in others):
        return None
    after = None if rank is None else out.shape[axis]
    if before is not None and after is not None:
        return None if before == after else Mixed(op, _WHY)
    sizes = [tf.shape(tensor, out_type=tf.int64)[layout.axis], tf.shape(out, out_type=tf.int64)[axis]]
    walk.expect(tf.equal(*sizes), f"{op.name!r} ({op.type}) repeats the row of a batch of one. Before, after", *sizes)
    return None


def _is_one(tensor: tf.Tensor, axis: int, rank: int) -> bool:
    """Whether a tensor has one place, or none, on an axis of what it is broadcast to."""
    if tensor.shape.rank is None:
        return False
    place = axis - (rank - tensor.shape.rank)
    return place < 0 or tensor.shape[place] == 1
