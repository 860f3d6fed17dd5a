"""The session hook of a communicator that is used by itself."""

from __future__ import annotations

import functools
import logging
import sys
from typing import TYPE_CHECKING, Any

import tensorflow.compat.v1 as tf

from efl._task_scope import TaskScope
from efl.errors import EflError, Interrupted, PeerClosed

if TYPE_CHECKING:
    from efl.communicator import Communicator

_log = logging.getLogger("efl")


class CommunicatorHook(tf.train.SessionRunHook):
    """Connects a stand-alone ``Communicator`` to a session: initialize, count steps, shut down.

    What ends the conversation is raised by the session's ``run``, as the error it is and not as that of the op which it
    aborted. A peer that has taken its last step and said goodbye ends the session as the end of data does
    (``tf.errors.OutOfRangeError``, which leaves a monitored session's block in peace), with a warning in the log. An
    error that ends the session is told to the peer.
    """

    def __init__(self, communicator: Communicator) -> None:
        self._communicator = communicator
        self._scope = communicator.exchange.scope(TaskScope().wire)

    def after_create_session(self, session: tf.Session, coord: tf.train.Coordinator) -> None:
        """Connects and binds the receiving ends."""
        self._communicator.initialize(session)
        # Hooks are not asked about errors; the session itself is the only one that sees all of them.
        session.run = self._explaining(session.run)
        session.close = self._telling(session.close)

    def before_run(self, run_context: tf.train.SessionRunContext) -> None:
        """Begins a step."""
        exchange = self._communicator.exchange
        try:
            exchange.begin(self._scope)
        except PeerClosed as error:
            # What a reader was told before the goodbye is still there to be taken; no step of tensors is.
            if not exchange.untaken(besides=self._scope):
                self._raise(error)
        except EflError as error:
            self._raise(error)

    def after_run(self, run_context: tf.train.SessionRunContext, run_values: tf.train.SessionRunValues) -> None:
        """Ends the step."""
        if self._scope.running is not None:
            self._communicator.exchange.complete(self._scope)

    def end(self, session: tf.Session) -> None:
        """Raises what ended the conversation, if it failed; says goodbye otherwise."""
        exchange = self._communicator.exchange
        try:
            exchange.check_end()
        finally:
            self._communicator.shutdown(session)

    def _explaining(self, run: Any) -> Any:
        @functools.wraps(run)
        def explained(*arguments: Any, **options: Any) -> Any:
            try:
                return run(*arguments, **options)
            except tf.errors.OutOfRangeError:
                raise  # this party's own data have ended, whatever the peer has done since
            except tf.errors.OpError as error:
                failure = self._communicator.exchange.failure
                if failure is not None:
                    self._raise(failure)
                if isinstance(error, (tf.errors.AbortedError, tf.errors.UnavailableError)):
                    # For these a monitored session makes itself anew, and would be out of step with the peer.
                    text = f"{error.message} (the session ends: a new one would be out of step with the peer)"
                    raise tf.errors.InternalError(error.node_def, error.op, text) from None
                raise

        return explained

    def _raise(self, failure: EflError) -> None:
        if isinstance(failure, PeerClosed):
            _log.warning("%s: %s", self._communicator.federal_role, failure)
            raise tf.errors.OutOfRangeError(None, None, str(failure)) from None
        raise failure.with_traceback(None) from None

    def _telling(self, close: Any) -> Any:
        @functools.wraps(close)
        def told() -> None:
            error = _why_it_ends(self._communicator.federal_role)
            if error is not None and self._communicator.connected:
                self._communicator.abort(error, f"step {self._scope.running or self._scope.step}")
            close()

        return told


def _why_it_ends(role: str) -> Exception | None:
    """The error that is being handled: a monitored session closes inside the handling of what ends it."""
    error = sys.exc_info()[1]
    if isinstance(error, KeyboardInterrupt):
        return Interrupted(f"{role} was interrupted (Ctrl-C)")
    if isinstance(error, SystemExit):
        return Interrupted(f"{role}'s program ended with the exit code {error.code}") if error.code else None
    return error if isinstance(error, Exception) else None
