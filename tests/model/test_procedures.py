"""Procedures on one machine: what runs in which order, where it ends, and how a restarted run goes on."""

import json
import logging
import os
import shutil
import signal
import sys
from subprocess import PIPE, Popen

import numpy as np
import pytest

import efl

import tensorflow.compat.v1 as tf  # isort: skip
from efl._checkpoint import CheckpointStore
from efl.errors import CheckpointError, ConfigError, ModelError
from tests.data.records import example, write

P = efl.procedure_fn


def order(model):
    """What each log line is of: mode and number of training steps done, task first where there is one."""
    return [tuple(row[key] for key in ("task", "mode", "step") if row.get(key) is not None) for row in model.history]


def evaluated(toy, **train):
    return toy.model(train=toy.batch(**{"epochs": 2, **train}), evaluate=toy.batch()).compile()


# ---- train, eval


def test_train_to_the_end_of_the_data_and_no_further(toy):
    model = evaluated(toy)
    model.fit(P.train(), log_step=1)
    assert order(model) == [("train", step) for step in range(1, 9)]


def test_eval_changes_nothing(toy):
    model = evaluated(toy)
    model.fit(P.train(max_step=2))
    before = model.get_weights()
    model.fit(P.eval(), log_step=100)
    ((mode, step),) = order(model)
    assert (mode, step) == ("eval", 2)
    assert model.history[0]["batches"] == 4
    for name, value in before.items():
        assert (model.get_weights()[name] == value).all()
    w, b = toy.expected(steps=2)
    np.testing.assert_allclose(model.history[0]["mse"], np.mean((toy.x @ w + b - toy.y) ** 2), rtol=1e-5)


def test_eval_of_some_batches(toy):
    model = evaluated(toy)
    model.fit(P.eval(max_step=3))
    assert model.history[-1]["batches"] == 3


# ---- train_and_evaluate


def test_train_and_evaluate_by_turns(toy):
    model = evaluated(toy)
    model.fit(P.train_and_evaluate(train_step=3, eval_step=2, max_iter=2), log_step=1)
    assert order(model) == [
        *(("train", s) for s in (1, 2, 3)), ("eval", 3), ("eval", 3),
        *(("train", s) for s in (4, 5, 6)), ("eval", 6), ("eval", 6),
    ]  # fmt: skip


def test_the_end_of_the_training_data_ends_the_run_after_a_last_evaluation(toy):
    model = evaluated(toy)  # 8 training batches
    model.fit(P.train_and_evaluate(train_step=5, eval_step=1, max_iter=9))
    assert [entry for entry in order(model) if entry[0] == "eval"] == [("eval", 5), ("eval", 8)]


def test_training_data_that_ends_just_before_an_iteration(toy):
    model = evaluated(toy)
    model.fit(P.train_and_evaluate(train_step=4, eval_step=1, max_iter=9))
    assert [entry for entry in order(model) if entry[0] == "eval"] == [("eval", 4), ("eval", 8)]


def test_without_steps_an_iteration_is_all_of_the_data(toy):
    model = evaluated(toy)
    model.fit(P.train_and_evaluate())
    assert model.steps_trained == 8
    assert [row["batches"] for row in model.history if row["mode"] == "eval"] == [4]


def test_an_evaluation_reader_at_its_end_starts_over(toy):
    model = evaluated(toy, epochs=-1)
    model.fit(P.train_and_evaluate(train_step=1, eval_step=3, max_iter=4))
    # 4 batches: the second evaluation finds one, the third begins anew.
    assert [row["batches"] for row in model.history if row["mode"] == "eval"] == [3, 1, 3, 1]


def test_no_evaluation_is_empty_because_the_one_before_took_the_last_batch(toy):
    model = evaluated(toy, epochs=-1)
    model.fit(P.train_and_evaluate(train_step=1, eval_step=2, max_iter=5))
    assert [row["batches"] for row in model.history if row["mode"] == "eval"] == [2] * 5


def test_an_evaluation_without_any_data_ends(toy):
    model = toy.model(evaluate=toy.batch(rows=0)).compile()
    model.fit(P.train_and_evaluate(train_step=4, eval_step=2, max_iter=2))
    assert model.steps_trained == 8
    assert not [row for row in model.history if row["mode"] == "eval"]


