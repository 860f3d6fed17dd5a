"""Noise of embedding rows that nobody reads, drawn when somebody does.

Every row of a table is noised in every step, for which rows moved would be visible otherwise. But the noise of a row
that a step does not read can wait: it is a sum of Gaussians, which is one Gaussian of their variances' sum (LazyDP,
Lim et al., arXiv:2404.08847). So a step costs what it reads of a table, not what the table is large. All that waits is
drawn before anybody can see it: before an evaluation, a checkpoint, ``get_weights``, the end of the run.

What floating point would tell. A row that was updated ten times has been rounded ten times, one whose noise came in
one piece once; with the values in sight, that would show how often a row was read. So rows lie on a grid of steps of a
power of two, on which single precision adds exactly, in any order: what a row is then depends on the sum of its
updates alone. An update is rounded to the grid once, noise included; of n updates in one piece the variance is that of
n, their rounding included.

Only plain gradient descent adds its updates up; the tables of other optimizers are noised as a whole in every step.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow.compat.v1 as tf

from efl._program import ancestors
from efl.errors import ModelError
from efl.privacy.noise import ROOM, grid_of_rows

if TYPE_CHECKING:
    from efl.privacy.optimizers import PrivateOptimizer
    from efl.privacy.per_example import PerExample

_log = logging.getLogger("efl")
LEAST_ROWS = 4096  # a smaller table is noised as a whole faster than what waits is kept account of
_HARMLESS = frozenset({"VarIsInitializedOp", "AssignVariableOp", "DestroyResourceOp"})


@dataclass(frozen=True)
class _Table:
    """One embedding table.

    Attributes:
      variable: ``[V, D]`` float32.
      gathers: The ops of the training step that read rows of it.
      since: float64 ``[V]``: the account's total when the row was last noised.
    """

    variable: tf.Variable
    gathers: list[tf.Operation]
    since: tf.Variable

    @property
    def width(self) -> int:
        return int(self.variable.shape[1])


class DeferredRows(tf.IndexedSlices):
    """A table's update: what is to be added to some rows, noise included, on the grid."""

    def __init__(self, values: tf.Tensor, indices: tf.Tensor, table: _Table, total: tf.Tensor) -> None:
        super().__init__(values, indices, tf.constant(table.variable.shape.as_list(), tf.int64))
        self._table, self._total = table, total

    def add_to_table(self) -> tf.Operation:
        """Applies it."""
        noised = tf.fill(tf.shape(self.indices), self._total)
        return tf.group(
            _add_to_rows(self._table.variable, self.indices, self.values),
            tf.raw_ops.ResourceScatterUpdate(resource=self._table.since.handle, indices=self.indices, updates=noised),
        )


