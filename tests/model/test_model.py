"""The model that trains alone: what a user writes, and what comes of it."""

import logging
import re
import sys
import traceback
from pathlib import Path
from subprocess import run

import numpy as np
import pytest

import efl

import tensorflow.compat.v1 as tf  # isort: skip
from efl._program import LOG_FIELDS
from efl.errors import ConfigError, ModelError, NonFiniteLoss

PROCEDURE = efl.procedure_fn


def weights_of(model):
    held = model.get_weights()
    return held["net/w/kernel"], held["net/w/bias"]


def test_training_equals_gradient_descent_by_numpy(toy):
    model = toy.model().compile()
    model.fit(PROCEDURE.train())
    for got, expected in zip(weights_of(model), toy.expected(steps=8), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert model.steps_trained == 8


def test_max_step_stops_and_a_second_fit_goes_on(toy):
    model = toy.model().compile()
    model.fit(PROCEDURE.train(max_step=3))
    assert model.steps_trained == 3
    model.fit(PROCEDURE.train(max_step=2))
    np.testing.assert_allclose(weights_of(model)[0], toy.expected(steps=5)[0], rtol=1e-5)


def test_functions_are_chainable_and_kept_by_task(toy):
    model = efl.Model()
    functions = [lambda m, mode: None, lambda m, s: None, lambda m, s: None, lambda m, t: {}]
    chained = (
        model.input_fn(functions[0], task="a")
        .loss_fn(functions[1], task="a")
        .eval_fn(functions[2], task="a")
        .optimizer_fn(functions[3], task="a")
    )
    assert chained is model
    assert model.input_fns == {"a": functions[0]}
    assert model.loss_fns == {"a": functions[1]}
    assert model.opt_fns == {"a": functions[3]}


def test_what_was_compiled_can_be_looked_at(toy):
    model = toy.model(evaluate=toy.batch()).compile()
    assert model.loss().shape.rank == 0
    assert model.losses == {None: model.loss()}
    assert model.train_ops == {None: model.train_op()}
    assert model.eval_op() is not model.train_op()
    assert model.input(efl.MODE.TRAIN) is model.inputs[efl.TaskScope(efl.MODE.TRAIN, None)]
    assert list(model.metrics(efl.MODE.EVAL)) == ["mse"]
    assert model.metrics(efl.MODE.TRAIN) == {}
    ((optimizer, (variables, scope)),) = model.opt_to_vars().items()
    assert isinstance(optimizer, tf.train.GradientDescentOptimizer)
    assert {v.op.name for v in variables} == {"net/w/kernel", "net/w/bias"}
    assert scope is None


def test_extra_data(toy):
    model = efl.Model()
    model.add_extra_data("k", 3)
    assert model.get_extra_data("k") == 3
    assert model.extra_data == {"k": 3}
    with pytest.raises(ModelError, match="no extra data under 'other'; there is: 'k'"):
        model.get_extra_data("other")


def test_training_flag_is_true_in_training_only(toy):
    model = toy.model(evaluate=toy.batch())
    seen = {}
    train_loss, evaluate = toy.loss, model._eval_fns[None]

    def loss_fn(m, sample):
        m.add_metric("flag", tf.cast(m.training_flag, tf.float32))
        return train_loss(m, sample)

    def eval_fn(m, sample):
        m.add_metric("flag", tf.cast(m.training_flag, tf.float32))
        return evaluate(m, sample)

    model.loss_fn(loss_fn).eval_fn(eval_fn).compile()
    model.fit(PROCEDURE.train_and_evaluate(train_step=2, eval_step=2, max_iter=1), log_step=1)
    for row in model.history:
        seen.setdefault(row["mode"], set()).add(row["flag"])
    assert seen == {"train": {1.0}, "eval": {0.0}}


def test_global_step_counts_training_steps(toy):
    model = toy.model(evaluate=toy.batch()).compile()
    model.fit(PROCEDURE.train_and_evaluate(train_step=3, eval_step=1, max_iter=2))
    assert model.session.run(model.global_step) == 6


def test_pair_metrics_are_read_after_their_update(toy):
    # Fetched together, value and update race: 0.0 and 2.0 were seen in place of 1.0 and 2.0.
    def loss_fn(m, sample):
        counter = tf.get_local_variable("counter", [], initializer=tf.zeros_initializer())
        m.add_metric("count", (tf.identity(counter), tf.assign_add(counter, 1.0)))
        return toy.loss(m, sample)

    model = toy.model(train=toy.batch(epochs=20)).loss_fn(loss_fn).compile()
    model.fit(PROCEDURE.train(max_step=60), log_step=1)
    assert [row["count"] for row in model.history] == list(range(1, 61))


def test_update_of_a_pair_runs_in_every_step_not_only_when_logged(toy):
    def loss_fn(m, sample):
        counter = tf.get_local_variable("counter", [], initializer=tf.zeros_initializer())
        m.add_metric("count", (tf.identity(counter), tf.assign_add(counter, 1.0)))
        return toy.loss(m, sample)

    model = toy.model().loss_fn(loss_fn).compile()
    model.fit(PROCEDURE.train(max_step=7), log_step=5)
    assert [row["count"] for row in model.history] == [5, 7]


def test_a_value_that_depends_on_the_batch_is_taken_from_the_step(toy):
    # Reading it between steps would take a batch of its own.
    def loss_fn(m, sample):
        largest = tf.reduce_max(sample["label"])
        m.add_metric("largest", (largest, tf.no_op()))
        return toy.loss(m, sample)

    model = toy.model(train=toy.batch(epochs=1)).loss_fn(loss_fn).compile()
    model.fit(PROCEDURE.train(), log_step=1)
    expected = [toy.y[i : i + 10].max() for i in range(0, 40, 10)]
    np.testing.assert_allclose([row["largest"] for row in model.history], expected)


def test_evaluation_metrics_start_afresh(toy):
    model = toy.model(evaluate=toy.batch(rows=20)).compile()
    model.fit(PROCEDURE.train_and_evaluate(train_step=2, max_iter=3))
    rows = [row for row in model.history if row["mode"] == "eval"]
    assert [row["batches"] for row in rows] == [2, 2, 2]
    for row, steps in zip(rows, (2, 4, 6), strict=True):
        w, b = toy.expected(steps)
        np.testing.assert_allclose(row["mse"], np.mean((toy.x[:20] @ w + b - toy.y[:20]) ** 2), rtol=1e-4)


def test_train_metrics_accumulate_over_the_run(toy):
    def loss_fn(m, sample):
        m.add_metric("rows", tf.metrics.mean(tf.ones([4])))
        total = tf.get_local_variable("total", [], initializer=tf.zeros_initializer())
        m.add_metric("total", (tf.identity(total), tf.assign_add(total, 1.0)))
        return toy.loss(m, sample)

    model = toy.model(evaluate=toy.batch()).loss_fn(loss_fn).compile()
    model.fit(PROCEDURE.train_and_evaluate(train_step=2, eval_step=1, max_iter=3))
    assert [row["total"] for row in model.history if row["mode"] == "train"] == [2, 4, 6]


def test_metric_variables_initializer_resets_all(toy):
    def loss_fn(m, sample):
        loss = toy.loss(m, sample)
        m.add_metric("mean", tf.metrics.mean(loss))
        return loss

    model = toy.model(evaluate=toy.batch()).loss_fn(loss_fn).compile()
    model.fit(PROCEDURE.train_and_evaluate(train_step=1, eval_step=1, max_iter=1))
    values = [model.metrics(efl.MODE.EVAL)["mse"][0], model.metrics(efl.MODE.TRAIN)["mean"][0]]
    weights = model.get_weights()
    assert min(model.session.run(values)) > 0
    model.session.run(model.metric_variables_initializer)
    assert model.metric_variables_initializer is model.metric_variables_initializer  # and the graph does not grow
    assert model.session.run(values) == [0, 0]
    for name, value in model.get_weights().items():
        np.testing.assert_array_equal(value, weights[name])
    assert model.session.run(model.global_step) == 1


@pytest.mark.parametrize("kind", ["tensor", "pair", "list", "none"])
def test_eval_fn_may_return(toy, kind):
    def eval_fn(m, sample):
        pair = tf.metrics.mean_squared_error(sample["label"], toy.net(sample))
        return {"tensor": pair[1], "pair": pair, "list": [pair, tf.reduce_max(sample["x"])], "none": None}[kind]

    model = toy.model(evaluate=toy.batch()).eval_fn(eval_fn).compile()
    model.fit(PROCEDURE.eval())
    (row,) = model.history
    expected = np.mean(toy.y**2)
    if kind == "list":
        np.testing.assert_allclose(row["eval_0"], expected, rtol=1e-5)
        assert "eval_1" in row
    elif kind == "none":
        assert set(row) == {"role", "mode", "task", "step", "batches", "loss", "steps_per_second"}
    else:
        np.testing.assert_allclose(row["eval"], expected, rtol=1e-5)


def test_what_eval_fn_returns_is_not_reported_twice(toy):
    def eval_fn(m, sample):
        accuracy = tf.metrics.mean_squared_error(sample["label"], toy.net(sample))
        m.add_metric("error", accuracy, efl.MODE.EVAL)
        return accuracy[1]

    model = toy.model(evaluate=toy.batch()).eval_fn(eval_fn).compile()
    assert list(model.metrics(efl.MODE.EVAL)) == ["error"]


class Recorder(tf.train.SessionRunHook):
    def __init__(self, fetch=None):
        self.fetch, self.values, self.calls = fetch, [], []

    def begin(self):
        self.calls.append("begin")

    def after_create_session(self, session, coord):
        self.calls.append("created")

    def before_run(self, run_context):
        return tf.train.SessionRunArgs(self.fetch) if self.fetch is not None else None

    def after_run(self, run_context, run_values):
        self.values.append(run_values.results)

    def end(self, session):
        self.calls.append("end")


def test_hooks_run_in_their_mode_only(toy):
    train, evaluate, inside = Recorder(), Recorder(), {mode: Recorder() for mode in efl.MODE}
    batches = {efl.MODE.TRAIN: toy.batch(epochs=9), efl.MODE.EVAL: toy.batch()}

    def input_fn(m, mode):
        m.add_hooks([inside[mode]])  # no mode given: the scope it is called in
        return toy.sample(batches[mode])

    model = toy.model(evaluate=toy.batch()).input_fn(input_fn)
    model.add_hooks([train])
    model.add_hooks([evaluate], mode=efl.MODE.EVAL)
    model.compile()
    model.fit(PROCEDURE.train_and_evaluate(train_step=3, eval_step=2, max_iter=2))
    assert len(train.values) == len(inside[efl.MODE.TRAIN].values) == 6
    assert len(evaluate.values) == len(inside[efl.MODE.EVAL].values) == 4
    assert train.calls == ["begin", "created", "end"]


def test_a_hook_may_fetch_and_feed(toy):
    model = toy.model()
    batch_mean = {}

    def loss_fn(m, sample):
        batch_mean["tensor"] = tf.reduce_mean(sample["x"])
        return toy.loss(m, sample)

    model.loss_fn(loss_fn).compile()
    recorder = Recorder(batch_mean["tensor"])
    model.add_hooks([recorder])
    model.fit(PROCEDURE.train(max_step=2))
    np.testing.assert_allclose(recorder.values, [toy.x[:10].mean(), toy.x[10:20].mean()], rtol=1e-5)


def test_tensorflows_own_hooks_work_and_may_stop_the_run(toy):
    model = toy.model(train=toy.batch(epochs=None)).compile()
    model.add_hooks([tf.train.StopAtStepHook(num_steps=4), tf.train.NanTensorHook(model.loss())])
    model.fit(PROCEDURE.train())
    assert model.steps_trained == 4


def test_a_training_step_never_moves_the_evaluation_reader(toy):
    reads = tf.get_local_variable("reads", [], tf.int64, initializer=tf.zeros_initializer())

    def counting(batch):
        with tf.control_dependencies([tf.assign_add(reads, 1)]):
            return [tf.identity(part) for part in batch]

    model = toy.model(evaluate=counting(toy.batch())).compile()
    model.fit(PROCEDURE.train_and_evaluate(train_step=3, eval_step=2, max_iter=2))
    assert model.session.run(reads) == 4


@pytest.mark.parametrize(("reduce", "factor"), [("mean", 1.0), ("sum", 10.0), (lambda v: 3 * tf.reduce_mean(v), 3.0)])
def test_reduce_makes_a_scalar_of_a_loss_vector(toy, reduce, factor):
    def loss_fn(m, sample):
        return tf.reshape(tf.square(sample["label"] - toy.net(sample)), [-1])

    model = toy.model(rate=0.01).loss_fn(loss_fn).compile(opt_config={"REDUCE": reduce})
    model.fit(PROCEDURE.train(max_step=3))
    np.testing.assert_allclose(weights_of(model)[0], toy.expected(3, rate=0.01 * factor)[0], rtol=1e-4)


def test_set_weights_before_fit_and_seed(toy):
    model = toy.model(seed=3).compile()
    model.set_weights({"net/w/kernel": np.full((3, 1), 2.0, np.float32)})
    model.fit(PROCEDURE.train(max_step=1))
    assert np.all(weights_of(model)[0] > 1)
    model.set_weights({"net/w/bias": np.array([5.0], np.float32)})
    assert weights_of(model)[1] == 5.0
    with pytest.raises(ModelError, match="no variable 'other'"):
        model.set_weights({"other": np.zeros(1)})
    with pytest.raises(ModelError, match=r"net/w/bias has shape \(1,\), got \(2,\)"):
        model.set_weights({"net/w/bias": np.zeros(2)})


def random_run(toy, seed):
    tf.reset_default_graph()
    model = toy.model(train=toy.batch(epochs=1), seed=seed)

    def loss_fn(m, sample):
        hidden = tf.layers.dropout(tf.layers.dense(sample["x"], 4), 0.5, training=m.training_flag)
        return tf.losses.mean_squared_error(sample["label"], tf.layers.dense(hidden, 1))

    model.loss_fn(loss_fn).compile()
    model.fit(PROCEDURE.train())
    return model.get_weights()["dense/kernel"]


def test_one_seed_makes_a_run_reproducible(toy):
    first, again, other = random_run(toy, 5), random_run(toy, 5), random_run(toy, 6)
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3


def test_added_ops_run_in_every_step(toy):
    trained = tf.get_local_variable("trained", [], initializer=tf.zeros_initializer())
    evaluated = tf.get_local_variable("evaluated", [], initializer=tf.zeros_initializer())
    later = tf.get_local_variable("later", [], initializer=tf.zeros_initializer())
    model = toy.model(evaluate=toy.batch())
    model.add_train_op(tf.assign_add(trained, 1))
    model.add_eval_op(tf.assign_add(evaluated, 1).op)
    model.compile()
    before = model.train_op()
    model.add_train_op(tf.assign_add(later, 1))
    assert model.train_op() is not before
    model.fit(PROCEDURE.train_and_evaluate(train_step=3, eval_step=2, max_iter=1))
    assert model.session.run([trained, evaluated, later]) == [3, 2, 3]


def test_moving_averages_of_batch_normalisation_are_updated(toy):
    def loss_fn(m, sample):
        normed = tf.layers.batch_normalization(sample["x"], training=m.training_flag, name="norm")
        return tf.losses.mean_squared_error(sample["label"], tf.layers.dense(normed, 1))

    model = toy.model().loss_fn(loss_fn).compile()
    model.fit(PROCEDURE.train(max_step=2))
    means = next(v for v in tf.global_variables() if "moving_mean" in v.name)
    assert np.abs(model.session.run(means)).max() > 0


def test_summaries_hold_the_logged_values(toy, tmp_path):
    model = toy.model(evaluate=toy.batch()).compile()
    model.fit(
        PROCEDURE.train_and_evaluate(train_step=2, eval_step=1, max_iter=2), log_step=1, log_dir=str(tmp_path / "logs")
    )
    found = {}
    for mode in ("train", "eval"):
        (file,) = (tmp_path / "logs" / "local" / mode).iterdir()
        for event in tf.train.summary_iterator(str(file)):
            for value in event.summary.value:
                found.setdefault((mode, value.tag), []).append((event.step, value.simple_value))
    logged = [(row["step"], row["loss"]) for row in model.history if row["mode"] == "train"]
    np.testing.assert_allclose(found["train", "loss"], logged, rtol=1e-6)
    np.testing.assert_allclose(
        found["eval", "mse"], [(row["step"], row["mse"]) for row in model.history if row["mode"] == "eval"], rtol=1e-6
    )


def test_a_model_without_a_peer_says_nothing_of_waiting(toy, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("efl"), "propagate", True)
    caplog.set_level(logging.INFO, "efl")
    model = toy.model().compile()
    model.fit(PROCEDURE.train(max_step=2), log_step=1, log_dir=str(tmp_path))
    lines = [line for line in caplog.messages if " step=" in line]
    assert len(lines) == 2
    (file,) = (tmp_path / "local" / "train").iterdir()
    drawn = {value.tag for event in tf.train.summary_iterator(str(file)) for value in event.summary.value}
    assert drawn == {"loss", "steps_per_second"}
    assert not [told for told in (*lines, *model.history) if "wait_ms" in told]


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"opt_config": {"REDUSE": "mean"}},
            "unknown keys REDUSE; known are REDUCE, BACKEND_MODE, BATCH_SIZE, NUM_EXAMPLES, DEFER_NOISE",
        ),
        ({"opt_config": {"REDUCE": "max"}}, "REDUCE='max': expected 'mean', 'sum' or a callable"),
        ({"opt_config": {"BACKEND_MODE": "x"}}, "BACKEND_MODE='x': expected 'noise' or 'unnoise'"),
        ({"opt_config": {"REDUCE": ["mean"]}}, r"REDUCE=\['mean'\]: expected 'mean', 'sum' or a callable"),
        ({"opt_config": {"BACKEND_MODE": {}}}, "BACKEND_MODE={}: expected 'noise' or 'unnoise'"),
        ({"opt_config": []}, "opt_config is a list"),
        ({"sync_optimizer_config": {}}, "sync_optimizer_config: several workers per party do not exist yet"),
        ({"session_config": {}}, "session_config is a dict"),
    ],
)
def test_compile_refuses(toy, arguments, message):
    with pytest.raises(ConfigError, match=message):
        toy.model().compile(**arguments)


