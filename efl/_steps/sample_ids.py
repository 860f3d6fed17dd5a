"""Do both parties' batches hold the same rows in the same order? Digests, without TensorFlow or network.

Each side turns the sample ids of a batch into bytes in one canonical form, and into one keyed digest (BLAKE2b, 16
bytes). The key is fresh for every run and made of a nonce of each party, so digests of different runs cannot be
compared. Only after a mismatch are digests of single rows (8 bytes each) exchanged, once, to name the first difference.

What a peer learns: whether the batches are equal; after a mismatch also which of *its own* ids stand in which rows.
Both parties know the key, so a peer who can guess an id can check the guess against a row digest. Use aliases as sample
ids where the ids themselves must not be guessed at.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

DIGEST_BYTES = 16
ROW_DIGEST_BYTES = 8
_ROWS_LIMIT = 60_000  # row digests in one control message: under 1 MiB as base64


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


class IdLedger:
    """What is known about the sample ids of one scope's recent steps, on both sides. Not thread-safe.

    Attributes:
      blocks: Names behind the block indices of this party's rows.
      size_agreed: Whether the handshake compared the parties' batch sizes, so that a shorter batch is the end of data.
      disputed: The step whose ids differ, once that is known.
    """

    def __init__(self) -> None:
        self.blocks: Sequence[str] = ()
        self.size_agreed = False
        self.disputed: int | None = None
        self._batches: dict[int, Batch] = {}
        self._mine: dict[int, bytes] = {}
        self._peers: dict[int, bytes] = {}
        self._told = 0

    def note(self, step: int, batch: Batch, digest: bytes) -> None:
        """Takes this party's batch of a step, and its digest."""
        self._batches[step], self._mine[step] = batch, digest

    def hear(self, step: int, digest: bytes) -> None:
        """Takes the peer's digest of a step."""
        self._peers[step] = digest

    def agrees(self, step: int) -> bool:
        """False where both digests of a step are known and differ."""
        mine, peers = self._mine.get(step), self._peers.get(step)
        return mine is None or peers is None or mine == peers

    def to_tell(self, step: int) -> bytes:
        """This party's digest of a step, once; ``b""`` where there is none or it was told."""
        digest = b"" if self._told == step else self._mine.get(step, b"")
        if digest:
            self._told = step
        return digest

    def size(self, step: int) -> int | None:
        """How many rows this party's batch of a step has; None where the step is not held."""
        return self._batches[step].size if step in self._batches else None

    def rows(self, step: int, key: bytes) -> dict[str, Any] | None:
        """Row digests of a step as the body of a control message; None where the step is not held."""
        batch = self._batches.get(step)
        if batch is None:
            return None
        rows = b"".join(batch.row_digests(key, _ROWS_LIMIT))
        return {"size": batch.size, "rows": base64.b64encode(rows).decode()}

    def verdict(self, step: int, key: bytes, body: Mapping[str, Any], role: str, peer_role: str) -> str:
        """In words, where this party's batch differs from the one whose ``rows`` the peer sent.

        Raises:
          KeyError, TypeError, ValueError: ``body`` is malformed.
        """
        raw, size = base64.b64decode(body["rows"], validate=True), int(body["size"])
        batch = self._batches[step]
        theirs = [raw[i : i + ROW_DIGEST_BYTES] for i in range(0, len(raw), ROW_DIGEST_BYTES)]
        index = first_difference(batch.row_digests(key, _ROWS_LIMIT), theirs)
        if index is None:
            where = "the first difference is beyond the rows that were compared"
        else:
            where = f"the first difference is in row {index} of the batch{self._origin(batch, index, role)}"
        if size == batch.size:
            return where
        sizes = f"{role}'s batch has {batch.size} rows, {peer_role}'s {size}"
        if index == min(size, batch.size):
            advice = "give both the same batch size"
            if self.size_agreed:
                advice = self._end_of_data(batch, size, role, peer_role)
            return f"{sizes}, and as far as both go they are equal: {advice}"
        return f"{sizes}; {where}"

    def forget(self, before: int) -> None:
        """Drops steps below ``before``."""
        for memory in (self._batches, self._mine, self._peers):
            for step in [s for s in memory if s < before]:
                del memory[step]

    def clear(self) -> None:
        """Forgets every step, not the blocks."""
        self.disputed, self._told = None, 0
        for memory in (self._batches, self._mine, self._peers):
            memory.clear()

    def _end_of_data(self, batch: Batch, size: int, role: str, peer_role: str) -> str:
        """Where batches are equally large, the shorter of two is the last of its party's data."""
        shorter = role if batch.size < size else peer_role
        place = self._place(batch, min(batch.size, size) - 1)
        where = "" if place is None else f" after row {place[1]} of block {place[0]}"
        block = "the blocks" if place is None else f"block {place[0]}"
        return (
            f"{shorter}'s data ends there{where}, which the other's does not. Compare how many records {block} has on "
            "both sides: a file may have been cut off or written only in part"
        )

    def _origin(self, batch: Batch, index: int, role: str) -> str:
        place = self._place(batch, index)
        return "" if place is None else f" (at {role}: block {place[0]}, row {place[1]} of it)"

    def _place(self, batch: Batch, index: int) -> tuple[str, int] | None:
        """Name of the block of a row of the batch, and the row's number in it."""
        if batch.block is None or batch.row is None or not 0 <= index < batch.size:
            return None
        block = int(batch.block.reshape(-1)[index])
        name = self.blocks[block] if 0 <= block < len(self.blocks) else f"number {block}"
        return name, int(batch.row.reshape(-1)[index])


def first_difference(mine: list[bytes], peer: list[bytes]) -> int | None:
    """Index of the first row whose digests differ (or that only one side has); None where all are equal."""
    for index, (a, b) in enumerate(zip(mine, peer, strict=False)):
        if a != b:
            return index
    return None if len(mine) == len(peer) else min(len(mine), len(peer))
