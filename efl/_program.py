"""What a compiled task runs in one step of one mode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import tensorflow.compat.v1 as tf

from efl._graph import as_graph_tensor
from efl._task_scope import TaskScope
from efl.errors import ModelError

# Ops whose output does not change when they are run again after the step, or changes only with the variables.
_STATEFUL_READS = {
    "VarHandleOp",
    "ReadVariableOp",
    "Variable",
    "VariableV2",
    "VarIsInitializedOp",
    "ResourceGather",
}

#: What every line of the log says of itself; no metric can be called so.
LOG_FIELDS = frozenset({"role", "mode", "task", "step", "batches", "loss", "steps_per_second", "wait_ms"})


@dataclass(frozen=True)
class Metric:
    """A metric as ``add_metric`` took it.

    Attributes:
      name: Under which it is logged.
      value: Scalar tensor to report.
      update: Runs in every step, before ``value`` is read; None for a plain tensor.
      in_step: The value has to be fetched in the step itself, because it depends on the batch.
      given: What the user passed.
    """

    name: str
    value: tf.Tensor
    update: Any | None
    in_step: bool
    given: Any = None

    @classmethod
    def parse(cls, name: str, metric: Any) -> Metric:
        """Checks what a user passed.

        Raises:
          ModelError: Neither a tensor nor a ``(value, update_op)`` pair.
        """
        if not isinstance(name, str) or not name:
            raise ModelError(f"add_metric: {name!r} is not a name")
        if isinstance(metric, (tuple, list)):
            if len(metric) != 2:
                raise ModelError(
                    f"metric {name!r}: expected a tensor or a (value, update_op) pair, got {len(metric)} items"
                )
            value = as_graph_tensor(metric[0], f"value of metric {name!r}")
            update = (
                metric[1] if isinstance(metric[1], tf.Operation) else as_graph_tensor(metric[1], f"update of {name!r}")
            )
            return cls(name, value, update, not survives_step(value), tuple(metric))
        value = as_graph_tensor(metric, f"metric {name!r}")
        if value.dtype == tf.string:
            raise ModelError(f"metric {name!r}: expected numbers, got text")
        return cls(name, value, None, True, value)


@dataclass
class Program:
    """One task in one mode: its sample, loss, metrics, hooks, and the op that makes a step.

    Attributes:
      scope: Task and mode.
      sample: What ``input_fn`` returned.
      loss: Scalar loss of this party, or None where only the peer's gradients drive it.
      loss_given: What its ``loss_fn`` returned, before it was reduced to a scalar.
      has_loss: Its ``loss_fn`` has been called: ``loss`` is final.
      op: Everything a step does.
      metrics: By name.
      hooks: Active in this task and mode only.
      optimizers: Optimizer -> (variables that it trains, scope).
      metric_variables: State of the metrics made for this task and mode.
      extra_ops: Further ops of each step.
      moving: The update ops that its loss and its optimizers made (moving averages).
      metrics_initializer: Starts these metrics afresh.
      known_ops: Every op that was ever this program's.
      exhausted: Its reader came to the end of the data.
      one_shots: The one-shot iterators that it reads; None before they were looked for.
    """

    scope: TaskScope
    sample: Any = None
    loss: tf.Tensor | None = None
    loss_given: tf.Tensor | None = None
    has_loss: bool = False
    op: tf.Operation | None = None
    metrics: dict[str, Metric] = field(default_factory=dict)
    hooks: list[tf.train.SessionRunHook] = field(default_factory=list)
    optimizers: dict[Any, tuple[list[tf.Variable], str | None]] = field(default_factory=dict)
    metric_variables: list[tf.Variable] = field(default_factory=list)
    extra_ops: list[Any] = field(default_factory=list)
    moving: list[Any] = field(default_factory=list)
    metrics_initializer: tf.Operation | None = None
    known_ops: list[tf.Operation] = field(default_factory=list)
    exhausted: bool = False
    one_shots: list[tf.Operation] | None = None
    _lookups: tuple[tf.Operation, list[tf.Operation]] | None = None

    def set_op(self, op: tf.Operation) -> None:
        """Makes ``op`` what a step runs; earlier ones are still recognised as this program's."""
        self.op = op
        self.known_ops.append(op)

    def lookups(self) -> list[tf.Operation]:
        """The ops of a step that look up rows of variables; to be run by name beside ``op``.

        TensorFlow's optimizer makes of a lookup whose rows are added up right away a read of the whole variable, which
        is a copy of it wherever rows were updated: milliseconds for each large table, and not after what the lookup
        waits for. Ops that are asked for by name it leaves alone.
        """
        assert self.op is not None
        if self._lookups is None or self._lookups[0] is not self.op:
            found = [op for op in ancestors(self.op) if op.type == "ResourceGather"]
            self._lookups = self.op, sorted(found, key=lambda op: op.name)
        return self._lookups[1]

    @property
    def fetched(self) -> tuple[tf.Tensor, ...]:
        """Tensors fetched in every step: the loss first where there is one, then metrics that need it."""
        loss = () if self.loss is None else (self.loss,)
        return loss + tuple(m.value for m in self.metrics.values() if m.in_step)

    @property
    def read_after(self) -> dict[str, tf.Tensor]:
        """Metric values to read between steps."""
        return {m.name: m.value for m in self.metrics.values() if not m.in_step}

    def step_ops(self) -> list[Any]:
        """Ops of every step beyond the update itself."""
        updates = [m.update for m in self.metrics.values() if m.update is not None]
        values = [m.value for m in self.metrics.values() if m.in_step]
        if self.sample is None:
            return [*updates, *values, *self.extra_ops]
        # The features too: a step takes a batch even where nothing else of it needs one.
        return [*self.sample.before_step_ops(), *feature_tensors(self.sample), *updates, *values, *self.extra_ops]


