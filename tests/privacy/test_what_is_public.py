"""What a private step may take for public, and what it must not: sizes of batches and rows, equal sums, own updates."""

from __future__ import annotations

import re

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

import efl
from efl.errors import ConfigError, ModelError
from efl.privacy.accounting import compute_dp_sgd_privacy
from tests.data.records import example, write
from tests.federation.harness import run_both

pytest.importorskip("dp_accounting")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
ROWS, BATCH = 40, 8
X = np.random.default_rng(0).normal(size=(ROWS, 3)).astype(np.float32)
COLUMNS = {"x": [tf.feature_column.numeric_column("x", 3)]}


def compiled(batch, loss_fn, optimizer=None, **config):
    """A private model on ``batch()``; ``loss_fn`` takes model and sample."""
    tf.reset_default_graph()
    made = efl.Model(seed=1)
    made.input_fn(lambda m, mode: efl.Sample({"x": batch()}, COLUMNS)).loss_fn(loss_fn)
    optimizer = optimizer or efl.DPGradientDescentGaussianOptimizer(1.0, 2.0, learning_rate=0.1)
    made.optimizer_fn(efl.optimizer_fn.optimizer_setter(optimizer))
    return made.compile(opt_config={"BATCH_SIZE": BATCH, "NUM_EXAMPLES": ROWS, **config})


def data():
    return tf.data.Dataset.from_tensor_slices(X)


def read(made):
    return tf.data.make_initializable_iterator(made).get_next()


def plain(m, s):
    return tf.reduce_sum(tf.square(tf.layers.dense(s["x"], 2, name="d")), 1)


def no_figure(made, why):
    made.fit(efl.procedure_fn.train(max_step=2))
    with pytest.raises(ModelError, match=why):
        made.privacy_spent(1e-3)


# ---- sizes


def sparse_model(tmp_path, loss_of):
    tf.reset_default_graph()
    records = [example({"x": X[i], "words": np.arange(1 + i % 4)}) for i in range(ROWS)]
    write(tmp_path / "data" / "a.tfrecord", records)
    made = efl.Model(seed=1)

    def input_fn(m, mode):
        reader = efl.data.DataIO(str(tmp_path / "data"), BATCH, 0, 1)
        reader.fixedlen_feature("x", 3)
        reader.varlen_feature("words", dtype=tf.int64)
        words = tf.feature_column.categorical_column_with_identity("words", 8)
        return efl.Sample(reader.read(), {**COLUMNS, "e": [tf.feature_column.embedding_column(words, 2)]})

    made.input_fn(input_fn).loss_fn(lambda m, s: loss_of(s))
    made.optimizer_fn(
        efl.optimizer_fn.optimizer_setter(efl.DPGradientDescentGaussianOptimizer(1.0, 2.0, learning_rate=0.1))
    )
    return made.compile()


def test_the_length_of_the_longest_sparse_row_is_no_number_to_compute_with(tmp_path):
    def shares(s):
        y = tf.reduce_sum(tf.layers.dense(tf.concat([s["x"], s["e"]], 1), 2), 1)
        return y / tf.cast(s.features["words"].dense_shape[1], tf.float32)

    with pytest.raises(ModelError, match=r"RealDiv.*how long the longest sparse row of a batch is"):
        sparse_model(tmp_path, shares)
    # An embedding, whose shapes are made of it, is what it was.
    trained = sparse_model(tmp_path, lambda s: tf.reduce_sum(tf.layers.dense(tf.concat([s["x"], s["e"]], 1), 2), 1))
    trained.fit(efl.procedure_fn.train(max_step=2))


def sampled(tmp_path, loss_of):
    tf.reset_default_graph()
    write(tmp_path / "data" / "a.tfrecord", [example({"x": row}) for row in X])
    made = efl.Model(seed=1)

    def input_fn(m, mode):
        reader = efl.data.DataIO(str(tmp_path / "data"), BATCH, 0, 1, sampling="poisson")
        reader.fixedlen_feature("x", 3)
        return efl.Sample(reader.read(), COLUMNS)

    made.input_fn(input_fn).loss_fn(lambda m, s: loss_of(s["x"]))
    made.optimizer_fn(
        efl.optimizer_fn.optimizer_setter(efl.DPGradientDescentGaussianOptimizer(1.0, 2.0, learning_rate=0.1))
    )
    return made.compile()


