"""What the parties tell each other before they start, and the checkpoint that follows from it.

Facts are told in the handshake. Unlike its terms they may differ; what must not follow from a difference is refused
here, on both sides alike, since both see the same two sets of facts.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from efl._checkpoint import Known
from efl._position import Position
from efl.errors import CheckpointError, ConfigError, ProtocolError

_log = logging.getLogger("efl")
REMEMBERED = 50
_MAX_PROCEDURE = 10_000
_MAX_GROUPS = 1000


class PromisedNoise(NamedTuple):
    """What noise a party adds in a training scope in which it trains variables.

    Attributes:
      groups: Of each of its optimizers, which are clipping groups of their own: (noise multiplier, 0 where it is not
        private; whether micro-batches of several rows are clipped as a whole).
      noises_returns: Whether the gradients that it returns are clipped and noised row by row.
    """

    groups: tuple[tuple[float, bool], ...]
    noises_returns: bool


@dataclass(frozen=True)
class Facts:
    """What one party tells the other.

    Attributes:
      checkpoints: (position, lineage) of every whole checkpoint it holds; the lineage names the attempt that wrote it.
      save_steps: Training steps between two checkpoints, 0 where time decides; None without a ``checkpoint_dir``.
      steps_trained: Training steps that its weights have behind them.
      warm: Its weights, readers and counts are those that the run left in this process.
      inputs: Scope -> whether the position of its input survives a restart.
      run: A fresh identity for the attempt that begins. The leader's counts.
      seed: The leader's: what both do at random together follows from it. The follower tells none.
      fit: Number of this ``fit`` in its program, from 1.
      procedures: Of this fit and those before it, at most ``REMEMBERED`` of them, the current one last.
      wanted: Training scope -> whether it needs returned gradients row by row, undivided.
      given: Training scope -> "", or why it cannot return gradients so.
      noise: Training scope in which it trains variables -> what noise it adds.
      released: Scope and name of a tensor that it sends noised -> its noise multiplier.
    """

    checkpoints: tuple[Known, ...]
    save_steps: int | None
    steps_trained: int
    warm: bool
    inputs: Mapping[str, bool]
    run: str
    seed: int | None
    fit: int
    procedures: tuple[str, ...]
    wanted: Mapping[str, bool] = field(default_factory=dict)
    given: Mapping[str, str] = field(default_factory=dict)
    noise: Mapping[str, PromisedNoise] = field(default_factory=dict)
    released: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The facts as JSON values."""
        return {
            "checkpoints": [[position.to_json(), lineage] for position, lineage in self.checkpoints],
            "save_steps": self.save_steps,
            "steps_trained": self.steps_trained,
            "warm": self.warm,
            "inputs": dict(self.inputs),
            "run": self.run,
            "seed": self.seed,
            "fit": self.fit,
            "procedures": list(self.procedures),
            "wanted": dict(self.wanted),
            "given": dict(self.given),
            "noise": {scope: [list(map(list, told.groups)), told.noises_returns] for scope, told in self.noise.items()},
            "released": dict(self.released),
        }

    def by_number(self) -> dict[int, str]:
        """Number of a fit -> its procedure."""
        return dict(enumerate(self.procedures, self.fit - len(self.procedures) + 1))

    @classmethod
    def parse(cls, told: Mapping[str, Any], peer_role: str) -> Facts:
        """Checks what the peer told.

        Raises:
          ProtocolError: Something is missing or of another type.
        """
        try:
            return cls(
                tuple((Position.parse(position), _text(run)) for position, run in told["checkpoints"]),
                None if told["save_steps"] is None else _count(told["save_steps"]),
                _count(told["steps_trained"]),
                _truth(told["warm"]),
                {_text(scope, 300): _truth(kept) for scope, kept in told["inputs"].items()},
                _text(told["run"]),
                None if told["seed"] is None else _count(told["seed"]),
                _count(told["fit"]),
                tuple(_text(procedure, _MAX_PROCEDURE) for procedure in told["procedures"]),
                {_text(scope, 300): _truth(wants) for scope, wants in told["wanted"].items()},
                {_text(scope, 300): _text(why, 300) for scope, why in told["given"].items()},
                {_text(scope, 300): _promised(groups, back) for scope, (groups, back) in told["noise"].items()},
                {_text(name, 1000): _amount(noise) for name, noise in told["released"].items()},
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ProtocolError(
                f"{peer_role} told something about its run that cannot be ({error!r:.200}): is its efl of this version?"
            ) from None


def _promised(groups: Any, back: Any) -> PromisedNoise:
    held = tuple((_amount(multiplier), _truth(microbatched)) for multiplier, microbatched in groups)
    if not 0 < len(held) <= _MAX_GROUPS:
        raise ValueError(f"{len(held)} optimizers")
    return PromisedNoise(held, _truth(back))


def different_programs(mine: Facts, peer: Facts, role: str, peer_role: str) -> list[str]:
    """Where the parties' programs call ``fit`` with different procedures, as far as both remember."""
    found = []
    held = {role: mine.by_number(), peer_role: peer.by_number()}
    for number in sorted(held["leader"].keys() & held["follower"].keys()):
        leader, follower = held["leader"][number], held["follower"][number]
        if leader != follower:
            which = "procedure" if number == max(mine.fit, peer.fit) else f"procedure of fit {number}"
            found.append(f"{which}: the leader has {leader!r}, the follower has {follower!r}")
    return found


def behind(mine: Facts, peer: Facts, ours: Callable[[Position, int], bool]) -> set[str]:
    """Who comes to a fit that is over, and passes it by: ``"mine"``, ``"peer"``, both or none.

    A party that died after the last step of a fit, or in a later one, begins its program again; the survivor's has gone
    on. The newest checkpoint of both tells: it was made in a later fit, or is the one that ended this one.

    Args:
      mine: This party's facts.
      peer: The peer's.
      ours: Whether a checkpoint was made by this program, as far as its fits up to a number go.
    """
    known = newest_common(mine, peer)
    newest = None if known is None else known[0]
    if mine.fit == peer.fit:
        later = newest is not None and newest.fit > mine.fit and ours(newest, mine.fit)
        return {"mine", "peer"} if later and not mine.warm and not peer.warm else set()
    late, ahead, who = (mine, peer, "mine") if mine.fit < peer.fit else (peer, mine, "peer")
    passed = [position for position, _ in ahead.checkpoints if position.fit <= late.fit]
    over = newest is not None and ours(newest, late.fit) and (newest.fit > late.fit or newest == max(passed))
    return {who} if over and not late.warm else set()


def shared_seed(seed: int) -> int:
    """A seed that may be told: the run's own seed, which also fixes initial weights, does not follow from it."""
    return int.from_bytes(hashlib.blake2b(f"{seed}".encode(), digest_size=7, person=b"efl-shared").digest(), "big")


@dataclass(frozen=True)
class Start:
    """Where an attempt begins, the same for both parties.

    Attributes:
      restore: The checkpoint that both restore, or None.
      cold: Both begin (again) with a new session: with what ``restore`` says, or with initial weights.
    """

    restore: Known | None
    cold: bool


def where_to_start(mine: Facts, peer: Facts, role: str, peer_role: str) -> Start:
    """What follows from the two parties' facts.

    Raises:
      CheckpointError: The parties hold checkpoints, but none of one run and position; or their weights are not equally
        far; or the input of only one of them can go on where the checkpoint was made.
        Or they are in different fits of their programs.
      ConfigError: They would save at different steps.
    """
    if (mine.save_steps is None) != (peer.save_steps is None):
        lacking = role if mine.save_steps is None else peer_role
        _log.warning("%s has no checkpoint_dir: if a party dies, this run cannot be recovered", lacking)
    elif mine.save_steps != peer.save_steps:
        raise ConfigError(
            f"save_checkpoint_steps is {mine.save_steps} at {role} and {peer.save_steps} at {peer_role}: a run can "
            "only be recovered from steps that both save; give both the same"
        )
    if mine.fit != peer.fit:
        fits = {role: mine.fit, peer_role: peer.fit}
        raise CheckpointError(
            f"fit: the leader is in its {fits['leader']}., the follower in its {fits['follower']}., and no checkpoint "
            f"that both hold is of the end of the earlier one ({role} has {_steps(mine)}, {peer_role} has "
            f"{_steps(peer)}): start both again, with the checkpoint_dir of one run or with an empty one"
        )
    if mine.warm and peer.warm:
        if mine.steps_trained != peer.steps_trained:
            raise _unequal(mine, peer, role, peer_role)
        return Start(None, cold=False)
    common = newest_common(mine, peer)
    if common is not None:
        _check_inputs(common[0], mine, peer, role, peer_role)
        return Start(common, cold=True)
    held = [position for position, _ in (*mine.checkpoints, *peer.checkpoints)]
    if any(position.trained for position in held):
        raise CheckpointError(
            f"the parties hold no checkpoint of the same run and step: {role} has {_steps(mine)}, {peer_role} has "
            f"{_steps(peer)}; give both the checkpoint_dir of one run, or both an empty one"
        )
    # Initial states at most, and not the same one on both sides: nothing is lost by beginning anew.
    if not held and mine.steps_trained != peer.steps_trained:
        raise _unequal(mine, peer, role, peer_role)
    return Start(None, cold=True)


def _unequal(mine: Facts, peer: Facts, role: str, peer_role: str) -> CheckpointError:
    return CheckpointError(
        f"{role} has trained {mine.steps_trained} steps and {peer_role} {peer.steps_trained}: a party was "
        "restarted without a checkpoint; restart both, or train with checkpoint_dir"
    )


def newest_common(mine: Facts, peer: Facts) -> Known | None:
    """The newest checkpoint that both hold."""
    return max(set(mine.checkpoints) & set(peer.checkpoints), default=None)


def unequal_inputs(mine: Facts, peer: Facts, role: str, peer_role: str) -> tuple[str, str] | None:
    """Whose training input does not survive a restart, and in which scope, while the other party's does."""
    for scope in sorted(mine.inputs.keys() & peer.inputs.keys()):
        if scope.startswith("train") and mine.inputs[scope] != peer.inputs[scope]:
            return (peer_role if mine.inputs[scope] else role), scope
    return None


def why_not_together(whose: str, scope: str, where: str) -> str:
    """Why both parties cannot go on where only one of their inputs can."""
    return (
        f"the input of {whose} in {scope} cannot go on {where}, and the other party's can: the rows would not belong "
        "together. Use efl.data.FederalDataIO or an initializable iterator on both sides"
    )


def _check_inputs(position: Position, mine: Facts, peer: Facts, role: str, peer_role: str) -> None:
    unequal = unequal_inputs(mine, peer, role, peer_role)
    if position.trained and unequal is not None:
        raise CheckpointError(
            f"{why_not_together(*unequal, f'at {position}')}, or begin anew with an empty checkpoint_dir"
        )


def _steps(facts: Facts) -> str:
    return ", ".join(f"{position} (run {run[:6]})" for position, run in facts.checkpoints) or "none"


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 63:
        raise ValueError(value)
    return value


def _amount(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e9:
        raise ValueError(value)
    return float(value)


def _truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(value)
    return value


def _text(value: Any, most: int = 64) -> str:
    if not isinstance(value, str) or len(value) > most:
        raise ValueError(value)
    return value