class Deferred:
    """The tables of one optimizer whose noise waits.

    The account's *total* is the sum of the variances of all steps so far, in squared units of the weights; what a row
    is owed is the difference to the total when it was last noised.

    Args:
      tables: (variable, ops that read it).
      deviation: Standard deviation of the noise on a sum, clip times multiplier.
      factor: float64 scalar: by what a sum is multiplied before it is taken from the weights.
      overdue: (deviation of each row's noise, width of each row's table …) -> noise; see ``Releases.overdue``.
    """

    def __init__(
        self,
        tables: Sequence[tuple[tf.Variable, list[tf.Operation]]],
        deviation: float,
        factor: tf.Tensor,
        overdue: Callable[[np.ndarray, np.ndarray, float], np.ndarray],
    ) -> None:
        self._deviation, self._factor, self._overdue = deviation, factor, overdue
        self._caught_up: list[tf.Operation] = []
        self.dirty = False  # whether rows are owed noise
        with tf.name_scope(None), tf.control_dependencies(None):
            name = f"efl_privacy/deferred/{tables[0][0].op.name}"
            self._total = _account(f"{name}/total", [])
            self.unit = _account(f"{name}/unit", [])  # the grid's step; 0 before the first run
            self._tables = [
                _Table(v, gathers, _account(f"efl_privacy/deferred/{v.op.name}/since", [int(v.shape[0])]))
                for v, gathers in tables
            ]
            self._align = self._make_align()
            self._flush, self._worst = self._make_flush()

    @property
    def variables(self) -> set[Any]:
        """References of the tables."""
        return {table.variable.ref() for table in self._tables}

    # ---- outside of steps

    def align(self, session: tf.Session) -> None:
        """Puts the weights on the grid, wherever they come from. Before training."""
        session.run(self._align)

    def flush(self, session: tf.Session) -> None:
        """Gives every row the noise that it is owed.

        Raises:
          ModelError: Weights have grown beyond what the grid can hold.
        """
        if not self.dirty:
            return
        worst = session.run([self._flush, self._worst])[1]
        self.dirty = False
        for table, size in zip(self._tables, worst, strict=True):
            if not size < ROOM:
                raise ModelError(
                    f"{table.variable.op.name}: weights have grown to {size:.3g} steps of the grid on which their "
                    f"noise waits, expected less than {ROOM:.3g}: lower the learning rate, or set "
                    "opt_config={'DEFER_NOISE': False}, which noises the whole table in every step"
                )

    def _make_align(self) -> tf.Operation:
        first = tf.numpy_function(grid_of_rows, [self._factor * self._deviation], tf.float64)
        unit = tf.where(self.unit.read_value() > 0, self.unit.read_value(), tf.ensure_shape(first, []))
        ops = [self.unit.assign(unit, read_value=False)]
        for table in self._tables:
            on_grid = tf.round(tf.cast(table.variable.read_value(), tf.float64) / unit) * unit
            ops.append(table.variable.assign(tf.cast(on_grid, tf.float32), read_value=False))
        return tf.group(ops)

    def _make_flush(self) -> tuple[tf.Operation, tf.Tensor]:
        total, unit = self._total.read_value(), self.unit.read_value()
        parts = self._owed([None] * len(self._tables), total, unit)
        ops = []
        for table, part in zip(self._tables, parts):
            with tf.control_dependencies([table.variable.assign_add(part, read_value=False)]):
                ops.append(table.since.assign(tf.fill(tf.shape(table.since), total), read_value=False))
        with tf.control_dependencies(ops):
            sizes = [tf.reduce_max(tf.abs(table.variable.read_value())) for table in self._tables]
            worst = tf.cast(tf.stack(sizes), tf.float64) / unit
        return tf.group(ops), worst

    # ---- in a step

    def catch_up(self) -> None:
        """Makes the step give the rows that it reads what they are owed, before it reads them."""
        total, unit = self._total.read_value(), self.unit.read_value()
        rows = [
            tf.unique(tf.concat([tf.reshape(tf.cast(g.inputs[1], tf.int64), [-1]) for g in table.gathers], 0)).y
            for table in self._tables
        ]
        for table, read, part in zip(self._tables, rows, self._owed(rows, total, unit)):
            with tf.control_dependencies([part]):  # which was made of what was owed until now
                done = tf.group(
                    _add_to_rows(table.variable, read, part),
                    tf.raw_ops.ResourceScatterUpdate(
                        resource=table.since.handle, indices=read, updates=tf.fill(tf.shape(read), total)
                    ),
                )
            self._caught_up.append(done)
            for gather in table.gathers:
                gather._add_control_input(done)

    def _owed(self, rows: Sequence[tf.Tensor | None], total: tf.Tensor, unit: tf.Tensor) -> list[tf.Tensor]:
        """The noise that some rows of each table are owed (None: all), ``[rows, D]``."""
        held = [
            table.since.read_value() if which is None else table.since.sparse_read(which)
            for table, which in zip(self._tables, rows)
        ]
        # Rounding to the grid adds its own variance; see Releases.overdue.
        owed = tf.sqrt(tf.maximum(total - tf.concat(held, 0), 0.0))
        sizes = [tf.shape(since)[0] for since in held]
        widths = tf.concat([tf.fill([n], table.width) for n, table in zip(sizes, self._tables)], 0)
        flat = tf.numpy_function(self._overdue, [owed, widths, unit], tf.float32)
        numbers = [n * table.width for n, table in zip(sizes, self._tables)]
        parts = tf.split(tf.ensure_shape(flat, [None]), tf.stack(numbers), num=len(numbers))
        return [tf.reshape(part, [-1, table.width]) for part, table in zip(parts, self._tables)]

    @staticmethod
    def sums_of(slices: tf.Tensor | tf.IndexedSlices) -> tuple[tf.Tensor, tf.Tensor]:
        """Rows of a table, each once, and the sum of what was added to each."""
        if not isinstance(slices, tf.IndexedSlices):
            return tf.range(tf.shape(slices, out_type=tf.int64)[0]), slices
        rows, places = tf.unique(tf.cast(slices.indices, tf.int64))
        return rows, tf.math.unsorted_segment_sum(slices.values, places, tf.shape(rows)[0])

    def updates(self, rows: Sequence[tuple[tf.Variable, tf.Tensor]], deltas: Sequence[tf.Tensor]) -> list[DeferredRows]:
        """What is to be applied, and counted: once in a step, after the noise was drawn."""
        unit = self.unit.read_value()
        # A gradient need not depend on what was read, so the order has to be said.
        with tf.control_dependencies([*deltas, *self._caught_up]):
            variance = tf.square(self._factor * self._deviation) + tf.square(unit) / 12
            total = self._total.assign_add(variance)
        by_variable = {table.variable.ref(): table for table in self._tables}
        return [
            DeferredRows(delta, which, by_variable[variable.ref()], total)
            for (variable, which), delta in zip(rows, deltas)
        ]

    @property
    def scale(self) -> tuple[tf.Tensor, tf.Tensor]:
        """By what sums are multiplied, and the grid: what ``Releases.noised`` needs for a step's rows."""
        return -self._factor, self.unit.read_value()


