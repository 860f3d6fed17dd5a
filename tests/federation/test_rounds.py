"""Runs that end unevenly, begin again, or differ in what the handshake cannot see."""

import json

import numpy as np
import pytest

from efl._agreement import Facts, behind, shared_seed, where_to_start
from efl._position import Position
from efl.errors import CheckpointError, ProtocolError
from tests.federation.harness import run_both
from tests.federation.test_ends import both, history
from tests.federation.test_parity import FOLLOWER, LEADER

FIT = "model.compile().fit(efl.procedure_fn.train(max_step=10))"

# The leader has no columns: what it returns needs no batch of its own, and its reader ends late.
LATE_END = """
import time
ROWS_OF = {'leader': 48, 'follower': 96}
def rows():
    for i in range(0, ROWS_OF[ROLE], BATCH):
        yield X[i:i + BATCH], LABEL[i:i + BATCH]
    time.sleep(1.0)
data = tf.data.Dataset.from_generator(rows, (tf.float32, tf.int64), ([None, 8], [None]))
batch, test = tf.data.make_one_shot_iterator(data).get_next(), batches(rows=32, epochs=1)
def input_fn(m, mode):
    b = batch if mode == efl.MODE.TRAIN else test
    return efl.Sample({'x': b[0][:, COLUMNS[ROLE]], 'label': b[1]}, {
        'x': [tf.feature_column.numeric_column('x', 4)], 'label': [tf.feature_column.numeric_column('label', 1)]})
def net(m, s, training):
    if ROLE == 'leader':
        y = m.recv('y', require_grad=training, shape=[None, 3])
        return cross_entropy(m.recv('l', tf.int64), dense(y, 3, 3, 'top'))
    y = dense(s['x'], 4, 3, 'own')
    m.send('l', tf.cast(s['label'], tf.int64))
    m.send('y', y, require_grad=training)
    return y
model = efl.FederalModel()
model.input_fn(input_fn).loss_fn(lambda m, s: net(m, s, True)).optimizer_fn(optimizer())
model.eval_fn(lambda m, s: tf.reduce_mean(net(m, s, False)))
model.compile().fit(efl.procedure_fn.train_and_evaluate(max_iter=1), log_step=1)
"""


def test_no_message_of_a_step_leaves_before_its_batch_is_read(tmp_path):
    run_both(tmp_path, LATE_END, LATE_END, timeout=60)
    for role in ("leader", "follower"):
        assert [row["mode"] for row in history(tmp_path, role)] == ["train"] * 3 + ["eval"] * 2


@pytest.mark.parametrize("stopping", ["leader", "follower"])
def test_a_stop_at_the_last_step_of_a_stage_leaves_the_parties_in_step(tmp_path, stopping):
    code = both("train(max_step=4)", fit="log_step=1") + "model.fit(efl.procedure_fn.train(max_step=3), log_step=1)\n"
    stop = code.replace("model.compile()", "model.add_hooks([tf.train.StopAtStepHook(num_steps=4)])\nmodel.compile()")
    run_both(tmp_path, *(stop if role == stopping else code for role in ("leader", "follower")))
    # Both begin their data anew in the second fit; the hook, past its four steps, stops it after one.
    assert [row["step"] for row in history(tmp_path, "leader")] == [5]
    assert [row["step"] for row in history(tmp_path, "follower")] == [5]


def test_a_stop_in_training_does_not_cut_the_evaluation_short(tmp_path):
    code = both("train_and_evaluate(train_step=50, eval_step=3, max_iter=2)", fit="log_step=100")
    stop = code.replace("model.compile()", "model.add_hooks([tf.train.StopAtStepHook(num_steps=4)])\nmodel.compile()")
    run_both(tmp_path, code, stop)
    for role in ("leader", "follower"):
        rows = [(row["mode"], row["step"], row.get("batches")) for row in history(tmp_path, role)]
        assert rows == [("train", 4, None), ("eval", 4, 3)]


