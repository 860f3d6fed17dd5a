"""Private optimizers: the clipped sums of tensorflow-privacy's, bit for bit in meaning; arguments; refusals."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

import efl
from efl.errors import ConfigError, ModelError
from tests.privacy import reference

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
ROWS = 8
X = np.random.default_rng(0).normal(size=(ROWS, 4)).astype(np.float32) * 3


def _loss(x: tf.Tensor) -> tf.Tensor:
    h = tf.layers.dense(tf.layers.dense(x, 5, activation="tanh", name="a"), 3, name="b")
    return tf.reduce_sum(tf.square(h), 1)


def trained(make: object, steps: int = 3) -> list[np.ndarray]:
    """Weights after some steps of an optimizer that ``make`` makes, from always the same ones."""
    tf.reset_default_graph()
    x = tf.placeholder(tf.float32, [ROWS, 4])
    op = make().minimize(_loss(x))
    with tf.Session() as sess:
        sess.run(tf.global_variables_initializer())
        for number, variable in enumerate(tf.trainable_variables()):
            value = np.random.default_rng(number).normal(size=variable.shape.as_list())
            variable.load(value.astype(np.float32), sess)
        for _ in range(steps):
            sess.run(op, {x: X})
        return sess.run(tf.trainable_variables())


@pytest.mark.parametrize("microbatches", [None, 4, 2, 1])
@pytest.mark.parametrize(
    ("name", "further"),
    [
        ("DPGradientDescentGaussianOptimizer", {"learning_rate": 0.5}),
        ("DPAdamGaussianOptimizer", {"learning_rate": 0.1}),
        ("DPAdagradGaussianOptimizer", {"learning_rate": 0.1}),
    ],
)
def test_without_noise_it_is_tensorflow_privacys(
    name: str, further: dict[str, float], microbatches: int | None
) -> None:
    other = getattr(reference.module("optimizers.dp_optimizer"), name)
    arguments = {"l2_norm_clip": 1.0, "noise_multiplier": 0.0, "num_microbatches": microbatches, **further}
    ours, theirs = (trained(lambda cls=cls: cls(**arguments)) for cls in (getattr(efl, name), other))
    for one, reference_one in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, reference_one, rtol=1e-5, atol=1e-6)
    unclipped = trained(lambda: getattr(efl, name)(**{**arguments, "l2_norm_clip": 1e6}))
    assert not np.allclose(unclipped[0], ours[0], rtol=1e-2) or "Gradient" not in name  # clipping did something


@pytest.mark.parametrize("microbatches", [None, 4])
@pytest.mark.parametrize("own", [False, True])
def test_queries_of_tensorflow_privacy(own: bool, microbatches: int | None) -> None:
    query = reference.module("dp_query.gaussian_query").GaussianSumQuery
    if own:
        query = type("Mine", (query,), {})  # efl knows nothing of it but its interface
    other = reference.module("optimizers.dp_optimizer").DPGradientDescentGaussianOptimizer
    ours = trained(lambda: efl.DPGradientDescentOptimizer(query(1.0, 0.0), microbatches, False, 0.5))
    theirs = trained(lambda: other(1.0, 0.0, microbatches, learning_rate=0.5))
    for one, reference_one in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, reference_one, rtol=1e-5, atol=1e-6)
    noisy = trained(lambda: efl.DPGradientDescentOptimizer(query(1.0, 2.0), microbatches, False, 0.5))
    assert not np.allclose(noisy[0], ours[0], atol=1e-2)


def test_noise_is_calibrated_to_the_clip_and_divided_by_the_batch() -> None:
    def step(multiplier: float) -> np.ndarray:
        optimizer = efl.DPGradientDescentGaussianOptimizer(0.5, multiplier, learning_rate=1.0)
        return np.concatenate([w.ravel() for w in trained(lambda: optimizer, steps=1)])

    still = step(0.0)
    moved = np.concatenate([step(3.0) - still for _ in range(40)])
    assert abs(moved.std() / (0.5 * 3.0 / ROWS) - 1) < 0.08
    assert abs(moved.mean()) < 4 * 0.5 * 3.0 / ROWS / np.sqrt(moved.size)


def test_other_optimizers_can_be_made_private() -> None:
    made = efl.make_gaussian_optimizer_class(tf.train.MomentumOptimizer)
    assert made.__name__ == "DPMomentumGaussianOptimizer"
    trained(lambda: made(1.0, 1.0, learning_rate=0.1, momentum=0.9))
    assert efl.make_optimizer_class(tf.train.RMSPropOptimizer).__name__ == "DPRMSPropOptimizer"
    assert efl.privacy.DPAdamGaussianOptimizer is efl.DPAdamGaussianOptimizer


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: efl.DPAdamGaussianOptimizer(0.0, 1.0), r"l2_norm_clip=0.0: expected a number above 0"),
        (lambda: efl.DPAdamGaussianOptimizer(1.0, -1.0), r"noise_multiplier=-1.0: expected a number of at least 0"),
        (lambda: efl.DPAdamGaussianOptimizer(1.0, float("nan")), "noise_multiplier=nan"),
        (lambda: efl.DPAdamGaussianOptimizer(1.0, 1.0, 0), "num_microbatches=0: expected a positive number"),
        (lambda: efl.DPAdamOptimizer(1.0), "has no initial_global_state.*expected a DPQuery that sums"),
        (lambda: efl.make_optimizer_class(dict), "is no optimizer class of tf.train"),
        (lambda: efl.make_gaussian_optimizer_class(efl.DPAdamOptimizer), "DPAdamOptimizer is private already"),
        (
            lambda: efl.make_optimizer_class(tf.train.experimental.MixedPrecisionLossScaleOptimizer),
            "computes gradients in a way of its own",
        ),
    ],
)
def test_arguments_that_cannot_be(make: object, message: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        make()


def test_a_scalar_loss_and_a_weighted_one_are_refused() -> None:
    tf.reset_default_graph()
    x = tf.placeholder(tf.float32, [ROWS, 4])
    loss, optimizer = _loss(x), efl.DPGradientDescentGaussianOptimizer(1.0, 1.0, learning_rate=0.1)
    with pytest.raises(ModelError, match="needs a vector with one value for each row of the batch"):
        optimizer.minimize(tf.reduce_mean(loss))
    with pytest.raises(ModelError, match="grad_loss of a private optimizer"):
        optimizer.compute_gradients(loss, grad_loss=loss)
    with pytest.raises(ConfigError, match="a batch of 8 rows cannot be cut into so many equal parts"):
        efl.DPGradientDescentGaussianOptimizer(1.0, 1.0, 3, learning_rate=0.1).minimize(loss)


def test_what_breaks_the_bound_is_found_at_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    from efl.privacy.per_example.layouts import walk
    from efl.privacy.per_example.layouts.layout import EXAMPLES

    monkeypatch.setitem(walk.RULES, "ReverseV2", lambda op, ins, walk: EXAMPLES)  # a wrong entry in the table
    tf.reset_default_graph()
    x = tf.placeholder(tf.float32, [None, 4])
    h = tf.layers.dense(x, 4)
    op = efl.DPGradientDescentGaussianOptimizer(1.0, 1.0, learning_rate=0.1).minimize(
        tf.reduce_sum(h * tf.reverse(tf.tanh(h), [0]), 1)
    )
    with tf.Session() as sess:
        sess.run(tf.global_variables_initializer())
        before = sess.run(tf.trainable_variables())
        with pytest.raises(tf.errors.InvalidArgumentError, match="multiplied gradients of other rows too"):
            sess.run(op, {x: X})
        for now, then in zip(sess.run(tf.trainable_variables()), before, strict=True):
            np.testing.assert_array_equal(now, then)


def test_a_row_that_is_not_finite_is_no_update() -> None:
    tf.reset_default_graph()
    x = tf.placeholder(tf.float32, [ROWS, 4])
    op = efl.DPGradientDescentGaussianOptimizer(1.0, 1.0, learning_rate=0.1).minimize(_loss(tf.sqrt(x)))
    with tf.Session() as sess:
        sess.run(tf.global_variables_initializer())
        sess.run(op, {x: np.ones([ROWS, 4])})
        before = sess.run(tf.trainable_variables())
        with pytest.raises(tf.errors.InvalidArgumentError, match="the gradient of a row is not finite"):
            sess.run(op, {x: np.concatenate([np.ones([ROWS - 1, 4]), -np.ones([1, 4])])})
        for now, then in zip(sess.run(tf.trainable_variables()), before, strict=True):
            np.testing.assert_array_equal(now, then)


@pytest.mark.parametrize("counted", [False, True])
def test_without_a_model_equal_sums_have_noise_of_their_own(counted: bool) -> None:
    """Else it would show in which steps no row has a gradient."""
    tf.reset_default_graph()
    x = tf.placeholder(tf.float32, [ROWS, 4])
    kernel = tf.get_variable("kernel", [4, 1], initializer=tf.zeros_initializer())
    global_step = tf.train.get_or_create_global_step() if counted else None
    optimizer = efl.DPGradientDescentGaussianOptimizer(1.0, 5.0, learning_rate=1.0)
    loss = tf.reduce_sum(tf.nn.relu(tf.matmul(x, kernel) - 1e3), 1)  # whose gradient is zero
    ((gradient, _),) = optimizer.compute_gradients(loss)
    (again,) = (g for g, _ in optimizer.compute_gradients(loss))
    with tf.Session() as sess:
        sess.run(tf.global_variables_initializer())
        released = [value for _ in range(3) for value in sess.run([gradient, again], {x: X})]
        assert global_step is None or sess.run(global_step) == 0  # nobody told minimize() of it
    assert len({value.tobytes() for value in released}) == 6
    assert all(np.abs(value).max() > 0 for value in released)


@pytest.mark.parametrize("rate", [float("nan"), float("inf"), -0.1, "x", None, True])
def test_a_learning_rate_that_is_none_is_refused_when_the_optimizer_is_made(rate: object) -> None:
    for make in (efl.DPGradientDescentGaussianOptimizer, efl.DPAdamGaussianOptimizer, efl.DPAdagradGaussianOptimizer):
        with pytest.raises(ConfigError, match=r"learning_rate=.*: expected a number of at least 0"):
            make(1.0, 1.0, learning_rate=rate)
    with pytest.raises(ConfigError, match="learning_rate="):
        efl.DPGradientDescentGaussianOptimizer(1.0, 1.0, None, False, rate)
    for good in (0, 0.1, np.float32(0.1), tf.constant(0.1), lambda: 0.1):
        efl.DPGradientDescentGaussianOptimizer(1.0, 1.0, learning_rate=good)
