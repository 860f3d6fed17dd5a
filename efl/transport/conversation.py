"""The engine of a channel: the link, its lock, its mailboxes and callbacks.

``Channel`` is its public face; ``rendezvous`` finds the peer, ``admission`` judges who comes, ``redial`` finds the peer
again, ``watch`` keeps the time.
One lock guards the link and the mailboxes. What arrives is taken by gRPC's thread, which must not wait; callbacks run
outside the lock, in order, in the thread that reads the stream.
"""

from __future__ import annotations

import atexit
import collections
import functools
import logging
import queue
import threading
import time
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import numpy as np

from efl.errors import (
    EflError,
    HandshakeError,
    LinkError,
    PeerClosed,
    PeerFailed,
    PeerLost,
    PeerRestarted,
    ProtocolError,
)
from efl.transport import admission, events, handshake, operations, stream
from efl.transport import frame as wire
from efl.transport.handshake import Hello
from efl.transport.inbound import Message
from efl.transport.limits import Endpoint, Limits
from efl.transport.link import Link, State
from efl.transport.mailbox import Mailbox

logger = logging.getLogger("efl")

TensorCallback = Callable[[int, np.ndarray, bytes], bool | None]
ControlCallback = Callable[[dict[str, Any]], None]
_Outcome = tuple[stream.Connection | None, EflError | None]
_LAST_WORDS_SECONDS = 1.0
_LAST_WORDS_AWAY_SECONDS = 5.0
_STRANGER_SECONDS = 10.0  # between two warnings of the same kind about somebody who is turned away
_UNREAD_CONTROLS = 8  # times max_control_bytes may wait to be read
_DAMAGES = 5  # damaged messages in a row, with nothing good in between, that are blamed on the line


def again(error: EflError) -> EflError:
    """A fresh copy to raise: one exception object raised in several threads would mix their tracebacks."""
    return type(error)(str(error))


