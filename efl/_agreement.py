"""What the parties tell each other before they start, and the checkpoint that follows from it.

Facts are told in the handshake. Unlike its terms they may differ; what must not follow from a difference is refused
here, on both sides alike, since both see the same two sets of facts.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from efl.errors import CheckpointError, ConfigError, ProtocolError

_log = logging.getLogger("efl")


@dataclass(frozen=True)
class Facts:
    """What one party tells the other.

    Attributes:
      checkpoints: (step, run) of every whole checkpoint it holds; ``run`` identifies the run that wrote it.
      save_steps: Training steps between two checkpoints; None without a ``checkpoint_dir``.
      steps_trained: Training steps that its weights have behind them.
      run: A fresh identity for the run that begins. The leader's counts.
      seed: The leader's: what both do at random together follows from it. The follower tells none.
    """

    checkpoints: tuple[tuple[int, str], ...]
    save_steps: int | None
    steps_trained: int
    run: str
    seed: int | None

    def to_json(self) -> dict[str, Any]:
        """The facts as JSON values."""
        return asdict(self)

    @classmethod
    def parse(cls, told: Mapping[str, Any], peer_role: str) -> Facts:
        """Checks what the peer told.

        Raises:
          ProtocolError: Something is missing or of another type.
        """
        try:
            checkpoints = tuple((_count(step), _text(run)) for step, run in told["checkpoints"])
            save_steps = None if told["save_steps"] is None else _count(told["save_steps"])
            seed = None if told["seed"] is None else _count(told["seed"])
            return cls(checkpoints, save_steps, _count(told["steps_trained"]), _text(told["run"]), seed)
        except (KeyError, TypeError, ValueError) as error:
            raise ProtocolError(
                f"{peer_role} told something about its run that cannot be ({error!r:.200}): is its efl of this version?"
            ) from None


def shared_seed(seed: int) -> int:
    """A seed that may be told: the run's own seed, which also fixes initial weights, does not follow from it."""
    return int.from_bytes(hashlib.blake2b(f"{seed}".encode(), digest_size=7, person=b"efl-shared").digest(), "big")


def checkpoint_to_restore(mine: Facts, peer: Facts, role: str, peer_role: str) -> int | None:
    """The step that both parties restore, or None where both begin (or go on) without.

    Raises:
      CheckpointError: The parties hold checkpoints, but none of one run and step; or their weights are not equally far.
      ConfigError: They would save at different steps.
    """
    if (mine.save_steps is None) != (peer.save_steps is None):
        lacking = role if mine.save_steps is None else peer_role
        _log.warning("%s has no checkpoint_dir: this run cannot be recovered", lacking)
    elif mine.save_steps != peer.save_steps:
        raise ConfigError(
            f"save_checkpoint_steps is {mine.save_steps} at {role} and {peer.save_steps} at {peer_role}: a run can "
            "only be recovered from steps that both save; give both the same"
        )
    common = sorted(set(mine.checkpoints) & set(peer.checkpoints))
    if common:
        step = common[-1][0]
        loaded = mine.steps_trained == peer.steps_trained == step
        return None if loaded else step
    if mine.checkpoints or peer.checkpoints:
        raise CheckpointError(
            f"the parties hold no checkpoint of the same run and step: {role} has {_steps(mine)}, {peer_role} has "
            f"{_steps(peer)}; give both the checkpoint_dir of one run, or both an empty one"
        )
    if mine.steps_trained != peer.steps_trained:
        raise CheckpointError(
            f"{role} has trained {mine.steps_trained} steps and {peer_role} {peer.steps_trained}: a party was "
            "restarted without a checkpoint; restart both, or train with checkpoint_dir"
        )
    return None


def _steps(facts: Facts) -> str:
    return ", ".join(f"{step} (run {run[:6]})" for step, run in facts.checkpoints) or "none"


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 63:
        raise ValueError(value)
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > 64:
        raise ValueError(value)
    return value
