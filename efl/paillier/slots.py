"""Many signed numbers in one plaintext.

A plaintext holds S slots of L bits: Σ vₛ·2^(L·s) mod n, with |vₛ| < 2^(L-1), read back centred on zero. Additions,
and multiplications by a number, act on all slots at once. Whether the results fit is known before, from ranges: a value
that leaves its slot changes its neighbour, one that leaves the highest wraps around n, and neither could be seen
afterwards.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import gmpy2
import numpy as np
from gmpy2 import mpz

from efl.errors import ConfigError, DataError


@dataclass(frozen=True)
class Slots:
    """How numbers along one axis lie in plaintexts.

    Attributes:
      length: How many numbers.
      bits: L, of a slot.
      count: S, slots in a plaintext.
      groups: Plaintexts; the last may have slots that are not used, which hold 0.
    """

    length: int
    bits: int
    count: int
    groups: int

    @classmethod
    def fit(cls, length: int, bits: int, key_bits: int) -> Slots:
        """As few plaintexts as hold ``length`` numbers, with as few slots in each as that takes.

        Args:
          length: How many numbers; of none there is no plaintext.
          bits: Of a slot, at least 2.
          key_bits: Of n.

        Raises:
          ConfigError: Not even one slot fits.
        """
        # The sum is below 2^(L·S-1) in magnitude, and must be below n/2, which is at least 2^(key_bits-2).
        most = (key_bits - 1) // bits
        if most < 1:
            raise ConfigError(f"a slot of {bits} bits does not fit in a plaintext of a {key_bits}-bit key")
        groups = -(-length // most)
        return cls(length, bits, -(-length // max(groups, 1)) or 1, groups)

    @property
    def limit(self) -> int:
        """Values of a slot are below this in magnitude."""
        return 1 << (self.bits - 1)

    def pack(self, values: np.ndarray | Sequence[int]) -> list[mpz]:
        """Numbers along the axis as plaintexts, which may be negative.

        Args:
          values: ``[length]`` integers, of any size that fits; the caller answers for that.

        Returns:
          ``groups`` numbers.
        """
        held = list(values.tolist() if isinstance(values, np.ndarray) else values)
        held += [0] * (self.groups * self.count - len(held))
        half, offset = self.limit, offset_of(self.count, self.bits)
        return [
            gmpy2.pack([value + half for value in held[first : first + self.count]], self.bits) - offset
            for first in range(0, len(held), self.count)
        ]

    def unpack(self, plaintexts: Iterable[mpz]) -> list[int]:
        """Numbers along the axis from plaintexts that are centred on zero.

        Raises:
          DataError: A plaintext is outside of what its slots can hold.
        """
        half, offset = self.limit, offset_of(self.count, self.bits)
        found: list[int] = []
        for plaintext in plaintexts:
            shifted = plaintext + offset
            if shifted < 0 or shifted.bit_length() > self.bits * self.count:
                raise DataError(
                    f"a plaintext is outside of its {self.count} slots of {self.bits} bits: it was not made of such "
                    "slots, or with another key"
                )
            digits = gmpy2.unpack(shifted, self.bits)
            found += [int(digit) - half for digit in digits]
            found += [-half] * (self.count - len(digits))
        return found[: self.length]


@functools.lru_cache(maxsize=256)
def offset_of(count: int, bits: int) -> mpz:
    """Half of a slot in each slot: what makes all of them non-negative."""
    return gmpy2.pack([1 << (bits - 1)] * count, bits)
