"""Layouts of what products, convolutions and pooling make."""

from __future__ import annotations

import tensorflow.compat.v1 as tf

from efl.privacy.per_example.layouts.broadcast import differ, repeats
from efl.privacy.per_example.layouts.elementwise import same_rows
from efl.privacy.per_example.layouts.layout import Layout, Mixed, Rows, Shared
from efl.privacy.per_example.layouts.static import value_of
from efl.privacy.per_example.layouts.walk import Walk, rule, rule_of_one

_ACROSS = "it multiplies examples with one another"


@rule("MatMul")
def _matmul(op: tf.Operation, ins: list[Layout], walk: Walk) -> Layout:
    left, right = ins
    if isinstance(left, Rows) and isinstance(right, Shared):
        kept = 1 if op.get_attr("transpose_a") else 0
        if left.axis != kept:
            return Mixed(op, "it sums over the examples")
        within, summed = left.within, op.inputs[1].shape[1 if op.get_attr("transpose_b") else 0]
        if within is None and left.elements is not None and summed and kept == 0:
            within = left.elements // summed  # what tf.tensordot has reshaped by a shape of the running program
            rows = tf.shape(op.outputs[0], out_type=tf.int64)[0]
            walk.expect(
                tf.equal(rows, walk.size * (left.before * within)),
                f"{op.name!r} (MatMul) has another number of rows than its input. Its rows, and the batch's",
                rows,
                walk.size,
            )
        return Rows(0, left.before, within)
    if isinstance(left, Shared) and isinstance(right, Rows):
        kept = 0 if op.get_attr("transpose_b") else 1
        return Rows(1, right.before, right.within) if right.axis == kept else Mixed(op, "it sums over the examples")
    return Mixed(op, _ACROSS)


@rule("BatchMatMul", "BatchMatMulV2", "BatchMatMulV3")
def _batch_matmul(op: tf.Operation, ins: list[Layout], walk: Walk) -> Layout:
    rank = op.outputs[0].shape.rank
    found: Rows | None = None
    first: tuple[tf.Tensor, Rows] | None = None
    for side, (tensor, layout) in enumerate(zip(op.inputs, ins, strict=True)):
        if isinstance(layout, Shared):
            continue
        if not isinstance(layout, Rows) or rank is None or tensor.shape.rank is None:
            return Mixed(op, "how it places the rows of a batch is not known")
        axis = layout.axis + rank - tensor.shape.rank
        if axis >= rank - 2:
            transposed = op.get_attr("adj_x" if side == 0 else "adj_y")
            kept = (rank - 1 if transposed else rank - 2) if side == 0 else (rank - 2 if transposed else rank - 1)
            if axis != kept or not isinstance(ins[1 - side], Shared):
                return Mixed(op, _ACROSS)
            axis = rank - 2 if side == 0 else rank - 1
        elif isinstance(ins[1 - side], Shared):
            longer = repeats(op, walk, tensor, layout, axis, [op.inputs[1 - side]])
            if longer is not None:
                return longer
        placed = Rows(axis, layout.before, layout.within)
        if found is None or first is None:
            found, first = placed, (tensor, layout)
            continue
        if not same_rows(found, placed):
            return Mixed(op, _ACROSS)
        longer = differ(op, walk, first, (tensor, layout))
        if longer is not None:
            return longer
        found = placed if found.within is None else found
    assert found is not None
    return found


@rule("Einsum")
def _einsum(op: tf.Operation, ins: list[Layout], walk: Walk) -> Layout:
    labels, out = einsum_labels(op)
    if labels is None:
        return Mixed(op, "an equation with an ellipsis, or a label twice in one operand")
    found: tuple[str, Rows] | None = None
    for tensor_labels, layout in zip(labels, ins, strict=True):
        if isinstance(layout, Shared):
            continue
        if not isinstance(layout, Rows):
            return Mixed(op, "how it places the rows of a batch is not known")
        label = tensor_labels[layout.axis]
        placed = Rows(0, layout.before, layout.within)
        if label not in out or (found is not None and (found[0] != label or not same_rows(found[1], placed))):
            return Mixed(op, _ACROSS)
        found = (label, placed)
    assert found is not None
    if any(found[0] in names for names, layout in zip(labels, ins, strict=True) if isinstance(layout, Shared)):
        return Mixed(op, "a weight for each place in the batch")
    return Rows(out.index(found[0]), found[1].before, found[1].within)


