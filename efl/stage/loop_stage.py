"""The loop that trains or evaluates."""

from __future__ import annotations

import logging
import math
import numbers
import time as clock
from collections.abc import Sequence
from typing import Any

import tensorflow.compat.v1 as tf

from efl._graph import as_graph_tensor
from efl._graph_checks import raise_if_refused
from efl._program import Program
from efl._steps import marks
from efl._task_scope import MODE
from efl.errors import ConfigError, NonFiniteLoss
from efl.stage.stage import Stage

_log = logging.getLogger("efl")


class LoopStage(Stage):
    """Runs an op again and again: until a number of steps, a time, or the end of the data of either party.

    A loop that stopped at its number of steps or at its time can be run again and goes on with the data where it
    stopped. A loop over ``model.train_op()`` or ``model.eval_op()`` takes its steps together with the peer; one over
    fetches of one's own is this party's alone: its steps are no training steps of the model.

    Args:
      run_ops: What to run: ``model.train_op(task)``, ``model.eval_op(task)``, or any fetches (then ``is_training`` says
        in which mode of the default task).
      is_training: Whether the steps are training steps.
      step: Steps of one run, or None.
      time: Seconds of one run, or None. In a federation the leader's clock decides for both parties, in common loops.

    Attributes:
      finish: True once the data ended or a hook asked to stop.

    Raises:
      ConfigError: ``step`` or ``time`` is not positive.
    """

    def __init__(
        self, run_ops: Any, is_training: bool = True, step: int | None = None, time: float | None = None
    ) -> None:
        if step is not None and (isinstance(step, bool) or not isinstance(step, numbers.Integral) or step < 1):
            raise ConfigError(f"step={step!r}: expected a positive number of steps, or None")
        if time is not None and (isinstance(time, bool) or not isinstance(time, numbers.Real) or not time > 0):
            raise ConfigError(f"time={time!r}: expected a positive number of seconds, or None")
        self.run_ops = run_ops
        self.is_training = is_training
        self.finish = False
        # Plain ones: the parties compare how they are written.
        self._step = None if step is None else int(step)
        self._time = None if time is None else float(time)
        self._fetches: list[Any] | None = None

    def run(self, feed_dict: dict[tf.Tensor, Any] | None = None) -> None:
        """Loops.

        Args:
          feed_dict: Values for placeholders of the graph, the same in every step.

        Raises:
          KeyboardInterrupt: Ctrl-C.
          EflError: The peer failed or was lost, sample ids differ, the data is damaged, the loss is not finite.
        """
        model = self.model
        manager = model.stage_mgr
        if not manager.runs(self):  # called by a function that is run as a stage: a stage within it
            model.run_stage(type(self).__name__, self, feed_dict)
            return
        program = model._program_of(self.run_ops, MODE.TRAIN if self.is_training else MODE.EVAL)
        pace = model._pace_of(program)
        common = model._is_common(program)
        keeps_time = model._is_timekeeper or not common
        scope = pace.scope(program.scope.wire)
        fetches = (program.op, *program.fetched, *self._extra(program.op), *program.lookups())
        feeds, values = model._feeds(program, feed_dict or {})
        session = model.session
        model._open_readers(program)
        model._settle_noise(training=program.scope.mode is MODE.TRAIN and model._has(program))
        session.activate(program.hooks)
        report = model._reporter.stage(program, self._step, manager.steps)
        pace.enter_stage(f"{program.scope}, step={self._step}, time={self._time}")
        started = clock.monotonic() - manager.seconds
        if not self.is_training and manager.steps == 0:
            model._reset_metrics(program)
        self.finish = False
        fresh, told = not self.is_training and manager.steps == 0, True

        def started_over() -> bool:
            # The evaluation before took the last batch: this one has not begun, rather than ended without a batch.
            nonlocal fresh
            if not fresh or manager.steps:
                return False
            fresh = False
            model._restart_readers(program)
            return True

        manager.enter_loop(common)
        model._stepping(True)
        try:
            while not self.finish and (self._step is None or manager.steps < self._step):
                model._check_signals()
                step = pace.begin(scope)
                if step is None:
                    if started_over():
                        continue
                    self.finish = True
                    break
                if keeps_time and self._time is not None and clock.monotonic() - started >= self._time:
                    pace.announce(scope, step, marks.LAST)
                if model._is_timekeeper and common:
                    for mark in model._marks_due():
                        pace.announce(scope, step, mark)
                interruption: Exception | None = None
                try:
                    results = session.run_step(fetches, feeds, values)
                except (tf.errors.OpError, StopIteration, UnicodeDecodeError) as error:
                    # Handled outside, so that the real reason is not shown as its consequence. TensorFlow raises
                    # UnicodeDecodeError where the message of an error quotes a record that is no text.
                    interruption = error
                if interruption is not None:
                    model._check_signals()
                    model._explain_reading(program, interruption)
                    model._raise_if_not_noised()
                    if not pace.interrupted(scope):
                        raise_if_refused(interruption, model._who, step, scope.wire)
                        model._compare_rows(program, interruption)
                        model._own_end(program, interruption)
                        pace.end(scope, "data")
                    if started_over():
                        continue
                    self.finish = True
                    break
                waited = pace.complete(scope)
                manager.count(clock.monotonic() - started)
                loss = results[1] if program.loss is not None else None
                if loss is not None and not math.isfinite(loss):
                    raise NonFiniteLoss(
                        f"the loss of {model._who} is {loss} at step {step} of {scope.wire}: lower the learning rate, "
                        "or look for zeros under a logarithm or a division; weights are those after this step"
                    )
                model._step_done(program)
                report.step(results[1 : 1 + len(program.fetched)], waited)
                reached = pace.marks_of(scope, step)
                if reached:
                    model._at_marks(reached)
                if marks.LAST in reached:
                    break
                if session.should_stop():
                    # A peer that was not told keeps its data where it is, so this party does too.
                    told = pace.end(scope, marks.STOP_ASKED)
                    _log.info("%s: %s in %s after step %d", model._who, marks.STOP_ASKED, scope.wire, step)
                    self.finish = True
        finally:
            model._stepping(False)
            report.stop()
        self._tell_early_end(program, session.should_stop())
        manager.leave_loop()
        program.exhausted = self.finish and told
        if self.finish and not self.is_training:
            model._restart_readers(program)
        report.end()
        session.activate(())

    def _tell_early_end(self, program: Program, stopped: bool) -> None:
        taken = self.model.stage_mgr.steps
        if not self.is_training or not self.finish or stopped or not self.model._has(program):
            return
        if not self.model.steps_trained:
            _log.warning(
                "%s: nothing was trained: the data of %s ended before the first step. Is there a whole batch in it "
                "(batch_size, drop_remainder, the folder)?",
                self.model._who,
                program.scope,
            )
        elif self._step is not None and taken < self._step:
            _log.info(
                "%s: the data of %s ended after %d of %d steps", self.model._who, program.scope, taken, self._step
            )

    def _extra(self, op: tf.Operation) -> Sequence[Any]:
        # Converted once: a variable, or what an assignment to one returns, makes a new op each time it is read.
        if self._fetches is None:
            self._fetches = [
                fetch if isinstance(fetch, (tf.Operation, tf.Tensor)) else as_graph_tensor(fetch, "LoopStage")
                for fetch in tf.nest.flatten(self.run_ops)
            ]
        return [fetch for fetch in self._fetches if fetch is not op]