class Conversation(stream.Handler):
    """State that the threads of one channel share. ``lock`` guards all of it.

    Attributes:
      outcomes: What became of attempts to meet the peer: (connection, error or None); read by the rendezvous.
      error: Why the conversation failed.
      over: Set when this side has closed or aborted.
    """

    def __init__(self, endpoint: Endpoint, hello: Hello, limits: Limits) -> None:
        self.endpoint, self.hello, self.limits = endpoint, hello, limits
        self.partner = handshake.PARTNERS[hello.role]
        self.lock = threading.Lock()
        self.reading_first = threading.Lock()  # what strangers say takes memory: one at a time
        self.changed = threading.Condition(self.lock)
        self.waiting = 0  # threads that wait on ``changed``
        self.link: Link | None = None
        self.connection: stream.Connection | None = None
        self.listener: stream.Listener | None = None
        self.tensors: Mailbox[Message] = Mailbox()
        self.controls: Mailbox[dict[str, Any]] = Mailbox()
        self.tensor_callbacks: dict[str, TensorCallback] = {}
        self.kept: dict[tuple[str, int], int] = {}  # what callbacks have, but have not consumed -> its size
        self.control_callbacks: dict[str, ControlCallback] = {}
        self.on_failure: list[Callable[[EflError], None]] = []
        self.on_peer_closed: list[Callable[[str], None]] = []
        self.outcomes: queue.SimpleQueue[_Outcome] = queue.SimpleQueue()
        self.error: EflError | None = None
        self.met = self.closing = self.over = self.gone = False
        self.farewell = False  # the peer has said goodbye, and what it had said before has been worked off
        self.mute = False  # no callback is to be called any more: this side has broken off
        self.stopped = threading.Event()
        self.counts = dict.fromkeys(
            (
                "messages_sent",
                "messages_received",
                "bytes_sent",
                "bytes_received",
                "frames_sent",
                "frames_received",
            ),
            0,
        )
        self.away_since: float | None = None  # when the connection was lost; None while there is one
        self.back_at = 0.0  # when there was one again
        self.losses = 0
        self._away_for = 0.0
        self.on_away: list[Callable[[str], None]] = []
        self.on_back: list[Callable[[float], None]] = []
        self.judge: Callable[[Hello], list[str]] = lambda hello: []  # further reasons to refuse a peer
        self.redial: Callable[[int], None] | None = None  # set where this side dials
        self.candidate: stream.Connection | None = None  # dialled, and not yet answered
        self._damages = 0  # damaged messages in a row
        self.adopted_at = 0.0
        self.in_callback = False
        self._left: collections.deque[tuple[stream.Connection, list[events.Event], EflError | None]] = (
            collections.deque()
        )
        self._working = threading.Lock()
        self._worker: threading.Thread | None = None  # who does what is left to do
        self.turned_away = ""  # who was, and why
        self._told_of: dict[str, float] = {}

    # ---- called with the lock held

    def flush(self) -> None:
        """Hands the link's frames to the stream."""
        frames = self.link.take(time.monotonic()) if self.link is not None else ()
        self.counts["frames_sent"] += len(frames)
        self.counts["bytes_sent"] += sum(map(len, frames))
        if self.connection is not None:
            self.connection.outbox.put(*frames)

    def notify(self) -> None:
        """Wakes whoever waits for credit or for the end."""
        if self.waiting:
            self.changed.notify_all()

    def wait(self, timeout: float | None = None) -> None:
        """Waits for ``notify``."""
        self.waiting += 1
        try:
            self.changed.wait(timeout)
        finally:
            self.waiting -= 1

    def adopt(self, connection: stream.Connection, label: str) -> None:
        """Begins a conversation on ``connection``."""
        now = time.monotonic()
        self.hello = handshake.anew(self.hello)
        self.link = Link(self.hello, self.limits, now, label, self.judge)
        self.connection, self.adopted_at = connection, now
        self.flush()

    @property
    def ended(self) -> bool:
        """Whether nothing can be sent, and nothing come that has not come yet."""
        return self.error is not None or self.closing or self.over or self.farewell

    @property
    def failing(self) -> bool:
        """Whether the conversation has failed, or will as soon as the last words, which have come, are worked off."""
        return self.error is not None or (self.link is not None and self.link.state is State.OVER)

    def end_error(self, what: str) -> EflError:
        """Why ``what`` cannot happen any more, when the conversation has ended."""
        if self.error is not None:
            return again(self.error)
        if self.over or self.closing or self.link is None:
            return LinkError(f"{what}: the {self.hello.role} has closed this channel itself")
        return PeerClosed(
            f"{what}: {self.link.peer_label} has ended the conversation. Do both parties run the same steps?"
        )

    def wake_takers(self) -> None:
        """Tells every waiting thread that what it waits for cannot come any more."""

        for box in (self.tensors, self.controls):
            box.fail(lambda key: self.end_error(describe(key)))
        self.notify()

    # ---- what arrives

    def on_message(self, connection: stream.Connection, message: bytes) -> operations.Work | None:
        """See ``stream.Handler``."""
        if connection.given_up:
            return None
        if connection is not self.connection:
            return functools.partial(self._on_other, connection, message)
        return self._take(connection, message)

    def carries(self, connection: stream.Connection) -> bool:
        """See ``stream.Handler``."""
        return connection is self.connection

    def _on_other(self, connection: stream.Connection, message: bytes) -> None:
        if admission.admit(self, connection, message):
            work = self._take(connection, message)
            if work is not None:
                work()

    def _take(self, connection: stream.Connection, message: bytes) -> operations.Work | None:
        """What is addressed to mailboxes is put there at once; callbacks, and all else that may wait, are left."""
        failure: EflError | None = None
        try:
            frames = wire.decode(message)
        except wire.DamagedFrame as error:
            why = f"damaged on the way: {error}"
            if self.met and self._is_of_the_line(connection):
                connection.given_up = True
                return functools.partial(self._give_up, connection, why)
            frames, failure = [], error if self.met else PeerLost(why)
        with self.lock:
            link = self.link
            if connection is not self.connection or self.over or link is None:
                return None
            self.counts["frames_received"] += len(frames)
            self.counts["bytes_received"] += len(message)
            deferred: list[events.Event] = []
            try:
                if isinstance(failure, ProtocolError):
                    raise link.reject(failure)
                if any(frame.kind is not wire.Kind.RESUME for frame in frames):
                    self._damages = 0
                for event in link.receive(frames, time.monotonic()):
                    if not self._deliver(event):
                        deferred.append(event)
            except ProtocolError as error:
                failure = error
            if link.pending:
                self.flush()
            if self.waiting:
                self.changed.notify_all()
            if not deferred and failure is None:
                return None
            self._left.append((connection, deferred, failure))
        return self._work_off

    def _work_off(self) -> None:
        """Does what is left to do about the oldest message; it may be of a connection that was lost since."""
        with self._working:
            if not self._left:
                return
            connection, deferred, failure = self._left[0]
            self._worker = threading.current_thread()
            try:
                for event in deferred:
                    if not self.mute:
                        self._dispatch(connection, event)
                if failure is not None:
                    self.fail(connection, failure)
            finally:
                self._worker = None
                with self.lock:
                    self._left.popleft()
                    self.notify()

    def finish(self) -> None:
        """See ``stream.Handler``."""
        while self._left:
            self._work_off()

    @property
    def worked_off(self) -> bool:
        """Whether nothing is left to do about what has arrived."""
        return not self._left

    def _give_up(self, connection: stream.Connection, why: str) -> None:
        self.lose(connection, why)
        connection.close()

    @property
    def label(self) -> str:
        """Who the peer is, for messages."""
        return self.link.peer_label if self.link is not None else f"the {self.partner}"

    def _is_of_the_line(self, connection: stream.Connection) -> bool:
        """Damage is a fault of the line until it comes again and again with nothing good in between."""
        with self.lock:
            if connection is not self.connection or self.link is None:
                return False
            self._damages += 1
            return self._damages <= _DAMAGES

    def _deliver(self, event: events.Event) -> bool:
        """Puts what is addressed to a mailbox there, in the same breath as the link took it (lock held)."""
        assert self.link is not None
        if isinstance(event, Message):
            self.counts["messages_received"] += 1
            if event.name in self.tensor_callbacks:
                return False
            if self.tensors.deliver((event.name, event.step), event):
                self.link.consumed(event.nbytes)
            return True
        if isinstance(event, events.Control):
            self.counts["messages_received"] += 1
            if event.topic in self.control_callbacks:
                return False
            self.controls.deliver(event.topic, event.body, event.size)
            if self.controls.unread > self.limits.max_unread_controls:
                most = self.limits.max_unread_controls
                raise self.link.reject(ProtocolError(f"more than max_unread_controls={most} control messages"))
            if self.controls.unread_bytes > _UNREAD_CONTROLS * self.limits.max_control_bytes:
                most = self.controls.unread_bytes
                raise self.link.reject(ProtocolError(f"{most} bytes of control messages that nobody has read"))
            return True
        if isinstance(event, events.Accepted):
            self.met = True
        elif isinstance(event, events.Resumed):
            now = time.monotonic()
            self.back_at, self._away_for, self.away_since = now, now - (self.away_since or now), None
            self.notify()
        return False

    def _dispatch(self, connection: stream.Connection, event: events.Event) -> None:
        """What is done outside the lock."""
        assert self.link is not None
        if isinstance(event, Message):
            key = (event.name, event.step)
            self.kept[key] = event.nbytes  # before the callback: another thread may consume it meanwhile
            if self._call(self.tensor_callbacks[event.name], event.step, event.array, event.digest) is not False:
                self.consumed([key])
        elif isinstance(event, events.Control):
            self._call(self.control_callbacks[event.topic], event.body)
        elif isinstance(event, events.Goodbye):
            with self.lock:
                self.farewell = True
                self.wake_takers()
            for told in self.on_peer_closed:
                self._call(told, self.link.peer_label)
        elif isinstance(event, events.Accepted):
            self.outcomes.put((connection, None))
        elif isinstance(event, events.Resumed):
            self._found()
        elif isinstance(event, events.Refused):
            if event.busy or not event.reasons:
                connection.outbox.end()
                self.outcomes.put((connection, PeerLost("; ".join(event.reasons) or "refused")))
                return
            self.fail(connection, self._disagreement(event.reasons))
        elif isinstance(event, events.Aborted):
            text = f": {event.text}" if event.text else " (its own log says why)"
            where = f" at {event.where}" if event.where else ""
            self.fail(connection, PeerFailed(f"{self.link.peer_label} failed{where} with {event.error_type}{text}"))

    def _disagreement(self, reasons: tuple[str, ...]) -> HandshakeError:
        assert self.link is not None
        if reasons and all(" could not begin: " in reason for reason in reasons):
            return HandshakeError("; ".join(reasons) + ". Correct that program and start both again.")
        if reasons and all(" could not go on: " in reason for reason in reasons):
            return HandshakeError("; ".join(reasons))
        lines = "".join(f"\n  - {reason}" for reason in reasons)
        # A reason that says what to do says it better.
        advice = "" if "start both again" in lines else "\nMake both programs say the same and start them again."
        return HandshakeError(
            f"the {self.hello.role} and {self.link.peer_label} do not agree on what to run:{lines}{advice}"
        )

    def consumed(self, keys: Iterable[tuple[str, int]]) -> None:
        """What callbacks were handed is taken now: the peer may send as much again. Takes the lock."""
        sizes = [size for size in (self.kept.pop(key, None) for key in keys) if size is not None]
        if not sizes:
            return
        with self.lock:
            if self.link is None or self.over:
                return
            for size in sizes:
                self.link.consumed(size)
            if self.link.pending:
                self.flush()

    def _call(self, callback: Callable[..., Any], *args: Any) -> Any:
        self.in_callback = True
        try:
            return callback(*args)
        except BaseException as error:
            logger.exception("%s: a callback of the channel failed", self.hello.role)
            named = LinkError(f"a callback of the channel failed: {error!r}")
            self.abort(error, error if isinstance(error, EflError) else named)
            return None
        finally:
            self.in_callback = False

    def on_end(self, connection: stream.Connection, why: str) -> None:
        """See ``stream.Handler``."""
        with self.lock:
            if connection is not self.connection or self.link is None:
                return
            if self.over or self.failing or (self.link.peer_goodbye and self.link.flushed):
                self.gone = True
                self.notify()
                return
            label, heard = self.link.peer_label, self.link.last_heard(time.monotonic())
        why = why or "it ended the stream without a goodbye"
        if self.met:
            self.lose(connection, why)
            return
        lost = PeerLost(
            f"the {self.hello.role} lost {label}: {why}; {heard}. "
            "Its process has ended or the line is down: see its log"
        )
        self.fail(connection, lost)

    def on_stranger(self, peer: str, why: str) -> None:
        """See ``stream.Handler``. Told once in a while: whoever reaches the port can come as often as they like."""
        self.turned_away = f"turned away {peer}: {why}"
        self.warn_of(self.turned_away, why)

    def warn_of(self, text: str, kind: str = "") -> None:
        """Logs a warning, but not of the same kind again for a while."""
        now, kind = time.monotonic(), kind or text
        told = {other: at for other, at in self._told_of.items() if now - at < _STRANGER_SECONDS}
        if kind not in told:
            logger.warning("%s: %s", self.hello.role, text)
        self._told_of = {kind: now, **told}

    # ---- lost and found

    def lose(self, connection: stream.Connection, why: str) -> None:
        """The connection is gone, or no good; the conversation waits for the next."""
        with self.lock:
            if connection is not self.connection or self.link is None or self.over or self.failing:
                return
            now = time.monotonic()
            self.link.lost()
            self.connection, connection.given_up = None, True
            if self.away_since is not None:
                return  # lost again before it was found
            self.away_since = now
            self.losses += 1
            loss = self.losses
            what = f"{self.hello.role}: lost {self.link.peer_label}: {why}; {self.link.last_heard(now)}"
        for told in self.on_away:
            told(what)
        if not self.on_away:
            logger.warning("%s; waiting up to %g s for it", what, self.limits.peer_timeout)
        if self.redial is not None:
            threading.Thread(target=self.redial, args=[loss], name="efl-redial", daemon=True).start()

    def _found(self) -> None:
        logger.info("%s: %s is back after %.1f s", self.hello.role, self.label, self._away_for)
        for told in self.on_back:
            told(self._away_for)

    # ---- ends

    def fail(self, connection: stream.Connection, error: EflError) -> None:
        """The conversation on ``connection`` cannot go on; before it began this is the rendezvous' matter."""
        with self.lock:
            if connection is not self.connection or self.error is not None or self.over:
                return
            connection.outbox.end()
            met = self.met
        if met:
            self.end(error)
        else:
            self.outcomes.put((connection, error))

    def end(self, error: EflError) -> None:
        """The conversation, once begun, cannot go on: wakes and tells everybody."""
        with self.lock:
            if self.error is not None or self.over:
                return
            self.error = error
            self.wake_takers()
        logger.log(logging.WARNING if isinstance(error, PeerRestarted) else logging.ERROR, "%s: %s",
                   self.hello.role, error)  # fmt: skip
        for told in self.on_failure:
            try:
                told(error)
            except Exception:  # the others are still to be told
                logger.exception("%s: a failure callback failed", self.hello.role)

    def abort(
        self, cause: BaseException, error: EflError | None = None, where: str = "", share_text: bool = False
    ) -> None:
        """This party cannot go on: tells the peer, closes. With ``error``, that is what later calls raise."""
        with self.lock:
            if self.over:
                return
            limit = time.monotonic() + _LAST_WORDS_AWAY_SECONDS
            while self.away_since is not None and self.error is None and not self.reading():
                left = limit - time.monotonic()
                if left <= 0:
                    break
                self.wait(left)  # the line may come back, and the peer learn why this party went
            if self.link is not None and self.connection is not None:
                self.link.abort(cause, where, share_text)
                self.connection.outbox.cut(self.link.take(time.monotonic()))
            first = error is not None and self.error is None
            if first:
                self.error = error
            self.over = self.mute = True
            self.wake_takers()
        if first and self.met and error is not None:
            for told in self.on_failure:
                told(error)
        self.tear_down()

    def left_open(self) -> None:
        """The program ends and has not closed: the peer is told, which would wait for it otherwise."""
        self.abort(LinkError(f"the {self.hello.role}'s program ended without closing the conversation"))

    def reading(self) -> bool:
        """Whether this is a thread that reads the stream, or runs callbacks (it must never wait for the peer)."""
        here = threading.current_thread()
        return here is self._worker or (self.connection is not None and self.connection.reader is here)

    def tear_down(self) -> None:
        """Ends stream, port and timer; gives last words a moment to leave. The port is free afterwards.

        Called from the thread that reads it does not wait for that.
        """
        if self.reading():
            threading.Thread(target=self._tear_down, name="efl-close", daemon=True).start()
        else:
            self._tear_down()

    def _tear_down(self) -> None:
        self.stopped.set()
        atexit.unregister(self.left_open)
        connection, listener = self.connection, self.listener
        if self.candidate is not None:
            self.candidate.close()
        if connection is not None:
            connection.outbox.end()
            connection.wait(_LAST_WORDS_SECONDS)
            connection.close()
        if listener is not None:
            listener.close(_LAST_WORDS_SECONDS if connection is None else 0.2)


def describe(key: Hashable) -> str:
    """What a thread waits for, in words."""
    return f"recv({key[0]!r}, step={key[1]})" if isinstance(key, tuple) else f"recv_control({key!r})"
