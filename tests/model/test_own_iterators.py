"""A user's own iterators after a restart: which go on where the checkpoint was made, and what is said of the others."""

import logging
import re

import numpy as np
import pytest

import efl

import tensorflow.compat.v1 as tf  # isort: skip
from efl.errors import CheckpointError

P = efl.procedure_fn
D = tf.data.Dataset
SAVE = 3


class PowerCut(RuntimeError):
    pass


class Watch(tf.train.SessionRunHook):
    """Writes down the rows of each step; dies after one of them."""

    def __init__(self, rows, seen, dies_after=None):
        self.rows, self.seen, self.dies_after = rows, seen, dies_after

    def before_run(self, context):
        return tf.train.SessionRunArgs(self.rows)

    def after_run(self, context, values):
        self.seen.append(np.ravel(values.results).astype(int).tolist())
        if self.dies_after == len(self.seen):
            raise PowerCut


def one_shot(data):
    return tf.data.make_one_shot_iterator(data)


def initializable(data):
    return tf.data.make_initializable_iterator(data)


def model_over(make, evaluate=None, seed=None, net=None, seen=None, dies_after=None, **watched):
    """A model of one weight over data sets of numbers, which ``make`` builds (an iterator) when they are read."""
    tf.reset_default_graph()
    seen = [] if seen is None else seen
    model = efl.Model(seed=seed)

    def input_fn(m, mode):
        made = (make if mode is efl.MODE.TRAIN else evaluate)()
        rows = made.get_next() if hasattr(made, "get_next") else made
        x = tf.reshape(tf.cast(rows, tf.float32), [-1, 1])
        m.add_hooks([Watch(x, seen, dies_after if mode is efl.MODE.TRAIN else None)], mode=mode)
        return efl.Sample({"x": x}, {"x": [tf.feature_column.numeric_column("x", 1)]})

    def loss(m, sample):
        with tf.variable_scope("net", reuse=tf.AUTO_REUSE):
            weight = tf.get_variable("weight", [1], initializer=tf.ones_initializer())
        x = sample["x"] / 100.0
        return tf.reduce_mean(tf.square((net(m, x) if net else x) * weight - 0.5))

    model.input_fn(input_fn).loss_fn(loss)
    if evaluate is not None:
        model.eval_fn(loss)
    model.optimizer_fn(efl.optimizer_fn.optimizer_setter(tf.train.AdamOptimizer(0.1)))
    return model.compile(), seen


def options(path):
    return {"checkpoint_dir": str(path), "save_checkpoint_steps": SAVE}


def warnings(caplog):
    return [r.getMessage() for r in caplog.records if r.name == "efl" and r.levelno == logging.WARNING]


def die_and_go_on(path, make, dies_after, steps=20, **more):
    """Batches and weight of an undisturbed run, and those of a run that died, from its last checkpoint on."""
    procedure = P.train(max_step=steps)
    whole, expected = model_over(make, **more)
    whole.fit(procedure, **options(path / "whole"))
    dying, before = model_over(make, dies_after=dies_after, **more)
    with pytest.raises(PowerCut):
        dying.fit(procedure, **options(path / "cut"))
    model, after = model_over(make, **more)
    model.fit(procedure, **options(path / "cut"))
    kept = (dies_after - 1) // SAVE * SAVE  # the step that dies is not counted any more
    assert len(after) == steps - kept
    return expected, before[:kept] + after, whole.get_weights(), model.get_weights()


def assert_undisturbed(expected, got, weights, got_weights):
    assert got == expected
    assert set(weights) == set(got_weights) == {"net/weight"}
    for name, value in weights.items():
        np.testing.assert_array_equal(got_weights[name], value)


NUMBERS = 40
PIPELINES = {
    "in order": lambda: D.range(NUMBERS).repeat().batch(4),
    "shuffled": lambda: D.range(NUMBERS).shuffle(15, seed=5).repeat().batch(3).prefetch(2),
    "shuffled over epochs": lambda: D.range(NUMBERS).repeat().shuffle(100, seed=5).batch(4),
    "the same order in each epoch": lambda: (
        D.range(NUMBERS).shuffle(15, seed=5, reshuffle_each_iteration=False).repeat().batch(3)
    ),
    "cached": lambda: D.range(NUMBERS).cache().shuffle(15, seed=5).repeat().batch(3),
    "mapped in parallel": lambda: (
        D.range(NUMBERS).shuffle(15, seed=5).repeat().map(lambda x: x + 1, num_parallel_calls=2).batch(3).prefetch(4)
    ),
    "interleaved": lambda: (
        D.range(8).shuffle(8, seed=5).interleave(lambda x: D.range(x * 5, x * 5 + 5), cycle_length=3).repeat().batch(4)
    ),
}


