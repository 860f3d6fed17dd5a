"""How a federated run ends: by steps, by time, by either side's data, and what a restarted run goes on with."""

import json

import numpy as np
import pytest

from tests.federation.harness import assert_same_weights, run_both
from tests.federation.problem import load
from tests.federation.test_parity import joint, whole

TRAIN = """
batch, test = batches(**DATA[ROLE]), batches(**TEST[ROLE])
def net(m, s, training):
    if ROLE == 'leader':
        h = dense(s['x'], 4, 5, 'left', tf.tanh)
        f = tf.reshape(m.recv('f', require_grad=training), [-1, 5])
        loss = cross_entropy(s['label'], dense(tf.concat([h, f], 1), 10, 3, 'top'))
        m.add_metric('count', tf.metrics.mean(loss))
        return loss
    h = dense(s['x'], 4, 5, 'right', tf.tanh)
    m.send('f', h, require_grad=training)
    return h
def eval_fn(m, s):
    net(m, s, False)
model = efl.FederalModel()
model.input_fn(lambda m, mode: sample(m, batch if mode == efl.MODE.TRAIN else test, ROLE))
model.loss_fn(lambda m, s: net(m, s, True)).eval_fn(eval_fn).optimizer_fn(optimizer())
model.compile()
"""


def both(procedure, leader_data=None, follower_data=None, leader_test=None, follower_test=None, fit="log_step=1"):
    data = {"leader": leader_data or {}, "follower": follower_data or {}}
    test = {"leader": leader_test or {"epochs": 1}, "follower": follower_test or {"epochs": 1}}
    return f"DATA = {data!r}\nTEST = {test!r}\n" + TRAIN + f"model.fit(efl.procedure_fn.{procedure}, {fit})\n"


def history(tmp_path, role):
    return json.loads((tmp_path / f"{role}.json").read_text())


@pytest.mark.parametrize(("leader_rows", "follower_rows"), [(48, 96), (96, 48), (48, 48)])
def test_training_ends_on_both_sides_when_either_sides_data_ends(tmp_path, leader_rows, follower_rows):
    code = both("train()", {"rows": leader_rows, "epochs": 1}, {"rows": follower_rows, "epochs": 1})
    run_both(tmp_path, code, code)
    for role in ("leader", "follower"):
        assert len(history(tmp_path, role)) == 3
    got = {**load(tmp_path / "leader.npz"), **load(tmp_path / "follower.npz")}
    assert_same_weights(got, joint(whole, steps=3))  # a step that only one side had data for changed nothing


@pytest.mark.parametrize(("leader_rows", "follower_rows"), [(32, 64), (64, 32), (32, 32)])
def test_evaluations_start_over_whoever_ends_first(tmp_path, leader_rows, follower_rows):
    code = both(
        "train_and_evaluate(train_step=2, max_iter=3)",
        leader_test={"rows": leader_rows, "epochs": 1},
        follower_test={"rows": follower_rows, "epochs": 1},
    )
    run_both(tmp_path, code, code)
    for role in ("leader", "follower"):
        batches = [row["batches"] for row in history(tmp_path, role) if row["mode"] == "eval" if row["batches"] == 2]
        assert batches == [2] * 3
    got = {**load(tmp_path / "leader.npz"), **load(tmp_path / "follower.npz")}
    assert_same_weights(got, joint(whole, steps=6))


def test_evaluation_goes_on_where_it_stopped(tmp_path):
    code = both("train_and_evaluate(train_step=1, eval_step=2, max_iter=3)", fit="log_step=100")
    run_both(tmp_path, code, code)
    losses = [row["count"] for row in history(tmp_path, "leader") if row["mode"] == "eval"]
    assert len(losses) == 3
    for turn, value in enumerate(losses):
        weights = joint(whole, steps=turn + 1)
        assert value == pytest.approx(np.mean([loss_of(weights, turn * 2 + b) for b in range(2)]), rel=1e-5)