def einsum_labels(op: tf.Operation) -> tuple[list[str] | None, str]:
    """The labels of an Einsum's operands and of its output; None where they are not one letter an axis."""
    equation = op.get_attr("equation").decode().replace(" ", "")
    left, _, out = equation.partition("->")
    operands = left.split(",")
    if "." in equation or any(len(set(names)) != len(names) for names in [*operands, out]):
        return None, out
    return operands, out


@rule("BiasAdd")
def _bias_add(op: tf.Operation, ins: list[Layout], walk: Walk) -> Layout:
    rank = op.inputs[0].shape.rank
    channel = 1 if op.get_attr("data_format") == b"NCHW" else (rank or 0) - 1
    if isinstance(ins[0], Rows) and isinstance(ins[1], Shared) and rank is not None and ins[0].axis != channel:
        return ins[0]
    return Mixed(op, "a bias for each place in the batch, or one that depends on examples")


@rule("Conv2D", "Conv3D", "DepthwiseConv2dNative", "Dilation2D", "Conv")
def _convolution(op: tf.Operation, ins: list[Layout], walk: Walk) -> Layout:
    if isinstance(ins[0], Rows) and ins[0].axis == 0 and isinstance(ins[1], Shared):
        return ins[0]
    return Mixed(op, "a convolution over the axis of the examples, or with a kernel that depends on them")


@rule("Conv2DBackpropInput", "Conv3DBackpropInputV2", "DepthwiseConv2dNativeBackpropInput")
def _transposed_convolution(op: tf.Operation, ins: list[Layout], walk: Walk) -> Layout:
    shared = isinstance(ins[0], Shared) and isinstance(ins[1], Shared)
    if shared and isinstance(ins[2], Rows) and ins[2].axis == 0:
        return ins[2]
    return Mixed(op, "a convolution over the axis of the examples, or with a kernel that depends on them")


@rule_of_one(
    "MaxPool", "MaxPoolV2", "AvgPool", "MaxPool3D", "AvgPool3D", "ResizeBilinear", "ResizeNearestNeighbor",
    "ResizeBicubic", "ResizeArea", "ExtractImagePatches", "ExtractVolumePatches", "SpaceToDepth", "DepthToSpace",
    "AdjustContrastv2", "AdjustHue", "AdjustSaturation", "RGBToHSV", "HSVToRGB",
)  # fmt: skip
def _image(op: tf.Operation, layout: Layout, walk: Walk) -> Layout:
    if op.inputs[0].shape.rank not in (4, 5):
        return Mixed(op, "of images that are no batch of images, it may take the batch for an axis of one")
    window = [op.get_attr(name) for name in ("ksize", "strides") if name in {a.name for a in op.op_def.attr}]
    alone = all(not sizes or sizes[0] == 1 for sizes in window)
    if isinstance(layout, Rows) and layout.axis == 0 and alone:
        return layout
    return Mixed(op, "it works over the axis of the examples")


@rule_of_one("SpaceToBatchND", "SpaceToBatch")
def _space_to_batch(op: tf.Operation, layout: Layout, walk: Walk) -> Layout:
    block = value_of(op.inputs[1]) if op.type == "SpaceToBatchND" else None
    if block is None or not isinstance(layout, Rows) or layout.axis != 0 or layout.before != 1:
        return Mixed(op, "how it places the rows of a batch is not known")
    return Rows(0, int(block.prod()), layout.within)


@rule_of_one("BatchToSpaceND")
def _batch_to_space(op: tf.Operation, layout: Layout, walk: Walk) -> Layout:
    block = value_of(op.inputs[1])
    if block is None or not isinstance(layout, Rows) or layout.axis != 0 or layout.before != int(block.prod()):
        return Mixed(op, "how it places the rows of a batch is not known")
    return Rows(0, 1, layout.within)
