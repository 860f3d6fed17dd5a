"""Where a bound could be passed by unseen: rounding, reshaped tables, laundered sizes, mixed releases, other dtypes."""

from __future__ import annotations

import re

import numpy as np
import pytest
import tensorflow.compat.v1 as tf
from tensorflow.python.ops.data_flow_ops import StagingArea

import efl
from efl.errors import ConfigError, ModelError
from efl.privacy.accounting import Mechanism, compute_epsilon
from tests.federation.harness import run_both
from tests.privacy import test_deferred as tables
from tests.privacy import test_what_is_public as public
from tests.privacy.test_spent import read_by_dataio
from tests.privacy.test_what_is_public import BATCH, ROWS, X, compiled, data, no_figure, plain, read, sampled

pytest.importorskip("dp_accounting")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def train(made: efl.Model, steps: int) -> None:
    made.fit(efl.procedure_fn.train(max_step=steps))


# ---- noise that waits, and the rate


def still(m: efl.Model, sample: efl.Sample) -> tf.Tensor:
    """A loss that looks rows up and hardly moves them: what moves is noise."""
    looked = tf.nn.embedding_lookup(tables.table_of(), sample.features["ids"])
    return tf.reduce_sum(1e-9 * looked, [1, 2]) + 0.0 * tf.layers.dense(sample["x"], 1, name="top")[:, 0]


def rate_by_step(*rates: float) -> tf.Tensor:
    return tf.gather(tf.constant(rates, tf.float32), tf.minimum(tf.train.get_or_create_global_step(), len(rates) - 1))


def of_rates(*rates: float) -> efl.Model:
    tf.reset_default_graph()
    return tables.model(loss=still, rate=lambda: rate_by_step(*rates))


def test_a_rate_that_begins_with_nothing_makes_no_grid() -> None:
    made = of_rates(0.0, 0.5)
    with pytest.raises(ModelError, match=r"table/rows: the learning rate of the first step is 0.*DEFER_NOISE"):
        train(made, 2)


def test_a_rate_whose_noise_would_be_rounded_away_ends_the_training() -> None:
    made = of_rates(0.5, 0.5, 1e-7)
    with pytest.raises(
        ConfigError, match=r"the learning rate has become so small .* expected at least 16.*DEFER_NOISE"
    ):
        train(made, 3)
    # Nothing of the two steps before is lost, and rows that were read look like those that were not.
    moved = made.get_weights()["table/rows"] - tables.start()
    read_rows, others = moved[: tables.READ].var(), moved[tables.READ :].var()
    assert abs(read_rows / (2 * tables.DEVIATION**2) - 1) < 1 and abs(others / (2 * tables.DEVIATION**2) - 1) < 0.1


def test_a_step_that_moves_nothing_moves_no_row_by_rounding() -> None:
    made = of_rates(0.5, 0.0)
    train(made, 1)
    before = made.get_weights()["table/rows"]
    train(made, 3)
    np.testing.assert_array_equal(made.get_weights()["table/rows"], before)


def test_a_smaller_rate_of_a_second_fit_has_a_finer_grid() -> None:
    tf.reset_default_graph()

    def rate() -> tf.Variable:
        with tf.variable_scope("", reuse=tf.AUTO_REUSE):
            return tf.get_variable("rate", initializer=0.5, trainable=False)

    made = tables.model(loss=still, rate=rate)
    train(made, 2)
    coarse, first = tables.unit(made), made.get_weights()["table/rows"]
    with made.session.graph.as_default():
        rate().load(0.5 / 2**6, made.session)
    train(made, 4)
    assert tables.unit(made) == coarse / 2**6
    moved = (made.get_weights()["table/rows"] - first) * 2**6 / tables.DEVIATION
    for rows in (moved[: tables.READ], moved[tables.READ :]):  # four steps of the smaller rate
        assert abs(rows.var() / 4 - 1) < 6 * np.sqrt(2 / rows.size)


# ---- a table that is read in another form


