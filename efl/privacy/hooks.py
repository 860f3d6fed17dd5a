"""Says while a model trains what it has spent, and stops it before it spends too much."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

import tensorflow.compat.v1 as tf

from efl.errors import ConfigError

if TYPE_CHECKING:
    from efl.model import Model

_log = logging.getLogger("efl")


class PrivacyHook(tf.train.SessionRunHook):
    """Logs ε every so many training steps, and asks to stop when a target is reached.

    Add it for training: ``model.add_hooks([efl.privacy.PrivacyHook(model, delta=1e-5)], mode=efl.MODE.TRAIN)``.

    What is logged, and held against the target, is the guarantee for an outsider who sees this party's model (the first
    row of ``model.privacy_spent``), and beside it the figure that is commonly reported.

    Args:
      model: The model that trains.
      delta: δ.
      every: Training steps between two lines; also between two looks at the target.
      target_epsilon: Asks to stop at the first look at which ε would be above it after ``every`` more steps were taken;
        both parties end. None never stops.

    Raises:
      ConfigError: A number that cannot be.
    """

    def __init__(self, model: Model, delta: float, every: int = 100, target_epsilon: float | None = None) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ConfigError(f"PrivacyHook: every={every!r}: expected a positive number of steps")
        if target_epsilon is not None and not (target_epsilon > 0 and math.isfinite(target_epsilon)):
            raise ConfigError(f"PrivacyHook: target_epsilon={target_epsilon!r}: expected a positive number, or None")
        self._model, self._delta, self._every, self._target = model, delta, every, target_epsilon
        self._steps = 0

    def after_run(self, run_context: Any, run_values: Any) -> None:
        """Called after each training step."""
        self._steps += 1
        if self._steps % self._every:
            return
        row = self._model.privacy_spent(self._delta, accountant="rdp").rows[0]
        reported = "" if row.reported is None else f" (as commonly reported: {row.reported:.3g})"
        _log.info("epsilon=%s delta=%g%s: %s", row.guarantee, self._delta, reported, row.adversary)
        if self._target is None:
            return
        if row.epsilon is None:
            raise ConfigError(f"PrivacyHook: there is no epsilon to hold against target_epsilon: {row.reason}")
        ahead = self._model.privacy_spent(self._delta, accountant="rdp", further_steps=self._every).rows[0].epsilon
        if ahead is None or ahead > self._target:
            _log.info(
                "epsilon=%.3g would pass target_epsilon=%g within %d steps", row.epsilon, self._target, self._every
            )
            run_context.request_stop()
