from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from efl.errors import ProtocolError
from efl.transport import frame
from efl.transport.frame import Kind

U64 = st.integers(0, 2**64 - 1)
FRAMES = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(Kind),
        "payload": st.binary(max_size=300),
        "flags": st.sampled_from([0, frame.FLAG_HUNGRY]),
        "dtype": st.integers(0, 255),
        "shape": st.lists(st.integers(-(2**63), 2**63 - 1), max_size=frame.MAX_NDIM).map(tuple),
        "tensor": st.integers(0, 2**32 - 1),
        "seq": U64,
        "ack": U64,
        "consumed": U64,
        "consumed_bytes": U64,
        "step": U64,
        "total": U64,
        "offset": U64,
        "digest": st.sampled_from([b"", bytes(range(16))]),
    }
)


@given(st.lists(FRAMES, min_size=1, max_size=4))
def test_what_is_encoded_is_decoded(many):
    message = b"".join(frame.encode(**fields) for fields in many)
    decoded = frame.decode(message)
    assert len(decoded) == len(many)
    for got, fields in zip(decoded, many, strict=True):
        for name, value in fields.items():
            if name == "flags":
                value |= frame.FLAG_DIGEST if fields["digest"] else 0
            assert getattr(got, name) == value


@given(FRAMES, st.data())
def test_every_change_of_a_byte_is_noticed(fields, data):
    message = bytearray(frame.encode(**fields))
    position = data.draw(st.integers(0, len(message) - 1))
    message[position] ^= data.draw(st.integers(1, 255))
    with pytest.raises(ProtocolError):
        frame.decode(bytes(message))


@given(st.lists(FRAMES, min_size=1, max_size=3), st.data())
def test_every_cut_is_noticed_or_ends_between_frames(many, data):
    frames = [frame.encode(**fields) for fields in many]
    message = b"".join(frames)
    cut = data.draw(st.integers(0, len(message) - 1))
    borders = np.cumsum([len(f) for f in frames])
    if cut in borders:
        assert len(frame.decode(message[:cut])) == list(borders).index(cut) + 1
    else:
        with pytest.raises(ProtocolError):
            frame.decode(message[:cut])


@given(st.binary(max_size=400))
def test_garbage_is_refused(message):
    with pytest.raises(ProtocolError):
        frame.decode(message)


def test_a_stranger_is_told_apart():
    with pytest.raises(ProtocolError, match="is the peer an efl party"):
        frame.decode(b"GET / HTTP/1.1\r\n" * 10)


def test_a_claimed_length_allocates_nothing():
    message = bytearray(frame.encode(Kind.DATA, b"x" * 16))
    message[20:24] = (2**32 - 1).to_bytes(4, "little")  # the length field
    with pytest.raises(ProtocolError, match="in a message that has"):
        frame.decode(bytes(message))


@pytest.mark.parametrize("size", [1 << 20, 3 << 20])
def test_large_payloads_lie_on_a_boundary(size):
    for shape in [(size,), (2, size // 2), (2, 2, size // 4)]:
        decoded = frame.decode(frame.encode(Kind.DATA, bytes(size), shape=shape))[0]
        assert np.frombuffer(decoded.payload, np.uint8).ctypes.data % 16 == 0
