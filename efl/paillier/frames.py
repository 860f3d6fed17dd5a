"""Frames between a program and its worker processes, over pipes: a JSON header and plain arrays.

    4 bytes: length of the header; the header; the arrays' bytes, one after the other

The header is ``{"op": …, "arrays": [[dtype, shape], …], …}``. Lengths are bounded; nothing is executed on reading.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_DTYPES = {"uint8", "uint64"}
_MOST_HEADER, _MOST_BYTES = 1 << 16, 1 << 31


def write(handle: int, header: Mapping[str, Any], arrays: Sequence[np.ndarray]) -> None:
    """Writes one frame.

    Args:
      handle: File descriptor.
      header: JSON values.
      arrays: uint8 or uint64.

    Raises:
      OSError: Nobody reads.
    """
    held = [np.ascontiguousarray(array) for array in arrays]
    text = json.dumps({**header, "arrays": [[array.dtype.name, array.shape] for array in held]}).encode()
    _write_all(handle, len(text).to_bytes(4, "little") + text)
    for array in held:
        if array.size:
            _write_all(handle, array.data.cast("B"))


def read(handle: int) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Reads one frame.

    Raises:
      EOFError: The other side is gone.
      ValueError: It is no frame.
    """
    length = int.from_bytes(_read_all(handle, 4), "little")
    if length > _MOST_HEADER:
        raise ValueError(f"a header of {length} bytes")
    header = json.loads(_read_all(handle, length))
    arrays = []
    for dtype, shape in header.pop("arrays"):
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if dtype not in _DTYPES or not 0 <= size <= _MOST_BYTES:
            raise ValueError(f"an array of {dtype} {shape}")
        arrays.append(np.frombuffer(_read_all(handle, size), dtype).reshape(shape))
    return header, arrays


def _write_all(handle: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]


def _read_all(handle: int, size: int) -> bytearray:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        part = os.readv(handle, [view[: 1 << 20]])
        if not part:
            raise EOFError("the pipe is closed")
        view = view[part:]
    return data
