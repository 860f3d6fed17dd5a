"""The ops of one reader: its iterator, its position variable, and what starts and moves them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow.compat.v1 as tf

from efl.data import _pipeline
from efl.data._features import FeatureTable
from efl.data._files import Block
from efl.data._reader_state import LENGTH, ReaderState


class ReaderGraph:
    """Builds the ops of a reader in the default graph; all are made here, so the graph may be finalised afterwards.

    Args:
      prefix: What the ops' names begin with; must be new to the graph.
      plan: How to read.
      table: What to parse.

    Attributes:
      next: The features of the next batch (a dict), the block and the row of each of its rows.
      next_name: Name of the op that errors of reading come from.
      run_seed: The graph's seed when the reader was made, or None.
    """

    def __init__(self, prefix: str, plan: _pipeline.Plan, table: FeatureTable) -> None:
        self.run_seed: int | None = tf.get_default_graph().seed
        # Outside any name scope and control dependency of the caller: the names appear in checkpoints.
        with tf.name_scope(None), tf.control_dependencies(None):
            zeros = tf.zeros([LENGTH], tf.int64)
            self._position = tf.Variable(zeros, trainable=False, use_resource=True, name=f"{prefix}/position")
            # Belongs to the session, not to the model: in no collection, so neither saved nor restored.
            self._running = tf.Variable(
                False, trainable=False, use_resource=True, collections=[], name=f"{prefix}/running"
            )
            with tf.name_scope(f"{prefix}/start/"):
                self._paths = tf.placeholder(tf.string, [None], "paths")
                self._compressions = tf.placeholder(tf.string, [None], "compressions")
                self._state = tf.placeholder(tf.int64, [LENGTH], "state")
                source = _pipeline.Source(self._paths, self._compressions, self._state)
                iterator = tf.data.make_initializable_iterator(_pipeline.build(source, plan, table))
                self._start = tf.group(
                    iterator.initializer,
                    self._position.assign(self._state, read_value=False),
                    self._running.assign(True, read_value=False),
                )
                variables = [self._position, self._running]
                self._initialised = tf.stack([tf.is_variable_initialized(v) for v in variables])
                self._read = self._position.read_value()
                self._is_running = self._running.read_value()
            features, state, block, row = iterator.get_next(name=f"{prefix}/next")
            self.next_name = f"{prefix}/next"
            with tf.control_dependencies([self._position.assign(state, read_value=False)]):
                self.next: tuple[dict[str, Any], tf.Tensor, tf.Tensor] = (
                    {name: tf.identity(features[name], name=f"{prefix}/{_op_name(name)}") for name in table},
                    tf.identity(block, name=f"{prefix}/block"),
                    tf.identity(row, name=f"{prefix}/row"),
                )

    @property
    def variable_name(self) -> str:
        """Name of the position variable, as in checkpoints."""
        return str(self._position.op.name)

    def forget(self, sess: tf.Session) -> None:
        """Puts the position back to its initial value."""
        sess.run(self._position.initializer)

    def prepare(self, sess: tf.Session) -> None:
        """Initialises those of the reader's variables that are not initialised yet."""
        variables, initialised = (self._position, self._running), sess.run(self._initialised)
        missing = [v.initializer for v, done in zip(variables, initialised, strict=True) if not done]
        if missing:
            sess.run(missing)

    def started(self, sess: tf.Session) -> bool:
        """Whether the iterator was started in this session and not moved since."""
        self.prepare(sess)
        return bool(sess.run(self._is_running))

    def state(self, sess: tf.Session) -> ReaderState:
        """Returns the position."""
        self.prepare(sess)
        return ReaderState.from_vector(sess.run(self._read))

    def start(self, sess: tf.Session, blocks: Sequence[Block], state: ReaderState) -> None:
        """Starts the iterator at ``state``."""
        feed = {
            self._paths: [block.path for block in blocks],
            self._compressions: [block.compression for block in blocks],
            self._state: state.vector(),
        }
        sess.run(self._start, feed)

    def restore_op(self, state: ReaderState) -> tf.Operation:
        """Makes an op that sets the position and has the reader start anew."""
        with tf.name_scope(None), tf.control_dependencies(None):
            return tf.group(
                self._position.assign(tf.constant(state.vector()), read_value=False),
                self._running.assign(False, read_value=False),
                name="efl_reader/restore",
            )


def _op_name(feature: str) -> str:
    """Makes an op name of any feature name."""
    return "".join(letter if letter.isascii() and letter.isalnum() else "_" for letter in feature)