@pytest.mark.parametrize("dies_after", [2, 10, 17])
@pytest.mark.parametrize("pipeline", list(PIPELINES))
def test_batches_after_a_restart_are_those_of_the_undisturbed_run(tmp_path, caplog, pipeline, dies_after):
    def make():
        return initializable(PIPELINES[pipeline]())

    assert_undisturbed(*die_and_go_on(tmp_path, make, dies_after))
    assert not warnings(caplog)


def test_the_runs_own_seed_is_a_seed_of_a_shuffle(tmp_path, caplog):
    def make():
        return initializable(D.range(NUMBERS).shuffle(NUMBERS).repeat().batch(4))

    assert_undisturbed(*die_and_go_on(tmp_path, make, 5, steps=25, seed=3))
    assert "without a seed" not in caplog.text


def test_a_shuffle_without_a_seed_takes_each_row_once_and_later_epochs_are_told_to_differ(tmp_path, caplog):
    def make():
        return initializable(D.range(NUMBERS).shuffle(15).repeat().batch(4))

    _, got, *_ = die_and_go_on(tmp_path, make, 8, steps=20)
    for epoch in (got[:10], got[10:]):
        assert sorted(row for batch in epoch for row in batch) == list(range(NUMBERS))
    (told,) = set(warnings(caplog))
    assert re.match(r"local: shuffled without a seed: train: IteratorV2 \(ShuffleDataset\).*shuffle\(…, seed=…\)", told)


def test_data_that_ended_and_began_again_goes_on_too(tmp_path):
    def make():
        return initializable(D.range(12).batch(4))

    procedure = P.train_and_evaluate(train_step=4, eval_step=2, max_iter=3)
    runs = []
    for dies in (None, 7):
        path = tmp_path / str(dies)
        model, seen = model_over(lambda: initializable(D.range(NUMBERS).repeat().batch(4)), make, dies_after=dies)
        if dies:
            with pytest.raises(PowerCut):
                model.fit(procedure, **options(path))
            model, seen = model_over(lambda: initializable(D.range(NUMBERS).repeat().batch(4)), make)
        model.fit(procedure, **options(path))
        runs.append((seen, model.get_weights()["net/weight"]))
    (whole, weight), (after, again) = runs
    assert after == whole[-len(after) :]
    assert len(after) < len(whole)
    np.testing.assert_array_equal(again, weight)


def test_another_procedure_trains_on_and_evaluates_anew(tmp_path):
    def make():
        return initializable(D.range(NUMBERS).repeat().batch(4))

    def evaluation():
        return initializable(D.range(100, 140).batch(4))

    first, _ = model_over(make, evaluation)
    first.fit(P.train_and_evaluate(train_step=3, eval_step=2, max_iter=1), **options(tmp_path))
    model, seen = model_over(make, evaluation)
    model.fit(P.train_and_evaluate(train_step=1, eval_step=1, max_iter=1), **options(tmp_path))
    assert seen == [[12, 13, 14, 15], [100, 101, 102, 103]]


# ---- what does not survive


def generated():
    return initializable(D.from_generator(lambda: iter(range(1000)), output_signature=tf.TensorSpec([], tf.int64)))


def switched():
    data = D.range(NUMBERS).repeat().batch(4)
    made = tf.data.Iterator.from_structure(tf.int64, [None])
    made.make_initializer(data), made.make_initializer(data.skip(1))
    return made


def of_python(call):
    return lambda: initializable(D.range(NUMBERS).map(lambda x: call(lambda v: v, [x], tf.int64)).repeat().batch(4))


