"""The metrics inside a model: read when they are logged, afresh in every evaluation."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow.compat.v1 as tf
from sklearn.metrics import roc_auc_score

import efl
from efl import metrics
from efl.errors import DataError, ModelError


@pytest.fixture(autouse=True)
def _graph():
    with tf.Graph().as_default():
        yield


def one_step(metric, rows, hooks=()):
    """Trains one step of a model that has a metric of its rows; ``metric(features)`` makes it."""

    def input_fn(model, mode):
        batch = tf.data.make_one_shot_iterator(tf.data.Dataset.from_tensors(rows)).get_next()
        return efl.Sample(batch, {"x": [tf.feature_column.numeric_column("x")]})

    def loss_fn(model, sample):
        model.add_metric("ours", metric(sample.features))
        return tf.reduce_mean(tf.layers.dense(sample["x"], 1))

    model = efl.Model().input_fn(input_fn).loss_fn(loss_fn)
    model.optimizer_fn(efl.optimizer_fn.optimizer_setter(tf.train.GradientDescentOptimizer(0.5)))
    model.add_hooks(hooks)
    model.compile().fit(efl.procedure_fn.train())
    return model


def columns(x=(0.5, 0.6, 0.7), label=(0.0, 1.0, 1.0), weight=(1.0, 1.0, 1.0)):
    return {
        name: np.array(values, np.float32)[:, None] for name, values in (("x", x), ("y", label), ("weight", weight))
    }


def auc(features):
    return metrics.auc(features["y"], features["x"], features["weight"])


def gauc(features):
    return metrics.gauc(features["y"], features["x"], tf.zeros_like(features["y"], tf.int64), features["weight"])


@pytest.mark.parametrize(
    ("metric", "rows", "kind", "message", "logged"),
    [
        (
            auc,
            columns(x=(-3.5, 0.5, 4.25)),
            ModelError,
            "efl.metrics, auc: predictions must lie in [0, 1]: pass probabilities, such as tf.sigmoid(logits), not "
            "logits (the model, step 1 of train)",
            "predictions range from -3.5 to 4.25",
        ),
        (auc, columns(x=(0.5, np.nan, 0.5)), ModelError, "predictions must be numbers: lower", "range from nan to nan"),
        (gauc, columns(x=(2, np.inf, 3)), ModelError, "gauc: predictions must be finite", "range from 2 to inf"),
        (auc, columns(label=(0, 1, 2)), DataError, "auc: labels must be 0 or 1 (the", "labels begin with 0 1 2"),
        (gauc, columns(weight=(1, -8, 1)), DataError, "weights must be finite and not negative", "begin with 1 -8 1"),
    ],
)
@pytest.mark.parametrize("hooked", [False, True])  # TensorFlow words an error otherwise where a hook fetches something
def test_what_a_metric_refuses_is_said_in_words_and_shown_in_the_log(
    metric, rows, kind, message, logged, hooked, caplog
):
    class Fetches(tf.train.SessionRunHook):
        def before_run(self, run_context):
            return tf.train.SessionRunArgs(tf.train.get_global_step())

    with pytest.raises(kind) as caught:
        one_step(metric, rows, [Fetches()] if hooked else [])
    assert message in str(caught.value)
    (record,) = [r for r in caplog.records if r.levelname == "ERROR"]
    told = record.getMessage()
    assert told.startswith(f"the model, step 1 of train: efl.metrics, {metric.__name__}: ")
    assert logged in told.replace("[", "").replace("]", "")
    assert str(rows["x"][0, 0]) not in str(caught.value)  # its text is told to a peer


def test_a_metric_of_one_class_says_why_it_is_nan(caplog):
    model = one_step(auc, columns(label=(1, 1, 1)))
    assert np.isnan(model.history[-1]["ours"])
    assert "metric 'auc' is nan: all labels so far are 1" in caplog.text


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
