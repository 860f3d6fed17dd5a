"""Finds a restarted run's place in its sequence of stages."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from efl.errors import CheckpointError, ModelError
from efl.stage.stage import Stage

if TYPE_CHECKING:
    from efl.model import Model

_log = logging.getLogger("efl")


@dataclass
class _Running:
    """A stage that runs: its number among those of the stage around it, its name, and what it is."""

    call: int
    name: str
    what: Any


class StageManager:
    """Counts the stages of a run, and skips those that a restored checkpoint says are done.

    A procedure is a sequence of ``model.run_stage`` calls that does not depend on timing, so the number of the call
    identifies a stage; its name is compared to notice a changed procedure. A function that is run as a stage may run
    stages itself: they are numbered within it.

    Stages are a party's own: it may load weights while its peer does nothing of the kind. Only loops over the steps
    that both take are common, and counted in what the parties compare.

    Attributes:
      steps: Steps done in the running loop, over restarts.
      seconds: Time spent in the running loop, over restarts.
      skipped: Whether the last stage was skipped because it was done before a restart.
      passed: Stages that were run to their end, since the run began or was restored.
      common_loops: Common loops that are done.
      own_steps: Steps of loops that are not common, since the run began or was restored.
    """

    def __init__(self) -> None:
        self._bound: list[Any] = []
        self.reset()

    def reset(self) -> None:
        """Begins a new procedure."""
        self.steps, self.seconds = 0, 0.0
        self._stack: list[_Running] = []
        self._next = [0]  # at each depth of stages within stages: the number of the next
        self._resumed: list[tuple[int, str]] = []  # where a checkpoint was made: numbers and names, the outermost first
        self._ended: set[tuple[int, ...]] = set()
        self._looping = self._in_common = False
        self.common_loops = 0
        self.own_steps = 0
        self.skipped = False
        self.passed = 0
        for stage in self._bound:
            stage.finish = False  # of the attempt before, where the procedure keeps its stages outside

    @property
    def index(self) -> int:
        """Number of the outermost stage that runs now or next, from 0."""
        if self._resumed:
            return self._resumed[0][0]
        return self._stack[0].call if self._stack else self._next[0]

    @property
    def common_steps(self) -> int:
        """Steps done in the running common loop; 0 outside of one."""
        return self.steps if self._in_common else 0

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        place = self._resumed
        if not place:
            place = [(stage.call, stage.name) for stage in self._stack]
            if not self._looping:
                place.append((self._next[-1], ""))
        return {
            "place": [list(part) for part in place],
            "steps": self.steps,
            "seconds": self.seconds,
            "ended": sorted(map(list, self._ended)),
            "common_loops": self.common_loops,
            "in_common": self._in_common,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes up what ``state`` gave."""
        self.reset()
        self._resumed = [(int(call), str(name)) for call, name in state["place"]]
        self.steps, self.seconds = int(state["steps"]), float(state["seconds"])
        self._ended = {tuple(map(int, path)) for path in state["ended"]}
        self.common_loops, self._in_common = int(state["common_loops"]), bool(state["in_common"])

    # ---- stages

    def stage(self, model: Model, name: str, stage: Stage | Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs a stage, or skips it where it is done.

        Returns:
          What the stage returned; None for one that was skipped.

        Raises:
          CheckpointError: The checkpoint was in another stage at this place: the procedure has changed.
          ModelError: It is called inside a loop, by a hook.
        """
        if self._looping:
            raise ModelError(
                f"run_stage({name!r}) within a step of stage {self._stack[-1].name!r}, by a hook? Stages follow each "
                "other; call it in the procedure, or in a function that is run as a stage"
            )
        call = self._next[-1]
        self._next[-1] += 1
        path = (*(running.call for running in self._stack), call)
        self.skipped = self._is_done(name, call)
        if isinstance(stage, Stage):
            self._bind(stage, model)
        if self.skipped:
            if hasattr(stage, "finish"):
                stage.finish = path in self._ended
            return None
        self._stack.append(_Running(call, name, stage))
        self._next.append(0)
        try:
            result = stage(*args, **kwargs)
        finally:
            self._looping = False
            self._stack.pop()
            self._next.pop()
        self._resumed = []  # it was the last of those that the checkpoint was in, or went by all of them
        if getattr(stage, "finish", False):
            self._ended.add(path)
        self.steps, self.seconds = 0, 0.0
        self.passed += 1
        model._stage_done()
        return result

    def _is_done(self, name: str, call: int) -> bool:
        """Whether a stage that is called now was done when the checkpoint was made."""
        depth = len(self._stack)
        if depth >= len(self._resumed):
            return False
        number, then = self._resumed[depth]
        if call < number:
            return True
        if then and then != name:
            raise CheckpointError(
                f"the checkpoint was in stage {then!r} (number {call}), the procedure is in {name!r}: it has changed "
                "since; use another checkpoint_dir"
            )
        if depth + 1 == len(self._resumed):
            self._resumed = []
            if then:
                _log.info("going on in stage %s (number %d) after %d steps", name, call, self.steps)
        return False

    def _bind(self, stage: Stage, model: Model) -> None:
        stage.bind(model)
        if hasattr(stage, "finish") and not any(stage is known for known in self._bound):
            self._bound.append(stage)

    # ---- loops

    def runs(self, stage: Stage) -> bool:
        """Whether that stage is the one that runs."""
        return bool(self._stack) and self._stack[-1].what is stage

    def enter_loop(self, common: bool) -> None:
        """The running stage begins its steps, or goes on with them."""
        self._looping, self._in_common = True, common

    def count(self, seconds: float) -> None:
        """A step is done, so many seconds after the loop's first."""
        self.steps += 1
        self.seconds = seconds
        self.own_steps += not self._in_common

    def leave_loop(self) -> None:
        """The loop is done."""
        self.common_loops += self._in_common
        self._looping = self._in_common = False
