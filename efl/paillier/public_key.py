"""Paillier's public key (Paillier, EUROCRYPT '99), with short exponents (Damgård, Jurik and Nielsen, 2010)."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import gmpy2
import numpy as np
from gmpy2 import gcd, jacobi, mpz

from efl.errors import ConfigError, DataError
from efl.paillier import key_files, primes
from efl.paillier.key_files import PUBLIC
from efl.paillier.masks import Masks

if TYPE_CHECKING:
    from efl.paillier.array import EncryptedArray
    from efl.paillier.layout import Layout

_log = logging.getLogger("efl")
LEAST_BITS, MOST_BITS = 2048, 8192
DJN, SUBGROUP = "djn", "subgroup"
_SUBGROUP_MASK_BITS = 2 * primes.SUBGROUP_BITS + 128
_SMALL = 1 << 16  # primes below this must not divide n


class PublicKey:
    """Encrypts, and computes with what is encrypted. Tells nothing of what others have encrypted.

    Args:
      n: Product of two secret primes.
      masks: How encryptions are masked. ``"djn"``: by short exponents, where both primes are 3 mod 4 as those of keys
        are that efl made (nobody can see it in n: whoever takes such a key trusts its maker that far). ``"subgroup"``:
        of a key that was generated with ``fast=True``. ``""``: by full-length exponents, for any key, which takes
        fifteen times as long.
      h: Generates the masks of a subgroup key. Of others it follows from n.

    Attributes:
      n: The modulus of plaintexts.
      square: n², the modulus of ciphertexts.
      bits: Of n.
      kind: ``masks``.

    Raises:
      ConfigError: n is no integer, or of a size, or has a form, that no sound key has; or h does not go with it.
    """

    def __init__(self, n: int, masks: str = "", h: int | None = None) -> None:
        self.n, self.kind = integer_of(n, "n"), masks
        _check(self.n, masks)
        self.square, self.bits = self.n * self.n, self.n.bit_length()
        self._h = _derived(self.n) if masks == DJN else None
        if masks == SUBGROUP:
            self._h = integer_of(h or 0, "h")
            _check_generator(self._h, self.n)

    @functools.cached_property
    def masks(self) -> Masks:
        """Where masks come from. A table of some 40 MiB is made with the first one."""
        if not self.kind:
            _log.warning(
                "public key %s was not made by efl: every encryption takes a full-length exponent, and some fifteen "
                "times as long",
                self.fingerprint,
            )
        return Masks(self.n, self._h, _SUBGROUP_MASK_BITS if self.kind == SUBGROUP else -(-self.bits // 2))

    @functools.cached_property
    def fingerprint(self) -> str:
        """Names the key, for people to compare: 16 bytes of SHA-256 of all that is public, in hexadecimal groups."""
        h = self._h if self.kind == SUBGROUP else 0
        text = hashlib.sha256(f"{self.n:x}/{self.kind}/{h:x}".encode()).hexdigest()[:32]
        return " ".join(text[i : i + 4] for i in range(0, 32, 4))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PublicKey) and (self.n, self.kind, self._h) == (other.n, other.kind, other._h)

    def __hash__(self) -> int:
        return hash((self.n, self.kind))

    def __repr__(self) -> str:
        return f"<PublicKey of {self.bits} bits, {self.fingerprint}>"

    def encrypt(
        self,
        values: Any,
        *,
        scale_bits: int | None = None,
        limit: float | None = None,
        pack_axis: int | None = None,
        headroom_bits: int | None = None,
        clip: bool = False,
    ) -> EncryptedArray:
        """Encrypts numbers.

        Args:
          values: Real numbers, of any shape.
          scale_bits: They are rounded to multiples of ``2**-scale_bits``; by default 16 for floats and 0 for integers.
          limit: The largest magnitude; by default 2**32. Whoever gets the array learns it.
          pack_axis: Ciphertexts hold many numbers along this axis. These can be added to, and multiplied by one factor
            for all of them, and not added up. None: each holds one.
          headroom_bits: With ``pack_axis``: by how many bits numbers may grow by what is computed.
          clip: Larger ones are clipped, counted and logged; otherwise refused.

        Returns:
          The array.

        Raises:
          DataError: A value is NaN, infinite or larger than ``limit``.
          ConfigError: The arguments do not go together.
        """
        from efl.paillier import conversions  # which needs keys

        return conversions.encrypt(self, values, scale_bits, limit, pack_axis, headroom_bits, clip)

    def from_bytes(self, rows: np.ndarray, layout: Layout) -> EncryptedArray:
        """An array from what ``EncryptedArray.to_bytes`` gave. What can be computed with it has to fit as anywhere:
        where it was computed by the sender, that has to give ``to_bytes`` a limit.

        Args:
          rows: uint8 ``[count, 2 * bytes of n]``.
          layout: Its layout, as the receiver knows it to be: what somebody else says of it is not to be trusted.

        Raises:
          DataError: There are more or fewer ciphertexts than the layout says, or one is none of this key's.
        """
        from efl.paillier import conversions

        return conversions.from_bytes(self, rows, layout)

    def from_phe(self, numbers: Sequence[Any], *, limit: float = 2.0**80) -> EncryptedArray:
        """An array ``[count]`` of phe's ``EncryptedNumber`` of this key. What is computed from it has long masks.

        Args:
          numbers: Of any exponents; all get the finest.
          limit: The largest magnitude that they can have, which phe does not say.

        Returns:
          The array.

        Raises:
          ConfigError: They are of another key.
        """
        from efl.paillier import conversions

        return conversions.from_phe(self, numbers, limit)

    # ---- ciphertexts, as numbers

    def encrypt_residues(self, plaintexts: Sequence[int]) -> list[mpz]:
        """Encrypts numbers mod n, one by one.

        Args:
          plaintexts: Any integers; they count mod n.

        Returns:
          Ciphertexts, freshly masked.
        """
        return [self.masks.draw().finished(self.n, self.square, plaintext) for plaintext in plaintexts]

    def check_ciphertexts(self, ciphertexts: Sequence[mpz], whose: str, of_efl: bool = False) -> None:
        """Refuses what no encryption under this key can be.

        Args:
          ciphertexts: To be looked at.
          whose: They are, for the message.
          of_efl: Whether they were masked by this key's own masks. Only then do these masks hide all of what is
            computed from them: another number's exponent would show in its Jacobi symbol.

        Raises:
          DataError: One is not between 0 and n², not coprime to n, or masked in another way.
        """
        for number, each in enumerate(ciphertexts):
            if not 0 < each < self.square:
                raise DataError(f"ciphertext {number} of {whose} is not between 0 and n²: made with another key?")
            symbol = jacobi(each % self.n, self.n)
            if symbol == 0:
                raise DataError(f"ciphertext {number} of {whose} is no encryption under key {self.fingerprint}")
            if of_efl and self.kind and symbol != 1:
                raise DataError(
                    f"ciphertext {number} of {whose} was not masked as encryptions under key {self.fingerprint} are"
                )

    # ---- files

    def save(self, path: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Writes the key to a file that phe reads too.

        Raises:
          ConfigError: There is such a file, and ``overwrite`` is False, or it cannot be written.
        """
        key_files.write(path, self._fields(), PUBLIC, overwrite)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PublicKey:
        """Reads a key of efl's or phe's, and checks it.

        Raises:
          ConfigError: The file is missing, damaged, or a private key's; or the key is not sound.
        """
        fields, where = key_files.read(path, PUBLIC)
        return cls._from_fields(fields, where)

    def _fields(self) -> dict[str, Any]:
        fields = {
            "kty": "DAJ",
            "alg": "PAI-GN1",
            "key_ops": [PUBLIC],
            "n": key_files.number_to_text(self.n),
            "kid": f"Paillier public key {self.fingerprint}",
        }
        if self.kind:
            fields["masks"] = self.kind
        if self.kind == SUBGROUP and self._h is not None:
            fields["h"] = key_files.number_to_text(self._h)
        return fields

    @classmethod
    def _from_fields(cls, fields: dict[str, Any], where: str) -> PublicKey:
        n = key_files.number_of(fields, "n", where)
        h = key_files.number_of(fields, "h", where) if "h" in fields else None
        try:
            return cls(n, fields.get("masks", ""), h)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None


