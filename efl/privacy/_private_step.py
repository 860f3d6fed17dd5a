"""The part of a training step that makes gradients private: check, clip, add up, noise, divide."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
import tensorflow.compat.v1 as tf

from efl import _graph_checks
from efl._program import ancestors
from efl.errors import ConfigError, ModelError
from efl.privacy import per_example
from efl.privacy._beside import Beside
from efl.privacy._moved import refuse_rows
from efl.privacy._vector import one_vector, parts_of
from efl.privacy.noise.releases import Rows
from efl.privacy.optimizers import PrivateOptimizer
from efl.privacy.per_example import Objective, PerExample

if TYPE_CHECKING:
    from efl.privacy._deferred import Deferred

Reduce: TypeAlias = "str | Callable[[tf.Tensor], tf.Tensor]"
# Of the largest gradient. Rounding leaves some 1e-6 of float32; a row that depends on another leaves far more.
_DEVIATION = {tf.float32: 1e-3, tf.float64: 1e-3}
_COARSE_DEVIATION = 5e-2
_TINY = 1e-24


class NoiseSource(Protocol):
    """Adds noise to what leaves; see ``efl.privacy.noise.Releases``."""

    def noised(
        self,
        values: np.ndarray,
        *,
        step: int,
        group: str,
        clip: float,
        noise_multiplier: float,
        rows: int,
        tables: Rows | None = None,
        beside: bytes = b"",
    ) -> np.ndarray:
        """``values`` with noise of standard deviation ``clip * noise_multiplier``."""


@dataclass(frozen=True)
class Terms:
    """What a private step needs to know beside objective and optimizer.

    Attributes:
      noise: Where noise comes from.
      step: int64 scalar: which training step this is.
      group: Names the release.
      reduce: How losses are reduced inside a micro-batch.
      batch_size: Nominal rows of a batch, by which the sum is divided; None: those of the batch at hand.
      where: Whose loss it is, for messages.
      defer: Says of which tables the noise of rows that nobody reads may wait; None: of none.
    """

    noise: NoiseSource
    step: tf.Tensor
    group: str
    reduce: Reduce = "mean"
    batch_size: int | None = None
    where: str = "the loss"
    defer: Callable[[PerExample], Deferred | None] | None = None


@dataclass(frozen=True)
class PrivateGradients:
    """What a private step gives.

    Attributes:
      pairs: (gradient, variable).
      gradients: What it was made of, before clipping; the received tensors' gradients are there.
      checked: Op that fails where what was taken for granted does not hold; noise waits for it.
    """

    pairs: list[tuple[tf.Tensor, tf.Variable]]
    gradients: PerExample
    checked: tf.Operation


def private_gradients(
    optimizer: PrivateOptimizer, objective: Objective, variables: Sequence[tf.Variable], terms: Terms
) -> PrivateGradients:
    """Builds the private gradients of an optimizer's variables.

    Args:
      optimizer: Says how to clip and how much noise.
      objective: What it trains.
      variables: Which it trains.
      terms: The rest.

    Raises:
      ModelError: The loss is no vector, an example's loss depends on other examples, a variable's dtype has no noise.
      ConfigError: The micro-batches do not go into the batch, or nobody knows its size.
    """
    with optimizer.making():
        return _private_gradients(optimizer, objective, variables, terms)


def _private_gradients(
    optimizer: PrivateOptimizer, objective: Objective, variables: Sequence[tf.Variable], terms: Terms
) -> PrivateGradients:
    rows = _rows(optimizer, objective, terms)
    objective, scale = _reduced(objective, terms.reduce, rows)
    gradients = per_example.differentiate(objective, variables, rows)
    if not gradients.variables:
        return PrivateGradients([], gradients, tf.no_op())
    odd = [v for v in gradients.variables if v.dtype.base_dtype not in (tf.float32, tf.float64)]
    if odd:
        names = ", ".join(f"{v.op.name} ({v.dtype.base_dtype.name})" for v in odd)
        raise ModelError(f"{type(optimizer).__name__} trains {names}: expected variables of float32 or float64")
    checked = _checked(gradients, terms.where)
    deferred = None if terms.defer is None or optimizer.l2_norm_clip is None else terms.defer(gradients)
    if deferred is not None:  # then the rate is in the update, and not in what apply_gradients makes
        refuse_rows(optimizer, [deferred.factor], [])
    with tf.control_dependencies([checked]):
        if optimizer.l2_norm_clip is None:
            sums = finite(_by_query(optimizer.dp_sum_query, gradients, scale), terms.where)
        else:
            assert optimizer.noise_multiplier is not None
            clipped = _clipped(gradients, optimizer.l2_norm_clip, scale, terms, rows)
            if deferred is not None:
                return PrivateGradients(_with_rows(deferred, clipped, optimizer, gradients, terms), gradients, checked)
            whole = [tf.convert_to_tensor(each) for each in clipped]
            sums = add_noise(whole, optimizer.l2_norm_clip, optimizer.noise_multiplier, gradients, terms)
    count = tf.cast(gradients.groups.count, tf.float64)
    if terms.batch_size is not None:
        count = tf.constant(terms.batch_size // rows, tf.float64)
    divided = _divided(sums, tf.maximum(count, 1.0))
    return PrivateGradients(list(zip(divided, gradients.variables)), gradients, checked)


def _divided(sums: Sequence[tf.Tensor], count: tf.Tensor) -> list[tf.Tensor]:
    return [total / tf.cast(count, total.dtype) for total in sums]


def _with_rows(
    deferred: Deferred,
    clipped: Sequence[tf.Tensor | tf.IndexedSlices],
    optimizer: PrivateOptimizer,
    gradients: PerExample,
    terms: Terms,
) -> list[tuple[tf.Tensor | tf.IndexedSlices, tf.Variable]]:
    """Private gradients where only the rows of some tables are noised that the step has read."""
    assert optimizer.l2_norm_clip is not None and optimizer.noise_multiplier is not None
    clip, multiplier, tables = optimizer.l2_norm_clip, optimizer.noise_multiplier, deferred.variables
    by_variable = dict(zip((v.ref() for v in gradients.variables), clipped))
    others = [v for v in gradients.variables if not any(v is table for table in tables)]
    step, size = terms.step, gradients.groups.walk.size

    def noised(numbers: np.ndarray, step: int, rows: int, ends: Rows) -> np.ndarray:
        return terms.noise.noised(
            numbers, step=step, group=terms.group, clip=clip, noise_multiplier=multiplier, rows=rows, tables=ends
        )

    sums, updates = deferred.updates(
        [by_variable[v.ref()] for v in tables],
        [tf.convert_to_tensor(by_variable[v.ref()]) for v in others],
        (step, size),
        noised,
    )
    count = tf.constant(max(1, terms.batch_size or 1), tf.float64)
    return [*zip(_divided(sums, count), others), *zip(updates, tables)]


def _clipped(
    gradients: PerExample, clip: float, scale: float, terms: Terms, rows: int
) -> list[tf.Tensor | tf.IndexedSlices]:
    """The sum over groups of their gradients times ``scale``, each first clipped to a norm of at most ``clip``."""

    def weigh(squares: tf.Tensor) -> tf.Tensor:
        return scale * tf.minimum(1.0, clip * tf.math.rsqrt(tf.maximum(squares * scale**2, _TINY)))

    groups = None if terms.batch_size is None else terms.batch_size // rows
    squares, sums = gradients.clipped(gradients.variables, weigh, groups)
    # A row that is not finite would take the sum with it, whatever its weight.
    bad = tf.reduce_sum(tf.cast(tf.logical_not(tf.math.is_finite(squares)), tf.int32))
    text = (
        "the gradient of a row is not finite, and cannot be clipped: look for zeros under a logarithm, a root or a "
        "division, and for wild values in the input. Rows of that kind"
    )
    finite = _graph_checks.check(tf.equal(bad, 0), terms.where, text, [bad], "privacy")
    with tf.control_dependencies([finite]):
        return [tf.identity(each) for each in sums]


def add_noise(
    values: Sequence[tf.Tensor], clip: float, multiplier: float, gradients: PerExample, terms: Terms
) -> list[tf.Tensor]:
    """Adds Gaussian noise of standard deviation ``clip * multiplier`` to tensors that one release holds together."""
    beside = Beside(values, terms.group.split("/")[0])

    def noised(step: np.ndarray, rows: np.ndarray, *held: np.ndarray) -> list[np.ndarray]:
        out = terms.noise.noised(
            one_vector(held),
            step=int(step),
            group=terms.group,
            clip=clip,
            noise_multiplier=multiplier,
            rows=int(rows),
            beside=beside.digest,
        )
        return parts_of(out, held)

    inputs = [terms.step, gradients.groups.walk.size, *values]
    with tf.control_dependencies(beside.before):
        out = tf.numpy_function(noised, inputs, [value.dtype for value in values], name="efl_noise")
    return [tf.ensure_shape(part, value.shape) for part, value in zip(out, values)]


def released_rows(
    gradient: tf.Tensor, clip: float, multiplier: float, gradients: PerExample, terms: Terms
) -> tf.Tensor:
    """Rows that go back to the peer: each clipped by itself, and noised.

    Args:
      gradient: ``[B, …]``.
      clip: The largest norm of a row.
      multiplier: Standard deviation of the noise on each number, in units of ``clip``.
      gradients: Of the step.
      terms: Of the release.
    """
    flat = tf.reshape(gradient, [tf.shape(gradient)[0], -1])
    norms = tf.reduce_sum(tf.square(flat), 1)
    weights = tf.minimum(tf.ones([], gradient.dtype), clip * tf.math.rsqrt(tf.maximum(norms, _TINY)))
    # The rank of what was received is known only when it comes.
    clipped = gradient * tf.reshape(
        weights, tf.concat([tf.shape(weights), tf.ones([tf.rank(gradient) - 1], tf.int32)], 0)
    )
    return add_noise([clipped], clip, multiplier, gradients, terms)[0]


def _rows(optimizer: PrivateOptimizer, objective: Objective, terms: Terms) -> int:
    """How many rows make one micro-batch."""
    if optimizer.num_microbatches is None:
        return 1
    first = objective.loss if objective.loss is not None else objective.sent[0][1]
    size = terms.batch_size or (first.shape[0] if first.shape.rank else None)
    if size is None:
        raise ConfigError(
            f"num_microbatches={optimizer.num_microbatches} of {type(optimizer).__name__}: how many rows a batch has "
            "is not known before it is read. Give opt_config={'BATCH_SIZE': …}, or leave num_microbatches at None"
        )
    if size % optimizer.num_microbatches:
        raise ConfigError(
            f"num_microbatches={optimizer.num_microbatches} of {type(optimizer).__name__}: a batch of {size} rows "
            "cannot be cut into so many equal parts"
        )
    return int(size) // optimizer.num_microbatches


def _reduced(objective: Objective, reduce: Reduce, rows: int) -> tuple[Objective, float]:
    """The objective whose gradient, times a scale, is that of the reduced losses of micro-batches."""
    if reduce in ("mean", tf.reduce_mean):
        return objective, 1.0 / rows
    if reduce in ("sum", tf.reduce_sum):
        return objective, 1.0
    assert callable(reduce)
    if objective.sent and rows > 1:
        raise ConfigError(
            "opt_config REDUCE: a function cannot reduce the gradients that the peer returns; with micro-batches of "
            f"{rows} rows expected 'mean' or 'sum'"
        )
    if objective.loss is None:
        return objective, 1.0
    losses = per_example.as_vector(objective.loss, objective.where)

    def alone(part: tf.Tensor) -> tf.Tensor:
        value = tf.convert_to_tensor(reduce(part))
        if value.shape.rank not in (0, None):
            raise ModelError(f"{objective.where}: REDUCE returned a tensor of shape {value.shape}, expected a scalar")
        return value

    probe = tf.placeholder(losses.dtype, [rows])
    reduced = alone(probe)
    kept = sorted(op.name for op in ancestors(reduced.op) if op.op_def.is_stateful and op is not probe.op)
    if kept:
        raise ModelError(
            f"{objective.where}: REDUCE uses {kept[0]!r}, which keeps a state or reads a variable, so a micro-batch "
            "could hand something on to the next: expected a function of the losses alone"
        )
    if per_example.reads_input(reduced, probe):
        raise ModelError(f"{objective.where}: REDUCE reads more of the batch than the losses that it is handed")
    # One micro-batch at a time, so that nothing a function does can mix them.
    held = tf.stop_gradient(tf.reshape(losses, [-1, rows]))
    weights = tf.gradients(tf.map_fn(alone, held, parallel_iterations=1), held)[0]
    if weights is None:
        raise ModelError(f"{objective.where}: what REDUCE returned does not depend on the losses")
    weights = tf.stop_gradient(tf.reshape(weights, [-1]))
    return replace(objective, loss=losses, weights=weights), 1.0


def _checked(gradients: PerExample, where: str) -> tf.Operation:
    """What has to hold in every step, and the experiment of the first one of a session."""
    walk = gradients.groups.walk
    checks = []
    if walk.expectations:
        holds = tf.stack([e.holds for e in walk.expectations])
        failing = tf.argmin(tf.cast(holds, tf.int32))
        text = tf.gather(tf.constant([e.text for e in walk.expectations]), failing)
        width = max(len(e.numbers) for e in walk.expectations) or 1
        none = tf.constant(-1, tf.int64)
        numbers = [
            tf.stack([*(tf.cast(n, tf.int64) for n in e.numbers), *[none] * (width - len(e.numbers))])
            for e in walk.expectations
        ]
        shown = tf.gather(tf.stack(numbers), failing)
        checks.append(_graph_checks.check(tf.reduce_all(holds), where, text, [shown], "privacy"))
    # In no collection: a new session has it uninitialised, and repeats the experiment.
    done = tf.get_variable(
        tf.get_default_graph().unique_name("efl_privacy/checked"),
        initializer=True,
        trainable=False,
        collections=[],
        use_resource=True,
    )
    wanted = tf.logical_not(tf.is_variable_initialized(done))
    deviation = gradients.experiment(wanted)
    most = min((_DEVIATION.get(v.dtype.base_dtype, _COARSE_DEVIATION) for v in gradients.variables), default=1e-3)
    text = (
        "multiplying the loss of single rows by random numbers multiplied gradients of other rows too, so what one row "
        "can do to the weights is not bounded. Is there an operation that mixes rows of the batch? Relative deviation"
    )
    # Where it is no number the loss is none, which is said elsewhere.
    alone = _graph_checks.check(tf.logical_not(deviation > most), where, text, [deviation], "privacy")
    with tf.control_dependencies([alone]):  # not its initializer, which was made before and would not wait
        checks.append(tf.raw_ops.AssignVariableOp(resource=done.handle, value=tf.constant(True)))
    return tf.group(*checks)


def finite(tensors: Sequence[tf.Tensor], where: str) -> list[tf.Tensor]:
    """The tensors, if all their numbers are finite; fails the step otherwise."""
    if not tensors:
        return []
    good = tf.reduce_all(tf.stack([tf.reduce_all(tf.math.is_finite(t)) for t in tensors]))
    text = "the gradient of a row is not finite: look for zeros under a logarithm, a root or a division"
    with tf.control_dependencies([_graph_checks.check(good, where, text, ["nan or inf"], "privacy")]):
        return [tf.identity(t) for t in tensors]


def _by_query(query: Any, gradients: PerExample, scale: float) -> list[tf.Tensor]:
    """Sums by a mechanism of the user's: it is handed one record after the other."""
    variables = gradients.variables
    state = query.initial_global_state()
    params = query.derive_sample_params(state)
    count = tf.cast(gradients.groups.count, tf.int32)

    def one(i: tf.Tensor, held: Any) -> tuple[tf.Tensor, Any]:
        alone = scale * tf.one_hot(i, count)
        record = [tf.convert_to_tensor(gradients.weighted_sum(v, alone)) for v in variables]
        return i + 1, query.accumulate_record(params, held, record)

    begin = (tf.constant(0), query.initial_sample_state(list(variables)))
    _, held = tf.while_loop(lambda i, _: i < count, one, begin, parallel_iterations=1)
    sums, _, _ = query.get_noised_result(held, state)
    return list(sums)


