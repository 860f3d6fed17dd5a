"""Counters of a channel."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stats:
    """Counters of one channel.

    Attributes:
      messages_sent: Tensors and control messages sent.
      messages_received: The same, received.
      bytes_sent: Bytes of all frames sent.
      bytes_received: Bytes of all frames received.
      frames_sent: Frames sent, of any kind.
      frames_received: Frames received, of any kind.
    """

    messages_sent: int = 0
    messages_received: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    frames_sent: int = 0
    frames_received: int = 0
