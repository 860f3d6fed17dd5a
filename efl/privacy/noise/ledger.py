"""What was released: an append-only record that no rollback of training rewinds.

A folder with two files. ``terms`` has a line of JSON for each set of terms under which something was released;
``releases`` a record of fixed size for each release. A release is in the file before its value leaves; that the file is
on disk is certain only in blocks, since waiting for the disk in every step would cost milliseconds: a *reservation* of
the next releases is written and synchronised ahead. After a crash of the process nothing is missing, for the operating
system has the records. After a crash of the machine (another boot id than the reservation's) what was reserved and is
not there counts as used, under the terms of the last release: too much, never too little.

Records name their terms by a number, so a second process that adds terms would mix them up: one at a time has the
folder.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import struct
import threading
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from efl.errors import CheckpointError
from efl.privacy.noise.claim import Claim
from efl.privacy.noise.mark import Written, begins_so
from efl.privacy.noise.phase import Held, Phase, Terms
from efl.privacy.noise.phase import Runs as Runs

_log = logging.getLogger("efl")
# checksum | kind, terms | rows | step | digest, stream, number in it
_RECORD = struct.Struct("<IHHIQ16s16sQ")
_RELEASE, _RESERVATION, _CLOSED, _LOST, _REPLAY, _BEGUN, _ENDED = range(1, 8)
_RESERVED = 1000  # releases
_REMEMBERED = 100_000  # digests; a replay of an older one is counted again, which is too much
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

Drawn = tuple[bytes, int]  # which noise a release has: 16 bytes that name a stream, the number of a draw in it


class Ledger:
    """The releases of one party. Methods may be called from any thread; one process has it open."""

    def __init__(self, folder: Path | None) -> None:
        """Opens a ledger, or makes one.

        Args:
          folder: Where it lies; None keeps it in memory.

        Raises:
          CheckpointError: It is damaged, or another process has it open.
        """
        self._folder = folder
        self._lock = threading.Lock()
        self._terms: list[Terms] = []
        self._number_of: dict[str, int] = {}
        self._phases: dict[int, Held] = {}  # by number of the terms
        self._begun = self._ended = 0  # conversations with a peer
        self._seen: dict[bytes, Drawn] = {}
        self._recent: dict[str, int] = {}  # group -> number of its last terms, since the reservation
        self._left = 0  # of the reservation
        self._file: int | None = None
        self._written = Written()
        self._claim: Claim | None = None
        self._turn = 0
        if folder is not None:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._claim, self._turn = Claim.of(folder)
            try:
                self._read_terms()
                self._read_releases()
            except BaseException:
                self._claim = None
                raise

    @classmethod
    def in_memory(cls) -> Ledger:
        """One that ends with the process."""
        return cls(None)

    def enter(self, terms: Terms, step: int, rows: int, digest: bytes, drawn: Drawn) -> Drawn:
        """Records a release that is about to leave.

        Args:
          terms: What it is and under which conditions: JSON values (group, clip, noise_multiplier, …).
          step: Training step.
          rows: Rows of the batch.
          digest: 16 bytes; equal ones are the same release.
          drawn: The noise that it is to have, if it is a new one; never used before.

        Returns:
          The noise that it must have: ``drawn``, or that of the earlier release of which it is a replay, which is not
          counted again.

        Raises:
          CheckpointError: It cannot be written, or was opened once more in this process.
        """
        with self._lock:
            if self._claim is not None and not self._claim.holds(self._turn):
                raise CheckpointError(
                    f"the ledger of releases in {self._folder} was opened once more in this process, or this is a fork "
                    "of the one that opened it: two that write to it would mix up what was released. Let one fit end "
                    "before another begins"
                )
            earlier = self._seen.get(digest)
            number = self._number(terms)
            try:
                if self._file is not None:
                    if earlier is not None:
                        self._append(_REPLAY, number, rows, step, digest)
                    else:
                        if self._left == 0:
                            self._reserve()
                        self._append(_RELEASE, number, rows, step, digest, drawn)
            except OSError as error:
                raise CheckpointError(
                    f"the ledger of releases in {self._folder} cannot be written ({error.strerror}), so nothing may be "
                    "released: make room, then start again"
                ) from None
            if earlier is not None:
                self._held(number).tries.add(step)
                return earlier
            self._left -= 1
            self._count(number, rows, step)
            self._remember(digest, drawn)
            return drawn

    def phases(self) -> list[Phase]:
        """What was released, in the order in which terms came up first."""
        with self._lock:
            return [held.phase(self._terms[number]) for number, held in self._phases.items()]

    def conversation_begun(self) -> None:
        """Notes that this party and its peer begin to train together, or begin again."""
        with self._lock:
            self._begun += 1
            if self._file is not None:
                self._append(_BEGUN, 0, 0, 0, b"")

    def conversation_ended(self) -> None:
        """Notes that both have done all that was agreed when they began."""
        with self._lock:
            self._ended += 1
            if self._file is not None:
                self._append(_ENDED, 0, 0, 0, b"")

    @property
    def broken_off(self) -> int:
        """How many conversations did not end so. In the last step of each the peer may have released more than this
        party.
        """
        with self._lock:
            return max(0, self._begun - self._ended)

    def mark(self) -> dict[str, Any] | None:
        """How far it has come, in JSON values, for ``lacks``; None in memory. All of that is on disk then.

        Raises:
          CheckpointError: It cannot be brought there.
        """
        with self._lock:
            if self._file is None:
                return None
            try:
                os.fsync(self._file)
            except OSError as error:
                raise CheckpointError(
                    f"the ledger of releases in {self._folder} cannot be written ({error.strerror})"
                ) from None
            return {**self._written.mark(), "releases": self._releases()}

    def lacks(self, mark: Mapping[str, Any]) -> str:
        """What is missing of what stood here when a mark was made, in words; "" where nothing is."""
        with self._lock:
            if self._folder is None or begins_so(self._folder / "releases", mark):
                return ""
            had, has = int(mark["releases"]), self._releases()
            found = (
                f"{had - has} of them or more are missing"
                if has < had
                else "other ones: it was cut off or begun anew since"
            )
            return f"{self._folder / 'releases'} had {had} releases then, and has {has} now, {found}"

    def rest(self) -> None:
        """Gives back what is left of the reservation, and has all that was entered on disk.

        Call it before steps are taken again: only of steps that follow each other is it known what may be lost.
        """
        with self._lock:
            if self._file is not None and self._left:
                self._append(_CLOSED, 0, 0, 0, b"")
                os.fsync(self._file)
                self._left = 0

    def close(self) -> None:
        """Gives back what is left of the reservation. Call it when nothing more will be released."""
        with self._lock:
            if self._file is not None:
                if self._left:
                    self._append(_CLOSED, 0, 0, 0, b"")
                    os.fsync(self._file)
                os.close(self._file)
                self._file = self._claim = None

    # ---- writing

    def _number(self, terms: Terms) -> int:
        text = json.dumps(dict(terms), sort_keys=True)
        if text not in self._number_of:
            if len(self._terms) >= 1 << 16:
                raise CheckpointError(f"the ledger in {self._folder} holds too many different terms")
            self._number_of[text] = len(self._terms)
            self._terms.append(json.loads(text))
            if self._folder is not None:
                line = f"{zlib.crc32(text.encode()):08x} {text}\n".encode()
                _append_line(self._folder / "terms", line)
        return self._number_of[text]

    def _reserve(self) -> None:
        assert self._file is not None
        self._append(_RESERVATION, 0, _RESERVED, 0, _boot())
        os.fsync(self._file)
        self._left, self._recent = _RESERVED, {}

    def _append(self, kind: int, number: int, rows: int, step: int, digest: bytes, drawn: Drawn = (b"", 0)) -> None:
        assert self._file is not None
        record = _RECORD.pack(0, kind, number, rows, step, digest, *drawn)
        record = struct.pack("<I", zlib.crc32(record[4:])) + record[4:]
        written = os.write(self._file, record)
        if written < len(record):  # whatever came after half a record could not be read
            os.ftruncate(self._file, os.fstat(self._file).st_size - written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._written.add(record)

    def _releases(self) -> int:
        return sum(held.releases for held in self._phases.values())

    def _held(self, number: int) -> Held:
        return self._phases.setdefault(number, Held())

    def _count(self, number: int, rows: int, step: int) -> None:
        """Counts a release."""
        held = self._held(number)
        held.releases += 1
        held.rows = max(held.rows, rows)
        held.tries.add(step)
        if held.steps.add(step):
            held.all_rows += rows
        self._note(number)

    def _count_lost(self, number: int, releases: int) -> None:
        """Counts releases that may have been."""
        held = self._held(number)
        held.releases += releases
        held.lost += releases

    def _note(self, number: int) -> None:
        self._recent[str(self._terms[number].get("group"))] = number

    def _remember(self, digest: bytes, drawn: Drawn) -> None:
        self._seen[digest] = drawn
        if len(self._seen) > _REMEMBERED:
            del self._seen[next(iter(self._seen))]

    # ---- reading

    def _read_terms(self) -> None:
        assert self._folder is not None
        path = self._folder / "terms"
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        for number, line in enumerate(lines, 1):
            checksum, _, text = line.decode("utf-8", "replace").rstrip("\n").partition(" ")
            if not line.endswith(b"\n") and number == len(lines):
                os.truncate(path, path.stat().st_size - len(line))  # never finished, so nothing was released under it
                break
            if checksum != f"{zlib.crc32(text.encode()):08x}":
                raise CheckpointError(
                    f"{path}, line {number}: damaged; restore the file from a copy, or count its run as lost"
                )
            self._number_of[text] = len(self._terms)
            self._terms.append(json.loads(text))

    def _read_releases(self) -> None:
        assert self._folder is not None
        path = self._folder / "releases"
        data = path.read_bytes() if path.exists() else b""
        torn = len(data) % _RECORD.size
        if torn:
            _log.warning("%s: its last record is torn; what it stood for is counted as released", path)
            os.truncate(path, len(data) - torn)
        whole, reserved_in, before = memoryview(data)[: len(data) - torn], b"", self._recent
        self._written.add(whole)
        for position, (kind, number, rows, step, digest, *drawn) in enumerate(_records(path, whole)):
            if kind == _RESERVATION:
                self._left, reserved_in, before = rows, digest, self._recent
                self._recent = {}
            elif kind in (_CLOSED, _LOST):
                self._left = 0
                if rows:
                    self._count_lost(number, rows)
            elif kind == _RELEASE and number < len(self._terms):
                self._left = max(0, self._left - 1)
                self._count(number, rows, step)
                self._remember(digest, (drawn[0], drawn[1]))
            elif kind == _REPLAY and number < len(self._terms):
                self._held(number).tries.add(step)
            elif kind == _BEGUN:
                self._begun += 1
            elif kind == _ENDED:
                self._ended += 1
            else:
                raise CheckpointError(f"{path}, record {position}: unknown; was it written by a newer efl?")
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        if self._left:
            self._settle(torn > 0 or reserved_in != _boot(), before)

    def _settle(self, may_be_lost: bool, before: Mapping[str, int]) -> None:
        """Says once and for all what became of a reservation that nobody gave back."""
        assert self._file is not None
        # Whoever released since the reservation may have released all that is missing. Where nobody has, whoever had
        # before; without terms nothing was released.
        numbers = sorted((self._recent or before or {"": len(self._terms) - 1}).values())
        lost = self._left if may_be_lost and numbers[-1] >= 0 else 0
        if lost:
            _log.warning(
                "ledger of releases in %s: the machine went down with up to %d releases not yet on disk; all of them "
                "are counted",
                self._folder,
                lost,
            )
            for number in numbers:
                self._count_lost(number, lost)
        for number in numbers:
            self._append(_LOST, max(number, 0), lost, 0, b"")
        os.fsync(self._file)
        self._left = 0


def _records(path: Path, data: memoryview) -> Iterator[tuple[Any, ...]]:
    for position in range(0, len(data), _RECORD.size):
        checksum, *fields = _RECORD.unpack_from(data, position)
        if checksum != zlib.crc32(data[position + 4 : position + _RECORD.size]):
            raise CheckpointError(
                f"{path}, record {position // _RECORD.size}: damaged, so nobody knows what was released; restore the "
                "file from a copy, or count its run as lost"
            )
        yield tuple(fields)


def _boot() -> bytes:
    """16 bytes that differ after the machine was started anew; random where it does not say."""
    try:
        return bytes.fromhex(_BOOT_ID.read_text().strip().replace("-", ""))
    except (OSError, ValueError):
        return os.urandom(16)


def _append_line(path: Path, line: bytes) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(handle, line)
        os.fsync(handle)
    finally:
        os.close(handle)