def test_a_loss_fn_that_returns_several_tensors_is_refused(toy):
    def loss_fn(model, sample):
        loss = toy.loss(model, sample)
        return [loss, loss]

    with pytest.raises(ModelError, match="loss_fn of the model returned a list of 2: expected one tensor"):
        toy.model().loss_fn(loss_fn).compile()


@pytest.mark.parametrize("source", ["flag", "EFL_WORKER_NUM", "TF_CONFIG"])
def test_several_workers_are_refused_rather_than_ignored(monkeypatch, source):
    if source == "flag":
        monkeypatch.setattr("sys.argv", ["script.py", "--worker_num=2"])
    else:
        cluster = '{"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": 0}}'
        monkeypatch.setenv(source, "2" if source.startswith("EFL") else cluster)
    message = r"worker_num=2 \(.*\): several workers per party do not exist yet; leave it at 1"
    for make in (efl.Model, lambda: efl.FederalModel(federal_role="leader")):
        with pytest.raises(ConfigError, match=message):
            make()


def test_a_saver_hook_saves_or_says_that_efl_saves_by_itself(toy, tmp_path):
    model = toy.model().compile()
    with pytest.raises(ModelError, match=r"CheckpointSaverHook without a saver.*fit\(checkpoint_dir=..., save_check"):
        model.add_hooks([tf.train.CheckpointSaverHook(str(tmp_path), save_steps=2)])
    model.add_hooks([tf.train.CheckpointSaverHook(str(tmp_path), save_steps=2, saver=tf.train.Saver())])
    model.fit(PROCEDURE.train(max_step=4))
    assert tf.train.latest_checkpoint(str(tmp_path)).endswith("model.ckpt-4")


