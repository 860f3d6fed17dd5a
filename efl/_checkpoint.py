"""Checkpoints of one party: a folder per step, written beside and renamed, so that it is whole or absent.

``<checkpoint_dir>/<role>/<task_index>/step-0000000100/`` holds the saver's files (``model.*``) and ``state.json`` (step
counters, stage, procedure, and a SHA-256 of every file, so that a torn or changed checkpoint is recognised and
skipped). The graph is not written: one-shot iterators hold their data as constants in it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tensorflow.compat.v1 as tf

from efl.errors import CheckpointError

_log = logging.getLogger("efl")
_FOLDER = re.compile(r"step-(\d{10,})")
_STATE = "state.json"
_PREFIX = "model"


class CheckpointStore:
    """The checkpoints of one party in one folder.

    Args:
      folder: Where they lie; made when the first one is saved.
      keep: How many of the newest to keep.
    """

    def __init__(self, folder: Path, keep: int = 5) -> None:
        self.folder = folder
        self._keep = max(1, keep)

    def steps(self) -> list[int]:
        """Steps of all whole checkpoints, ascending; damaged ones are left out with a warning."""
        return [step for step in self._present() if self._whole(step)]

    def prefix(self, step: int) -> str:
        """What ``tf.train.Saver.restore`` takes for that step."""
        return str(self._path(step) / _PREFIX)

    def state(self, step: int) -> dict[str, Any]:
        """The state saved beside the variables."""
        return dict(json.loads((self._path(step) / _STATE).read_text())["state"])

    def save(self, session: tf.Session, saver: tf.train.Saver, step: int, state: dict[str, Any]) -> Path:
        """Writes one checkpoint; a failure leaves the earlier ones as they are.

        Raises:
          CheckpointError: The folder cannot be written.
        """
        target, scratch = self._path(step), self.folder / f".writing-{step}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir()
            saver.save(session, str(scratch / _PREFIX), write_meta_graph=False, write_state=False)
            sums = {file.name: _digest(file) for file in sorted(scratch.iterdir())}
            body = json.dumps({"version": 1, "step": step, "files": sums, "state": state}, indent=1)
            with open(scratch / _STATE, "w") as file:
                file.write(body)
                file.flush()
                os.fsync(file.fileno())
            shutil.rmtree(target, ignore_errors=True)
            os.rename(scratch, target)
        except (OSError, tf.errors.OpError) as error:
            shutil.rmtree(scratch, ignore_errors=True)
            raise CheckpointError(f"cannot write checkpoint {target}: {error}") from None
        for old in self._present()[: -self._keep]:
            shutil.rmtree(self._path(old), ignore_errors=True)
        return target

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:010d}"

    def _present(self) -> list[int]:
        if not self.folder.is_dir():
            return []
        matches = (_FOLDER.fullmatch(entry.name) for entry in self.folder.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    def _whole(self, step: int) -> bool:
        folder = self._path(step)
        try:
            manifest = json.loads((folder / _STATE).read_text())
            good = all(_digest(folder / name) == digest for name, digest in manifest["files"].items())
        except (OSError, ValueError, KeyError, AttributeError):
            good = False
        if not good:
            _log.warning("checkpoint %s is damaged or incomplete: skipped", folder)
        return good


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
        steps = store.steps()
        if steps:
            return store.prefix(steps[-1])
        if (folder / f"{_PREFIX}.index").is_file():
            return str(folder / _PREFIX)
        latest = tf.train.latest_checkpoint(path)
        if latest:
            return str(latest)
    elif tf.train.checkpoint_exists(path):
        return path
    raise CheckpointError(f"{path}: no checkpoint there (expected a folder of checkpoints or the prefix of one)")


def _digest(path: Path) -> str:
    state = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            state.update(block)
    return state.hexdigest()
