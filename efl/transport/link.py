"""The conversation with one peer as a pure state machine: bytes in -> events out, and bytes to send.

No sockets, no threads, no clocks: the time is an argument. ``Channel`` is the
shell around it. One ``Link`` lives as long as one conversation::

    HELLO --(peer's hello, no disagreement)--> AGREED --(peer's ACCEPT)--> OPEN --> OVER
                                                                           ^  |     (goodbyes, refusal, abort, error)
                                                       (peer's RESUME) ----+  v ``lost``
                                                                           AWAY

Frames of kind DATA, CONTROL and BYE carry a sequence number. The receiver takes them in order and says in every frame
it sends how far it has come; the sender keeps what has not been acknowledged (bounded) and sends it again on the next
connection, when one is lost. Acknowledgement and credit ride on frames that travel anyway; a frame of their own is sent
only when too much is unannounced, or when the peer says that it is waiting for credit.
"""

from __future__ import annotations

import enum
import hmac
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from efl.errors import ConfigError, ProtocolError
from efl.transport import events, handshake
from efl.transport.events import Accepted, Claim, Control, Event, Goodbye, Refused, Resumed
from efl.transport.frame import FLAG_HUNGRY, Frame, Kind
from efl.transport.handshake import Hello, TensorSpec
from efl.transport.inbound import Inbound, Message
from efl.transport.ledger import Ledger
from efl.transport.limits import MIB, Limits
from efl.transport.outbound import Outbound, Outgoing
from efl.transport.said import read_json

_DATA = Kind.DATA
_WORDLESS = (Kind.ACK, Kind.PING, Kind.BYE)


class State(enum.Enum):
    """Where the conversation stands."""

    HELLO = "waiting for the peer's hello"
    AGREED = "waiting for the peer to accept"
    OPEN = "open"
    AWAY = "the connection is lost"
    OVER = "over"


_OPEN = State.OPEN


