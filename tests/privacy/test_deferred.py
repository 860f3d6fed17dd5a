"""Noise of embedding rows that nobody reads: it comes in one piece, and is what it would have been."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

import efl
from efl.errors import ConfigError, ModelError
from efl.privacy.noise import ROOM, Ledger, Releases, Seed
from efl.privacy.optimizers import PrivateOptimizer
from tests.federation.harness import run_both

ROWS, WIDTH, BATCH, READ = 6000, 4, 8, 20
RATE, CLIP, MULTIPLIER = 0.5, 1.0, 2.0
DEVIATION = RATE * CLIP * MULTIPLIER / BATCH  # of a step's noise, in units of the weights
CONFIG = {"BATCH_SIZE": BATCH, "NUM_EXAMPLES": 40}
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def table_of(scope: str = "table", rows: int = ROWS) -> tf.Variable:
    with tf.variable_scope(scope, reuse=tf.AUTO_REUSE):
        return tf.get_variable("rows", [rows, WIDTH], initializer=tf.random_normal_initializer(stddev=0.1, seed=3))


def model(
    optimizer: object = None,
    loss: object = None,
    rows: int = ROWS,
    evaluates: bool = False,
    rate: object = RATE,
    read: tuple[int, int] = (2, READ),
    **config: object,
) -> efl.Model:
    """Looks up two of the first rows for each example (``read``); all others are never read."""
    tf.reset_default_graph()
    rng = np.random.default_rng(0)
    ids = rng.integers(0, read[1], (40, read[0]))
    data = tf.data.Dataset.from_tensor_slices((ids, rng.normal(size=40).astype(np.float32))).repeat().batch(BATCH)
    batch = tf.data.make_initializable_iterator(data).get_next()
    made = efl.Model(seed=1)

    def input_fn(m: efl.Model, mode: efl.MODE) -> efl.Sample:
        column = [tf.feature_column.numeric_column("x", 1)]
        return efl.Sample({"ids": batch[0], "x": batch[1][:, None]}, {"x": column})

    def plain(m: efl.Model, sample: efl.Sample) -> tf.Tensor:
        looked = tf.reduce_sum(tf.nn.embedding_lookup(table_of(rows=rows), sample.features["ids"]), 1)
        y = tf.layers.dense(looked, 1, name="top", kernel_initializer=tf.ones_initializer())
        return tf.reduce_sum(tf.square(y - sample["x"]), 1)

    made.input_fn(input_fn).loss_fn(loss or plain)
    if evaluates:
        made.eval_fn(lambda m, sample: tf.reduce_mean(tf.square(table_of(rows=rows))))
    optimizer = optimizer or efl.DPGradientDescentGaussianOptimizer(CLIP, MULTIPLIER, learning_rate=rate)
    made.optimizer_fn(efl.optimizer_fn.optimizer_setter(optimizer))
    return made.compile(opt_config={**CONFIG, **config})


def deferred(made: efl.Model) -> bool:
    return bool(made._noise.deferred)


def start() -> np.ndarray:
    return table()[1]


def table(made: efl.Model | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The table of a model, and what it began with."""
    with tf.Graph().as_default(), tf.Session() as sess:
        tf.set_random_seed(1)
        first = table_of()
        sess.run(first.initializer)
        begun = sess.run(first)
    return (begun if made is None else made.get_weights()["table/rows"]), begun


def unit(made: efl.Model) -> float:
    return float(made.session.run(made._noise.deferred[0].unit))


@pytest.mark.parametrize("steps", [1, 50])
def test_a_row_that_is_never_read_has_the_noise_of_every_step(steps: int) -> None:
    stats = pytest.importorskip("scipy.stats")  # comes with dp-accounting
    made = model()
    assert deferred(made)
    made.fit(efl.procedure_fn.train(max_step=steps))
    after, before = table(made)
    moved = (after - before)[READ:]
    assert abs(moved.var() / (steps * DEVIATION**2) - 1) < 5 * np.sqrt(2 / moved.size)
    assert abs(moved.mean()) < 5 * np.sqrt(steps) * DEVIATION / np.sqrt(moved.size)
    assert stats.kstest(moved.ravel() / (np.sqrt(steps) * DEVIATION), "norm").pvalue > 1e-4
    assert abs(np.corrcoef(moved[:-1].ravel(), moved[1:].ravel())[0, 1]) < 5 / np.sqrt(moved.size)