def frames(error):
    return [(Path(frame.filename).name, frame.name) for frame in traceback.extract_tb(error.__traceback__)]


def test_an_error_of_the_users_graph_shows_no_frames_of_ours(toy):
    model = toy.model()
    lengths = tf.placeholder_with_default([3], [None])
    model.loss_fn(lambda m, s: toy.loss(m, s) + tf.reduce_sum(toy.net(s) * tf.ones(lengths)[:, None])).compile()
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"Incompatible shapes: \[10,1\] vs. \[3,1\]") as caught:
        model.fit(PROCEDURE.train())
    this = "test_an_error_of_the_users_graph_shows_no_frames_of_ours"
    assert frames(caught.value) == [("test_model.py", this), ("model.py", "fit")]


def test_an_error_of_the_users_functions_shows_their_frames(toy):
    class Breaks(tf.train.SessionRunHook):
        def before_run(self, context):
            context.session.run(tf.no_op())
            self.deeper()

        def deeper(self):
            raise KeyError("mine")

    model = toy.model().compile()
    model.add_hooks([Breaks()])
    with pytest.raises(KeyError, match="mine") as caught:
        model.fit(PROCEDURE.train())
    assert frames(caught.value)[1:] == [
        ("model.py", "fit"),
        ("test_model.py", "before_run"),
        ("test_model.py", "deeper"),
    ]
    broken = efl.Model().input_fn(lambda m, mode: tf.constant("a") + 1).loss_fn(toy.loss)
    with pytest.raises((TypeError, ValueError)) as caught:
        broken.compile()
    assert frames(caught.value)[1:3] == [("model.py", "compile"), ("test_model.py", "<lambda>")]
    assert len(frames(caught.value)) > 3  # what the user's function called, TensorFlow's own code, stays