def test_train_and_eval_is_the_same(toy):
    assert P.train_and_eval is P.train_and_evaluate


def test_intervals_end_iterations_though_the_data_does_not_end(toy):
    model = toy.model(train=toy.batch(epochs=-1), evaluate=toy.batch(epochs=-1)).compile()
    model.fit(P.train_and_evaluate(train_interval=0.2, eval_interval=0.2, max_iter=2), log_step=10**9)
    evaluations = [row for row in model.history if row["mode"] == "eval"]
    assert len(evaluations) == 2
    assert evaluations[0]["step"] < evaluations[1]["step"] == model.steps_trained
    assert all(row["batches"] >= 1 for row in evaluations)


def test_steps_end_an_iteration_before_its_interval_does(toy):
    model = toy.model(train=toy.batch(epochs=-1), evaluate=toy.batch()).compile()
    model.fit(P.train_and_evaluate(train_step=2, train_interval=600.0, eval_step=1, eval_interval=600, max_iter=2))
    assert model.steps_trained == 4


# ---- cotrain


def two_tasks(toy, evaluated=("a",)):
    model = efl.Model(seed=5)
    for task in ("a", "b"):
        batches = {efl.MODE.TRAIN: toy.batch(epochs=-1), efl.MODE.EVAL: toy.batch()}
        model.input_fn(lambda m, mode, held=batches: toy.sample(held[mode]), task=task)

        def loss(m, sample, task=task):
            with tf.variable_scope(task, reuse=tf.AUTO_REUSE):
                return toy.loss(m, sample)

        def evaluate(m, sample, task=task):
            with tf.variable_scope(task, reuse=tf.AUTO_REUSE):
                return tf.metrics.mean_squared_error(sample["label"], toy.net(sample))

        model.loss_fn(loss, task=task)
        if task in evaluated:
            model.eval_fn(evaluate, task=task)
        scope = efl.optimizer_fn.scope_optimizer({task: tf.train.GradientDescentOptimizer(0.1)})
        model.optimizer_fn(scope, task=task)
    return model.compile()


def drawn(model):
    return ["".join(task) for task in [row["task"] for row in model.history if row["mode"] == "train"]]


def test_cotrain_draws_tasks_by_their_ratio_and_trains_and_evaluates_them(toy):
    model = two_tasks(toy)
    model.fit(P.cotrain(train_step=2, eval_step=1, max_iter=60, task_select_ratio={"a": 0.8, "b": 0.2}), log_step=1)
    trained = {task: drawn(model).count(task) for task in ("a", "b")}
    assert sum(trained.values()) == 120
    # 12 of 60 are expected for b; fewer than 3 or more than 24 have a chance of about 1 in 5000.
    assert 3 <= trained["b"] / 2 <= 24
    assert sum(row["mode"] == "eval" for row in model.history) == trained["a"] / 2
    assert {row["task"] for row in model.history if row["mode"] == "eval"} == {"a"}  # b has no eval_fn
    for task in ("a", "b"):
        got = model.get_weights()[f"{task}/net/w/kernel"]
        np.testing.assert_allclose(got, toy.expected(steps=trained[task])[0], rtol=1e-4)


def test_a_task_of_ratio_one_is_always_drawn_and_of_zero_never(toy):
    model = two_tasks(toy)
    model.fit(P.cotrain(train_step=1, eval_step=1, max_iter=8, task_select_ratio={"a": 0, "b": 1}), log_step=1)
    assert drawn(model) == ["b"] * 8


def test_without_ratios_all_tasks_are_drawn_alike_and_one_seed_draws_the_same(toy):
    runs = []
    for _ in range(2):
        tf.reset_default_graph()
        model = two_tasks(toy)
        model.fit(P.cotrain(train_step=1, max_iter=30, eval_step=1), log_step=1)
        runs.append(drawn(model))
    assert runs[0] == runs[1]
    assert 5 <= runs[0].count("a") <= 25


