"""Frames on their way out: their sequence numbers, and what is kept until the peer has acknowledged it.

Pure: no sockets, threads or clocks.
"""

from __future__ import annotations

import collections
from typing import Any

from efl.errors import ProtocolError
from efl.transport import frame as wire
from efl.transport.frame import Frame, Kind
from efl.transport.inbound import Inbound


class Ledger:
    """Numbers, stamps, queues and keeps frames.

    Every frame says how far this side has received and consumed what the peer sent, so that most acknowledgements cost
    nothing.

    Attributes:
      inbound: The receiving half, whose counters are announced.
      queue: Frames to send now.
      kept: (sequence number, size, frame) of what the peer has not acknowledged.
      kept_bytes: Their bytes.
      sent: The highest sequence number sent.
      received: The highest sequence number received in order.
      acked: The highest sequence number that the peer has acknowledged.
      unannounced: Payload bytes received since the peer was last told.
      announced: Messages consumed as the peer was last told.
    """

    def __init__(self, inbound: Inbound) -> None:
        self.inbound = inbound
        self.queue: list[bytes] = []
        self.kept: collections.deque[tuple[int, int, bytes]] = collections.deque()
        self.kept_bytes = self.sent = self.received = self.acked = self.unannounced = self.announced = 0

    def put(self, kind: Kind, payload: bytes | memoryview = b"", flags: int = 0) -> None:
        """Queues a frame that carries no sequence number."""
        inbound = self.inbound
        self.unannounced, self.announced = 0, inbound.consumed
        self.queue.append(wire.encode(kind, payload, flags, 0, self.received, inbound.consumed, inbound.consumed_bytes))

    def put_kept(self, kind: Kind, payload: bytes | memoryview = b"", *place: Any) -> None:
        """Queues a frame with a sequence number and keeps it; ``place`` is what only DATA frames have."""
        self.sent += 1
        inbound = self.inbound
        self.unannounced, self.announced = 0, inbound.consumed
        data = wire.encode(kind, payload, 0, self.sent, self.received, inbound.consumed, inbound.consumed_bytes, *place)
        self.kept.append((self.sent, len(data), data))
        self.kept_bytes += len(data)
        self.queue.append(data)

    def acknowledge(self, number: int) -> None:
        """The peer has received everything up to ``number``: forgets it.

        Raises:
          ProtocolError: So much was never sent.
        """
        if number > self.sent:
            raise ProtocolError(f"it acknowledges {number} frames; only {self.sent} were sent")
        if number > self.acked:
            self.acked = number
            while self.kept and self.kept[0][0] <= number:
                self.kept_bytes -= self.kept.popleft()[1]

    def replay(self) -> None:
        """Queues again what the peer has not acknowledged, on a new connection."""
        self.queue.extend(data for _, _, data in self.kept)

    def in_sequence(self, frame: Frame) -> bool:
        """Counts the next frame of the peer. False for one that has been taken before (a replay).

        Raises:
          ProtocolError: Frames are missing.
        """
        if frame.seq <= self.received:
            return False
        if frame.seq != self.received + 1:
            raise ProtocolError(f"expected sequence number {self.received + 1}, got {frame.seq}")
        self.received = frame.seq
        return True
