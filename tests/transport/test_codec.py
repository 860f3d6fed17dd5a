from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from efl.errors import ConfigError, ProtocolError
from efl.transport import codec

SHAPES = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)
NUMBERS = st.one_of(
    hnp.boolean_dtypes(),
    hnp.integer_dtypes(endianness="="),
    hnp.unsigned_integer_dtypes(endianness="="),
    hnp.floating_dtypes(endianness="=", sizes=(16, 32, 64)),
    hnp.complex_number_dtypes(endianness="=", sizes=(64, 128)),
)


def round_trip(array: np.ndarray) -> np.ndarray:
    code, shape, payload = codec.encode(array)
    least, most = codec.payload_bytes(code, shape)
    assert least <= len(payload)
    assert most is None or len(payload) == most
    return codec.decode(code, shape, memoryview(bytes(payload)))


@given(st.data(), NUMBERS, SHAPES)
def test_numbers_come_back_bit_for_bit(data, dtype, shape):
    array = data.draw(hnp.arrays(dtype, shape))
    back = round_trip(array)
    assert back.dtype == array.dtype
    assert back.shape == array.shape
    assert back.tobytes() == array.tobytes()


@given(st.lists(st.binary(max_size=20), max_size=12), st.booleans())
def test_strings_come_back(values, as_row):
    array = np.empty(len(values), object)
    array[:] = values
    if as_row:
        array = array.reshape(1, -1)
    back = round_trip(array)
    assert back.shape == array.shape
    assert back.tolist() == array.tolist()


def test_bfloat16_comes_back():
    array = np.arange(6).astype(ml_dtypes.bfloat16).reshape(2, 3)
    back = round_trip(array)
    assert back.dtype == array.dtype
    assert (back == array).all()


@pytest.mark.parametrize(
    "array",
    [
        np.arange(24, dtype=np.float32).reshape(4, 6)[:, ::2],
        np.arange(24, dtype=np.float32).reshape(4, 6).T,
        np.arange(6, dtype=">i4"),
        np.array(3.5),
        np.zeros((0, 3), np.int8),
    ],
    ids=["strided", "transposed", "big-endian", "scalar", "empty"],
)
def test_any_memory_layout_travels(array):
    back = round_trip(array)
    assert back.shape == array.shape
    np.testing.assert_array_equal(back, array)


@pytest.mark.parametrize("values", [["text"], [None], [b"ok", 3]])
def test_only_bytes_travel_as_strings(values):
    with pytest.raises(ConfigError, match="only bytes can be sent"):
        codec.encode(np.array(values, object))


def test_a_dtype_that_cannot_travel_is_refused():
    with pytest.raises(ConfigError, match=r"dtype datetime64\[s\] cannot be sent; expected one of"):
        codec.encode(np.array(["2020-01-01"], "datetime64[s]"))


@given(st.binary(max_size=64), st.integers(0, 6))
def test_forged_string_payloads_are_refused_or_consistent(payload, count):
    if len(payload) < 4 * count:
        return  # refused before it gets here: payload_bytes says at least 4 * count
    try:
        array = codec.decode(codec.STRING, (count,), memoryview(payload))
    except ProtocolError:
        return
    assert sum(map(len, array.tolist())) + 4 * count == len(payload)


def test_a_bool_is_zero_or_one():
    with pytest.raises(ProtocolError, match="neither 0 nor 1"):
        codec.decode(codec.code_of("bool"), (2,), memoryview(b"\x01\x02"))


def test_sizes_do_not_overflow():
    huge = (2**62, 2**62)
    assert codec.payload_bytes(codec.code_of("float64"), huge) == (2**127, 2**127)


def test_reassembly_buffers_are_aligned():
    for size in (0, 1, 100, 1 << 20):
        buffer = codec.allocate(size)
        assert buffer.size == size
        assert size == 0 or buffer.ctypes.data % 64 == 0
