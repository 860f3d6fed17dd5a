"""What two parties say to each other while they step through a model. No TensorFlow.

An ``Exchange`` sits between a ``Channel`` and the inboxes of a graph. Per scope (mode and
task) it counts steps, decides which arriving message belongs to which step, carries the end of data and the leader's
"this step is the last" between the parties, compares sample ids, measures how long a step waited for the peer, and
remembers why the run failed. ``docs/architecture/core.md`` tells the story in order.

Two locks, taken in this order. ``_delivery`` is held while something is handed to a sink, which runs a kernel; only the
channel's threads and the step loop take it. ``_lock`` guards the state and is the only one that code inside a kernel
takes, so that no kernel waits for another.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from efl._steps.deadlines import Deadlines
from efl._steps.disputes import PATIENCE, Disputes
from efl._steps.marks import STOP_ASKED, is_mark
from efl._steps.sample_ids import Batch
from efl._steps.scope import Scope, Sink, drop_up_to, take_up_to
from efl._steps.stages import Stages
from efl.errors import EflError, LinkError, PeerClosed, ProtocolError
from efl.transport import Channel

_log = logging.getLogger("efl")
_MAX_AHEAD = 1000  # ends or last steps that a peer may announce ahead of this party


class Exchange:
    """The state of the steps that this party and one peer take together. Thread-safe.

    Args:
      role: This party's role.
      peer_role: The other party's role.
      timeout: Seconds after which a step that waits for a message ends in ``DeadlineError``.
      scan_interval: Seconds between two looks at the waiting steps.
    """

    def __init__(self, role: str, peer_role: str, *, timeout: float = 600.0, scan_interval: float = 30.0) -> None:
        self.role = role
        self.peer_role = peer_role
        self.failure: EflError | None = None
        self.timeout = timeout
        self.prospects = "waiting for it"  # what is said when the peer is lost
        self.on_part_asked: Callable[[], None] = lambda: None  # the peer wants to go, and asks for a mark
        self.on_saved: Callable[[dict[str, Any]], None] = lambda body: None  # the peer has written a checkpoint
        self._scopes: dict[str, Scope] = {}
        self._delivery = threading.RLock()
        self._lock = threading.RLock()
        self._settled = threading.Condition(self._lock)
        self._channel: Channel | None = None
        self._bound = False
        self._closing = False
        self._closed = threading.Event()
        self._goodbye = threading.Event()
        self._stages = Stages(role, peer_role, lambda note: self._control("stage", note), self.fail)
        self._disputes = Disputes(role, peer_role, self._lock, lambda rows: self._control("rows", rows), self.fail)
        self._deadlines = Deadlines(role, peer_role, timeout, scan_interval, self._waiting_scopes, self.fail)

    # ---- making and ending it ----------------------------------------------------------------------------------

    def scope(self, wire: str) -> Scope:
        """The state of the scope whose messages begin with ``wire``; made on first use."""
        with self._lock:
            return self._scopes.setdefault(wire, Scope(wire))

    def attach(self, channel: Channel) -> None:
        """Subscribes to a channel that is not connected yet."""
        with self._lock:
            self._channel, self.failure, self._bound, self._closing = channel, None, False, False
            self._closed = threading.Event()
            self._goodbye = threading.Event()
            self._stages.clear()
            for scope in self._scopes.values():
                scope.clear()

        def of_this_channel(callback: Callable[..., Any]) -> Callable[..., Any]:
            # A goodbye can be told late by the reading thread of the channel before.
            return lambda *arguments: callback(*arguments) if self._channel is channel else None

        for scope in self._scopes.values():
            for sink in scope.sinks:
                channel.subscribe(sink.name, of_this_channel(self._deliver(scope, sink)))
        channel.on_control("end", of_this_channel(self._on_end))
        channel.on_control("mark", of_this_channel(self._on_mark))
        channel.on_control("part", of_this_channel(self._on_part))
        channel.on_control("stage", of_this_channel(self._stages.on_note))
        channel.on_control("saved", of_this_channel(lambda body: self.on_saved(body)))
        channel.on_control("busy", of_this_channel(self._on_busy))
        channel.on_control("rows", of_this_channel(self._on_rows))
        channel.on_away(of_this_channel(self._on_away))
        channel.on_back(of_this_channel(self._on_back))
        channel.on_failure(of_this_channel(self.fail))
        channel.on_peer_closed(of_this_channel(self._on_peer_closed))

    def start(self, key: bytes) -> None:
        """The handshake succeeded; ``key`` is the run's key for sample digests."""
        self._disputes.key = key
        self._deadlines.watch(self._closed)

    def bind(self) -> None:
        """The sinks belong to a session now; what arrived before is handed over."""
        with self._delivery:
            for scope in self._scopes.values():
                for sink in scope.all_sinks:
                    sink.drain()  # an abort of an earlier run may be left
            with self._lock:
                self._bound = True
                failed = self.failure is not None
            for scope in self._scopes.values():
                self._release(scope)
            if failed:
                self._abort_sinks()

    def unbind(self) -> None:
        """The session is about to close; nothing may reach the sinks any more."""
        with self._delivery, self._lock:
            self._bound = False

    def rebase(self, scope: Scope, step: int) -> None:
        """Counts a scope's steps from ``step`` on. Both parties do, after the handshake and before ``bind``."""
        with self._lock:
            scope.step = step

    def closing(self) -> None:
        """This party is done; from now on the peer's goodbye is no failure."""
        with self._lock:
            self._closing = True
        self._closed.set()

    def settle(self, timeout: float) -> None:
        """Waits until everything that the peer said before its goodbye was taken in."""
        self._goodbye.wait(timeout)

    def fail(self, error: EflError, abort: bool = True) -> None:
        """Notes why the run cannot go on (the first reason stays) and aborts the running step.

        Args:
          error: The reason.
          abort: False inside a kernel of the running step, which its own exception aborts.
        """
        with self._lock:
            first = self.failure is None and not self._closing
            if first:
                self.failure = error
            self._settled.notify_all()
        if first and abort:
            with self._delivery:
                if self._bound:
                    self._abort_sinks()

    def check(self) -> None:
        """Raises why the run failed, if it did."""
        if self.failure is not None:
            raise self.failure

    def _abort_sinks(self) -> None:
        for scope in self._scopes.values():
            for sink in scope.sinks:
                sink.abort()

    def check_end(self) -> None:
        """Raises why the run failed, if it did; that the peer has ended it is none, once all own steps are taken."""
        if self._failed_hard:
            self.check()

    @property
    def _failed_hard(self) -> bool:
        # A peer whose data ended may have said goodbye before this party has come to the same step.
        return self.failure is not None and not isinstance(self.failure, PeerClosed)

    def _on_away(self, what: str) -> None:
        with self._lock:
            scopes = [scope for scope in self._scopes.values() if scope.running]
            running = [f"step {scope.running} of {scope.wire}" for scope in scopes]
            done = [f"step {scope.step} of {scope.wire}" for scope in self._scopes.values() if scope.step]
        where = f" at {' and '.join(running)}" if running else f" after {' and '.join(done)}" if done else ""
        _log.warning("%s%s; %s", what, where, self.prospects)

    def _on_back(self, seconds: float) -> None:
        with self._lock:
            for scope in self._scopes.values():
                scope.idle_since += seconds  # it is not the peer's steps that took so long

    def _on_peer_closed(self, reason: str) -> None:
        # Ordered after all its messages: whoever still waits for one will not get it.
        self._goodbye.set()
        self.fail(
            PeerClosed(
                f"{self.peer_role} ended the run while {self.role} still had steps to take ({reason}); see the log of "
                f"{self.peer_role}"
            )
        )

    # ---- steps ---------------------------------------------------------------------------------------------------

    def enter_stage(self, what: str) -> None:
        """Tells the peer which stage of common steps begins here; the run fails where the peer's is another."""
        with contextlib.suppress(PeerClosed):  # its steps are done; if this stage has any left, the first one tells
            self._stages.enter(what)

    def tell_saved(self, body: dict[str, Any]) -> None:
        """Tells the peer that this party has written a checkpoint."""
        with contextlib.suppress(LinkError):  # the peer is done, or the next step will say what happened
            self._control("saved", body)

    def begin(self, scope: Scope) -> int | None:
        """Starts the next step of a scope.

        Returns:
          Its number, or None where the peer's data ended before this step; the scope's next step is then a later one.

        Raises:
          EflError: The run has failed.
        """
        with self._lock:
            ended = scope.peer_ends[0] if scope.peer_ends else None
            if ended is None or self._failed_hard:
                if self._failed_hard or not scope.has_part_of(scope.step + 1):
                    self.check()
                scope.running, scope.waited, scope.idle_since = scope.step + 1, 0.0, time.monotonic()
                running = scope.running
        if ended is not None:
            self._close_round(scope, ended)
            return None
        if scope.ahead:
            self._consume(scope, running)
        return running

    def complete(self, scope: Scope) -> float:
        """The running step succeeded. Returns the seconds during which it waited for the peer."""
        with self._lock:
            if scope.running is None:
                raise LinkError(f"{self.role}: no step of {scope.wire} is running")
            scope.step, scope.running = scope.running, None
            scope.ids.forget(scope.step)
            return scope.waited

    def interrupted(self, scope: Scope) -> bool:
        """The running step failed: was it the peer?

        Returns:
          True where the peer's data ended in this step (the scope stands after it), False where the peer had no part.

        Raises:
          EflError: The run has failed; this is the real reason of the step's failure.
        """
        with self._lock:
            self._settled.wait_for(lambda: self.failure is not None or scope.ids.disputed is None, timeout=PATIENCE + 1)
            step = scope.running
            if step is None or not scope.peer_ends or scope.peer_ends[0] > step or self._failed_hard:
                self.check()
                return False
        self._close_round(scope, step)
        return True

    def end(self, scope: Scope, reason: str) -> bool:
        """This party ends the scope's round in the running (or the next) step, and tells the peer.

        Returns:
          False where the peer was not told, because it had taken its last step and said goodbye before.
        """
        step = scope.running if scope.running is not None else scope.step + 1
        self._close_round(scope, step)
        try:
            self._control("end", {"scope": scope.wire, "step": step, "reason": reason})
        except PeerClosed:
            return False
        return True

    def ended_by_peer(self, scope: Scope) -> bool:
        """Whether the peer ended the scope in a step that this party did not take."""
        with self._lock:
            return bool(scope.peer_ends)

    def announce(self, scope: Scope, step: int, mark: str) -> None:
        """Says, before ``step`` is started, what both do after it. The leader's to call."""
        with self._lock:
            scope.marks.append((step, mark))
        self._control("mark", {"scope": scope.wire, "step": step, "mark": mark})

    def ask_to_part(self) -> None:
        """Asks the leader for the mark after which this party goes."""
        self._control("part", {})

    def marks_of(self, scope: Scope, step: int) -> set[str]:
        """What both parties do after ``step``, just completed."""
        with self._lock:
            return take_up_to(step, scope.marks)

    def send(self, scope: Scope, name: str, array: np.ndarray, of_step: int | None = None) -> None:
        """Sends one tensor of the running step; the digest of the batch's ids rides on the first one.

        Args:
          scope: Whose step runs.
          name: On the wire.
          array: The tensor.
          of_step: The step that it belongs to; a thread of its own may come late.
        """
        self.check()
        with self._lock:
            channel, step = self._channel, scope.running
            if of_step not in (None, step):
                step = None
            digest = b"" if step is None else scope.ids.to_tell(step)
        if channel is None or step is None:
            raise LinkError(f"{self.role}: {name!r} can only be sent within a step of a running federation")
        channel.send(name, step, array, digest, self.timeout)
        scope.idle_since = time.monotonic()

    def give(self, scope: Scope, results: Sequence[tuple[Sink, np.ndarray]], wanted: Callable[[], bool]) -> None:
        """Hands over what a thread of this party has computed for the running step, where it is still ``wanted``.

        A step of the same number may run after a recovery: who drains the sinks, as every end of a step does, has told
        the thread that nothing is wanted any more.
        """
        with self._delivery:
            if self._bound and wanted():
                for sink, array in results:
                    sink.put(array)
        with self._lock:
            scope.idle_since = time.monotonic()

    def give_up(self, sinks: Sequence[Sink], wanted: Callable[[], bool]) -> None:
        """A thread of this party cannot compute what a step waits for: the step fails, for the reason that is known."""
        with self._delivery:
            if self._bound and wanted():
                for sink in sinks:
                    sink.abort()

    @property
    def is_lost(self) -> bool:
        """Whether nothing that is still computed for a step can help it."""
        return self._failed_hard

    def busy(self, scope: Scope, step: int) -> None:
        """This party computes, and has been for some time: neither it nor the peer is late."""
        with self._lock:
            scope.idle_since = time.monotonic()
        with contextlib.suppress(LinkError):  # the step will say what happened
            self._control("busy", {"scope": scope.wire, "step": step})

    def _on_busy(self, body: dict[str, Any]) -> None:
        scope, step = self._addressed(body)
        if scope is not None:
            with self._lock:
                if scope.running in (step, step + 1):  # it may still be at what this party has done
                    scope.idle_since = time.monotonic()

    def _control(self, topic: str, body: dict[str, Any]) -> None:
        channel = self._channel
        if channel is None:
            raise LinkError(f"{self.role} is not connected to {self.peer_role}")
        channel.send_control(topic, body)

    def _close_round(self, scope: Scope, step: int) -> None:
        with self._delivery:
            with self._lock:
                scope.step, scope.running = step, None
                drop_up_to(step, scope.peer_ends)
                take_up_to(step, scope.marks)  # void: nobody took that step
                scope.ids.forget(step + 1)
            if self._bound:
                for sink in scope.all_sinks:
                    sink.drain()
                self._release(scope)
        self._consume(scope, step)

    # A peer that only sends could run ahead without end, and fill this party's memory with what it is not ready for. So
    # a message stays in the channel's window until the step that it belongs to begins. Two parties that wait for each
    # other are never more than a step apart, and never see the window close.

    def _consume(self, scope: Scope, step: int) -> None:
        with self._lock:
            channel, keys = self._channel, []
            while scope.ahead and scope.ahead[0][1] <= step:
                keys.append(scope.ahead.popleft())
        if channel is not None and keys:
            channel.consumed(keys)

    def untaken(self, besides: Scope) -> bool:
        """Whether something has come, in another scope, that the graph has not taken yet."""
        with self._lock:
            return any(scope.ahead for scope in self._scopes.values() if scope is not besides)

    def taken(self, scope: Scope, name: str) -> None:
        """The graph took the oldest message of ``name``, in a scope without steps."""
        with self._lock:
            channel = self._channel
            key = next((key for key in scope.ahead if key[0] == name), None)
            if key is not None:
                scope.ahead.remove(key)
        if channel is not None and key is not None:
            channel.consumed([key])

    def _release(self, scope: Scope) -> None:
        with self._lock:
            end = scope.peer_ends[0] if scope.peer_ends else None
            held = [item for item in scope.held if end is None or item[1] <= end]
            scope.held = deque(item for item in scope.held if end is not None and item[1] > end)
        for sink, step, array in held:
            self._put(scope, sink, step, array)

    # ---- what arrives (the channel's reading thread) --------------------------------------------------------------

    def _deliver(self, scope: Scope, sink: Sink) -> Callable[[int, np.ndarray, bytes], bool]:
        def deliver(step: int, array: np.ndarray, digest: bytes) -> bool:
            with self._delivery:
                with self._lock:
                    if step <= scope.step:
                        return True  # a leftover of a step in which somebody's data ended
                    ahead = scope.running is None or step > scope.running
                    if ahead:
                        scope.ahead.append((sink.name, step))
                    if digest:
                        scope.ids.hear(step, digest)
                    agreed = scope.ids.agrees(step)
                    wait = not self._bound or (bool(scope.peer_ends) and step > scope.peer_ends[0])
                    if agreed and wait:
                        scope.held.append((sink, step, array))
                        return not ahead
                if agreed:
                    self._put(scope, sink, step, array)
            if not agreed:
                self._disputes.open(scope, step)
            return not ahead

        return deliver

    def _put(self, scope: Scope, sink: Sink, step: int, array: np.ndarray) -> None:
        if step <= scope.step:
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
        with self._delivery:
            with self._lock:
                if step <= scope.step:
                    return  # both parties' data ended in the same step
                why = body.get("reason")
                asked = why == STOP_ASKED  # of other texts of a peer none is logged
                _log.log(
                    logging.INFO if asked else logging.DEBUG,
                    "%s: %s ended %s before step %d%s",
                    self.role, self.peer_role, scope.wire, step, f": {why}" if asked else "",
                )  # fmt: skip
                scope.peer_ends.append(step)
                flood = len(scope.peer_ends) > _MAX_AHEAD
                abort = self._bound and scope.running is not None and scope.running >= step
            if abort:
                for sink in scope.sinks:
                    sink.abort()
        if flood:
            self._refuse_flood(scope)

    def _refuse_flood(self, scope: Scope) -> None:
        self.fail(
            ProtocolError(
                f"{self.peer_role} announced over {_MAX_AHEAD} ends of {scope.wire} that {self.role} has not come to"
            )
        )

    def _on_mark(self, body: dict[str, Any]) -> None:
        scope, step = self._addressed(body)
        mark = body.get("mark")
        if self.role == "leader":
            self.fail(ProtocolError(f"{self.peer_role} sent a mark, which is the leader's to make: {body!r:.200}"))
            return
        if scope is not None and not is_mark(mark):
            self.fail(ProtocolError(f"{self.peer_role} sent a mark that does not exist: {body!r:.200}"))
            return
        if scope is not None and isinstance(mark, str):
            with self._lock:
                if step <= scope.step:
                    return  # of a step in which this party's data ended
                scope.marks.append((step, mark))
                flood = len(scope.marks) > _MAX_AHEAD
            if flood:
                self._refuse_flood(scope)

    def _on_part(self, body: dict[str, Any]) -> None:
        if self.role == "leader":
            self.on_part_asked()
        else:
            self.fail(ProtocolError(f"{self.peer_role} asked for a mark, which is its own to make"))

    def _addressed(self, body: dict[str, Any]) -> tuple[Scope | None, int]:
        wire, step = body.get("scope"), body.get("step")
        scope = self._scopes.get(wire) if isinstance(wire, str) else None
        if scope is None or not isinstance(step, int) or isinstance(step, bool) or not 1 <= step < 1 << 62:
            self.fail(
                ProtocolError(f"{self.peer_role} sent a control message for an unknown scope or step: {body!r:.200}")
            )
            return None, 0
        return scope, step

    # ---- sample ids ------------------------------------------------------------------------------------------------

    def note_batch(self, scope: Scope, batch: Batch) -> None:
        """Takes the sample ids of the running step's batch. Called inside a kernel, before anything of the step.

        Raises:
          Disputed: The peer's ids of this step are here already, and differ.
        """
        self._disputes.note(scope, batch)

    def _on_rows(self, body: dict[str, Any]) -> None:
        scope, step = self._addressed(body)
        if scope is not None:
            self._disputes.on_rows(scope, step, body)

    def _waiting_scopes(self) -> list[Scope]:
        with self._lock:
            away = self._channel is not None and self._channel.away
            return [] if away else list(self._scopes.values())
