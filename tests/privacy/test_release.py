"""Activations that leave clipped and noised, and are accounted for."""

from __future__ import annotations

import re

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

import efl
from efl._graph_checks import raise_if_refused
from efl.errors import ConfigError, ModelError
from efl.privacy import release as releases
from efl.privacy.noise import Ledger, Releases, Seed
from tests.federation.harness import run_both
from tests.privacy import test_federation as federation

X = np.random.default_rng(0).normal(size=(400, 3)).astype(np.float32)


def test_rows_are_clipped_and_noised_and_gradients_pass():
    tf.reset_default_graph()
    x = tf.placeholder(tf.float32, [None, 3])
    private = efl.privacy.GaussianRelease(0.5, 2.0)(tf.tanh(x) * 3)
    made = Releases(Seed.fresh(), Ledger.in_memory())
    assert releases.bind(private, "train/y", made) is not None
    plain = tf.tanh(x) * 3
    clipped = plain * tf.minimum(1.0, 0.5 / tf.norm(plain, axis=1, keepdims=True))
    gradients = [tf.gradients(t, x, grad_ys=tf.ones_like(t))[0] for t in (private, clipped)]
    with tf.Session() as sess:
        sess.run(tf.global_variables_initializer())
        noisy, exact, one, other = sess.run([private, clipped, *gradients], {x: X})
    assert abs((noisy - exact).std() / (0.5 * 2.0) - 1) < 0.1
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    assert np.linalg.norm(exact, axis=1).max() < 0.5 + 1e-5
    assert made.ledger.phases()[0].terms["group"] == "train/y"


