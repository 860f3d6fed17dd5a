"""What a pass over a user's own data set brings at most, and whether it may leave rows out, if its graph tells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import tensorflow.compat.v1 as tf

from efl._dataset_ops import drops_rows, has_attr, number_of

_BATCHES = ("Batch", "PaddedBatch", "ParallelBatch", "MapAndBatch")


@dataclass(frozen=True)
class PassSize:
    """Of a data set, up to where it repeats.

    Attributes:
      elements: How many there are at most; None where nobody knows.
      each: How many rows an element has at most; None where nobody knows: before it is in a batch, it may be a row, or
        a batch that was made before.
      rows: How many rows a pass brings at most; None where nobody knows.
      drops: Whether the last rows of a pass may be left out; None where no batches are made here.
      repeats: Whether it brings pass after pass.
      first: The static length of an element's first part, along its first axis; None where it has none.
    """

    elements: int | None = None
    each: int | None = None
    rows: int | None = None
    drops: bool | None = None
    repeats: bool = False
    first: int | None = None

    def rows_in_all(self, batch_size: int | None) -> int | None:
        """How many rows a pass brings at most to an iterator, each element of which is a batch.

        Args:
          batch_size: How many rows a batch has at most, if that is known.
        """
        changed = None not in (self.first, self.each) and self.first != self.each
        if self.rows is not None and not changed:
            return self.rows
        # Made before, or by a function of what batches were made of.
        return None if self.elements is None or batch_size is None else self.elements * batch_size


_UNKNOWN = PassSize()


def pass_size(tensor: tf.Tensor) -> PassSize:
    """Of what a data set's tensor brings. Of functions that make data sets of elements nothing is known."""
    shapes = tensor.op.get_attr("output_shapes") if has_attr(tensor.op, "output_shapes") else []
    shape = tf.TensorShape(shapes[0] if shapes else None)
    return replace(_pass_size(tensor.op), first=shape[0] if shape.rank else None)


def _pass_size(op: tf.Operation) -> PassSize:
    behind = [pass_size(each) for each in op.inputs if each.dtype == tf.variant]
    kind = op.type.replace("Experimental", "").split("Dataset")[0]
    if not behind:
        return _source(op, kind)
    if kind == "Zip":
        return _zipped(behind)
    if len(behind) > 1 or kind in ("FlatMap", "Window", "GroupByWindow") or "Interleave" in kind:
        drops = [each.drops for each in behind if each.drops is not None]
        return PassSize(drops=any(drops) if drops else None, repeats=any(each.repeats for each in behind))
    found = behind[0]
    if kind == "Repeat":
        return found if number_of(op, 1) == 1 else replace(found, repeats=True)
    if kind in _BATCHES:
        return _in_batches(op, kind, found)
    if kind == "Unbatch":
        rows = found.rows if found.elements is None or found.first is None else found.elements * found.first
        return replace(found, elements=rows, each=1, rows=rows)
    if kind == "Rebatch":  # of the same rows
        return replace(found, elements=None, each=None, drops=bool(found.drops) or drops_rows(op))
    if found.repeats:
        return found
    if kind == "Take":
        return _taken(found, number_of(op, 1))
    if kind == "Skip" and found.elements is not None:
        gone = number_of(op, 1) or 0
        return _taken(found, max(0, found.elements - gone) if gone >= 0 else 0)
    if kind == "Shard" and found.elements is not None:
        shards = number_of(op, 1)
        return _taken(found, -(-found.elements // shards) if shards else None)
    return found


def _zipped(parts: Sequence[PassSize]) -> PassSize:
    """As long as the shortest, of those that end."""
    drops = [each.drops for each in parts if each.drops is not None]
    ends = [each for each in parts if not each.repeats]
    elements = [each.elements for each in ends if each.elements is not None]
    rows = [each.rows for each in ends if each.rows is not None]
    sizes = {each.each for each in parts}
    return PassSize(
        min(elements) if elements else None,
        sizes.pop() if len(sizes) == 1 else None,
        min(rows) if rows else None,
        any(drops) if drops else None,
        not ends,
    )


def _source(op: tf.Operation, kind: str) -> PassSize:
    if kind == "TensorSlice":
        count = op.inputs[0].shape[0] if op.inputs and op.inputs[0].shape.rank else None
        return PassSize(count)
    if kind == "Tensor":
        return PassSize(1)
    if kind == "Range":
        start, stop, step = (number_of(op, place) for place in range(3))
        if start is not None and stop is not None and step is not None:
            return PassSize(len(range(start, stop, step)))
    return _UNKNOWN


def _taken(found: PassSize, count: int | None) -> PassSize:
    if count is None or count < 0:
        return found
    elements = count if found.elements is None else min(count, found.elements)
    rows = None if found.each is None else elements * found.each
    known = [size for size in (rows, found.rows) if size is not None]
    return replace(found, elements=elements, rows=min(known) if known else None)


def _in_batches(op: tf.Operation, kind: str, found: PassSize) -> PassSize:
    size = number_of(op, len(op.inputs) - 3 if kind == "MapAndBatch" else 1)
    drops = drops_rows(op)
    elements, rows = None, found.rows
    if found.each is None:  # a row, then
        found, rows = replace(found, each=1), found.elements
    if size and found.elements is not None:
        elements = found.elements // size if drops else -(-found.elements // size)
    each = None if size is None or found.each is None else size * found.each
    return replace(found, elements=elements, each=each, rows=rows, drops=bool(found.drops) or drops)