def loss_of(weights, batch):
    from tests.federation.problem import BATCH, LABEL, X

    part = slice(batch * BATCH, (batch + 1) * BATCH)
    left = np.tanh(X[part, :4] @ weights["left/kernel"] + weights["left/bias"])
    right = np.tanh(X[part, 4:] @ weights["right/kernel"] + weights["right/bias"])
    logits = np.concatenate([left, right], 1) @ weights["top/kernel"] + weights["top/bias"]
    shifted = logits - logits.max(1, keepdims=True)
    log_softmax = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return -log_softmax[np.arange(len(logits)), LABEL[part]].mean()


def test_the_leaders_clock_ends_an_interval_for_both(tmp_path):
    code = both("train_and_evaluate(train_interval=0.3, eval_interval=0.2, max_iter=2)", fit="log_step=100000")
    run_both(tmp_path, code, code)
    steps = {role: [(row["mode"], row["step"]) for row in history(tmp_path, role)] for role in ("leader", "follower")}
    assert steps["leader"] == steps["follower"]
    assert [mode for mode, _ in steps["leader"]] == ["train", "eval", "train", "eval"]
    trained = steps["leader"][-1][1]
    assert trained > 4
    got = {**load(tmp_path / "leader.npz"), **load(tmp_path / "follower.npz")}
    assert_same_weights(got, joint(whole, steps=trained), rtol=1e-4 * max(1, trained // 100))


def test_a_hook_of_one_party_that_asks_to_stop_ends_both(tmp_path):
    leader = both("train()", fit="log_step=1").replace(
        "model.compile()", "model.compile()\nmodel.add_hooks([tf.train.StopAtStepHook(num_steps=4)])"
    )
    told = run_both(tmp_path, leader, both("train()", fit="log_step=1"))
    assert len(history(tmp_path, "leader")) == len(history(tmp_path, "follower")) == 4
    assert "leader: a hook asked to stop in train after step 4" in told["leader"].output
    assert "follower: leader ended train before step 5: a hook asked to stop" in told["follower"].output


ONE_WAY = """
batch = batches(rows=ROWS_OF[ROLE], epochs=1)
def loss_fn(m, s):
    if ROLE == 'leader':
        f = m.recv('f', shape=[None, 4])
        return cross_entropy(s['label'], dense(tf.concat([s['x'], f], 1), 8, 3, 'top'))
    m.send('f', s['x'])
    return cross_entropy(s['label'], dense(s['x'], 4, 3, 'own'))
model = efl.FederalModel()
model.input_fn(lambda m, mode: sample(m, batch, ROLE)).loss_fn(loss_fn).optimizer_fn(optimizer())
model.compile().fit(efl.procedure_fn.train(), log_step=1)
"""


@pytest.mark.parametrize(("leader_rows", "follower_rows"), [(48, 96), (96, 48)])
def test_a_party_that_receives_nothing_takes_no_step_alone(tmp_path, leader_rows, follower_rows):
    code = f"ROWS_OF = {{'leader': {leader_rows}, 'follower': {follower_rows}}}\n" + ONE_WAY
    run_both(tmp_path, code, code)
    assert len(history(tmp_path, "leader")) == len(history(tmp_path, "follower")) == 3

    def own(x, label, ids):
        from tests.federation.problem import cross_entropy, dense

        return cross_entropy(label, dense(x[:, 4:], 4, 3, "own"))

    assert_same_weights(load(tmp_path / "follower.npz"), joint(own, steps=3))


EARLY = """
# The leader's only message is made before anything else, and its data ends a second after the last batch.
def slow(*row):
    def wait():
        import time
        time.sleep(1.0)
        return False
    return tf.reshape(tf.numpy_function(wait, [], tf.bool), [])
data = tf.data.Dataset.from_tensor_slices((X[:ROWS], LABEL[:ROWS], IDS[:ROWS])).batch(16)
if ROLE == 'leader':
    data = data.take(3).concatenate(data.take(1).filter(slow))
batch = tf.data.make_one_shot_iterator(data).get_next()
def loss_fn(m, s):
    if ROLE == 'follower':
        m.add_metric('note', m.recv('note', shape=[]))
    return cross_entropy(s['label'], dense(s['x'], 4, 3, 'own' + ROLE))
model = efl.FederalModel()
if ROLE == 'leader':
    model.send('note', tf.constant(1.0))
model.input_fn(lambda m, mode: sample(m, batch, ROLE)).loss_fn(loss_fn).optimizer_fn(optimizer())
model.compile().fit(efl.procedure_fn.train(), log_step=1)
"""


def test_a_message_made_before_the_batch_waits_for_it_too(tmp_path):
    run_both(tmp_path, EARLY, EARLY)
    assert len(history(tmp_path, "leader")) == len(history(tmp_path, "follower")) == 3


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_evaluated_without_training(tmp_path):
    code = both("train(max_step=4)", fit="checkpoint_dir='ckpt'")
    run_both(tmp_path, code, code)
    trained = {**load(tmp_path / "leader.npz"), **load(tmp_path / "follower.npz")}
    assert (tmp_path / "ckpt" / "leader" / "0").is_dir()
    assert (tmp_path / "ckpt" / "follower" / "0").is_dir()
    assert not list((tmp_path / "ckpt").rglob("*.meta"))
    code = both("eval()", fit="checkpoint_dir='ckpt', log_step=100", leader_test={"rows": 32, "epochs": 1})
    run_both(tmp_path, code, code)
    (row,) = history(tmp_path, "leader")
    assert row["mode"] == "eval"
    assert row["step"] == 4
    assert row["count"] == pytest.approx(np.mean([loss_of(joint(whole, steps=4), b) for b in range(2)]), rel=1e-5)
    assert_same_weights({**load(tmp_path / "leader.npz"), **load(tmp_path / "follower.npz")}, trained)


def test_a_restarted_run_goes_on_in_its_stage_and_iteration(tmp_path):
    # The first run is stopped by an error of the leader's own, in the second iteration.
    procedure = "train_and_evaluate(train_step=4, eval_step=1, max_iter=3)"
    fit = "checkpoint_dir='ckpt', save_checkpoint_steps=2, log_step=1"
    dying = both(procedure, fit=fit).replace(
        "model.compile()\n",
        """
class Dies(tf.train.SessionRunHook):
    def after_run(self, context, values):
        if model.steps_trained == 6:
            raise RuntimeError('power cut')
model.add_hooks([Dies()])
model.compile()
""",
    )
    whole_run = both(procedure, fit=fit)
    run_both(tmp_path, dying, whole_run, expect=(1, 1))
    assert "power cut" not in (tmp_path / "leader.json").read_text() if (tmp_path / "leader.json").exists() else True
    # Its readers are one-shot iterators, whose position does not survive: skip what the six steps took.
    after = both(procedure, fit=fit).replace("batch, test = batches(**DATA[ROLE])", "batch, test = batches_after(6)")
    after = AFTER + after
    results = run_both(tmp_path, after, after)
    assert "from the checkpoint of step 6" in results["leader"].output
    assert "going on in stage train (number 2) after 2 steps" in results["follower"].output
    assert [(row["mode"], row["step"]) for row in history(tmp_path, "leader")] == [
        ("train", 7), ("train", 8), ("eval", 8),
        ("train", 9), ("train", 10), ("train", 11), ("train", 12), ("eval", 12),
    ]  # fmt: skip
    assert_same_weights({**load(tmp_path / "leader.npz"), **load(tmp_path / "follower.npz")}, joint(whole, steps=12))


AFTER = """
def batches_after(steps):
    import tests.federation.problem as p
    data = tf.data.Dataset.from_tensor_slices((p.X, p.LABEL, p.IDS)).repeat().batch(p.BATCH).skip(steps)
    return tf.data.make_one_shot_iterator(data).get_next()
"""


def test_parties_without_a_common_checkpoint_are_refused(tmp_path):
    code = both("train(max_step=2)", fit="checkpoint_dir='ckpt'")
    run_both(tmp_path, code, code)
    lost = code.replace("checkpoint_dir='ckpt'", "checkpoint_dir='other'")
    results = run_both(tmp_path, lost, code, expect=(1, 1))
    for role in ("leader", "follower"):
        assert "the parties hold no checkpoint of the same run and step" in results[role].output


def test_a_missing_checkpoint_dir_on_one_side_is_told(tmp_path):
    results = run_both(tmp_path, both("train(max_step=2)", fit="checkpoint_dir='c'"), both("train(max_step=2)"))
    for role in ("leader", "follower"):
        assert "follower has no checkpoint_dir: if a party dies, this run cannot be recovered" in results[role].output


def test_evaluating_a_checkpoint_that_is_not_there(tmp_path):
    code = both("eval()", fit="checkpoint_dir='nothing'")
    results = run_both(tmp_path, code, code, expect=(1, 1))
    assert "eval() evaluates a checkpoint, and nothing/leader/0 holds none" in results["leader"].output


EMPTY = """
def read(rows, epochs=1):
    x = np.ones([rows, 4], np.float32)
    return tf.data.make_one_shot_iterator(tf.data.Dataset.from_tensor_slices({"x": x}).repeat(epochs).batch(8))
train, test = read(64, 3), read(0 if ROLE == "EMPTY" else 32)
model = efl.FederalModel()
def input_fn(m, mode):
    features = (train if mode == efl.MODE.TRAIN else test).get_next()
    column = {"x": [tf.feature_column.numeric_column("x", 4)]}
    return efl.FederalSample(features, column, ROLE, m.communicator, verify_id=False)
def net(m, s, training):
    if ROLE == "follower":
        h = dense(s["x"], 4, 5, "own")
        m.send("h", h, require_grad=training)
        return h if training else None
    return tf.reduce_mean(tf.square(dense(tf.reshape(m.recv("h", require_grad=training), [-1, 5]), 5, 3, "top")))
model.input_fn(input_fn).loss_fn(lambda m, s: net(m, s, True)).eval_fn(lambda m, s: net(m, s, False))
model.optimizer_fn(optimizer()).compile()
model.fit(efl.procedure_fn.train_and_evaluate(5, 2, max_iter=2), log_step=5)
"""


@pytest.mark.parametrize("empty", ["leader", "follower"])
def test_an_evaluation_without_rows_at_one_party_leaves_the_others_iterator_usable(tmp_path, empty):
    run_both(tmp_path, *[EMPTY.replace("EMPTY", empty)] * 2)
    for role in ("leader", "follower"):
        assert [entry["step"] for entry in history(tmp_path, role) if entry["mode"] == "train"][-1] == 10


def test_a_run_that_trains_nothing_says_so_and_one_that_ends_early_too(tmp_path):
    results = run_both(tmp_path, *[both("train(max_step=5)", {"rows": 0}, {"rows": 0})] * 2)
    for role, result in results.items():
        assert f"{role}: nothing was trained: the data of train ended before the first step. Is there a whole" in (
            result.output
        )
    short = {"rows": 32, "epochs": 1}
    results = run_both(tmp_path, *[both("train(max_step=5)", short, short)] * 2)
    for role, result in results.items():
        assert f"{role}: the data of train ended after 2 of 5 steps" in result.output
        assert "nothing was trained" not in result.output


def test_equal_intervals_of_different_types_are_one_procedure(tmp_path):
    leader, follower = (
        both(f"train_and_evaluate(train_interval={t}, eval_step=np.int64(1), max_iter=2)")
        for t in ("1", "np.float32(1.0)")
    )
    run_both(tmp_path, leader, follower)
    for role in ("leader", "follower"):
        assert [entry["mode"] for entry in history(tmp_path, role)].count("eval") == 2