def integer_of(value: Any, name: str) -> mpz:
    """A number of a key, of what was given as one: of a text or a float mpz would make one, too."""
    if isinstance(value, bool) or not isinstance(value, (int, type(mpz()))):
        raise ConfigError(
            f"Paillier key: {name} is of type {type(value).__name__}: expected an integer; PublicKey.load and "
            "PrivateKey.load read key files"
        )
    return mpz(value)


def _derived(n: mpz) -> mpz:
    """-x² mod n, with x that follows from n: both parties know that nobody chose it."""
    length = (n.bit_length() + 128 + 7) // 8
    data = int(n).to_bytes((n.bit_length() + 7) // 8, "big")
    x = mpz(int.from_bytes(hashlib.shake_256(b"efl-paillier-h" + data).digest(length), "big")) % n
    return -x * x % n


@functools.lru_cache(maxsize=1)
def _small_primes() -> mpz:
    return gmpy2.primorial(_SMALL)


def _check(n: mpz, masks: str) -> None:
    bits = n.bit_length()
    if n <= 0:
        raise ConfigError("Paillier key: n is not positive: not a product of two large primes")
    if not LEAST_BITS <= bits <= MOST_BITS:
        raise ConfigError(f"Paillier key of {bits} bits: expected {LEAST_BITS} to {MOST_BITS}; make another key")
    if n % 2 == 0 or gcd(n, _small_primes()) != 1:
        raise ConfigError(f"Paillier key: n has a prime factor below {_SMALL}: not a product of two large primes")
    if gmpy2.is_prime(n) or gmpy2.is_power(n):
        raise ConfigError("Paillier key: n is a prime, or a power of a number: not a product of two large primes")
    if masks not in ("", DJN, SUBGROUP):
        raise ConfigError(f"Paillier key: masks={masks!r}: expected {DJN!r}, {SUBGROUP!r} or none")
    if masks and n % 4 != 1:
        raise ConfigError(f"Paillier key: masks={masks!r}, but n is not a product of two primes that are 3 mod 4")


def _check_generator(h: mpz, n: mpz) -> None:
    if not 1 < h < n - 1 or jacobi(h, n) != 1:
        raise ConfigError("Paillier key: h generates no masks of a subgroup: the file is damaged")
