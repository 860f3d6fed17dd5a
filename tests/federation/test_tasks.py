"""Several tasks of two parties: what belongs to which, and how a run of them ends."""

import json

import pytest

import efl  # noqa: F401  (puts TensorFlow into graph mode)

import tensorflow.compat.v1 as tf  # isort: skip
from tests.federation import problem
from tests.federation.harness import assert_same_weights, run_both
from tests.federation.problem import cross_entropy, dense, load

MODEL = """
TRAIN, EVAL = efl.MODE.TRAIN, efl.MODE.EVAL
def data(task, mode):
    return batches(epochs=None if mode is TRAIN else 1)
def net(m, s, task, mode):
    training = mode is TRAIN
    if ROLE == 'follower':
        h = dense(s['x'], 4, 5, 'right', tf.tanh)
        m.send('f', h, require_grad=training, mode=mode, task=task)
        return h
    h = dense(s['x'], 4, 5, 'left', tf.tanh)
    f = m.recv('f', require_grad=training, task=task, shape=[None, 5])
    return cross_entropy(s['label'], dense(tf.concat([h, f], 1), 10, 3, 'top_' + task))
def evaluate(m, s, task):
    y = net(m, s, task, EVAL)
    return None if ROLE == 'follower' else tf.metrics.mean(y)
class Steps(tf.train.SessionRunHook):
    taken = 0
    def after_run(self, context, values):
        self.taken += 1
    def end(self, session):
        json.dump(counts(), open(ROLE + '_steps.json', 'w'))
STEPS = {}
def counts():
    return {key: hook.taken for key, hook in STEPS.items()}
import json
model = efl.FederalModel(seed=1)
def define(task):
    held = {mode: data(task, mode) for mode in efl.MODE}
    model.input_fn(lambda m, mode: sample(m, held[mode], ROLE), task=task)
    model.loss_fn(lambda m, s: net(m, s, task, TRAIN), task=task).eval_fn(lambda m, s: evaluate(m, s, task), task=task)
    model.optimizer_fn(optimizer(), task=task)
    for mode in efl.MODE:
        STEPS[f'{mode.value} {task}'] = Steps()
        model.add_hooks([STEPS[f'{mode.value} {task}']], mode=mode, task=task)
define('a')
define('b')
"""
FIT = "model.compile().fit(efl.procedure_fn.cotrain({}), log_step=1)\n"


def rows(tmp_path, role, mode):
    told = json.loads((tmp_path / f"{role}.json").read_text())
    return [(row["task"], row["step"]) for row in told if row["mode"] == mode]


def trained(order):
    """Weights after one step of each of the tasks in turn, in one process; each task reads its own rows."""
    tf.reset_default_graph()
    trains = {}
    for task in "ab":
        x, label, _ = problem.batches()
        left, right = dense(x[:, :4], 4, 5, "left", tf.tanh), dense(x[:, 4:], 4, 5, "right", tf.tanh)
        loss = cross_entropy(label, dense(tf.concat([left, right], 1), 10, 3, "top_" + task))
        trains[task] = tf.train.GradientDescentOptimizer(0.5).minimize(loss)
    with tf.Session() as session:
        session.run(tf.global_variables_initializer())
        for task in order:
            session.run(trains[task])
        return session.run({v.op.name: v for v in tf.trainable_variables()})


def assert_trained(tmp_path, order):
    assert_same_weights({**load(tmp_path / "leader.npz"), **load(tmp_path / "follower.npz")}, trained(order))


