"""What is fuzzed: each target takes any bytes, and raises where a promise is broken.

The promise: whatever a peer sends, nothing but ``ProtocolError`` is raised, what is kept is within the bounds, and
what is said in return can be read by a peer. No atheris in here, so that tests can run the targets as well.
"""

from __future__ import annotations

import contextlib
import json
import math
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import xxhash

from efl._agreement import Facts
from efl._steps.exchange import Exchange
from efl.errors import DataError, EflError, ProtocolError
from efl.transport import codec, events, frame, handshake
from efl.transport.frame import Frame, Kind
from efl.transport.handshake import Hello, TensorSpec
from efl.transport.inbound import Message
from efl.transport.limits import Limits
from efl.transport.link import Link, State
from efl.transport.said import read_json

LIMITS = Limits(window_steps=3, max_outstanding_bytes=4096, max_message_bytes=1 << 16, chunk_bytes=64)
TENSORS = (
    TensorSpec("a", "float32", None, "send"),
    TensorSpec("a", "float32", None, "recv"),
    TensorSpec("b", "bool", (None, 2), "recv"),
    TensorSpec("s", "string", None, "recv"),
)
HELLO = Hello("leader", TENSORS, {"batch": 4, "name": "é"}, {"run": "x"}, instance="1" * 32)
_OTHER = {"send": "recv", "recv": "send"}
PEER = Hello(
    "follower",
    tuple(TensorSpec(t.name, t.dtype, t.shape, _OTHER[t.direction]) for t in TENSORS),  # type: ignore[arg-type]  # a str
    HELLO.terms,
    instance="2" * 32,
)


class Choices:
    """Bytes as a source of choices; when they run out, zeros."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def left(self) -> bool:
        """Whether there are any."""
        return self._at < len(self._data)

    def number(self, size: int) -> int:
        """An unsigned number of ``size`` bytes."""
        return int.from_bytes(self.raw(size), "little")

    def raw(self, size: int) -> bytes:
        """Up to ``size`` bytes."""
        piece = self._data[self._at : self._at + size]
        self._at += size
        return piece


_ODD_JSON: tuple[Any, ...] = (
    None, True, 0, -1, 1, 2, 1 << 31, 1 << 62, 1 << 64, -(1 << 70), 10**400, 0.5, 1e308, "", "a", "train", "\ud800",
    "\x1b[2J", "é" * 300, "x" * 5000, [], {}, [[]], {"": {}}, ["a", 1], [0] * 40, {"scope": "train", "step": 2},
)  # fmt: skip


def _mutated(value: Any, choices: Choices) -> Any:
    """A JSON value of which a part, somewhere, is another, is missing or is there twice."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    which = choices.number(1)
    if not keys or which > 230:
        return _ODD_JSON[choices.number(1) % len(_ODD_JSON)] if which % 3 else choices.raw(which % 32).decode("latin-1")
    key = list(keys)[which % len(keys)]
    changed: Any = dict(value) if isinstance(value, dict) else list(value)
    if which > 220:
        del changed[key]
    elif which > 210 and isinstance(changed, list) and len(changed) < 5000:
        changed *= 2
    else:
        changed[key] = _mutated(value[key], choices)
    return changed


def _with_checksums(data: bytes) -> bytes:
    """The bytes as frames whose checksums are right, as far as their lengths can be believed."""
    out, at = bytearray(data), 0
    while len(out) - at >= frame.HEADER_BYTES:
        out[at + 8 : at + 12] = struct.pack("<I", 0x314C4645)
        length, flags, ndim = struct.unpack_from("<I", out, at + 20)[0], out[at + 13], out[at + 15]
        used = frame.HEADER_BYTES + 8 * ndim + (flags & 1) * 16
        end = at + used + (16 - used) % 64 + length + -length % 16
        if end > len(out):
            break
        out[at : at + 8] = xxhash.xxh3_64_digest(bytes(out[at + 8 : end]))[::-1]
        at = end
    return bytes(out)