def test_several_tasks_and_none_named(toy):
    model = two_tasks(toy)
    with pytest.raises(ModelError, match=r"several tasks \(a, b\): pass task=…, or use procedure_fn.cotrain"):
        model.fit(P.train(max_step=1))
    model.fit(P.train(max_step=2, task="b"))
    assert model.get_weights()["b/net/w/kernel"].any()
    assert not model.get_weights()["a/net/w/kernel"].any()
    with pytest.raises(ModelError, match="task 'c' has no loss_fn, so nothing to train; tasks that have one: 'a', 'b'"):
        model.fit(P.train(max_step=1, task="c"))
    with pytest.raises(ModelError, match="task_select_ratio names unknown tasks c; the model has"):
        model.fit(P.cotrain(1, 1, 1, {"a": 0.5, "c": 0.5}))


def test_an_evaluation_without_an_eval_fn(toy):
    with pytest.raises(ModelError, match="task None has no eval_fn, so nothing to eval; tasks that have one: none"):
        toy.model().compile().fit(P.train_and_evaluate(train_step=1, eval_step=1, max_iter=1))


# ---- refusals


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "3"])
@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (P.train, "max_step"), (P.eval, "max_step"),
        (P.train_and_evaluate, "train_step"), (P.train_and_evaluate, "eval_step"), (P.train_and_evaluate, "max_iter"),
        (P.cotrain, "train_step"), (P.cotrain, "eval_step"), (P.cotrain, "max_iter"),
    ],
)  # fmt: skip
def test_counts_that_cannot_be(make, argument, value):
    with pytest.raises(ConfigError, match=f"{argument}={value!r}: expected a positive whole number, or None"):
        make(**{argument: value})


@pytest.mark.parametrize("value", [0, -0.1, float("nan"), True, "3"])
@pytest.mark.parametrize("argument", ["train_interval", "eval_interval"])
def test_intervals_that_cannot_be(argument, value):
    with pytest.raises(ConfigError, match=f"{argument}={value!r}: expected a positive number of seconds, or None"):
        P.train_and_evaluate(**{argument: value})


@pytest.mark.parametrize(
    ("ratios", "message"),
    [
        ({"a": 0.5, "b": 0.4}, "expected probabilities that sum to 1, they sum to 0.9"),
        ({"a": 1.5, "b": -0.5}, "expected probabilities that sum to 1$"),
        ({"a": float("nan"), "b": 1.0}, "expected probabilities that sum to 1$"),
        ({"a": "1"}, "expected probabilities that sum to 1$"),
        ({}, r"task_select_ratio=\{\}: expected a dict of task -> probability"),
        ([0.5, 0.5], "expected a dict of task -> probability"),
    ],
)
def test_ratios_that_cannot_be(ratios, message):
    with pytest.raises(ConfigError, match=message):
        P.cotrain(1, 1, 1, ratios)


# ---- checkpoints: a run that is restarted


class PowerCut(Exception):
    pass


class Dies(tf.train.SessionRunHook):
    def __init__(self, model, step):
        self.model, self.step = model, step

    def after_run(self, run_context, run_values):
        if self.model.steps_trained == self.step - 1:  # counted after the hooks
            raise PowerCut


@pytest.fixture
def records(toy, tmp_path):
    """The toy's rows in files of 7 records: batches of 4 begin and end in the middle of them."""
    for kind, rows in (("train", 40), ("test", 12)):
        for part in range(0, rows, 7):
            wanted = range(part, min(part + 7, rows))
            serialised = (example({"x": toy.x[i].tolist(), "y": toy.y[i].tolist()}) for i in wanted)
            write(tmp_path / kind / f"part-{part:03d}", serialised)
    return tmp_path


