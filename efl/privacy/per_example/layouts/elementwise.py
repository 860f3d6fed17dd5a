"""Layouts of what ops make element by element, and of what they reduce."""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow.compat.v1 as tf

from efl._graph import is_rowwise
from efl.privacy.per_example.layouts.broadcast import differ, repeats
from efl.privacy.per_example.layouts.by_number import BROADCAST, UNARY
from efl.privacy.per_example.layouts.kept import of_table
from efl.privacy.per_example.layouts.layout import (
    Chosen,
    Layout,
    Mixed,
    Partition,
    Places,
    Pooled,
    Ragged,
    Role,
    Rows,
    Shared,
)
from efl.privacy.per_example.layouts.static import value_of
from efl.privacy.per_example.layouts.walk import Walk, rule, rule_of_one


@rule(*UNARY)
def _unary(op: tf.Operation, ins: list[Layout], walk: Walk) -> list[Layout]:
    # IdentityN has several inputs and as many outputs; the others one of each.
    keeps = op.type in ("Identity", "IdentityN", "Snapshot", "StopGradient", "PreventGradient", "EnsureShape")
    if not keeps and any(isinstance(layout, (Chosen, Places)) for layout in ins):
        return [Mixed(op, "numbers of entries do not belong to examples any more")] * len(op.outputs)
    return [layout if keeps else _as_data(layout) for layout in ins]


def _as_data(layout: Layout) -> Layout:
    """What is computed from an entry belongs to it, and is no index any more."""
    return Ragged(layout.part) if isinstance(layout, Ragged) else layout


@rule("LookupTableFind", "LookupTableFindV2")
def _lookup(op: tf.Operation, ins: list[Layout], walk: Walk) -> Layout:
    handle, keys, default = ins
    if not isinstance(handle, Shared) or isinstance(keys, (Chosen, Places)) or not isinstance(default, Shared):
        return Mixed(op, "a table, or what stands for keys that it has not, depends on examples")
    table = of_table(op.inputs[0], op)
    return table if isinstance(table, Mixed) else _as_data(keys)


@rule(*BROADCAST)
def _broadcast(op: tf.Operation, ins: list[Layout], walk: Walk) -> Layout:
    return together(op, list(op.inputs), ins, walk)


def together(op: tf.Operation, tensors: Sequence[tf.Tensor], ins: Sequence[Layout], walk: Walk) -> Layout:
    """The layout of tensors that are combined element by element, smaller ones repeated along missing axes."""
    rank = op.outputs[0].shape.rank
    found: Layout | None = None
    first: tuple[tf.Tensor, Rows] | None = None
    for tensor, layout in zip(tensors, ins, strict=True):
        if isinstance(layout, Shared):
            continue
        if isinstance(layout, Rows):
            if tensor.shape.rank is None or rank is None:
                return Mixed(op, "the number of dimensions of its inputs is not known")
            # Axes are counted from the right where shapes are broadcast: [B] beside [B, C] would run along C.
            axis = layout.axis + rank - tensor.shape.rank
            others = [t for t, x in zip(tensors, ins, strict=True) if isinstance(x, Shared)]
            longer = repeats(op, walk, tensor, layout, axis, others)
            if longer is not None:
                return longer
            placed: Layout = Rows(axis, layout.before, layout.within)
        elif isinstance(layout, Ragged):
            if tensor.shape.rank != rank and tensor.shape.rank != 1:
                return Mixed(op, "it repeats entries of sparse features along another axis")
            if rank is not None and rank > 1 and tensor.shape.rank == 1:
                return Mixed(op, "it repeats entries of sparse features along another axis")
            placed = Ragged(layout.part)
        elif isinstance(layout, Pooled) and len([x for x in ins if not isinstance(x, Shared)]) == 1:
            others = [t.shape for t, x in zip(tensors, ins, strict=True) if isinstance(x, Shared)]
            inside = rank is not None and rank == tensor.shape.rank
            alike = all(s.rank is not None and (s.rank < (rank or 0) or s[0] == 1) for s in others)
            return layout if inside and alike else Mixed(op, "it combines distinct ids with one another")
        else:
            return Mixed(op, "it combines entries of sparse features that belong to different examples")
        if found is None:
            found, first = placed, (tensor, layout) if isinstance(layout, Rows) else None
            continue
        if not same_rows(found, placed):
            return Mixed(op, "its inputs hold their examples on different axes, or in another order")
        if first is not None and isinstance(found, Rows) and isinstance(layout, Rows):
            longer = differ(op, walk, first, (tensor, layout))
            if longer is not None:
                return longer
            found = placed if found.within is None else found  # the other may know
    assert found is not None
    return found


def same_rows(one: Layout, other: Layout) -> bool:
    """Whether equal places belong to equal examples, given that the sizes are equal."""
    if isinstance(one, Rows) and isinstance(other, Rows):
        unknown = one.within is None or other.within is None
        return (one.axis, one.before) == (other.axis, other.before) and (unknown or one.within == other.within)
    return isinstance(one, Ragged) and isinstance(other, Ragged) and one.part is other.part


