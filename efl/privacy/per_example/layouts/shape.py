"""Layouts of what ops make by moving elements without changing them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import tensorflow.compat.v1 as tf

from efl.privacy.per_example.layouts.broadcast import repeats
from efl.privacy.per_example.layouts.elementwise import same_rows
from efl.privacy.per_example.layouts.layout import Chosen, Layout, Mixed, Places, Pooled, Ragged, Role, Rows, Shared
from efl.privacy.per_example.layouts.static import value_of
from efl.privacy.per_example.layouts.walk import Walk, rule, rule_of_one

_CUTS = "it takes some of the batch's rows away, or repeats some"


@rule_of_one("Reshape")
def _reshape(op: tf.Operation, layout: Layout, walk: Walk) -> Layout:
    before, after = op.inputs[0].shape, op.outputs[0].shape
    if isinstance(layout, (Chosen, Places)) and after.rank == 1:
        return layout
    if isinstance(layout, Ragged) and before.rank == after.rank == 1:
        return layout
    if not isinstance(layout, Rows) or after.rank is None or (before.rank is None and layout.axis):
        return Mixed(op, "how it places the rows of a batch is not known")
    if after.rank == 0:
        return Mixed(op, "it makes a single number of the batch")
    dims_after = after.as_list()
    # In memory the tensor is [lead, B, trail].
    lead, trail = _around(layout, before)
    told = layout.within is None or before.rank is None  # by sizes before, which are compared when it runs
    if lead is None:
        return Mixed(op, "the size of the axes before the examples is not known")
    axis, left = 0, lead
    while axis < after.rank - 1 and dims_after[axis] is not None and left % dims_after[axis] == 0:
        size = dims_after[axis]
        if left == 1 and (size != 1 or _is_examples(walk, size, trail, dims_after, axis)):
            break
        left //= size
        axis += 1
    rest = _product(dims_after[axis + 1 :])
    if rest is not None and trail is not None:
        if not rest or trail % rest:
            return Mixed(op, "the rows of its output hold parts of several examples")
        if told:
            places = tf.shape(op.outputs[0], out_type=tf.int64)[axis]
            walk.expect(
                tf.equal(places, walk.size * (left * (trail // rest))),
                f"{op.name!r} (Reshape) has another number of rows than its input. Its rows, and the batch's",
                places,
                walk.size,
            )
        return Rows(axis, left, trail // rest)
    if left == 1:
        # Row-major: if the axis is a multiple of the batch, each example fills a whole number of its places.
        size = tf.shape(op.outputs[0], out_type=tf.int64)[axis]
        walk.expect(
            tf.equal(size % tf.maximum(walk.size, 1), 0),
            f"{op.name!r} (Reshape) makes rows that hold parts of several examples. Its rows, and the batch's",
            size,
            walk.size,
        )
        return Rows(axis, 1, _within(walk, dims_after[axis]), trail)
    return Mixed(op, "how it places the rows of a batch is not known before it runs")


def _around(layout: Rows, shape: tf.TensorShape) -> tuple[int | None, int | None]:
    """How many numbers vary more slowly, and faster, than the example."""
    if shape.rank is None:  # received, say: its first axis is the examples
        return layout.before, layout.elements
    sizes = shape.as_list()
    lead = _product(sizes[: layout.axis])
    trail = _product([layout.within, *sizes[layout.axis + 1 :]])
    return None if lead is None else lead * layout.before, layout.elements if trail is None else trail


def _is_examples(walk: Walk, size: int, trail: int | None, dims: Sequence[int | None], axis: int) -> bool:
    """Whether an axis of size 1 is that of a batch of one."""
    return walk.static_size == 1 and size == 1 and trail is not None and trail == _product(dims[axis + 1 :])


def _within(walk: Walk, size: int | None) -> int | None:
    return size // walk.static_size if size is not None and walk.static_size else None


def _product(sizes: Sequence[int | None]) -> int | None:
    return None if any(size is None for size in sizes) else math.prod(size for size in sizes if size is not None)


@rule_of_one("Transpose")
def _transpose(op: tf.Operation, layout: Layout, walk: Walk) -> Layout:
    permutation = value_of(op.inputs[1])
    if not isinstance(layout, Rows) or permutation is None:
        return Mixed(op, "how it permutes axes is not known")
    return _moved(layout, [int(p) for p in permutation].index(layout.axis))


def _moved(layout: Rows, axis: int) -> Rows:
    return Rows(axis, layout.before, layout.within)


@rule_of_one("ExpandDims")
def _expand(op: tf.Operation, layout: Layout, walk: Walk) -> Layout:
    axis, rank = value_of(op.inputs[1]), op.outputs[0].shape.rank
    if isinstance(layout, Ragged) and axis is not None and int(axis) % (rank or 1) > 0:
        return Ragged(layout.part)
    if not isinstance(layout, Rows) or axis is None or rank is None:
        return Mixed(op, "where it adds an axis is not known")
    return _moved(layout, layout.axis + (int(axis) % rank <= layout.axis))


@rule_of_one("Squeeze")
def _squeeze(op: tf.Operation, layout: Layout, walk: Walk) -> Layout:
    shape = op.inputs[0].shape
    if not isinstance(layout, (Rows, Ragged)) or shape.rank is None:
        return Mixed(op, "which axes it removes is not known")
    axis = layout.axis if isinstance(layout, Rows) else 0
    named = [int(a) % shape.rank for a in op.get_attr("squeeze_dims")]
    gone = named or [i for i, size in enumerate(shape.as_list()) if size == 1]
    unknown = not named and None in (shape.as_list()[:axis] + shape.as_list()[axis + 1 :])
    if axis in gone or unknown:
        return Mixed(op, "it may remove the axis of the examples: name the axes to squeeze")
    if isinstance(layout, Ragged):
        return Ragged(layout.part)
    return _moved(layout, axis - len([a for a in gone if a < axis]))


@rule_of_one("StridedSlice")
def _strided_slice(op: tf.Operation, layout: Layout, walk: Walk) -> Layout:
    rank = op.inputs[0].shape.rank
    begin, end, strides = (value_of(t) for t in op.inputs[1:4])
    if rank is None or begin is None or end is None or strides is None or not isinstance(layout, (Rows, Ragged)):
        return Mixed(op, "which rows it takes is not known")
    wanted = layout.axis if isinstance(layout, Rows) else 0
    masks = {name: op.get_attr(f"{name}_mask") for name in ("begin", "end", "ellipsis", "new_axis", "shrink_axis")}
    axis = out = 0
    for position in range(len(begin)):
        bit = 1 << position
        if masks["ellipsis"] & bit:
            left = len([p for p in range(position + 1, len(begin)) if not masks["new_axis"] >> p & 1])
            span = rank - axis - left
            if axis <= wanted < axis + span:
                return _sliced(op, layout, out + wanted - axis)
            axis, out = axis + span, out + span
        elif masks["new_axis"] & bit:
            out += 1
        elif axis == wanted:
            whole = masks["begin"] & bit and masks["end"] & bit and strides[position] == 1
            if not whole or masks["shrink_axis"] & bit:
                return Mixed(op, _CUTS)
            if isinstance(layout, Ragged):
                return _columns(op, layout, begin, masks) if out == 0 else _sliced(op, layout, out)
            return _sliced(op, layout, out)
        else:
            axis += 1
            out += not masks["shrink_axis"] & bit
    return _sliced(op, layout, out + wanted - axis)


def _sliced(op: tf.Operation, layout: Rows | Ragged, axis: int) -> Layout:
    if isinstance(layout, Rows):
        return _moved(layout, axis)
    return Ragged(layout.part) if axis == 0 else Mixed(op, "it moves entries of sparse features to another axis")


def _columns(op: tf.Operation, layout: Ragged, begin: np.ndarray, masks: dict[str, int]) -> Layout:
    first = len(begin) == 2 and begin[1] == 0 and masks["shrink_axis"] & 2 and not masks["new_axis"]
    if layout.role is Role.INDICES and first:
        return Ragged(layout.part, Role.OWNER)
    return Ragged(layout.part)


@rule_of_one("Slice")
def _slice(op: tf.Operation, layout: Layout, walk: Walk) -> Layout:
    begin, size = value_of(op.inputs[1]), value_of(op.inputs[2])
    if not isinstance(layout, (Rows, Ragged)) or begin is None:
        return Mixed(op, "which rows it takes is not known")
    axis = layout.axis if isinstance(layout, Rows) else 0
    shape_in, shape_out = op.inputs[0].shape, op.outputs[0].shape
    same = shape_in[axis] is not None and shape_in[axis] == shape_out[axis]
    if begin[axis] != 0 or not (same or (size is not None and size[axis] == -1)):
        return Mixed(op, _CUTS)
    return layout if isinstance(layout, Rows) else Ragged(layout.part)


def _along(op: tf.Operation, layout: Layout, axis: int | None) -> Layout:
    """A layout that stays where an op works along another axis."""
    if not isinstance(layout, Rows) or axis is None or axis == layout.axis:
        return Mixed(op, "it works along the axis of the examples")
    return layout


def _axis(tensor: tf.Tensor, rank: int | None) -> int | None:
    value = value_of(tensor)
    return None if value is None or not rank else int(value) % rank


@rule_of_one("Split", data=1)
def _split(op: tf.Operation, layout: Layout, walk: Walk) -> Layout:
    return _along(op, layout, _axis(op.inputs[0], op.inputs[1].shape.rank))


@rule_of_one("SplitV")
def _split_by_sizes(op: tf.Operation, layout: Layout, walk: Walk) -> Layout:
    return _along(op, layout, _axis(op.inputs[2], op.inputs[0].shape.rank))


@rule_of_one("Unpack")
def _unpack(op: tf.Operation, layout: Layout, walk: Walk) -> Layout:
    rank = op.inputs[0].shape.rank
    axis = op.get_attr("axis") % rank if rank else None
    found = _along(op, layout, axis)
    return _moved(found, found.axis - (axis < found.axis)) if isinstance(found, Rows) and axis is not None else found


def _joined(op: tf.Operation, tensors: Sequence[tf.Tensor], ins: Sequence[Layout]) -> Layout:
    rows = [layout for layout in ins if not isinstance(layout, Shared)]
    if any(not isinstance(layout, Rows) or not same_rows(layout, rows[0]) for layout in rows):
        return Mixed(op, "its inputs hold their examples on different axes, or in another order")
    known = [layout for layout in rows if isinstance(layout, Rows) and layout.within is not None]
    return known[0] if known else rows[0]


@rule("Pack")
def _pack(op: tf.Operation, ins: list[Layout], walk: Walk) -> Layout:
    found, rank = _joined(op, list(op.inputs), ins), op.outputs[0].shape.rank
    if not isinstance(found, Rows) or rank is None:
        return found if isinstance(found, Mixed) else Mixed(op, "where it adds an axis is not known")
    return _moved(found, found.axis + (op.get_attr("axis") % rank <= found.axis))


@rule("Concat", "ConcatV2")
def _concat(op: tf.Operation, ins: list[Layout], walk: Walk) -> Layout:
    place = 0 if op.type == "Concat" else -1
    tensors = list(op.inputs)
    axis = _axis(tensors.pop(place), op.outputs[0].shape.rank)
    layouts = list(ins)
    layouts.pop(place)
    found = _joined(op, tensors, layouts)
    if not isinstance(found, Rows) or axis is None:
        return found if isinstance(found, Mixed) else Mixed(op, "along which axis it joins is not known")
    if axis != found.axis:
        return found
    if any(not isinstance(layout, Rows) or layout.within is None for layout in layouts):
        return Mixed(op, "it adds rows that are no examples to the batch")
    return Rows(axis, found.before * len(tensors), found.within) if found.before == 1 else Mixed(op, _CUTS)


@rule_of_one("Tile")
def _tile(op: tf.Operation, layout: Layout, walk: Walk) -> Layout:
    times = tf.get_static_value(op.inputs[1], partial=True)
    if not isinstance(layout, Rows) or op.inputs[0].shape.rank is None:
        return Mixed(op, "how often it repeats rows is not known")
    count = None if times is None else times[layout.axis]
    if count is None and op.inputs[1].op.type == "Pack":
        count = tf.get_static_value(op.inputs[1].op.inputs[layout.axis])
    if count is None or layout.within is None or (int(count) != 1 and layout.before != 1):
        return Mixed(op, "how often it repeats rows is not known")
    return Rows(layout.axis, layout.before * int(count), layout.within)


@rule_of_one("BroadcastTo")
def _broadcast_to(op: tf.Operation, layout: Layout, walk: Walk) -> Layout:
    rank_in, rank_out = op.inputs[0].shape.rank, op.outputs[0].shape.rank
    if not isinstance(layout, Rows) or rank_in is None or rank_out is None:
        return Mixed(op, "how it repeats rows is not known")
    axis = layout.axis + rank_out - rank_in
    # How large it becomes may follow from anything.
    return repeats(op, walk, op.inputs[0], layout, axis, [op.outputs[0]]) or _moved(layout, axis)


def _keeps_axis(amounts: Callable[[tf.Operation, int], bool]) -> Callable[[tf.Operation, Layout, Walk], Layout]:
    def found(op: tf.Operation, layout: Layout, walk: Walk) -> Layout:
        return layout if isinstance(layout, Rows) and amounts(op, layout.axis) else Mixed(op, _CUTS)

    return found


def _pads_elsewhere(op: tf.Operation, axis: int) -> bool:
    paddings = value_of(op.inputs[1])
    return paddings is not None and not any(paddings[axis])


def _reverses_elsewhere(op: tf.Operation, axis: int) -> bool:
    axes = value_of(op.inputs[1])
    return axes is not None and axis not in {int(a) % (op.inputs[0].shape.rank or 1) for a in axes}


def _rolls_elsewhere(op: tf.Operation, axis: int) -> bool:
    axes = value_of(op.inputs[2])
    rank = op.inputs[0].shape.rank
    return axes is not None and bool(rank) and axis not in {int(a) % rank for a in axes.reshape(-1)}


rule_of_one("Pad", "PadV2", "MirrorPad")(_keeps_axis(_pads_elsewhere))
rule_of_one("ReverseV2")(_keeps_axis(_reverses_elsewhere))
rule_of_one("Roll")(_keeps_axis(_rolls_elsewhere))
rule_of_one("MatrixBandPart", "MatrixDiagPart", "MatrixDiagPartV2", "MatrixDiagPartV3", "MatrixTranspose")(
    _keeps_axis(lambda op, axis: axis < (op.inputs[0].shape.rank or 0) - 2)
)


@rule_of_one("OneHot")
def _one_hot(op: tf.Operation, layout: Layout, walk: Walk) -> Layout:
    rank = op.outputs[0].shape.rank
    if isinstance(layout, Ragged) and rank == 2 and op.get_attr("axis") in (-1, 1):
        return Ragged(layout.part)
    if not isinstance(layout, Rows) or rank is None:
        return Mixed(op, "where it adds an axis is not known")
    return _moved(layout, layout.axis + (op.get_attr("axis") % rank <= layout.axis))


@rule("Gather", "GatherV2", "ResourceGather")
def _gather(op: tf.Operation, ins: list[Layout], walk: Walk) -> Layout:
    params, indices = ins[0], ins[1]
    rank, more = op.inputs[0].shape.rank, op.inputs[1].shape.rank
    batch_dims = op.get_attr("batch_dims") if op.type != "Gather" else 0
    if batch_dims < 0:  # counted from the end of the indices
        if more is None:
            return Mixed(op, "how many axes of its inputs go together is not known")
        batch_dims += more
    axis = _axis(op.inputs[2], rank) if op.type == "GatherV2" else 0
    if isinstance(params, Shared):
        if isinstance(indices, Pooled):
            return indices if axis == 0 and not batch_dims else Mixed(op, "it looks ids up along another axis")
        if isinstance(indices, Ragged):
            first = axis == 0 and not batch_dims
            return Ragged(indices.part) if first else Mixed(op, "it looks entries up along another axis")
        if isinstance(indices, Rows) and axis is not None and not batch_dims:
            return _moved(indices, indices.axis + axis)
        return Mixed(op, "which rows it takes depends on other examples")
    if isinstance(params, Pooled) and axis == 0 and isinstance(indices, Places) and not batch_dims:
        # Back from the distinct ids to those of each entry, by the numbers that the same Unique gave them.
        same = indices.unique is params.unique
        return params.entries if same else Mixed(op, "it takes ids of other examples")
    if isinstance(params, Ragged) and isinstance(indices, Chosen) and axis == 0 and params.part is indices.part:
        return Ragged(walk.part_of(indices), params.role)
    if isinstance(params, Rows) and isinstance(indices, Shared):
        if axis is None or more is None or axis == params.axis:
            return Mixed(op, "it takes rows of other examples")
        # Of the indices' axes, those that go together with the params' first ones are no new ones.
        return _moved(params, params.axis + (more - batch_dims - 1 if axis < params.axis else 0))
    both = isinstance(params, Rows) and isinstance(indices, Rows) and params.axis == indices.axis == 0
    if both and batch_dims >= 1 and axis is not None and axis >= 1 and same_rows(params, indices):
        return params
    return Mixed(op, "it takes rows of other examples")


@rule("GatherNd")
def _gather_nd(op: tf.Operation, ins: list[Layout], walk: Walk) -> Layout:
    params, indices = ins
    if isinstance(params, Shared) and isinstance(indices, Rows):
        rank = op.inputs[1].shape.rank
        whole = rank is not None and indices.axis < rank - 1
        return indices if whole else Mixed(op, "it spreads an index over examples")
    rows = isinstance(params, Rows) and params.plain and params.axis == 0
    if rows and isinstance(indices, Ragged) and indices.role is Role.INDICES:
        return Ragged(indices.part)
    return Mixed(op, "it takes elements of other examples")
