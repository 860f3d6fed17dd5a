"""Checkpoints of one party: a folder per position, written beside and renamed, so that it is whole or absent.

``<checkpoint_dir>/<role>/<task_index>/step-0000000100-fit-1-loop-0000-at-0000000100/`` holds the saver's files
(``model.*``) and ``state.json`` (stage, procedure, the lineage that wrote it, and a SHA-256 of every file and of
itself, so that a torn or changed checkpoint is recognised and skipped). The graph is not written: one-shot iterators
hold their data as constants in it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import tensorflow.compat.v1 as tf

from efl._position import Position
from efl.errors import CheckpointError

_log = logging.getLogger("efl")
_STATE = "state.json"
_PREFIX = "model"
_SCRATCH = ".writing"
_REPLACED = ".replaced-"
_VERSION = 4
Known = tuple[Position, str]  # a position, and the lineage that wrote it


class CheckpointStore:
    """The checkpoints of one party in one folder.

    Args:
      folder: Where they lie; made when it is locked, or when the first one is saved.
      keep: How many of the newest to keep, in the order in which they were written; pinned ones are kept beside them.

    Attributes:
      pinned: The newest one that both parties are known to hold. It is kept whatever was written after it.
    """

    def __init__(self, folder: Path, keep: int = 5) -> None:
        self.folder = folder
        self.pinned: Known | None = None
        self._keep = max(1, keep)
        self._whole: dict[Position, dict[str, Any]] = {}  # manifests of those whose files were compared
        self._damaged: set[Position] = set()
        self._lock: IO[str] | None = None

    # ---- one process at a time

    def lock(self) -> None:
        """Claims the folder for this process, until ``unlock`` or its end.

        Raises:
          CheckpointError: Another process has it, it cannot be written, or it holds what another version wrote.
        """
        if self._lock is not None:
            return
        path = self.folder / ".lock"
        try:
            _make(self.folder)
            file = open(path, "a+")  # noqa: SIM115 - held for the life of the run
        except OSError as error:
            raise CheckpointError(f"cannot write checkpoints below {self.folder}: {error}") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            owner = file.read(50).strip() or "unknown"
            file.close()
            raise CheckpointError(
                f"{self.folder} is in use by another process (pid {owner}): an earlier run that has not ended? "
                "Stop it, or use another checkpoint_dir"
            ) from None
        try:
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), str(os.getpid()).encode())
        except OSError as error:
            file.close()
            raise CheckpointError(f"cannot write checkpoints below {self.folder}: {error}") from None
        self._lock = file
        _close_in_children(file)
        self._clean()
        strange = [entry.name for entry in self.folder.glob("step-*") if Position.of(entry.name) is None]
        if strange:
            self.unlock()
            raise CheckpointError(
                f"{self.folder} holds {max(strange)}, which no run of this version of efl wrote: go on with the "
                "version that did, or use another checkpoint_dir"
            )

    def unlock(self) -> None:
        """Gives the folder up."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _clean(self) -> None:
        # What a writer that died left: half a checkpoint, or the one that it was about to replace.
        for entry in list(self.folder.iterdir()):
            if entry.name.startswith(_SCRATCH):
                shutil.rmtree(entry, ignore_errors=True)
            elif entry.name.startswith(_REPLACED):
                whole = self.folder / entry.name[len(_REPLACED) :]
                if whole.exists():
                    shutil.rmtree(entry, ignore_errors=True)
                else:
                    os.rename(entry, whole)

    # ---- looking

    def look_again(self) -> None:
        """Forgets which checkpoints were found whole: they lie on a disk, and a run may last for weeks."""
        self._whole, self._damaged = {}, set()

    def known(self) -> list[Known]:
        """All whole checkpoints, ascending; damaged ones are left out with a warning."""
        # Asked in the thread that reads a newcomer's hello as well, while the run may be pruning.
        manifests = ((position, self._whole.get(position)) for position in self._sound())
        return [(position, str(manifest["state"]["run"])) for position, manifest in manifests if manifest is not None]

    def prefix(self, position: Position) -> str:
        """What ``tf.train.Saver.restore`` takes for that position."""
        return str(self._path(position) / _PREFIX)

    def state(self, position: Position) -> dict[str, Any]:
        """The state saved beside the variables."""
        return dict(self._manifest(position)["state"])

    def newest(self) -> Position | None:
        """The newest whole checkpoint, whoever else holds it."""
        sound = self._sound()
        return sound[-1] if sound else None

    # ---- writing

    def _reclaim(self) -> None:
        """Claims the folder again where somebody has deleted it, and this process' claim with it."""
        if self._lock is None:
            return
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(self._lock.fileno()), os.stat(self.folder / ".lock")):
                return
        _log.warning("%s was deleted while it was in use: the checkpoints that lay there are gone", self.folder)
        self._lock.close()
        self._lock = None
        self.lock()

    def save(self, session: tf.Session, saver: tf.train.Saver, position: Position, state: dict[str, Any]) -> Path:
        """Writes one checkpoint; a failure leaves the earlier ones as they are.

        Raises:
          CheckpointError: The folder cannot be written.
        """
        target, scratch = self._path(position), self.folder / f"{_SCRATCH}-{position.name}"
        replaced = self.folder / f"{_REPLACED}{position.name}"
        self._reclaim()
        try:
            _make(self.folder)
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir()
            saver.save(session, str(scratch / _PREFIX), write_meta_graph=False, write_state=False)
            files = sorted(scratch.iterdir())
            manifest: dict[str, Any] = {
                "version": _VERSION,
                "serial": self._next_serial(),
                "files": {file.name: _digest(file) for file in files},
                "state": json.loads(json.dumps(state)),  # as it will be read
            }
            manifest["checksum"] = _checksum(manifest)
            with open(scratch / _STATE, "w") as file:
                json.dump(manifest, file, indent=1)
            for path in [*files, scratch / _STATE, scratch]:
                _synchronise(path)
            if target.exists():  # of a run that a rollback has left behind
                shutil.rmtree(replaced, ignore_errors=True)
                os.rename(target, replaced)
            os.rename(scratch, target)
            _synchronise(self.folder)
        except (OSError, tf.errors.OpError) as error:
            shutil.rmtree(scratch, ignore_errors=True)
            raise CheckpointError(
                f"cannot write checkpoint {target}: {reason_of(error)}. The earlier ones are whole: make room (or "
                "repair what is wrong there), then start again as before, and the run goes on from the newest of them"
            ) from None
        shutil.rmtree(replaced, ignore_errors=True)
        self._whole[position] = manifest
        self._damaged.discard(position)
        self._prune()
        return target

    def _next_serial(self) -> int:
        return 1 + max((self._manifest(position)["serial"] for position in self._sound()), default=0)

    def _prune(self) -> None:
        # In the order of writing: what a rollback has left behind goes before what was written after it.
        sound = sorted(self._sound(), key=lambda position: self._manifest(position)["serial"])
        pinned = None if self.pinned is None else self.pinned[0]
        for position in sound[: -self._keep]:
            if position != pinned:
                # Renamed first: whoever looks or dies meanwhile must not find half of one.
                going = self.folder / f"{_SCRATCH}-gone-{position.name}"
                shutil.rmtree(going, ignore_errors=True)
                with contextlib.suppress(OSError):  # what cannot go stays; the new one is written
                    os.rename(self._path(position), going)
                self._whole.pop(position, None)
                shutil.rmtree(going, ignore_errors=True)

    # ---- private

    def _path(self, position: Position) -> Path:
        return self.folder / position.name

    def _sound(self) -> list[Position]:
        if not self.folder.is_dir():
            return []
        there = (Position.of(entry.name) for entry in self.folder.iterdir())
        return sorted(position for position in there if position is not None and self._compare(position))

    def _manifest(self, position: Position) -> dict[str, Any]:
        self._compare(position)
        return self._whole[position]

    def _compare(self, position: Position) -> bool:
        if position in self._whole or position in self._damaged:
            return position in self._whole
        folder = self._path(position)
        try:
            manifest = json.loads((folder / _STATE).read_text())
            good = manifest["checksum"] == _checksum(manifest)
            good = good and all(_digest(folder / name) == digest for name, digest in manifest["files"].items())
            good = good and isinstance(manifest["serial"], int) and isinstance(manifest["state"]["run"], str)
            good = good and manifest["version"] == _VERSION
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            good = False
        if good:
            self._whole[position] = manifest
        else:
            self._damaged.add(position)
            _log.warning("checkpoint %s is damaged or incomplete: skipped", folder)
        return good


