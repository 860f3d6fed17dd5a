"""Handwritten digits between two processes, with encrypted layers and with plain ``send`` and ``recv``: one model.

The digits are scikit-learn's; where EFL_MNIST names a folder of MNIST's files, MNIST's.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from efl.paillier import PrivateKey
from tests.example.conftest import EXAMPLE
from tests.federation.harness import run_both
from tests.federation.problem import load, start_value
from tests.federation.test_encrypted import SAVE

STEPS = 20
COMMON = f"""
import argparse, sys
sys.path.append({str(EXAMPLE / "entropy_mnist")!r})
import common
DATA = {os.environ.get("EFL_MNIST")!r}
batch = common.Input(argparse.Namespace(data=DATA and __import__("pathlib").Path(DATA), batch_size=48), ROLE)

def start(shape, dtype=tf.float32, partition_info=None):
    return tf.constant(start_value("w", shape) + 0.5 * (len(shape) == 1))
def embedding(s):
    with tf.variable_scope(ROLE, reuse=tf.AUTO_REUSE):
        kernel = tf.get_variable("kernel", initializer=0.15 * start_value(ROLE, (392, 10)))
    return tf.tanh(s["half"] @ kernel)
def classified(s, z):
    logits = dense(tf.tanh(z), int(z.shape[1]), 10, "top")
    return tf.losses.sparse_softmax_cross_entropy(tf.reshape(tf.cast(s["label"], tf.int32), [-1]), logits)
"""
TRAIN = f"""
model = efl.FederalModel()
model.input_fn(batch).loss_fn(loss_fn).optimizer_fn(optimizer(0.5))
model.compile().fit(efl.procedure_fn.train(max_step={STEPS}))
"""
ENCRYPTED = {
    "dense": (
        "efl.privacy.EncryptPassiveDense(m.communicator, 10, 10, 'public_key.json', 6, 0.5, start)",
        "efl.privacy.EncryptActiveDense(m.communicator, 10, 'public_key.json', 'private_key.json', 6, 0.5)",
    ),
    "concat": (
        "efl.privacy.EncryptPassiveLayer(m.communicator, 10, 10, 'public_key.json', 0.5, start)",
        "efl.privacy.EncryptActiveLayer(m.communicator, 10, 'public_key.json', 'private_key.json', 0.5)",
    ),
}
# The layer's own formula, of what is sent as it is.
PLAIN = {"dense": "own @ w1 + there @ w2", "concat": "tf.concat([own * w1, there * w2], 1)"}
SHAPES = {"dense": (10, 6), "concat": (10,)}


def both(kind: str, encrypted: bool) -> tuple[str, str]:
    passive, active = ENCRYPTED[kind]
    if encrypted:
        leader = f"def loss_fn(m, s):\n    return classified(s, {passive}(embedding(s)))\n"
        follower = f"def loss_fn(m, s):\n    return {active}(embedding(s))\n"
    else:
        leader = f"""
def loss_fn(m, s):
    own, there = embedding(s), tf.reshape(m.recv("x", require_grad=True), [-1, 10])
    with tf.variable_scope("hetero"):
        w1, w2 = (tf.get_variable(name, initializer=start({SHAPES[kind]})) for name in ("w1", "w2"))
    return classified(s, {PLAIN[kind]})
"""
        follower = """
def loss_fn(m, s):
    x = embedding(s)
    m.send("x", x, require_grad=True)
    return x
"""
    return COMMON + leader + TRAIN, COMMON + follower + TRAIN


@pytest.mark.parametrize("kind", ["dense", pytest.param("concat", marks=pytest.mark.full)])
def test_an_encrypted_run_is_the_plain_one_to_fixed_point(tmp_path: Path, kind: str) -> None:
    folders = {name: tmp_path / name for name in ("encrypted", "plain")}
    for folder in folders.values():
        folder.mkdir()
    private = PrivateKey.generate(2048)
    private.save(folders["encrypted"] / "private_key.json")
    private.public.save(folders["encrypted"] / "public_key.json")
    held = {}
    for name, folder in folders.items():
        run_both(folder, *both(kind, name == "encrypted"), end=SAVE, timeout=300)
        held[name] = {role: load(folder / f"{role}.npz") for role in ("leader", "follower")}
        shutil.rmtree(folder)
    got, expected = ({**each["leader"], **each["follower"]} for each in (held["encrypted"], held["plain"]))
    shares = (each.pop("hetero/share") for each in held["encrypted"].values())
    got["hetero/w2"] = sum(shares) * 2.0**-16
    assert {"leader/kernel", "follower/kernel", "hetero/w1", "hetero/w2", "top/kernel", "top/bias"} <= set(expected)
    first = {"hetero/w2": start_value("w", SHAPES[kind]) + 0.5 * (kind == "concat")}
    first["follower/kernel"] = 0.15 * start_value("follower", (392, 10))
    for name, value in first.items():  # both were trained
        assert np.abs(expected[name] - value).max() > 0.02, name
    for name, value in expected.items():
        # Twenty steps of noise: of 2.4e-4 in each number of Z, of 1.2e-4 of the largest dY in dX, of 1.5e-5 in W.
        np.testing.assert_allclose(got[name], value, atol=1e-3, rtol=0, err_msg=name)