def test_how_many_rows_a_poisson_sample_has_is_no_number_to_compute_with(tmp_path):
    def loss(x):
        return tf.reduce_sum(tf.layers.dense(x, 2, name="d"), 1)

    for mixing in (
        lambda x: loss(x) / tf.cast(tf.shape(x)[0], tf.float32),
        lambda x: loss(x) * tf.cast(tf.shape(x)[0] % 2, tf.float32),
        lambda x: loss(x) * tf.cast(tf.range(tf.shape(x)[0]), tf.float32),
        lambda x: loss(x) + tf.ones([100])[: tf.shape(x)[0]],
    ):
        with pytest.raises(ModelError, match="a number that says how many rows were drawn"):
            sampled(tmp_path, mixing)
    as_shape = sampled(tmp_path, lambda x: loss(tf.reshape(x, [tf.shape(x)[0], 3])) + tf.fill([tf.shape(x)[0]], 1.0))
    as_shape.fit(efl.procedure_fn.train(max_step=2))
    assert as_shape.privacy_spent(1e-3).rows[0].epsilon is not None
    # Of other batches everybody knows the size.
    compiled(
        lambda: read(data().repeat().batch(BATCH)), lambda m, s: plain(m, s) / tf.cast(tf.shape(s["x"])[0], tf.float32)
    )


@pytest.mark.parametrize("dtype", [tf.float16, tf.bfloat16])
def test_sums_in_half_precision_are_refused(dtype):
    def loss_fn(m, s):
        w = tf.get_variable("w", [3, 2])
        return tf.reduce_sum(tf.cast(tf.cast(s["x"], dtype) @ tf.cast(w, dtype), tf.float32), 1)

    with pytest.raises(ModelError, match=r"w: .*\(MatMul\) computes with it in half precision"):
        compiled(lambda: read(data().repeat().batch(BATCH)), loss_fn)


# ---- where rows come from


def test_a_step_that_reads_several_batches_has_no_figure():
    def two():
        iterator = tf.data.make_initializable_iterator(data().repeat().batch(BATCH))
        return iterator.get_next() - iterator.get_next()

    no_figure(compiled(two, plain), "a step reads several batches")

    def beside(m, s):  # not among the features
        other = read(data().repeat().shuffle(20).batch(BATCH))
        return plain(m, s) + tf.reduce_sum(other @ tf.get_variable("v", [3, 1]), 1)

    no_figure(compiled(lambda: read(data().repeat().batch(BATCH)), beside), "a step reads several batches")


def test_rows_out_of_a_queue_have_no_figure():
    def queued():
        (row,) = tf.train.slice_input_producer([X], num_epochs=None)
        return tf.reshape(tf.train.shuffle_batch([row], BATCH, capacity=200, min_after_dequeue=100), [BATCH, 3])

    no_figure(compiled(queued, plain), "rows come out of a queue")


@pytest.mark.parametrize("large", [lambda d: d, lambda d: d.repeat()])
def test_joining_what_repeats_with_other_rows_has_no_figure(large):
    def joined():
        both = tf.data.Dataset.zip((data().take(5).repeat(), large(data())))
        return read(both.map(lambda a, b: a + b).batch(BATCH).repeat())

    no_figure(compiled(joined, plain), "joins what .* repeats with other rows")


def test_rows_and_their_numbers_may_be_joined():
    def numbered():
        both = tf.data.Dataset.zip((data(), tf.data.Dataset.range(10**6))).map(lambda x, i: x)
        return read(both.batch(BATCH).repeat())

    made = compiled(numbered, plain)
    made.fit(efl.procedure_fn.train(max_step=5))
    assert made.privacy_spent(1e-3).rows[0].epsilon < 2


def test_passes_that_begin_inside_of_a_batch_count_for_two():
    made = compiled(lambda: read(data().shuffle(ROWS, seed=5).repeat().skip(12).batch(BATCH)), plain)
    made.fit(efl.procedure_fn.train(max_step=5))
    aligned = compiled(lambda: read(data().shuffle(ROWS, seed=5).repeat().batch(BATCH)), plain)
    aligned.fit(efl.procedure_fn.train(max_step=5))
    assert made.privacy_spent(1e-3).rows[0].epsilon > 2 * aligned.privacy_spent(1e-3).rows[0].epsilon


# ---- what is released