@pytest.mark.parametrize("together", ["one after the other", "both at once", "with a product"])
def test_a_lookup_in_a_reshaped_table_is_clipped_like_any(together: str) -> None:
    clip = 1.0

    def loss_fn(m: efl.Model, s: efl.Sample) -> tf.Tensor:
        table = tf.get_variable("t", [6, 6], initializer=tf.ones_initializer())
        places = tf.tile(tf.constant([[0, 1, 2]]), [tf.shape(s["x"])[0], 1])
        y = tf.reduce_sum(tf.nn.embedding_lookup(tf.reshape(table, [12, 3]), places), [1, 2])
        if together == "both at once":
            y += tf.reduce_sum(tf.nn.embedding_lookup(table, places), [1, 2])
        if together == "with a product":
            y += tf.reduce_sum(tf.matmul(tf.concat([s["x"], s["x"]], 1), table), 1)
        return 100.0 * y * tf.reduce_mean(s["x"], 1)

    # Each example has the same gradient, so that the clipped sum is as long as BATCH times the clip.
    optimizer = efl.DPGradientDescentGaussianOptimizer(clip, 0.0, learning_rate=1.0)
    made = compiled(lambda: read(slices(np.ones_like(X))()), loss_fn, optimizer)
    train(made, 1)
    assert np.linalg.norm(made.get_weights()["t"] - 1.0) == pytest.approx(clip, rel=1e-4)


# ---- samples


def test_samples_that_a_given_seed_draws_have_no_figure(tmp_path) -> None:
    known = read_by_dataio(tmp_path / "data", batch=20, rows=200, num_epochs=3, sampling="poisson", seed=4)
    train(known, 3)
    with pytest.raises(ModelError, match="drawn by a seed of yours.*leave seed out"):
        known.privacy_spent(1e-3)


def test_no_detour_makes_a_number_of_how_many_were_drawn(tmp_path) -> None:
    def rows(x: tf.Tensor) -> tf.Tensor:
        return tf.shape(x)[0]

    def loss(x: tf.Tensor) -> tf.Tensor:
        return tf.reduce_sum(tf.layers.dense(x, 2, name="d"), 1)

    for number in (
        lambda x: tf.reduce_sum(tf.ones([rows(x)])),
        lambda x: tf.cast(tf.shape(tf.zeros([rows(x), 3]))[0], tf.float32),
        lambda x: tf.cast(tf.size(tf.zeros([rows(x), 3])), tf.float32),
        lambda x: tf.reduce_sum(tf.matmul(tf.ones([1, rows(x)]), tf.ones([rows(x), 1]))),
        lambda x: tf.reduce_max(tf.cumsum(tf.ones([rows(x)]))),
        lambda x: tf.cumsum(tf.ones([rows(x)])),  # a row's number
        lambda x: tf.cast(tf.where(tf.ones([rows(x)]) > 0)[:, 0], tf.float32),
        lambda x: tf.norm(tf.fill([rows(x)], 2.0)),
    ):
        with pytest.raises(ModelError, match="a number that says how many rows were drawn"):
            sampled(tmp_path, lambda x, number=number: loss(x) * number(x))
    # What does not tell it goes on.
    for sized in (
        lambda x: tf.ones([rows(x)]),
        lambda x: 1.0 + tf.random.uniform([rows(x)]),
        lambda x: tf.reshape(tf.fill([rows(x), 1], 2.0), [-1]),
        lambda x: tf.squeeze(tf.exp(tf.zeros([rows(x), 1])), 1),
    ):
        sampled(tmp_path, lambda x, sized=sized: loss(x) * sized(x))


# ---- releases


MIXED = """
def net(m, s):
    x = tf.matmul(s["x"], tf.eye(2))
    return efl.privacy.GaussianRelease(1.0, 5.0)({mix})
def loss_fn(m, s):
    with tf.variable_scope("n"):
        y = tf.matmul(s["x"], tf.get_variable("v", [2, 2]))
    m.send("y", y, require_grad=True)
    {train}
    return y
def eval_fn(m, s):
    {evaluate}
"""
MIXING_LEADER = """
batch = tf.data.make_initializable_iterator(
    tf.data.Dataset.from_tensor_slices(np.zeros((24, 2), np.float32)).repeat().batch(2)).get_next()
def loss_fn(m, s):
    y = tf.reshape(m.recv("y", require_grad=True), [-1, 2])
    {train}
    return tf.reduce_sum(y, 1) + 0 * tf.reduce_sum(s["x"] @ tf.get_variable("v", [2, 1]), 1)
def eval_fn(m, s):
    {evaluate}
"""
BATCHES = public.FOLLOWER[: public.FOLLOWER.index("def net")]