def test_what_names_its_task_belongs_to_it(tmp_path):
    code = MODEL + FIT.format("train_step=2, eval_step=3, max_iter=6")
    run_both(tmp_path, code, code)
    order = [task for task, _ in rows(tmp_path, "leader", "train")]
    assert len(order) == 12
    assert set(order) == {"a", "b"}
    assert rows(tmp_path, "leader", "train") == rows(tmp_path, "follower", "train")
    assert_trained(tmp_path, order)
    expected = {f"train {task}": order.count(task) for task in "ab"}
    expected |= {f"eval {task}": order.count(task) // 2 * 3 for task in "ab"}
    for role in ("leader", "follower"):
        assert json.loads((tmp_path / f"{role}_steps.json").read_text()) == expected


@pytest.mark.parametrize("short", ["leader", "follower"])
def test_the_end_of_one_tasks_data_at_one_party_ends_the_run_of_both(tmp_path, short):
    ends = "def data(task, mode):\n    ends = ROLE == SHORT and task == 'a'\n"
    ends += "    return batches(rows=48, epochs=1) if mode is TRAIN and ends else batches(epochs=None)\n"
    model = MODEL.replace("def net(", ends + "def net(")
    code = f"SHORT = {short!r}\n" + model + FIT.format("train_step=2, eval_step=1")
    run_both(tmp_path, code, code)
    order = [task for task, _ in rows(tmp_path, "leader", "train")]
    assert order.count("a") == 3  # a full turn, and half of one
    assert order[-1] == "a"
    assert rows(tmp_path, "leader", "train") == rows(tmp_path, "follower", "train")
    assert rows(tmp_path, "leader", "eval")[-1] == ("a", len(order))  # what was trained is evaluated
    assert rows(tmp_path, "follower", "eval") == rows(tmp_path, "leader", "eval")
    assert_trained(tmp_path, order)


def test_other_ratios_at_the_peer_are_refused_with_both(tmp_path):
    ratios = {"leader": {"a": 0.5, "b": 0.5}, "follower": {"a": 0.25, "b": 0.75}}
    code = f"RATIOS = {ratios}[own_argument('federal_role')]\n" + MODEL
    code += FIT.format("train_step=1, max_iter=3, task_select_ratio=RATIOS")
    for result in run_both(tmp_path, code, code, expect=(1, 1), timeout=60).values():
        told = result.output[result.output.index("efl.errors.HandshakeError") :]
        assert all(f"task_select_ratio={held}" in told for held in ratios.values()), told


@pytest.mark.parametrize(
    ("call", "told"),
    [
        ("m.send('g', h, task='b')", "send('g'): task=b inside train:a: the peer would wait for ever"),
        ("m.recv('g', task='b')", "recv('g'): task=b inside train:a: the peer would wait for ever"),
        ("m.send('g', h, mode=EVAL)", "send('g'): mode=eval inside train:a: the peer would wait for ever"),
    ],
)
def test_another_task_or_mode_than_the_scopes_is_refused(tmp_path, call, told):
    follower = MODEL.replace("        m.send('f', h, req", f"        {call}\n        m.send('f', h, req")
    leader, fit = MODEL.replace("seed=1", "seed=1, connect_timeout=5.0"), FIT.format("max_iter=1")
    results = run_both(tmp_path, leader + fit, follower + fit, expect=(1, 1))
    assert told in results["follower"].output
    assert f"the follower could not begin: ModelError: {told}" in results["leader"].output


def test_what_is_made_outside_of_a_scope_goes_where_it_says(tmp_path):
    # No function of the model is running, so mode and task are as given.
    outside = """
if ROLE == 'leader':
    model.send('note', tf.constant(3.0), mode=EVAL, task='b')
else:
    whole = evaluate
    def evaluate(m, s, task):
        if task == 'b':
            m.add_metric('note', tf.reduce_sum(m.recv('note')))
        return whole(m, s, task)
"""
    code = MODEL + outside + FIT.format("train_step=1, eval_step=2, max_iter=6")
    run_both(tmp_path, code, code)
    told = json.loads((tmp_path / "follower.json").read_text())
    evaluated = [row for row in told if row["mode"] == "eval" and row["task"] == "b"]
    assert evaluated
    assert all(row["note"] == 3.0 for row in evaluated)
    assert all("note" not in row for row in told if row["task"] == "a" or row["mode"] == "train")
