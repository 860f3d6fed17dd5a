"""The encrypted example learns, with keys that its own script made; the programs of the API's specification run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.example.conftest import EXAMPLE
from tests.parties import run_parties

FOLDER = EXAMPLE / "entropy_mnist"


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    command = [sys.executable, str(FOLDER / "generate_paillier_keypair.py"), "--bits", "2048"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=60)
    return folder


@pytest.mark.parametrize("layer", ["dense", pytest.param("concat", marks=pytest.mark.full)])
def test_the_parties_learn_from_what_the_leader_does_not_see(keys: Path, layer: str) -> None:
    scripts = {"leader": FOLDER / "leader.py", "follower": FOLDER / "follower.py"}
    flags = [f"--layer={layer}", "--batch_size=32", "--dim=8", "--units=6", "--max_step=40", "--eval_batches=3"]
    results = run_parties(scripts, args=flags, cwd=keys, timeout=240)
    told = f"{results['leader'].output}\n{results['follower'].output}"
    assert all(result.returncode == 0 for result in results.values()), told
    found = re.search(r"leader: accuracy (\S+) on test images", results["leader"].output)
    assert found and float(found.group(1)) > 0.4, told


def test_without_keys_it_is_said_who_makes_them(tmp_path: Path) -> None:
    scripts = {"leader": FOLDER / "leader.py", "follower": FOLDER / "follower.py"}
    results = run_parties(scripts, args=["--batch_size=64"], cwd=tmp_path, timeout=60)
    for result in results.values():
        assert result.returncode == 1 and "public_key.json: the public key cannot be read" in result.output


READ = """
import numpy as np
import tensorflow.compat.v1 as tf
import efl

def input_fn(model, mode):
  rng = np.random.RandomState(5)
  halves = {"leader": rng.rand(64, 6), "follower": rng.rand(64, 6)}
  data = tf.data.Dataset.from_tensor_slices({
      "emb": halves[model.federal_role].astype(np.float32),
      "label": rng.randint(0, 10, [64, 1]).astype(np.float32)}).repeat().batch(16)
  features = tf.data.make_one_shot_iterator(data).get_next()
  columns = {name: [tf.feature_column.numeric_column(name, width)] for name, width in (("emb", 6), ("label", 1))}
  return efl.Sample(features, columns)
"""

# As specified, apart from the width of 128, which is 12 here.
LEADER = """
def model_fn(model, sample):
  input = sample['emb']
  fc1 = tf.layers.dense(input, 12,
    kernel_initializer=tf.truncated_normal_initializer(
      stddev=0.001, dtype=tf.float32))
  passive_layer = efl.privacy.EncryptPassiveLayer(
      model.communicator, 12, 12, "public_key.json")
  fc1 = passive_layer(fc1)
  fc1 = tf.reshape(fc1, [-1, 24])
  y = tf.layers.dense(
    fc1, 10, kernel_initializer=tf.truncated_normal_initializer(
      stddev=0.001, dtype=tf.float32))
  pred = tf.argmax(y, axis=-1)
  _, accuracy = tf.metrics.accuracy(sample['label'], pred)
  model.add_metric('accuracy', accuracy)
  label = tf.cast(sample['label'], tf.int32)
  label = tf.reshape(label, [-1])
  label = tf.one_hot(label, 10)
  loss = tf.losses.softmax_cross_entropy(label, y)
  return loss
"""
FOLLOWER = """
def model_fn(model, sample):
  input = sample['emb']
  fc1 = tf.layers.dense(input, 12,
    kernel_initializer=tf.truncated_normal_initializer(
      stddev=0.001, dtype=tf.float32))
  active_layer = efl.privacy.EncryptActiveLayer(
      model.communicator, 12, "public_key.json", "private_key.json", update_noise=False)
  fc1 = active_layer(fc1)
  y = tf.layers.dense(
    fc1, 10, kernel_initializer=tf.truncated_normal_initializer(
      stddev=0.001, dtype=tf.float32))
  pred = tf.argmax(y, axis=-1)
  _, accuracy = tf.metrics.accuracy(sample['label'], pred)
  model.add_metric('accuracy', accuracy)
  label = tf.cast(sample['label'], tf.int32)
  label = tf.reshape(label, [-1])
  label = tf.one_hot(label, 10)
  loss = tf.losses.softmax_cross_entropy(label, y)
  return loss
"""
REST = """
def loss_fn(model, sample):
  with tf.variable_scope("net"):
    return model_fn(model, sample)

def eval_fn(model, sample):
  with tf.variable_scope("net", reuse=True):
    return model_fn(model, sample)

CNN = efl.FederalModel()
CNN.input_fn(input_fn)
CNN.loss_fn(loss_fn)
CNN.eval_fn(eval_fn)
CNN.optimizer_fn(efl.optimizer_fn.optimizer_setter(tf.train.GradientDescentOptimizer(0.001)))
CNN.compile()
CNN.fit(efl.procedure_fn.train_and_evaluate(train_step=4, eval_step=2, max_iter=2), log_step=2,
        project_name="entropy_mnist")
"""


def test_the_specified_programs_run_as_written(keys: Path) -> None:
    results = run_parties({"leader": READ + LEADER + REST, "follower": READ + FOLLOWER + REST}, cwd=keys, timeout=120)
    for result in results.values():
        assert result.returncode == 0, result.output
        assert result.output.count("mode=eval") == 2
        assert len(re.findall(r"mode=train .*loss=2\.3", result.output)) == 4, result.output
    assert "update_noise=False: changes nothing here" in results["follower"].output
