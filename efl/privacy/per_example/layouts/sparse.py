"""Layouts of sparse features: entries of which each belongs to an example.

The path of ``tf.feature_column`` and ``tf.nn.embedding_lookup_sparse``: a sparse tensor, empty rows filled, ids made
distinct, looked up, and combined by example.
"""

from __future__ import annotations

import tensorflow.compat.v1 as tf

from efl.privacy.per_example.layouts.layout import (
    EXAMPLES,
    Layout,
    Mixed,
    Partition,
    Places,
    Pooled,
    Ragged,
    Role,
    Rows,
    Shared,
    Sizes,
)
from efl.privacy.per_example.layouts.static import value_of
from efl.privacy.per_example.layouts.walk import Walk, rule

# Of a batch of sparse rows the shape says how long the longest of them is.
_LONGEST = Sizes("how long the longest sparse row of a batch is")


@rule("DeserializeSparse")
def _deserialize(op: tf.Operation, ins: list[Layout], walk: Walk) -> list[Layout]:
    if not isinstance(ins[0], Rows):
        return [Mixed(op, "a sparse tensor of unknown origin")] * 3
    indices, _, shape = op.outputs
    return _sparse(op, indices, shape, walk)


def _sparse(op: tf.Operation, indices: tf.Tensor, shape: tf.Tensor, walk: Walk) -> list[Layout]:
    walk.expect(
        tf.equal(tf.cast(shape[0], tf.int64), walk.size),
        f"the sparse input {op.name!r} has another number of rows than the loss has values. Rows, and values",
        tf.cast(shape[0], tf.int64),
        walk.size,
    )
    part = Partition(indices[:, 0])
    return [Ragged(part, Role.INDICES), Ragged(part), _LONGEST]


@rule("SparseReshape")
def _sparse_reshape(op: tf.Operation, ins: list[Layout], walk: Walk) -> list[Layout]:
    layout = ins[0]
    shapes = all(isinstance(other, Shared) for other in ins[1:])
    if not isinstance(layout, Ragged) or layout.role is not Role.INDICES or not shapes:
        return [Mixed(op, "a sparse tensor of unknown origin")] * 2
    # Only the shape changes where the first axis stays, as in tf.nn.safe_embedding_lookup_sparse.
    walk.expect(
        tf.reduce_all(tf.equal(op.outputs[0][:, 0], layout.part.owner)),
        f"{op.name!r} (SparseReshape) moves entries from one example to another",
    )
    return [layout, _LONGEST]


@rule("SparseFillEmptyRows")
def _fill(op: tf.Operation, ins: list[Layout], walk: Walk) -> list[Layout]:
    indices, values = ins[0], ins[1]
    unknown: list[Layout] = [Mixed(op, "a sparse tensor of unknown origin")] * 4
    if not isinstance(indices, Ragged) or not isinstance(values, Ragged):
        return unknown
    if not isinstance(ins[2], Shared) or not isinstance(ins[3], Shared):
        return unknown
    if indices.role is not Role.INDICES or indices.part is not values.part:
        return unknown
    part = Partition(op.outputs[0][:, 0])
    walk.expect_rows(op.outputs[2], f"what {op.name!r} fills")
    return [Ragged(part, Role.INDICES), Ragged(part), EXAMPLES, Mixed(op, "places in a gradient")]


@rule("Unique", "UniqueV2")
def _unique(op: tf.Operation, ins: list[Layout], walk: Walk) -> list[Layout]:
    layout = ins[0]
    shared = all(isinstance(other, Shared) for other in ins[1:])
    if not isinstance(layout, (Ragged, Rows)) or op.inputs[0].shape.rank != 1 or not shared:
        return [Mixed(op, "it finds equal values among different examples")] * 2
    entries = Ragged(layout.part) if isinstance(layout, Ragged) else layout
    return [Pooled(entries, op), Places(op)]


@rule("SparseSegmentSum", "SparseSegmentMean", "SparseSegmentSqrtN")
def _sparse_segment(op: tf.Operation, ins: list[Layout], walk: Walk) -> Layout:
    data, _, segments = ins
    if not isinstance(data, Pooled) or op.inputs[1] is not data.unique.outputs[1]:
        return Mixed(op, "it combines entries of different examples")
    if not isinstance(segments, Ragged) or segments.role is not Role.OWNER:
        return Mixed(op, "it combines entries of different examples")
    if not isinstance(data.entries, Ragged) or data.entries.part is not segments.part:
        return Mixed(op, "it combines entries of different examples")
    walk.expect_rows(op.outputs[0], f"what {op.name!r} combines")
    return EXAMPLES


