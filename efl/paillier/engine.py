"""Heavy arithmetic under one public key, all cores at once.

An ``Engine`` cuts its work into pieces, has them computed, and puts the results together. ``workers=0`` computes here;
otherwise worker processes do (``workers``), since products of large numbers hold Python's interpreter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from gmpy2 import mpz

from efl.paillier import kernels
from efl.paillier.factored import Product
from efl.paillier.keys import PublicKey

Progress = Callable[[float], None]


class Engine:
    """Products, powers and masks under one public key.

    Args:
      public: The key.
      progress: Called now and then during a long call with the part of it that is done, 0 to 1. What it raises ends the
        call.
    """

    def __init__(self, public: PublicKey, progress: Progress | None = None) -> None:
        self.public = public
        self.progress: Progress = progress or (lambda part: None)

    def masks(self, count: int, bits: int) -> list[mpz]:
        """Random encryptions of zero, as elements mod n².

        Args:
          count: How many.
          bits: Of their exponents.
        """
        return kernels.masks(self.public, count, bits)

    def matmul(self, groups: Sequence[Sequence[mpz]], exponents: np.ndarray, bits: int) -> list[list[Product]]:
        """Π groups[g][i] ** exponents[i, j] for all g and j.

        Args:
          groups: Rows of bases, all of one length.
          exponents: uint64 ``[bases, outputs]``, each below 2**bits.
          bits: 1 to 64.
        """
        return [kernels.products(self.public, bases, exponents, bits) for bases in groups]

    def powers(self, bases: Sequence[mpz], exponents: Sequence[int]) -> list[mpz]:
        """bases[i] ** exponents[i] mod n², exponents at least 0."""
        return kernels.powers(self.public, bases, exponents)

    def spread(self, bases: Sequence[mpz], digits: np.ndarray, digit_bits: int, slot_bits: int) -> list[list[Product]]:
        """bases[i] ** Σₛ digits[i, s, g]·2^(slot_bits·s) for all i and g.

        Args:
          bases: Elements mod n².
          digits: uint64 ``[bases, slots, groups]``, each below 2**digit_bits.
          digit_bits: At most ``slot_bits``.
          slot_bits: Of a slot.
        """
        return [kernels.spread(self.public, base, each, digit_bits, slot_bits) for base, each in zip(bases, digits)]

    def start(self) -> None:
        """Starts what computes, without waiting for it."""

    def close(self) -> None:
        """Ends what was started."""
