"""numpy array <-> payload bytes. Fixed-size dtypes travel as raw little-endian bytes, C order.

Strings (object arrays of ``bytes``, TensorFlow's ``tf.string``) travel as one little-endian uint32 length
per element followed by the elements' bytes. There is no pickle: nothing that arrives is ever executed.
"""

from __future__ import annotations

import math
import sys
from typing import Any, NamedTuple

import numpy as np

from efl.errors import ConfigError, ProtocolError

STRING = 32  # wire code
_CODES: dict[str, int] = {
    "bool": 1, "uint8": 2, "int8": 3, "uint16": 4, "int16": 5, "uint32": 6, "int32": 7,
    "uint64": 8, "int64": 9, "float16": 10, "float32": 11, "float64": 12, "bfloat16": 13,
    "complex64": 14, "complex128": 15, "string": STRING,
}  # fmt: skip
_NAMES = {code: name for name, code in _CODES.items()}


def _numpy_dtypes() -> dict[int, np.dtype[Any]]:
    known: dict[int, np.dtype[Any]] = {}
    for name, code in _CODES.items():
        if name == "bfloat16":
            try:
                import ml_dtypes  # comes with TensorFlow and JAX; without it there is no bfloat16
            except ImportError:
                continue
            known[code] = np.dtype(ml_dtypes.bfloat16)
        elif name != "string":
            known[code] = np.dtype(name)
    return known


_DTYPES = _numpy_dtypes()
_BY_DTYPE = {dtype: code for code, dtype in _DTYPES.items()}
_SWAP = sys.byteorder == "big"
_BOOL = _CODES["bool"]
# What the buffer protocol can show as bytes: not bfloat16, and complex numbers only by way of numpy.
_VIEWABLE = frozenset(_CODES.values()) - {_CODES["bfloat16"], _CODES["complex64"], _CODES["complex128"], STRING}
_new = tuple.__new__
_ALIGN = 64
_STRINGS_AT_ONCE = 1 << 16


class Encoded(NamedTuple):
    """An array ready to travel: wire code, shape, payload (a view of the array where possible)."""

    code: int
    shape: tuple[int, ...]
    payload: memoryview


def dtype_names() -> list[str]:
    """The names of the dtypes that can travel, as ``TensorSpec`` spells them."""
    return [name for name, code in _CODES.items() if code == STRING or code in _DTYPES]


def code_of(name: str) -> int | None:
    """The wire code of dtype ``name``, or None where it cannot travel."""
    code = _CODES.get(name)
    return code if code == STRING or code in _DTYPES else None


def name_of(code: int) -> str:
    """The dtype name of a wire code; for an unknown code, a text that says so."""
    return _NAMES.get(code, f"unknown dtype code {code}")


def encode(array: np.ndarray) -> Encoded:
    """Views an array as bytes (copies only where its memory is not contiguous or not little-endian).

    Args:
      array: Any dtype of ``dtype_names``, any shape. Strings as an object array of ``bytes``.

    Returns:
      Code, shape and payload. The payload is only valid as long as the array is not changed.

    Raises:
      ConfigError: The dtype cannot travel, or an object array holds something other than ``bytes``.
    """
    code = _BY_DTYPE.get(array.dtype)
    if code is None:
        if array.dtype.kind in "OS":
            return Encoded(STRING, array.shape, _encode_strings(array))
        native = array.dtype.newbyteorder("=")
        code = _BY_DTYPE.get(native)
        if code is None:
            raise ConfigError(f"an array of dtype {array.dtype} cannot be sent; expected one of {dtype_names()}")
        array = array.astype(native)
    if code not in _VIEWABLE or not array.size:
        flat = np.ascontiguousarray(array.byteswap() if _SWAP else array).reshape(-1)
        return Encoded(code, array.shape, flat.view(np.uint8).data)
    if not array.flags.c_contiguous or _SWAP:
        array = np.ascontiguousarray(array.byteswap() if _SWAP else array).reshape(array.shape)
    return _new(Encoded, (code, array.shape, array.data.cast("B")))