def test_rows_that_were_read_have_as_much(monkeypatch: pytest.MonkeyPatch) -> None:
    # A loss that looks rows up and does not move them: what is left is noise, some of it drawn late.
    def still(m: efl.Model, sample: efl.Sample) -> tf.Tensor:
        looked = tf.nn.embedding_lookup(table_of(), sample.features["ids"])
        return tf.reduce_sum(1e-6 * looked, [1, 2]) + 0.0 * tf.layers.dense(sample["x"], 1, name="top")[:, 0]

    made = model(loss=still, read=(100, 1500))
    made.fit(efl.procedure_fn.train(max_step=12))
    after, before = table(made)
    moved = (after - before)[:1500]
    assert abs(moved.var() / (12 * DEVIATION**2) - 1) < 5 * np.sqrt(2 / moved.size)


def test_a_feature_columns_rows_get_what_they_are_owed_before_they_are_read() -> None:
    # What TensorFlow makes of such a lookup by itself reads the table without waiting for anything.
    tf.reset_default_graph()
    ids = np.arange(200 * BATCH)  # each row is read once, in a step of its own
    batch = tf.data.make_initializable_iterator(
        tf.data.Dataset.from_tensor_slices(ids).repeat().batch(BATCH)
    ).get_next()
    column = tf.feature_column.embedding_column(
        tf.feature_column.categorical_column_with_identity("ids", ROWS), WIDTH, initializer=tf.zeros_initializer()
    )
    made = efl.Model(seed=1)
    made.input_fn(lambda m, mode: efl.Sample({"ids": batch}, {"ids": [column]}))
    made.loss_fn(lambda m, s: 1e-6 * tf.reduce_sum(s["ids"], 1))
    seen: list[tuple[np.ndarray, np.ndarray]] = []

    class Looks(tf.train.SessionRunHook):
        def before_run(self, run_context: object) -> tf.train.SessionRunArgs:
            return tf.train.SessionRunArgs([batch, made.input()["ids"]])

        def after_run(self, run_context: object, run_values: tf.train.SessionRunValues) -> None:
            seen.append(run_values.results)

    made.add_hooks([Looks()])
    noisy = efl.DPGradientDescentGaussianOptimizer(CLIP, MULTIPLIER, learning_rate=RATE)
    made.optimizer_fn(efl.optimizer_fn.optimizer_setter(noisy)).compile(opt_config=CONFIG)
    assert deferred(made)
    made.fit(efl.procedure_fn.train(max_step=200))
    # What step t reads has the noise of the t steps before it.
    scaled = np.concatenate([read / (np.sqrt(t) * DEVIATION) for t, (_, read) in enumerate(seen) if t >= 1])
    assert abs(np.square(scaled).mean() - 1) < 6 * np.sqrt(2 / scaled.size)
    (name,) = [n for n in made.get_weights() if "embedding" in n]
    final = made.get_weights()[name]
    assert abs(final.var() / (200 * DEVIATION**2) - 1) < 0.05


@pytest.mark.parametrize("decays", [False, True])
def test_without_noise_it_is_what_noising_the_whole_table_makes(monkeypatch: pytest.MonkeyPatch, decays: bool) -> None:
    monkeypatch.setattr("efl.privacy.noise.ahead.gaussian", lambda key, count: np.zeros(count))
    monkeypatch.setattr("efl.privacy.noise.pool.gaussian", lambda key, count: np.zeros(count))

    def weights(defer: bool) -> dict[str, np.ndarray]:
        rate = RATE
        made = None

        class Optimizer(efl.DPGradientDescentGaussianOptimizer):
            def __init__(self) -> None:
                step = tf.train.get_or_create_global_step()
                rate = tf.train.exponential_decay(RATE, step, 3, 0.5) if decays else RATE
                super().__init__(CLIP, MULTIPLIER, learning_rate=rate)

        tf.reset_default_graph()
        made = model(rate=rate, DEFER_NOISE=defer) if not decays else _with(Optimizer, defer)
        assert deferred(made) is defer
        made.fit(efl.procedure_fn.train(max_step=10))
        return made.get_weights()

    waiting, whole = weights(True), weights(False)
    for name, value in whole.items():
        np.testing.assert_allclose(waiting[name], value, atol=10 * DEVIATION * 2.0**-9, err_msg=name)
    assert np.abs(waiting["table/rows"][:READ] - start()[:READ]).max() > 0.01


