"""Paillier's scheme as the rounds of ``efl.protocol`` ask for it: matrices of packed integers."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from gmpy2 import mpz

from efl.errors import DataError
from efl.paillier import packing, residues
from efl.paillier.decryption import decrypted
from efl.paillier.engine import Engine
from efl.paillier.factored import Product
from efl.paillier.masks import HIDING_BITS, bits_to_hide
from efl.paillier.private_key import PrivateKey
from efl.paillier.slots import Slots

_MULTIPLIER_BITS = 62  # of a share


@dataclass(frozen=True)
class Ciphertexts:
    """Elements mod n², and how long the exponents of their masks can be."""

    elements: np.ndarray  # object [groups, m] of mpz, or of Product where they were computed
    mask_bits: int


class PublicPaillier:
    """What the holder of the public key computes.

    Args:
      engine: Computes.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine, self.public = engine, engine.public
        self.fingerprint = self.public.fingerprint
        self._residue_bytes = residues.width_of(int(self.public.n))
        self._cipher_bytes = residues.width_of(int(self.public.square))

    def slots(self, length: int, least_bits: int) -> Slots:
        """See ``efl.protocol.scheme``; ConfigError where not even one slot fits."""
        narrow = Slots.fit(length, least_bits, self.public.bits)
        return Slots(length, (self.public.bits - 1) // narrow.count, narrow.count, narrow.groups)

    def pack(self, values: np.ndarray, slots: Slots) -> np.ndarray:
        """See ``efl.protocol.scheme``."""
        return packing.pack(values, slots)

    def pack_wide(self, limbs: Sequence[np.ndarray], limb_bits: int, slots: Slots) -> np.ndarray:
        """See ``efl.protocol.scheme``."""
        return packing.pack_wide(limbs, limb_bits, slots)

    def unpack(self, plain: np.ndarray, slots: Slots, bound: int, what: str) -> np.ndarray:
        """See ``efl.protocol.scheme``."""
        return packing.unpack(packing.centred(plain, self.public.n), slots, bound, what)

    def uniform(self, groups: int, m: int) -> np.ndarray:
        """See ``efl.protocol.scheme``."""
        n = int(self.public.n)
        return _array([mpz(secrets.randbelow(n)) for _ in range(groups * m)], groups, m)

    def encrypt(self, plain: np.ndarray) -> np.ndarray:
        """See ``efl.protocol.scheme``."""
        n, square = self.public.n, self.public.square
        masks = self.engine.masks(plain.size, self.public.masks.fresh_bits)
        made = [mask * (1 + n * (each % n)) % square for mask, each in zip(masks, plain.ravel())]
        return residues.to_rows(made, self._cipher_bytes)

    def read(self, rows: np.ndarray, groups: int, m: int, what: str) -> Ciphertexts:
        """See ``efl.protocol.scheme``."""
        elements = _rows_of(rows, groups * m, self._cipher_bytes, what)
        self.public.check_ciphertexts(elements, what, of_efl=True)
        return Ciphertexts(_array(elements, groups, m), self.public.masks.fresh_bits)

    def matmul(self, ciphertexts: Ciphertexts, multipliers: np.ndarray, bits: int) -> Ciphertexts:
        """See ``efl.protocol.scheme``."""
        found = self.engine.matmul([list(row) for row in ciphertexts.elements], multipliers, bits)
        return self._computed(_objects(found), ciphertexts, bits, len(multipliers))

    def times(self, ciphertexts: Ciphertexts, multipliers: np.ndarray, bits: int) -> Ciphertexts:
        """See ``efl.protocol.scheme``."""
        groups, m = ciphertexts.elements.shape
        exponents = np.broadcast_to(multipliers, (groups, m)).ravel().tolist()
        found = self.engine.powers(list(ciphertexts.elements.ravel()), exponents)
        made = [Product(each, mpz(0)) for each in found]
        return self._computed(_array(made, groups, m), ciphertexts, bits, 1)

    def times_each(self, ciphertexts: Ciphertexts, multipliers: np.ndarray, bits: int, slots: Slots) -> Ciphertexts:
        """See ``efl.protocol.scheme``."""
        found: list[Product] = []
        for g, row in enumerate(ciphertexts.elements):
            columns = multipliers[:, g * slots.count : min((g + 1) * slots.count, slots.length)]
            found += self.engine.matmul([list(row)], np.ascontiguousarray(columns), bits)[0]
        return self._computed(_array(found, 1, len(found)), ciphertexts, bits, len(multipliers))

    def spread(self, ciphertexts: Ciphertexts, multipliers: np.ndarray, bits: int, slots: Slots) -> Ciphertexts:
        """See ``efl.protocol.scheme``."""
        length, m = multipliers.shape
        whole = np.zeros((slots.groups * slots.count, m), np.uint64)
        whole[:length] = multipliers
        digits = np.ascontiguousarray(whole.reshape(slots.groups, slots.count, m).transpose(2, 1, 0))
        found = self.engine.spread(list(ciphertexts.elements[0]), digits, bits, slots.bits)
        # The exponent is the packed vector itself.
        return self._computed(_objects(found).T, ciphertexts, self.public.bits, 1)

    def finish(self, ciphertexts: Ciphertexts, plain: np.ndarray) -> np.ndarray:
        """See ``efl.protocol.scheme``."""
        n, square = self.public.n, self.public.square
        masks = self.engine.masks(plain.size, ciphertexts.mask_bits + HIDING_BITS)
        made = [
            product.finished(n, square, each) * mask % square
            for product, each, mask in zip(ciphertexts.elements.ravel(), plain.ravel(), masks)
        ]
        return residues.to_rows(made, self._cipher_bytes)

    def to_rows(self, plain: np.ndarray) -> np.ndarray:
        """See ``efl.protocol.scheme``."""
        return residues.to_rows((plain % self.public.n).ravel(), self._residue_bytes)

    def from_rows(self, rows: np.ndarray, groups: int, m: int, what: str) -> np.ndarray:
        """See ``efl.protocol.scheme``."""
        return _array(_rows_of(rows, groups * m, self._residue_bytes, what), groups, m)

    def _computed(self, elements: np.ndarray, of: Ciphertexts, bits: int, terms: int) -> Ciphertexts:
        # As for the longest multipliers, whatever these were: masks of one length serve all rounds.
        return Ciphertexts(elements, bits_to_hide(of.mask_bits, max(bits, _MULTIPLIER_BITS), terms, self.public.bits))


class PrivatePaillier(PublicPaillier):
    """What the holder of the private key computes.

    Args:
      engine: Computes what needs no private key.
      private: Decrypts, in this process.
    """

    def __init__(self, engine: Engine, private: PrivateKey) -> None:
        super().__init__(engine)
        self._private, self.secret = private, private.derived_secret(b"efl rounds")

    def decrypt(self, rows: np.ndarray, groups: int, m: int, what: str) -> np.ndarray:
        """See ``efl.protocol.scheme``."""
        ciphertexts = _rows_of(rows, groups * m, self._cipher_bytes, what)
        engine = self.engine
        found = decrypted(self._private, ciphertexts, what, engine.threads, engine.progress)
        return _array(found, groups, m)


def _rows_of(rows: np.ndarray, count: int, width: int, what: str) -> list[mpz]:
    if rows.dtype != np.uint8 or rows.shape != (count, width):
        raise DataError(
            f"{what}: expected {count} numbers of {width} bytes, got {rows.dtype} {list(rows.shape)}: is the batch of "
            "both parties of the same size, and the key the same?"
        )
    return residues.from_rows(rows)


def _objects(rows: Sequence[Sequence[Product]]) -> np.ndarray:
    return _array([each for row in rows for each in row], len(rows), len(rows[0]) if rows else 0)


def _array(flat: Sequence[object], groups: int, m: int) -> np.ndarray:
    made = np.empty(groups * m, object)
    for position, each in enumerate(flat):  # a Product is a tuple, which numpy would take apart
        made[position] = each
    return made.reshape(groups, m)