def _encode_strings(array: np.ndarray) -> memoryview:
    elements = array.reshape(-1).tolist()
    for position, element in enumerate(elements):
        if not isinstance(element, bytes):
            raise ConfigError(
                f"element {position} of an object array is {type(element).__name__}; only bytes can be sent "
                "(encode text as UTF-8 first)"
            )
    lengths = np.fromiter(map(len, elements), np.int64, len(elements))
    if lengths.size and int(lengths.max()) > 0xFFFFFFFF:
        raise ConfigError("a string of more than 4 GiB cannot be sent")
    return memoryview(b"".join((lengths.astype("<u4").tobytes(), *elements)))


def payload_bytes(code: int, shape: tuple[int, ...]) -> tuple[int, int | None]:
    """How many bytes a payload of this dtype and shape may take.

    Args:
      code: A known wire code.
      shape: Dimensions of 0 or more.

    Returns:
      (least, most); ``most`` is None for strings. Computed in Python integers: nothing overflows.
    """
    count = math.prod(shape)
    if code == STRING:
        return 4 * count, None if count else 0
    size = count * _DTYPES[code].itemsize
    return size, size


def keep_freed_memory() -> None:
    """Has glibc's malloc keep large freed blocks for reuse, in place of returning and faulting in every page anew.

    It raises its limits (mmap: 32 MiB, trim: 64 MiB) when a block of up to 32 MiB is freed for the first time; so
    one is made, never touched, and freed. Elsewhere this does nothing. Streams of 1 MiB messages gained a quarter here.
    """
    np.empty(31 << 20, np.uint8)


def allocate(size: int) -> np.ndarray:
    """A fresh byte buffer of ``size`` bytes on a 64-byte boundary."""
    return aligned(np.empty(size + _ALIGN, np.uint8), size)


def aligned(raw: np.ndarray, size: int) -> np.ndarray:
    """``size`` bytes from such a boundary on, in a buffer that ``allocate`` made: the ``base`` of what it returned."""
    start = -raw.ctypes.data % _ALIGN
    return raw[start : start + size]


def decode(code: int, shape: tuple[int, ...], payload: memoryview) -> np.ndarray:
    """Makes the array whose bytes are ``payload``, without a copy where the dtype allows it.

    Args:
      code: A known wire code.
      shape: The array's shape; its size must have been checked with ``payload_bytes``.
      payload: The bytes.

    Returns:
      The array, possibly read-only, sharing memory with ``payload``.

    Raises:
      ProtocolError: String lengths do not add up, a bool is neither 0 nor 1, or no array can have this shape.
    """
    try:
        if code == STRING:
            return _decode_strings(shape, payload)
        array: np.ndarray = np.ndarray(shape, _DTYPES[code], payload)
    except ValueError:  # an empty one, for the others take more bytes than can come: numpy multiplies what is not 0
        raise ProtocolError(f"no array can have the shape {shape}") from None
    if code == _BOOL and array.size and int(array.view(np.uint8).max()) > 1:
        raise ProtocolError("a bool tensor holds a byte that is neither 0 nor 1")
    return array.byteswap() if _SWAP else array


def _decode_strings(shape: tuple[int, ...], payload: memoryview) -> np.ndarray:
    count = math.prod(shape)
    ends = np.cumsum(np.frombuffer(payload[: 4 * count], "<u4"), dtype=np.int64)
    came = len(payload) - 4 * count
    if (int(ends[-1]) if count else 0) != came:
        raise ProtocolError(
            f"the lengths of {count} strings add up to {int(ends[-1]) if count else 0} bytes, {came} came"
        )
    out = np.empty(count, object)
    payload, start = payload[4 * count :], 0
    for first in range(0, count, _STRINGS_AT_ONCE):  # a list of all ends would take ten times what came
        for position, end in enumerate(ends[first : first + _STRINGS_AT_ONCE].tolist(), first):
            out[position] = bytes(payload[start:end])
            start = end
    return out.reshape(shape)
