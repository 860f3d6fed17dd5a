"""What two parties say to each other while they step through a model. No TensorFlow.

A :class:`Exchange` sits between a :class:`~efl.transport.Channel` and the inboxes of a graph. Per scope (mode and
task) it counts steps, decides which arriving message belongs to which step, carries the end of data and the leader's
"this step is the last" between the parties, compares sample ids, measures how long a step waited for the peer, and
remembers why the conversation failed. ``docs/architecture/core.md`` tells the story in order.
"""

from __future__ import annotations

import base64
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from efl import _sample_check as sample_check
from efl.errors import DeadlineError, EflError, LinkError, PeerClosed, ProtocolError, SampleMismatch
from efl.transport import Channel

_log = logging.getLogger("efl")
_ROWS_LIMIT = 60_000  # row digests in one control message (under 1 MiB as base64)
_ROWS_PATIENCE = 5.0  # seconds to wait for the peer's row digests after a mismatch


class Disputed(EflError):
    """Aborts a step whose sample ids differ, while the parties find out where. Never reaches the user."""


class Sink(Protocol):
    """The part of an inbox that a conversation drives."""

    name: str

    def put(self, array: np.ndarray) -> None: ...
    def abort(self) -> None: ...
    def drain(self) -> None: ...


@dataclass
class Scope:
    """Where one (mode, task) stands. All fields are guarded by the conversation's lock."""

    wire: str
    sinks: list[Sink] = field(default_factory=list)
    step: int = 0  # the last step that ended: completed, or burnt because somebody's data ended in it
    running: int | None = None
    peer_end: int | None = None
    last: int | None = None
    arrived: dict[str, int] = field(default_factory=dict)
    held: deque[tuple[Sink, int, np.ndarray]] = field(default_factory=deque)
    blocks: Sequence[str] = ()
    batches: dict[int, sample_check.Batch] = field(default_factory=dict)
    own_digest: dict[int, bytes] = field(default_factory=dict)
    peer_digest: dict[int, bytes] = field(default_factory=dict)
    mismatch: int | None = None
    told: int = 0  # the last step whose digest was sent
    waited: float = 0.0
    idle_since: float = 0.0