class Link:
    """One conversation. Not thread-safe; errors leave it OVER with an ABORT for the peer among the bytes to
    send.

    Attributes:
      state: Where the conversation stands.
      peer: The peer's hello once it is known.
      peer_label: How messages call the peer, for example ``"the follower (ipv4:10.0.0.2:41234)"``.
      said_goodbye: Whether this side's BYE has been queued.
      peer_goodbye: Whether the peer's has arrived.
    """

    def __init__(
        self,
        hello: Hello,
        limits: Limits,
        now: float,
        peer_label: str = "the peer",
        judge: Callable[[Hello], list[str]] = lambda hello: [],
    ) -> None:
        """Queues the hello.

        Args:
          hello: This party's.
          limits: This party's.
          now: The time, seconds.
          peer_label: How messages call the peer.
          judge: Further reasons to refuse a peer with this hello.

        Raises:
          ConfigError: The hello is not valid.
        """
        self.state = State.HELLO
        self.peer: Hello | None = None
        self.peer_label = peer_label
        self.said_goodbye = self.peer_goodbye = False
        self._hello, self._limits, self._judge = hello, limits, judge
        self._inbound = Inbound((), limits)
        self._ledger = Ledger(self._inbound)
        self._outbound = Outbound((), 1, 1, 1)
        self._ack_bytes, self._ack_messages, self._max_control = MIB, 1, 0
        self._attempt = 0  # number of the newest claim, of the side that dials
        self._knocked = False  # this side has sent RESUME on the connection to come
        self._fed = False  # the message being received has asked for credit, and been answered
        self._peer_hungry = False  # the peer waits for credit: announce every message that is consumed
        self._asked = (-1, -1, -1)
        self._heard, self._said = now, now
        self._heard_what: tuple[Kind, int, int] | None = None  # kind, tensor, step
        self._ledger.put(Kind.HELLO, handshake.to_bytes(hello, limits))

    # ---- bytes out

    @property
    def pending(self) -> bool:
        """Whether there is anything to send."""
        return bool(self._ledger.queue)

    def take(self, now: float) -> list[bytes]:
        """The frames to send now, in order. Each may be sent as a message, or several joined."""
        queue, self._ledger.queue = self._ledger.queue, []
        if self.state is State.AWAY:
            return []  # what counts is kept, and sent again
        if queue:
            self._said = now
        return queue

    # ---- lost and found

    def lost(self) -> None:
        """The connection is gone; the conversation waits for the next."""
        if self.state is State.OPEN:
            self.state = State.AWAY
            self._ledger.queue.clear()
            self._peer_hungry, self._knocked, self._asked = False, False, (-1, -1, -1)

    def knock(self) -> bytes:
        """The frame that opens a new connection, where this side dials it."""
        self._knocked, self._attempt = True, self._attempt + 1
        self._put_resume()
        frame = self._ledger.queue.pop()
        self._ledger.queue.clear()
        return frame

    def is_ours(self, claim: Claim) -> bool:
        """Whether a claim is the peer's, and to this conversation. Only the peer knows both names."""
        if self.peer is None:
            return False
        named = hmac.compare_digest(claim.instance.encode(), self.peer.instance.encode())
        return named and hmac.compare_digest(claim.peer.encode(), self._hello.instance.encode())

    def is_stale(self, claim: Claim) -> bool:
        """Whether a later attempt of the peer has been taken up: connections may overtake each other."""
        return claim.attempt <= self._attempt

    def _put_resume(self) -> None:
        assert self.peer is not None
        self._ledger.put(Kind.RESUME, events.claim(self._hello.instance, self.peer.instance, self._attempt))

    def _on_resume(self, frame: Frame) -> Resumed:
        claim = events.read_claim(frame.payload)
        if not self.is_ours(claim):
            raise ProtocolError("RESUME of another conversation")
        if frame.ack < self._ledger.acked:
            raise ProtocolError(f"it has {frame.ack} frames, and had acknowledged {self._ledger.acked}")
        self._on_credit(frame)
        self.state = State.OPEN
        self._ledger.queue.clear()  # sent while away: kept
        if not self._knocked:
            self._attempt = claim.attempt
            self._put_resume()
        self._ledger.replay()
        return Resumed()

    @property
    def received(self) -> int:
        """How many frames of the peer have arrived in order."""
        return self._ledger.received

    # ---- sending

    def prepare(self, name: str, step: int, array: np.ndarray, digest: bytes = b"") -> Outgoing:
        """Checks a tensor; see ``Outbound.prepare``. Touches nothing that changes: needs no lock."""
        return self._outbound.prepare(name, step, array, digest)

    def ready(self, out: Outgoing) -> bool:
        """Whether the next piece of ``out`` may be sent now."""
        if self._ledger.kept_bytes >= self._limits.keep_bytes:
            return False
        return bool(out.offset) or self._outbound.room(out)

    def transmit(self, out: Outgoing) -> None:
        """Queues the next piece of ``out``; ``ready`` must hold.

        Raises:
          ConfigError: The step is not larger than the one before.
        """
        if out.offset == 0:
            self._outbound.begin(out)
        start, end = out.offset, min(out.offset + self._limits.chunk_bytes, out.total)
        self._ledger.put_kept(
            _DATA,
            out.payload[start:end],
            out.code,
            out.shape,
            out.index,
            out.step,
            out.total,
            start,
            b"" if start else out.digest,
        )
        out.offset = end
        if end == out.total:
            self._outbound.end(out)

    def starve(self) -> None:
        """Tells the peer that this side waits for credit; once, until something changes."""
        now = (self._ledger.sent, self._ledger.acked, self._outbound.consumed)
        if now != self._asked:
            self._asked = now
            self._ledger.put(Kind.PING, flags=FLAG_HUNGRY)

    def send_control(self, topic: str, body: Mapping[str, Any]) -> None:
        """Queues a control message.

        Args:
          topic: Its address.
          body: A JSON object.

        Raises:
          ConfigError: It is not JSON or too large.
        """
        where = f"send_control({topic!r})"
        if not isinstance(topic, str) or not 0 < len(topic.encode("utf-8", "replace")) <= self._limits.max_name_bytes:
            raise ConfigError(f"{where}: expected a topic of 1 to {self._limits.max_name_bytes} bytes")
        try:
            text = json.dumps([topic, dict(body)], allow_nan=False).encode()
            read_json(text, "control message")  # what we would refuse we do not say
        except (TypeError, ValueError, RecursionError, ProtocolError) as error:
            raise ConfigError(f"{where}: the body must be a JSON object: {error}") from error
        if len(text) > self._max_control:
            raise ConfigError(
                f"{where}: {len(text)} bytes; max_control_bytes of the two parties is {self._max_control}"
            )
        self._ledger.put_kept(Kind.CONTROL, text)

    def goodbye(self) -> None:
        """Queues this side's goodbye, after everything queued before."""
        if self.state in (State.OPEN, State.AWAY) and not self.said_goodbye:
            self.said_goodbye = True
            self._ledger.put_kept(Kind.BYE)

    def abort(self, error: BaseException, where: str = "", share_text: bool = False) -> None:
        """Drops what is queued and tells the peer that this side failed; the conversation is over.

        The peer learns the type of the error; its text only when it is one of efl's own (other texts may
        quote data).
        """
        if self.state is State.OVER:
            return
        self._ledger.queue.clear()
        self._ledger.put(Kind.ABORT, events.abort(error, where, share_text))
        self.state = State.OVER

    @property
    def flushed(self) -> bool:
        """Whether the peer has acknowledged everything sent."""
        return not self._ledger.kept

    @property
    def kept_bytes(self) -> int:
        """Bytes of frames that wait for an acknowledgement."""
        return self._ledger.kept_bytes

    def newest_step(self, name: str) -> int:
        """The newest step of tensor ``name`` that has begun to arrive, -1 before the first."""
        return self._inbound.step_of(name)

    # ---- time

    def tick(self, now: float) -> str:
        """Sends a heartbeat when one is due.

        Returns:
          Why the connection is to be given up, in words; empty while it is good.
        """
        if self.state is not State.OPEN:
            return ""
        if now - self._heard > self._limits.dead_seconds:
            return f"nothing came for more than dead_seconds={self._limits.dead_seconds:g}"
        if now - self._said >= self._limits.heartbeat_seconds:
            self._ledger.put(Kind.PING)
        return ""

    def alive(self, now: float) -> None:
        """The shell knows that the peer is not silent (its messages wait while a callback runs)."""
        self._heard = now

    def last_heard(self, now: float) -> str:
        """What the peer said last, and how long ago."""
        if self._heard_what is None:
            return "nothing was heard of it"
        kind, tensor, step = self._heard_what
        what = kind.name.lower()
        sends = [t.name for t in self.peer.tensors if t.direction == "send"] if self.peer else []
        if kind is Kind.DATA and tensor < len(sends):
            what = f"tensor {sends[tensor]!r} of step {step}"
        return f"last heard {max(0.0, now - self._heard):.1f} s ago ({what})"

    # ---- bytes in

    def receive(self, frames: list[Frame], now: float) -> list[Event]:
        """Takes the frames of one message.

        Args:
          frames: From ``efl.transport.frame.decode``.
          now: The time, seconds.

        Returns:
          What happened, in order.

        Raises:
          ProtocolError: The peer broke the protocol; it is told, and the conversation is over.
        """
        self._heard, self._fed = now, False
        happened: list[Event] = []
        try:
            for frame in frames:
                event: Event | None
                if frame.kind is _DATA and self.state is _OPEN:
                    event = self._on_data(frame)
                elif self.state is not State.OVER:
                    event = self._handle(frame)
                else:
                    break
                self._heard_what = (frame.kind, frame.tensor, frame.step)
                if event is not None:
                    happened.append(event)
        except ProtocolError as error:
            raise self.reject(error) from None
        return happened

    def reject(self, error: ProtocolError) -> ProtocolError:
        """The peer broke the protocol: tells it, ends the conversation, returns the error with its name."""
        named = ProtocolError(f"{self.peer_label} broke the protocol: {error}")
        self.abort(ProtocolError(f"the {self._hello.role} refuses what it received: {error}"))
        return named

    def _handle(self, frame: Frame) -> Event | None:
        kind = frame.kind
        if kind is Kind.ABORT:
            aborted = events.read_abort(frame.payload)
            self.state = State.OVER
            return aborted
        if kind is Kind.REFUSE:
            return self._on_refuse(frame)
        if self.state is State.AWAY:
            if kind is not Kind.RESUME:
                raise ProtocolError(f"expected RESUME, got {kind.name}")
            return self._on_resume(frame)
        if self.state is State.HELLO:
            return self._on_hello(frame)
        if kind in _WORDLESS and frame.payload:
            raise ProtocolError(f"{kind.name} with a payload of {len(frame.payload)} bytes")
        if self.state is State.AGREED:
            if kind is not Kind.ACCEPT:
                raise ProtocolError(f"{kind.name} before both sides have accepted")
            self.state = State.OPEN
            assert self.peer is not None
            return Accepted(self.peer)
        self._on_credit(frame)
        if kind in (Kind.PING, Kind.ACK):
            if frame.flags & FLAG_HUNGRY and not self._fed:
                self._fed = True  # one answer to a message, however often it asks
                self._peer_hungry = self._inbound.consumed < self._inbound.messages
                self._ledger.put(Kind.ACK)
            return None
        if kind not in (Kind.CONTROL, Kind.BYE):
            raise ProtocolError(f"{kind.name} in the middle of the conversation")
        if not self._ledger.in_sequence(frame):
            return None
        if self.peer_goodbye:
            raise ProtocolError(f"{kind.name} after goodbye")
        return self._on_sequenced(frame)

    def _on_data(self, frame: Frame) -> Message | None:
        self._on_credit(frame)
        ledger = self._ledger
        if not ledger.in_sequence(frame):
            return None
        if self.peer_goodbye:
            raise ProtocolError("DATA after goodbye")
        message = self._inbound.accept(frame)
        ledger.unannounced += len(frame.payload)
        if ledger.unannounced >= self._ack_bytes:
            ledger.put(Kind.ACK)
        return message

    def _on_sequenced(self, frame: Frame) -> Event:
        if frame.kind is Kind.CONTROL:
            if len(frame.payload) > self._limits.max_control_bytes:
                raise ProtocolError(
                    f"a control message of {len(frame.payload)} bytes; at most {self._limits.max_control_bytes}"
                )
            body = read_json(frame.payload, "control message")
            if not (
                isinstance(body, list) and len(body) == 2 and isinstance(body[0], str) and isinstance(body[1], dict)
            ):
                raise ProtocolError("malformed control message")
            if not 0 < len(body[0].encode("utf-8", "replace")) <= self._limits.max_name_bytes:
                raise ProtocolError(f"a control topic of {len(body[0])} characters")
            self._ledger.unannounced += len(frame.payload)
            if self._ledger.unannounced >= self._ack_bytes:
                self._ledger.put(Kind.ACK)
            return Control(body[0], body[1], len(frame.payload))
        self.peer_goodbye = True
        self._ledger.put(Kind.ACK)  # so that the peer knows at once that all has arrived
        return Goodbye()

    def _on_refuse(self, frame: Frame) -> Refused:
        if self.state not in (State.HELLO, State.AGREED):
            raise ProtocolError("REFUSE in the middle of the conversation")
        refused = events.read_refusal(frame.payload)
        self.state = State.OVER
        return refused

    def _on_hello(self, frame: Frame) -> Event | None:
        if frame.kind is not Kind.HELLO:
            raise ProtocolError(f"expected a hello first, got {frame.kind.name}")
        peer, shared = handshake.parse(frame.payload, self._limits)
        self.peer = peer
        reasons = handshake.disagreements(self._hello, peer) or self._judge(peer)
        if reasons:
            self._ledger.put(Kind.REFUSE, json.dumps({"reasons": reasons}).encode())
            self.state = State.OVER
            return Refused(tuple(reasons))
        self._agree(peer, shared)
        self._ledger.put(Kind.ACCEPT)
        self.state = State.AGREED
        return None

    def _agree(self, peer: Hello, shared: dict[str, int]) -> None:
        mine = self._limits
        smaller = {name: min(getattr(mine, name), value) for name, value in shared.items()}
        self._inbound = self._ledger.inbound = Inbound(_agreed(peer, self._hello), mine)
        self._outbound = Outbound(
            _agreed(self._hello, peer),
            smaller["window_steps"],
            smaller["max_outstanding_bytes"],
            smaller["max_message_bytes"],
        )
        self._max_control = smaller["max_control_bytes"]
        # Announce often enough that a sender's kept frames stay few, seldom enough that a message that is
        # answered (a training step) costs no frame of its own.
        self._ack_bytes = max(1, min(4 * MIB, smaller["max_outstanding_bytes"] // 4))
        self._ack_messages = max(1, smaller["window_steps"] * max(1, self._inbound.window // mine.window_steps) // 2)

    # ---- acknowledgement and credit

    def _on_credit(self, frame: Frame) -> None:
        self._ledger.acknowledge(frame.ack)
        out = self._outbound
        if frame.consumed > out.messages or frame.consumed_bytes > out.bytes:
            raise ProtocolError(
                f"it has consumed {frame.consumed} tensors of {frame.consumed_bytes} bytes; "
                f"only {out.messages} of {out.bytes} bytes were sent"
            )
        if frame.consumed > out.consumed:
            out.consumed, out.consumed_bytes = frame.consumed, max(out.consumed_bytes, frame.consumed_bytes)

    def consumed(self, nbytes: int) -> None:
        """This party has taken a message of ``Message.nbytes``: the peer may send another."""
        inbound = self._inbound
        inbound.consumed += 1
        inbound.consumed_bytes += nbytes
        due = self._peer_hungry or inbound.consumed - self._ledger.announced >= self._ack_messages
        if due and self.state is _OPEN:
            self._ledger.put(Kind.ACK)
            self._peer_hungry = self._peer_hungry and self._inbound.consumed < self._inbound.messages


def _agreed(sender: Hello, receiver: Hello) -> list[TensorSpec]:
    shapes = {t.name: t.shape for t in receiver.tensors if t.direction == "recv"}
    return [
        replace(t, shape=handshake.merged_shape(t.shape, shapes[t.name]))
        for t in sender.tensors
        if t.direction == "send"
    ]