@pytest.mark.parametrize("where", ["train", "evaluate"])
@pytest.mark.parametrize("mix", ["x - tf.reduce_mean(x, 0)", "tf.concat([x, x], 0)", "x"])
def test_rows_of_a_release_are_of_one_row_each_wherever_it_is_made(tmp_path, where: str, mix: str) -> None:
    sends, receives = 'm.send("z", net(m, s))', 'z = m.recv("z")'
    other = "train" if where == "evaluate" else "evaluate"
    empty = {"train": "pass", "evaluate": 'm.send("e", s["x"][:, 0])' if where == "train" else "pass"}
    heard = {"train": "pass", "evaluate": 'm.recv("e")' if where == "train" else "pass"}
    follower = MIXED.format(**{**empty, where: sends, other: empty[other]}, mix=mix)
    leader = MIXING_LEADER.format(**{**heard, where: receives, other: heard[other]})
    result = run_both(
        tmp_path, leader + public.BOTH, BATCHES + follower + public.BOTH, expect=(0, 0) if mix == "x" else None
    )
    if mix != "x":
        assert re.search(
            r"ModelError: the sent tensor 'z'(: what it is for one row| has not one value)", result["follower"].output
        ), result["follower"].output
        assert result["follower"].returncode and result["leader"].returncode


def test_a_leader_without_variables_does_not_return_gradients_as_they_are(tmp_path) -> None:
    follower = """
batch = tf.data.make_initializable_iterator(
    tf.data.Dataset.from_tensor_slices(np.ones((24, 2), np.float32)).repeat().batch(2)).get_next()
def loss_fn(m, s):
    y = tf.matmul(s["x"], tf.get_variable("v", [2, 2]))
    m.send("y", y, require_grad=True)
    return y
"""
    leader = """
batch = tf.data.make_initializable_iterator(
    tf.data.Dataset.from_tensor_slices(np.ones((24, 2), np.float32)).repeat().batch(2)).get_next()
def loss_fn(m, s):
    return tf.reduce_sum(tf.reshape(m.recv("y", require_grad=True), [-1, 2]) * s["x"], 1)
"""
    both = public.BOTH.replace(".eval_fn(eval_fn)", "").replace(
        "train_and_evaluate(1, 12, max_iter=1)", "train(max_step=2)"
    )
    told = run_both(tmp_path, leader + both, follower + both, expect=None)
    assert re.search(
        "ModelError: .*no variables to train.*would have no noise.*'BACKEND_MODE': 'unnoise'", told["leader"].output
    )
    exact = both.replace('"NUM_EXAMPLES": 24', '"NUM_EXAMPLES": 24, "BACKEND_MODE": "unnoise"')
    run_both(tmp_path, leader + exact, follower + both)


# ---- replays


class Watch(tf.train.SessionRunHook):
    """Keeps the variables after each step, and ends the run after so many."""

    def __init__(self, steps: int) -> None:
        self.seen: list[dict[str, np.ndarray]] = []
        self._steps = steps

    def after_run(self, run_context: tf.train.SessionRunContext, run_values: tf.train.SessionRunValues) -> None:
        self.seen.append(run_context.session.run({v.op.name: v for v in tf.trainable_variables()}))
        if len(self.seen) == self._steps:
            raise RuntimeError("crash")


def taken(folder, dataset) -> list[dict[str, np.ndarray]]:
    """Two steps that no checkpoint holds, of numbers in two dtypes that no row moves."""

    def loss_fn(m: efl.Model, s: efl.Sample) -> tf.Tensor:
        low = tf.get_variable("low", [3], initializer=tf.zeros_initializer())
        high = tf.get_variable("high", [3], tf.float64, initializer=tf.zeros_initializer())
        doubled = tf.reduce_sum(tf.cast(s["x"], tf.float64) * high, 1)
        return 0.0 * (tf.reduce_sum(s["x"] * low, 1) + tf.cast(doubled, tf.float32))

    made, watch = compiled(lambda: read(dataset()), loss_fn), Watch(2)
    made.add_hooks([watch], mode=efl.MODE.TRAIN)
    with pytest.raises(RuntimeError, match="crash"):
        made.fit(efl.procedure_fn.train(max_step=4), checkpoint_dir=str(folder), save_checkpoint_steps=1000)
    return watch.seen


def slices(rows: np.ndarray):
    return lambda: tf.data.Dataset.from_tensor_slices(rows).repeat().batch(BATCH)


def test_equal_sums_of_other_rows_have_other_noise(tmp_path) -> None:
    first, same, other = (taken(tmp_path, slices(rows)) for rows in (X, X, X[::-1].copy()))
    for step in range(2):
        for name in ("low", "high"):
            assert np.all(first[step][name] != 0.0)
            np.testing.assert_array_equal(first[step][name], same[step][name])
            assert np.all(first[step][name] != other[step][name])


def test_a_step_whose_rows_nobody_knows_has_noise_of_its_own_in_every_dtype(tmp_path) -> None:
    def generator():  # whose position no checkpoint holds
        return tf.data.Dataset.from_generator(lambda: iter(np.ones_like(X)), tf.float32, [3]).batch(BATCH)

    first, second = (taken(tmp_path, generator) for _ in range(2))
    for name in ("low", "high"):
        assert np.all(first[0][name] != second[0][name])


