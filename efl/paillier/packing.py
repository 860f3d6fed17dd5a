"""Matrices of integers in packed plaintexts: ``[length, m]`` becomes ``[groups, m]``, packed along the first axis.

Two ways. ``pack`` is for numbers that fit in their slots. ``pack_wide`` is for shares, which are wider than a slot:
each alone runs over into its neighbours, and only the sum of all shares, mod n, is a vector of numbers that fit. Such
numbers come as limbs, since they may have more bits than an int64.
"""

from __future__ import annotations

from collections.abc import Sequence

import gmpy2
import numpy as np
from gmpy2 import mpz

from efl.errors import DataError
from efl.paillier.slots import Slots, offset_of

_INT64 = 62  # bits of a slot up to which int64 holds a number and an offset


def pack(values: np.ndarray, slots: Slots) -> np.ndarray:
    """Numbers that fit in their slots.

    Args:
      values: int64 or Python integers ``[length, m]``; the caller answers for their size.
      slots: How they lie.

    Returns:
      ``object [groups, m]`` of mpz, which may be negative.
    """
    half = slots.limit
    if slots.bits > _INT64:
        values = values.astype(object)
    return _packed(_grouped(values, slots) + half, slots.bits) - offset_of(slots.count, slots.bits)


def pack_wide(limbs: Sequence[np.ndarray], limb_bits: int, slots: Slots) -> np.ndarray:
    """Numbers of any size: the integer Σ vₛ·2^(L·s), vₛ = Σᵢ limbs[i]ₛ·2^(limb_bits·i).

    Args:
      limbs: int64 ``[length, m]`` each.
      limb_bits: Weight of one after another.
      slots: How they lie; at least 34 bits wide.

    Returns:
      ``object [groups, m]`` of mpz.
    """
    total: np.ndarray | int = 0
    for number, limb in enumerate(limbs):
        total = total + (_linear(limb, slots) << limb_bits * number)
    return np.asarray(total)


def _linear(values: np.ndarray, slots: Slots) -> np.ndarray:
    """Σ vₛ·2^(L·s) of int64 that may be wider than a slot: in two pieces, each of which fits."""
    width = min(slots.bits, _INT64) - 2
    low, high = values & ((1 << width) - 1), values >> width
    total = _packed(_grouped(low, slots), slots.bits)
    return total + (pack(high, slots) << width) if high.any() else total


def _grouped(values: np.ndarray, slots: Slots) -> np.ndarray:
    """``[groups, m, count]``; slots that are not used hold 0."""
    m = values.shape[1]
    missing = np.zeros((slots.groups * slots.count - len(values), m), values.dtype)
    return np.concatenate([values, missing]).reshape(slots.groups, slots.count, m).transpose(0, 2, 1)


def _packed(grouped: np.ndarray, bits: int) -> np.ndarray:
    packed = np.empty(grouped.shape[:2], object)
    for g, rows in enumerate(grouped):
        for j, numbers in enumerate(rows.tolist()):
            packed[g, j] = gmpy2.pack(numbers, bits)
    return packed


def unpack(plaintexts: np.ndarray, slots: Slots, bound: int, what: str) -> np.ndarray:
    """The numbers of packed plaintexts that are centred on zero.

    Args:
      plaintexts: ``object [groups, m]`` of mpz.
      slots: How they lie.
      bound: The largest magnitude that a number may have.
      what: They are, for the message.

    Returns:
      ``[length, m]``, int64 where slots are that small, else Python integers.

    Raises:
      DataError: A number is beyond its bound, or a plaintext beyond its slots.
    """
    groups, m = plaintexts.shape
    offset, room = offset_of(slots.count, slots.bits), slots.bits * slots.count
    small = slots.bits <= _INT64
    found = np.empty((groups, m, slots.count), np.int64 if small else object)
    for g in range(groups):
        for j in range(m):
            shifted = plaintexts[g, j] + offset
            if shifted < 0 or shifted.bit_length() > room:
                raise DataError(_beyond(what, bound))
            digits = gmpy2.unpack(shifted, slots.bits)
            found[g, j, : len(digits)] = digits
            found[g, j, len(digits) :] = 0
    numbers = found.transpose(0, 2, 1).reshape(groups * slots.count, m)[: slots.length] - slots.limit
    if numbers.size and np.abs(numbers).max() > bound:
        raise DataError(_beyond(what, bound))
    return numbers


def _beyond(what: str, bound: int) -> str:
    return (
        f"{what}: decrypted numbers are beyond 2^{int(bound).bit_length()} units, and the layer was made for fewer: "
        "training diverges, the layer's output_limit is too small, or the parties' shares are not of one another"
    )


def centred(plaintexts: np.ndarray, n: mpz) -> np.ndarray:
    """Numbers mod n as those of the smallest magnitude."""
    reduced = plaintexts % n
    half = n >> 1
    flat = [each - n if each > half else each for each in reduced.ravel()]
    result = np.empty(len(flat), object)
    result[:] = flat
    return result.reshape(plaintexts.shape)