_watching_forks = False
_held: weakref.WeakSet[IO[str]] = weakref.WeakSet()


def _close_in_children(lock: IO[str]) -> None:
    # A lock belongs to an open file, which a forked worker shares: it would outlive the process that was killed.
    global _watching_forks
    if not _watching_forks:
        os.register_at_fork(after_in_child=lambda: [held.close() for held in list(_held)])
        _watching_forks = True
    _held.add(lock)


def mismatches(prefix: str, variables: Iterable[tf.Variable]) -> dict[tf.Variable, str]:
    """What keeps variables from being restored.

    A saver does not look at shapes: it would give a variable another one without a word.

    Args:
      prefix: Of a checkpoint.
      variables: Of the current graph.

    Returns:
      Variable -> how it differs from what the checkpoint holds; only those that do.

    Raises:
      CheckpointError: The checkpoint cannot be read.
    """
    try:
        held = tf.train.load_checkpoint(prefix).get_variable_to_shape_map()
    except (tf.errors.OpError, ValueError) as error:
        raise CheckpointError(f"cannot read checkpoint {prefix}: {error}") from None
    result = {}
    for variable in variables:
        part = variable._get_save_slice_info()  # of a partitioned variable, which is saved as one
        name, shape = (part.full_name, part.full_shape) if part else (variable.op.name, variable.shape)
        if name not in held:
            result[variable] = "is not in it"
        elif not tf.TensorShape(shape).is_compatible_with(held[name]):
            result[variable] = f"has shape {held[name]} in it and {tf.TensorShape(shape).as_list()} here"
    return result


