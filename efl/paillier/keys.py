"""Paillier keys (Paillier, EUROCRYPT '99), with short exponents (Damgård, Jurik and Nielsen, 2010).

private = PrivateKey.generate()
private.save("private_key.json")
private.public.save("public_key.json")
encrypted = private.public.encrypt(np.array([1.5, -2.0]))
private.decrypt(encrypted * 3 + 1)        # array([ 5.5, -5. ])
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import gmpy2
import numpy as np
from gmpy2 import gcd, invert, jacobi, mpz, powmod, powmod_base_list

from efl.errors import ConfigError, DataError
from efl.paillier import key_files, primes
from efl.paillier.encoding import whole
from efl.paillier.key_files import PRIVATE, PUBLIC
from efl.paillier.masks import Masks

if TYPE_CHECKING:
    from efl.paillier.array import EncryptedArray
    from efl.paillier.layout import Layout

_log = logging.getLogger("efl")
LEAST_BITS, MOST_BITS, DEFAULT_BITS = 2048, 8192, 3072
DJN, SUBGROUP = "djn", "subgroup"
_SUBGROUP_MASK_BITS = 2 * primes.SUBGROUP_BITS + 128
_MAKE_KEYS = "Make new keys with `efl keygen`"
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
        self.n, self.kind = _number(n, "n"), masks
        _check(self.n, masks)
        self.square, self.bits = self.n * self.n, self.n.bit_length()
        self._h = _derived(self.n) if masks == DJN else None
        if masks == SUBGROUP:
            self._h = _number(h or 0, "h")
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
        p, q = _number(p, "p"), _number(q, "q")
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
            a, b = (_number(order, "an order") for order in orders)
            if a == b or any(
                each.bit_length() < primes.SUBGROUP_BITS or not gmpy2.is_prime(each, 40) for each in (a, b)
            ):
                raise ConfigError(
                    "private key: the orders of its masks are not two primes of "
                    f"{primes.SUBGROUP_BITS} bits; others could find the masks. {_MAKE_KEYS}"
                )
            self._halves = [_Half(public.n, each, 2 * mpz(order)) for each, order in zip((p, q), orders)]
            masked = public.masks.draw().finished(public.n, public.square)
            if any(powmod(masked, half.exponent, half.square) != 1 for half in self._halves):
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
        self.prime, self.square, self.exponent = prime, prime * prime, exponent
        self._scale = invert((powmod(n + 1, exponent, self.square) - 1) // prime, prime)

    def decrypt(self, ciphertexts: Sequence[mpz], whole: _Half) -> list[mpz]:
        powers = powmod_base_list([each % self.square for each in ciphertexts], self.exponent, self.square)
        found = []
        for ciphertext, power in zip(ciphertexts, powers):
            # One whose mask is in no subgroup (of phe, say) is not taken to 1 by the subgroup's order.
            half = self if power % self.prime == 1 else whole
            if half is not self:
                power = powmod(ciphertext, half.exponent, half.square)
            found.append((power - 1) // self.prime * half._scale % self.prime)
        return found


def _number(value: Any, name: str) -> mpz:
    # Of a text or a float mpz would make a number, too.
    if isinstance(value, bool) or not isinstance(value, (int, type(mpz()))):
        raise ConfigError(
            f"Paillier key: {name} is of type {type(value).__name__}: expected an integer; PublicKey.load and "
            "PrivateKey.load read key files"
        )
    return mpz(value)


def _unit(n: mpz) -> mpz:
    while True:
        x = mpz(secrets.randbelow(int(n)))
        if x > 1 and gcd(x, n) == 1:
            return x


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
