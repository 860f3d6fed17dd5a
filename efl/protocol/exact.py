"""Products of integer matrices that are exact, beyond what an int64 holds: with one factor in limbs."""

from __future__ import annotations

import math

import numpy as np

_EXACT = 53  # bits of an integer that float64 holds


def limbs_of(values: np.ndarray, limb_bits: int) -> list[np.ndarray]:
    """int64 as Σ limbs[i]·2^(limb_bits·i), all but the last from 0 up."""
    count = math.ceil(64 / limb_bits)
    mask = (1 << limb_bits) - 1
    return [(values >> limb_bits * i) & mask for i in range(count - 1)] + [values >> limb_bits * (count - 1)]


def matmul(left: np.ndarray, left_bits: int, right: np.ndarray) -> tuple[list[np.ndarray], int]:
    """left @ right, in limbs.

    Args:
      left: int64 ``[a, k]``, below 2**left_bits in magnitude.
      left_bits: See above.
      right: int64 ``[k, b]``, any.

    Returns:
      (limbs int64 ``[a, b]`` each, weight of a limb in bits): the product is Σ limbs[i]·2^(bits·i).
    """
    bits = _EXACT - left_bits - math.ceil(math.log2(max(2, left.shape[1])))
    floats = left.astype(np.float64)
    # Of float64, since BLAS multiplies these and no integers.
    return [(floats @ limb.astype(np.float64)).astype(np.int64) for limb in limbs_of(right, bits)], bits


def multiply(left: np.ndarray, left_bits: int, right: np.ndarray) -> tuple[list[np.ndarray], int]:
    """left * right, element by element and broadcast, in limbs; see ``matmul``."""
    bits = _EXACT - left_bits
    return [left * limb for limb in limbs_of(right, bits)], bits
