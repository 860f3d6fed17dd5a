"""Random numbers of the rounds: fresh ones of the operating system, and those that follow from a secret and a row.

Shares and masks are fresh. What is added to a result, or rounds it, follows from a secret and the row that it is about:
were it fresh, whoever has the same row computed again (an evaluation that is repeated, a step after a recovery) would
take the mean.
"""

from __future__ import annotations

import hashlib
import os

import numpy as np

from efl.protocol.widths import SHARE_BITS

_TERMS = 12


def uniform(shape: tuple[int, ...], bits: int) -> np.ndarray:
    """Uniform integers below 2**bits.

    Args:
      shape: Any.
      bits: 1 to 63.

    Returns:
      int64.
    """
    return (_words(shape) >> np.uint64(64 - bits)).astype(np.int64)


def share(shape: tuple[int, ...]) -> np.ndarray:
    """A share: uniform integers from -2**61 up to 2**61, int64."""
    return uniform(shape, SHARE_BITS) - (1 << (SHARE_BITS - 1))


def wide(shape: tuple[int, ...], bits: int) -> np.ndarray:
    """Uniform integers of up to 124 bits, from -2**(bits - 1) up to 2**(bits - 1), as Python integers."""
    high = uniform(shape, bits - 62).astype(object) << 62
    return high + uniform(shape, 62).astype(object) - (1 << (bits - 1))


def secret_of(*parts: bytes) -> bytes:
    """A secret that follows from others."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.digest()


def bell(secret: bytes, rows: np.ndarray, columns: int, bits: int) -> np.ndarray:
    """Integers about zero: sums of twelve uniform ones, near to a Gaussian of deviation 2**bits and below 6 of them.

    Exact results of integer products would be equations for what they were made of.

    Args:
      secret: From which they follow.
      rows: ``[B, …]``; equal ones have equal numbers.
      columns: How many for each row.
      bits: At most 28.

    Returns:
      int64 ``[B, columns]``.
    """
    words = _stream(b"bell" + secret, rows, 4 * _TERMS * columns).view(np.uint32)
    parts = (words >> np.uint32(32 - bits)).astype(np.int64).reshape(len(rows), columns, _TERMS)
    return parts.sum(-1) - _TERMS * ((1 << bits) - 1) // 2


def rounded(secret: bytes, values: np.ndarray, most: int) -> np.ndarray:
    """Rounds up or down by chance, so that the mean is the value, and clips.

    Args:
      secret: From which it follows which.
      values: float64 ``[B, m]``.
      most: The largest magnitude of the result.

    Returns:
      int64 ``[B, m]``.
    """
    words = _stream(b"rounded" + secret, values, 8 * values.shape[1]).view(np.uint64)
    fraction = (words.reshape(values.shape) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    # Before it is an integer: of what no int64 holds, the sign would be lost.
    near = np.clip(values, -float(most) - 1, float(most) + 1)
    return np.clip(np.floor(near + fraction), -most, most).astype(np.int64)


def _stream(secret: bytes, rows: np.ndarray, width: int) -> np.ndarray:
    """uint8 ``[B, width]``, each row of SHAKE256 of the secret and of what the row holds."""
    held = np.ascontiguousarray(rows)
    made = b"".join(hashlib.shake_256(secret + row.tobytes()).digest(width) for row in held)
    return np.frombuffer(made, np.uint8).reshape(len(held), width)


def _words(shape: tuple[int, ...]) -> np.ndarray:
    return np.frombuffer(os.urandom(8 * int(np.prod(shape, dtype=np.int64))), np.uint64).reshape(shape)