def test_a_release_is_sent_once_and_by_a_model():
    tf.reset_default_graph()
    release = efl.privacy.GaussianRelease(1.0, 1.0)
    private = release(tf.ones([4, 2]))
    with tf.Session() as sess:
        sess.run(tf.global_variables_initializer())
        with pytest.raises(tf.errors.OpError, match="was made and never sent"):
            sess.run(private)
    made = Releases(Seed.fresh(), Ledger.in_memory())
    releases.bind(private, "train/y", made)
    with pytest.raises(ModelError, match="was sent as 'train/y' before"):
        releases.bind(private, "train/z", made)
    with pytest.raises(ModelError, match="int32 and shape .*: expected float32 or float64 with a row for each row"):
        release(tf.ones([4, 2], tf.int32))
    with pytest.raises(ConfigError, match="noise_multiplier=0.0: expected a number above 0"):
        efl.privacy.GaussianRelease(1.0, 0.0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_is_not_sent(value):
    tf.reset_default_graph()
    x = tf.placeholder(tf.float32, [None, 3])
    private, made = efl.privacy.GaussianRelease(0.5, 2.0)(x), Releases(Seed.fresh(), Ledger.in_memory())
    releases.bind(private, "train/y", made)
    rows = X.copy()
    rows[7, 1] = value
    with tf.Session() as sess:
        sess.run(tf.global_variables_initializer())
        with pytest.raises(tf.errors.InvalidArgumentError, match="look for missing values in the columns") as error:
            sess.run(private, {x: rows})
        assert not made.ledger.phases()  # nobody was asked for noise
        with pytest.raises(ModelError, match="efl.privacy, GaussianRelease of .* is not finite, and cannot be clipped"):
            raise_if_refused(error.value, "follower", 3, "train")
        rows[7, 1] = 1e30  # whose square is infinite
        assert np.isfinite(sess.run(private, {x: rows})).all()


def test_the_peer_gets_nothing_of_a_step_with_such_a_row(tmp_path):
    follower = federation.party(federation.FOLLOWER, True).replace("install()\n", "X[40, 5] = float('nan')\n")  # step 3
    sends = "m.send('f', h, require_grad=True)"
    assert sends in follower
    private = "private = efl.privacy.GaussianRelease(1.0, 3.0)(h)\n    m.send('f', private, require_grad=True)"
    leader = federation.party(federation.LEADER, False).replace("install()\n", "")
    receives = "f = tf.reshape(m.recv('f', require_grad=True), [-1, 5])\n"
    assert receives in leader
    shows = "    m.add_train_op(tf.numpy_function(lambda v: print('SEEN', np.isfinite(v).all()), [f], []))\n"
    told = run_both(
        tmp_path,
        leader.replace(receives, receives + shows),
        follower.replace(sends, private).replace("return h\n", "return private\n"),
        expect=None,
    )
    assert re.findall("SEEN (.*)", told["leader"].output) == ["True", "True"]
    assert re.search("ModelError: efl.privacy, GaussianRelease of .* look for missing values", told["follower"].output)
    assert told["leader"].returncode and told["follower"].returncode


def test_a_guarantee_towards_the_peer_composes_updates_and_releases(tmp_path):
    pytest.importorskip("dp_accounting")
    from efl.privacy.accounting import Mechanism, compute_epsilon

    sizes = {"BATCH_SIZE": 16, "NUM_EXAMPLES": 96}
    say = "\nprint('TABLE', [(r.adversary, r.epsilon, r.reason) for r in model.privacy_spent(1e-3).rows])\n"
    texts = {}
    for role, text in (("leader", federation.LEADER), ("follower", federation.FOLLOWER)):
        texts[role] = federation.party(text, True, **sizes).replace("install()\n", "") + say
    sends = "m.send('f', h, require_grad=True)"
    assert sends in texts["follower"]
    noisy = "private = efl.privacy.GaussianRelease(1.0, 3.0)(h)\n    m.send('f', private, require_grad=True)"
    texts["follower"] = texts["follower"].replace(sends, noisy).replace("return h\n", "return private\n")
    told = run_both(tmp_path, texts["leader"], texts["follower"])
    expected = compute_epsilon(
        [Mechanism(0.2, 6, 1), Mechanism(3.0, 6, 1)], 1e-3, relation="replace_one", sampling="none"
    ).epsilon
    for result in told.values():
        rows = {name: rest for name, *rest in eval(re.search(r"TABLE (.*)", result.output)[1])}
        about = rows["the leader, with all that it received, about the follower's rows"]
        assert about == [pytest.approx(expected, rel=1e-6), ""]


SAMPLED = """
from tests.data.records import example, write
import pathlib
X = np.random.default_rng(0).normal(size=(200, 2)).astype(np.float32)
write(pathlib.Path(ROLE, "a.tfrecord"), [example({"x": x}) for x in X])
def samples(m, mode):
    reader = efl.data.FederalDataIO(ROLE, 40, m.communicator, ROLE, 0, 1, num_epochs=50, sampling="poisson")
    reader.fixedlen_feature("x", 2)
    return efl.Sample(reader.read(), {"x": [tf.feature_column.numeric_column("x", 2)]})
def times_v(x):
    with tf.variable_scope("q", reuse=tf.AUTO_REUSE):
        return tf.matmul(x, tf.get_variable("v", [2, 2]))
BODY
model = efl.FederalModel()
model.input_fn(samples).loss_fn(loss_fn).eval_fn(eval_fn)
private = efl.DPGradientDescentGaussianOptimizer(1.0, 2.0, learning_rate=0.1)
model.optimizer_fn(efl.optimizer_fn.optimizer_setter(private)).compile()
model.fit(efl.procedure_fn.train_and_evaluate(4, 3, max_iter=2))
rows = {r.adversary: (r.epsilon, r.reason) for r in model.privacy_spent(1e-5).rows}
print("ABOUT", rows["the leader, with all that it received, about the follower's rows"])
"""
SENDS = """
def loss_fn(m, s):
    y = efl.privacy.GaussianRelease(1.0, 5.0)(times_v(s["x"]))
    m.send("y", y, require_grad=True)
    return y
def eval_fn(m, s):
    m.send("e", efl.privacy.GaussianRelease(1.0, 5.0)(times_v(s["x"])))
"""
RECEIVES = """
def loss_fn(m, s):
    return tf.reduce_sum(tf.tanh(tf.reshape(m.recv("y", require_grad=True), [-1, 2])) + times_v(s["x"]), 1)
def eval_fn(m, s):
    m.recv("e")
"""


def test_releases_of_an_evaluation_beside_samples_are_composed_by_who_counts_them(tmp_path):
    pytest.importorskip("dp_accounting")
    told = run_both(tmp_path, SAMPLED.replace("BODY", RECEIVES), SAMPLED.replace("BODY", SENDS), end="")
    about = {role: re.search(r"ABOUT \((.*)\)", result.output)[1] for role, result in told.items()}
    assert re.fullmatch(r"\d+\.\d+, ''", about["follower"]), about
    assert about["leader"] == ('None, "none: how often eval/e was sent, noised, only the follower\'s ledger has"')