def decode(data: bytes) -> None:
    """``frame.decode``, of bytes as they are and of frames whose checksums are right."""
    for message in (data, _with_checksums(data)):
        try:
            frames = frame.decode(message)
        except frame.DamagedFrame:
            continue
        assert 0 < len(frames) <= frame.MAX_FRAMES
        assert sum(len(f.payload) for f in frames) <= len(message)
        for one in frames:
            fields = {name: value for name, value in one._asdict().items() if name != "payload"}
            again = frame.decode(frame.encode(payload=one.payload, **fields))
            assert again == [one]


def hello(data: bytes) -> None:
    """``handshake.parse``, of bytes as they are."""
    _hello(data)


def hello_parts(data: bytes) -> None:
    """``handshake.parse``, of a hello of which some parts are something else."""
    choices = Choices(data)
    body = json.loads(handshake.to_bytes((HELLO, PEER)[choices.number(1) % 2], LIMITS))
    while choices.left():
        body = _mutated(body, choices)
    _hello(json.dumps(body).encode())


def _hello(data: bytes) -> None:
    try:
        peer, shared = handshake.parse(data, LIMITS)
    except ProtocolError as error:
        str(error).encode()
        return
    assert all(value > 0 for value in shared.values())
    for mine in (HELLO, PEER):
        reasons = handshake.disagreements(mine, peer)
        refused = events.read_refusal(frame.decode(events.refusal(reasons))[0].payload)
        assert len(refused.reasons) == len(reasons)
        assert sum(map(len, reasons)) < 1 << 20
        "".join(reasons).encode()
        if not reasons:
            link = Link(mine, LIMITS, 0.0)
            link.receive(frame.decode(frame.encode(Kind.HELLO, data)), 0.0)
            assert link.state is State.AGREED
    Link(HELLO, LIMITS, 0.0).is_ours(events.Claim(peer.instance, HELLO.instance, 1))


def tensor(data: bytes) -> None:
    """``codec.decode``, of what ``payload_bytes`` lets through, as ``Inbound`` does."""
    choices = Choices(data)
    code = sorted(codec._NAMES)[choices.number(1) % len(codec._NAMES)]
    dims = []
    for _ in range(choices.number(1) % 5):
        wide = choices.number(1)
        dims.append(choices.number(8) >> 1 if wide > 250 else wide % 8)
    shape, payload = tuple(dims), choices.raw(1 << 16)
    least, most = codec.payload_bytes(code, shape)
    if not least <= len(payload) <= (len(payload) if most is None else most):
        return
    try:
        array = codec.decode(code, shape, memoryview(payload))
    except ProtocolError:
        return
    assert array.shape == shape
    back = codec.encode(array)
    assert bytes(back.payload) == payload


def claims(data: bytes) -> None:
    """Everything else that is read of a peer before or after a conversation."""
    for read in (
        events.read_claim,
        events.read_refusal,
        events.read_abort,
        lambda d: events.read_first(frame.encode(Kind.RESUME, d), LIMITS),
        lambda d: events.read_first(_with_checksums(d), LIMITS),
    ):
        try:
            told: Any = read(data)
        except ProtocolError as error:
            str(error).encode()
            continue
        repr(told).encode()
        if isinstance(told, events.Claim):
            Link(HELLO, LIMITS, 0.0).is_ours(told)
        elif isinstance(told, events.Refused):
            assert all(len(reason) <= 4000 for reason in told.reasons)
        elif isinstance(told, events.Aborted):
            assert len(told.error_type) <= 100
            assert all(c.isprintable() or c in "\n\t" for c in told.error_type + told.text + told.where)


def _carry(sender: Link, receiver: Link) -> None:
    message = b"".join(sender.take(0.0))
    if message:
        receiver.receive(frame.decode(message), 0.0)