def test_a_failed_fit_can_be_repeated_in_the_same_process(tmp_path):
    again = """
model.compile()
class Breaks(tf.train.SessionRunHook):
    broken = False
    def after_run(self, context, values):
        if ROLE == 'leader' and model.steps_trained == 2 and not Breaks.broken:
            Breaks.broken = True
            raise ValueError('once')
model.add_hooks([Breaks()])
try:
    model.fit(efl.procedure_fn.train(max_step=10))
except (ValueError, efl.errors.PeerFailed):
    pass
model.steps_trained = 0
model.fit(efl.procedure_fn.train(max_step=5), log_step=1)
"""
    run_both(tmp_path, LEADER.replace(FIT, again), FOLLOWER.replace(FIT, again), timeout=60)
    assert len(history(tmp_path, "leader")) == 5


def test_fit_again_with_the_same_folder_trains_on(tmp_path):
    code = both("train(max_step=3)", fit="checkpoint_dir='ckpt', log_step=1")
    code += "model.fit(efl.procedure_fn.train(max_step=3), checkpoint_dir='ckpt', log_step=1)\n"
    run_both(tmp_path, code, code)
    assert [row["step"] for row in history(tmp_path, "follower")] == [4, 5, 6]
    results = run_both(tmp_path, code, code)  # a new process finds the run complete, and says so
    assert "fit 1 was done before; going on with fit 2" in results["follower"].output
    assert "nothing to do: this run was complete at step 6" in results["leader"].output


def test_checkpoints_of_different_runs_are_not_taken_for_common(tmp_path):
    for folder in ("a", "b"):
        code = both("train(max_step=2)", fit=f"checkpoint_dir='{folder}'")
        run_both(tmp_path, code, code)
    codes = [both("train(max_step=4)", fit=f"checkpoint_dir='{folder}'") for folder in ("a", "b")]
    for result in run_both(tmp_path, *codes, expect=(1, 1)).values():
        assert "hold no checkpoint of the same run and step: " in result.output


def test_parties_that_would_save_at_different_steps_are_refused(tmp_path):
    codes = [both("train(max_step=4)", fit=f"checkpoint_dir='c', save_checkpoint_steps={n}") for n in (2, 3)]
    for result in run_both(tmp_path, *codes, expect=(1, 1)).values():
        assert "save_checkpoint_steps is" in result.output


def test_procedures_of_the_users_own_that_differ_are_refused(tmp_path):
    def edit(steps):
        return FIT, (
            "def own(model):\n"
            f"    model.run_stage('first', efl.stage.LoopStage(model.train_op(), step={steps}))\n"
            "    model.run_stage('second', efl.stage.LoopStage(model.train_op(), step=2))\n"
            "model.compile().fit(own)"
        )

    results = run_both(tmp_path, LEADER.replace(*edit(3)), FOLLOWER.replace(*edit(5)), expect=(1, 1), timeout=60)
    for result in results.values():
        assert "step=3" in result.output
        assert "step=5" in result.output


def test_stages_of_one_partys_own_do_not_disturb_the_common_ones(tmp_path):
    own = (
        "count = tf.get_variable('count', [], initializer=tf.zeros_initializer(), trainable=False)\n"
        "def own(model):\n"
        "    if ROLE == 'leader':\n"
        "        model.run_stage('mine', lambda: None)\n"
        "        model.run_stage('counting', efl.stage.LoopStage(tf.assign_add(count, 1.0), step=3))\n"
        "    for turn in range(2):\n"
        "        model.run_stage('train', efl.stage.LoopStage(model.train_op(), step=2 + turn))\n"
        "model.compile().fit(own)\n"
        "assert model.session.run(count) == (3 if ROLE == 'leader' else 0)\n"
    )
    run_both(tmp_path, LEADER.replace(FIT, own), FOLLOWER.replace(FIT, own), timeout=60)
    assert [row["step"] for row in history(tmp_path, "follower")] == [2, 5]


def test_a_loop_of_ones_own_over_what_is_exchanged_is_refused(tmp_path):
    own = (
        "def own(model):\n"
        "    model.run_stage('train', efl.stage.LoopStage(model.train_op(), step=2))\n"
        "    if ROLE == 'leader':\n"
        "        model.run_stage('look', efl.stage.LoopStage(model.loss(), step=3))\n"
        "    model.run_stage('train on', efl.stage.LoopStage(model.train_op(), step=2))\n"
        "model.compile().fit(own)\n"
    )
    results = run_both(tmp_path, LEADER.replace(FIT, own), FOLLOWER.replace(FIT, own), expect=(1, 1), timeout=60)
    told = "ModelError: a LoopStage over fetches of one's own that depend on the exchange with the peer (efl_"
    for result in results.values():
        assert told in result.output.splitlines()[-1]