def _account(name: str, shape: list[int]) -> tf.Variable:
    zeros = tf.zeros(shape, tf.float64)
    return tf.Variable(zeros, trainable=False, use_resource=True, name=name)


def _add_to_rows(variable: tf.Variable, rows: tf.Tensor, values: tf.Tensor) -> tf.Operation:
    return tf.raw_ops.ResourceScatterAdd(resource=variable.handle, indices=rows, updates=values)


def candidates(
    optimizer: PrivateOptimizer, gradients: PerExample, targets: Sequence[Any], others: Sequence[Any]
) -> list[tuple[tf.Variable, list[tf.Operation]]]:
    """The tables of an optimizer whose noise may wait, and the ops of the training step that read them.

    Args:
      optimizer: Private.
      gradients: Of its variables.
      targets: What the step computes.
      others: What the steps of other tasks compute.
    """
    if not isinstance(optimizer, tf.train.GradientDescentOptimizer) or not optimizer.noise_multiplier:
        return []
    inside = set(ancestors(*(t.op if isinstance(t, tf.Tensor) else t for t in targets)))
    outside = set(ancestors(*(t.op if isinstance(t, tf.Tensor) else t for t in others))) if others else set()
    found = []
    for variable in gradients.variables:
        if variable.dtype.base_dtype != tf.float32 or variable.shape.rank != 2 or variable.shape[0] < LEAST_ROWS:
            continue
        if getattr(variable, "handle", None) is None:
            continue
        readers = [op for op in variable.handle.consumers() if op.type not in _HARMLESS]
        here = [op for op in readers if op in inside]
        if not here or any(op.type != "ResourceGather" or op._get_control_flow_context() for op in here):
            _log.info("%s: all of it is read in a step, so all of it is noised in each", variable.op.name)
            continue
        if any(op in outside for op in readers):
            _log.info("%s: another task reads it too, so all of it is noised in each step", variable.op.name)
            continue
        found.append((variable, here))
    return found