def _with(optimizer: type, defer: bool) -> efl.Model:
    """A model whose optimizer reads the graph's step, and so is made in its graph."""
    holder: dict[str, efl.Model] = {}
    setter = efl.optimizer_fn.optimizer_setter

    def late(make: object) -> object:
        return setter(optimizer())

    original = efl.optimizer_fn.optimizer_setter
    efl.optimizer_fn.optimizer_setter = late
    try:
        holder["made"] = model(optimizer="made late", DEFER_NOISE=defer)
    finally:
        efl.optimizer_fn.optimizer_setter = original
    return holder["made"]


def test_weights_lie_on_a_grid_where_addition_is_exact() -> None:
    made = model()
    made.fit(efl.procedure_fn.train(max_step=20))
    rows = made.get_weights()["table/rows"].astype(np.float64) / unit(made)
    assert 2.0**-11 <= unit(made) / DEVIATION < 2.0**-9
    np.testing.assert_array_equal(rows, np.rint(rows))
    assert np.abs(rows).max() < 2.0**24


def test_whoever_looks_sees_all_noise(tmp_path: Path) -> None:
    made = model(evaluates=True)
    seen = []

    def procedure(m: efl.Model) -> None:
        for _ in range(2):
            m.run_stage("train", efl.stage.LoopStage(m.train_op(), True, 5))
            m.run_stage("look", lambda: seen.append(m.session.run(table_of())))
        m.run_stage("evaluate", efl.stage.LoopStage(m.eval_op(), False, 1))

    made.fit(procedure)
    before = start()
    for number, rows in enumerate(seen, 1):
        assert abs((rows - before)[READ:].var() / (5 * number * DEVIATION**2) - 1) < 0.1
    np.testing.assert_array_equal(seen[-1], made.get_weights()["table/rows"])


def test_evaluation_sees_all_noise() -> None:
    made = model(evaluates=True)
    made.fit(efl.procedure_fn.train_and_evaluate(train_step=5, eval_step=1, max_iter=1), log_step=1)
    rows = made.get_weights()["table/rows"]
    value = made.history[-1]
    assert value["mode"] == "eval"
    (metric,) = [v for k, v in value.items() if k not in efl._program.LOG_FIELDS]
    assert metric == pytest.approx(np.square(rows).mean(), rel=1e-5)


def test_a_checkpoint_holds_all_noise_and_training_goes_on_from_it(tmp_path: Path) -> None:
    folder = str(tmp_path)
    for most in (6, 10):
        made = model()
        made.fit(efl.procedure_fn.train(max_step=most), checkpoint_dir=folder, save_checkpoint_steps=4)
        for saved in sorted((tmp_path / "local" / "0").glob("step-*")):
            reader = tf.train.load_checkpoint(str(saved / "model"))
            steps = json.loads((saved / "state.json").read_text())["state"]
            assert steps
            (total,) = [n for n in reader.get_variable_to_shape_map() if n.endswith("/total")]
            (since,) = [n for n in reader.get_variable_to_shape_map() if n.endswith("/since")]
            assert np.all(reader.get_tensor(since) == reader.get_tensor(total))
    after, before = table(made)
    assert made.steps_trained == 16
    assert abs((after - before)[READ:].var() / (16 * DEVIATION**2) - 1) < 0.05
    assert sum(phase.releases for phase in made._noise.phases()) == 16


def _whole(m: efl.Model, sample: efl.Sample) -> tf.Tensor:
    looked = tf.reduce_sum(tf.nn.embedding_lookup(table_of(), sample.features["ids"]), 1)
    return tf.reduce_sum(tf.square(looked), 1) + 1e-3 * tf.reduce_sum(tf.square(table_of())) * sample["x"][:, 0]


@pytest.mark.parametrize(
    "kwargs",
    [
        {"optimizer": efl.DPAdamGaussianOptimizer(CLIP, MULTIPLIER, learning_rate=0.01)},
        {"loss": _whole},
        {"rows": 100},
        {"DEFER_NOISE": False},
    ],
    ids=["adam", "read-as-a-whole", "small", "not-wanted"],
)
def test_where_it_cannot_wait_the_whole_table_is_noised(kwargs: dict) -> None:
    made = model(**kwargs)
    assert not deferred(made)
    before: dict[str, np.ndarray] = {}

    def procedure(m: efl.Model) -> None:
        before.update(m.get_weights())
        m.run_stage("train", efl.stage.LoopStage(m.train_op(), True, 1))

    made.fit(procedure)
    # All rows moved (a number in a thousand may get noise that is rounded to nothing).
    assert np.mean(made.get_weights()["table/rows"] != before["table/rows"]) > 0.98