def test_an_eval_fn_on_one_side_only_is_named(tmp_path):
    follower = FOLLOWER.replace("model.compile()", "model.eval_fn(lambda m, s: None).compile()")
    for result in run_both(tmp_path, LEADER, follower, expect=(1, 1)).values():
        assert "tasks" in result.output


def test_the_seed_that_is_told_does_not_give_the_runs_seed_away():
    assert shared_seed(4711) == shared_seed(4711) != shared_seed(4712)
    assert 0 <= shared_seed(4711) < 1 << 56
    assert "4711" not in json.dumps(Facts((), None, 0, False, {}, "r", shared_seed(4711), 1, ("train()",)).to_json())


def test_parties_in_different_fits_without_a_checkpoint_between_them_are_told():
    held = (Position(4, 1, 0, 4), "run"), (Position(9, 2, 0, 2), "run")
    ahead = Facts(held, 1000, 9, True, {}, "r", 7, 2, ("a", "b"))
    behind_it = Facts((), 1000, 0, False, {}, "s", None, 1, ("a",))
    for mine, peer, roles in (ahead, behind_it, ("leader", "follower")), (behind_it, ahead, ("follower", "leader")):
        assert not behind(mine, peer, lambda position, fit: True)
        with pytest.raises(
            CheckpointError, match=r"fit: the leader is in its 2\., the follower in its 1\., and no check"
        ):
            where_to_start(mine, peer, *roles)


def test_who_is_behind_passes_by_only_a_fit_that_is_over():
    middle, end, later = Position(4, 1, 0, 4), Position(6, 1, 1, 0), Position(9, 2, 0, 3)

    def facts(fit, *held, warm=False):
        return Facts(tuple((position, "run") for position in held), 1000, 0, warm, {}, "r", 7, fit, ("a", "b")[:fit])

    def who(mine, peer, ours=True):
        return behind(mine, peer, lambda position, fit: ours)

    assert who(facts(1, middle, end), facts(2, end, warm=True)) == {"mine"}
    assert who(facts(2, end, warm=True), facts(1, middle, end)) == {"peer"}
    assert who(facts(1, middle, end, later), facts(2, end, later, warm=True)) == {"mine"}
    assert who(facts(1, end, later), facts(1, end, later)) == {"mine", "peer"}
    # The end of the first fit is not held by both: somebody would have to take its last steps again.
    assert who(facts(1, middle), facts(2, middle, end, later, warm=True)) == set()
    assert who(facts(1, middle, end), facts(1, middle, end, later)) == set()
    assert who(facts(1, end, later), facts(1, end, later), ours=False) == set()


@pytest.mark.parametrize(
    "change",
    [
        {"seed": -1},
        {"seed": "x"},
        {"checkpoints": [[1]]},
        {"fit": 1.5},
        {"procedures": [3]},
        {"procedures": ["x" * 10_001]},
        {"checkpoints": 3},
        {"run": None},
        {"steps_trained": True},
        {"checkpoints": [[[1, 1, 1], "r"]]},
        {"warm": 1},
        {"inputs": {"train": 2}},
    ],
)
def test_facts_that_cannot_be_are_refused(change):
    facts = Facts(((Position(4, 1, 0, 4), "run"),), 1000, 4, True, {"train": True}, "run", 7, 2, ("a", "b"))
    assert Facts.parse(json.loads(json.dumps(facts.to_json())), "leader") == facts
    with pytest.raises(ProtocolError, match="leader told something about its run that cannot be"):
        Facts.parse({**facts.to_json(), **change}, "leader")


def test_evaluation_that_returns_what_it_sent_logs_no_batch(tmp_path):
    code = both("train_and_evaluate(train_step=1, eval_step=1, max_iter=1)", fit="log_step=1")
    code = code.replace(
        "    net(m, s, False)\n", "    y = net(m, s, False)\n    return y if ROLE == 'follower' else None\n"
    )
    run_both(tmp_path, code, code)
    row = history(tmp_path, "follower")[-1]
    assert row["mode"] == "eval"
    assert not any(isinstance(value, list) for value in row.values())
    assert np.isfinite(row["steps_per_second"])
