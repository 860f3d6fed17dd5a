"""Which part of a row of a tensor a label is in: followed to what it was made of, and to what is made of it.

A part is a set of places in a row, counted in its own order; of serialised records a set of fields. It is followed
through ops that only move numbers, or change each by itself: a label in column 3 is in columns 2 to 5 as well, and not
in columns 0 to 2. Of any other op it is taken that all of what it gives has the label, and that the label is of all
that it is given.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import tensorflow.compat.v1 as tf

from efl.privacy.per_example.layouts.by_number import BROADCAST, UNARY

HOLDERS = frozenset({"OptionalGetValue", "DatasetToSingleElement"})  # ops that give what one tensor holds, one by one
Part: TypeAlias = frozenset[Hashable] | None  # of places (int) and fields; None: all of it, or nobody knows

_MANY = 1 << 20  # numbers in a row of which no table is made
_MOVES = frozenset({"Identity", "Snapshot", "EnsureShape", "StopGradient", "Reshape", "ExpandDims", "Squeeze"})
_SAME = frozenset({*UNARY, *_MOVES}) - {"IdentityN"}


class _Field(NamedTuple):
    """A field of a serialised record.

    Attributes:
      kind: How the record is parsed; another way may find other fields in the same bytes.
      name: Of the field.
    """

    kind: tuple[Hashable, ...]
    name: Hashable


def part_behind(out: tf.Tensor, part: Part, place: int) -> Part:
    """Of which part of input ``place`` of its op a part of an output is; an empty set where of none."""
    op = out.op
    if op.type == "IdentityN" or op.type in HOLDERS:
        return _of_output(out, part, place, ahead=False)
    fields = _fields(op)
    if fields is not None and place == 0:
        return frozenset([fields[_number(out)]])
    return _mapped(out, part, place, ahead=False)


def part_ahead(out: tf.Tensor, part: Part, place: int) -> Part:
    """Which part of an output has what is in a part of input ``place`` of its op; an empty set where nothing."""
    op = out.op
    if op.type == "IdentityN" or op.type in HOLDERS:
        return _of_output(out, part, place, ahead=True)
    fields = _fields(op)
    if fields is not None and place == 0:
        mine = fields[_number(out)]
        # What is not known as fields of records that are parsed so may be in each of them.
        others = None if part is None else [each for each in part if getattr(each, "kind", None) != mine.kind]
        return None if part is None or others or mine in part else frozenset()
    return _mapped(out, part, place, ahead=True)


def _of_output(out: tf.Tensor, part: Part, place: int, ahead: bool) -> Part:
    """Of ops whose outputs are their inputs, or what one input holds."""
    if out.op.type == "IdentityN":
        return part if place == _number(out) else frozenset()
    mine = _Field((out.op.type,), _number(out))
    if not ahead:
        return frozenset([mine])
    return None if part is None or mine in part else frozenset()


def _mapped(out: tf.Tensor, part: Part, place: int, ahead: bool) -> Part:
    op = out.op
    fields = frozenset(each for each in part or () if isinstance(each, _Field))
    given = op.inputs[place]
    if (op.type in _SAME and same_rows(op)) or (
        op.type in BROADCAST and _width(out) is not None and out.shape[1:] == given.shape[1:]
    ):
        if place and op.type not in BROADCAST:
            return None if ahead else frozenset()
        return part if op.type in _MOVES or not fields else None  # of a changed record nobody knows the fields
    pairs = _moved(out, place)
    if pairs is None:
        return None
    where, whence = pairs  # places in the output, and of what in the input
    known, wanted = (whence, where) if ahead else (where, whence)
    if part is None:
        return frozenset(wanted)
    # A record is moved with all of its fields, wherever it was.
    return frozenset(to for of, to in zip(known, wanted) if of in part) | (fields if wanted else frozenset())


def _number(out: tf.Tensor) -> int:
    return list(out.op.outputs).index(out)


def _moved(out: tf.Tensor, place: int) -> tuple[list[int], list[int]] | None:
    """Places in a row of an output, and the places in a row of an input of which they are; None where nobody knows."""
    op = out.op
    given = op.inputs[place]
    width, sizes = _width(given), [_width(t) for t in op.inputs]
    if width is None:
        return None
    if op.type == "ConcatV2" and out.shape.rank == 2 and tf.get_static_value(op.inputs[-1]) in (1, -1):
        if None in sizes[:place]:
            return None
        first = sum(size for size in sizes[:place] if size is not None)
        return list(range(first, first + width)), list(range(width))
    if op.type == "Pack" and given.shape.rank == 1 and op.get_attr("axis") in (1, -1):
        return [place], [0]
    if place != _data_place(op):
        return None
    taken = _cut(out, np.arange(width).reshape(1, *given.shape[1:].as_list()))
    return None if taken is None else (list(range(taken.size)), np.ravel(taken).tolist())


def _data_place(op: tf.Operation) -> int:
    """Which input of an op that cuts is cut."""
    return 1 if op.type == "Split" else 0


def _width(tensor: tf.Tensor) -> int | None:
    """How many numbers a row has."""
    if not tensor.shape.rank:
        return None
    count = tensor.shape[1:].num_elements()
    return None if count is None or count > _MANY else int(count)


def same_rows(op: tf.Operation) -> bool:
    """Whether an op that only gives another shape leaves rows as they are."""
    if op.type not in ("Reshape", "ExpandDims", "Squeeze"):
        return True
    before, after = _width(op.inputs[0]), _width(op.outputs[0])
    return before is not None and before == after


def _fields(op: tf.Operation) -> list[_Field] | None:
    """Of each output of a parse, which field of a record it is of; None of another op, or where nobody knows."""
    if op.type == "DecodeCSV":
        chosen = list(op.get_attr("select_cols"))
        kind = (op.type, op.get_attr("field_delim"), op.get_attr("use_quote_delim"))
        return [_Field(kind, number) for number in chosen or range(len(op.outputs))]
    if op.type != "ParseExampleV2":
        return None
    sparse, dense, ragged = (tf.get_static_value(op.inputs[place]) for place in (2, 3, 4))
    if sparse is None or dense is None or ragged is None:
        return None
    names = [*(list(sparse.ravel()) * 3), *dense.ravel(), *(list(ragged.ravel()) * 2)]
    return [_Field((op.type,), name) for name in names] if len(names) == len(op.outputs) else None


def _cut(out: tf.Tensor, table: np.ndarray) -> np.ndarray | None:
    op = out.op
    constants = [None if place == _data_place(op) else tf.get_static_value(t) for place, t in enumerate(op.inputs)]
    number = _number(out)
    if op.type == "Unpack":
        axis = op.get_attr("axis") % table.ndim
        return None if axis == 0 else np.take(table, [number], axis)
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
        if len(spec) < 3:
            return None
        index: Any = _index(op, spec, table.ndim)
        return None if index is None else np.asarray(table[index])
    if op.type == "Slice":
        begin, size = constants[1:]
        if begin is None or size is None:
            return None
        of_row = [slice(b, None if s < 0 else b + s) for b, s in zip(begin[1:], size[1:])]
        place: tuple[slice, ...] = (slice(None), *of_row)
        return table[place]
    if (
        op.type == "GatherV2"
        and not op.get_attr("batch_dims")
        and constants[1] is not None
        and constants[2] is not None
    ):
        axis = int(constants[2]) % table.ndim
        if axis == 0:
            return table if constants[1].ndim == 1 else None
        return np.take(table, constants[1], axis)
    return None


def _index(op: tf.Operation, spec: list[np.ndarray], axes: int) -> tuple[object, ...] | None:
    """The numpy index of a strided slice, of begin, end and strides; all rows, whichever it takes.

    None where the first axis of what it gives is not that of rows: what follows would take rows for columns.
    """
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
    of_rows = 0
    if index and index[0] is Ellipsis and sum(each is not None for each in index[1:]) >= axes:
        of_rows = 1  # the ellipsis stands for no axis
    if len(index) > of_rows and index[of_rows] is not Ellipsis:
        if not isinstance(index[of_rows], slice):
            return None
        index[of_rows] = slice(None)
    return tuple(index)
