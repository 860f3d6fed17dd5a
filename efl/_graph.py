"""Small things that several parts of efl need around a TensorFlow graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow.compat.v1 as tf
from tensorflow.core.framework import attr_value_pb2

from efl.errors import ModelError

#: Names a collection of a graph: the tensors that come from the peer.
RECEIVED = "efl_received"


def batch_collection(scope: str) -> str:
    """Names a collection: all that a batch of a scope consists of."""
    return f"efl_batch/{scope}"


def as_graph_tensor(value: Any, what: str) -> tf.Tensor:
    """``value`` as a dense tensor of the current graph.

    Raises:
      ModelError: An eager tensor, a sparse tensor, or nothing that makes a tensor.
    """
    if isinstance(value, (tf.SparseTensor, tf.IndexedSlices)):
        raise ModelError(f"{what}: expected a dense tensor, got {type(value).__name__}; make it dense first")
    if isinstance(value, tf.Tensor) and not hasattr(value, "graph"):
        raise eager_error(what)
    try:
        tensor = tf.convert_to_tensor(value)
    except (TypeError, ValueError) as error:
        advice = "use the tensors that its get_next() returns" if hasattr(value, "get_next") else str(error)
        raise ModelError(f"{what}: expected a tensor, got {type(value).__name__} ({advice})") from None
    if not hasattr(tensor, "graph"):
        raise eager_error(what)
    return tensor


def eager_error(what: str) -> ModelError:
    """The error for an eager tensor that reached a graph."""
    return ModelError(
        f"{what}: got an eager tensor; efl builds graphs. Import efl before the first tensor is made (and leave "
        "EFL_KEEP_EAGER unset), or call tf.compat.v1.disable_eager_execution() at the top of the script"
    )


def raw_session(sess: Any) -> tf.Session:
    """The plain ``tf.Session`` inside a monitored one."""
    inner = getattr(sess, "raw_session", None)
    if callable(inner):
        return inner()
    inner = getattr(sess, "_tf_sess", None)  # MonitoredSession has no public way
    return inner() if callable(inner) else sess


def call_python(function: Callable[..., None], inputs: list[tf.Tensor], name: str) -> tf.Operation:
    """An op that calls ``function`` with the values of ``inputs``, as numpy arrays, and gives nothing back."""
    result = tf.numpy_function(function, inputs, [], name=name)
    return result if isinstance(result, tf.Operation) else result.op


_ROWWISE = "_efl_rowwise"


def mark_rowwise(tensor: tf.Tensor) -> None:
    """Says of a Python function of efl's own that row i of what it gives depends on row i of its first input only."""
    tensor.op._set_attr(_ROWWISE, attr_value_pb2.AttrValue(b=True))


def is_rowwise(op: tf.Operation) -> bool:
    """Whether an op was marked so."""
    return _ROWWISE in op.node_def.attr


def op_name(prefix: str, wire: str) -> str:
    """``prefix/wire`` with what TensorFlow allows in the name of an op."""
    return f"{prefix}/" + "".join(c if c.isascii() and (c.isalnum() or c in "_/.") else "_" for c in wire)