# ---- passes


def test_windows_that_lie_across_passes_in_other_orders_can_hold_a_row_twice() -> None:
    def windows(batch: int) -> tf.Tensor:
        return read(data().shuffle(ROWS, seed=5).repeat().window(batch).flat_map(lambda window: window.batch(batch)))

    def spent(size: int) -> float:
        tf.reset_default_graph()
        optimizer = efl.DPGradientDescentGaussianOptimizer(1.0, 2.0, learning_rate=0.1)
        made = compiled(lambda: windows(size), plain, optimizer, BATCH_SIZE=size)
        train(made, 4)
        return made.privacy_spent(1e-3).rows[0].epsilon

    assert spent(8) == pytest.approx(compute_epsilon([Mechanism(2.0, 4, 1)], 1e-3, sampling="none").epsilon)
    across = compute_epsilon([Mechanism(2.0, 4, 2)], 1e-3, sampling="none").epsilon
    assert spent(12) > 1.5 * across  # 12 does not divide 40: a batch may hold a row twice, which doubles what it adds


def test_rows_out_of_a_staging_area_have_no_figure() -> None:
    def staged() -> tf.Tensor:
        area = StagingArea([tf.float32], [[BATCH, 3]])
        put = area.put([read(data().repeat().batch(BATCH))])
        tf.add_to_collection(tf.GraphKeys.UPDATE_OPS, put)
        with tf.control_dependencies([put]):
            return tf.reshape(area.get(), [BATCH, 3])

    no_figure(compiled(staged, plain), "rows come out of a queue")


# ---- a batch of one row, and what it is repeated by


def ones(m: efl.Model, s: efl.Sample, with_rows) -> tf.Tensor:
    w = tf.get_variable("w", [3, 2], initializer=tf.zeros_initializer())
    count = tf.shape(s["x"])[0]
    return tf.reduce_sum(tf.reshape(with_rows(s["x"], w), tf.stack([count, -1])), 1)


@pytest.mark.parametrize(
    "repeating",
    [
        lambda x, w: (x + tf.random.normal([BATCH, 3])) @ w,
        lambda x, w: tf.broadcast_to(x, [BATCH, 3]) @ w,
        lambda x, w: tf.matmul(x[:, None, :], tf.ones([BATCH, 3, 3])) @ w,
        lambda x, w: tf.where(tf.ones([BATCH, 3]) > 0, x, 0 * x) @ w,
    ],
)
def test_the_last_batch_of_one_row_is_not_repeated_unseen(repeating) -> None:
    rows = X[: BATCH + 1]  # the second batch has one row

    def batches() -> tf.Tensor:
        return read(tf.data.Dataset.from_tensor_slices(rows).batch(BATCH).repeat())

    made = compiled(batches, lambda m, s: ones(m, s, repeating), NUM_EXAMPLES=BATCH + 1)
    with pytest.raises(ModelError, match=r"repeats the row of a batch of one|another number of rows than the loss"):
        train(made, 2)


def test_what_has_one_place_may_meet_a_batch_of_one_row() -> None:
    rows = X[: BATCH + 1]
    made = compiled(
        lambda: read(tf.data.Dataset.from_tensor_slices(rows).batch(BATCH).repeat()),
        lambda m, s: ones(m, s, lambda x, w: (x + tf.random.normal([1, 3]) * tf.ones([3])) @ w),
        NUM_EXAMPLES=BATCH + 1,
    )
    train(made, 2)


# ---- gradients and norms


@pytest.mark.parametrize("gradient", [tf.sign, tf.math.cumsum])
def test_a_gradient_of_ones_own_is_one_also_where_it_is_a_function_of_tensorflow(gradient) -> None:
    def loss_fn(m: efl.Model, s: efl.Sample) -> tf.Tensor:
        passed = tf.custom_gradient(lambda v: (tf.identity(v), gradient))(tf.get_variable("w", [3]))
        return tf.reduce_sum(s["x"] * passed, 1)

    with pytest.raises(ModelError, match="has a gradient of the user's own"):
        compiled(lambda: read(slices(X)()), loss_fn)


def test_gradients_that_tensorflow_writes_so_are_its_own() -> None:
    def loss_fn(m: efl.Model, s: efl.Sample) -> tf.Tensor:
        return tf.reduce_sum(tf.nn.swish(tf.layers.dense(s["x"], 2)), 1)

    train(compiled(lambda: read(slices(X)()), loss_fn), 1)


