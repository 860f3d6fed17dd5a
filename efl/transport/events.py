"""What a link tells its shell, and what happens before there is a link."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from efl.errors import EflError, ProtocolError
from efl.transport import frame as wire
from efl.transport import handshake
from efl.transport.frame import Kind
from efl.transport.handshake import Hello
from efl.transport.inbound import Message
from efl.transport.limits import Limits
from efl.transport.said import MAX_TEXT, encodable, plain, read_json

_MAX_REFUSAL_BYTES = 8 << 20
_MAX_REASONS = 10_000
_MAX_ABORT_BYTES = 1 << 16


@dataclass(frozen=True)
class Accepted:
    """Both sides agree; tensors may travel."""

    peer: Hello


@dataclass(frozen=True)
class Refused:
    """The parties disagree (``reasons``), the peer is busy with another conversation, or does not know ours."""

    reasons: tuple[str, ...]
    busy: bool = False
    unknown: bool = False


@dataclass(frozen=True)
class Resumed:
    """The conversation goes on, on another connection."""


@dataclass(frozen=True)
class Control:
    """A control message of the peer."""

    topic: str
    body: dict[str, Any]
    size: int = field(default=0, compare=False)  # bytes on the wire


@dataclass(frozen=True)
class Goodbye:
    """The peer will send nothing more."""


@dataclass(frozen=True)
class Aborted:
    """The peer's program failed. ``text`` is empty unless the error was one of efl's own, or the peer shares all."""

    error_type: str
    text: str
    where: str = ""


Event = Accepted | Refused | Resumed | Message | Control | Goodbye | Aborted


@dataclass(frozen=True)
class Claim:
    """What a party says that wants to go on with a conversation: who it is, whom it was talking to, which attempt."""

    instance: str
    peer: str
    attempt: int


def claim(instance: str, peer: str, attempt: int) -> bytes:
    """The payload of a RESUME frame."""
    return json.dumps([instance, peer, attempt]).encode()


def read_claim(payload: bytes | memoryview) -> Claim:
    """Reads the payload of a RESUME frame.

    Raises:
      ProtocolError: It is malformed.
    """
    if len(payload) > 1000:
        raise ProtocolError(f"a claim of {len(payload)} bytes")
    body = read_json(payload, "claim")
    if not (isinstance(body, list) and len(body) == 3 and all(isinstance(name, str) for name in body[:2])):
        raise ProtocolError("malformed claim to a conversation")
    if type(body[2]) is not int or not 0 < body[2] < 1 << 62:
        raise ProtocolError("malformed number in a claim to a conversation")
    return Claim(*body)


def refusal(reasons: list[str], busy: bool = False, unknown: bool = False) -> bytes:
    """A frame that ends a connection before any conversation: "busy", "that was no hello", "I do not know you"."""
    return wire.encode(Kind.REFUSE, json.dumps({"busy": busy, "unknown": unknown, "reasons": reasons}).encode())


def read_refusal(payload: bytes | memoryview) -> Refused:
    """Reads the payload of a REFUSE frame.

    Raises:
      ProtocolError: It is malformed.
    """
    if len(payload) > _MAX_REFUSAL_BYTES:
        raise ProtocolError(f"a refusal of {len(payload)} bytes")
    body = read_json(payload, "refusal")
    reasons = body.get("reasons") if isinstance(body, dict) else None
    if not isinstance(reasons, list):
        raise ProtocolError("malformed refusal")
    told = tuple(plain(str(reason)) for reason in reasons[:_MAX_REASONS])
    return Refused(told, body.get("busy") is True, unknown=body.get("unknown") is True)


def abort(error: BaseException, where: str, share_text: bool) -> bytes:
    """The payload of an ABORT frame: the type of the error, and its text when it is one of efl's own or shared."""
    text = encodable(str(error)[:MAX_TEXT]) if share_text or isinstance(error, EflError) else ""
    body = {"type": encodable(type(error).__name__[:100]), "text": text, "where": encodable(where[:200])}
    return json.dumps(body).encode()


def read_abort(payload: bytes | memoryview) -> Aborted:
    """Reads the payload of an ABORT frame.

    Raises:
      ProtocolError: It is malformed.
    """
    if len(payload) > _MAX_ABORT_BYTES:
        raise ProtocolError(f"a message of failure of {len(payload)} bytes")
    body = read_json(payload, "message of failure")
    body = body if isinstance(body, dict) else {}
    kind, text, where = (str(body.get(key, "")) for key in ("type", "text", "where"))
    return Aborted(plain(kind, 100) or "an error", plain(text), plain(where, 200))


def read_first(message: bytes, limits: Limits) -> Hello | Claim:
    """The hello or the claim that a new connection must open with.

    Raises:
      ProtocolError: It opens with something else.
    """
    frame = wire.decode(message)[0]
    if frame.kind is Kind.RESUME:
        return read_claim(frame.payload)
    if frame.kind is not Kind.HELLO:
        raise ProtocolError(f"expected a hello first, got {frame.kind.name}")
    return handshake.parse(frame.payload, limits)[0]
