"""Other ways to a label that is cut out of a wider tensor, or parsed out of a record: whoever takes the same part.

A label in column 3 of a tensor is also in what is made of the whole tensor, or of columns 2 to 5; not in columns 0 to
2. What a cut takes is known where its numbers are constants; of any other it is taken that the label is in it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import tensorflow.compat.v1 as tf

from efl.privacy.per_example.layouts.by_number import UNARY

_MANY = 1 << 24  # numbers in a row of which no table is made
_SERIALISED = ("Parse", "Decode")


def other_ways(root: tf.Tensor) -> list[tf.Tensor]:
    """Tensors beside ``root`` that have, or may have, the label of which ``root`` is the first in the graph.

    Args:
      root: A label as it comes into the graph or is cut, or parsed, out of something.
    """
    op = root.op
    if op.type.startswith(_SERIALISED):
        return [out for record in op.inputs[:1] for out in _of_records(record, root)]
    wide = _wide(op)
    if wide is None:
        return []
    own, found = _columns(root, wide), list[tf.Tensor]()
    for held in _alike(wide):
        for consumer in held.consumers():
            if consumer is op or consumer.type in UNARY or consumer.type in ("Shape", "ShapeN", "Size", "Rank"):
                continue
            for out in consumer.outputs:
                taken = _columns(out, held)
                if own is None or taken is None or own & taken:
                    found.append(out)
    return found


def _wide(op: tf.Operation) -> tf.Tensor | None:
    """What an op cuts."""
    place = {"Split": 1}.get(op.type, 0)
    cuts = ("StridedSlice", "Slice", "Gather", "GatherV2", "GatherNd", "Unpack", "Split", "SplitV")
    return op.inputs[place] if op.type in cuts else None


def _alike(wide: tf.Tensor) -> list[tf.Tensor]:
    """All tensors that have the numbers of this one, each by itself, in the same places."""
    top = wide
    while top.op.type in UNARY and len(top.op.inputs) == 1:
        top = top.op.inputs[0]
    found = [top]
    for held in found:
        found += [out for op in held.consumers() if op.type in UNARY and len(op.inputs) == 1 for out in op.outputs]
    return found


def _of_records(record: tf.Tensor, root: tf.Tensor) -> Iterator[tf.Tensor]:
    """What else is made of serialised records, but for other fields of the same or another parse."""
    place = list(root.op.outputs).index(root)
    fields = _fields(root.op)
    for op in record.consumers():
        if op is root.op or op.type in ("Shape", "Size", "Rank"):
            continue
        others = _fields(op)
        apart = op.type == root.op.type and fields is not None and others is not None
        for number, out in enumerate(op.outputs):
            if not apart or others[number] == fields[place]:  # type: ignore[index]  # both are known
                yield out


def _fields(op: tf.Operation) -> list[bytes | int] | None:
    """Of each output of a parse, which field it is of; None where nobody knows."""
    if op.type == "DecodeCSV":
        chosen = list(op.get_attr("select_cols"))
        return chosen or list(range(len(op.outputs)))
    if op.type != "ParseExampleV2":
        return None
    sparse, dense, ragged = (tf.get_static_value(op.inputs[place]) for place in (2, 3, 4))
    if sparse is None or dense is None or ragged is None:
        return None
    names = [*(list(sparse.ravel()) * 3), *dense.ravel(), *(list(ragged.ravel()) * 2)]
    return names if len(names) == len(op.outputs) else None


def _columns(out: tf.Tensor, wide: tf.Tensor) -> set[int] | None:
    """Which numbers of a row of ``wide`` an output of a cut of it has; None where nobody knows, or it is no cut."""
    row = wide.shape[1:] if wide.shape.rank else None
    if row is None or not row.is_fully_defined() or row.num_elements() > _MANY or _wide(out.op) is not wide:
        return None
    table = np.arange(row.num_elements()).reshape(1, *row.as_list())
    taken = _cut(out, table)
    return None if taken is None else set(np.ravel(taken).tolist())


def _cut(out: tf.Tensor, table: np.ndarray) -> np.ndarray | None:
    op = out.op
    constants = [None if t is _wide(op) else tf.get_static_value(t) for t in op.inputs]
    number = list(op.outputs).index(out)
    if op.type == "Unpack":
        axis = op.get_attr("axis") % table.ndim
        return table if axis == 0 else np.take(table, [number], axis)
    if op.type in ("Split", "SplitV"):
        axis = constants[0] if op.type == "Split" else constants[2]
        sizes = constants[1] if op.type == "SplitV" else None
        if axis is None or (op.type == "SplitV" and sizes is None):
            return None
        axis = int(axis) % table.ndim
        if axis == 0:
            return table
        if sizes is None:
            return np.split(table, len(op.outputs), axis)[number]
        if (sizes < 0).any():
            return None
        return np.split(table, np.cumsum(sizes)[:-1], axis)[number]
    if op.type == "StridedSlice":
        spec = [each for each in constants[1:] if each is not None]
        return table[_index(op, spec, table.ndim)] if len(spec) == 3 else None  # type: ignore[index]  # of slices too
    if op.type == "Slice":
        begin, size = constants[1:]
        if begin is None or size is None:
            return None
        of_row = [slice(b, None if s < 0 else b + s) for b, s in zip(begin[1:], size[1:])]
        place: tuple[slice, ...] = (slice(None), *of_row)
        return table[place]
    if op.type == "GatherV2" and constants[1] is not None and constants[2] is not None:
        axis = int(constants[2]) % table.ndim
        return table if axis == 0 else np.take(table, constants[1], axis)
    return None


def _index(op: tf.Operation, spec: list[np.ndarray], axes: int) -> tuple[object, ...]:
    """The numpy index of a strided slice, of begin, end and strides; all rows, whichever it takes."""
    begin, end, strides = (list(map(int, np.ravel(each))) for each in spec)

    def has(mask: str, place: int) -> bool:
        return bool(op.get_attr(mask) >> place & 1)

    index: list[object] = []
    for place in range(len(begin)):
        if has("ellipsis_mask", place):
            index.append(Ellipsis)
        elif has("new_axis_mask", place):
            index.append(None)
        elif has("shrink_axis_mask", place):
            index.append(begin[place])
        else:
            first = None if has("begin_mask", place) else begin[place]
            last = None if has("end_mask", place) else end[place]
            index.append(slice(first, last, strides[place]))
    of_rows = next((place for place, each in enumerate(index) if each is not None), None)
    if of_rows is not None and index[of_rows] is not Ellipsis:
        index[of_rows] = slice(None)
    elif of_rows is not None and sum(each is not None and each is not Ellipsis for each in index) >= axes:
        index[of_rows + 1] = slice(None)  # the ellipsis stands for no axis
    return tuple(index)