def from_files(toy, records, dies_at=None, momentum=True):
    """A model on DataIO readers: every state that matters (position, shuffling, momentum) must survive."""
    tf.reset_default_graph()

    def input_fn(m, mode):
        kind = "train" if mode is efl.MODE.TRAIN else "test"
        reader = efl.data.DataIO(str(records), 4, 0, 1, num_epochs=3 if kind == "train" else 1, name=kind)
        reader.add_file_node(kind)
        reader.fixedlen_feature("x", 3)
        reader.fixedlen_feature("y", 1)
        features = reader.read()
        return toy.sample((features["x"], features["y"]))

    def eval_fn(m, sample):
        m.add_metric("mse", tf.metrics.mean_squared_error(sample["label"], toy.net(sample)))

    model = efl.Model(seed=3)
    model.input_fn(input_fn).loss_fn(toy.loss).eval_fn(eval_fn)
    model.optimizer_fn(efl.optimizer_fn.optimizer_setter(tf.train.MomentumOptimizer(0.05, 0.9)))
    if dies_at is not None:
        model.add_hooks([Dies(model, dies_at)])
    return model.compile()


PROCEDURE = {"train_step": 7, "eval_step": 2, "max_iter": 3}


@pytest.mark.parametrize("dies_at", [3, 10, 14, 17])
def test_a_restarted_run_ends_with_the_weights_of_an_undisturbed_one(toy, records, dies_at, caplog):
    whole = from_files(toy, records)
    whole.fit(P.train_and_evaluate(**PROCEDURE), log_step=1)
    expected, told = whole.get_weights(), whole.history
    options = {"checkpoint_dir": str(records / "ckpt"), "save_checkpoint_steps": 2, "log_step": 1}
    with pytest.raises(PowerCut):
        from_files(toy, records, dies_at).fit(P.train_and_evaluate(**PROCEDURE), **options)
    model = from_files(toy, records)
    with caplog.at_level(logging.INFO, logger="efl"):
        model.fit(P.train_and_evaluate(**PROCEDURE), **options)
    saved = max(step for step in range(dies_at) if step % 2 == 0 or step % 7 == 0)
    assert f"from the checkpoint of step {saved}" in caplog.text
    assert model.steps_trained == 21
    assert set(model.get_weights()) == set(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(model.get_weights()[name], value, err_msg=name)
    # Every step and every evaluation after the checkpoint is as it was in the undisturbed run.
    values = [(row["mode"], row["step"], row.get("loss"), row.get("mse")) for row in told]
    again = [(row["mode"], row["step"], row.get("loss"), row.get("mse")) for row in model.history]
    assert again == values[-len(again) :]
    assert len(again) < len(values)


def test_a_run_that_had_ended_does_nothing_more(toy, records):
    options = {"checkpoint_dir": str(records / "ckpt"), "log_step": 1}
    first = from_files(toy, records)
    first.fit(P.train_and_evaluate(**PROCEDURE), **options)
    again = from_files(toy, records)
    again.fit(P.train_and_evaluate(**PROCEDURE), **options)
    assert again.steps_trained == 21
    assert not [row for row in again.history if row["mode"] == "train"]
    for name, value in first.get_weights().items():
        np.testing.assert_array_equal(again.get_weights()[name], value)


def folders(path):
    return sorted(folder for folder in (path / "local" / "0").iterdir() if folder.name.startswith("step-"))


def steps(path):
    """Training steps of each checkpoint: one before the first step, at the steps asked for, and at the end."""
    return [int(folder.name.split("-")[1]) for folder in folders(path)]


def train_saving(toy, path, steps, **options):
    tf.reset_default_graph()
    model = toy.model(train=toy.batch(epochs=-1)).compile()
    model.fit(P.train(max_step=steps), checkpoint_dir=str(path), save_checkpoint_steps=2, **options)
    return model


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "state", "other state"])
def test_a_damaged_checkpoint_is_skipped(toy, tmp_path, caplog, damage):
    train_saving(toy, tmp_path, 6)
    assert steps(tmp_path) == [0, 2, 4, 6, 6]
    shutil.rmtree(folders(tmp_path)[-1])
    newest = folders(tmp_path)[-1]
    data = next(newest.glob("model.data*"))
    if damage == "truncate":
        data.write_bytes(data.read_bytes()[:-1])
    elif damage == "flip":
        content = bytearray(data.read_bytes())
        content[0] ^= 1
        data.write_bytes(content)
    elif damage == "remove":
        data.unlink()
    elif damage == "state":
        (newest / "state.json").write_text("{")
    else:
        held = json.loads((newest / "state.json").read_text())
        held["state"]["exhausted"] = ["train"]  # as good as any other, but not what was written
        (newest / "state.json").write_text(json.dumps(held))
    with caplog.at_level(logging.INFO, logger="efl"):
        model = train_saving(toy, tmp_path, 7)
    assert caplog.text.count(f"{newest.name} is damaged or incomplete: skipped") == 1
    assert "from the checkpoint of step 4" in caplog.text
    assert model.steps_trained == 11  # another procedure than the one before: its seven steps come on top


