"""Paillier's private key, and how it decrypts.

private = PrivateKey.generate()
private.save("private_key.json")
private.public.save("public_key.json")
encrypted = private.public.encrypt(np.array([1.5, -2.0]))
private.decrypt(encrypted * 3 + 1)        # array([ 5.5, -5. ])
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

import gmpy2
import numpy as np
from gmpy2 import gcd, invert, mpz, powmod

from efl.errors import ConfigError
from efl.paillier import key_files, primes
from efl.paillier.encoding import whole
from efl.paillier.key_files import PRIVATE
from efl.paillier.modular import SecretExponent
from efl.paillier.public_key import DJN, LEAST_BITS, MOST_BITS, SUBGROUP, PublicKey, integer_of

if TYPE_CHECKING:
    from efl.paillier.array import EncryptedArray

DEFAULT_BITS = 3072
_MAKE_KEYS = "Make new keys with `efl keygen`"


class PrivateKey:
    """Decrypts. It shows itself in no text and cannot be pickled.

    Args:
      p: A prime.
      q: Another.
      public: The key of n = p·q.
      orders: Of a key that was generated with ``fast=True``: the orders of its masks mod p and mod q.

    Attributes:
      public: What others encrypt with.

    Raises:
      ConfigError: p and q are no primes, or not those of the public key; or they are such that others could find them:
        of different sizes, or near to each other; or masks could be found, as they are of a small order.
    """

    def __init__(self, p: int, q: int, public: PublicKey, orders: tuple[int, int] | None = None) -> None:
        self.public = public
        p, q = integer_of(p, "p"), integer_of(q, "q")
        if p * q != public.n or p == q or not (gmpy2.is_prime(p, 40) and gmpy2.is_prime(q, 40)):
            raise ConfigError("private key: p and q are not the two primes of its public key's n: the file is damaged")
        weak = primes.weakness(p, q)
        if weak:
            raise ConfigError(f"private key: {weak}; others could decrypt. {_MAKE_KEYS}")
        if public.kind == DJN and not (p % 4 == q % 4 == 3 and gcd(p - 1, q - 1) == 2):
            raise ConfigError(
                f"private key: p and q are not of the form that its public key's masks need. {_MAKE_KEYS}"
            )
        self._orders = orders
        self._q_inverse = invert(q, p)
        self._whole = [_Half(public.n, each, each - 1) for each in (p, q)]
        # What takes a mask to 1 is the group's order, or that of the subgroup in which masks are.
        self._halves = self._whole
        if public.kind == SUBGROUP:
            if orders is None:
                raise ConfigError("private key: the orders of its masks are missing")
            if any((each - 1) % (2 * order) for each, order in zip((p, q), map(mpz, orders)) if order) or 0 in orders:
                raise ConfigError("private key: the orders of its masks are not those of its public key's h")
            a, b = (integer_of(order, "an order") for order in orders)
            if a == b or any(
                each.bit_length() < primes.SUBGROUP_BITS or not gmpy2.is_prime(each, 40) for each in (a, b)
            ):
                raise ConfigError(
                    "private key: the orders of its masks are not two primes of "
                    f"{primes.SUBGROUP_BITS} bits; others could find the masks. {_MAKE_KEYS}"
                )
            self._halves = [_Half(public.n, each, 2 * mpz(order)) for each, order in zip((p, q), orders)]
            masked = public.masks.draw().finished(public.n, public.square)
            if any(half.powers([masked]) != [1] for half in self._halves):
                raise ConfigError("private key: the orders of its masks are not those of its public key's h")

    @classmethod
    def generate(cls, bits: int = DEFAULT_BITS, fast: bool = False) -> PrivateKey:
        """A new key.

        Args:
          bits: Of n: 2048 to 8192, even. 3072 are as hard as a key of 128 bits for a block cipher, 2048 as 112.
          fast: Masks from a subgroup: encryption takes two thirds of the time and decryption a quarter. It assumes,
            beyond what Paillier's scheme does, that random elements of this subgroup (of an order of 512 bits) cannot
            be told from random n-th powers; and the other party has to trust whoever made the key that h is as it
            should be.

        Raises:
          ConfigError: ``bits`` is no integer, or out of its range.
        """
        bits = whole(bits, "bits", "PrivateKey.generate")
        if not (LEAST_BITS <= bits <= MOST_BITS and bits % 2 == 0):
            raise ConfigError(f"bits={bits}: expected an even number from {LEAST_BITS} to {MOST_BITS}")
        if not fast:
            p, q = primes.blum_primes(bits)
            return cls(p, q, PublicKey(p * q, DJN))
        p, q, a, b = primes.subgroup_primes(bits)
        n = p * q
        h = -powmod(_unit(n), 2 * ((p - 1) // (2 * a)) * ((q - 1) // (2 * b)), n) % n
        return cls(p, q, PublicKey(n, SUBGROUP, h), (int(a), int(b)))

    def decrypt(self, array: EncryptedArray, *, exact: bool = False) -> np.ndarray:
        """Decrypts an array.

        Args:
          array: Encrypted for this key.
          exact: Gives the integers themselves, multiples of ``2**-scale_bits``, as Python integers (``object``).

        Returns:
          float64; integers of ``scale_bits=0`` int64, where they fit.

        Raises:
          ConfigError: It was encrypted for another key.
          DataError: A number is outside of the bound that the array came with.
        """
        from efl.paillier.conversions import decrypt

        return decrypt(self, array, exact)

    def decrypt_residues(self, ciphertexts: Sequence[mpz], whose: str = "what is to be decrypted") -> list[mpz]:
        """Decrypts ciphertexts to numbers mod n, from 0 up. Other Python threads run meanwhile.

        Args:
          ciphertexts: To be decrypted.
          whose: They are, for messages.

        Raises:
          DataError: One is no encryption under this key.
        """
        self.public.check_ciphertexts(ciphertexts, whose)
        left, right = (half.decrypt(ciphertexts, whole) for half, whole in zip(self._halves, self._whole))
        p, q = (half.prime for half in self._whole)
        return [b + q * ((a - b) * self._q_inverse % p) for a, b in zip(left, right)]

    def derived_secret(self, purpose: bytes) -> bytes:
        """32 bytes that follow from the key and a purpose, and tell nothing of the key."""
        primes = sorted(int(half.prime) for half in self._whole)
        return hashlib.sha256(purpose + b"".join(prime.to_bytes(1024, "little") for prime in primes)).digest()

    # ---- files

    def save(self, path: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Writes the key to a file that phe reads too, readable by this user only.

        Raises:
          ConfigError: There is such a file, and ``overwrite`` is False, or it cannot be written.
        """
        p, q = (half.prime for half in self._whole)
        fields = {
            "kty": "DAJ",
            "key_ops": [PRIVATE],
            "p": key_files.number_to_text(p),
            "q": key_files.number_to_text(q),
            "pub": self.public._fields(),
            "kid": f"Paillier private key {self.public.fingerprint}",
        }
        if self._orders is not None:
            fields |= {name: key_files.number_to_text(order) for name, order in zip("ab", self._orders)}
        key_files.write(path, fields, PRIVATE, overwrite)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PrivateKey:
        """Reads a key of efl's or phe's, and checks it; warns where others may read the file.

        Raises:
          ConfigError: The file is missing, damaged, or a public key's; or the key is not sound.
        """
        fields, where = key_files.read(path, PRIVATE)
        if not isinstance(fields.get("pub"), dict):
            raise ConfigError(f"{where}: 'pub' is missing: the file is damaged")
        public = PublicKey._from_fields(fields["pub"], where)
        p, q = key_files.number_of(fields, "p", where), key_files.number_of(fields, "q", where)
        orders = None
        if public.kind == SUBGROUP:
            orders = (int(key_files.number_of(fields, "a", where)), int(key_files.number_of(fields, "b", where)))
        try:
            return cls(p, q, public, orders)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None

    def __repr__(self) -> str:
        return f"<PrivateKey of {self.public!r}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a private key is not pickled: save() writes it to a file of its own")


class _Half:
    """Decryption modulo one of the primes."""

    def __init__(self, n: mpz, prime: mpz, exponent: mpz) -> None:
        self.prime, self._exponent = prime, SecretExponent(exponent, prime * prime)
        self._scale = invert((self.powers([n + 1])[0] - 1) // prime, prime)

    def powers(self, elements: Sequence[mpz]) -> list[mpz]:
        return self._exponent.powers(elements)

    def decrypt(self, ciphertexts: Sequence[mpz], whole: _Half) -> list[mpz]:
        found = []
        for ciphertext, power in zip(ciphertexts, self.powers(ciphertexts)):
            # One whose mask is in no subgroup (of phe, say) is not taken to 1 by the subgroup's order.
            half = self if power % self.prime == 1 else whole
            if half is not self:
                (power,) = half.powers([ciphertext])
            found.append((power - 1) // self.prime * half._scale % self.prime)
        return found


def _unit(n: mpz) -> mpz:
    while True:
        x = mpz(secrets.randbelow(int(n)))
        if x > 1 and gcd(x, n) == 1:
            return x
