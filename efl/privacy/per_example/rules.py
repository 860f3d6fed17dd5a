"""From an op that reads a variable, and the gradient of its output, to the variable's per-example gradient in factors.

A rule returns None where it does not cover a case; the engine then takes its exact detour.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import tensorflow.compat.v1 as tf

from efl.privacy.per_example import patches
from efl.privacy.per_example.groups import Groups
from efl.privacy.per_example.layouts.layout import Pooled, Ragged, Rows
from efl.privacy.per_example.layouts.linear import einsum_labels
from efl.privacy.per_example.layouts.static import value_of
from efl.privacy.per_example.parts import Direction, Lookup, Outer, Part, Product, Rowwise, Whole, is_product_cheaper


@dataclass(frozen=True)
class Use:
    """One op that reads a variable beside examples.

    Attributes:
      op: It.
      index: Which of its inputs comes from the variable.
      output: Which of its outputs the loss depends on.
      delta: The gradient of the objective with respect to that output.
      alone: No other op reads the variable.
    """

    op: tf.Operation
    index: int
    output: tf.Tensor
    delta: tf.Tensor
    alone: bool = False


Rule: TypeAlias = "Callable[[Use, Groups], Part | Rowwise | None]"
RULES: dict[str, Rule] = {}


def rule(*types: str) -> Callable[[Rule], Rule]:
    """Registers the rule of op types."""

    def register(function: Rule) -> Rule:
        for name in types:
            RULES[name] = function
        return function

    return register


def part_of(use: Use, groups: Groups) -> Part | Rowwise | None:
    """The per-example gradient of what an op reads, or None where no rule covers it.

    It may be made of some rows at a time where no other op reads the variable (``Use.alone``).
    """
    if use.op.inputs[use.index].shape.num_elements() == 1 and use.op.type in _ELEMENTWISE:
        whole = _elementwise(use, groups)
        return None if whole is None else Direction(tf.reshape(whole.g, [-1]), tf.ones([1]))
    known = RULES.get(use.op.type)
    return None if known is None else known(use, groups)


def _first(tensor: tf.Tensor, groups: Groups) -> tf.Tensor:
    layout = groups.walk.layout(tensor)
    assert isinstance(layout, Rows)
    return groups.first(tensor, layout)


def _delta(use: Use, groups: Groups) -> tf.Tensor:
    layout = groups.walk.layout(use.output)
    assert isinstance(layout, Rows)
    return groups.first(use.delta, layout)


def _flat(tensor: tf.Tensor) -> tf.Tensor:
    """``[M, T, …, N]`` -> ``[M, T', N]``."""
    if tensor.shape.rank == 3:
        return tensor
    sizes = tensor.shape.as_list()
    between = sizes[1:-1]
    if None in between or sizes[-1] is None:
        dynamic = tf.shape(tensor)
        return tf.reshape(
            tensor, [dynamic[0], tf.reduce_prod(dynamic[1:-1]), dynamic[-1] if sizes[-1] is None else sizes[-1]]
        )
    count = 1
    for size in between:
        count *= size
    return tf.reshape(tensor, [-1, count, sizes[-1]])


# ---- products


@rule("MatMul")
def _matmul(use: Use, groups: Groups) -> Part | None:
    other = _first(use.op.inputs[1 - use.index], groups)
    delta = _delta(use, groups)
    sizes = use.op.inputs[use.index].shape.as_list()
    # out = x v (v on the right) or v x (on the left); transposed, the variable's axes change places.
    left = use.index == 0
    transposed = use.op.get_attr("transpose_a" if left else "transpose_b")
    a, d = (delta, other) if left != transposed else (other, delta)
    return _outer(a, d, sizes)


def _outer(a: tf.Tensor, d: tf.Tensor, sizes: list[int | None]) -> Outer:
    """The part of a matrix of some sizes: tf.tensordot forgets them, and how parts are put together depends on them."""
    return Outer(tf.ensure_shape(a, [None, None, sizes[0]]), tf.ensure_shape(d, [None, None, sizes[1]]))


@rule("BatchMatMul", "BatchMatMulV2", "BatchMatMulV3")
def _batch_matmul(use: Use, groups: Groups) -> Part | None:
    variable = use.op.inputs[use.index]
    x = use.op.inputs[1 - use.index]
    if use.index != 1 or variable.shape.rank != 2 or use.op.get_attr("adj_x") or x.shape.rank is None:
        return None
    other, delta = _flat(_first(x, groups)), _flat(_delta(use, groups))
    a, d = (delta, other) if use.op.get_attr("adj_y") else (other, delta)
    return _outer(a, d, variable.shape.as_list())


@rule("Einsum")
def _einsum(use: Use, groups: Groups) -> Part | None:
    labels, out = einsum_labels(use.op)
    if labels is None or len(labels) != 2:
        return None
    v, x = labels[use.index], labels[1 - use.index]
    tensor = use.op.inputs[1 - use.index]
    layout = groups.walk.layout(tensor)
    assert isinstance(layout, Rows)
    example = x[layout.axis]
    contracted = [c for c in v if c in x and c not in out]
    made = [c for c in v if c in out and c not in x]
    summed = [c for c in x if c not in out and c not in v]
    orders = ["".join(contracted + made), "".join(made + contracted)]
    if len(contracted) + len(made) != len(v) or summed or v not in orders:
        return None  # one weight for several places, or factors that do not lie one after the other
    places = [c for c in x if c in out and c != example]
    a = _ordered(tensor, x, [example, *places, *contracted])
    d = _ordered(use.delta, out, [example, *places, *made])
    sizes = use.op.inputs[use.index].shape.as_list()
    if None in sizes:
        return None
    k, n = (_count(sizes, v, names) for names in (contracted, made))
    a, d = _as_factor(a, layout, k, groups), _as_factor(d, layout, n, groups)
    return Outer(a, d) if v == orders[0] else Outer(d, a)


def _count(sizes: list[int], labels: str, names: list[str]) -> int:
    count = 1
    for name in names:
        count *= sizes[labels.index(name)]
    return count


def _ordered(tensor: tf.Tensor, labels: str, order: list[str]) -> tf.Tensor:
    permutation = [labels.index(name) for name in order]
    return tensor if permutation == sorted(permutation) else tf.transpose(tensor, permutation)


def _as_factor(tensor: tf.Tensor, layout: Rows, width: int, groups: Groups) -> tf.Tensor:
    first = groups.first(tensor, Rows(0, layout.before, layout.within))
    sizes = first.shape.as_list()
    positions: Any = 1
    for size in sizes[1:]:
        positions = None if positions is None or size is None else positions * size
    if positions is None:
        dynamic = tf.shape(first)
        return tf.reshape(first, [dynamic[0], tf.reduce_prod(dynamic[1:]) // width, width])
    return tf.reshape(first, [-1, positions // width, width])


# ---- convolutions


@rule("Conv2D", "Conv3D")
def _convolution(use: Use, groups: Groups) -> Part | Rowwise | None:
    window = patches.of_convolution(use.op, use.op.inputs[use.index])
    image, kernel = use.op.inputs[0], use.op.inputs[1]
    if use.index != 1 or window is None or image.shape[window.channels] != kernel.shape[-2]:
        return None  # grouped, or of unknown size
    if not patches.can_extract(image):
        return None
    layout = groups.walk.layout(image)
    assert isinstance(layout, Rows)
    sizes = kernel.shape.as_list()
    columns, made = int(np.prod(sizes[:-1])), patches.positions_last(use.delta, window)
    positions = made.shape[1]
    if use.alone and layout.plain and groups.rows == 1 and is_product_cheaper(positions, columns, sizes[-1]):
        row_bytes = columns * (positions + sizes[-1]) * image.dtype.size
        make = functools.partial(_product_of_convolution, window=window)
        return Rowwise((image, use.delta), make, row_bytes, columns * sizes[-1])
    taken = patches.extract(image, window)  # [rows, P, offsets * channels]
    return Outer(_flat(groups.first(taken, layout)), _flat(groups.first(made, layout)))


def _product_of_convolution(image: tf.Tensor, delta: tf.Tensor, window: patches.Window) -> Product | Outer:
    made = patches.positions_last(delta, window)
    found = patches.by_columns(image, window)
    if found is not None:
        return Product(tf.matmul(found[0], made), found[1])
    return Outer(patches.extract(image, window), made)


@rule("Conv2DBackpropInput", "Conv3DBackpropInputV2")
def _transposed_convolution(use: Use, groups: Groups) -> Part | None:
    # The gradient of its kernel is that of the convolution of which it is the transpose: from its output to its input.
    window = patches.of_convolution(use.op, use.op.inputs[use.index])
    if use.index != 1 or window is None:
        return None
    image, small = tf.ensure_shape(use.delta, use.output.shape), use.op.inputs[2]
    if not patches.can_extract(image):
        return None
    layout = groups.walk.layout(small)
    assert isinstance(layout, Rows)
    taken = patches.extract(image, window)
    if use.output.shape[window.channels] != use.op.inputs[1].shape[-2]:
        return None
    made = patches.positions_last(small, window)
    return Outer(_flat(groups.first(taken, layout)), _flat(groups.first(made, layout)))


@rule("DepthwiseConv2dNative")
def _depthwise(use: Use, groups: Groups) -> Part | None:
    window = patches.of_convolution(use.op, use.op.inputs[use.index])
    image, kernel = use.op.inputs[0], use.op.inputs[1]
    # TensorFlow's kernel for CPUs takes no notice of dilations (tf.nn.depthwise_conv2d dilates in another way).
    if use.index != 1 or window is None or set(window.dilations) != {1}:
        return None
    layout = groups.walk.layout(image)
    if not patches.can_extract(image) or not isinstance(layout, Rows):
        return None
    taken = patches.extract(image, window)
    height, width, channels, times = kernel.shape.as_list()
    offsets = height * width
    taken = _flat(groups.first(taken, layout))
    made = _flat(groups.first(patches.positions_last(use.delta, window), layout))
    positions = tf.shape(taken)[1]
    taken = tf.transpose(tf.reshape(taken, [-1, positions, offsets, channels]), [0, 3, 2, 1])  # [M, C, offsets, P]
    made = tf.transpose(tf.reshape(made, [-1, positions, channels, times]), [0, 2, 1, 3])  # [M, C, P, times]
    product = tf.transpose(tf.matmul(taken, made), [0, 2, 1, 3])  # [M, offsets, C, times]
    return Whole(tf.reshape(product, [-1, offsets * channels * times]))


# ---- element by element

_ELEMENTWISE = frozenset(
    {"Add", "AddV2", "Sub", "Mul", "RealDiv", "Div", "AddN", "Maximum", "Minimum", "SquaredDifference", "Pow",
     "SelectV2", "Xdivy", "DivNoNan", "MulNoNan", "Atan2"}
)  # fmt: skip


def _elementwise(use: Use, groups: Groups) -> Whole | None:
    variable, layout = use.op.inputs[use.index], groups.walk.layout(use.output)
    rank, shape = use.output.shape.rank, variable.shape
    if not isinstance(layout, Rows) or rank is None or shape.rank is None:
        return None
    sizes = [1] * (rank - shape.rank) + shape.as_list()
    if sizes[layout.axis] != 1 or None in sizes:
        return None  # a weight for each place in the batch
    each = _gradient_of_elements(use)
    if each is None:
        return None
    others = [a for a in range(rank) if a != layout.axis]
    summed = [1] + [2 + i for i, axis in enumerate(others) if sizes[axis] == 1]
    total = tf.reduce_sum(groups.first(each, layout), summed)
    return Whole(tf.reshape(total, [-1, shape.num_elements()]))


rule(*_ELEMENTWISE)(_elementwise)


def _gradient_of_elements(use: Use) -> tf.Tensor | None:
    """The gradient as if the variable had an element for each of the output's."""
    kind, delta = use.op.type, use.delta
    if kind in ("Add", "AddV2", "AddN") or (kind == "Sub" and use.index == 0):
        return delta
    if kind == "Sub":
        return -delta
    other = use.op.inputs[1 - use.index] if len(use.op.inputs) == 2 else None
    if kind == "Mul" and other is not None:
        return delta * other
    repeated = tf.broadcast_to(use.op.inputs[use.index], tf.shape(use.output))
    repeated = tf.ensure_shape(repeated, use.output.shape)
    inputs = [repeated if i == use.index else t for i, t in enumerate(use.op.inputs)]
    again = use.op.graph.create_op(
        kind, inputs, [t.dtype for t in use.op.outputs], attrs=dict(use.op.node_def.attr), name=f"{use.op.name}_again"
    )
    return tf.gradients(again.outputs[0], repeated, grad_ys=delta)[0]


@rule("BiasAdd")
def _bias_add(use: Use, groups: Groups) -> Part | None:
    delta = use.delta
    layout = groups.walk.layout(use.output)
    assert isinstance(layout, Rows)
    rank = use.output.shape.rank
    channel = 1 if use.op.get_attr("data_format") == b"NCHW" else rank - 1
    channel += 1 if channel < layout.axis else 0  # where it lies once the group is first
    first = groups.first(delta, layout)  # [M, T, other axes]
    where = channel + 1
    return Whole(tf.reduce_sum(first, [a for a in range(1, rank + 1) if a != where]))


@rule("FusedBatchNorm", "FusedBatchNormV2", "FusedBatchNormV3")
def _batch_norm(use: Use, groups: Groups) -> Part | None:
    layout = groups.walk.layout(use.output)
    if use.index not in (1, 2) or use.op.get_attr("data_format") != b"NHWC" or not isinstance(layout, Rows):
        return None
    each = use.delta
    if use.index == 1:
        image, _, _, mean, variance = use.op.inputs
        each *= (image - mean) * tf.math.rsqrt(variance + use.op.get_attr("epsilon"))
    return Whole(tf.reduce_sum(groups.first(each, layout), [1, 2, 3]))


# ---- lookups


@rule("Gather", "GatherV2", "ResourceGather", "SparseSegmentSum", "SparseSegmentMean", "SparseSegmentSqrtN")
def _lookup(use: Use, groups: Groups) -> Part | None:
    op, segments = use.op, use.op.type.startswith("SparseSegment")
    if use.index != 0:
        return None
    pooled = groups.walk.layout(op.inputs[0])
    if isinstance(pooled, Pooled):
        ids = pooled.unique.inputs[0]
        entries: Any = pooled.entries
    else:
        ids = op.inputs[1]
        entries = groups.walk.layout(ids)
        if op.type == "GatherV2" and value_of(op.inputs[2]) != 0:
            return None
    if op.type != "Gather" and not segments and op.get_attr("batch_dims"):
        return None
    width = _width(op)
    delta, owner = use.delta, None
    if segments:
        delta, owner = _by_segment(op, delta), groups.owner(entries)
    elif isinstance(entries, Ragged):
        owner = groups.owner(entries)
    elif isinstance(entries, Rows):
        # [M, T, …] each: places in the same order
        ids = groups.first(ids, entries)
        delta = groups.first(delta, entries)
        one_each = entries.plain and groups.rows == 1 and all(size == 1 for size in ids.shape.as_list()[1:])
        of_one = tf.size(ids, out_type=tf.int64) // tf.maximum(groups.count, 1)
        flat = tf.reshape(ids, [-1])
        owner = tf.range(tf.size(flat, out_type=tf.int64)) // tf.maximum(of_one, 1)
        return Lookup(tf.cast(flat, tf.int64), owner, _rows_of(delta, flat, width), groups.count, one_each)
    else:
        return None
    flat = tf.reshape(ids, [-1])
    return Lookup(tf.cast(flat, tf.int64), owner, _rows_of(delta, flat, width), groups.count)


def _width(op: tf.Operation) -> int | None:
    """How many numbers a row has that is looked up, if the graph says so."""
    if op.inputs[0].dtype != tf.resource:
        return op.inputs[0].shape[1:].num_elements()
    rank = op.inputs[1].shape.rank
    return None if rank is None else op.outputs[0].shape[rank:].num_elements()


def _rows_of(delta: tf.Tensor, ids: tf.Tensor, width: int | None) -> tf.Tensor:
    if width is not None:
        return tf.reshape(delta, [-1, width])
    return tf.reshape(delta, [tf.size(ids), tf.size(delta) // tf.maximum(tf.size(ids), 1)])


def _by_segment(op: tf.Operation, delta: tf.Tensor) -> tf.Tensor:
    """The gradient of each entry, from that of the sum, mean or mean by square root of its segment."""
    segments = op.inputs[2]
    each = tf.gather(delta, segments)
    if op.type == "SparseSegmentSum":
        return each
    ones = tf.ones_like(segments, delta.dtype)
    counts = tf.gather(tf.math.unsorted_segment_sum(ones, segments, tf.shape(delta)[0]), segments)
    counts = counts if op.type == "SparseSegmentMean" else tf.sqrt(counts)
    return each / tf.reshape(counts, [-1] + [1] * (delta.shape.rank - 1))


@rule("SparseTensorDenseMatMul")
def _sparse_matmul(use: Use, groups: Groups) -> Part | None:
    indices, values = use.op.inputs[0], use.op.inputs[1]
    layout = groups.walk.layout(indices)
    if use.index != 3 or use.op.get_attr("adjoint_b") or not isinstance(layout, Ragged):
        return None
    each = tf.gather(use.delta, layout.part.owner) * tf.expand_dims(values, 1)
    return Lookup(indices[:, 1], groups.owner(layout), each, groups.count)
