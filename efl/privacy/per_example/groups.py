"""Tensors seen by what is clipped as one: rows of the batch, or micro-batches of several rows."""

from __future__ import annotations

from dataclasses import dataclass

import tensorflow.compat.v1 as tf

from efl import _graph_checks
from efl.errors import ModelError
from efl.privacy.per_example.layouts.layout import Layout, Ragged, Rows
from efl.privacy.per_example.layouts.walk import Walk


@dataclass(frozen=True)
class Groups:
    """How the rows of a batch are clipped.

    Attributes:
      walk: The layouts.
      rows: How many rows of the batch make one group; 1 clips each example.
      count: int64 scalar, the number of groups (M).
    """

    walk: Walk
    rows: int
    count: tf.Tensor

    @classmethod
    def of(cls, walk: Walk, rows: int, where: str) -> Groups:
        """Groups of ``rows`` rows each; ``where`` names the loss, for messages.

        Raises:
          ModelError: The batch is known not to be a multiple of them.
        """
        if rows == 1:
            return cls(walk, rows, walk.size)
        text = f"a batch that is no multiple of a micro-batch's {rows} rows; rows of the batch"
        if walk.static_size is not None:
            if walk.static_size % rows:
                raise ModelError(f"{text}: {walk.static_size}")
            return cls(walk, rows, walk.size // rows)
        # Everything that is shaped by the number of groups waits for it: the error of a reshape would say less.
        whole = _graph_checks.check(tf.equal(walk.size % rows, 0), where, text, [walk.size], "privacy")
        with tf.control_dependencies([whole]):
            return cls(walk, rows, tf.identity(walk.size // rows))

    def first(self, tensor: tf.Tensor, layout: Rows) -> tf.Tensor:
        """``[M, T, rest…]``: the group first, then what else lies on the axis of the examples, then the other axes."""
        rank = tensor.shape.rank
        if layout.axis:
            tensor = tf.transpose(tensor, [layout.axis, *(a for a in range(rank) if a != layout.axis)])
        if layout.plain and self.rows == 1:
            return tf.expand_dims(tensor, 1)
        dynamic = tf.unstack(tf.shape(tensor))
        rest = [size if size is not None else dynamic[i] for i, size in enumerate(tensor.shape.as_list())][1:]
        batch, count = tf.cast(self.walk.size, tf.int32), tf.cast(self.count, tf.int32)
        within = layout.within
        if within is None:
            within = dynamic[0] // tf.maximum(layout.before * batch, 1)
        if layout.before > 1:
            tensor = tf.reshape(tensor, [layout.before, batch, within, *rest])
            tensor = tf.transpose(tensor, [1, 0, *range(2, 3 + len(rest))])
        return tf.reshape(tensor, [count, self.rows * layout.before * within, *rest])

    def owner(self, layout: Ragged) -> tf.Tensor:
        """int64 ``[entries]``: the group of each entry."""
        return layout.part.owner // self.rows if self.rows > 1 else layout.part.owner

    def spread(self, weights: tf.Tensor, tensor: tf.Tensor, layout: Layout) -> tf.Tensor:
        """Weights ``[M]`` of groups, shaped so that they multiply a tensor of some layout, place by place."""
        rank = tensor.shape.rank
        if isinstance(layout, Ragged):
            return tf.reshape(tf.gather(weights, self.owner(layout)), [-1] + [1] * (rank - 1))
        assert isinstance(layout, Rows)
        within = layout.within
        if within is None:
            within = tf.shape(tensor, out_type=tf.int64)[layout.axis] // tf.maximum(self.walk.size, 1)
        if not (layout.before == 1 and layout.within == 1 and self.rows == 1):
            tiled = tf.tile(tf.reshape(weights, [1, -1, 1]), [layout.before, 1, self.rows * within])
            weights = tf.reshape(tiled, [-1])
        return tf.reshape(weights, [1] * layout.axis + [-1] + [1] * (rank - layout.axis - 1))
