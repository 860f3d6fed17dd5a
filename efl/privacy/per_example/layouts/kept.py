"""What variables and tables keep of rows: where an op writes rows into one, whoever reads it has them."""

from __future__ import annotations

import tensorflow.compat.v1 as tf

from efl.privacy.per_example.layouts.layout import SHARED, Layout, Mixed
from efl.privacy.per_example.layouts.sources import SOURCES, in_order

#: ``tf.cond`` where control flow is made of functions.
CONDITIONALS = ("If", "StatelessIf")
VARIABLES = frozenset({"VarHandleOp", "Variable", "VariableV2"})
_APPLIED = ("ResourceApply", "ResourceSparseApply", "ResourceScatter")  # by an optimizer
# Tables that are filled once. Others (mutable, dense, of tensors) may change at any time.
_TABLES = frozenset({"HashTable", "HashTableV2", "AnonymousHashTable"})
_READS = frozenset(
    {
        "ReadVariableOp", "ResourceGather", "ResourceGatherNd", "VarIsInitializedOp", "Identity", "LookupTableFind",
        "LookupTableFindV2", "LookupTableSize", "LookupTableSizeV2",
    }
)  # fmt: skip


def of_variable(op: tf.Operation, is_trained: bool) -> Layout:
    """A variable is shared, unless something writes into it what it has from rows: then it hands that on."""
    return _of(op, is_trained, "it writes what it computes of rows into a variable that the loss reads")


def of_table(handle: tf.Tensor, reader: tf.Operation) -> Layout:
    """A table that is filled once is shared, unless it is filled with rows."""
    while handle.op.type == "Identity":
        handle = handle.op.inputs[0]
    held = _same_keeper(handle.op)
    if not all(op.type in _TABLES for op in held):
        return Mixed(reader, f"a table that may change ({held[0].type}), of which nobody knows whether rows are in it")
    return _of(handle.op, False, "it fills a table that the loss reads with what it computes of rows")


def _of(op: tf.Operation, is_trained: bool, why: str) -> Layout:
    writer = _writer_of_rows(op, is_trained, set())
    if writer is None:
        return SHARED
    if writer.type in CONDITIONALS:
        return Mixed(writer, "a branch that uses a variable; apply the layer, or read the variable, outside of tf.cond")
    return Mixed(writer, why)


def _writer_of_rows(op: tf.Operation, is_trained: bool, seen: set[tf.Operation]) -> tf.Operation | None:
    if op in seen:
        return None
    seen.add(op)
    trained = {v.handle.op for v in tf.trainable_variables() if getattr(v, "handle", None) is not None}
    for handle in _same_keeper(op):
        frontier = list(handle.outputs)
        while frontier:
            tensor = frontier.pop()
            for writer in tensor.consumers():
                frontier.extend(t for t in writer.outputs if t.dtype == tf.resource)  # through Identity, Switch, Enter
                if writer.type in ("Enter", "RefEnter"):
                    return writer  # into a loop, which may count in it what it does with rows
                if writer.type in _READS or (is_trained and writer.type.startswith(_APPLIED)):
                    continue
                for value in writer.inputs:
                    if value.dtype == tf.resource:
                        continue
                    for before in in_order([value]):
                        other = before.type in VARIABLES | _TABLES and before is not op
                        if before.type in SOURCES and before.type != "PlaceholderWithDefault":
                            return writer
                        if other and _writer_of_rows(before, before in trained, seen) is not None:
                            return writer
    return None


def _same_keeper(op: tf.Operation) -> list[tf.Operation]:
    """All ops that open one variable, or one table: those of one shared name."""

    def kind(other: tf.Operation) -> str:
        return next((kind for kind in ("VarHandleOp", "HashTable") if kind in other.type), "")

    if not kind(op) or "Anonymous" in op.type or not op.get_attr("shared_name"):
        return [op]
    name = op.get_attr("shared_name")
    handles = (
        other for other in op.graph.get_operations() if kind(other) == kind(op) and "Anonymous" not in other.type
    )
    return [other for other in handles if other.get_attr("shared_name") == name]
