"""How the side that dials finds its peer again after the connection was lost."""

from __future__ import annotations

import random
import time

from efl.errors import ConfigError
from efl.transport import stream
from efl.transport.conversation import Conversation

_FIRST_WAIT, _LAST_WAIT = 0.1, 2.0
_ATTEMPT_SECONDS = 2.0
_LOOK_SECONDS = 0.02
_DIAGNOSIS_SECONDS = 10.0  # between two
# What gRPC says where certificates cannot be the reason.
_NOT_TLS = ("Connection refused", "resolving", "DNS resolution", "unreachable", "Timeout", "timed out")


def may_be_tls(connection: stream.Dialled) -> bool:
    """Whether certificates can be why a connection ended: finding out takes connections of its own, and time."""
    return bool(connection.why or connection.turned_away) and not any(words in connection.why for words in _NOT_TLS)


def what_is_wrong_with_tls(talk: Conversation, connection: stream.Dialled) -> str:
    """Why a connection that ended did so because of certificates, or of clear text against TLS; '' where it did not."""
    if connection.turned_away:
        who = f"the {talk.partner} at {talk.endpoint.address}"
        return f"{who} turned this {talk.hello.role} away: {connection.turned_away}"
    if not may_be_tls(connection):
        return ""
    from efl.transport import tls_diagnosis  # see stream._channel

    return tls_diagnosis.diagnose(talk.endpoint, talk.partner, talk.stopped)


class Redialler:
    """Dials until the peer answers, or the conversation ends. An attempt and the wait after it take 2 s together.

    Args:
      talk: The conversation to go on with.
      handshake_seconds: How long the first handshake took: on a slow line attempts get five times as long.
    """

    def __init__(self, talk: Conversation, handshake_seconds: float) -> None:
        self._talk = talk
        self._patience = max(_ATTEMPT_SECONDS, 5 * handshake_seconds)
        self._next_diagnosis = 0.0

    def __call__(self, loss: int) -> None:
        """Dials. Runs in a thread of its own for each loss of a connection, counted from 1."""
        wait = _FIRST_WAIT
        while self._wanted(loss):
            started = time.monotonic()
            if self._attempt(loss):
                return
            wait = min(2 * wait, _LAST_WAIT)
            left = wait * random.uniform(0.7, 1.0) - (time.monotonic() - started)  # jitter: no secret
            self._talk.stopped.wait(max(0.05, left))

    def _wanted(self, loss: int) -> bool:
        talk = self._talk
        with talk.lock:
            return loss == talk.losses and talk.away_since is not None and talk.error is None and not talk.over

    def _attempt(self, loss: int) -> bool:
        talk = self._talk
        connection = stream.Dialled(talk.endpoint, talk)
        with talk.lock:
            if talk.link is None or talk.away_since is None or loss != talk.losses:
                return True
            connection.outbox.put(talk.link.knock())
            talk.candidate = connection
        try:
            connection.start()
        except ConfigError as error:  # a certificate in the middle of its renewal, perhaps
            talk.warn_of(str(error))
            return False
        limit = time.monotonic() + self._patience
        while self._wanted(loss) and not connection.over.wait(_LOOK_SECONDS):
            with talk.lock:
                taken_up = talk.connection is connection
            if time.monotonic() >= limit and not taken_up:
                break
        with talk.lock:
            if talk.candidate is connection:
                talk.candidate = None
            if talk.connection is connection and talk.away_since is None:
                return True
        if self._wanted(loss):
            connection.close()
            self._explain(connection)
        return False

    def _explain(self, connection: stream.Dialled) -> None:
        """Says where it is a certificate that keeps the line from coming back; it may be replaced by a good one."""
        if may_be_tls(connection) and time.monotonic() >= self._next_diagnosis:
            self._next_diagnosis = time.monotonic() + _DIAGNOSIS_SECONDS
            wrong = what_is_wrong_with_tls(self._talk, connection)
            if wrong:
                self._talk.warn_of(wrong)
