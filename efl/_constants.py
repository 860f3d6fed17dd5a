"""Data that a graph holds as constants: what it costs, and what to do instead.

``tf.data.Dataset.from_tensor_slices(array)`` makes the array a constant of the graph. For a small one this is the
shortest way; a large one is kept by Python's graph, copied into every session, and once more into the function that a
one-shot iterator calls, all before the first step and without a word.
"""

from __future__ import annotations

import logging

import tensorflow.compat.v1 as tf

_log = logging.getLogger("efl")
_MIB = 1 << 20
_LARGE = 64 * _MIB
_STRING_BYTES = 24  # of one string in a tensor; what a long one holds besides is not looked at


def warn_of_large(graph: tf.Graph) -> None:
    """Logs that the constants of a graph are large, where together they are, and names the largest.

    Looks at types and shapes only: to ask an op for its value would serialise it.
    """
    sizes = {op: _size(op.outputs[0]) for op in graph.get_operations() if op.type == "Const"}
    total = sum(sizes.values())
    if total <= _LARGE:
        return
    largest = max(sizes, key=lambda op: sizes[op])
    tensor = largest.outputs[0]
    readers = ", ".join(sorted({op.type for op in tensor.consumers()})) or "nothing"
    _log.warning(
        "the graph holds %.0f MiB of constants, which slow down the start and are kept in memory several times over. "
        "The largest is %s (%s %s, %.0f MiB; read by %s). Feed such data to placeholders when an initializable "
        "iterator is started (in after_create_session of a hook), or read files, with tf.data.TFRecordDataset or "
        "efl.data.DataIO",
        total / _MIB,
        largest.name,
        tensor.dtype.base_dtype.name,
        tensor.shape.as_list(),
        sizes[largest] / _MIB,
        readers,
    )


def _size(constant: tf.Tensor) -> int:
    return (constant.shape.num_elements() or 0) * (constant.dtype.size or _STRING_BYTES)