class Exchange:
    """The state of one federation between this party and one peer. Thread-safe.

    Args:
      role: This party's role.
      peer_role: The other party's role.
      timeout: Seconds after which a step that waits for a message ends in :class:`DeadlineError`.
      scan_interval: Seconds between two looks at the waiting steps.
    """

    def __init__(self, role: str, peer_role: str, *, timeout: float = 600.0, scan_interval: float = 30.0) -> None:
        self.role = role
        self.peer_role = peer_role
        self.failure: EflError | None = None
        self._timeout = timeout
        self._scan_interval = min(scan_interval, timeout / 2)
        self._scopes: dict[str, Scope] = {}
        self._lock = threading.RLock()
        self._rows_settled = threading.Condition(self._lock)
        self._channel: Channel | None = None
        self._key = b""
        self._bound = False
        self._closing = False
        self._closed = threading.Event()

    # ---- making and ending it ----------------------------------------------------------------------------------

    def scope(self, wire: str) -> Scope:
        """The state of the scope whose messages begin with ``wire``; made on first use."""
        with self._lock:
            return self._scopes.setdefault(wire, Scope(wire))

    def attach(self, channel: Channel) -> None:
        """Subscribes to a channel that is not connected yet."""
        with self._lock:
            self._channel, self.failure, self._bound, self._closing = channel, None, False, False
            self._closed.clear()

        def of_this_channel(callback: Callable[..., None]) -> Callable[..., None]:
            # A goodbye can be told late by the reading thread of the channel before.
            return lambda *arguments: callback(*arguments) if self._channel is channel else None

        for scope in self._scopes.values():
            for sink in scope.sinks:
                channel.subscribe(sink.name, of_this_channel(self._deliver(scope, sink)))
        channel.on_control("end", of_this_channel(self._on_end))
        channel.on_control("last", of_this_channel(self._on_last))
        channel.on_control("rows", of_this_channel(self._on_rows))
        channel.on_failure(of_this_channel(self.fail))
        channel.on_peer_closed(of_this_channel(self._on_peer_closed))

    def start(self, key: bytes) -> None:
        """The handshake succeeded; ``key`` is the run's key for sample digests."""
        self._key = key
        threading.Thread(target=self._watch, name="efl-deadlines", daemon=True).start()

    def bind(self) -> None:
        """The sinks belong to a session now; what arrived before is handed over."""
        with self._lock:
            self._bound = True
            for scope in self._scopes.values():
                for sink in scope.sinks:
                    sink.drain()  # an abort of an earlier conversation may be left
                self._release(scope)
            if self.failure is not None:
                self._abort_sinks()

    def unbind(self) -> None:
        """The session is about to close; nothing may reach the sinks any more."""
        with self._lock:
            self._bound = False

    def closing(self) -> None:
        """This party is done; from now on the peer's goodbye is no failure."""
        with self._lock:
            self._closing = True
        self._closed.set()

    def fail(self, error: EflError) -> None:
        """Notes why the conversation cannot go on (the first reason stays) and aborts the running step."""
        with self._lock:
            if self.failure is None and not self._closing:
                self.failure = error
                if self._bound:
                    self._abort_sinks()
            self._rows_settled.notify_all()

    def _abort_sinks(self) -> None:
        for scope in self._scopes.values():
            for sink in scope.sinks:
                sink.abort()

    def _on_peer_closed(self, reason: str) -> None:
        # Ordered after all its messages: whoever still waits for one will not get it.
        why = f" ({reason})" if reason else ""
        self.fail(
            PeerClosed(
                f"{self.peer_role} ended the conversation{why} while {self.role} still had steps to run; "
                f"see the log of {self.peer_role}"
            )
        )

    # ---- steps ---------------------------------------------------------------------------------------------------

    def begin(self, scope: Scope) -> int | None:
        """Starts the next step of a scope.

        Returns:
          Its number, or None where the peer's data ended before this step; the scope's next step is then a later one.

        Raises:
          EflError: The conversation has failed.
        """
        with self._lock:
            if scope.peer_end is not None and not self._failed_hard:
                self._close_round(scope, scope.peer_end)
                return None
            self.check()
            step = scope.step + 1
            scope.running, scope.waited, scope.idle_since = step, 0.0, time.monotonic()
            return step

    def complete(self, scope: Scope) -> float:
        """The running step succeeded. Returns the seconds during which it waited for the peer."""
        with self._lock:
            assert scope.running is not None
            scope.step, scope.running = scope.running, None
            for memory in (scope.batches, scope.own_digest, scope.peer_digest):
                for step in [s for s in memory if s < scope.step]:
                    del memory[step]
            return scope.waited

    def interrupted(self, scope: Scope) -> bool:
        """The running step failed: was it the peer?

        Returns:
          True where the peer's data ended in this step (the scope stands after it), False where the peer had no part.

        Raises:
          EflError: The conversation has failed; this is the real reason of the step's failure.
        """
        with self._lock:
            self._rows_settled.wait_for(
                lambda: self.failure is not None or scope.mismatch is None, timeout=_ROWS_PATIENCE + 1
            )
            ended = scope.peer_end is not None and scope.running is not None and scope.peer_end <= scope.running
            if ended and not self._failed_hard:
                self._close_round(scope, scope.running)
                return True
            self.check()
            return False

    @property
    def _failed_hard(self) -> bool:
        # A peer whose data ended may have said goodbye before this party has come to the same step.
        return self.failure is not None and not isinstance(self.failure, PeerClosed)

    def end(self, scope: Scope, reason: str) -> None:
        """This party ends the scope's round in the running (or the next) step, and tells the peer."""
        with self._lock:
            step = scope.running if scope.running is not None else scope.step + 1
            self._close_round(scope, step)
        with contextlib.suppress(PeerClosed):  # the peer came to its own end before, and is gone
            self._control("end", {"scope": scope.wire, "step": step, "reason": reason})

    def announce_last(self, scope: Scope, step: int) -> None:
        """Says, before ``step`` is started, that it is the last of its stage. The leader's to call."""
        with self._lock:
            scope.last = step
        self._control("last", {"scope": scope.wire, "step": step})

    def is_last(self, scope: Scope, step: int) -> bool:
        """True where ``step``, just completed, was announced to be the last of its stage."""
        with self._lock:
            if scope.last is not None and scope.last <= step:
                scope.last = None
                return True
            return False

    def check(self) -> None:
        """Raises the failure of the conversation, if there is one."""
        if self.failure is not None:
            raise self.failure

    def send(self, scope: Scope, name: str, array: np.ndarray) -> None:
        """Sends one tensor of the running step; the digest of the batch's ids rides on the first one."""
        channel, step = self._channel, scope.running
        self.check()
        if channel is None or step is None:
            raise LinkError(f"{self.role}: {name!r} can only be sent within a step of a running federation")
        with self._lock:
            digest = b"" if scope.told == step else scope.own_digest.get(step, b"")
            if digest:
                scope.told = step
        channel.send(name, step, array, digest)
        scope.idle_since = time.monotonic()

    def control(self, topic: str, body: dict[str, Any]) -> None:
        """Sends a control message of another module."""
        self._control(topic, body)

    def _control(self, topic: str, body: dict[str, Any]) -> None:
        channel = self._channel
        if channel is None:
            raise LinkError(f"{self.role} is not connected to {self.peer_role}")
        channel.send_control(topic, body)

    def _close_round(self, scope: Scope, step: int) -> None:
        scope.step, scope.running, scope.peer_end, scope.last = step, None, None, None
        scope.batches.clear(), scope.own_digest.clear(), scope.peer_digest.clear()
        if self._bound:
            for sink in scope.sinks:
                sink.drain()
            self._release(scope)

    def _release(self, scope: Scope) -> None:
        held, scope.held = scope.held, deque()
        for sink, step, array in held:
            self._accept(scope, sink, step, array)

    # ---- what arrives (the channel's reading thread) --------------------------------------------------------------

    def _deliver(self, scope: Scope, sink: Sink) -> Callable[[int, np.ndarray, bytes], None]:
        def deliver(step: int, array: np.ndarray, digest: bytes) -> None:
            with self._lock:
                if digest and step > scope.step:
                    scope.peer_digest[step] = digest
                    if not self._compare(scope, step):
                        return
                self._accept(scope, sink, step, array)

        return deliver

    def _accept(self, scope: Scope, sink: Sink, step: int, array: np.ndarray) -> None:
        if step <= scope.step:
            return  # a leftover of a step in which somebody's data ended
        if not self._bound or (scope.peer_end is not None and step > scope.peer_end):
            scope.held.append((sink, step, array))
            return
        sink.put(array)
        scope.arrived[sink.name] = step
        if scope.running == step:
            now = time.monotonic()
            scope.waited += now - scope.idle_since
            scope.idle_since = now

    def _on_end(self, body: dict[str, Any]) -> None:
        scope, step = self._addressed(body)
        if scope is None:
            return
        with self._lock:
            if step <= scope.step:
                return  # both parties' data ended in the same step
            _log.debug("%s: %s ended %s at step %d", self.role, self.peer_role, scope.wire, step)
            scope.peer_end = step
            if scope.running is not None and scope.running >= step and self._bound:
                for sink in scope.sinks:
                    sink.abort()

    def _on_last(self, body: dict[str, Any]) -> None:
        scope, step = self._addressed(body)
        if scope is not None:
            with self._lock:
                scope.last = step

    def _addressed(self, body: dict[str, Any]) -> tuple[Scope | None, int]:
        wire, step = body.get("scope"), body.get("step")
        scope = self._scopes.get(wire) if isinstance(wire, str) else None
        if scope is None or not isinstance(step, int) or isinstance(step, bool) or step < 1:
            self.fail(
                ProtocolError(f"{self.peer_role} sent a control message for an unknown scope or step: {body!r:.200}")
            )
            return None, 0
        return scope, step

    # ---- sample ids ------------------------------------------------------------------------------------------------

    def note_batch(self, scope: Scope, batch: sample_check.Batch) -> None:
        """Takes the sample ids of the running step's batch.

        Raises:
          Disputed: The peer's ids of this step are here already, and differ.
        """
        step = scope.running
        if step is None:
            raise LinkError(f"{self.role}: sample ids of {scope.wire} outside a step of a running federation")
        digest = batch.digest(self._key)
        with self._lock:
            scope.batches[step], scope.own_digest[step] = batch, digest
            if not self._compare(scope, step):
                raise Disputed(f"sample ids differ at step {step} of {scope.wire}")

    def _compare(self, scope: Scope, step: int) -> bool:
        mine, peer = scope.own_digest.get(step), scope.peer_digest.get(step)
        if mine is None or peer is None or mine == peer:
            return True
        if scope.mismatch is None:
            scope.mismatch = step
            self._send_rows(scope, step)
            timer = threading.Timer(_ROWS_PATIENCE, self._fail_rows, [scope, step, None, None])
            timer.daemon = True
            timer.start()
        return False

    def _send_rows(self, scope: Scope, step: int) -> None:
        batch = scope.batches[step]
        rows = b"".join(batch.row_digests(self._key, _ROWS_LIMIT))
        body = {
            "scope": scope.wire,
            "step": step,
            "size": batch.size,
            "rows": base64.b64encode(rows).decode(),
        }
        self._control("rows", body)

    def _on_rows(self, body: dict[str, Any]) -> None:
        scope, step = self._addressed(body)
        if scope is None:
            return
        with self._lock:
            if step not in scope.batches:
                self.fail(
                    ProtocolError(f"{self.peer_role} disputes sample ids of step {step} of {scope.wire}, not held here")
                )
                return
            try:
                raw = base64.b64decode(body["rows"], validate=True)
                size = int(body["size"])
            except (KeyError, ValueError, TypeError):
                self.fail(ProtocolError(f"{self.peer_role} sent malformed row digests for step {step} of {scope.wire}"))
                return
            if scope.mismatch is None:
                scope.mismatch = step
                self._send_rows(scope, step)
            width = sample_check.ROW_DIGEST_BYTES
            self._fail_rows(scope, step, [raw[i : i + width] for i in range(0, len(raw), width)], size)

    def _fail_rows(self, scope: Scope, step: int, peer: list[bytes] | None, size: int | None) -> None:
        with self._lock:
            batch = scope.batches.get(step)
            where = f"{self.peer_role} did not say which rows"
            if peer is not None and batch is not None:
                index = sample_check.first_difference(batch.row_digests(self._key, _ROWS_LIMIT), peer)
                where = "the first differing row is beyond the rows that were compared"
                if index is not None:
                    where = f"the first difference is in row {index} of the batch{self._origin(scope, batch, index)}"
                if size != batch.size:
                    where = f"{self.role}'s batch has {batch.size} rows, {self.peer_role}'s {size}; {where}"
            self.fail(
                SampleMismatch(
                    f"sample ids of {self.role} and {self.peer_role} differ at step {step} of {scope.wire}: {where}. "
                    "Both parties must read the same rows in the same order: compare the files of this block on both sides"
                )
            )

    def _origin(self, scope: Scope, batch: sample_check.Batch, index: int) -> str:
        if batch.block is None or batch.row is None or index >= batch.size:
            return ""
        block = int(batch.block.reshape(-1)[index])
        name = scope.blocks[block] if 0 <= block < len(scope.blocks) else f"number {block}"
        return f" (at {self.role}: block {name}, row {int(batch.row.reshape(-1)[index])} of it)"

    # ---- deadlines ---------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        while not self._closed.wait(self._scan_interval):
            with self._lock:
                if self.failure is not None:
                    return
                for scope in self._scopes.values():
                    waited = time.monotonic() - scope.idle_since
                    missing = [
                        sink.name
                        for sink in scope.sinks
                        if scope.running and scope.arrived.get(sink.name, 0) < scope.running
                    ]
                    if missing and waited > self._timeout:
                        self.fail(
                            DeadlineError(
                                f"{self.role} waited {waited:.1f} s at step {scope.running} of {scope.wire} for "
                                f"{', '.join(missing)} from {self.peer_role}, which is alive; "
                                "raise default_timeout_milliseconds if its steps may take that long"
                            )
                        )