@rule("SegmentSum", "SegmentSumV2", "SegmentMean", "SegmentMax", "SegmentMin", "SegmentProd",
      "UnsortedSegmentSum", "UnsortedSegmentMax", "UnsortedSegmentMin", "UnsortedSegmentProd")  # fmt: skip
def _segment(op: tf.Operation, ins: list[Layout], walk: Walk) -> Layout:
    data, segments = ins[0], ins[1]
    shared = all(isinstance(other, Shared) for other in ins[2:])  # how many segments there are
    if not isinstance(segments, Ragged) or segments.role is not Role.OWNER or not shared:
        return Mixed(op, "it combines entries of different examples")
    if isinstance(data, Shared) or not isinstance(data, Ragged) or data.part is not segments.part:
        return Mixed(op, "it combines entries of different examples")
    walk.expect_rows(op.outputs[0], f"what {op.name!r} combines")
    return EXAMPLES


@rule("SparseToDense")
def _to_dense(op: tf.Operation, ins: list[Layout], walk: Walk) -> Layout:
    indices, shape, values, default = ins
    shared = isinstance(default, Shared) and isinstance(shape, Shared)
    if not isinstance(indices, Ragged) or indices.role is not Role.INDICES or not shared:
        return Mixed(op, "a sparse tensor of unknown origin")
    if not isinstance(values, Shared) and not (isinstance(values, Ragged) and values.part is indices.part):
        return Mixed(op, "it places values of other examples")
    padded = op.outputs[0].shape.rank is None or None in op.outputs[0].shape.as_list()[1:]
    if padded and not _is_summed(op, walk):
        return Mixed(op, "it pads rows to the length of the longest; give it a fixed one (default_value, shape)")
    walk.expect_rows(op.outputs[0], f"what {op.name!r} makes")
    return EXAMPLES


def _is_summed(op: tf.Operation, walk: Walk) -> bool:
    """Whether nothing is read of padded rows but how often each id is in them, as an indicator column does.

    -1, with which they are padded, is no id: of how far they are padded a sum over the axis shows nothing.
    """
    ids, padding = op.outputs[0], value_of(op.inputs[3])
    if padding is None or padding >= 0 or ids.shape.rank != 2:
        return False
    readers = walk.readers(ids)
    return bool(readers) and all(_counts_ids(reader, ids, walk) for reader in readers)


def _counts_ids(op: tf.Operation, ids: tf.Tensor, walk: Walk) -> bool:
    if op.type != "OneHot" or op.inputs[0] is not ids or op.get_attr("axis") not in (-1, 2):
        return False
    on, off = tf.get_static_value(op.inputs[2]), tf.get_static_value(op.inputs[3])
    if on != 1 or off != 0 or op.outputs[0].dtype.size < 4:  # fewer digits might round by how many are added
        return False
    sums = walk.readers(op.outputs[0])
    return bool(sums) and all(_is_over_ids(reader, op.outputs[0]) for reader in sums)


def _is_over_ids(op: tf.Operation, one_hot: tf.Tensor) -> bool:
    axes = value_of(op.inputs[1]) if op.type == "Sum" and op.inputs[0] is one_hot else None
    return axes is not None and {int(axis) % 3 for axis in axes.reshape(-1)} == {1}


@rule("SparseTensorDenseMatMul")
def _sparse_matmul(op: tf.Operation, ins: list[Layout], walk: Walk) -> Layout:
    indices, values, shape, dense = ins
    part = indices.part if isinstance(indices, Ragged) and indices.role is Role.INDICES else None
    plain = not op.get_attr("adjoint_a") and isinstance(dense, Shared) and isinstance(shape, Shared)
    if part is None or not plain or not isinstance(values, Ragged) or values.part is not part:
        return Mixed(op, "it combines entries of different examples")
    walk.expect_rows(op.outputs[0], f"what {op.name!r} makes")
    return EXAMPLES
