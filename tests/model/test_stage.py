"""Stages, the place of a restarted run among them, and banks of weights to start from."""

import logging

import numpy as np
import pytest

import efl

import tensorflow.compat.v1 as tf  # isort: skip
from efl.errors import CheckpointError, ConfigError, ModelError
from efl.stage import LoopStage, ModelBank, StageManager


def run(model, procedure, **fit):
    """Compiles where needed, and fits with a function of the model as procedure."""
    if not model._compiled:
        model.compile()
    model.fit(procedure, **fit)
    return model


# ---- Stage


class Count(efl.Stage):
    def run(self, factor, plus=0):
        return factor * int(self.sess.run(self.model.global_step)) + plus


def test_a_stage_of_the_users_own_has_a_session_and_gives_back_what_it_returns(toy):
    seen = []

    def procedure(m):
        m.run_stage("train", LoopStage(m.train_op(), True, 3))
        seen.append(m.run_stage("count", Count(), 10, plus=1))

    run(toy.model(), procedure)
    assert seen == [31]


def test_a_plain_function_is_a_stage(toy):
    seen = []

    def measure(scale, bias):
        seen.append("measured")
        return scale + bias

    run(toy.model(), lambda m: seen.append(m.run_stage("measure", measure, 2, bias=5)))
    assert seen == ["measured", 7]


def test_a_stage_must_run_and_must_be_run_by_a_model():
    with pytest.raises(TypeError, match="abstract"):
        efl.Stage()
    with pytest.raises(ModelError, match="Count is not bound to a model: run it with model.run_stage"):
        Count().sess  # noqa: B018  (reading it raises)
    with pytest.raises(ModelError, match="LoopStage is not bound"):
        LoopStage(tf.no_op()).run()


# ---- LoopStage


def test_a_loop_stops_at_its_steps_and_goes_on_when_it_is_run_again(toy):
    finished = []

    def procedure(m):
        loop = LoopStage(m.train_op(), True, step=3)
        for number in range(4):
            m.run_stage(f"part {number}", loop)
            finished.append((m.steps_trained, loop.finish))

    model = run(toy.model(), procedure)  # the data has 8 batches
    assert finished == [(3, False), (6, False), (8, True), (8, True)]
    np.testing.assert_allclose(model.get_weights()["net/w/kernel"], toy.expected(steps=8)[0], rtol=1e-5)


def test_a_loop_stops_at_its_time_though_the_data_does_not_end(toy):
    loops = []

    def procedure(m):
        loops.append(LoopStage(m.train_op(), True, time=0.3))
        m.run_stage("train", loops[0])
        m.run_stage("more", LoopStage(m.train_op(), True, step=2, time=1000.0))

    model = run(toy.model(train=toy.batch(epochs=-1)), procedure)
    assert not loops[0].finish
    assert model.steps_trained >= 3


def test_feed_dict_feeds_every_step(toy):
    model = toy.model()
    scale = tf.placeholder_with_default(1.0, [], name="scale")
    model.loss_fn(lambda m, s: scale * toy.loss(m, s))

    def procedure(m):
        m.run_stage("nothing", LoopStage(m.train_op(), True, 4), feed_dict={scale: 0.0})
        assert not m.get_weights()["net/w/kernel"].any()
        m.run_stage("all", LoopStage(m.train_op(), True, 4), feed_dict={scale: 1.0})

    run(model, procedure)
    np.testing.assert_allclose(model.get_weights()["net/w/kernel"], toy.expected(steps=4)[0], rtol=1e-5)


def test_a_loop_runs_any_fetches(toy):
    model = toy.model().compile()
    counter = tf.get_variable("counter", [], initializer=tf.zeros_initializer(), trainable=False)
    count = tf.assign_add(counter, 2.0)

    def procedure(m):
        m.run_stage("count", LoopStage([count, tf.no_op()], is_training=False, step=5))
        return m.session.run(counter)

    run(model, procedure)
    assert model.session.run(counter) == 10
    assert model.steps_trained == 0


def test_a_train_op_among_other_fetches_still_trains(toy):
    model = toy.model().compile()
    counter = tf.get_variable("counter", [], initializer=tf.zeros_initializer(), trainable=False)
    run(model, lambda m: m.run_stage("s", LoopStage([m.train_op(), tf.assign_add(counter, 1.0)], True, 3)))
    assert model.steps_trained == 3
    assert model.session.run(counter) == 3
    np.testing.assert_allclose(model.get_weights()["net/w/kernel"], toy.expected(steps=3)[0], rtol=1e-5)


