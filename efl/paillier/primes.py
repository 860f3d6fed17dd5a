"""Random primes of the forms that Paillier keys need, from the operating system's generator."""

from __future__ import annotations

import secrets

from gmpy2 import gcd, is_prime, mpz

_ROUNDS = 40  # of Miller and Rabin's test, with random bases, beside the one of Baillie, Pomerance and others
SUBGROUP_BITS = 256  # of each prime factor of the order of a subgroup key's masks


def blum_primes(bits: int) -> tuple[mpz, mpz]:
    """p and q for Damgård, Jurik and Nielsen's variant (2010, section 4.3): n = p·q has ``bits`` bits.

    Both are 3 mod 4, gcd(p - 1, q - 1) = 2, and they are far apart, so that the root of n tells neither.

    Args:
      bits: Of n; even.
    """
    half = bits // 2
    while True:
        p, q = _prime(half), _prime(half)
        if _fit(p, q, bits):
            return p, q


def subgroup_primes(bits: int) -> tuple[mpz, mpz, mpz, mpz]:
    """p, q and primes a | p - 1, b | q - 1 of ``SUBGROUP_BITS`` bits each (Paillier, 1999, section 6).

    Args:
      bits: Of n = p·q; even.

    Returns:
      (p, q, a, b); p - 1 = 2·a·r with r odd, likewise q.
    """
    half = bits // 2
    while True:
        (p, a), (q, b) = _with_factor(half), _with_factor(half)
        if a != b and _fit(p, q, bits):
            return p, q, a, b


def weakness(p: mpz, q: mpz) -> str:
    """Why n = p·q is easy to factor, whatever its size; empty where it is not."""
    bits = (p * q).bit_length()
    least = min(p.bit_length(), q.bit_length())
    if least < bits // 2:
        return f"one of its primes has {least} bits, where n has {bits}: expected half as many"
    if abs(p - q).bit_length() <= bits // 2 - 100:  # FIPS 186-5, appendix A.1.3
        return "its primes are so near to each other that the root of n tells both"
    return ""


def _fit(p: mpz, q: mpz, bits: int) -> bool:
    return not weakness(p, q) and gcd(p - 1, q - 1) == 2 and (p * q).bit_length() == bits


def _prime(bits: int) -> mpz:
    top = mpz(3) << (bits - 2)  # the product of two such has all of its bits
    while True:
        candidate = mpz(secrets.randbits(bits)) | top | 3
        if is_prime(candidate, _ROUNDS):
            return candidate


def _with_factor(bits: int) -> tuple[mpz, mpz]:
    factor = _prime(SUBGROUP_BITS)
    rest = bits - SUBGROUP_BITS - 1
    while True:
        candidate = 2 * factor * (mpz(secrets.randbits(rest)) | 1) + 1
        if candidate.bit_length() == bits and candidate >> (bits - 2) == 3 and is_prime(candidate, _ROUNDS):
            return candidate, factor