def gradients_alone(
    optimizer: PrivateOptimizer, loss: tf.Tensor, variables: Sequence[tf.Variable]
) -> list[tuple[tf.Tensor, tf.Variable]]:
    """The private gradients of an optimizer that no model of efl runs."""
    group = f"{type(optimizer).__name__}/{tf.get_default_graph().unique_name('efl_group', mark_as_used=True)}"
    # Which step it is nobody knows: there need be no global step, and minimize() need not be told of one that there is.
    terms = Terms(optimizer.noise_source(), tf.constant(0, tf.int64), group)
    found = private_gradients(optimizer, Objective(loss), variables, terms)
    # All are finished before any is applied: an update must not run ahead of another gradient.
    return list(zip(tf.tuple([g for g, _ in found.pairs]), [v for _, v in found.pairs])) if found.pairs else []


class FreshNoise:
    """Noise with a new secret seed, which nobody keeps: none is ever added twice.

    A model's ledger gives a release that is identical to an earlier one the same noise: it is taken for a step that is
    taken again. Here nobody goes back to a checkpoint, and equal sums are those of different steps. With the same noise
    they would show that they are equal; with noise of their own they do not.
    """

    def __init__(self) -> None:
        from efl.privacy.noise import Ledger, Releases, Seed

        self._releases = Releases(Seed.fresh(), Ledger.in_memory())
        self._numbers = itertools.count()

    def noised(self, values: np.ndarray, **terms: Any) -> np.ndarray:
        """See ``efl.privacy.noise.Releases.noised``; ``step`` may be any."""
        # A number in place of the step: then no release is a replay.
        return self._releases.noised(values, **{**terms, "step": next(self._numbers)})
