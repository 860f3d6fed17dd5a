"""What a private training step writes beside its optimizer is named; a rate that is computed from rows is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

import efl
from efl.errors import ModelError
from efl.privacy._moved import moved_by_data
from tests.data.records import example, write

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
ROWS, BATCH = 40, 8
X = np.random.default_rng(0).normal(size=(ROWS, 3)).astype(np.float32)
Loss = Callable[[efl.Model, Any], tf.Tensor]


def plain(m: efl.Model, sample: Any) -> tf.Tensor:
    return tf.reduce_sum(tf.square(tf.layers.dense(sample["x"], 2, name="d")), 1)


def compiled(loss: Loss = plain, optimizer: Callable[[efl.Model], Any] | None = None, **config: object) -> efl.Model:
    """A model whose optimizer is made when its loss exists."""
    tf.reset_default_graph()
    batch = tf.data.make_initializable_iterator(tf.data.Dataset.from_tensor_slices(X).repeat().batch(BATCH)).get_next()
    made = efl.Model(seed=1)
    made.input_fn(lambda m, mode: efl.Sample({"x": batch}, {"x": [tf.feature_column.numeric_column("x", 3)]}))
    make = optimizer or (lambda m: efl.DPGradientDescentGaussianOptimizer(1.0, 2.0, learning_rate=0.1))
    made.loss_fn(loss).optimizer_fn(lambda m, task: {make(m): (tf.trainable_variables(), None)})
    return made.compile(opt_config={"BATCH_SIZE": BATCH, "NUM_EXAMPLES": ROWS, **config})


def named(model: efl.Model) -> list[str]:
    return [v.op.name for program in model._programs.values() for v in moved_by_data(program)]


def kept(name: str = "kept") -> tf.Variable:
    return tf.get_variable(name, [3], trainable=False, initializer=tf.zeros_initializer())


def mean_of(sample: Any) -> tf.Tensor:
    return tf.reduce_mean(sample["x"], 0)


# ---- variables


def after(writes: Callable[[Any], Any]) -> Loss:
    """A loss that waits for something to be written."""

    def loss(m: efl.Model, sample: Any) -> tf.Tensor:
        value = plain(m, sample)
        with tf.control_dependencies([writes(sample)]):
            return tf.identity(value)

    return loss


def as_metric(m: efl.Model, sample: Any) -> tf.Tensor:
    seen = kept()
    m.add_metric("seen", (tf.reduce_sum(seen), seen.assign_add(mean_of(sample)).op))
    return plain(m, sample)


def by_a_variable_in_no_checkpoint(sample: Any) -> tf.Operation:
    between = tf.get_variable("between", [3], collections=[tf.GraphKeys.LOCAL_VARIABLES], trainable=False)
    with tf.control_dependencies([between.assign(mean_of(sample)).op]):
        return kept().assign(between.read_value()).op


def in_a_branch(sample: Any) -> tf.Tensor:
    held, one = kept(), tf.constant(1.0)
    return tf.cond(mean_of(sample)[0] > 0, lambda: tf.identity(held.assign_add(tf.ones([3]))[0]), lambda: one)


@pytest.mark.parametrize(
    "loss",
    [
        pytest.param(after(lambda sample: kept().assign(mean_of(sample)).op), id="before the loss"),
        pytest.param(after(in_a_branch), id="in a branch"),
        pytest.param(after(by_a_variable_in_no_checkpoint), id="by way of another"),
        pytest.param(as_metric, id="by a metric"),
    ],
)
def test_what_a_step_writes_on_the_way_is_named(loss: Loss) -> None:
    assert named(compiled(loss)) == ["kept"]


def test_rows_in_a_trained_variable_are_no_update() -> None:
    def scattered(sample: Any) -> tf.Operation:
        kernel = next(v for v in tf.trainable_variables() if v.op.name == "d/kernel")
        return tf.raw_ops.ResourceScatterAdd(resource=kernel.handle, indices=[0], updates=mean_of(sample)[None, :2])

    assert named(compiled(after(scattered))) == ["d/kernel"]


def test_the_table_promises_nothing_of_a_model_that_holds_them() -> None:
    pytest.importorskip("dp_accounting")
    model = compiled(after(lambda sample: kept("raw_mean").assign(mean_of(sample)).op))
    model.fit(efl.procedure_fn.train(max_step=2))
    (row,) = model.privacy_spent(1e-3).rows
    assert row.epsilon is None and row.reason == "none (weights updated without noise): model: raw_mean"


def harmless(m: efl.Model, sample: Any) -> tf.Tensor:
    """A loss with much that writes, and keeps nothing of the rows."""
    loss = plain(m, sample)
    m.add_metric("loss_so_far", tf.metrics.mean(loss))  # in no checkpoint
    m.add_metric("auc", efl.metrics.auc(tf.cast(loss > 1, tf.int64), tf.sigmoid(loss)))
    counter, noise = tf.get_variable("counter", [], trainable=False), kept("noise")
    still = kept("still")  # is read in a branch that depends on data
    m.add_metric("read", tf.cond(mean_of(sample)[0] > 0, lambda: tf.reduce_sum(still), lambda: tf.constant(0.0)))
    average = tf.train.ExponentialMovingAverage(0.9)
    m.add_train_op(average.apply(tf.trainable_variables()))
    with tf.control_dependencies([counter.assign_add(1.0).op, noise.assign(tf.random.normal([3])).op]):
        return tf.identity(loss)


@pytest.mark.parametrize(
    "make",
    [
        lambda m: efl.DPGradientDescentGaussianOptimizer(1.0, 2.0, learning_rate=0.1),
        lambda m: efl.DPAdamGaussianOptimizer(1.0, 2.0, learning_rate=0.1),
        lambda m: efl.DPAdagradGaussianOptimizer(1.0, 2.0, num_microbatches=2, learning_rate=0.1),
        lambda m: tf.train.AdamOptimizer(0.1),  # whose variables are named with it
    ],
)
def test_optimizers_averages_counters_and_metrics_are_not(make: Callable[[efl.Model], Any]) -> None:
    assert named(compiled(harmless, make)) == []


def table_loss(m: efl.Model, sample: Any) -> tf.Tensor:
    table = tf.get_variable("table", [5000, 2])
    return tf.reduce_sum(tf.nn.embedding_lookup(table, tf.cast(tf.abs(sample["x"]) * 100, tf.int64)), [1, 2])


def test_neither_are_tables_whose_noise_waits_and_their_account() -> None:
    model = compiled(table_loss)
    assert model._noise.deferred
    assert named(model) == []


def test_nor_where_a_reader_is(tmp_path: Any) -> None:
    write(tmp_path / "part", (example({"x": row}) for row in X))
    tf.reset_default_graph()

    def read(m: efl.Model, mode: efl.MODE) -> efl.Sample:
        reader = efl.data.DataIO(str(tmp_path), BATCH, 0, 1)
        reader.fixedlen_feature("x", 3)
        return efl.Sample(reader.read(), {"x": [tf.feature_column.numeric_column("x", 3)]})

    noisy = efl.DPGradientDescentGaussianOptimizer(1.0, 2.0, learning_rate=0.1)
    model = efl.Model().input_fn(read).loss_fn(plain).optimizer_fn(efl.optimizer_fn.optimizer_setter(noisy)).compile()
    assert named(model) == []


# ---- rates


def of_rows(m: efl.Model) -> tf.Tensor:
    return 0.1 + tf.reduce_mean(tf.cast(m.losses[None] > 0, tf.float32))


def of_a_variable_in_no_checkpoint(m: efl.Model) -> tf.Tensor:
    seen = tf.get_variable("seen", [], collections=[tf.GraphKeys.LOCAL_VARIABLES], trainable=False)
    m.add_train_op(seen.assign(m.losses[None]).op)
    return seen.read_value()


SGD, ADAM = efl.DPGradientDescentGaussianOptimizer, efl.DPAdamGaussianOptimizer


@pytest.mark.parametrize("loss", [plain, table_loss])
@pytest.mark.parametrize(
    ("cls", "arguments"),
    [
        (SGD, lambda m: {"learning_rate": of_rows(m)}),
        (SGD, lambda m: {"learning_rate": lambda: of_rows(m)}),
        (SGD, lambda m: {"learning_rate": of_a_variable_in_no_checkpoint(m)}),
        (ADAM, lambda m: {"learning_rate": of_rows(m)}),
        (efl.make_gaussian_optimizer_class(tf.train.MomentumOptimizer),
         lambda m: {"learning_rate": 0.1, "momentum": of_rows(m)}),
    ],
)  # fmt: skip
def test_a_rate_that_is_computed_from_rows_is_refused(loss: Loss, cls: type, arguments: Any) -> None:
    with pytest.raises(ModelError, match=rf"{cls.__name__}: its learning rate, .* comes in by 'IteratorGetNext'"):
        compiled(loss, lambda m: cls(1.0, 2.0, **arguments(m)))


def branch(m: efl.Model) -> tf.Tensor:
    rate = tf.get_variable("rate", [], trainable=False, initializer=tf.constant_initializer(0.1))
    return tf.cond(m.global_step > 3, lambda: rate.read_value() * 0.5, lambda: rate.read_value())


@pytest.mark.parametrize("loss", [plain, table_loss])
@pytest.mark.parametrize(
    "rate",
    [
        lambda m: 0.1,
        lambda m: lambda: 0.1,
        lambda m: tf.train.exponential_decay(0.1, m.global_step, 10, 0.9),
        lambda m: tf.train.piecewise_constant(m.global_step, [2, 4], [0.1, 0.2, 0.3]),
        lambda m: tf.train.cosine_decay_restarts(0.1, m.global_step, 10),
        lambda m: tf.train.noisy_linear_cosine_decay(0.1, m.global_step, 10),
        lambda m: tf.while_loop(lambda r: r > 0.2, lambda r: r / 2, [tf.cast(m.global_step, tf.float32)]),
        lambda m: tf.placeholder(tf.float32, []),
        lambda m: tf.placeholder(tf.float32),
        lambda m: tf.placeholder_with_default(0.1, []),
        branch,
    ],
)
def test_schedules_variables_and_what_is_fed_are_rates(loss: Loss, rate: Callable[[efl.Model], Any]) -> None:
    assert named(compiled(loss, lambda m: SGD(1.0, 2.0, learning_rate=rate(m)))) == []


def test_without_a_model_too() -> None:
    tf.reset_default_graph()
    x = tf.placeholder(tf.float32, [None, 3])
    loss, rate = tf.reduce_sum(tf.square(tf.layers.dense(x, 2)), 1), tf.placeholder(tf.float32)
    with pytest.raises(ModelError, match=r"DPAdamGaussianOptimizer: .* comes in by '.*' \(Placeholder\)"):
        ADAM(1.0, 2.0, learning_rate=tf.reduce_mean(x)).minimize(loss)
    ADAM(1.0, 2.0, learning_rate=rate).minimize(loss)
    # What is made of gradients that have noise already is no secret.
    optimizer = SGD(1.0, 2.0, learning_rate=lambda: 1 / norm)
    pairs = optimizer.compute_gradients(loss)
    norm = tf.global_norm([gradient for gradient, _ in pairs])
    optimizer.apply_gradients(pairs)
