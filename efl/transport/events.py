"""What a link tells its shell, and what happens before there is a link."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from efl.errors import ProtocolError
from efl.transport import frame as wire
from efl.transport import handshake
from efl.transport.frame import Kind
from efl.transport.handshake import Hello
from efl.transport.inbound import Message
from efl.transport.limits import Limits


@dataclass(frozen=True)
class Accepted:
    """Both sides agree; tensors may travel."""

    peer: Hello


@dataclass(frozen=True)
class Refused:
    """The parties disagree (``reasons``), or the peer is busy with another conversation."""

    reasons: tuple[str, ...]
    busy: bool = False


@dataclass(frozen=True)
class Control:
    """A control message of the peer."""

    topic: str
    body: dict[str, Any]


@dataclass(frozen=True)
class Goodbye:
    """The peer will send nothing more."""


@dataclass(frozen=True)
class Aborted:
    """The peer's program failed. ``text`` is empty unless the error was one of efl's own."""

    error_type: str
    text: str


Event = Accepted | Refused | Message | Control | Goodbye | Aborted


def refusal(reasons: list[str], busy: bool = False) -> bytes:
    """A frame that ends a connection before any conversation: "busy", or "that was no hello"."""
    return wire.encode(Kind.REFUSE, json.dumps({"busy": busy, "reasons": reasons}).encode())


def read_first(message: bytes, limits: Limits) -> Hello:
    """The hello that a new connection must open with.

    Raises:
      ProtocolError: It opens with something else.
    """
    frames = wire.decode(message)
    if frames[0].kind is not Kind.HELLO:
        raise ProtocolError(f"expected a hello first, got {frames[0].kind.name}")
    return handshake.parse(frames[0].payload, limits)[0]
