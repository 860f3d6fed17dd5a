"""Do both parties' batches hold the same rows in the same order? Digests, without TensorFlow or network.

Each side turns the sample ids of a batch into bytes in one canonical form, and into one keyed digest (BLAKE2b, 16
bytes). The key is fresh for every run and made of a nonce of each party, so digests of different runs cannot be
compared. Only after a mismatch are digests of single rows (8 bytes each) exchanged, once, to name the first difference.

What a peer learns: whether the batches are equal; after a mismatch also which of *its own* ids stand in which rows. Both
parties know the key, so a peer who can guess an id can check the guess against a row digest. Use aliases as sample ids
where the ids themselves must not be guessed at.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

DIGEST_BYTES = 16
ROW_DIGEST_BYTES = 8


def derive_key(nonces: Iterable[bytes]) -> bytes:
    """The key of one run, from a nonce of each party, in any order."""
    return hashlib.blake2b(b"".join(sorted(nonces)), digest_size=32, person=b"efl-sample-ids").digest()


def canonical_kind(dtype: np.dtype) -> str:
    """``"int"`` or ``"string"``; both parties must hold ids of the same kind."""
    return "int" if dtype.kind in "iu" else "string"


def _rows(ids: np.ndarray) -> list[bytes]:
    flat = ids.reshape(-1)
    if canonical_kind(flat.dtype) == "int":
        return [int(v).to_bytes(8, "little", signed=True) for v in flat]
    return [v if isinstance(v, bytes) else str(v).encode() for v in flat]


@dataclass(frozen=True)
class Batch:
    """The ids of one party's batch and where its rows came from.

    Attributes:
      ids: [batch] or [batch, 1], integers or bytes.
      block: [batch] int64, index of the block of each row, or None.
      row: [batch] int64, row within that block, or None.
    """

    ids: np.ndarray
    block: np.ndarray | None = None
    row: np.ndarray | None = None

    @property
    def size(self) -> int:
        return int(self.ids.size)

    def digest(self, key: bytes) -> bytes:
        """One keyed digest of the whole batch: its kind, its size, every id in order. 16 bytes."""
        kind = canonical_kind(self.ids.dtype)
        state = hashlib.blake2b(digest_size=DIGEST_BYTES, key=key, person=b"batch")
        state.update(f"{kind}:{self.ids.size}:".encode())
        if kind == "int":
            state.update(np.ascontiguousarray(self.ids, dtype="<i8").data)
        else:
            for value in _rows(self.ids):
                state.update(len(value).to_bytes(4, "little"))
                state.update(value)
        return state.digest()

    def row_digests(self, key: bytes, limit: int) -> list[bytes]:
        """Keyed digests of the first ``limit`` rows, 8 bytes each."""
        return [
            hashlib.blake2b(value, digest_size=ROW_DIGEST_BYTES, key=key, person=b"row").digest()
            for value in _rows(self.ids)[:limit]
        ]


def first_difference(mine: list[bytes], peer: list[bytes]) -> int | None:
    """Index of the first row whose digests differ (or that only one side has); None where all are equal."""
    for index, (a, b) in enumerate(zip(mine, peer)):
        if a != b:
            return index
    return None if len(mine) == len(peer) else min(len(mine), len(peer))