class Still(tf.train.GradientDescentOptimizer):
    """Moves nothing."""

    def _resource_apply_dense(self, grad: tf.Tensor, handle: tf.Tensor) -> tf.Operation:
        return super()._resource_apply_dense(0.0 * grad, handle)

    def _resource_apply_sparse_duplicate_indices(
        self, grad: tf.Tensor, handle: tf.Tensor, indices: tf.Tensor
    ) -> tf.Operation:
        return super()._resource_apply_sparse_duplicate_indices(0.0 * grad, handle, indices)


class Slower(tf.train.GradientDescentOptimizer):
    """Has a learning rate that shrinks in a way of its own."""

    def _prepare(self) -> None:
        super()._prepare()
        self._learning_rate_tensor = self._learning_rate_tensor * 0.0


class Late(tf.train.GradientDescentOptimizer):
    """Moves nothing either, for another reason."""

    def apply_gradients(self, grads_and_vars: object, global_step: object = None, name: str | None = None) -> object:
        return super().apply_gradients([(0.0 * g, v) for g, v in grads_and_vars], global_step, name)


class LatePrivate(efl.DPGradientDescentGaussianOptimizer):
    """The same, made of a private class."""

    def apply_gradients(self, grads_and_vars: object, global_step: object = None, name: str | None = None) -> object:
        return super().apply_gradients([(0.0 * g, v) for g, v in grads_and_vars], global_step, name)


def private(cls: type) -> object:
    made = cls if issubclass(cls, PrivateOptimizer) else efl.make_gaussian_optimizer_class(cls)
    return made(CLIP, MULTIPLIER, learning_rate=RATE)


@pytest.mark.parametrize(
    ("cls", "what"),
    [
        (Still, "_resource_apply_dense"),
        (Slower, "_prepare"),
        (Late, "apply_gradients"),
        (LatePrivate, "apply_gradients"),
    ],
)
def test_a_class_that_updates_in_a_way_of_its_own_keeps_it(
    cls: type, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="efl"):
        made = model(optimizer=private(cls))
    assert not deferred(made)
    assert f"updates in a way of its own ({what}), so tables are noised as a whole" in caplog.text
    made.fit(efl.procedure_fn.train(max_step=3))
    after, before = table(made)
    np.testing.assert_array_equal(after, before)


def test_an_update_that_one_optimizer_was_given_is_its_own_too() -> None:
    optimizer = private(tf.train.GradientDescentOptimizer)
    optimizer._prepare = optimizer._prepare
    assert not deferred(model(optimizer=optimizer))


def test_a_class_that_changes_no_update_waits() -> None:
    class Named(tf.train.GradientDescentOptimizer):
        def __init__(self, learning_rate: float) -> None:
            super().__init__(learning_rate, name="named")

    assert deferred(model(optimizer=private(Named)))


def test_a_table_that_another_task_reads_is_noised_as_a_whole(caplog: pytest.LogCaptureFixture) -> None:
    made = model()
    assert deferred(made)
    tf.reset_default_graph()
    two = efl.Model(seed=1)
    for task in ("a", "b"):
        ids = tf.data.Dataset.from_tensor_slices(np.arange(40) % READ).repeat().batch(BATCH)
        batch = tf.data.make_initializable_iterator(ids).get_next()
        two.input_fn(
            lambda m, mode, batch=batch: efl.Sample(
                {"ids": batch, "x": tf.cast(batch, tf.float32)[:, None]}, {"x": [tf.feature_column.numeric_column("x")]}
            ),
            task=task,
        )
        two.loss_fn(
            lambda m, s: tf.reduce_sum(tf.square(tf.nn.embedding_lookup(table_of(), s.features["ids"])), 1), task=task
        )
        noisy = efl.DPGradientDescentGaussianOptimizer(CLIP, MULTIPLIER, learning_rate=RATE)
        two.optimizer_fn(efl.optimizer_fn.optimizer_setter(noisy), task=task)
    with caplog.at_level(logging.INFO, logger="efl"):
        two.compile(opt_config=CONFIG)
    assert not two._noise.deferred
    assert "table/rows: another task reads it too, so all of it is noised in each step" in caplog.text


