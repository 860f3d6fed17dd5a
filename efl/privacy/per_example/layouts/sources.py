"""By which ops a batch comes into a graph, and what depends on them."""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow.compat.v1 as tf

#: Ops that do so.
SOURCES = frozenset(
    {
        "IteratorGetNext", "IteratorGetNextSync", "OptionalGetValue", "Placeholder", "PlaceholderV2", "PyFunc",
        "PyFuncStateless", "EagerPyFunc", "QueueDequeue", "QueueDequeueV2", "QueueDequeueMany", "QueueDequeueManyV2",
        "QueueDequeueUpTo", "QueueDequeueUpToV2", "ReaderRead", "ReaderReadV2", "ParseExample", "ReadFile",
        "PlaceholderWithDefault", "Unstage", "MapUnstage", "OrderedMapUnstage", "ReaderReadUpTo", "ReaderReadUpToV2",
        "DatasetToSingleElement", "ReduceDataset",
    }
)  # fmt: skip


def in_order(targets: Sequence[tf.Tensor]) -> list[tf.Operation]:
    """All ops that the targets depend on by data, inputs before those that use them."""
    order: list[tf.Operation] = []
    entered: set[tf.Operation] = set()
    stack: list[tuple[tf.Operation, bool]] = [(t.op, False) for t in reversed(targets)]
    while stack:
        op, inputs_done = stack.pop()
        if inputs_done:
            order.append(op)
        elif op not in entered:
            entered.add(op)
            stack.append((op, True))
            stack.extend((t.op, False) for t in op.inputs if t.op not in entered)
    return order


def reads_input(tensor: tf.Tensor, known: tf.Tensor) -> bool:
    """Whether a tensor depends on a batch in another way than through ``known``."""
    return any(op.type in SOURCES and op is not known.op for op in in_order([tensor]))
