"""What one op of a data set's graph says of itself."""

from __future__ import annotations

from typing import Any

import tensorflow.compat.v1 as tf
from tensorflow.python.framework.function_def_to_graph import function_def_to_graph

_MAKE_BATCHES = ("BatchDataset", "BatchDatasetV2", "MapAndBatchDataset", "WindowDataset", "RebatchDatasetV2")
_SAMPLING = ("Random", "Uniform", "Normal", "Multinomial")


def has_attr(op: tf.Operation, attr: str) -> bool:
    """Whether an op has an attribute."""
    return any(each.name == attr for each in op.op_def.attr)


def number_of(op: tf.Operation, place: int) -> int | None:
    """A scalar input, where it is known."""
    value = tf.get_static_value(op.inputs[place])
    return None if value is None else int(value)


def drops_rows(op: tf.Operation) -> bool:
    """Whether an op that makes batches, or windows, may leave out what does not fill one."""
    if not op.type.endswith(_MAKE_BATCHES):
        return False
    flag = next((t for t in op.inputs if t.dtype == tf.bool), None)
    value = None if flag is None else tf.get_static_value(flag)
    return flag is not None and (value is None or bool(value))


def is_sloppy(op: tf.Operation, by_default: bool) -> bool:
    """Whether an op may give first what is ready first.

    Args:
      op: A data set's.
      by_default: What the options of the data set say.
    """
    if has_attr(op, "deterministic"):
        said = op.get_attr("deterministic")
        return said == b"false" or (said == b"default" and by_default)
    if has_attr(op, "sloppy"):
        return bool(op.get_attr("sloppy"))
    if "sloppy" not in {each.name for each in op.op_def.input_arg}:
        return False
    flag = tf.get_static_value(op.inputs[1 + len(op.get_attr("Targuments")) + 2])  # after cycle and block
    return flag is None or bool(flag)


def is_sampling(op: tf.Operation) -> bool:
    """Whether an op draws numbers."""
    return any(word in op.type for word in _SAMPLING)


def graph_of(graph: tf.Graph, function: str) -> Any:
    """A function's graph, with its inputs and outputs; None where it cannot be made."""
    held = graph._get_function(function)
    if held is None:
        return None
    with graph.as_default():  # which has the functions that it calls
        return function_def_to_graph(held.cached_definition)
