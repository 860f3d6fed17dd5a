"""The receiving end of one tensor inside a graph: a queue that the channel's reading thread feeds.

``FIFOQueue.dequeue`` is an asynchronous kernel: a receive that waits holds no thread of TensorFlow's pool, so any
number of receives work with one inter-op thread. Each element carries a flag beside the tensor; an element whose flag
is cleared makes an Assert fail, which aborts the step that waits for it and leaves queue and session usable.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow.compat.v1 as tf

from efl._session import compile_call

_GOOD, _ABORTED = np.array(True), np.array(False)
_UNBOUNDED = -1  # the reading thread must never block; the channel's window bounds what arrives


class Inbox:
    """Queue, dequeue op and session-bound callables of one received tensor.

    Attributes:
      name: Wire name, such as ``train/fc1``.
      tensor: What the graph receives, with the static shape that was asked for.
      last_shape: Of the array that was handed over last.

    Args:
      name: See above.
      dtype: Of the tensor.
      shape: Static shape, unknown where it is not known.
      after: Ops that must have run before the receive.
    """

    def __init__(self, name: str, dtype: tf.DType, shape: tf.TensorShape, after: Sequence[tf.Operation] = ()) -> None:
        self.name = name
        self.dtype = dtype
        self.last_shape: tuple[int, ...] = ()
        self._np_dtype = np.dtype(object) if dtype == tf.string else np.dtype(dtype.as_numpy_dtype)
        with tf.init_scope(), tf.name_scope("efl_recv"), tf.device("/cpu:0"):
            queue = tf.queue.FIFOQueue(_UNBOUNDED, [dtype, tf.bool], name="queue")
            self._value = tf.placeholder(dtype, name="value")
            self._good = tf.placeholder(tf.bool, [], name="good")
            self._enqueue = queue.enqueue([self._value, self._good])
            self._size = queue.size()
            with tf.control_dependencies(list(after)):
                value, good = queue.dequeue()
            drop, _ = queue.dequeue()
            text = f"the receive of {name!r} was aborted; Communicator.check() raises why"
            with tf.control_dependencies([tf.raw_ops.Assert(condition=good, data=[text])]):
                self.tensor = tf.identity(value, name="tensor")
            self.tensor.set_shape(shape)
            self._drop = drop.op
        self._put: Callable[..., Any] | None = None
        self._count: Callable[[], Any] | None = None
        self._drop_one: Callable[[], Any] | None = None

    def bind(self, session: tf.Session) -> None:
        """Makes the callables of a new session; the queue of an earlier session is gone with it."""
        self._put = compile_call(session, [self._enqueue], [self._value, self._good], here=True)
        self._count = compile_call(session, [self._size], here=True)
        self._drop_one = compile_call(session, [self._drop], here=True)

    def put(self, array: np.ndarray) -> None:
        """Hands one received array to the graph. Called by the channel's reading thread."""
        assert self._put is not None
        self.last_shape = array.shape
        with contextlib.suppress(tf.errors.CancelledError):  # the session is being closed
            self._put(array, _GOOD)

    def abort(self) -> None:
        """Makes the step that waits (or will wait) for this tensor fail."""
        if self._put is not None:
            empty = np.array(b"", object) if self._np_dtype.hasobject else np.zeros((), self._np_dtype)
            with contextlib.suppress(tf.errors.CancelledError):  # the session is being closed
                self._put(empty, _ABORTED)

    def drain(self) -> None:
        """Drops everything that is queued. Only between steps."""
        if self._count is not None and self._drop_one is not None:
            for _ in range(int(self._count()[0])):
                self._drop_one()
