"""Numbers modulo n or n² as rows of bytes: what lies in arrays, goes to worker processes and travels.

The width follows from the modulus and never from the number, so sizes tell nothing. Little-endian.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from gmpy2 import mpz

from efl.errors import DataError


def width_of(modulus: int) -> int:
    """Bytes of a number below ``modulus``."""
    return (int(modulus - 1).bit_length() + 7) // 8


def to_rows(numbers: Iterable[int], width: int) -> np.ndarray:
    """Numbers as rows of bytes.

    Args:
      numbers: Each at least 0 and below 256**width.
      width: Bytes of a row.

    Returns:
      uint8 ``[count, width]``, read-only.
    """
    joined = b"".join([int(number).to_bytes(width, "little") for number in numbers])
    return np.frombuffer(joined, np.uint8).reshape(-1, width)


def from_rows(rows: np.ndarray) -> list[mpz]:
    """The numbers that rows of bytes hold.

    Args:
      rows: uint8 ``[count, width]``.

    Raises:
      DataError: It is another kind of array.
    """
    if rows.dtype != np.uint8 or rows.ndim != 2:
        raise DataError(f"rows of bytes: expected uint8 [count, width], got {rows.dtype} {list(rows.shape)}")
    data, width = np.ascontiguousarray(rows).tobytes(), rows.shape[1]
    return [mpz(int.from_bytes(data[i : i + width], "little")) for i in range(0, len(data), width)]