@pytest.mark.parametrize("step", [0, -1, 2.0, True, "3"])
def test_steps_that_cannot_be(step):
    with pytest.raises(ConfigError, match="expected a positive number of steps, or None"):
        LoopStage(tf.no_op(), step=step)


@pytest.mark.parametrize("time", [0, -1.5, float("nan"), True, "3"])
def test_times_that_cannot_be(time):
    with pytest.raises(ConfigError, match="expected a positive number of seconds, or None"):
        LoopStage(tf.no_op(), time=time)


# ---- the place of a restarted run


class Fails(Exception):
    pass


def three_stages(log, fail_in=None, names=("first", "second", "third")):
    def procedure(m):
        loop = LoopStage(m.train_op(), True, 2)

        def note(name):
            log.append((name, m.steps_trained))
            if name == fail_in:
                raise Fails
            return name

        for name in names:
            m.run_stage(f"train {name}", loop)
            log.append(("returned", m.run_stage(name, note, name)))

    return procedure


def fresh(toy):
    tf.reset_default_graph()
    return toy.model(train=toy.batch(epochs=-1))


def test_finished_stages_are_skipped_after_a_restart(toy, tmp_path, caplog):
    log = []
    with pytest.raises(Fails):
        run(fresh(toy), three_stages(log, fail_in="second"), checkpoint_dir=str(tmp_path))
    assert log == [("first", 2), ("returned", "first"), ("second", 4)]
    log = []
    with caplog.at_level(logging.INFO, logger="efl"):
        model = run(fresh(toy), three_stages(log), checkpoint_dir=str(tmp_path))
    assert log == [("returned", None), ("second", 4), ("returned", "second"), ("third", 6), ("returned", "third")]
    assert model.steps_trained == 6


def test_a_procedure_that_has_changed_is_refused(toy, tmp_path):
    class Dies(tf.train.SessionRunHook):
        steps = 0

        def after_run(self, run_context, run_values):
            self.steps += 1
            if self.steps == 4:
                raise Fails

    model = fresh(toy)
    model.add_hooks([Dies()])
    with pytest.raises(Fails):  # in the stage "train second", after one of its steps was saved
        run(model, three_stages([]), checkpoint_dir=str(tmp_path), save_checkpoint_steps=1)
    with pytest.raises(
        CheckpointError, match=r"was in stage 'train second' \(number 2\), the procedure is in 'train other'"
    ):
        run(fresh(toy), three_stages([], names=("first", "other", "third")), checkpoint_dir=str(tmp_path))
    log = []
    assert run(fresh(toy), three_stages(log), checkpoint_dir=str(tmp_path)).steps_trained == 6
    assert log[:2] == [("returned", None), ("second", 4)]


def test_the_manager_remembers_stages_and_steps(toy):
    states = []

    def procedure(m):
        states.append(m.stage_mgr.state())
        m.run_stage("a", LoopStage(m.train_op(), True, 2))
        m.run_stage("b", lambda: states.append(m.stage_mgr.state()))
        m.run_stage("c", LoopStage(m.train_op(), True))

    model = run(toy.model(), procedure)
    states.append(model.stage_mgr.state())
    assert [(s["place"], s["steps"], s["ended"], s["common_loops"]) for s in states] == [
        ([[0, ""]], 0, [], 0), ([[1, "b"], [0, ""]], 0, [], 1), ([[3, ""]], 0, [[2]], 2)
    ]  # fmt: skip
    again = StageManager()
    again.restore(states[-1])
    assert again.state() == states[-1]
    again.reset()
    assert again.state() == StageManager().state()


def test_a_loop_over_fetches_of_ones_own_is_no_training_and_goes_on_after_a_restart(toy, tmp_path):
    def counting(stops_at=None):
        model = fresh(toy)
        count = tf.get_variable("count", [], initializer=tf.zeros_initializer(), use_resource=True, trainable=False)
        counted = tf.assign_add(count, 1.0)

        def look(value):
            if value == stops_at:
                raise Fails

        with tf.control_dependencies([tf.numpy_function(look, [counted], [])]):
            counted = tf.identity(counted)

        def procedure(m):
            m.run_stage("train", LoopStage(m.train_op(), True, 2))
            m.run_stage("own", LoopStage(counted, True, 8))
            m.run_stage("train more", LoopStage(m.train_op(), True, 1))

        return model, count, procedure

    model, _, procedure = counting(stops_at=6)
    with pytest.raises(tf.errors.UnknownError, match="Fails"):
        run(model, procedure, checkpoint_dir=str(tmp_path), save_checkpoint_steps=4)
    assert model.steps_trained == 2
    model, count, procedure = counting()
    run(model, procedure, checkpoint_dir=str(tmp_path), save_checkpoint_steps=4, log_step=1)
    assert model.steps_trained == model.session.run(model.global_step) == 3
    assert model.session.run(count) == 8
    assert len(model.history) == 4 + 1  # from the fourth step of the loop on