def newest_prefix(path: str) -> str:
    """The saver prefix that a user's path means: a prefix, a folder of efl's or of TensorFlow's checkpoints.

    Raises:
      CheckpointError: There is no checkpoint.
    """
    folder = Path(path)
    if folder.is_dir():
        store = CheckpointStore(folder)
        newest = store.newest()
        if newest is not None:
            return store.prefix(newest)
        if (folder / f"{_PREFIX}.index").is_file():
            return str(folder / _PREFIX)
        latest = tf.train.latest_checkpoint(path)
        if latest:
            return str(latest)
    elif tf.train.checkpoint_exists(path):
        return path
    below = sorted({str(found.parents[1]) for found in folder.glob(f"*/*/*/{_PREFIX}.index")})
    hint = f"; there are checkpoints in {', '.join(below[:5])}: give one of these folders" if below else ""
    raise CheckpointError(f"{path}: no checkpoint there (expected a folder of checkpoints or the prefix of one){hint}")


def reason_of(error: OSError | tf.errors.OpError) -> str:
    """What went wrong and with which file; TensorFlow says it between the frames of two stack traces."""
    if isinstance(error, OSError):
        return str(error)
    told = str(error.message).partition("Original stack trace")[0].splitlines()
    frames = (" ", "\t", "Graph execution error", "Detected at node", "Node: ")
    reasons = [line for line in told if line and not line.startswith(frames)]
    return reasons[-1] if reasons else type(error).__name__


def _checksum(manifest: dict[str, Any]) -> str:
    """Of everything else in a manifest."""
    rest = {name: value for name, value in manifest.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _make(folder: Path) -> None:
    """Makes a folder and those above it, so that a power cut does not take them away again."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        _synchronise(path.parent)


def _digest(path: Path) -> str:
    state = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            state.update(block)
    return state.hexdigest()


def _synchronise(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
