"""Random encryptions of zero, by which ciphertexts are masked.

With h = -x² mod n, n the product of two primes that are 3 mod 4 (Damgård, Jurik and Nielsen, 2010, section 4.3), h^n
generates what random n-th powers of Jacobi symbol 1 are; h^(n·a) for a random a of |n|/2 bits cannot be told from them
under the assumptions of the scheme. Without h, r^n with a random r: full-length exponents.

A ciphertext that was computed from others is masked again before it goes back to whoever holds the private key, and by
more. Its terms were masked by exponents that this party may know, and the result's is their sum, each times its
multiplier, and the new one: that has to hide the sum statistically. ``bits_to_hide`` says how long the sum is.
"""

from __future__ import annotations

import secrets

from gmpy2 import gcd, mpz, powmod

from efl.paillier.factored import Product
from efl.paillier.fixed_base import FixedBase

HIDING_BITS = 40  # two computed values are told apart with a probability of 2**-40


class Masks:
    """Encryptions of zero under one public key.

    Args:
      n: The key.
      h: Generates masks with short exponents; None: there is no such number.
      fresh_bits: Length of the exponent of a fresh encryption.
      window: Bits of a window of the table, see ``FixedBase``.
    """

    def __init__(self, n: mpz, h: mpz | None, fresh_bits: int, window: int = 9) -> None:
        self._n, self._square, self.fresh_bits, self._window = n, n * n, fresh_bits, window
        self._base = None if h is None else powmod(h, n, self._square)
        self._table: FixedBase | None = None

    @property
    def hiding_bits(self) -> int:
        """By how much a mask is longer than what it hides."""
        return HIDING_BITS

    def draw(self, bits: int | None = None) -> Product:
        """One mask.

        Args:
          bits: Of its exponent; None: a fresh encryption's.

        Returns:
          An encryption of zero.
        """
        length = max(bits or 0, self.fresh_bits)
        if self._base is not None:
            table = self._table  # another thread may put a smaller one there
            if table is None or table.bits < length:
                # What is computed is masked by up to some 100 bits more, seldom by all that there are.
                table = FixedBase(self._base, self._n, max(length, self.fresh_bits + 128), self._window)
                self._table = table
            return table.power(secrets.randbits(length), length)
        while True:
            r = mpz(secrets.randbelow(int(self._n)))
            if r and gcd(r, self._n) == 1:
                return Product(powmod(r, self._n, self._square), mpz(0))


def bits_to_hide(held: int, multiplier_bits: int, terms: int, n_bits: int) -> int:
    """Length of the exponent of what was computed. A mask that hides it is longer by ``HIDING_BITS``.

    Args:
      held: Bits of the terms' own exponents.
      multiplier_bits: Of the largest integer that multiplied one, in magnitude.
      terms: How many were added up.
      n_bits: Of n; masks repeat after so many.

    Returns:
      Bits.
    """
    return min(n_bits, held + multiplier_bits + max(terms - 1, 0).bit_length())