def feature_tensors(sample: Any) -> list[tf.Tensor]:
    """The dense tensors of a sample's features (of a sparse one, its values)."""
    features = [f.values if isinstance(f, tf.SparseTensor) else f for f in sample.features.values()]
    return [feature for feature in features if isinstance(feature, tf.Tensor)]


def survives_step(tensor: tf.Tensor) -> bool:
    """Whether a tensor depends on variables and constants only, so that it can be read after the step."""
    return not any(
        op.type not in _STATEFUL_READS and (op.type.startswith("Placeholder") or op._is_stateful)
        for op in ancestors(tensor.op)
    )


def ancestors(*ops: tf.Operation) -> list[tf.Operation]:
    """All ops that the given ones depend on, themselves included."""
    seen, stack = set(ops), list(ops)
    while stack:
        op = stack.pop()
        for before in [t.op for t in op.inputs] + list(op.control_inputs):
            if before not in seen:
                seen.add(before)
                stack.append(before)
    return list(seen)


def as_metrics(returned: Any, where: str) -> list[Any]:
    """What an ``eval_fn`` returned, as a list of metrics (tensors or pairs).

    Raises:
      ModelError: Something else than a tensor, a (value, update_op) pair, a list of them, or None.
    """
    if returned is None:
        return []
    if isinstance(returned, tuple) and len(returned) == 2:
        return [returned]  # a (value, update_op) pair as tf.metrics and efl.metrics return it
    if isinstance(returned, (list, tuple)):
        items: Sequence[Any] = returned
        if (
            len(items) == 2
            and all(isinstance(i, (tf.Tensor, tf.Operation)) for i in items)
            and isinstance(items[1], tf.Operation)
        ):
            return [tuple(items)]
        return [item for item in items if item is not None]
    if isinstance(returned, (tf.Tensor, tf.Operation)) or hasattr(returned, "dtype"):
        return [returned]
    raise ModelError(
        f"{where} returned a {type(returned).__name__}: expected a tensor, a (value, update_op) pair, a list of these, "
        "or None"
    )
