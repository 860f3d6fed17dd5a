"""Which labels were randomised: that a sample id keeps its label, and what may be answered, for ever.

A label is randomised by a function of its sample id. Were an id to come with one label today and another tomorrow, or
with another prior, the two answers together would tell more than one answer may, up to everything. So each id is
remembered, by 16 bytes that tell nothing to whoever does not know the secret seed: a *tag* of the id, and a *mark* of
the label and the allowed answers.
"""

from __future__ import annotations

import logging
import os
import struct
import zlib
from pathlib import Path

import numpy as np

from efl.errors import CheckpointError

_log = logging.getLogger("efl")
_BLOCK = struct.Struct("<II")  # ids, checksum; then their tags, then their marks
_NUMBER = np.dtype("<u8")


class Register:
    """Tags and marks, in memory (16 bytes an id) and in a file to which new ones are appended. For one thread.

    Args:
      path: The file; None keeps them in memory.

    Raises:
      CheckpointError: The file is damaged.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._tags = self._marks = np.empty(0, _NUMBER)  # sorted by tag
        self._recent: dict[int, int] = {}  # tag -> mark, not yet sorted in
        self._file: int | None = None
        if path is not None:
            self._read(path)
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def __len__(self) -> int:
        return len(self._tags) + len(self._recent)

    def contradicts(self, tags: np.ndarray, marks: np.ndarray) -> np.ndarray:
        """Remembers ids that are new, unless an id contradicts what is known of it.

        Args:
          tags: uint64 ``[B]``.
          marks: uint64 ``[B]``.

        Returns:
          bool ``[B]``: which rows contradict. Where any does, nothing of the batch is remembered.

        Raises:
          CheckpointError: The file cannot be written.
        """
        place = np.searchsorted(self._tags, tags)
        if len(self._tags):
            place[place == len(self._tags)] = 0
            known = self._tags[place] == tags
            wrong = known & (self._marks[place] != marks)
        else:
            known = wrong = np.zeros(len(tags), bool)
        fresh: dict[int, int] = {}
        for row in np.flatnonzero(~known):
            tag, mark = int(tags[row]), int(marks[row])
            held = self._recent.get(tag, fresh.get(tag))
            if held is None:
                fresh[tag] = mark
            elif held != mark:
                wrong[row] = True
        if fresh and not wrong.any():
            self._append(fresh)
            self._recent.update(fresh)
            if len(self._recent) > max(4096, len(self._tags) // 8):
                self._sort(_arrays(self._recent))
                self._recent = {}
        return wrong

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _append(self, fresh: dict[int, int]) -> None:
        if self._file is None:
            return
        held = np.concatenate(_arrays(fresh)).tobytes()
        try:
            os.write(self._file, _BLOCK.pack(len(fresh), zlib.crc32(held)) + held)
        except OSError as error:
            raise CheckpointError(
                f"{self._path} cannot be written ({error.strerror}), so no label may be randomised: make room, then "
                "start again"
            ) from None

    def _sort(self, more: tuple[np.ndarray, np.ndarray]) -> None:
        tags, marks = (np.concatenate(pair) for pair in zip((self._tags, self._marks), more))
        order = np.argsort(tags, kind="stable")
        self._tags, self._marks = tags[order], marks[order]

    def _read(self, path: Path) -> None:
        data = path.read_bytes() if path.exists() else b""
        position, parts = 0, []
        while position + _BLOCK.size <= len(data):
            count, checksum = _BLOCK.unpack_from(data, position)
            end = position + _BLOCK.size + 16 * count
            if count and end > len(data):
                break
            held = data[position + _BLOCK.size : end]
            if not count or zlib.crc32(held) != checksum:
                raise CheckpointError(
                    f"{path}: damaged, so nobody knows any more which labels were randomised; restore the file from a "
                    "copy. Without it training goes on, but a sample id whose label or prior has changed is not noticed"
                )
            parts.append(np.frombuffer(held, _NUMBER).reshape(2, count))
            position = end
        if position < len(data):  # its step was never finished; it will be taken again
            _log.warning("%s: its last block is torn", path)
            os.truncate(path, position)
        if parts:
            whole = np.concatenate(parts, 1)
            self._sort((whole[0], whole[1]))


def _arrays(held: dict[int, int]) -> tuple[np.ndarray, np.ndarray]:
    count = len(held)
    return np.fromiter(held.keys(), _NUMBER, count), np.fromiter(held.values(), _NUMBER, count)