def _link_in(state: int) -> tuple[Link, Link]:
    mine, peer = Link(HELLO, LIMITS, 0.0), Link(PEER, LIMITS, 0.0)
    if state == 0:
        mine.take(0.0)
        return mine, peer
    _carry(peer, mine)
    if state == 1:
        mine.take(0.0)
        return mine, peer
    for _ in range(2):
        _carry(mine, peer)
        _carry(peer, mine)
    for step, one in enumerate((np.arange(4, dtype=np.float32), np.arange(40, dtype=np.float32))):
        out = mine.prepare("a", step, one)
        while not out.done and mine.ready(out):
            mine.transmit(out)
    if state == 3:
        mine.lost()
    elif state == 4:
        mine.lost()
        mine.knock()
    elif state == 5:
        mine.goodbye()
    return mine, peer


def _payloads(mine: Link) -> list[bytes]:
    return [
        b"",
        np.arange(4, dtype=np.float32).tobytes(),
        struct.pack("<2I", 1, 2) + b"abc",
        handshake.to_bytes(PEER, LIMITS),
        events.claim(PEER.instance, HELLO.instance, 1 + mine._attempt),
        b'["topic", {"x": 1}]',
        events.abort(DataError("x"), "step 3", False),
        b'{"busy": true, "reasons": ["x"]}',
    ]


_ODD = (0, 1, 2, 255, 1 << 20, 1 << 31, 1 << 40, 1 << 62, (1 << 63) + 5, (1 << 64) - 1)


