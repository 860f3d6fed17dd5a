"""How two parties find each other: one listens, one dials, in whatever order they start."""

from __future__ import annotations

import queue
import re
import time
from collections.abc import Callable

from efl.errors import EflError, HandshakeError, LinkError, PeerLost, ProtocolError, TlsError
from efl.transport import stream
from efl.transport.conversation import Conversation, logger
from efl.transport.handshake import Hello
from efl.transport.redial import Redialler, what_is_wrong_with_tls

_FIRST_BACKOFF, _LAST_BACKOFF = 0.1, 2.0
_ATTEMPT_SECONDS = 15.0
_LOG_EVERY = 10.0
_LOOK_SECONDS = 0.25  # between two looks at TLS handshakes


class _Patience:
    """Counts down, and says from time to time for whom one waits."""

    def __init__(self, who: str, whom: str, timeout: float) -> None:
        self._who, self._whom, self.timeout = who, whom, timeout
        self._start = time.monotonic()
        self._next_log = 0.0

    def left(self) -> float:
        return self.timeout - self.passed()

    def passed(self) -> float:
        return time.monotonic() - self._start

    def log(self, note: str = "") -> None:
        """Logs at once and then every ten seconds."""
        if self.passed() >= self._next_log:
            self._next_log = self.passed() + _LOG_EVERY
            extra = f" ({note})" if note else ""
            logger.info("%s: waiting for %s%s, %.0f s of %.0f s left",
                        self._who, self._whom, extra, max(0.0, self.left()), self.timeout)  # fmt: skip


def meet(talk: Conversation, timeout: float, stubborn: bool = False) -> Hello:
    """Finds the peer and shakes hands.

    Args:
      talk: The conversation to begin.
      timeout: Seconds.
      stubborn: Whether to wait on where somebody came who disagrees.

    Returns:
      The peer's hello.

    Raises:
      PeerLost: Nobody came, or nobody was there, in time.
      ConfigError: The port is taken.
      HandshakeError: The parties disagree.
      TlsError: Where this side dials: a certificate is not accepted, or one party speaks clear text.
    """
    passing = (PeerLost, ProtocolError, HandshakeError, TlsError) if stubborn else (PeerLost, ProtocolError)
    return _listen(talk, timeout, passing) if talk.endpoint.listen else _dial(talk, timeout, passing)


def _listen(talk: Conversation, timeout: float, passing: tuple[type[EflError], ...]) -> Hello:
    address = talk.endpoint.address
    patience = _Patience(talk.hello.role, f"the {talk.partner} to connect to {address}", timeout)
    talk.listener = stream.Listener(talk.endpoint, talk)
    note = ""
    look = _closer_look(talk)
    while patience.left() > 0:
        patience.log(talk.turned_away or note)
        try:
            longest = _LOG_EVERY if talk.endpoint.tls is None else _LOOK_SECONDS
            connection, error = talk.outcomes.get(timeout=max(0.01, min(longest, patience.left())))
        except queue.Empty:
            look()
            continue
        if connection is None:
            break
        if error is None:
            return _peer(talk)
        if not isinstance(error, passing):
            raise error
        note = str(error)  # that connection is nothing to us: wait for the next
        logger.warning("%s: %s", talk.hello.role, error)
        with talk.lock:
            talk.link = talk.connection = None
            talk.gone = False
    if talk.over:
        raise LinkError(f"the {talk.hello.role} has closed this channel while it waited for the {talk.partner}")
    raise PeerLost(
        f"the {talk.hello.role} listened on {address} for {timeout:g} s and no {talk.partner} came"
        + (f" (last: {talk.turned_away or note})" if talk.turned_away or note else "")
        + f". Is the {talk.partner} started, does it dial this machine at {address}, does a firewall block the port?"
    )