def test_missing_functions_are_named(toy):
    with pytest.raises(ModelError, match="no functions yet"):
        efl.Model().compile()
    model = toy.model()
    del model._opt_fns[None]
    with pytest.raises(ModelError, match="the model has a loss_fn and trainable variables but no optimizer_fn"):
        model.compile()
    tf.reset_default_graph()
    model = toy.model().input_fn(lambda m, mode: toy.sample(toy.batch()), task="ctr").loss_fn(toy.loss, task="ctr")
    with pytest.raises(ModelError, match="task 'ctr' has a loss_fn and trainable variables but no optimizer_fn"):
        model.compile()  # the optimizer is that of the task without a name
    tf.reset_default_graph()
    with pytest.raises(ModelError, match="task 'ctr' has no input_fn"):
        efl.Model().loss_fn(toy.loss, task="ctr").compile()
    with pytest.raises(ModelError, match="task 'ctr' has neither a loss_fn nor an eval_fn"):
        efl.Model().input_fn(lambda m, mode: None, task="ctr").compile()
    with pytest.raises(ModelError, match="compile\\(\\) comes before fit"):
        efl.Model().fit(PROCEDURE.train())


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (
            lambda toy, s: "loss",
            "loss_fn of the model returned something that is no loss: expected a tensor|string tensor",
        ),
        (lambda toy, s: tf.constant(1), "returned a int32 tensor: expected floating point"),
        (lambda toy, s: tf.reduce_sum(s["x"]), "has nothing to train: the objective depends on none of"),
        (lambda toy, s: None, "returned no loss of its own"),
    ],
)
def test_losses_that_cannot_be_trained(toy, returned, message):
    def loss_fn(m, sample):
        toy.net(sample)
        return returned(toy, sample)

    with pytest.raises(ModelError, match=message):
        toy.model().loss_fn(loss_fn).compile()