LOST = {
    "one-shot": (lambda: one_shot(D.range(NUMBERS).repeat().batch(4)), "OneShotIterator (a one-shot iterator, which "),
    "from_generator": (generated, "IteratorV2 (PyFunc is stateful"),
    "numpy_function": (of_python(tf.numpy_function), "IteratorV2 (PyFunc is stateful"),
    "py_function": (of_python(tf.py_function), "IteratorV2 (EagerPyFunc is stateful"),
    "random map": (
        lambda: initializable(D.range(NUMBERS).map(lambda x: tf.random.uniform([4])).repeat()),
        "IteratorV2 (RandomUniform is stateful",
    ),
    "random data": (
        lambda: initializable(D.from_tensor_slices(tf.random.uniform([50, 4])).repeat()),
        "IteratorV2 (each start draws its data anew (random_uniform/RandomUniform))",
    ),
    "two initializers": (switched, "IteratorV2 (2 initializers, of which efl does not know the last one that ran)"),
    "no iterator": (
        lambda: tf.numpy_function(lambda: np.zeros(4), [], tf.float64),
        "train (no iterator reads Reshape:0)",
    ),
}


@pytest.mark.parametrize("kind", list(LOST))
def test_what_cannot_be_saved_is_told_once_at_the_start(tmp_path, caplog, kind):
    make, why = LOST[kind]
    model, _ = model_over(make)
    model.fit(P.train(max_step=2), **options(tmp_path))
    (told,) = warnings(caplog)
    assert told.startswith("local: the position of this input will not survive a restart, which begins it anew: train")
    assert why in told
    assert "Use efl.data.DataIO or efl.data.FederalDataIO, or tf.data.make_initializable_iterator over files" in told
    model.fit(P.train(max_step=1), **options(tmp_path))
    assert warnings(caplog) == [told]
    assert model._run.keeping.iterators.kept == {"train": False}


def test_a_fed_iterator_is_told_too(tmp_path, caplog):
    made = {}

    def make():
        made["most"] = tf.placeholder(tf.int64, [])
        made["iterator"] = initializable(D.range(made["most"]).repeat().batch(4))
        return made["iterator"]

    class Start(tf.train.SessionRunHook):
        def after_create_session(self, session, coordinator):
            session.run(made["iterator"].initializer, {made["most"]: NUMBERS})

    model, _ = model_over(make)
    model.add_hooks([Start()])
    model.fit(P.train(max_step=2), **options(tmp_path))
    (told,) = warnings(caplog)
    assert "train: IteratorV2 (its data set is fed from placeholders or variables)" in told


def test_one_warning_names_mode_and_task_of_every_iterator(tmp_path, caplog):
    model, _ = model_over(lambda: one_shot(D.range(NUMBERS).repeat().batch(4)), generated)
    model.fit(P.train_and_evaluate(train_step=1, eval_step=1, max_iter=1), **options(tmp_path))
    (told,) = warnings(caplog)
    assert "anew: train: OneShotIterator (a one-shot" in told
    assert "; eval: IteratorV2 (PyFunc is stateful" in told
    caplog.clear()
    tf.reset_default_graph()
    model = efl.Model()
    rows = one_shot(D.from_tensors([[1.0]]).repeat()).get_next()
    for task in ("ctr", "cvr"):
        model.input_fn(lambda m, mode: efl.Sample({"x": rows}, {"x": [tf.feature_column.numeric_column("x")]}), task)
        model.loss_fn(lambda m, s: tf.reduce_sum(s["x"] * tf.get_variable(f"w{len(m.losses)}", [])), task)
        model.optimizer_fn(efl.optimizer_fn.optimizer_setter(tf.train.AdamOptimizer()), task)
    model.compile().fit(P.cotrain(train_step=1, max_iter=1), **options(tmp_path / "tasks"))
    (told,) = warnings(caplog)
    assert "anew: train:ctr, train:cvr: OneShotIterator (" in told


def test_nothing_is_said_where_nothing_is_saved(tmp_path, caplog):
    def net(m, x):
        return tf.nn.dropout(x, rate=0.5)

    with caplog.at_level(logging.INFO, logger="efl"):
        model, _ = model_over(lambda: one_shot(D.range(NUMBERS).repeat().batch(4)), net=net)
        model.fit(P.train(max_step=2))
    assert "restart" not in caplog.text
    assert "restored" not in caplog.text


def test_an_input_without_a_place_is_nothing_to_warn_of(tmp_path, caplog):
    model, _ = model_over(lambda: tf.constant([1.0, 2.0]))
    model.fit(P.train(max_step=2), **options(tmp_path))
    assert not warnings(caplog)
    # Told to the peer: this party can go on with any position of its input.
    assert model._run.keeping.iterators.kept == {}


# ---- checkpoints