@rule("Select")
def _select(op: tf.Operation, ins: list[Layout], walk: Walk) -> Layout:
    condition = op.inputs[0]
    if condition.shape.rank == 1 and op.inputs[1].shape.rank != 1:
        # A vector chooses whole rows of axis 0.
        if isinstance(ins[0], Shared):
            return Mixed(op, "a vector that does not depend on examples chooses rows")
        rows = [layout for layout in ins if not isinstance(layout, Shared)]
        right = all(isinstance(layout, Rows) and layout.axis == 0 and same_rows(rows[0], layout) for layout in rows)
        return rows[-1] if right else Mixed(op, "its inputs hold their examples on different axes, or in another order")
    return together(op, list(op.inputs), ins, walk)


@rule_of_one("Sum", "Mean", "Prod", "Max", "Min", "All", "Any", "EuclideanNorm", "ArgMax", "ArgMin")
def _reduce(op: tf.Operation, layout: Layout, walk: Walk) -> Layout:
    rank = op.inputs[0].shape.rank
    axes = value_of(op.inputs[1])
    if rank is None or axes is None:
        return Mixed(op, "which axes it reduces is not known before it runs")
    reduced = {int(axis) % max(rank, 1) for axis in axes.reshape(-1)} if hasattr(axes, "reshape") else {axes % rank}
    keeps = op.type not in ("ArgMax", "ArgMin") and op.get_attr("keep_dims")
    if isinstance(layout, Rows):
        if layout.axis in reduced:
            return Mixed(op, "it reduces over the examples of the batch")
        removed = 0 if keeps else len([axis for axis in reduced if axis < layout.axis])
        return Rows(layout.axis - removed, layout.before, layout.within)
    if isinstance(layout, Ragged) and 0 not in reduced:
        return Ragged(layout.part)
    return Mixed(op, "it reduces over entries of different examples")


@rule_of_one("Softmax", "LogSoftmax", "TopK", "TopKV2", "L2Loss", "Cumsum", "Cumprod", "CumulativeLogsumexp", "LRN")
def _along_one_axis(op: tf.Operation, layout: Layout, walk: Walk) -> Layout:
    rank = op.inputs[0].shape.rank
    axis = value_of(op.inputs[1]) if op.type.startswith("Cum") else -1
    if not isinstance(layout, Rows) or op.type == "L2Loss" or rank is None or axis is None:
        return Mixed(op, "it works across entries of different examples")
    if int(axis) % rank == layout.axis:
        return Mixed(op, "it works along the axis of the examples")
    return layout


@rule("SoftmaxCrossEntropyWithLogits", "SparseSoftmaxCrossEntropyWithLogits", "InTopK", "InTopKV2")
def _cross_entropy(op: tf.Operation, ins: list[Layout], walk: Walk) -> list[Layout]:
    rows = [(t, layout) for t, layout in zip(op.inputs, ins, strict=True) if isinstance(layout, Rows)]
    others = [t for t, layout in zip(op.inputs, ins, strict=True) if isinstance(layout, Shared)]
    if len(rows) + len(others) < len(ins) or any(x.axis or not same_rows(x, rows[0][1]) for _, x in rows):
        why = "logits and labels hold their examples on different axes, or in another order"
        return [Mixed(op, why)] * len(op.outputs)
    longer = repeats(op, walk, *rows[0], 0, others)
    for row in rows[1:]:
        longer = longer or differ(op, walk, rows[0], row)
    if longer is not None:
        return [longer] * len(op.outputs)
    found = next((layout for _, layout in rows if layout.within is not None), rows[0][1])
    return [Rows(0, found.before, found.within), *[found] * (len(op.outputs) - 1)]  # the first has an axis less


@rule("FusedBatchNorm", "FusedBatchNormV2", "FusedBatchNormV3")
def _batch_norm(op: tf.Operation, ins: list[Layout], walk: Walk) -> list[Layout]:
    layout, rank = ins[0], op.inputs[0].shape.rank
    others = all(isinstance(other, Shared) for other in ins[1:])
    if others and isinstance(layout, Rows) and rank is not None:
        channel = 1 if op.get_attr("data_format").startswith(b"NC") else rank - 1
        if layout.axis == channel:  # each example is a channel: so Keras normalises layers
            return [layout, *[Rows(0, layout.before, layout.within)] * (len(op.outputs) - 1)]
    if op.get_attr("is_training") or not others or not isinstance(layout, Rows) or layout.axis != 0:
        why = (
            "batch normalisation in training mode: every example is normalised by all of them (layer or group "
            "normalisation does not mix them)"
        )
        return [Mixed(op, why)] * len(op.outputs)
    return [ins[0], *[Shared()] * (len(op.outputs) - 1)]


@rule("PyFunc", "EagerPyFunc", "PyFuncStateless")
def _python(op: tf.Operation, ins: list[Layout], walk: Walk) -> Layout:
    # Noise, and labels that are randomised.
    if is_rowwise(op) and all(isinstance(layout, Shared) or same_rows(layout, ins[0]) for layout in ins[1:]):
        return ins[0]
    return Mixed(op, f"nothing is known of what {op.type} does with the rows of a batch")


@rule("Where")
def _where(op: tf.Operation, ins: list[Layout], walk: Walk) -> Layout:
    layout = ins[0]
    places = op.outputs[0]
    if isinstance(layout, Rows) and layout.plain and layout.axis == 0:
        return Ragged(Partition(places[:, 0]), Role.INDICES)
    if isinstance(layout, Ragged) and op.inputs[0].shape.rank == 1:
        return Chosen(layout.part, places)
    return Mixed(op, "it lists places of several examples")
