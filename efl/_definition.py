"""The defining half of a model: its functions, metrics, hooks and further ops, by task and mode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import tensorflow.compat.v1 as tf

from efl._graph import as_graph_tensor
from efl._program import LOG_FIELDS, Metric, Program
from efl._task_scope import MODE, TaskScope, current_task_scope
from efl.errors import ModelError

_Model = TypeVar("_Model", bound="Definition")


class Definition:
    """What a user says of a model before ``compile``; ``efl.Model`` builds and runs it."""

    def __init__(self) -> None:
        self._input_fns: dict[str | None, Callable[..., Any]] = {}
        self._loss_fns: dict[str | None, Callable[..., Any]] = {}
        self._eval_fns: dict[str | None, Callable[..., Any]] = {}
        self._opt_fns: dict[str | None, Callable[..., Any]] = {}
        self._extra_data: dict[Any, Any] = {}
        self._programs: dict[TaskScope, Program] = {}
        self._compiled = False

    def input_fn(self: _Model, input_fn: Callable[[_Model, MODE], Any], task: str | None = None) -> _Model:
        """Sets a task's input: ``input_fn(model, mode) -> Sample``. Called for EVAL only where there is an eval_fn."""
        return self._define(self._input_fns, input_fn, task, "input_fn")

    def loss_fn(self: _Model, loss_fn: Callable[[_Model, Any], Any], task: str | None = None) -> _Model:
        """Sets a task's loss: ``loss_fn(model, sample) -> loss``.

        The loss is a scalar or a vector (see ``opt_config`` of ``compile``).
        """
        return self._define(self._loss_fns, loss_fn, task, "loss_fn")

    def eval_fn(self: _Model, eval_fn: Callable[[_Model, Any], Any], task: str | None = None) -> _Model:
        """Sets a task's evaluation.

        ``eval_fn(model, sample)`` returns a tensor, a (value, update_op) pair, a list or None.
        """
        return self._define(self._eval_fns, eval_fn, task, "eval_fn")

    def optimizer_fn(
        self: _Model, optimizer_fn: Callable[[_Model, str | None], Any], task: str | None = None
    ) -> _Model:
        """Sets a task's optimizers: ``optimizer_fn(model, task) -> {optimizer: (variables, scope)}``.

        Usually made by ``efl.optimizer_fn.optimizer_setter`` or ``efl.optimizer_fn.scope_optimizer``.
        """
        return self._define(self._opt_fns, optimizer_fn, task, "optimizer_fn")

    def add_metric(self, name: str, metric: Any, mode: MODE | None = None, task: str | None = None) -> None:
        """Adds a metric to what a mode of a task reports.

        Args:
          name: Under which it is logged.
          metric: A tensor, fetched in each step; or a ``(value, update_op)`` pair: the update runs in every step, the
            value is read after it. Evaluation metrics start afresh at each evaluation.
          mode: Default: the scope in which it is called, else TRAIN.
          task: Default: the scope in which it is called.

        Raises:
          ModelError: Not a metric, the name is taken in that mode and task or is that of another field of the log
            line, or a pair comes after ``compile``.
        """
        program = self._program(self._scope(mode, task))
        if name in LOG_FIELDS:
            raise ModelError(f"metric {name!r}: the log line has a field of that name; choose another")
        if name in program.metrics:
            raise ModelError(f"metric {name!r} exists already in {program.scope}")
        parsed = Metric.parse(name, metric)
        if self._compiled and parsed.update is not None:
            raise ModelError(
                f"add_metric({name!r}) after compile(): the steps are built, so its update would never run; add it in "
                "loss_fn or eval_fn, or before compile()"
            )
        program.metrics[name] = parsed

    def add_hooks(
        self, hooks: Sequence[tf.train.SessionRunHook], mode: MODE | None = None, task: str | None = None
    ) -> None:
        """Adds session hooks that run in one mode of one task only.

        Without ``mode`` and ``task`` they belong to the scope in which this is called, else to TRAIN.

        Raises:
          ModelError: Something in the list is not a ``tf.train.SessionRunHook``, or a ``CheckpointSaverHook`` that has
            no saver.
        """
        if isinstance(hooks, tf.train.SessionRunHook):
            hooks = [hooks]
        for hook in hooks:
            if not isinstance(hook, tf.train.SessionRunHook):
                raise ModelError(f"add_hooks: {hook!r:.100} is not a tf.train.SessionRunHook")
            if isinstance(hook, tf.train.CheckpointSaverHook) and _lacks_saver(hook):
                raise ModelError(
                    "add_hooks: a CheckpointSaverHook without a saver, which has nothing to save with. efl saves by "
                    "itself, with the readers' positions and at the same steps as the peer: leave the hook out and use "
                    "fit(checkpoint_dir=..., save_checkpoint_steps=...), or give it saver=tf.train.Saver()"
                )
        self._program(self._scope(mode, task)).hooks.extend(hooks)

    def add_train_op(self, train_op: Any, task: str | None = None) -> None:
        """Adds an op to each training step of a task."""
        self._add_op(TaskScope(MODE.TRAIN, self._task(task)), train_op)

    def add_eval_op(self, eval_op: Any, task: str | None = None) -> None:
        """Adds an op to each evaluation step of a task."""
        self._add_op(TaskScope(MODE.EVAL, self._task(task)), eval_op)

    def add_extra_data(self, key: Any, value: Any) -> None:
        """Keeps any value under a key, for the user's functions to share."""
        self._extra_data[key] = value

    def get_extra_data(self, key: Any) -> Any:
        """Returns what ``add_extra_data`` kept.

        Raises:
          ModelError: Nothing was kept under that key.
        """
        if key not in self._extra_data:
            raise ModelError(
                f"no extra data under {key!r}; there is: {', '.join(map(repr, self._extra_data)) or 'nothing'}"
            )
        return self._extra_data[key]

    @property
    def input_fns(self) -> dict[str | None, Callable[..., Any]]:
        """Task -> its input_fn."""
        return dict(self._input_fns)

    @property
    def loss_fns(self) -> dict[str | None, Callable[..., Any]]:
        """Task -> its loss_fn."""
        return dict(self._loss_fns)

    @property
    def opt_fns(self) -> dict[str | None, Callable[..., Any]]:
        """Task -> its optimizer_fn."""
        return dict(self._opt_fns)

    @property
    def extra_data(self) -> dict[Any, Any]:
        """What ``add_extra_data`` kept."""
        return dict(self._extra_data)

    # ---- private -----------------------------------------------------------------------------------------------------

    def _scope(self, mode: MODE | None, task: str | None) -> TaskScope:
        current = current_task_scope()
        return TaskScope(mode or current.mode or MODE.TRAIN, self._task(task))

    @staticmethod
    def _task(task: str | None) -> str | None:
        return task if task is not None else current_task_scope().task

    def _program(self, scope: TaskScope) -> Program:
        return self._programs.setdefault(scope, Program(scope))

    def _define(self: _Model, where: dict[str | None, Any], function: Any, task: str | None, what: str) -> _Model:
        TaskScope(None, task)
        if not callable(function):
            raise ModelError(f"{what}: expected a function, got {type(function).__name__}")
        if self._compiled:
            raise ModelError(f"{what}: the model is compiled already")
        where[task] = function
        return self

    def _add_op(self, scope: TaskScope, op: Any) -> None:
        if not isinstance(op, (tf.Operation, tf.Tensor)):
            op = as_graph_tensor(op, "add_train_op" if scope.mode is MODE.TRAIN else "add_eval_op")
        program = self._program(scope)
        program.extra_ops.append(op)
        if program.op is not None:
            program.set_op(tf.group(program.op, op))


def _lacks_saver(hook: tf.train.CheckpointSaverHook) -> bool:
    # Where it is given none, the hook takes the graph's; there, only MonitoredTrainingSession would have made one.
    given = getattr(hook, "_saver", None) or getattr(hook, "_scaffold", None)
    return given is None and not tf.get_collection(tf.GraphKeys.SAVERS)
