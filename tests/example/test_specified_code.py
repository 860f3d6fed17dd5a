"""The programs of the API's specification run as written; only imports and what they leave out are added."""

from __future__ import annotations

import re

import pytest

from tests.example.conftest import EXAMPLE, load
from tests.parties import run_parties

IMPORTS = """
import tensorflow.compat.v1 as tf
import efl
"""

ONE_MACHINE = """
def input_fn(model, mode):
  columns = {
    "deep": [tf.feature_column.numeric_column('dense', 2)],
    "label": [tf.feature_column.numeric_column('label', 1)],
    "emb": [
        tf.feature_column.embedding_column(
            tf.feature_column.categorical_column_with_identity("sparse1", 1000),
            dimension=8),
        tf.feature_column.embedding_column(
            tf.feature_column.categorical_column_with_identity("sparse2", 1000),
            dimension=8)]}
  if mode == efl.MODE.TRAIN:
    features = {
      "dense": tf.constant([[1,2]], dtype=tf.float32),
      "label": tf.constant([[1.0]], dtype=tf.float32),
      "sparse1": tf.SparseTensor(indices=[[0,0], [0,2]],
                                 values=[1,2], dense_shape=[1,4]),
      "sparse2": tf.SparseTensor(indices=[[0,1], [0,2]],
                                 values=[3,4], dense_shape=[1,4])}
  else:
    features = {
      "dense": tf.constant([[1,2]], dtype=tf.float32),
      "label": tf.constant([[1.0]], dtype=tf.float32),
      "sparse1": tf.SparseTensor(indices=[[0,0], [0,2]],
                                 values=[1,2], dense_shape=[1,4]),
      "sparse2": tf.SparseTensor(indices=[[0,1], [0,2]],
                                 values=[3,4], dense_shape=[1,4])}
  with tf.variable_scope("input_fn", reuse=tf.AUTO_REUSE):
    return efl.Sample(features, columns);

def model_fn(model, sample, is_training):
  inputs = tf.concat([sample['deep'], sample['emb']], axis=1)
  fc1 = tf.layers.dense(inputs, 128)
  fc2 = tf.layers.dense(fc1, 64)
  fc3 = tf.layers.dense(fc2, 32)
  y = tf.layers.dense(fc3, 1)

  if is_training:
    loss = tf.losses.sigmoid_cross_entropy(sample['label'], y)
    return loss
  else:
    prediction = tf.nn.sigmoid(y)
    auc = efl.metrics.auc(sample['label'], prediction)
    model.add_metric("auc", auc, efl.MODE.EVAL)
    return auc

def loss_fn(model, sample):
  with tf.variable_scope('deepctr'):
    return model_fn(model, sample, True)

def eval_fn(model, sample):
  with tf.variable_scope('deepctr', reuse=tf.AUTO_REUSE):
    return model_fn(model, sample, False)

CNN = efl.Model()
CNN.input_fn(input_fn)
CNN.loss_fn(loss_fn)
CNN.eval_fn(eval_fn)
CNN.optimizer_fn(
    efl.optimizer_fn.optimizer_setter(
        tf.train.GradientDescentOptimizer(0.01)))
CNN.compile()
CNN.fit(efl.procedure_fn.train_and_evaluate(train_step=100,
                                            eval_step=10,
                                            max_iter=5),
        log_step=10,
        project_name="train_and_eval")
"""

MNIST_INPUT = """
def input_fn(model, mode):
  if mode == efl.MODE.TRAIN:
    dataio = efl.data.FederalDataIO("./{role}_train", 256,
                                    model.communicator,
                                    model.federal_role,
                                    0, 1, data_mode='local')
    dataio.fixedlen_feature('sample_id', 1, dtype=tf.int64)
    dataio.fixedlen_feature('feature', 14*28, dtype=tf.float32)
    dataio.fixedlen_feature('label', 1, dtype=tf.float32)
    features = dataio.read()
    model.add_hooks([dataio.get_hook()])
    columns = {{
      "label": [tf.feature_column.numeric_column('label', 1)],
      "emb": [tf.feature_column.numeric_column('feature', 28*14)]}}
    return efl.FederalSample(features, columns, model.federal_role,
                             model.communicator,
                             sample_id_name='sample_id')
"""

