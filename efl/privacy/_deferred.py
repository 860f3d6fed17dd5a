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

Only plain gradient descent adds its updates up; the tables of other optimizers are noised as a whole in every step, and
so are those of a class of its kind that updates in a way of its own.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow.compat.v1 as tf

from efl._program import ancestors
from efl.errors import ModelError
from efl.privacy._vector import one_vector, parts_of
from efl.privacy.noise import ROOM, grid_of_rows
from efl.privacy.noise.releases import Rows

if TYPE_CHECKING:
    from efl.privacy.optimizers import PrivateOptimizer
    from efl.privacy.per_example import PerExample

_log = logging.getLogger("efl")
LEAST_ROWS = 4096  # a smaller table is noised as a whole faster than what waits is kept account of
_HARMLESS = frozenset({"VarIsInitializedOp", "AssignVariableOp", "DestroyResourceOp"})
_PLAIN = tf.train.GradientDescentOptimizer
# What of an optimizer has no part in an update: gradients are efl's own, and a constructor leaves what it set.
_NO_UPDATE = frozenset({"__init__", "compute_gradients", "minimize", "get_name"})


@dataclass(frozen=True)
class _Table:
    """One embedding table.

    Attributes:
      variable: ``[V, D]`` float32.
      gathers: The ops of the training step that read rows of it.
      first: Where its rows begin in the account.
    """

    variable: tf.Variable
    gathers: list[tf.Operation]
    first: int

    @property
    def width(self) -> int:
        return int(self.variable.shape[1])

    @property
    def distinct(self) -> tf.Tensor | None:
        """What its only op reads, where these rows are known to be distinct."""
        return _distinct(self.gathers[0].inputs[1]) if len(self.gathers) == 1 else None

    def rows(self) -> tf.Tensor:
        """int64: the rows that a step reads, each once."""
        if self.distinct is not None:
            return tf.cast(self.distinct, tf.int64)
        return tf.unique(tf.concat([tf.reshape(tf.cast(g.inputs[1], tf.int64), [-1]) for g in self.gathers], 0)).y

    def sums(self, gradient: tf.Tensor | tf.IndexedSlices, rows: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Rows, each once, and what was added to each; ``rows`` themselves where these are the gradient's."""
        if not isinstance(gradient, tf.IndexedSlices):
            return tf.range(tf.shape(gradient, out_type=tf.int64)[0]), gradient
        if self.distinct is not None and _distinct(gradient.indices) is self.distinct:
            return rows, gradient.values
        own, places = tf.unique(tf.cast(gradient.indices, tf.int64))
        return own, tf.math.unsorted_segment_sum(gradient.values, places, tf.shape(own)[0])


def _distinct(ids: tf.Tensor) -> tf.Tensor | None:
    """The output of ``tf.unique`` that some ids are, or None."""
    while ids.op.type in ("Reshape", "Identity", "Cast") and ids.op.inputs[0].shape.rank == 1:
        ids = ids.op.inputs[0]
    return ids if ids.op.type in ("Unique", "UniqueV2") and ids is ids.op.outputs[0] else None


class DeferredRows(tf.IndexedSlices):
    """A table's update: what is to be added to some rows, noise included, on the grid."""

    def __init__(self, values: tf.Tensor, indices: tf.Tensor, table: _Table, account: Callable[[], Any]) -> None:
        super().__init__(values, indices, tf.constant(table.variable.shape.as_list(), tf.int64))
        self._table, self._account = table, account

    def add_to_table(self) -> tf.Operation:
        """Applies it."""
        return tf.group(_add_to_rows(self._table.variable, self.indices, self.values), self._account())


class Deferred:
    """The tables of one optimizer whose noise waits.

    The account's *total* is the sum of the variances of all steps so far, in squared units of the weights; what a row
    is owed is the difference to the total when it was last noised.

    Args:
      tables: (variable, ops that read it).
      deviation: Standard deviation of the noise on a sum, clip times multiplier.
      factor: float64 scalar: by what a sum is multiplied before it is taken from the weights.
      overdue: (deviation of each row's noise, width of each row's table, step of the grid) -> noise; see
        ``Releases.overdue``.
    """

    def __init__(
        self,
        tables: Sequence[tuple[tf.Variable, list[tf.Operation]]],
        deviation: float,
        factor: tf.Tensor,
        overdue: Callable[[np.ndarray, np.ndarray, float], np.ndarray],
    ) -> None:
        self._deviation, self.factor, self._overdue = deviation, factor, overdue
        self._largest: tf.Tensor
        self.dirty = False  # whether rows are owed noise
        firsts = np.cumsum([0, *(int(v.shape[0]) for v, _ in tables)]).tolist()
        self._tables = [_Table(v, gathers, first) for (v, gathers), first in zip(tables, firsts)]
        with tf.name_scope(None), tf.control_dependencies(None):
            name = f"efl_privacy/deferred/{tables[0][0].op.name}"
            self._total = _account(f"{name}/total", [])
            self.unit = _account(f"{name}/unit", [])  # the grid's step; 0 before the first run
            # The total when a row was last noised, of the rows of all tables one after the other.
            self._since = _account(f"{name}/since", [firsts[-1]])
            self._align = self._make_align()
            self._flush, self._worst = self._make_flush()
            self._rows, self._places, self._caught_up = self._catch_up()

    @property
    def variables(self) -> list[tf.Variable]:
        """The tables."""
        return [table.variable for table in self._tables]

    # ---- outside of steps

    def align(self, session: tf.Session) -> None:
        """Puts the weights on the grid, wherever they come from. Before training.

        Raises:
          ModelError: The first learning rate is none to make a grid of, or weights are too large for the grid.
        """
        factor, unit = session.run([self.factor, self.unit])
        if not factor and not unit:
            raise ModelError(
                f"{self.variables[0].op.name}: the learning rate of the first step is 0, by which nobody knows how "
                "large later noise is: set opt_config={'DEFER_NOISE': False}, which noises whole tables in every step"
            )
        session.run(self._align)
        self._check_room(session.run(self._largest), "are")

    def flush(self, session: tf.Session) -> None:
        """Gives every row the noise that it is owed.

        Raises:
          ModelError: Weights have grown beyond what the grid can hold.
        """
        if not self.dirty:
            return
        worst = session.run([self._flush, self._worst])[1]
        self.dirty = False
        self._check_room(worst, "have grown to")

    def _check_room(self, worst: np.ndarray, how: str) -> None:
        for table, size in zip(self._tables, worst, strict=True):
            if not size < ROOM:
                raise ModelError(
                    f"{table.variable.op.name}: weights {how} {size:.3g} steps of the grid on which their "
                    f"noise waits, expected less than {ROOM:.3g}: lower the learning rate, or set "
                    "opt_config={'DEFER_NOISE': False}, which noises the whole table in every step"
                )

    def _make_align(self) -> tf.Operation:
        first = tf.numpy_function(grid_of_rows, [self.factor * self._deviation], tf.float64)
        # A smaller power of two is a finer grid, on which all that lay on the coarser one lies too.
        # A rate of 0 asks for none.
        first, known = tf.ensure_shape(first, []), self.unit.read_value()
        finer = tf.logical_and(tf.not_equal(self.factor, 0.0), tf.logical_or(tf.equal(known, 0.0), first < known))
        unit = tf.where(finer, first, known)
        ops = [self.unit.assign(unit, read_value=False)]
        for table in self._tables:
            on_grid = tf.round(tf.cast(table.variable.read_value(), tf.float64) / unit) * unit
            ops.append(table.variable.assign(tf.cast(on_grid, tf.float32), read_value=False))
        with tf.control_dependencies(ops):
            largest = [tf.reduce_max(tf.abs(table.variable.read_value())) for table in self._tables]
            self._largest = tf.cast(tf.stack(largest), tf.float64) / self.unit.read_value()
        return tf.group(ops)

    def _make_flush(self) -> tuple[tf.Operation, tf.Tensor]:
        total, unit = self._total.read_value(), self.unit.read_value()
        sizes = tf.constant([int(table.variable.shape[0]) for table in self._tables])
        parts = self._owed(self._since.read_value(), sizes, total, unit)
        added = [
            table.variable.assign_add(tf.ensure_shape(part, table.variable.shape), read_value=False)
            for table, part in zip(self._tables, parts)
        ]
        with tf.control_dependencies(added):
            done = self._since.assign(tf.fill(tf.shape(self._since), total), read_value=False)
            largest = [tf.reduce_max(tf.abs(table.variable.read_value())) for table in self._tables]
            worst = tf.cast(tf.stack(largest), tf.float64) / unit
        return done, worst

    # ---- in a step

    def _catch_up(self) -> tuple[list[tf.Tensor], tf.Tensor, tf.Operation]:
        """Makes the step give the rows that it reads what they are owed, before it reads them."""
        total, unit = self._total.read_value(), self.unit.read_value()
        rows = [table.rows() for table in self._tables]
        places = self._places_of(rows)
        parts = self._owed(self._since.sparse_read(places), tf.stack([tf.size(read) for read in rows]), total, unit)
        with tf.control_dependencies(parts):  # which were made of what was owed until now
            done = tf.group(
                *(_add_to_rows(table.variable, read, part) for table, read, part in zip(self._tables, rows, parts)),
                self._settle(places, total),
            )
        for table in self._tables:
            for gather in table.gathers:
                gather._add_control_input(done)
        return rows, places, done

    def _places_of(self, rows: Sequence[tf.Tensor]) -> tf.Tensor:
        return tf.concat([read + table.first if table.first else read for table, read in zip(self._tables, rows)], 0)

    def _settle(self, places: tf.Tensor, total: tf.Tensor) -> tf.Operation:
        """Notes that rows have their noise."""
        return tf.raw_ops.ResourceScatterUpdate(
            resource=self._since.handle, indices=places, updates=tf.fill(tf.shape(places), total)
        )

    def _owed(self, since: tf.Tensor, sizes: tf.Tensor, total: tf.Tensor, unit: tf.Tensor) -> list[tf.Tensor]:
        """The noise that rows are owed, of each table ``[rows, D]``; ``sizes`` says how many there are of each."""
        each = np.array([table.width for table in self._tables])

        def draw(owed: np.ndarray, sizes: np.ndarray, unit: np.ndarray) -> list[np.ndarray]:
            flat = self._overdue(owed, np.repeat(each, sizes), float(unit))
            return _split(flat, sizes, each)

        # Rounding to the grid adds its own variance; see Releases.overdue.
        owed = tf.sqrt(tf.maximum(total - since, 0.0))
        drawn = tf.numpy_function(draw, [owed, sizes, unit], [tf.float32] * len(each))
        return list(drawn)

    def updates(
        self,
        gradients: Sequence[tf.Tensor | tf.IndexedSlices],
        others: Sequence[tf.Tensor],
        step_and_rows: tuple[tf.Tensor, tf.Tensor],
        noised: Callable[[np.ndarray, int, int, Rows], np.ndarray],
    ) -> tuple[list[tf.Tensor], list[DeferredRows]]:
        """A step's noise.

        Args:
          gradients: Clipped sums of the tables.
          others: Clipped sums of other variables, float32, of the same release.
          step_and_rows: Number of the step, and rows of its batch.
          noised: (all numbers, step, rows of the batch, which numbers are rows of tables) -> what the release gives.

        Returns:
          The other sums with noise, and the tables' updates.
        """
        held = [table.sums(gradient, read) for table, gradient, read in zip(self._tables, gradients, self._rows)]
        rows, sums = [which for which, _ in held], [values for _, values in held]
        same = all(which is read for which, read in zip(rows, self._rows))
        count = len(others)

        def release(step: Any, size: Any, scale: Any, unit: Any, *held: np.ndarray) -> list[np.ndarray]:
            ends = Rows(sum(value.size for value in held[:count]), float(scale), float(unit))
            return parts_of(noised(one_vector(held), int(step), int(size), ends), held)

        unit = self.unit.read_value()
        inputs = [*step_and_rows, -self.factor, unit, *others, *sums]
        out = tf.numpy_function(release, inputs, [tf.float32] * (count + len(sums)), name="efl_noise")
        deltas = out[count:]
        # A gradient need not depend on what was read, so the order has to be said.
        with tf.control_dependencies([*deltas, self._caught_up]):
            # A step that moves nothing rounds nothing either.
            rounding = tf.where(tf.equal(self.factor, 0.0), tf.zeros_like(unit), tf.square(unit) / 12)
            total = self._total.assign_add(tf.square(self.factor * self._deviation) + rounding)
        places = self._places if same else self._places_of(rows)
        accounts: list[Callable[[], Any]] = [lambda: self._settle(places, total)]
        accounts += [lambda: total] * (len(rows) - 1)
        updates = [DeferredRows(*parts) for parts in zip(deltas, rows, self._tables, accounts)]
        return [tf.ensure_shape(part, value.shape) for part, value in zip(out, others)], updates


def _split(flat: np.ndarray, sizes: np.ndarray, widths: np.ndarray) -> list[np.ndarray]:
    """Rows of tables, one table after the other, as a matrix for each."""
    ends = np.cumsum(sizes * widths)
    return [flat[end - n * width : end].reshape(n, width) for end, n, width in zip(ends, sizes, widths)]


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
    if not isinstance(optimizer, _PLAIN) or not optimizer.noise_multiplier:
        return []
    changed = _changed_update(optimizer)
    if changed:
        name = type(optimizer).__name__
        _log.info("%s: updates in a way of its own (%s), so tables are noised as a whole in each step", name, changed)
        return []
    inside = set(ancestors(*(t.op if isinstance(t, tf.Tensor) else t for t in targets)))
    outside = set(ancestors(*(t.op if isinstance(t, tf.Tensor) else t for t in others))) if others else set()
    found = []
    for variable in gradients.variables:
        if variable.dtype.base_dtype != tf.float32 or variable.shape.rank != 2 or variable.shape[0] < LEAST_ROWS:
            continue
        if getattr(variable, "handle", None) is None:
            continue
        if variable.constraint is not None:
            _log.info("%s has a constraint, for which all of it is noised in each step", variable.op.name)
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


def _changed_update(optimizer: PrivateOptimizer) -> str:
    """The first part of an update that is not plain gradient descent's own, or ``""``.

    A table's update is added to it past the optimizer, which a class that scales or forgets it would not do.
    """
    own_classes = [cls for cls in type(optimizer).__mro__ if not cls.__module__.startswith("efl.privacy.")]
    parts = {
        name
        for cls in (_PLAIN, tf.train.Optimizer)
        for name, held in vars(cls).items()
        if callable(held) and not name.startswith("__")
    }
    for name in sorted((parts | {"_learning_rate", "_learning_rate_tensor"}) - _NO_UPDATE):
        held = next((vars(cls)[name] for cls in own_classes if name in vars(cls)), None)
        if held is not inspect.getattr_static(_PLAIN, name, None) or (name in parts and name in vars(optimizer)):
            return name
    return ""
