"""Finds a restarted run's place in its sequence of stages."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from efl.errors import CheckpointError
from efl.stage.stage import Stage

if TYPE_CHECKING:
    from efl.model import Model

_log = logging.getLogger("efl")


class StageManager:
    """Counts the stages of a run, and skips those that a restored checkpoint says are done.

    A procedure is a sequence of ``model.run_stage`` calls that does not depend on timing, so the number of the call
    identifies a stage; its name is compared to notice a changed procedure.

    Attributes:
      index: Number of the stage that runs now or next, from 0.
      steps: Steps done in the running stage, over restarts.
      seconds: Time spent in the running stage, over restarts.
      skipped: Whether the last stage was skipped because it was done before a restart.
      passed: Stages that were run to their end, since the run began or was restored.
    """

    def __init__(self) -> None:
        self._bound: list[Any] = []
        self.reset()

    def reset(self) -> None:
        """Begins a new procedure."""
        self.index, self.steps, self.seconds = 0, 0, 0.0
        self._call = 0
        self._name = ""
        self._resumed_name = ""
        self._ended: set[int] = set()
        self.skipped = False
        self.passed = 0
        for stage in self._bound:
            stage.finish = False  # of the attempt before, where the procedure keeps its stages outside

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "index": self.index,
            "name": self._name,
            "steps": self.steps,
            "seconds": self.seconds,
            "ended": sorted(self._ended),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes up what ``state`` gave."""
        self.reset()
        self.index, self.steps = int(state["index"]), int(state["steps"])
        self.seconds = float(state["seconds"])
        self._resumed_name = str(state["name"])
        self._ended = set(map(int, state["ended"]))

    def stage(self, model: Model, name: str, stage: Stage | Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs a stage, or skips it where it is done.

        Returns:
          What the stage returned; None for one that was skipped.

        Raises:
          CheckpointError: The checkpoint was in another stage at this place: the procedure has changed.
        """
        call, self._call = self._call, self._call + 1
        self.skipped = call < self.index
        if self.skipped:
            if isinstance(stage, Stage):
                self._bind(stage, model)
                if hasattr(stage, "finish"):
                    stage.finish = call in self._ended
            return None
        if self._resumed_name and self._resumed_name != name:
            raise CheckpointError(
                f"the checkpoint was in stage {self._resumed_name!r} (number {call}), the procedure is in {name!r}: it "
                "has changed since; use another checkpoint_dir"
            )
        if self._resumed_name:
            _log.info("going on in stage %s (number %d) after %d steps", name, call, self.steps)
        self._name, self._resumed_name = name, ""
        if isinstance(stage, Stage):
            self._bind(stage, model)
        result = stage(*args, **kwargs)
        if getattr(stage, "finish", False):
            self._ended.add(call)
        self.index, self.steps, self.seconds, self._name = call + 1, 0, 0.0, ""
        self.passed += 1
        model._stage_done()
        return result

    def _bind(self, stage: Stage, model: Model) -> None:
        stage.bind(model)
        if hasattr(stage, "finish") and not any(stage is known for known in self._bound):
            self._bound.append(stage)