MNIST_FOLLOWER = """
def model_fn(model, sample):
  input = sample['emb']
  label = tf.cast(sample['label'], tf.int32)
  label = tf.reshape(label, [-1])
  label = tf.one_hot(label, 10)

  fc1 = tf.layers.dense(input, 128,
    kernel_initializer=tf.truncated_normal_initializer(
      stddev=0.001, dtype=tf.float32))
  model.send('fc1', fc1, True)
  y = tf.layers.dense(
    fc1, 10, kernel_initializer=tf.truncated_normal_initializer(
      stddev=0.001, dtype=tf.float32))

  pred = tf.argmax(y, axis=-1)
  _, accuracy = tf.metrics.accuracy(sample['label'], pred)
  model.add_metric('accuracy', accuracy)

  loss = tf.losses.softmax_cross_entropy(label, y)
  return loss
"""

MNIST_LEADER = """
def model_fn(model, sample):
  input = sample['emb']
  label = tf.cast(sample['label'], tf.int32)
  label = tf.reshape(label, [-1])
  label = tf.one_hot(label, 10)

  fc1 = tf.layers.dense(input, 128,
    kernel_initializer=tf.truncated_normal_initializer(
      stddev=0.001, dtype=tf.float32))
  f_fc1 = model.recv('fc1', dtype=tf.float32, require_grad=True)
  f_fc1 = tf.reshape(f_fc1, [-1, 128])
  fc1 = tf.concat([fc1, f_fc1], axis=-1)
  y = tf.layers.dense(
    fc1, 10, kernel_initializer=tf.truncated_normal_initializer(
      stddev=0.001, dtype=tf.float32))

  pred = tf.argmax(y, axis=-1)
  _, accuracy = tf.metrics.accuracy(sample['label'], pred)
  model.add_metric('accuracy', accuracy)

  loss = tf.losses.softmax_cross_entropy(label, y)
  return loss
"""

MNIST_FIT = """
CTR = efl.FederalModel()
CTR.input_fn(input_fn)
CTR.loss_fn(model_fn)
CTR.optimizer_fn(
    efl.optimizer_fn.optimizer_setter(
        tf.train.GradientDescentOptimizer(0.001)))
CTR.compile()
CTR.fit(efl.procedure_fn.train(),
        log_step=1,
        project_name="train")
"""


def _values(output: str, mode: str, name: str) -> list[float]:
    lines = re.findall(rf"^.*\bmode={mode}\b.*$", output, re.MULTILINE)
    return [float(re.search(rf"\b{name}=(\S+)", line).group(1)) for line in lines]


def test_one_machine(tmp_path):
    result = run_parties({"": IMPORTS + ONE_MACHINE}, cwd=tmp_path)["script"]
    assert result.returncode == 0, result.output
    losses, areas = _values(result.output, "train", "loss"), _values(result.output, "eval", "auc")
    assert len(losses) == 50 and losses[-1] < 0.1 * losses[0]
    # Its single row is of one class: there is no area, and the log says so.
    assert len(areas) == 5 and str(areas[0]) == "nan"


@pytest.mark.parametrize("first", ["leader", "follower"])
def test_mnist_with_digits(tmp_path, first):
    load(EXAMPLE / "mnist" / "generate_data.py").main(["--out", str(tmp_path)])
    models = {"leader": MNIST_LEADER, "follower": MNIST_FOLLOWER}
    order = [first, *(role for role in models if role != first)]
    scripts = {role: IMPORTS + MNIST_INPUT.format(role=role) + models[role] + MNIST_FIT for role in order}
    results = run_parties(scripts, cwd=tmp_path)
    for role, result in results.items():
        assert result.returncode == 0, result.output
        losses, accuracies = (_values(result.output, "train", name) for name in ("loss", "accuracy"))
        assert len(losses) == 6, role  # one epoch of 1438 images in batches of 256
        assert losses[-1] < losses[0]
        assert 0 < accuracies[-1] < 1
