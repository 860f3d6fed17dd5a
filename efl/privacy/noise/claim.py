"""A folder that one process at a time writes to, however often that process opens it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import weakref
from pathlib import Path

from efl.errors import CheckpointError

_NAME = ".lock"
_SHOWN = 4096  # bytes of what the holder says of itself


class Claim:
    """This process' claim to a folder; it ends when nobody refers to it any more.

    A lock belongs to an open file: a process that opened the folder twice would lock itself out. So all who claim it in
    one process hold the same claim, and the last of them is the one that may write.
    """

    def __init__(self, path: Path, handle: int) -> None:
        self.path = path
        self._turn = 0
        self._handle: int | None = handle

    @classmethod
    def of(cls, folder: Path) -> tuple[Claim, int]:
        """Claims a folder that exists.

        Returns:
          The claim, and the number of this turn, for ``holds``.

        Raises:
          CheckpointError: Another process has it, or it cannot be locked.
        """
        path = folder.resolve() / _NAME
        with _guard:
            held = _claims.get(path)
            if held is None or not held._stands():
                held = _claims[path] = cls(path, _lock(path))
            held._turn += 1
            return held, held._turn

    def holds(self, turn: int) -> bool:
        """Whether nobody has claimed the folder since, and this is not a fork of the process that did."""
        return self._handle is not None and turn == self._turn

    def _stands(self) -> bool:
        """Whether it is to the file that others will find: the folder may have been deleted and made again."""
        try:
            return self._handle is not None and os.path.samestat(os.fstat(self._handle), os.stat(self.path))
        except OSError:
            return False

    def _drop(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def __del__(self) -> None:
        self._drop()


_guard = threading.Lock()
_claims: weakref.WeakValueDictionary[Path, Claim] = weakref.WeakValueDictionary()


def _lock(path: Path) -> int:
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise CheckpointError(f"the ledger of releases in {path.parent} cannot be opened: {error}") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"pid {os.getpid()}, in {_here()}".encode(errors="replace"), 0)
    except BlockingIOError:
        owner = ""
        with contextlib.suppress(OSError):
            owner = os.pread(handle, _SHOWN, 0).decode(errors="replace")
        os.close(handle)
        raise CheckpointError(
            f"the ledger of releases {path.with_name('releases')} is in use by another process "
            f"({owner or 'unknown'}): two that write to it would mix up what was released. Wait for its end, or stop "
            "it; an evaluation that releases something (GaussianRelease) runs before or after training, not beside it"
        ) from None
    except OSError as error:
        os.close(handle)
        raise CheckpointError(f"the ledger of releases in {path.parent} cannot be locked: {error}") from None
    return handle


def _here() -> str:
    try:
        return os.getcwd()
    except OSError:
        return "a folder that is gone"


def _in_child() -> None:
    # A forked worker shares the open file: the lock would outlive the process that was killed. The parent's own handle
    # is another one, and holds.
    global _guard
    _guard = threading.Lock()  # a thread that is not in the child may have held it
    for held in list(_claims.values()):
        held._drop()
    _claims.clear()


os.register_at_fork(after_in_child=_in_child)
