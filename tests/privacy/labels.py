"""Data of which one column is a label, and models whose loss is made of one batch."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import tensorflow.compat.v1 as tf

import efl
from efl.privacy import LabelDP
from tests.data.records import example

ROWS = 40
X = np.random.default_rng(0).normal(size=(ROWS, 3)).astype(np.float32)
Y, IDS = np.random.default_rng(1).integers(0, 2, ROWS), np.arange(ROWS)
WIDE = np.concatenate([X, Y[:, np.newaxis]], 1).astype(np.float32)
NUMBER = tf.FixedLenFeature([], tf.int64)
FIELDS = {"x": tf.FixedLenFeature([3], tf.float32), "y": NUMBER, "id": NUMBER}
Loss = Callable[[dict[str, tf.Tensor]], tf.Tensor]


def compiled(data: Callable[[], tf.data.Dataset], loss: Loss) -> None:
    """Compiles a model whose loss is a function of what one batch has."""
    tf.reset_default_graph()
    batch = tf.data.make_initializable_iterator(data().repeat()).get_next()
    anything = {"x": tf.zeros([8, 3])}
    model = efl.Model(seed=1)
    model.input_fn(lambda m, mode: efl.Sample(anything, {"x": [tf.feature_column.numeric_column("x", 3)]}))
    model.loss_fn(lambda m, sample: loss(batch))
    model.optimizer_fn(efl.optimizer_fn.optimizer_setter(tf.train.GradientDescentOptimizer(0.1))).compile()


def slices(**parts: np.ndarray) -> tf.data.Dataset:
    return tf.data.Dataset.from_tensor_slices(parts)


def told(ids: tf.Tensor, label: tf.Tensor) -> tf.Tensor:
    return LabelDP(0.1, 2)(ids, tf.cast(label, tf.int32))


def entropy(label: tf.Tensor, columns: tf.Tensor) -> tf.Tensor:
    logits = tf.layers.dense(columns, 1, name="d")[:, 0]
    return tf.nn.sigmoid_cross_entropy_with_logits(labels=tf.cast(label, tf.float32), logits=logits)


def rows_alone() -> tf.data.Dataset:
    return slices(x=X, y=Y, id=IDS)


def rows() -> tf.data.Dataset:
    return rows_alone().batch(8)


def wide() -> tf.data.Dataset:
    return slices(w=WIDE, id=IDS).batch(8)


def records() -> tf.data.Dataset:
    held = [example({"x": X[i], "y": int(Y[i]), "id": i}) for i in range(ROWS)]
    return slices(s=np.array(held, object)).batch(8)


def lines() -> tf.data.Dataset:
    return slices(s=np.array([f"{x[0]},{y},{i}" for x, y, i in zip(X, Y, IDS)])).batch(8)


def known() -> tf.data.Dataset:
    return tf.data.Dataset.zip((lines(), slices(id=IDS).batch(8))).map(lambda line, ids: line | ids)