def test_input_fn_must_return_a_sample(toy):
    with pytest.raises(ModelError, match=r"input_fn of the model for TRAIN returned a dict: expected an efl.Sample"):
        toy.model().input_fn(lambda m, mode: {}).compile()
    tf.reset_default_graph()
    batch = toy.batch()
    model = toy.model(evaluate=toy.batch())
    model.input_fn(lambda m, mode: toy.sample(batch) if mode == efl.MODE.TRAIN else None)
    with pytest.raises(ModelError, match="for EVAL returned a NoneType.*has an eval_fn, so there must be input"):
        model.compile()


def test_input_fn_is_called_for_evaluation_only_where_there_is_an_eval_fn(toy):
    asked = []
    batch = toy.batch()

    def input_fn(m, mode):
        asked.append(mode)
        return toy.sample(batch)

    toy.model().input_fn(input_fn).compile()
    assert asked == [efl.MODE.TRAIN]


def test_functions_with_the_wrong_arguments(toy):
    with pytest.raises(ModelError, match=r"input_fn of the model for TRAIN is called with \(model, mode\)"):
        toy.model().input_fn(lambda mode: None).compile()


EAGER = """
import numpy as np
import tensorflow
made = {MADE}
import efl
import tensorflow.compat.v1 as tf
def input_fn(m, mode):
    return efl.Sample({FEATURES}, {"x": [tf.feature_column.numeric_column("x", 4)]})
def loss_fn(m, s):
    return {LOSS}
model = efl.FederalModel("follower", peer_addr="localhost:1", connect_timeout=0.1)
model.input_fn(input_fn).loss_fn(loss_fn).compile()
"""
ITERATOR = "iter(tensorflow.data.Dataset.from_tensor_slices({'x': np.zeros((20, 4), np.float32)}).batch(5))"
X = "{'x': tf.zeros([5, 4])}"


