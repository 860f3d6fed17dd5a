"""The session hook of a communicator that is used by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import tensorflow.compat.v1 as tf

from efl._task_scope import TaskScope

if TYPE_CHECKING:
    from efl.communicator import Communicator


class CommunicatorHook(tf.train.SessionRunHook):
    """Connects a stand-alone ``Communicator`` to a session: initialize, count steps, shut down."""

    def __init__(self, communicator: Communicator) -> None:
        self._communicator = communicator
        self._scope = communicator.exchange.scope(TaskScope().wire)

    def after_create_session(self, session: tf.Session, coord: tf.train.Coordinator) -> None:
        """Connects and binds the receiving ends."""
        self._communicator.initialize(session)

    def before_run(self, run_context: tf.train.SessionRunContext) -> None:
        """Begins a step."""
        self._communicator.exchange.begin(self._scope)

    def after_run(self, run_context: tf.train.SessionRunContext, run_values: tf.train.SessionRunValues) -> None:
        """Ends the step."""
        self._communicator.exchange.complete(self._scope)

    def end(self, session: tf.Session) -> None:
        """Raises what ended the conversation, if it failed; says goodbye otherwise."""
        exchange = self._communicator.exchange
        try:
            exchange.check_end()
        finally:
            self._communicator.shutdown(session)
