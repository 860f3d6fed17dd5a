import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import pytest

import efl

import tensorflow.compat.v1 as tf  # isort: skip


@pytest.fixture(autouse=True)
def _fresh_graph(monkeypatch):
    monkeypatch.setattr("sys.argv", ["script.py"])
    tf.reset_default_graph()
    yield
    tf.reset_default_graph()


class Toy:
    """A small regression problem: 40 rows of 3 columns, y = x @ (1, -2, 3)."""

    def __init__(self):
        rng = np.random.RandomState(7)
        self.x = rng.uniform(-1, 1, (40, 3)).astype(np.float32)
        self.y = self.x @ np.array([[1.0], [-2.0], [3.0]], np.float32)

    def batch(self, size=10, epochs=1, rows=None):
        """An initializable iterator's next batch; nobody but efl runs its initializer."""
        data = tf.data.Dataset.from_tensor_slices((self.x[:rows], self.y[:rows])).repeat(epochs).batch(size)
        return tf.data.make_initializable_iterator(data).get_next()

    def sample(self, batch):
        columns = {
            "x": [tf.feature_column.numeric_column("x", 3)],
            "label": [tf.feature_column.numeric_column("y", 1)],
        }
        return efl.Sample({"x": batch[0], "y": batch[1]}, columns)

    def net(self, sample):
        with tf.variable_scope("net", reuse=tf.AUTO_REUSE):
            return tf.layers.dense(sample["x"], 1, name="w", kernel_initializer=tf.zeros_initializer())

    def loss(self, model, sample):
        return tf.losses.mean_squared_error(sample["label"], self.net(sample))

    def model(self, train=None, evaluate=None, rate=0.1, **kwargs):
        """A model that is not compiled yet; ``evaluate`` rows make it have an eval_fn."""
        batches = {efl.MODE.TRAIN: train if train is not None else self.batch(epochs=2)}
        if evaluate is not None:
            batches[efl.MODE.EVAL] = evaluate
        model = efl.Model(**kwargs)
        model.input_fn(lambda m, mode: self.sample(batches[mode])).loss_fn(self.loss)
        if evaluate is not None:

            def eval_fn(m, sample):
                m.add_metric("mse", tf.metrics.mean_squared_error(sample["label"], self.net(sample)))

            model.eval_fn(eval_fn)
        model.optimizer_fn(efl.optimizer_fn.optimizer_setter(tf.train.GradientDescentOptimizer(rate)))
        return model

    def expected(self, steps, size=10, rate=0.1):
        """Weights after some steps of plain gradient descent, by numpy."""
        w, b = np.zeros((3, 1)), np.zeros(1)
        for step in range(steps):
            at = step * size % len(self.x)
            x, y = self.x[at : at + size].astype(float), self.y[at : at + size].astype(float)
            error = 2 * (x @ w + b - y) / len(x)
            w, b = w - rate * x.T @ error, b - rate * error.sum(0)
        return w, b


@pytest.fixture
def toy():
    return Toy()