def test_a_lock_ends_with_its_process_whatever_workers_it_has_forked(tmp_path):
    code = f"""
import os, signal, sys, time
from pathlib import Path
from efl._checkpoint import CheckpointStore
store = CheckpointStore(Path({str(tmp_path)!r}))
store.lock()
if os.fork() == 0:
    print("forked", flush=True)
    time.sleep(60)
    os._exit(0)
os.wait()
"""
    party = Popen([sys.executable, "-c", code], stdout=PIPE, text=True, start_new_session=True)
    try:
        assert party.stdout.readline() == "forked\n"
        with pytest.raises(CheckpointError, match=rf"in use by another process \(pid {party.pid}\)"):
            CheckpointStore(tmp_path).lock()
        party.kill()
        party.wait()
        store = CheckpointStore(tmp_path)
        store.lock()
        store.unlock()
    finally:
        os.killpg(party.pid, signal.SIGKILL)
        party.stdout.close()


def test_only_the_newest_are_kept(toy, tmp_path):
    train_saving(toy, tmp_path, 9, keep_checkpoints=2)
    assert steps(tmp_path) == [8, 9]


def test_the_graph_is_written_when_asked_for_and_only_then(toy, tmp_path):
    train_saving(toy, tmp_path / "without", 1)
    assert not list((tmp_path / "without").rglob("*.pbtxt")) + list((tmp_path / "without").rglob("*.meta"))
    train_saving(toy, tmp_path / "with", 1, save_graph=True)
    (file,) = (tmp_path / "with").rglob("*.pbtxt")
    assert "net/w/kernel" in file.read_text()


def test_a_checkpoint_of_another_model_is_refused(toy, tmp_path):
    train_saving(toy, tmp_path, 2)
    tf.reset_default_graph()

    def wider(m, sample):
        with tf.variable_scope("net", reuse=tf.AUTO_REUSE):
            return tf.reduce_mean(tf.square(tf.layers.dense(sample["x"], 2, name="w") - sample["label"]))

    model = toy.model().loss_fn(wider).compile()
    with pytest.raises(
        CheckpointError,
        match=r"step 2 in .*local/0 is of another model: net/w/kernel has shape \[3, 1\] in it and \[3, 2\]",
    ):
        model.fit(P.train(max_step=2), checkpoint_dir=str(tmp_path))
    tf.reset_default_graph()
    more = toy.model()
    more.loss_fn(lambda m, s: toy.loss(m, s) * tf.get_variable("more", [], initializer=tf.ones_initializer()))
    with pytest.raises(CheckpointError, match="is of another model: more is not in it"):
        more.compile().fit(P.train(max_step=2), checkpoint_dir=str(tmp_path))


def test_an_evaluation_needs_a_checkpoint_where_a_folder_is_named(toy, tmp_path):
    model = evaluated(toy)
    with pytest.raises(
        CheckpointError, match=r"eval\(\) evaluates a checkpoint, and .*local/0 holds none; train first"
    ):
        model.fit(P.eval(), checkpoint_dir=str(tmp_path))


def test_a_checkpoint_is_evaluated_in_a_fresh_graph(toy, tmp_path):
    train_saving(toy, tmp_path, 4)
    tf.reset_default_graph()
    model = evaluated(toy)
    model.fit(P.eval(), checkpoint_dir=str(tmp_path))
    w, b = toy.expected(steps=4)
    np.testing.assert_allclose(model.history[-1]["mse"], np.mean((toy.x @ w + b - toy.y) ** 2), rtol=1e-5)
    assert model.history[-1]["step"] == 4
    assert steps(tmp_path) == [0, 2, 4, 4]  # evaluating writes nothing
