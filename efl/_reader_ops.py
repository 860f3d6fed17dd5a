"""Ops by which one party's reader tells the other's where it reads next. For readers outside ``efl.data``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow.compat.v1 as tf

from efl._graph import call_python, op_name
from efl._task_scope import TaskScope

if TYPE_CHECKING:
    from efl.communicator import Communicator

_END = b"end"
_SCOPE = TaskScope(None, "reader")


class ReaderOps:
    """Makes the ops of ``Communicator.send_reader_state``, ``terminate_reader`` and ``recv_reader_state``.

    Args:
      communicator: Its channel carries the states.
      register: Adds a tensor to the exchange unless it is there, and returns its name on the wire.
      push: Sends an array under a wire name and a step.
    """

    def __init__(
        self,
        communicator: Communicator,
        register: Callable[[str, TaskScope], str],
        push: Callable[[str, int, np.ndarray], None],
    ) -> None:
        self._communicator, self._register, self._push = communicator, register, push
        self._steps: dict[str, int] = {}

    def clear(self) -> None:
        """Begins a conversation."""
        self._steps.clear()

    def send(self, name: str, block_id: Any, sample_index: Any) -> tf.Operation:
        """Tells the peer where the reader goes on."""
        index = tf.as_string(tf.cast(sample_index, tf.int64))
        return self._send(name, tf.stack([b"next", tf.reshape(block_id, []), index]))

    def terminate(self, name: str) -> tf.Operation:
        """Tells the peer that the reader is done."""
        return self._send(name, tf.constant([_END, b"", b"0"]))

    def _send(self, name: str, state: tf.Tensor) -> tf.Operation:
        wire = self._register(name, _SCOPE)

        def push(array: np.ndarray) -> None:
            step = self._steps[wire] = self._steps.get(wire, 0) + 1
            self._push(wire, step, np.asarray(array))

        return call_python(push, [state], op_name("efl_reader", wire))

    def recv(self, name: str) -> tuple[tf.Tensor, tf.Tensor]:
        """Receives what ``send`` told: (block_id, sample_index)."""
        with tf.init_scope():
            state = self._communicator.recv(name, tf.string, shape=[3], scope=_SCOPE)
        exchange = self._communicator.exchange

        def parse(kind: bytes, block: bytes, index: bytes) -> tuple[bytes, np.int64]:
            exchange.taken(exchange.scope(_SCOPE.wire), f"{_SCOPE.wire}/{name}")
            if kind == _END:
                raise StopIteration  # TensorFlow makes it OutOfRangeError
            return block, np.int64(index)

        block_id, index = tf.numpy_function(parse, [state[0], state[1], state[2]], [tf.string, tf.int64])
        return tf.ensure_shape(block_id, []), tf.ensure_shape(index, [])
