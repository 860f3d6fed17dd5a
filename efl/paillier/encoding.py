"""Fixed-point numbers: floats as integers at a scale of a power of two."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from efl.errors import ConfigError, DataError

_log = logging.getLogger("efl")
MOST_BITS = 62  # of an encoded number, so that it is an int64


def encode(values: Any, scale_bits: int, limit: float, clip: bool = False, who: str = "encrypt") -> np.ndarray:
    """Rounds numbers to multiples of ``2**-scale_bits``.

    Args:
      values: Real numbers.
      scale_bits: Of the fraction, at least 0.
      limit: The largest magnitude.
      clip: What is larger is clipped, counted and logged; otherwise it is refused.
      who: For messages.

    Returns:
      int64, of the shape of ``values``.

    Raises:
      DataError: A number is not finite, or larger than ``limit``.
      ConfigError: The numbers would be of more than 62 bits, or are none.
    """
    held = np.asarray(values)
    if held.dtype.kind not in "biuf":
        raise ConfigError(f"{who}: values of dtype {held.dtype}: expected real numbers")
    if not (scale_bits >= 0 and limit > 0 and int(np.ceil(limit)).bit_length() + scale_bits <= MOST_BITS):
        raise ConfigError(
            f"{who}: scale_bits={scale_bits} with limit={limit:g}: expected at most {MOST_BITS} bits together, neither "
            "negative"
        )
    if not np.isfinite(held).all():
        raise DataError(f"{who}: {np.count_nonzero(~np.isfinite(held))} of {held.size} values are NaN or infinite")
    beyond = np.count_nonzero(np.abs(held.astype(np.float64)) > limit)
    if beyond:
        what = f"{who}: {beyond} of {held.size} values are larger than {limit:g} in magnitude"
        if not clip:
            raise DataError(f"{what}: scale them, give a larger limit, or clip=True")
        _log.warning("%s, and were clipped", what)
    if held.dtype.kind != "f" and not scale_bits:
        return np.clip(held, -limit, limit).astype(np.int64) if beyond else held.astype(np.int64)
    return np.rint(np.clip(held.astype(np.float64), -limit, limit) * 2.0**scale_bits).astype(np.int64)


def decode(integers: np.ndarray, scale_bits: int) -> np.ndarray:
    """The numbers that integers at a scale stand for.

    Args:
      integers: Python integers, ``object``.
      scale_bits: Of the fraction.

    Returns:
      float64; with ``scale_bits=0`` int64 where all fit, else ``object``.
    """
    if scale_bits:
        # Divided as Python does, which rounds once whatever the sizes.
        return np.array([int(each) / (1 << scale_bits) for each in integers.ravel()]).reshape(integers.shape)
    fits = all(-(1 << 63) <= int(each) < 1 << 63 for each in integers.ravel())
    return integers.astype(np.int64) if fits else integers
