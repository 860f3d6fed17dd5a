"""Loads variables from other checkpoints before training."""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow.compat.v1 as tf

from efl._checkpoint import newest_prefix
from efl.errors import CheckpointError, ConfigError
from efl.stage.stage import Stage

_log = logging.getLogger("efl")
_KEYS = {"load", "exclude", "path"}
_COUNT = tf.GraphKeys.GLOBAL_STEP


class ModelBank(Stage):
    """A stage that fills variables of the current graph from checkpoints.

        bank = efl.stage.ModelBank(True, [
            {"load": ["*"], "exclude": ["head/*"], "path": "pretrained"},
            {"load": {"old/leaf": "new/leaf"}, "exclude": [], "path": "other/model.ckpt-100"}])
        model.run_stage("bank", bank)

    Args:
      is_chief: Only the chief worker loads; on others the stage does nothing.
      config: A dict (its keys are free) or list of entries. ``load`` is a list of shell patterns over variable names,
        or ``{name in the checkpoint: name in the graph}``; ``exclude`` a list of patterns of graph names, or left out;
        ``path`` a checkpoint prefix or a folder of checkpoints. Variables that the graph does not have are passed over,
        and by patterns with a wildcard the count of steps, ``global_step``: the run's own goes on. Where several
        entries give the same variable, the later one wins.

    Raises:
      ConfigError: The configuration is malformed.
    """

    def __init__(
        self,
        is_chief: bool,
        config: Mapping[str, Mapping[str, Any]] | Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        self._is_chief = is_chief
        named = config.items() if isinstance(config, Mapping) else ((str(i), e) for i, e in enumerate(config or ()))
        self._entries = [(name, _checked(name, entry)) for name, entry in named]

    def run(self) -> None:
        """Loads everything.

        Raises:
          CheckpointError: A checkpoint or a named variable is missing, shapes differ, or an entry matches nothing.
        """
        if not self._is_chief:
            return
        variables = {v.op.name: v for v in tf.global_variables()}
        for name, entry in self._entries:
            prefix = newest_prefix(entry["path"])
            reader = tf.train.load_checkpoint(prefix)
            shapes = reader.get_variable_to_shape_map()
            wanted = self._wanted(name, entry, shapes, variables)
            for old, new in sorted(wanted.items(), key=lambda pair: pair[1]):
                expected = variables[new].shape
                if not expected.is_compatible_with(shapes[old]):
                    raise CheckpointError(
                        f"model bank {name!r}: {old} in {prefix} has shape {shapes[old]}, {new} in the graph {expected}"
                    )
                variables[new].load(reader.get_tensor(old), self.sess.raw_session())
            _log.info("model bank %s: loaded %d variables from %s", name, len(wanted), prefix)

    @staticmethod
    def _wanted(
        name: str, entry: Mapping[str, Any], shapes: Mapping[str, Any], variables: Mapping[str, tf.Variable]
    ) -> dict[str, str]:
        load = entry["load"]
        if isinstance(load, Mapping):
            missing = sorted(old for old in load if old not in shapes)
            if missing:
                raise CheckpointError(
                    f"model bank {name!r}: {entry['path']} holds no {', '.join(missing)}; it holds: "
                    f"{', '.join(sorted(shapes))}"
                )
            pairs = dict(load)
            unknown = sorted(new for new in pairs.values() if new not in variables)
            if unknown:
                _log.warning("model bank %s: the graph has no %s: passed over", name, ", ".join(unknown))
        else:
            pairs = {
                old: old
                for old in shapes
                if old in load or (old != _COUNT and any(fnmatch.fnmatchcase(old, p) for p in load))
            }
        kept = {
            old: new
            for old, new in pairs.items()
            if new in variables and not any(fnmatch.fnmatchcase(new, p) for p in entry["exclude"])
        }
        if not kept:
            raise CheckpointError(
                f"model bank {name!r}: load={load!r}, exclude={entry['exclude']!r} selects nothing that is both in "
                f"{entry['path']} ({', '.join(sorted(shapes))}) and in the graph ({', '.join(sorted(variables))})"
            )
        return kept


def _checked(name: str, entry: Any) -> dict[str, Any]:
    if not isinstance(entry, Mapping) or {"exclude", *entry} != _KEYS:
        raise ConfigError(f"model bank {name!r}: expected a dict of load, path and exclude, got {entry!r:.200}")
    if not isinstance(entry["load"], Mapping) and (
        isinstance(entry["load"], str) or not isinstance(entry["load"], Sequence)
    ):
        raise ConfigError(
            f"model bank {name!r}: load={entry['load']!r}: expected a list of patterns or a dict old -> new"
        )
    exclude = entry.get("exclude", [])
    if isinstance(exclude, str) or not isinstance(exclude, Sequence):
        raise ConfigError(f"model bank {name!r}: exclude={exclude!r}: expected a list of patterns")
    return {"load": entry["load"], "exclude": list(exclude), "path": str(entry["path"])}
