"""What the rounds need of an additively homomorphic scheme. ``efl.paillier.scheme`` is one.

Plaintexts are matrices ``[groups, m]`` of packed integers mod some n, held as ``object`` arrays that add up with ``+``.
Ciphertexts are opaque to the rounds until they are rows of bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from efl.paillier.slots import Slots

Plain = np.ndarray  # object [groups, m]
Rows = np.ndarray  # uint8 [count, bytes], of ciphertexts or of plaintexts mod n


class PublicScheme(Protocol):
    """Whoever has the public key can do this."""

    fingerprint: str

    def slots(self, length: int, least_bits: int) -> Slots:
        """How ``length`` numbers lie in as few plaintexts as slots of ``least_bits`` allow, each as wide as there is
        room for."""

    def pack(self, values: np.ndarray, slots: Slots) -> Plain:
        """Integers ``[length, m]`` that fit in their slots."""

    def pack_wide(self, limbs: Sequence[np.ndarray], limb_bits: int, slots: Slots) -> Plain:
        """Integers Σ limbs[i]·2^(limb_bits·i), ``[length, m]`` int64 each, of any size: one share of what fits."""

    def unpack(self, plain: Plain, slots: Slots, bound: int, what: str) -> np.ndarray:
        """The integers of plaintexts mod n; DataError where one is beyond ``bound``."""

    def uniform(self, groups: int, m: int) -> Plain:
        """Uniform mod n, from the operating system's generator."""

    def encrypt(self, plain: Plain) -> Rows:
        """Fresh ciphertexts, in C order."""

    def read(self, rows: Rows, groups: int, m: int, what: str) -> Any:
        """Ciphertexts of the peer; DataError where they are none, or of another number."""

    def matmul(self, ciphertexts: Any, multipliers: np.ndarray, bits: int) -> Any:
        """``[groups, k]`` times uint64 ``[k, m]``, each below 2**bits."""

    def times(self, ciphertexts: Any, multipliers: np.ndarray, bits: int) -> Any:
        """``[groups, m]`` times uint64 ``[m]``, each below 2**bits."""

    def times_each(self, ciphertexts: Any, multipliers: np.ndarray, bits: int, slots: Slots) -> Any:
        """``[groups, k]`` and uint64 ``[k, m]``: column j is made of the group in which slot j lies, ``[1, m]``."""

    def spread(self, ciphertexts: Any, multipliers: np.ndarray, bits: int, slots: Slots) -> Any:
        """``[1, m]``, one number each, times uint64 vectors ``[length, m]``: ``[groups, m]`` as ``slots`` say."""

    def finish(self, ciphertexts: Any, plain: Plain) -> Rows:
        """Adds plaintexts to what was computed, and hides how it was: what may go to the holder of the private key."""

    def to_rows(self, plain: Plain) -> Rows:
        """Plaintexts mod n as bytes."""

    def from_rows(self, rows: Rows, groups: int, m: int, what: str) -> Plain:
        """Plaintexts mod n from the peer's bytes; DataError where they are none, or of another number."""


class PrivateScheme(PublicScheme, Protocol):
    """Whoever has the private key can do this too.

    Attributes:
      secret: 32 bytes that nobody else can know, always the same.
    """

    secret: bytes

    def decrypt(self, rows: Rows, groups: int, m: int, what: str) -> Plain:
        """Plaintexts mod n; DataError where rows are no ciphertexts, or of another number."""