@pytest.mark.parametrize("how", ["apply_gradients", "minimize"])
def test_what_a_user_lets_a_private_optimizer_do_beside_the_step_is_not_taken_for_counted(how):
    optimizer = efl.DPGradientDescentGaussianOptimizer(1.0, 2.0, learning_rate=0.1)

    def loss_fn(m, s):
        loss = plain(m, s)
        variables = tf.trainable_variables()
        if how == "minimize":
            m.add_train_op(optimizer.minimize(loss))
        else:
            m.add_train_op(optimizer.apply_gradients(zip(tf.gradients(loss, variables), variables)))
        return loss

    made = compiled(lambda: read(data().repeat().batch(BATCH)), loss_fn, optimizer)
    made.fit(efl.procedure_fn.train(max_step=5))
    (row,) = made.privacy_spent(1e-3).rows
    assert row.epsilon is None and "d/kernel" in str(made.privacy_spent(1e-3))


FOLLOWER = """
X = np.zeros((24, 2), np.float32)
X[::3] = 1.0
batch = tf.data.make_initializable_iterator(tf.data.Dataset.from_tensor_slices(X).repeat().batch(2)).get_next()
def net(m, s):
    w = tf.get_variable("w", initializer=np.eye(2, dtype=np.float32))
    return efl.privacy.GaussianRelease(1.0, 50.0)(tf.matmul(s["x"], w))
def loss_fn(m, s):
    with tf.variable_scope("n"):
        y = net(m, s)
    m.send("y", y, require_grad=True)
    return y
def eval_fn(m, s):
    with tf.variable_scope("n", reuse=True):
        m.send("y", net(m, s))
"""
LEADER = """
batch = tf.data.make_initializable_iterator(
    tf.data.Dataset.from_tensor_slices(np.zeros((24, 2), np.float32)).repeat().batch(2)).get_next()
def loss_fn(m, s):
    y = tf.reshape(m.recv("y", require_grad=True), [-1, 2])
    return tf.reduce_sum(y, 1) + 0 * tf.reduce_sum(s["x"] @ tf.get_variable("v", [2, 1]), 1)
def eval_fn(m, s):
    y = m.recv("y")
    m.add_eval_op(tf.numpy_function(lambda v: np.save(f"got-{len(__import__('os').listdir('.'))}.npy", v), [y], []))
"""
BOTH = """
model = efl.FederalModel()
column = {"x": [tf.feature_column.numeric_column("x", 2)]}
model.input_fn(lambda m, mode: efl.Sample({"x": batch}, column)).loss_fn(loss_fn).eval_fn(eval_fn)
private = efl.DPGradientDescentGaussianOptimizer(1.0, 1.0, learning_rate=1e-9)
model.optimizer_fn(efl.optimizer_fn.optimizer_setter(private))
model.compile(opt_config={"BATCH_SIZE": 2, "NUM_EXAMPLES": 24})
model.fit(efl.procedure_fn.train_and_evaluate(1, 12, max_iter=1))
"""


def test_equal_rows_in_one_evaluation_have_noise_of_their_own(tmp_path):
    run_both(tmp_path, LEADER + BOTH, FOLLOWER + BOTH, end="")
    rows = np.concatenate([np.load(file) for file in tmp_path.glob("got-*.npy")])
    assert len(rows) == 24 and len(np.unique(rows, axis=0)) == 24


# ---- arguments and figures


def test_next_to_no_noise_is_told_at_once():
    for accountant, sampling, noise in (("pld", "poisson", 1e-3), ("rdp", "poisson", 1e-160), ("rdp", "none", 1e-160)):
        spent = compute_dp_sgd_privacy(100, 10, noise, 1, 1e-5, accountant=accountant, sampling=sampling)
        assert spent.epsilon > 1e5
    assert compute_dp_sgd_privacy(100, 100, 1.0, 10_000, 1e-5, accountant="pld").epsilon > 5000


def test_arguments_that_cannot_be():
    made = compiled(lambda: read(data().repeat().batch(BATCH)), plain)
    made.fit(efl.procedure_fn.train(max_step=1))
    for further in ("a", -1, 1.5, True):
        with pytest.raises(ConfigError, match="further_steps"):
            made.privacy_spent(1e-3, further_steps=further)
    for arguments, what in (
        ((made, 0), "delta"),
        ((made, "x"), "delta"),
        ((None, 1e-5), "is no model"),
        ((made, 1e-5, 10, "a"), "target_epsilon"),
        ((made, 1e-5, 10, True), "target_epsilon"),
    ):
        with pytest.raises(ConfigError, match=re.escape(what)):
            efl.privacy.PrivacyHook(*arguments)
    with pytest.raises(ConfigError, match="l2_norm_clip=True"):
        efl.DPGradientDescentGaussianOptimizer(True, 1.0, learning_rate=0.1)