def test_stages_within_stages_are_found_again(toy, tmp_path):
    log = []

    def stages(stops_in):
        model = fresh(toy)

        def note(what):
            log.append((what, model.steps_trained))
            if what == stops_in:
                raise Fails

        def around(m, by_hand):
            m.run_stage("first", note, "first")
            by_hand()  # a stage too, where a function that is a stage calls it
            m.run_stage("second", note, "second")
            m.run_stage("train", LoopStage(m.train_op(), True, 3))
            m.run_stage("third", note, "third")

        def procedure(m):
            by_hand = LoopStage(m.train_op(), True, 2)
            by_hand.bind(m)
            m.run_stage("around", around, m, by_hand)
            m.run_stage("last", note, "last")

        return model, procedure

    for stops_in in ("second", "third", "last", None):
        model, procedure = stages(stops_in)
        if stops_in is None:
            run(model, procedure, checkpoint_dir=str(tmp_path))
        else:
            with pytest.raises(Fails):
                run(model, procedure, checkpoint_dir=str(tmp_path))
    # A function that took no steps is not worth a checkpoint: the one before the last begins again.
    again = [("third", 5), ("last", 5)]
    assert log == [("first", 0), ("second", 2), ("second", 2), ("third", 5), *again, *again]
    assert model.steps_trained == 5


def test_a_stage_cannot_begin_within_a_step(toy):
    class Evaluates(tf.train.SessionRunHook):
        def after_run(self, run_context, run_values):
            model.run_stage("within", lambda: None)

    model = toy.model()
    model.add_hooks([Evaluates()])
    with pytest.raises(ModelError, match=r"run_stage\('within'\) within a step of stage 'train', by a hook\?"):
        run(model, lambda m: m.run_stage("train", LoopStage(m.train_op(), True, 3)))


def test_checkpoints_of_another_version_are_not_passed_over(toy, tmp_path):
    (tmp_path / "local" / "0" / "step-0000000004-fit-1-stage-0000-at-0000000004").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="no run of this version of efl wrote"):
        run(fresh(toy), three_stages([]), checkpoint_dir=str(tmp_path))


# ---- ModelBank


@pytest.fixture
def bank_folder(tmp_path):
    """Two checkpoints of plain TensorFlow: one of the model's own names, one of others."""

    def save(values, path):
        with tf.Graph().as_default(), tf.Session() as sess:
            for name, value in values.items():
                tf.get_variable(name, initializer=np.array(value, np.float32))
            sess.run(tf.global_variables_initializer())
            tf.train.Saver().save(sess, str(path), global_step=7)

    save({"net/w/kernel": [[1.0], [2.0], [3.0]], "net/w/bias": [4.0], "unknown": [0.0]}, tmp_path / "own" / "model")
    save({"old/leaf": [[5.0], [6.0], [7.0]], "old/b": [8.0], "wide": [1.0, 2.0]}, tmp_path / "model")
    return tmp_path


def loaded(toy, is_chief, *entries, **keyed):
    tf.reset_default_graph()
    config = keyed or list(entries)
    model = run(toy.model(), lambda m: m.run_stage("bank", ModelBank(is_chief, config)))
    weights = model.get_weights()
    return weights["net/w/kernel"].ravel().tolist(), weights["net/w/bias"].tolist()


def entry(load, path, exclude=()):
    return {"load": load, "exclude": list(exclude), "path": str(path)}


def test_a_bank_loads_what_patterns_select(toy, bank_folder):
    own = bank_folder / "own"
    assert loaded(toy, True, entry(["*"], own)) == ([1, 2, 3], [4])
    assert loaded(toy, True, entry(["*"], own / "model-7")) == ([1, 2, 3], [4])
    assert loaded(toy, True, entry(["net/?/kern*"], own)) == ([1, 2, 3], [0])
    assert loaded(toy, True, entry(["nothing", "*/bias"], own)) == ([0, 0, 0], [4])
    assert loaded(toy, True, entry(["*"], own, exclude=["*/kernel"])) == ([0, 0, 0], [4])


