"""Encrypted layers between two processes, with real keys: the model of the same layers in one process, to fixed point."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

import efl  # noqa: F401  (puts TensorFlow into graph mode)

import tensorflow.compat.v1 as tf  # isort: skip
from efl.paillier import PrivateKey
from tests.federation import problem
from tests.federation.harness import run_both
from tests.federation.problem import cross_entropy, dense, load, start_value

STEPS, UNITS, RATE = 20, 4, 0.5
LAYERS = {
    "dense": (
        "efl.privacy.EncryptPassiveDense(m.communicator, 5, 5, 'public_key.json', 4, 0.5, START)",
        "efl.privacy.EncryptActiveDense(m.communicator, 5, 'public_key.json', 'private_key.json', 4, 0.5)",
    ),
    "concat": (
        "efl.privacy.EncryptPassiveLayer(m.communicator, 5, 5, 'public_key.json', 0.5, START)",
        "efl.privacy.EncryptActiveLayer(m.communicator, 5, 'public_key.json', 'private_key.json', 0.5)",
    ),
}
LEADER = """
START = lambda shape, dtype=tf.float32, partition_info=None: tf.constant(start_value('hetero', shape))
batch = batches()
def net(m, s):
    h = dense(s['x'], 4, 5, 'left', tf.tanh)
    z = LAYER(h)
    return dense(tf.tanh(z), z.shape[1], 3, 'top')
def loss_fn(m, s):
    return cross_entropy(s['label'], net(m, s))
def eval_fn(m, s):
    m.add_metric('loss_there', tf.metrics.mean(cross_entropy(s['label'], net(m, s))))
model = efl.FederalModel()
model.input_fn(lambda m, mode: sample(m, batch, ROLE)).loss_fn(loss_fn).eval_fn(eval_fn).optimizer_fn(optimizer(0.5))
model.compile().fit(efl.procedure_fn.train_and_evaluate(20, 2, max_iter=1))
"""
FOLLOWER = """
batch = batches()
def net(m, s):
    return LAYER(dense(s['x'], 4, 5, 'right', tf.tanh))
model = efl.FederalModel()
model.input_fn(lambda m, mode: sample(m, batch, ROLE)).loss_fn(net).eval_fn(net).optimizer_fn(optimizer(0.5))
model.compile().fit(efl.procedure_fn.train_and_evaluate(20, 2, max_iter=1))
"""
SAVE = """
raw = model.session.raw_session()
with raw.graph.as_default():
    held = raw.run({v.op.name: v for v in tf.global_variables() if "efl_" not in v.op.name})
np.savez(ROLE + ".npz", **{name.replace("/", "|"): value for name, value in held.items()})
"""


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of one pair of keys."""
    folder = tmp_path_factory.mktemp("keys")
    private = PrivateKey.generate(2048)
    private.save(folder / "private_key.json")
    private.public.save(folder / "public_key.json")
    return folder


@pytest.fixture
def folder(tmp_path: Path, pair: Path) -> Path:
    for file in pair.iterdir():
        shutil.copy(file, tmp_path)
    return tmp_path


def scripts(kind: str) -> tuple[str, str]:
    passive, active = LAYERS[kind]
    return LEADER.replace("LAYER(", f"{passive}("), FOLLOWER.replace("LAYER(", f"{active}(")


def joint(kind: str, steps: int = STEPS, rate: float = RATE) -> tuple[dict[str, np.ndarray], list[float]]:
    """The same model in one process, of plain TensorFlow: weights, and the loss of each step."""
    tf.reset_default_graph()
    x, label, _ = problem.batches()
    left, right = dense(x[:, :4], 4, 5, "left", tf.tanh), dense(x[:, 4:], 4, 5, "right", tf.tanh)
    shape = (5, UNITS) if kind == "dense" else (5,)
    w1, w2 = (tf.get_variable(f"hetero/{name}", initializer=start_value("hetero", shape)) for name in ("w1", "w2"))
    z = left @ w1 + right @ w2 if kind == "dense" else tf.concat([left * w1, right * w2], 1)
    loss = cross_entropy(label, dense(tf.tanh(z), z.shape[1], 3, "top"))
    train = tf.train.GradientDescentOptimizer(rate).minimize(loss)
    with tf.Session() as session:
        session.run(tf.global_variables_initializer())
        losses = [session.run([loss, train])[0] for _ in range(steps)]
        return session.run({v.op.name: v for v in tf.trainable_variables()}), losses


def weights(folder: Path) -> dict[str, np.ndarray]:
    """Of both parties; the shared ones put together, as neither can."""
    leader, follower = load(folder / "leader.npz"), load(folder / "follower.npz")
    shared = (leader.pop("hetero/share") + follower.pop("hetero/share")) * 2.0**-16
    return {**leader, **follower, "hetero/w2": shared}


@pytest.mark.parametrize("kind", list(LAYERS))
def test_training_is_that_of_one_process(folder: Path, kind: str) -> None:
    results = run_both(folder, *scripts(kind), end=SAVE)
    expected, losses = joint(kind)
    got = weights(folder)
    print({name: np.abs(got[name] - value).max() for name, value in expected.items()})
    start = start_value("hetero", expected["hetero/w2"].shape)
    moved = np.abs(expected["hetero/w2"] - start).max()
    assert moved > 0.05
    for name, value in expected.items():
        # A step's noise: 2.4e-4 in Z, which moves weights by rate·2.4e-4 or so each; 20 steps of it.
        np.testing.assert_allclose(got[name], value, atol=20 * RATE * 2.4e-4, rtol=0, err_msg=name)
    assert "PrivacyWarning" in results["leader"].output  # of the initializer
    assert "the first batch" in results["leader"].output or "of that batch" in results["leader"].output
    assert "the leader has given it weights that it knows" in results["follower"].output
    assert results["leader"].output.count("mode=eval") == 1
    assert "were clipped" not in results["leader"].output
