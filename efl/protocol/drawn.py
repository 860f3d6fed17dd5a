"""Random numbers of the rounds, all from the operating system's generator."""

from __future__ import annotations

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


def bell(shape: tuple[int, ...], bits: int) -> np.ndarray:
    """Integers about zero: sums of twelve uniform ones, near to a Gaussian of deviation 2**bits and below 6 of them.

    Exact results of integer products would be equations for what they were made of (docs, "rho").

    Args:
      shape: Any.
      bits: At most 28.

    Returns:
      int64.
    """
    words = np.frombuffer(os.urandom(4 * _TERMS * int(np.prod(shape, dtype=np.int64))), np.uint32)
    parts = (words >> np.uint32(32 - bits)).astype(np.int64).reshape(*shape, _TERMS)
    return parts.sum(-1) - _TERMS * ((1 << bits) - 1) // 2


def rounded(values: np.ndarray) -> np.ndarray:
    """Rounds up or down at random, so that the mean is the value.

    Args:
      values: float64.

    Returns:
      int64.
    """
    fraction = _words(values.shape).astype(np.float64) * 2.0**-64
    return np.floor(values + fraction).astype(np.int64)


def _words(shape: tuple[int, ...]) -> np.ndarray:
    return np.frombuffer(os.urandom(8 * int(np.prod(shape, dtype=np.int64))), np.uint64).reshape(shape)