def _frame(choices: Choices, mine: Link) -> bytes:
    """A frame as the peer might send it now, of which some fields are something else."""
    ledger, inbound = mine._ledger, mine._inbound
    kind = list(Kind)[choices.number(1) % len(Kind)]
    payloads = _payloads(mine)
    chosen = choices.number(1) % (len(payloads) + 1)
    payload = choices.raw(choices.number(2) % 1024) if chosen == len(payloads) else payloads[chosen]
    place = choices.number(1) % 3
    fields: dict[str, Any] = {
        "seq": ledger.received + 1 if kind in (Kind.DATA, Kind.CONTROL, Kind.BYE) else 0,
        "ack": ledger.acked,
        "tensor": place,
        "step": (inbound._last_step[place] + 1) if place < len(inbound._last_step) else 0,
        "dtype": (11, 1, codec.STRING)[place],
        "shape": (((len(payload) // 4),), (len(payload) // 2, 2), (2,))[place],
        "total": len(payload),
    }
    if place in inbound._partial:
        first = inbound._partial[place].first
        fields.update(step=first.step, dtype=first.dtype, shape=first.shape, total=first.total)
        fields["offset"] = inbound._partial[place].filled
    names = ("seq", "ack", "consumed", "consumed_bytes", "dtype", "tensor", "step", "total", "offset")
    for _ in range(choices.number(1) % 4):
        what = choices.number(1) % (len(names) + 3)
        odd = choices.number(1)
        value = _ODD[odd % len(_ODD)] if odd < 128 else choices.number(2)
        if what < len(names):
            fields[names[what]] = value % {"dtype": 256, "tensor": 1 << 32}.get(names[what], 1 << 64)
        elif what == len(names):
            fields["shape"] = tuple((value >> n) - (n == 1) for n in range(odd % 4) if value < 1 << 63)
        elif what == len(names) + 1:
            fields["flags"] = value % 4 & frame.FLAG_HUNGRY
        else:
            fields["digest"] = bytes(16)
    return frame.encode(kind, payload, **fields)


def _check_bounds(mine: Link, held: list[Message]) -> None:
    inbound = mine._inbound
    waiting = inbound.messages - inbound.consumed
    assert 0 <= waiting <= inbound.window
    size = inbound.bytes - inbound.consumed_bytes
    assert waiting <= 1 or size <= LIMITS.max_outstanding_bytes
    assert size <= LIMITS.max_message_bytes
    for message in held:
        base = message.array.base
        whole = len(base) if isinstance(base, bytes) else 0
        assert whole <= 2 * message.nbytes + 1024, "a small tensor keeps a large message alive"
    assert len(mine._ledger.queue) < 500


def link(data: bytes) -> None:
    """``Link.receive``, in every state, of frames that are nearly what the peer would send."""
    choices = Choices(data)
    mine, _ = _link_in(choices.number(1) % 6)
    held: list[Message] = []
    for _ in range(30):
        if not choices.left():
            break
        action = choices.number(1) % 16
        if action == 0:
            mine.lost()
        elif action == 1 and held:
            mine.consumed(held.pop().nbytes)
        elif action == 2:
            mine.tick(1.5)
        elif action == 3 and mine.state is State.AWAY:
            mine.knock()
        elif action == 4:
            mine.goodbye()
        elif action == 5:
            frame.decode(b"".join(mine.take(0.0)) or frame.encode(Kind.PING))
        else:
            frames: list[Frame] = []
            for _ in range(1 + action % 3):
                frames += frame.decode(_frame(choices, mine))
            over = mine.state is State.OVER
            try:
                happened = mine.receive(frames, 0.0)
            except ProtocolError as error:
                assert mine.state is State.OVER and not over
                str(error).encode()
                (last,) = frame.decode(mine.take(0.0)[-1])
                assert events.read_abort(last.payload).error_type == "ProtocolError"
                return
            assert not (over and happened)
            for event in happened:
                repr(event).encode()
                if isinstance(event, Message):
                    assert event.array.size == math.prod(event.array.shape)
                    held.append(event)
        mine.last_heard(1.0)
        _check_bounds(mine, held)


_STEP = {"scope": "train", "step": 1}
CONTROLS: list[list[Any]] = [
    ["end", {**_STEP, "reason": "end of data"}],
    ["mark", {**_STEP, "mark": "save"}],
    ["mark", {**_STEP, "mark": "last"}],
    ["part", {}],
    ["stage", {"number": 0, "what": "train 10"}],
    ["saved", {"position": [10, 0, 10, 10], "lineage": "ab"}],
    ["rows", {**_STEP, "size": 2, "rows": "AAAAAAAAAAA="}],
    [
        "facts",
        {
            "checkpoints": [[[10, 0, 10, 10], "ab"]],
            "save_steps": 3,
            "steps_trained": 10,
            "warm": False,
            "inputs": {"train": True},
            "run": "ab",
            "seed": 5,
        },
    ],
]


class _Channel:
    """As much of a channel as an exchange needs."""

    away = False

    def __init__(self) -> None:
        self.callbacks: dict[str, Callable[[dict[str, Any]], None]] = {}

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments, **more: None

    def on_control(self, topic: str, callback: Callable[[dict[str, Any]], None]) -> None:
        """See ``Channel``."""
        self.callbacks[topic] = callback


def controls(data: bytes) -> None:
    """The control messages of the steps, of which some parts are something else; and the facts of a hello."""
    choices = Choices(data)
    listed = []
    for _ in range(20):
        if choices.left():
            entry = CONTROLS[choices.number(1) % len(CONTROLS)]
            for _ in range(choices.number(1) % 4):
                entry = [entry[0], _mutated(entry[1], choices)]
            with contextlib.suppress(ProtocolError):
                listed.append(read_json(json.dumps(entry).encode(), "control message"))
    exchange, channel = Exchange("leader", "follower"), _Channel()
    scope = exchange.scope("train")
    exchange.attach(channel)  # type: ignore[arg-type]  # as much of one as it uses
    for topic, body in listed:
        if not isinstance(body, dict):
            continue
        if topic == "facts":
            try:
                Facts.parse(body, "follower")
            except EflError:
                continue
        else:
            channel.callbacks[topic](body)
    held = [scope.peer_ends, scope.marks, scope.held, scope.ahead, exchange._stages._own, exchange._stages._peers]
    assert sum(map(len, held)) <= 2100


TARGETS: dict[str, Callable[[bytes], None]] = {
    "decode": decode,
    "hello": hello,
    "hello_parts": hello_parts,
    "tensor": tensor,
    "claims": claims,
    "link": link,
    "controls": controls,
}