def _closer_look(talk: Conversation) -> Callable[[], None]:
    """What a listener does from time to time to find out why TLS handshakes fail, if any do."""
    if talk.endpoint.tls is None:
        return lambda: None
    from efl.transport.tls_interview import Interviews  # see stream._channel

    interviews = Interviews(talk.endpoint, talk.endpoint.tls)

    def look() -> None:
        assert talk.listener is not None
        if (
            talk.connection is not None
            or not interviews.due
            or not talk.listener.failed_handshakes(interviews.patience)
        ):
            return
        talk.listener.close(0.0)
        who, why = interviews.hold(talk.stopped)
        if why:
            talk.on_stranger(who, why)
        talk.listener = stream.Listener(talk.endpoint, talk)

    return look


def _dial(talk: Conversation, timeout: float, passing: tuple[type[EflError], ...]) -> Hello:
    address = talk.endpoint.address
    patience = _Patience(talk.hello.role, f"the {talk.partner} at {address}", timeout)
    backoff, note = _FIRST_BACKOFF, ""
    while patience.left() > 0 and not talk.over:
        patience.log(_in_short(note))
        connection = stream.Dialled(talk.endpoint, talk)
        with talk.lock:
            talk.gone = False
            talk.adopt(connection, f"the {talk.partner} ({address})")
        begun = time.monotonic()
        talk.redial = Redialler(talk, 0.0)  # before the first answer: the line may go right after it
        connection.start()
        error = _outcome(talk, connection, min(_ATTEMPT_SECONDS, max(0.05, patience.left())))
        if error is None:
            talk.redial = Redialler(talk, time.monotonic() - begun)
            return _peer(talk)
        if not isinstance(error, PeerLost) and not (isinstance(error, HandshakeError) and HandshakeError in passing):
            raise error
        note = str(error)
        with talk.lock:
            talk.link = talk.connection = None
        connection.close()
        wrong = what_is_wrong_with_tls(talk, connection)
        if wrong and TlsError not in passing:
            raise TlsError(wrong)
        if wrong:
            talk.warn_of(wrong)
        note = wrong or note
        if talk.stopped.wait(min(backoff, max(0.0, patience.left()))):
            break
        # A peer that is busy is there, and will soon be ready.
        backoff = _FIRST_BACKOFF if "is busy" in note else min(2 * backoff, _LAST_BACKOFF)
    if talk.over:
        raise LinkError(f"the {talk.hello.role} has closed this channel while it looked for the {talk.partner}")
    raise PeerLost(
        f"the {talk.hello.role} found no {talk.partner} at {address} within {timeout:g} s (last: {_at_last(note)}). "
        "Is the "
        f"{talk.partner} started, is {address} its address, does a firewall block the port?"
    )


def _at_last(note: str) -> str:
    """Why the last attempt failed, without the words for a peer that there was: this one was never reached."""
    never = re.fullmatch(r".* lost the .*?: (.*); nothing was heard of it\. .*", note, re.DOTALL)
    return f"no connection: {never[1]}" if never else note


def _in_short(note: str) -> str:
    """Why a follower still waits, without gRPC's text: that matters only where the waiting was in vain."""
    if " lost the " not in note:
        return note
    if "Connection refused" in note:
        return "nobody listens there yet"
    if "resolving" in note or "DNS resolution" in note:
        return "this host's address is not known here yet"
    return "no connection yet"


def _outcome(talk: Conversation, connection: stream.Connection, seconds: float) -> EflError | None:
    end = time.monotonic() + seconds
    while True:
        try:
            which, error = talk.outcomes.get(timeout=max(0.01, end - time.monotonic()))
        except queue.Empty:
            return PeerLost(f"no answer within {seconds:.0f} s: is it an efl party that listens there?")
        if which is connection:
            return error
        if which is None:
            return PeerLost("closed")


def _peer(talk: Conversation) -> Hello:
    assert talk.link is not None
    assert talk.link.peer is not None
    logger.info("%s: connected to %s", talk.hello.role, talk.link.peer_label)
    return talk.link.peer
