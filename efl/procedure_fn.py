"""How a run goes: functions whose result is handed to ``model.fit``.

    model.fit(efl.procedure_fn.train(max_step=1000))
    model.fit(efl.procedure_fn.train_and_evaluate(train_step=100, eval_step=10, max_iter=5))

A procedure of your own is a function of the model that calls ``model.run_stage``. In a federation both parties must run
the same procedure; the handshake compares name and arguments, a time limit is the leader's to call.
"""

from __future__ import annotations

import numbers
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from efl._task_scope import MODE
from efl.errors import ConfigError, ModelError
from efl.stage import LoopStage

if TYPE_CHECKING:
    from efl.model import Model


@dataclass(frozen=True)
class Procedure:
    """A run as data: what the parties compare, and what is done.

    Attributes:
      name: Such as ``"train"``.
      arguments: JSON values; equal on both sides.
      body: Runs the stages of a model.
      trains: Whether it changes weights (a procedure that does not needs a checkpoint to be of use).
    """

    name: str
    arguments: Mapping[str, Any]
    body: Callable[[Model], None] = field(compare=False)
    trains: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "arguments", {key: _plain(value) for key, value in self.arguments.items()})

    def __call__(self, model: Model) -> None:
        """Runs the stages of ``model``."""
        self.body(model)

    def describe(self) -> str:
        """Name and arguments in one line, as the handshake compares and errors show it."""
        given = ", ".join(f"{key}={value!r}" for key, value in self.arguments.items() if value is not None)
        return f"{self.name}({given})"


def train(max_step: int | None = None, task: str | None = None) -> Procedure:
    """Trains.

    Args:
      max_step: Number of steps of this procedure, beside those that checkpoints of others have; None: to the end of the
        data (of whichever party ends first).
      task: Which task, where the model has several.

    Returns:
      A procedure for ``fit``.

    Raises:
      ConfigError: ``max_step`` is not positive.
    """
    _positive(max_step=max_step)

    def body(model: Model) -> None:
        model.run_stage("train", LoopStage(model.train_op(_only(model, MODE.TRAIN, task)), True, max_step))

    return Procedure("train", {"max_step": max_step, "task": task}, body)


def eval(max_step: int | None = None, task: str | None = None) -> Procedure:
    """Evaluates: a checkpoint, or the weights that the model has.

    Args:
      max_step: Number of batches; None: to the end of the data.
      task: Which task, where the model has several.

    Returns:
      A procedure for ``fit``.

    Raises:
      ConfigError: ``max_step`` is not positive.
    """
    _positive(max_step=max_step)

    def body(model: Model) -> None:
        model.run_stage("eval", LoopStage(model.eval_op(_only(model, MODE.EVAL, task)), False, max_step))

    return Procedure("eval", {"max_step": max_step, "task": task}, body, trains=False)


def train_and_evaluate(
    train_step: int | None = None,
    eval_step: int | None = None,
    train_interval: float | None = None,
    eval_interval: float | None = None,
    max_iter: int | None = None,
    task: str | None = None,
) -> Procedure:
    """Trains and evaluates in turn.

    Each iteration trains ``train_step`` steps or ``train_interval`` seconds (whatever comes first; with neither, to the
    end of the data) and then evaluates likewise. Readers go on where they stopped; an evaluation reader at its end
    starts over; the end of the training data ends the run, after a last evaluation of what was trained.

    Args:
      train_step: Training steps of an iteration.
      eval_step: Evaluation batches of an iteration.
      train_interval: Seconds of training of an iteration, by the leader's clock.
      eval_interval: Seconds of evaluation of an iteration, by the leader's clock.
      max_iter: Iterations; None: until the training data ends.
      task: Which task, where the model has several.

    Returns:
      A procedure for ``fit``.

    Raises:
      ConfigError: An argument is not positive.
    """
    _positive(train_step=train_step, eval_step=eval_step, max_iter=max_iter)
    _positive_seconds(train_interval=train_interval, eval_interval=eval_interval)

    def body(model: Model) -> None:
        trained = LoopStage(model.train_op(_only(model, MODE.TRAIN, task)), True, train_step, train_interval)
        evaluated = LoopStage(model.eval_op(_only(model, MODE.EVAL, task)), False, eval_step, eval_interval)
        iteration = 0
        while max_iter is None or iteration < max_iter:
            before = model.steps_trained
            model.run_stage("train", trained)
            if trained.finish and iteration > 0 and model.steps_trained == before and not model.stage_mgr.skipped:
                break  # nothing was trained since the last evaluation
            model.run_stage("eval", evaluated)
            if trained.finish:
                break
            iteration += 1

    arguments = {
        "train_step": train_step,
        "eval_step": eval_step,
        "train_interval": train_interval,
        "eval_interval": eval_interval,
        "max_iter": max_iter,
        "task": task,
    }
    return Procedure("train_and_evaluate", arguments, body)