@pytest.mark.parametrize(
    ("made", "features", "loss", "message"),
    [
        (ITERATOR, "{'x': next(made)['x']}", "0", r"input_fn .*eager.py:8\): got an eager tensor"),
        ("tensorflow.ones([])", X, "s['x'] * made", r"loss_fn .*eager.py:10\): got an eager tensor"),
        (ITERATOR, X, "m.send('f', made)", r"send\('f'\): expected a tensor, got OwnedIterator \(use the tensors"),
    ],
    ids=["batch", "loss", "sent"],
)
def test_what_was_made_before_efl_switched_to_graphs_is_refused_and_the_line_named(
    tmp_path, made, features, loss, message
):
    code = EAGER.replace("{MADE}", made).replace("{FEATURES}", features).replace("{LOSS}", loss)
    (tmp_path / "eager.py").write_text(code)
    result = run([sys.executable, str(tmp_path / "eager.py")], capture_output=True, text=True, timeout=100)
    assert result.returncode == 1
    assert re.search(rf"^efl.errors.ModelError: .*{message}", result.stderr, re.MULTILINE), result.stderr


def test_forgotten_reuse_is_refused_and_named(toy):
    def eval_fn(m, sample):
        return tf.reduce_mean(tf.layers.dense(sample["x"], 1, name="fresh"))

    with pytest.raises(ModelError, match="no loss trains: fresh/kernel, fresh/bias"):
        toy.model(evaluate=toy.batch()).eval_fn(eval_fn).compile()