def test_a_bank_renames(toy, bank_folder):
    renamed = {"old/leaf": "net/w/kernel", "old/b": "net/w/bias"}
    other = bank_folder / "model-7"
    assert loaded(toy, True, entry(renamed, other)) == ([5, 6, 7], [8])
    assert loaded(toy, True, entry(renamed, other, exclude=["net/w/bias"])) == ([5, 6, 7], [0])
    absent = {"old/leaf": "net/w/kernel", "wide": "no/such/variable"}
    assert loaded(toy, True, entry(absent, other)) == ([5, 6, 7], [0])


def test_later_entries_win(toy, bank_folder):
    own = entry(["*"], bank_folder / "own")
    other = entry({"old/leaf": "net/w/kernel"}, bank_folder / "model-7")
    assert loaded(toy, True, own, other) == ([5, 6, 7], [4])
    assert loaded(toy, True, other, own) == ([1, 2, 3], [4])
    assert loaded(toy, True, z=own, a=other) == ([5, 6, 7], [4])  # a dict counts in its own order


def test_only_the_chief_loads(toy, bank_folder):
    assert loaded(toy, False, entry(["*"], bank_folder / "own")) == ([0, 0, 0], [0])


def test_a_bank_takes_checkpoints_of_efl(toy, tmp_path):
    model = toy.model().compile()
    model.fit(efl.procedure_fn.train(max_step=3), checkpoint_dir=str(tmp_path))
    weights = model.get_weights()
    assert loaded(toy, True, entry(["net/*"], tmp_path / "local" / "0")) == (
        weights["net/w/kernel"].ravel().tolist(),
        weights["net/w/bias"].tolist(),
    )


def test_the_count_of_steps_is_loaded_only_by_its_name(toy, tmp_path):
    toy.model().compile().fit(efl.procedure_fn.train(max_step=3), checkpoint_dir=str(tmp_path))
    for load, steps in (["*"], 0), (["net/*", "global_step"], 3), ({"global_step": "global_step"}, 3):
        tf.reset_default_graph()
        bank = ModelBank(True, [{"load": load, "path": str(tmp_path / "local" / "0")}])
        model = run(toy.model(), lambda m, bank=bank: m.run_stage("bank", bank))
        assert model.session.run(model.global_step) == steps, load


def test_training_goes_on_from_the_bank(toy, bank_folder):
    def procedure(m):
        m.run_stage("bank", ModelBank(True, [entry(["*"], bank_folder / "own")]))
        m.run_stage("train", LoopStage(m.train_op(), True, 1))

    kernel = run(toy.model(rate=1e-6), procedure).get_weights()["net/w/kernel"].ravel()
    np.testing.assert_allclose(kernel, [1, 2, 3], atol=1e-3)
    assert (kernel != [1, 2, 3]).any()


def test_a_bank_without_entries_does_nothing(toy):
    run(toy.model(), lambda m: m.run_stage("bank", ModelBank(True, None)))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"load": ["*"], "exclude": []}, "model bank '0': expected a dict of load, path and exclude, got"),
        ({"load": ["*"], "exclude": [], "path": "x", "more": 1}, "expected a dict of load, path and exclude"),
        ("path", "expected a dict of load, path and exclude, got 'path'"),
        ({"load": "*", "exclude": [], "path": "x"}, r"load='\*': expected a list of patterns or a dict old -> new"),
        ({"load": 3, "exclude": [], "path": "x"}, "load=3: expected a list of patterns"),
        ({"load": ["*"], "exclude": "a", "path": "x"}, "exclude='a': expected a list of patterns"),
    ],
)
def test_a_malformed_bank_is_refused(bad, message):
    with pytest.raises(ConfigError, match=message):
        ModelBank(True, [bad])


@pytest.mark.parametrize(
    ("load", "path", "message"),
    [
        (["*"], "nowhere", r"nowhere: no checkpoint there \(expected a folder of checkpoints or the prefix of one\)"),
        (["head/*"], "own", r"load=\['head/\*'\], exclude=\[\] selects nothing that is both in .* and in the graph"),
        ({"old/gone": "net/w/bias"}, "model-7", "holds no old/gone; it holds: old/b, old/leaf, wide"),
        ({"wide": "net/w/bias"}, "model-7", r"wide in .* has shape \[2\], net/w/bias in the graph \(1,\)"),
    ],
)
def test_what_a_bank_cannot_load_is_named(toy, bank_folder, load, path, message):
    with pytest.raises(CheckpointError, match=message):
        loaded(toy, True, entry(load, bank_folder / path))