def test_weights_that_outgrow_the_grid_end_the_run() -> None:
    def wild(m: efl.Model, sample: efl.Sample) -> tf.Tensor:
        looked = tf.reduce_sum(tf.nn.embedding_lookup(table_of(), sample.features["ids"]), 1)
        return -tf.reduce_sum(looked, 1)

    made = model(loss=wild, rate=1e-4)
    made.set_weights({"table/rows": np.full((ROWS, WIDTH), 100.0, np.float32)})
    with pytest.raises(ModelError, match=r"table/rows: weights are .* steps of the grid .*DEFER_NOISE"):
        made.fit(efl.procedure_fn.train(max_step=2))
    made = model(loss=wild)
    made.fit(efl.procedure_fn.train(max_step=1))
    made.set_weights({"table/rows": np.full((ROWS, WIDTH), (ROOM - 100) * unit(made), np.float32)})
    with pytest.raises(ModelError, match=r"table/rows: weights have grown to .* steps of the grid .*DEFER_NOISE"):
        made.fit(efl.procedure_fn.train(max_step=2))


def test_a_wrong_option() -> None:
    with pytest.raises(ConfigError, match="DEFER_NOISE='no': expected True or False"):
        model(DEFER_NOISE="no")


def test_noise_that_is_overdue_is_drawn_in_parts_that_have_nothing_to_do_with_each_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("efl.privacy.noise.releases._AT_ONCE", 1000)
    made = Releases(Seed(bytes(32)), Ledger.in_memory())
    deviations, widths = np.array([1.0, 0.0, 3.0] * 500), np.array([7, 2, 3] * 500, np.int32)
    flat = made.overdue(deviations, widths, 2.0**-10)
    parts = np.split(flat, np.cumsum(widths)[:-1])
    for place, deviation in enumerate((1.0, 0.0, 3.0)):
        drawn = np.stack(parts[place::3])
        if deviation:
            assert abs(drawn.std() / deviation - 1) < 0.06
            assert len(np.unique(drawn)) > 0.9 * len(np.unique(np.rint(drawn * 2**10)))
        else:
            assert not drawn.any()
    assert not np.array_equal(flat, made.overdue(deviations, widths, 2.0**-10))
    assert made.ledger.phases() == []


PARTY = f"""
import efl.privacy
IDS = tf.constant(np.arange(96 * 2).reshape(96, 2) % {READ}, tf.int64)
def loss_fn(m, s):
    if ROLE == 'leader':
        f = tf.reshape(m.recv('f', require_grad=True), [-1, 3])
        return tf.nn.softmax_cross_entropy_with_logits_v2(labels=one_hot(s['label']), logits=dense(f, 3, 3, 'top'))
    table = tf.get_variable('table', [{ROWS}, 3], initializer=tf.zeros_initializer())
    places = tf.gather(IDS, tf.reshape(s.features['id'], [-1]) - 100)
    h = tf.reduce_sum(tf.nn.embedding_lookup(table, places), 1) + dense(s['x'], 4, 3, 'own')
    m.send('f', h, require_grad=True)
    return h
model = efl.FederalModel()
batch = batches()
noisy = efl.DPGradientDescentGaussianOptimizer(1.0, 2.0, learning_rate=0.5)
model.input_fn(lambda m, mode: sample(m, batch, ROLE)).loss_fn(loss_fn)
model.optimizer_fn(efl.optimizer_fn.optimizer_setter(noisy))
model.compile(opt_config={{'BATCH_SIZE': 16, 'NUM_EXAMPLES': 96}}).fit(efl.procedure_fn.train(max_step=20))
if ROLE == 'follower':
    assert model._noise.deferred
    np.save('table.npy', model.get_weights()['table'])
"""


def test_a_partys_table_in_a_federation(tmp_path: Path) -> None:
    run_both(tmp_path, PARTY, PARTY)
    rows = np.load(tmp_path / "table.npy")[READ:]
    assert abs(rows.var() / (20 * (0.5 * 2 / 16) ** 2) - 1) < 5 * np.sqrt(2 / rows.size)
