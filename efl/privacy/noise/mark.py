"""How far a ledger had come: kept where training goes on from, to see later whether the ledger is still the same."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_AT_ONCE = 1 << 20  # bytes


class Written:
    """What a file holds that is only ever appended to: its length and digest."""

    def __init__(self) -> None:
        self._bytes, self._digest = 0, _hash()

    def add(self, data: bytes | memoryview) -> None:
        """Notes what was appended."""
        self._bytes += len(data)
        self._digest.update(data)

    def mark(self) -> dict[str, Any]:
        """JSON values, for ``begins_so``."""
        return {"bytes": self._bytes, "digest": self._digest.hexdigest()}


def begins_so(path: Path, mark: Mapping[str, Any]) -> bool:
    """Whether a file begins with what it held when a mark was made.

    A number of records would not do: a ledger that was begun anew has as many after a while.
    """
    left, digest = int(mark["bytes"]), _hash()
    try:
        with open(path, "rb") as file:
            while left and (data := file.read(min(left, _AT_ONCE))):
                left -= len(data)
                digest.update(data)
    except FileNotFoundError:
        pass
    return left == 0 and digest.hexdigest() == mark["digest"]


def _hash() -> hashlib.blake2b:
    return hashlib.blake2b(digest_size=16)