train_and_eval = train_and_evaluate
"""Another name of ``train_and_evaluate``."""


def cotrain(
    train_step: int | None = None,
    eval_step: int | None = None,
    max_iter: int | None = None,
    task_select_ratio: Mapping[str, float] | None = None,
) -> Procedure:
    """Trains several tasks by turns.

    Each iteration draws a task, trains it, and evaluates it where it has an ``eval_fn``. Both parties draw the same
    task in each iteration (the draw is a function of the run's shared seed and the iteration).

    Args:
      train_step: Training steps of an iteration.
      eval_step: Evaluation batches of an iteration.
      max_iter: Iterations; None: until the training data of a drawn task ends.
      task_select_ratio: Task -> probability; the probabilities sum to 1. None: all tasks alike.

    Returns:
      A procedure for ``fit``.

    Raises:
      ConfigError: An argument is not positive, or the ratios do not sum to 1.
      ModelError: When run: a task that the model does not have, or none with a ``loss_fn``.
    """
    _positive(train_step=train_step, eval_step=eval_step, max_iter=max_iter)
    if task_select_ratio is not None:
        if not isinstance(task_select_ratio, Mapping) or not task_select_ratio:
            raise ConfigError(f"task_select_ratio={task_select_ratio!r}: expected a dict of task -> probability")
        bad = {
            t: r
            for t, r in task_select_ratio.items()
            if isinstance(r, bool) or not isinstance(r, (int, float)) or not r >= 0
        }
        total = None if bad else sum(task_select_ratio.values())
        if total is None or abs(total - 1) > 1e-6:
            raise ConfigError(
                f"task_select_ratio={dict(task_select_ratio)!r}: expected probabilities that sum to 1"
                + ("" if total is None else f", they sum to {total:g}")
            )

    def body(model: Model) -> None:
        known = model.tasks(MODE.TRAIN)
        if not known:
            raise ModelError("cotrain: the model has no task with a loss_fn")
        ratios: Mapping[Any, float] = task_select_ratio or {task: 1 / len(known) for task in known}
        unknown = sorted(str(t) for t in set(ratios) - set(known))
        if unknown:
            raise ModelError(f"task_select_ratio names unknown tasks {', '.join(unknown)}; the model has {known!r}")
        names: list[str | None] = sorted(ratios, key=str)
        stages = {
            name: (
                LoopStage(model.train_op(name), True, train_step),
                LoopStage(model.eval_op(name), False, eval_step) if name in model.tasks(MODE.EVAL) else None,
            )
            for name in names
        }
        iteration = 0
        while max_iter is None or iteration < max_iter:
            draw = random.Random(f"{model.shared_seed}/{iteration}")
            name = draw.choices(names, [ratios[n] for n in names])[0]
            trained, evaluated = stages[name]
            model.run_stage(f"train:{name}", trained)
            if evaluated is not None:
                model.run_stage(f"eval:{name}", evaluated)
            if trained.finish:
                break
            iteration += 1

    arguments = {
        "train_step": train_step,
        "eval_step": eval_step,
        "max_iter": max_iter,
        "task_select_ratio": None if task_select_ratio is None else dict(sorted(task_select_ratio.items(), key=str)),
    }
    return Procedure("cotrain", arguments, body)


def _plain(value: Any) -> Any:
    """A JSON value; equal numbers become the same, whatever their types."""
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    number = float(value)
    return int(number) if number.is_integer() else number


def _only(model: Model, mode: MODE, task: str | None) -> str | None:
    tasks = model.tasks(mode)
    if task is not None or tasks == [None] or not tasks:
        return task
    if len(tasks) == 1:
        return tasks[0]
    raise ModelError(
        f"the model has several tasks ({', '.join(map(str, tasks))}): pass task=…, or use procedure_fn.cotrain"
    )


def _positive(**counts: int | None) -> None:
    for name, count in counts.items():
        if count is not None and (isinstance(count, bool) or not isinstance(count, numbers.Integral) or count < 1):
            raise ConfigError(f"{name}={count!r}: expected a positive whole number, or None")


def _positive_seconds(**seconds: float | None) -> None:
    for name, value in seconds.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, numbers.Real) or not value > 0):
            raise ConfigError(f"{name}={value!r}: expected a positive number of seconds, or None")