def test_every_field_of_a_log_line_is_kept_from_metrics(toy):
    model = toy.model(evaluate=toy.batch())
    model.compile()
    model.fit(PROCEDURE.train_and_evaluate(train_step=2, eval_step=2, max_iter=1), log_step=1)
    metrics = {name for mode in (efl.MODE.TRAIN, efl.MODE.EVAL) for name in model.metrics(mode)}
    assert {key for row in model.history for key in row} - metrics <= LOG_FIELDS


def test_a_metric_that_is_none_and_a_name_that_is_taken(toy):
    model = efl.Model()
    with pytest.raises(ModelError, match="got 3 items"):
        model.add_metric("m", (1, 2, 3))
    with pytest.raises(ModelError, match="metric 'm': expected numbers, got text"):
        model.add_metric("m", "accuracy")
    for name in ("loss", "step", "mode", "steps_per_second"):
        with pytest.raises(ModelError, match=f"metric '{name}': the log line has a field of that name"):
            model.add_metric(name, tf.constant(1.0))
    model.add_metric("m", tf.constant(1.0))
    with pytest.raises(ModelError, match="metric 'm' exists already in train"):
        model.add_metric("m", tf.constant(1.0))
    with pytest.raises(ModelError, match=r"is not a tf.train.SessionRunHook"):
        model.add_hooks(["hook"])


def test_a_metric_after_compile_is_read_and_one_that_wants_updates_is_refused(toy):
    model = toy.model().compile()
    model.add_metric("later", 2.0 * model.loss())
    with pytest.raises(ModelError, match=r"add_metric\('pair'\) after compile\(\): the steps are built, so its update"):
        model.add_metric("pair", tf.metrics.mean(model.loss()))
    model.fit(PROCEDURE.train(max_step=2), log_step=1)
    for row in model.history:
        assert row["later"] == pytest.approx(2.0 * row["loss"])


def test_a_loss_that_is_not_finite_names_the_step(toy):
    toy.y[25] = np.nan
    model = toy.model().compile()
    with pytest.raises(NonFiniteLoss, match=r"the loss of the model is nan at step 3 of train"):
        model.fit(PROCEDURE.train())


def test_errors_of_the_users_graph_come_through(toy):
    def loss_fn(m, sample):
        with tf.control_dependencies([tf.debugging.assert_less(sample["x"], -10.0, message="users own check")]):
            return toy.loss(m, sample)

    model = toy.model().loss_fn(loss_fn).compile()
    with pytest.raises(tf.errors.InvalidArgumentError, match="users own check"):
        model.fit(PROCEDURE.train())


def test_reference_variables_are_refused_with_the_line_to_write(toy):
    tf.disable_resource_variables()
    try:
        with pytest.raises(ModelError, match=r"write tf.enable_resource_variables\(\) after it"):
            toy.model().compile()
    finally:
        tf.enable_resource_variables()


def test_fit_checks_its_arguments(toy):
    model = toy.model().compile()
    with pytest.raises(ModelError, match="is not a procedure"):
        model.fit("train")
    with pytest.raises(ConfigError, match="log_step=0"):
        model.fit(PROCEDURE.train(), log_step=0)
    with pytest.raises(ModelError, match="has no eval_fn, so nothing to eval"):
        model.fit(PROCEDURE.eval())
