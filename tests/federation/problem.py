"""A small problem whose columns two parties share, and what they train on it.

Imported by the parties' scripts and by the tests.

Every weight is initialised from a fixed array by name, so a federated run and a run in one process begin alike.
"""

import sys

import numpy as np

import efl

import tensorflow.compat.v1 as tf  # isort: skip

ROWS, BATCH = 96, 16
_rng = np.random.RandomState(11)
X = _rng.uniform(-1, 1, (ROWS, 8)).astype(np.float32)
LABEL = (X @ _rng.uniform(-1, 1, (8, 3))).argmax(1).astype(np.int64)
IDS = np.arange(100, 100 + ROWS, dtype=np.int64)
COLUMNS = {"leader": slice(0, 4), "follower": slice(4, 8), "whole": slice(0, 8)}


def start_value(name, shape):
    """The initial value of a variable, the same wherever it is made."""
    rng = np.random.RandomState(sum(map(ord, name)))
    return rng.uniform(-0.5, 0.5, shape).astype(np.float32)


def dense(x, width, units, name, activation=None):
    """A dense layer whose initial weights depend on its name only."""
    with tf.variable_scope(name, reuse=tf.AUTO_REUSE):
        kernel = tf.get_variable("kernel", initializer=start_value(name, (width, units)))
        bias = tf.get_variable("bias", initializer=np.zeros(units, np.float32))
    y = tf.matmul(x, kernel) + bias
    return y if activation is None else activation(y)


def batches(rows=ROWS, epochs=None, first=0):
    """(all columns, label, id) of the next batch; without end where epochs is None."""
    part = slice(first, first + rows)
    data = tf.data.Dataset.from_tensor_slices((X[part], LABEL[part], IDS[part])).repeat(epochs).batch(BATCH)
    return tf.data.make_one_shot_iterator(data).get_next()


def sample(model, batch, role):
    """What a party's input_fn returns for one of :func:`batches`."""
    x, label, ids = batch
    part = COLUMNS[role]
    columns = {
        "x": [tf.feature_column.numeric_column("x", part.stop - part.start)],
        "label": [tf.feature_column.numeric_column("label", 1)],
    }
    features = {"x": x[:, part], "label": label, "id": ids}
    return efl.FederalSample(features, columns, model.federal_role, model.communicator, sample_id_name="id")


def one_hot(label):
    return tf.one_hot(tf.reshape(tf.cast(label, tf.int32), [-1]), 3)


def cross_entropy(label, logits):
    return tf.losses.softmax_cross_entropy(one_hot(label), logits)


def optimizer(rate=0.5):
    return efl.optimizer_fn.optimizer_setter(tf.train.GradientDescentOptimizer(rate))


def save(model, file):
    np.savez(file, **{name.replace("/", "|"): value for name, value in model.get_weights().items()})


def load(file):
    with np.load(file) as held:
        return {name.replace("|", "/"): held[name] for name in held.files}


def own_argument(name, default=None):
    """A flag of the script's own, among efl's."""
    for argument in sys.argv[1:]:
        if argument.startswith(f"--{name}="):
            return argument.split("=", 1)[1]
    return default
