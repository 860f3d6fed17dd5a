"""Frame <-> bytes. A gRPC message is one frame or several, one after the other.

A frame is a fixed header of 80 bytes, an optional 16-byte digest, the shape (8 bytes a dimension), padding,
the payload, padding. All numbers are little-endian. The first eight bytes are xxh3_64 over everything that
follows in the frame, so that a frame that was cut, mixed up or altered by accident is noticed before any of
it is believed. (It is no protection against a peer who lies: what a frame claims is checked by
``efl.transport.inbound``.)

Headers end 16 bytes after a multiple of 64 because CPython's ``bytes`` start their data 32 bytes into a
block that the allocator, for large blocks, places 16 bytes into a page: so the payload of a large message
lies on a 64-byte boundary, without a copy.
"""

from __future__ import annotations

import enum
import struct
from typing import NamedTuple

import xxhash

from efl.errors import ProtocolError

PROTOCOL_VERSION = 1
MAX_NDIM = 32
MAX_FRAMES = 4096  # in one message; parties join frames up to 64 KiB
DIGEST_BYTES = 16

_MAGIC = 0x314C4645  # "EFL1"
# checksum | magic kind flags dtype ndim | tensor length | seq ack consumed consumed_bytes step total offset
_HEADER = struct.Struct("<QIBBBBIIQQQQQQQ")
_AFTER_CHECKSUM = struct.Struct("<IBBBBIIQQQQQQQ")
_CHECKSUM = struct.Struct("<Q")
HEADER_BYTES = _HEADER.size
_ZEROS = bytes(64)
_new = tuple.__new__  # a third of the time of a named tuple's own constructor
_SHAPES = [struct.Struct(f"<{n}q") for n in range(MAX_NDIM + 1)]


class DamagedFrame(ProtocolError):
    """The bytes are not what an efl party sent: a fault of the line, unless it happens again and again."""


class Kind(enum.IntEnum):
    """What a frame is for. DATA, CONTROL and BYE carry sequence numbers; the others do not."""

    HELLO = 1
    ACCEPT = 2
    REFUSE = 3
    DATA = 4
    CONTROL = 5
    ACK = 6
    PING = 7
    BYE = 8
    ABORT = 9
    RESUME = 10


_KINDS = {int(kind): kind for kind in Kind}
FLAG_DIGEST = 1  # a 16-byte digest follows the header
FLAG_HUNGRY = 2  # the sender waits for credit: tell it at once what has been consumed
_KNOWN_FLAGS = FLAG_DIGEST | FLAG_HUNGRY


class Frame(NamedTuple):
    """One decoded frame. ``payload`` is a view into the received bytes."""

    kind: Kind
    flags: int
    dtype: int
    shape: tuple[int, ...]
    tensor: int
    seq: int
    ack: int
    consumed: int
    consumed_bytes: int
    step: int
    total: int
    offset: int
    digest: bytes
    payload: memoryview


def encode(
    kind: Kind,
    payload: bytes | memoryview = b"",
    flags: int = 0,
    seq: int = 0,
    ack: int = 0,
    consumed: int = 0,
    consumed_bytes: int = 0,
    dtype: int = 0,
    shape: tuple[int, ...] = (),
    tensor: int = 0,
    step: int = 0,
    total: int = 0,
    offset: int = 0,
    digest: bytes = b"",
) -> bytes:
    """Builds the bytes of one frame; the payload is copied once.

    Args:
      kind: What the frame is for.
      payload: Contiguous bytes.
      flags: ``FLAG_HUNGRY`` or 0; ``FLAG_DIGEST`` is set by itself.
      seq: Sequence number of the frame, 0 for kinds that have none.
      ack: Highest sequence number received in order.
      consumed: Tensor messages of the peer that have been consumed so far.
      consumed_bytes: Their bytes.
      dtype: Code of the tensor's dtype.
      shape: The tensor's shape.
      tensor: The tensor's place in the sender's hello.
      step: The message's step.
      total: Bytes of the whole tensor.
      offset: Where in the tensor the payload belongs.
      digest: Empty, or 16 bytes that travel beside the tensor.

    Returns:
      The frame; its length is a multiple of 16.
    """
    extras = _SHAPES[len(shape)].pack(*shape)
    if digest:
        flags |= FLAG_DIGEST
        extras = digest + extras
    size = len(payload)
    fixed = _AFTER_CHECKSUM.pack(
        _MAGIC, kind, flags, dtype, len(shape), tensor, size, seq, ack, consumed, consumed_bytes, step, total, offset
    )
    head = fixed + extras + _ZEROS[: (16 - HEADER_BYTES - len(extras)) % 64]
    checksum = xxhash.xxh3_64(head)
    checksum.update(payload)
    if size % 16:
        tail = _ZEROS[: -size % 16]
        checksum.update(tail)
        return b"".join((_CHECKSUM.pack(checksum.intdigest()), head, payload, tail))
    return b"".join((_CHECKSUM.pack(checksum.intdigest()), head, payload))


def decode(message: bytes) -> list[Frame]:
    """Takes a gRPC message apart. Nothing is copied and nothing is allocated but the frames' small headers.

    Args:
      message: What arrived.

    Returns:
      The frames in order, at least one.

    Raises:
      DamagedFrame: The bytes are not a sequence of whole, undamaged frames.
    """
    view = memoryview(message)
    size = len(view)
    frames: list[Frame] = []
    at = 0
    while at < size or not frames:
        if len(frames) >= MAX_FRAMES:  # each costs many times its size in Python objects
            raise DamagedFrame(f"a message of more than {MAX_FRAMES} frames")
        if size - at < HEADER_BYTES:
            raise DamagedFrame(f"a frame header takes {HEADER_BYTES} bytes, {size - at} are left in the message")
        (checksum, magic, kind, flags, dtype, ndim, tensor, length,
         seq, ack, consumed, consumed_bytes, step, total, offset) = _HEADER.unpack_from(view, at)  # fmt: skip
        if magic != _MAGIC:
            raise DamagedFrame(f"expected an efl frame (magic {_MAGIC:#x}), got {magic:#x}: is the peer an efl party?")
        if kind not in _KINDS or flags & ~_KNOWN_FLAGS or ndim > MAX_NDIM:
            raise DamagedFrame(f"frame of unknown form: kind {kind}, flags {flags:#x}, {ndim} dimensions")
        used = HEADER_BYTES + 8 * ndim + (flags & FLAG_DIGEST) * DIGEST_BYTES
        body = at + used + (16 - used) % 64
        end = body + length + -length % 16
        if end > size:
            raise DamagedFrame(f"frame of {end - at} bytes in a message that has {size - at} left")
        if xxhash.xxh3_64_intdigest(view[at + 8 : end]) != checksum:
            raise DamagedFrame(f"checksum of a {_KINDS[kind].name} frame does not match: it was damaged on the way")
        extra = at + HEADER_BYTES
        digest = b""
        if flags & FLAG_DIGEST:
            digest = bytes(view[extra : extra + DIGEST_BYTES])
            extra += DIGEST_BYTES
        shape = _SHAPES[ndim].unpack_from(view, extra)
        fields = (
            _KINDS[kind], flags, dtype, shape, tensor, seq, ack, consumed, consumed_bytes,
            step, total, offset, digest, view[body : body + length],
        )  # fmt: skip
        frames.append(_new(Frame, fields))
        at = end
    return frames