def test_a_checkpoint_without_the_iterator_is_restored_and_it_begins_anew(tmp_path, caplog):
    def make(kind):
        return lambda: kind(D.range(NUMBERS).repeat().batch(4))

    first, _ = model_over(make(one_shot))  # saves variables only, as efl did with every iterator
    first.fit(P.train(max_step=5), **options(tmp_path))
    caplog.clear()
    model, seen = model_over(make(initializable))
    model.fit(P.train(max_step=6), **options(tmp_path))
    assert seen[0] == [0, 1, 2, 3]
    assert model.steps_trained == 11
    assert warnings(caplog) == [
        "train: IteratorV2: the checkpoint does not have the position of this iterator; it begins anew"
    ]


def test_a_position_in_another_data_set_is_refused_in_the_same_run_and_begins_anew_in_another(tmp_path, caplog):
    def make(repeats):
        return lambda: initializable(D.range(NUMBERS).repeat(repeats).batch(4))

    dying, _ = model_over(make(None), dies_after=5)
    with pytest.raises(PowerCut):
        dying.fit(P.train(max_step=6), **options(tmp_path))
    model, _ = model_over(make(3))
    with pytest.raises(
        CheckpointError, match=r"train: IteratorV2: its position in the checkpoint does not fit its data set \(.*Repeat"
    ):
        model.fit(P.train(max_step=6), **options(tmp_path))
    model, seen = model_over(make(3))
    model.fit(P.train(max_step=2), **options(tmp_path))
    assert seen == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert "does not fit its data set" in caplog.text


def test_the_size_of_a_shuffle_buffer_is_logged_once(tmp_path, caplog):
    def make():
        rows = D.range(500).map(lambda x: tf.random.stateless_uniform([1000], [x, x]))
        return initializable(rows.repeat().shuffle(400, seed=1))

    with caplog.at_level(logging.DEBUG, logger="efl"):
        model, _ = model_over(make)
        model.fit(P.train(max_step=7), **options(tmp_path))
    (size,) = re.findall(r"the positions of IteratorV2 take about (\d+) bytes of a checkpoint", caplog.text)
    assert 400 * 4000 <= int(size) < 1.1 * 400 * 4000


# ---- random ops of a step


def dropped(m, x):
    return tf.layers.dropout(x, 0.5, training=m.training_flag)


def branches(m, x):
    return tf.cond(m.training_flag, lambda: x * tf.random.uniform([]), lambda: x)


def many(m, x):
    return x + sum(tf.random.normal([], name=f"draw{n}") for n in range(5))


DRAWING = {
    "dropout": (dropped, "dropout/cond/dropout/random_uniform/RandomUniform): a run"),
    "in a branch": (branches, "cond/random_uniform/RandomUniform): a run"),
    "many": (many, "draw0/RandomStandardNormal, draw1/RandomStandardNormal, draw2/RandomStandardNormal and 2 more): a"),
}


@pytest.mark.parametrize("kind", list(DRAWING))
def test_random_ops_of_a_step_are_told_once(tmp_path, caplog, kind):
    net, names = DRAWING[kind]
    model, _ = model_over(lambda: initializable(D.range(NUMBERS).repeat().batch(4)), net=net)
    with caplog.at_level(logging.INFO, logger="efl"):
        model.fit(P.train(max_step=2), **options(tmp_path))
        model.fit(P.train(max_step=1), **options(tmp_path))
    (told,) = [r.getMessage() for r in caplog.records if "random ops" in r.getMessage()]
    assert told.startswith("local: train: the state of the random ops of this step is in no checkpoint (")
    assert names in told
    assert "tf.random.stateless_* with a seed made of model.global_step draws the same" in told


def test_initializers_and_stateless_ops_are_not_counted_and_these_draw_the_same_after_a_restart(tmp_path, caplog):
    def net(m, x):
        kernel = tf.get_variable("kernel", [1, 4], initializer=tf.random_normal_initializer(), trainable=False)
        draw = tf.random.stateless_uniform(tf.shape(x), tf.stack([m.global_step, 7]))
        return x * draw + 0.0 * tf.reduce_sum(kernel)

    with caplog.at_level(logging.INFO, logger="efl"):
        found = die_and_go_on(tmp_path, lambda: initializable(D.range(NUMBERS).repeat().batch(4)), 8, net=net)
    assert "random ops" not in caplog.text
    assert_undisturbed(*found)
