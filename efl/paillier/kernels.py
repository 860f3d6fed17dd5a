"""The heavy arithmetic, as functions of numbers: what an ``Engine`` runs here or in worker processes.

None of them knows the private key. Each checks nothing: whoever calls has looked at ciphertexts and ranges.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from gmpy2 import mpz, powmod

from efl.paillier.factored import Product
from efl.paillier.multiexp import multiexp
from efl.paillier.public_key import PublicKey


def masks(public: PublicKey, count: int, bits: int) -> list[mpz]:
    """Random encryptions of zero, as elements mod n².

    Args:
      public: The key.
      count: How many.
      bits: Of their exponents, see ``Masks.draw``.
    """
    return [public.masks.draw(bits).finished(public.n, public.square) for _ in range(count)]


def products(public: PublicKey, bases: Sequence[mpz], exponents: np.ndarray, bits: int) -> list[Product]:
    """Encryptions of what Π bases[i] ** exponents[i, j] encrypts, for all j; see ``multiexp``."""
    return multiexp(bases, exponents, bits, public.n, _blank(public))


def powers(public: PublicKey, bases: Sequence[mpz], exponents: Sequence[int]) -> list[mpz]:
    """bases[i] ** exponents[i] mod n², exponents at least 0."""
    return [powmod(base, int(each), public.square) for base, each in zip(bases, exponents)]


def spread(public: PublicKey, base: mpz, digits: np.ndarray, digit_bits: int, slot_bits: int) -> list[Product]:
    """base ** Σₛ digits[s, g]·2^(slot_bits·s) for all g: one number times a packed vector.

    Args:
      public: The key.
      base: An element mod n².
      digits: uint64 ``[slots, groups]``, each below 2**digit_bits.
      digit_bits: At most ``slot_bits``.
      slot_bits: Of a slot.
    """
    bases, step = [base], mpz(1) << slot_bits
    for _ in range(1, len(digits)):
        bases.append(powmod(bases[-1], step, public.square))
    return multiexp(bases, digits, digit_bits, public.n, _blank(public))


def _blank(public: PublicKey) -> mpz:
    return public.masks.draw().finished(public.n, public.square)
