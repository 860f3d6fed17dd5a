"""The metrics inside a model: read when they are logged, afresh in every evaluation."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow.compat.v1 as tf
from sklearn.metrics import roc_auc_score

import efl
from efl import metrics


@pytest.fixture(autouse=True)
def _graph():
    with tf.Graph().as_default():
        yield


def test_evaluation_of_a_model_equals_scikit_learn(monkeypatch):
    rng = np.random.default_rng(0)
    rows = {
        "x": rng.normal(size=(400, 3)).astype(np.float32),
        "user": rng.integers(0, 10, 400) + (1 << 40),
        "label": rng.integers(0, 2, (400, 1)).astype(np.float32),
    }
    readings = []
    area = metrics._grouped_area
    monkeypatch.setattr(metrics, "_grouped_area", lambda *columns: readings.append(len(columns[0])) or area(*columns))

    def input_fn(model, mode):
        batches = tf.data.Dataset.from_tensor_slices(rows).batch(50)
        columns = {name: [tf.feature_column.numeric_column(name, rows[name].shape[1])] for name in ("x", "label")}
        return efl.Sample(tf.data.make_one_shot_iterator(batches).get_next(), columns)

    def loss_fn(model, sample):
        with tf.variable_scope("net"):
            return tf.losses.sigmoid_cross_entropy(sample["label"], tf.layers.dense(sample["x"], 1))

    def eval_fn(model, sample):
        with tf.variable_scope("net", reuse=True):
            prediction = tf.nn.sigmoid(tf.layers.dense(sample["x"], 1))
        model.add_metric("gauc", metrics.gauc(sample["label"], prediction, sample.features["user"]))
        auc = metrics.auc(sample["label"], prediction)
        model.add_metric("auc", auc)
        return auc

    model = efl.Model().input_fn(input_fn).loss_fn(loss_fn).eval_fn(eval_fn)
    model.optimizer_fn(efl.optimizer_fn.optimizer_setter(tf.train.GradientDescentOptimizer(0.5)))
    model.compile()
    model.fit(efl.procedure_fn.train_and_evaluate(train_step=4, max_iter=2))

    evaluations = [entry for entry in model.history if entry["mode"] == "eval"]
    assert len(evaluations) == 2
    weights = model.get_weights()
    scores = 1 / (1 + np.exp(-(rows["x"] @ weights["net/dense/kernel"] + weights["net/dense/bias"])[:, 0]))
    labels, users = rows["label"][:, 0], rows["user"]
    assert evaluations[1]["auc"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-3)
    areas = [roc_auc_score(labels[users == user], scores[users == user]) for user in np.unique(users)]
    expected = np.average(areas, weights=np.unique(users, return_counts=True)[1])
    assert evaluations[1]["gauc"] == pytest.approx(expected, abs=1e-6)
    assert evaluations[0]["gauc"] != evaluations[1]["gauc"]
    # Sorted once an evaluation, not once a batch, and over its own 400 impressions each time.
    assert readings == [400, 400]
