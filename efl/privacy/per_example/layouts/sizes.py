"""Numbers that follow from rows although they look like shapes, and tensors of such sizes.

They may say how large something is; what is that large may meet rows place by place. Whatever would make a number of
them that a loss can compute with (a sum of ones, a shape of zeros, a place in the batch) is ``Mixed``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import tensorflow.compat.v1 as tf

from efl.privacy.per_example.layouts.by_number import BROADCAST, UNARY
from efl.privacy.per_example.layouts.entries import are_known, is_long_along_one_axis
from efl.privacy.per_example.layouts.layout import SHARED, Layout, Mixed, Rows, Shared, Sized, Sizes

if TYPE_CHECKING:
    from efl.privacy.per_example.layouts.walk import Walk

# What ``Sizes`` may be put together by.
_OF_SIZES = frozenset(
    {
        "Identity", "Cast", "Slice", "StridedSlice", "GatherV2", "Prod", "Pack", "ConcatV2", "Reshape", "ExpandDims",
        "Squeeze", "Equal", "NotEqual", "Greater", "GreaterEqual", "Less", "LessEqual", "All", "LogicalAnd", "Mul",
        "Maximum", "Unpack",
    }
)  # fmt: skip
_RANDOM = dict.fromkeys(("RandomUniform", "RandomStandardNormal", "TruncatedNormal", "RandomUniformInt"), (0,))
# Which inputs of an op may be ``Sizes``: they say how large its output becomes. Those of sparse features have rules.
_SPARSE = {"SparseReshape": (1, 2), "SparseToDense": (1,), "SparseFillEmptyRows": (2,), "SparseTensorDenseMatMul": (2,)}
_MADE = {"Reshape": (1,), "Fill": (0,), "BroadcastTo": (1,), "Tile": (1,), "ScatterNd": (2,), **_RANDOM}
_OF_ROWS = {"Slice": (1, 2), "StridedSlice": (1, 2)}  # of what is shared they would pick by the size
_BY_NUMBER = frozenset({*UNARY, *BROADCAST})
_SAME_PLACES = frozenset({"Reshape", "ExpandDims", "Squeeze"})


def of_sizes(op: tf.Operation, ins: Sequence[Layout], walk: Walk) -> Layout | None:
    """What an op makes of ``Sizes`` and ``Sized``; None where it has none, or ordinary rules hold for the rest."""
    secret = next((layout for layout in ins if isinstance(layout, (Sizes, Sized))), None)
    if secret is None or op.type == "Assert":
        return None
    mixed = Mixed(op, f"a number that says {secret.what}; it may be a size in a shape, and nothing else")
    sizes = {place for place, layout in enumerate(ins) if isinstance(layout, Sizes)}
    of_rows = any(not isinstance(layout, Shared) for layout in ins)
    places = _SPARSE.get(op.type) or _MADE.get(op.type) or (_OF_ROWS.get(op.type) if of_rows else None) or ()
    if not sizes <= set(places):
        alone = all(isinstance(layout, Shared) and not isinstance(layout, Sized) for layout in ins)
        if not alone or op.type not in _OF_SIZES:
            return mixed
        # Of a shape, it may have picked what everybody can read in the graph.
        return SHARED if all(are_known(t, walk) for t in op.outputs) else Sizes(secret.what)
    if op.type in _SPARSE:
        return None
    if of_rows:
        return None if _meets_rows(op, ins, walk) else mixed
    if any(isinstance(layout, Sized) for layout in ins):
        if op.type in ("Shape", "ShapeN", "Size"):
            return Sizes(secret.what)
        if op.type not in _BY_NUMBER | _SAME_PLACES:
            return mixed
    return Sized(secret.what) if all(map(_is_long, op.outputs)) else mixed


def _meets_rows(op: tf.Operation, ins: Sequence[Layout], walk: Walk) -> bool:
    """Whether only the axis of the rows is as long as there are rows in what comes out, as it was before."""
    sized = [tensor for tensor, layout in zip(op.inputs, ins, strict=True) if isinstance(layout, Sized)]
    if not sized:
        made = op.type == "Reshape" and is_long_along_one_axis(op.outputs[0], op.inputs[1], walk)
        return made or all(map(_is_long, op.outputs))
    if op.type.startswith("FusedBatchNorm"):
        return _scales_rows(op, ins)
    rows = [tensor for tensor, layout in zip(op.inputs, ins, strict=True) if not isinstance(layout, Shared)]
    first = all(isinstance(layout, (Rows, Shared)) and getattr(layout, "axis", 0) == 0 for layout in ins)
    alike = [*sized, *rows]
    if op.type == "Select" and isinstance(ins[0], Rows) and op.inputs[0].shape.rank == 1:
        alike = [tensor for tensor in alike if tensor is not op.inputs[0]]  # it chooses whole rows
    ranks = {tensor.shape.rank for tensor in alike}
    side_by_side = op.type in BROADCAST or op.type in ("ConcatV2", "Select")
    return side_by_side and first and len(ranks) == 1 and all(map(_is_long, sized))


def _scales_rows(op: tf.Operation, ins: Sequence[Layout]) -> bool:
    """Whether each example is a channel that is normalised by itself, with a scale for each: so Keras does layers."""
    rank = op.inputs[0].shape.rank
    channel = 1 if op.get_attr("data_format").startswith(b"NC") else (rank or 0) - 1
    return isinstance(ins[0], Rows) and ins[0].axis == channel and rank is not None


def _is_long(tensor: tf.Tensor) -> bool:
    """Whether all axes but the first have sizes that the graph says."""
    return bool(tensor.shape.rank) and None not in tensor.shape.as_list()[1:]