@pytest.mark.parametrize("kind", ["one direction", "few positions", "many positions", "a function of each number"])
def test_what_a_tiny_and_a_huge_factor_make_is_clipped(kind: str) -> None:
    clip, tiny, huge = 1e-3, 1e-19, 1e18

    def loss_fn(m: efl.Model, s: efl.Sample) -> tf.Tensor:
        x, size = s["x"][:, 0], 300 if kind == "many positions" else 4
        w = tf.get_variable("w", [size, size], initializer=tf.zeros_initializer())
        if kind == "one direction":
            return x * huge * tf.reduce_sum(w)
        if kind == "a function of each number":
            return tf.reduce_sum((huge + 0 * s["x"][:, :1]) * tf.ones([1, size]) @ tf.sin(w), 1) * x
        a = huge * tf.ones([1, 2, size]) + 0 * s["x"][:, :1, None]
        return tf.reduce_sum(tf.reshape(tf.reshape(a, [-1, size]) @ w, [-1, 2 * size]), 1) * x

    optimizer = efl.DPGradientDescentGaussianOptimizer(clip, 0.0, learning_rate=1.0)
    made = compiled(lambda: read(slices(np.full_like(X, tiny))()), loss_fn, optimizer)
    train(made, 1)
    assert 0.9 * clip < np.linalg.norm(made.get_weights()["w"]) < 1.0001 * clip


def test_a_reduction_keeps_no_state() -> None:
    kept: dict[str, tf.Variable] = {}

    def loss_fn(m: efl.Model, s: efl.Sample) -> tf.Tensor:
        kept["v"] = tf.get_variable("kept", [], trainable=False, collections=[tf.GraphKeys.LOCAL_VARIABLES])
        return plain(m, s)

    def reduce(losses: tf.Tensor) -> tf.Tensor:
        with tf.control_dependencies([kept["v"].assign_add(tf.reduce_sum(losses))]):
            return tf.reduce_sum(losses) * tf.sign(kept["v"].read_value())

    with pytest.raises(ModelError, match="REDUCE uses .*, which keeps a state or reads a variable"):
        compiled(lambda: read(slices(X)()), loss_fn, REDUCE=reduce)


def test_an_axis_that_wraps_round_is_the_one_that_it_is() -> None:
    def loss_fn(m: efl.Model, s: efl.Sample) -> tf.Tensor:
        x = tf.tile(s["x"][:, None, :], [1, 2, 1])
        axis = tf.cast(tf.cast(tf.rank(x) + 253, tf.uint8), tf.int32)  # 0
        return tf.reduce_sum(tf.reshape(tf.reduce_sum(x, axis), [-1, 3]) * tf.get_variable("w", [3]), 1)

    with pytest.raises(ModelError, match="it reduces over the examples of the batch"):
        compiled(lambda: read(slices(X)()), loss_fn)


def test_a_short_batch_of_micro_batches_is_told_in_words() -> None:
    optimizer = efl.DPGradientDescentGaussianOptimizer(1.0, 2.0, num_microbatches=2, learning_rate=0.1)
    made = compiled(
        lambda: read(tf.data.Dataset.from_tensor_slices(X[:39]).batch(BATCH).repeat()),
        plain,
        optimizer,
        NUM_EXAMPLES=39,
    )
    with pytest.raises(ModelError, match="a batch that is no multiple of a micro-batch's 4 rows"):
        train(made, 5)


def test_nothing_is_computed_by_a_reshape_of_how_many_were_drawn(tmp_path) -> None:
    def summed(x: tf.Tensor) -> tf.Tensor:
        wide = tf.ones([1, 12]) + 0.0 * x[:, :1]
        groups = tf.reshape(wide, tf.stack([-1, tf.shape(x)[0]]))
        return tf.reduce_sum(tf.layers.dense(x, 2, name="d"), 1) * tf.reshape(tf.reduce_sum(groups, 1), [-1, 12])[:, 0]

    with pytest.raises(ModelError, match="a number that says how many rows were drawn"):
        sampled(tmp_path, summed)


def test_a_table_with_a_constraint_keeps_it() -> None:
    def held(m: efl.Model, sample: efl.Sample) -> tf.Tensor:
        with tf.variable_scope("held", reuse=tf.AUTO_REUSE):
            table = tf.get_variable(
                "rows", [tables.ROWS, 2], initializer=tf.ones_initializer(), constraint=lambda v: tf.minimum(v, 0.5)
            )
        return tf.reduce_sum(tf.nn.embedding_lookup(table, sample.features["ids"]), [1, 2])

    made = tables.model(loss=held)
    train(made, 1)
    assert made.get_weights()["held/rows"].max() <= 0.5
