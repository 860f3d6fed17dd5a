"""Says while a model trains what it has spent, and stops it before it spends too much."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

import tensorflow.compat.v1 as tf

from efl.errors import ConfigError
from efl.privacy.accounting import _checks

if TYPE_CHECKING:
    from efl.model import Model
    from efl.privacy.accounting import AdversaryRow

_log = logging.getLogger("efl")
_AHEAD = 100  # steps that are foreseen at once


class PrivacyHook(tf.train.SessionRunHook):
    """Logs ε every so many training steps, and ends training before the step that would pass a target.

    Add it for training: ``model.add_hooks([efl.privacy.PrivacyHook(model, delta=1e-5)], mode=efl.MODE.TRAIN)``.

    What is logged, and held against the target, is the guarantee for an outsider who sees this party's model, and
    beside it the figure that is commonly reported.

    Args:
      model: The model that trains.
      delta: δ.
      every: Training steps between two lines.
      target_epsilon: ε (by the accountant ``"rdp"``) is never above it, also across restarts: no step is taken after
        which it could be, and both parties end as if the data of this one had ended. A step that is taken again after a
        recovery is taken to count again. None never ends anything.

    Raises:
      ConfigError: A number that cannot be. While it trains: there is no ε to hold against the target, or the first step
        of all would pass it.
    """

    def __init__(self, model: Model, delta: float, every: int = 100, target_epsilon: float | None = None) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ConfigError(f"PrivacyHook: every={every!r}: expected a positive number of steps")
        if not callable(getattr(model, "privacy_spent", None)):
            raise ConfigError(f"PrivacyHook: {model!r:.100} is no model: expected an efl.Model or efl.FederalModel")
        _checks.delta_of("PrivacyHook", delta)
        if target_epsilon is not None:
            expected = "a positive number, or None"
            _checks.real("PrivacyHook", "target_epsilon", target_epsilon, 0, expected, open_end=True)
        self._model, self._delta, self._every, self._target = model, delta, every, target_epsilon
        self._steps = 0
        self._left = 0  # steps that may be taken before it has to look again
        self._ends = False  # whether one more would be too much

    def after_create_session(self, session: Any, coord: Any) -> None:
        """Called when a run begins, and when it begins again elsewhere than where it stood."""
        self._left = 0

    def before_run(self, run_context: Any) -> None:
        """Called before each training step.

        Raises:
          OutOfRangeError: The step would pass the target; the loop takes it for the end of the data.
          ConfigError: See the class.
        """
        if self._target is None:
            return
        self._left = self._left or self._look()
        if not self._left:
            raise tf.errors.OutOfRangeError(None, None, "PrivacyHook: nothing is left of target_epsilon")
        self._left -= 1

    def after_run(self, run_context: Any, run_values: Any) -> None:
        """Called after each training step."""
        self._steps += 1
        if self._steps % self._every == 0:
            row = self._row()
            reported = "" if row.reported is None else f" (as commonly reported, by RDP: {row.reported:.3g})"
            _log.info("epsilon=%s delta=%g%s: %s", row.guarantee, self._delta, reported, row.adversary)
        if not self._ends or self._left:
            return
        # Less was spent than was foreseen where a step that was taken again was an exact replay, or a batch was small.
        beyond = self._after(1)
        if beyond > self._limit:
            self._tell(beyond)
            run_context.request_stop()

    def _look(self) -> int:
        """How many steps may be taken, of the next hundred.

        Raises:
          ConfigError: See the class.
        """
        first, self._ends = self._row(1), False
        if first.epsilon is None:
            raise ConfigError(f"PrivacyHook: there is no epsilon to hold against target_epsilon: {first.reason}")
        if first.epsilon > self._limit:
            self._tell(first.epsilon)
            return 0
        if self._after(_AHEAD + 1) <= self._limit:
            return _AHEAD
        most, too_many = 1, _AHEAD + 1
        while too_many - most > 1:  # ε grows with the steps
            steps = (most + too_many) // 2
            most, too_many = (steps, too_many) if self._after(steps) <= self._limit else (most, steps)
        self._ends = True
        return most

    @property
    def _limit(self) -> float:
        return math.inf if self._target is None else self._target

    def _after(self, steps: int) -> float:
        epsilon = self._row(steps).epsilon
        return math.inf if epsilon is None else epsilon

    def _tell(self, epsilon: float) -> None:
        """Says that no step is left.

        Raises:
          ConfigError: None was ever there.
        """
        # Called after a step, which the model counts later, or before the first of a run.
        if not self._steps and not self._model.steps_trained:
            raise ConfigError(
                f"PrivacyHook: target_epsilon={self._target!r}: after the first step epsilon would be {epsilon:.3g} "
                f"already (delta={self._delta:g}): expected a larger target, or more noise"
            )
        _log.info("the next step would make epsilon %.3g, above target_epsilon=%g", epsilon, self._limit)

    def _row(self, further_steps: int = 0) -> AdversaryRow:
        """The outsider who sees this party's model, now or after further steps."""
        rows = self._model.privacy_spent(self._delta, accountant="rdp", further_steps=further_steps).rows
        own = f"outsider who sees the {self._model.settings.federal_role}'s model"
        return next((row for row in rows if row.adversary == own), rows[0])
