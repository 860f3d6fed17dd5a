"""A federated run equals the same model trained in one process, step by step. The reference is plain TensorFlow."""

import json
import re

import numpy as np
import pytest

import efl  # noqa: F401  (puts TensorFlow into graph mode)

import tensorflow.compat.v1 as tf  # isort: skip
from tests.federation import problem
from tests.federation.harness import assert_same_weights, run_both
from tests.federation.problem import cross_entropy, dense, load

STEPS = 10


def joint(loss_of, steps=STEPS, rate=0.5, before=None, optimizer=None):
    """Trains in one process with plain TensorFlow; returns the weights."""
    tf.reset_default_graph()
    batch = problem.batches()
    loss = loss_of(*batch)
    make = optimizer or (lambda: tf.train.GradientDescentOptimizer(rate))
    train = make().minimize(loss)
    with tf.Session() as session:
        session.run(tf.global_variables_initializer())
        for _ in range(steps):
            session.run(train)
        return session.run({v.op.name: v for v in tf.trainable_variables()})


def both_weights(tmp_path):
    return {**load(tmp_path / "leader.npz"), **load(tmp_path / "follower.npz")}


LEADER = """
batch = batches()
def loss_fn(m, s):
    h = dense(s['x'], 4, 5, 'left', tf.tanh)
    f = tf.reshape(m.recv('f', require_grad=True), [-1, 5])
    return cross_entropy(s['label'], dense(tf.concat([h, f], 1), 10, 3, 'top'))
model = efl.FederalModel()
model.input_fn(lambda m, mode: sample(m, batch, ROLE)).loss_fn(loss_fn).optimizer_fn(optimizer())
model.compile().fit(efl.procedure_fn.train(max_step=10))
"""
FOLLOWER = """
batch = batches()
def loss_fn(m, s):
    h = dense(s['x'], 4, 5, 'right', tf.tanh)
    m.send('f', h, require_grad=True)
    return h
model = efl.FederalModel()
model.input_fn(lambda m, mode: sample(m, batch, ROLE)).loss_fn(loss_fn).optimizer_fn(optimizer())
model.compile().fit(efl.procedure_fn.train(max_step=10))
"""


def whole(x, label, ids):
    left = dense(x[:, :4], 4, 5, "left", tf.tanh)
    right = dense(x[:, 4:], 4, 5, "right", tf.tanh)
    return cross_entropy(label, dense(tf.concat([left, right], 1), 10, 3, "top"))


def test_a_party_without_a_loss_is_driven_by_the_peers_gradient(tmp_path):
    results = run_both(tmp_path, LEADER, FOLLOWER)
    expected = joint(whole)
    assert_same_weights(both_weights(tmp_path), expected)
    start = problem.start_value("right", (4, 5))
    assert np.abs(expected["right/kernel"] - start).max() > 0.01  # it did learn
    assert "loss=-" in results["follower"].output
    assert "role=leader mode=train step=10 loss=" in results["leader"].output


def test_loss_fn_that_returns_none(tmp_path):
    run_both(tmp_path, LEADER, FOLLOWER.replace("    return h\n", "    return None\n"))
    assert_same_weights(both_weights(tmp_path), joint(whole))


def test_a_loss_vector_that_is_also_sent_trains_its_own_party(tmp_path):
    # Sent without require_grad, nothing comes back for it: it is the follower's loss, and reduced as any other.
    leader = """
    batch = batches()
    def loss_fn(m, s):
        m.add_metric('theirs', tf.reduce_mean(m.recv('losses')))
        return cross_entropy(s['label'], dense(s['x'], 4, 3, 'left'))
    model = efl.FederalModel()
    model.input_fn(lambda m, mode: sample(m, batch, ROLE)).loss_fn(loss_fn).optimizer_fn(optimizer())
    model.compile().fit(efl.procedure_fn.train(max_step=10))
    """
    follower = """
    batch = batches()
    def loss_fn(m, s):
        logits = dense(s['x'], 4, 3, 'right')
        losses = tf.nn.softmax_cross_entropy_with_logits_v2(one_hot(s['label']), logits)
        m.send('losses', losses)
        return losses
    model = efl.FederalModel()
    model.input_fn(lambda m, mode: sample(m, batch, ROLE)).loss_fn(loss_fn).optimizer_fn(optimizer())
    model.compile().fit(efl.procedure_fn.train(max_step=10))
    """

    def loss(x, label, ids):
        left = cross_entropy(label, dense(x[:, :4], 4, 3, "left"))
        return left + cross_entropy(label, dense(x[:, 4:], 4, 3, "right"))

    results = run_both(tmp_path, leader, follower)
    assert_same_weights(both_weights(tmp_path), joint(loss))
    (told,) = re.findall(r"step=10 loss=([\d.]+)", results["follower"].output)
    (heard,) = re.findall(r"step=10 .*theirs=([\d.]+)", results["leader"].output)
    assert float(told) == pytest.approx(float(heard), rel=1e-3)


def test_the_ops_of_gradients_hold_what_travels(tmp_path):
    # The leader's loss is the mean of f², so 2 f / size is what it returns for the f that it received.
    fetch = """
class Fetch(tf.train.SessionRunHook):
    def __init__(self, ops):
        self.ops, self.seen = ops, []
    def before_run(self, context):
        return tf.train.SessionRunArgs(self.ops)
    def after_run(self, context, values):
        self.seen.append(values.results)
    def end(self, session):
        np.save(ROLE + '.npy', self.seen)
"""
    ops = """
ops, = [held for held in (model.recv_grad_ops, model.require_grad_ops) if held]
assert list(ops) == [efl.TaskScope(efl.MODE.TRAIN, None)] and list(*ops.values()) == ['f']
hook = Fetch(ops[efl.TaskScope(efl.MODE.TRAIN, None)]['f'])
model.add_hooks([hook])
model.fit(efl.procedure_fn.train(max_step=3))
"""
    fit = "model.compile().fit(efl.procedure_fn.train(max_step=10))\n"
    leader = """
batch = batches()
def loss_fn(m, s):
    return tf.reduce_mean(tf.square(m.recv('f', require_grad=True, shape=[None, 5])))
model = efl.FederalModel()
model.input_fn(lambda m, mode: sample(m, batch, ROLE)).loss_fn(loss_fn)
"""
    run_both(tmp_path, fetch + leader + "model.compile()\n" + ops,
             fetch + FOLLOWER.replace(fit, "model.compile()\n") + ops)  # fmt: skip
    received, returned = np.load(tmp_path / "leader.npy"), np.load(tmp_path / "follower.npy")
    assert received.shape == returned.shape == (3, problem.BATCH, 5)
    np.testing.assert_allclose(returned, 2 * received / received[0].size, rtol=1e-5)
    first = np.tanh(problem.X[: problem.BATCH, 4:] @ problem.start_value("right", (4, 5)))
    np.testing.assert_allclose(received[0], first, rtol=1e-5)


def test_gradients_in_both_directions_with_two_losses(tmp_path):
    # Each party has a loss of its own and each needs the other's first layer: the joint objective is the sum.
    leader = """
    batch = batches()
    def loss_fn(m, s):
        a = dense(s['x'], 4, 5, 'left', tf.tanh)
        m.send('a', a, require_grad=True)
        b = tf.reshape(m.recv('b', require_grad=True), [-1, 5])
        return cross_entropy(s['label'], dense(tf.concat([a, b], 1), 10, 3, 'top_leader'))
    model = efl.FederalModel()
    model.input_fn(lambda m, mode: sample(m, batch, ROLE)).loss_fn(loss_fn).optimizer_fn(optimizer())
    model.compile().fit(efl.procedure_fn.train(max_step=10))
    """
    follower = """
    batch = batches()
    def loss_fn(m, s):
        b = dense(s['x'], 4, 5, 'right', tf.tanh)
        m.send('b', b, require_grad=True)
        a = tf.reshape(m.recv('a', require_grad=True), [-1, 5])
        return cross_entropy(s['label'], dense(a * b, 5, 3, 'top_follower'))
    model = efl.FederalModel()
    model.input_fn(lambda m, mode: sample(m, batch, ROLE)).loss_fn(loss_fn).optimizer_fn(optimizer())
    model.compile().fit(efl.procedure_fn.train(max_step=10))
    """

    def loss(x, label, ids):
        a = dense(x[:, :4], 4, 5, "left", tf.tanh)
        b = dense(x[:, 4:], 4, 5, "right", tf.tanh)
        first = cross_entropy(label, dense(tf.concat([a, b], 1), 10, 3, "top_leader"))
        return first + cross_entropy(label, dense(a * b, 5, 3, "top_follower"))

    run_both(tmp_path, leader, follower)
    assert_same_weights(both_weights(tmp_path), joint(loss))


def test_several_sends_and_receives_of_several_dtypes(tmp_path):
    leader = """
    batch = batches()
    def loss_fn(m, s):
        one = tf.reshape(m.recv('one', require_grad=True), [-1, 5])
        two = m.recv('two', require_grad=True, shape=[None, 2])
        label = m.recv('label', dtype=tf.int32)
        weight = m.recv('weight', dtype=tf.float64)
        names = m.recv('names', dtype=tf.string)
        m.send('lengths', tf.strings.length(names))
        h = dense(s['x'], 4, 5, 'left', tf.tanh)
        logits = dense(tf.concat([h, one, two], 1), 12, 3, 'top')
        return tf.cast(tf.reshape(weight, []), tf.float32) * cross_entropy(label, logits)
    model = efl.FederalModel()
    model.input_fn(lambda m, mode: sample(m, batch, ROLE)).loss_fn(loss_fn).optimizer_fn(optimizer())
    model.compile().fit(efl.procedure_fn.train(max_step=10))
    """
    follower = """
    batch = batches()
    def loss_fn(m, s):
        m.send('one', dense(s['x'], 4, 5, 'right', tf.tanh), require_grad=True)
        m.send('two', dense(s['x'], 4, 2, 'more'), require_grad=True)
        m.send('label', tf.cast(s['label'], tf.int32))
        m.send('weight', tf.constant(2.0, tf.float64))
        m.send('names', tf.constant(['a', '', 'five!']))
        m.add_metric('length', tf.reduce_sum(m.recv('lengths', tf.int32)))
    model = efl.FederalModel()
    model.input_fn(lambda m, mode: sample(m, batch, ROLE)).loss_fn(loss_fn).optimizer_fn(optimizer())
    model.compile().fit(efl.procedure_fn.train(max_step=10))
    """

    def loss(x, label, ids):
        left = dense(x[:, :4], 4, 5, "left", tf.tanh)
        right, more = dense(x[:, 4:], 4, 5, "right", tf.tanh), dense(x[:, 4:], 4, 2, "more")
        return 2.0 * cross_entropy(label, dense(tf.concat([left, right, more], 1), 12, 3, "top"))

    run_both(tmp_path, leader, follower)
    assert_same_weights(both_weights(tmp_path), joint(loss))
    assert json.loads((tmp_path / "follower.json").read_text())[-1]["length"] == 6


@pytest.mark.parametrize(
    ("code", "make"),
    [
        ("tf.train.AdamOptimizer(0.05)", lambda: tf.train.AdamOptimizer(0.05)),
        ("tf.train.MomentumOptimizer(0.1, 0.9)", lambda: tf.train.MomentumOptimizer(0.1, 0.9)),
    ],
)
def test_optimizers_with_state(tmp_path, code, make):
    edit = "optimizer_fn(optimizer())", f"optimizer_fn(efl.optimizer_fn.optimizer_setter({code}))"
    run_both(tmp_path, LEADER.replace(*edit), FOLLOWER.replace(*edit))
    assert_same_weights(both_weights(tmp_path), joint(whole, optimizer=make))


def test_an_optimizer_that_computes_its_own_gradients(tmp_path):
    # Loss scaling, clipping and privacy replace compute_gradients; the peer's gradient must reach them all the same.
    own = """
    class Halving(tf.train.GradientDescentOptimizer):
        def compute_gradients(self, loss, var_list=None, **kwargs):
            pairs = super().compute_gradients(loss, var_list, **kwargs)
            return [(g if g is None else 0.5 * g, v) for g, v in pairs]
    def optimizer():
        return efl.optimizer_fn.optimizer_setter(Halving(1.0))
    """
    import textwrap

    own = textwrap.dedent(own)
    run_both(tmp_path, own + LEADER, own + FOLLOWER)
    assert_same_weights(both_weights(tmp_path), joint(whole, rate=0.5))


def test_optimizers_by_scope(tmp_path):
    edit = (
        "optimizer_fn(optimizer())",
        "optimizer_fn(efl.optimizer_fn.scope_optimizer({'left': tf.train.GradientDescentOptimizer(0.5), "
        "'top': tf.train.MomentumOptimizer(0.1, 0.9)}))",
    )
    run_both(tmp_path, LEADER.replace(*edit), FOLLOWER)
    tf.reset_default_graph()
    loss = whole(*problem.batches())
    by_name = {v.op.name: v for v in tf.trainable_variables()}
    top = [v for name, v in by_name.items() if name.startswith("top/")]
    rest = [v for name, v in by_name.items() if not name.startswith("top/")]
    gradients = dict(zip(rest + top, tf.gradients(loss, rest + top), strict=True))
    with tf.control_dependencies(list(gradients.values())):
        train = tf.group(
            tf.train.GradientDescentOptimizer(0.5).apply_gradients([(gradients[v], v) for v in rest]),
            tf.train.MomentumOptimizer(0.1, 0.9).apply_gradients([(gradients[v], v) for v in top]),
        )
    with tf.Session() as session:
        session.run(tf.global_variables_initializer())
        for _ in range(STEPS):
            session.run(train)
        expected = session.run(by_name)
    assert_same_weights(both_weights(tmp_path), expected)


def test_train_and_evaluate(tmp_path):
    leader = """
    batch, test = batches(), batches(rows=40, epochs=1)
    def net(m, s, training):
        h = dense(s['x'], 4, 5, 'left', tf.tanh)
        f = tf.reshape(m.recv('f', require_grad=training), [-1, 5])
        logits = dense(tf.concat([h, f], 1), 10, 3, 'top')
        label = tf.reshape(s['label'], [-1])
        m.add_metric('accuracy', tf.metrics.accuracy(tf.cast(label, tf.int64), tf.argmax(logits, 1)))
        return cross_entropy(s['label'], logits)
    def eval_fn(m, s):
        return tf.metrics.mean(net(m, s, False))
    model = efl.FederalModel()
    model.input_fn(lambda m, mode: sample(m, batch if mode == efl.MODE.TRAIN else test, ROLE))
    model.loss_fn(lambda m, s: net(m, s, True)).eval_fn(eval_fn).optimizer_fn(optimizer())
    model.compile().fit(efl.procedure_fn.train_and_evaluate(train_step=5, max_iter=2), log_step=5)
    """
    follower = """
    batch, test = batches(), batches(rows=40, epochs=1)
    def net(m, s, training):
        h = dense(s['x'], 4, 5, 'right', tf.tanh)
        m.send('f', h, require_grad=training)
        return h
    def eval_fn(m, s):
        net(m, s, False)
    model = efl.FederalModel()
    model.input_fn(lambda m, mode: sample(m, batch if mode == efl.MODE.TRAIN else test, ROLE))
    model.loss_fn(lambda m, s: net(m, s, True)).eval_fn(eval_fn).optimizer_fn(optimizer())
    model.compile().fit(efl.procedure_fn.train_and_evaluate(train_step=5, max_iter=2), log_step=5)
    """
    run_both(tmp_path, leader, follower)
    expected = joint(whole)
    assert_same_weights(both_weights(tmp_path), expected)
    evaluations = [row for row in json.loads((tmp_path / "leader.json").read_text()) if row["mode"] == "eval"]
    assert [row["batches"] for row in evaluations] == [3, 3]  # the reader started over; the last batch is short
    for row, steps in zip(evaluations, (5, 10), strict=True):
        weights = joint(whole, steps=steps)
        left = np.tanh(problem.X[:40, :4] @ weights["left/kernel"] + weights["left/bias"])
        right = np.tanh(problem.X[:40, 4:] @ weights["right/kernel"] + weights["right/bias"])
        logits = np.concatenate([left, right], 1) @ weights["top/kernel"] + weights["top/bias"]
        assert row["accuracy"] == pytest.approx(np.mean(logits.argmax(1) == problem.LABEL[:40]), abs=1e-6)


TWO_TASKS = """
batch, test = batches(), batches(rows=32, epochs=1)
def net(task, m, s, training):
    {exchange}
def define(task):
    model.input_fn(lambda m, mode: sample(m, batch if mode == efl.MODE.TRAIN else test, ROLE), task=task)
    model.loss_fn(lambda m, s: net(task, m, s, True), task=task)
    model.eval_fn(lambda m, s: None if net(task, m, s, False) is None else None, task=task)
    model.optimizer_fn(efl.optimizer_fn.optimizer_setter({optimizer}), task=task)
model = efl.FederalModel(seed={seed})
define('a')
define('b')
ratios = {{'a': 0.5, 'b': 0.5}}
model.compile().fit(efl.procedure_fn.cotrain(train_step=2, eval_step=1, max_iter=5, task_select_ratio=ratios),
                    log_step=1)
"""


@pytest.mark.parametrize(("kind", "rate"), [("GradientDescentOptimizer", 0.5), ("AdamOptimizer", 0.01)])
def test_two_tasks_that_share_layers_are_trained_by_turns(tmp_path, kind, rate):
    optimizer = f"tf.train.{kind}({rate})"
    leader = TWO_TASKS.format(
        seed=0,
        optimizer=optimizer,
        exchange="""h = dense(s['x'], 4, 5, 'left', tf.tanh)
    f = tf.reshape(m.recv('f', require_grad=training), [-1, 5])
    return cross_entropy(s['label'], dense(tf.concat([h, f], 1), 10, 3, 'top_' + task))""",
    )
    follower = TWO_TASKS.format(
        seed="None",  # the leader's seed decides for both
        optimizer=optimizer,
        exchange="""h = dense(s['x'], 4, 5, 'right', tf.tanh)
    m.send('f', h, require_grad=training)
    return h""",
    )
    run_both(tmp_path, leader, follower)
    rows = [row for row in json.loads((tmp_path / "leader.json").read_text()) if row["mode"] == "train"]
    order = [row["task"] for row in rows]
    assert len(order) == STEPS
    assert set(order) == {"a", "b"}
    tf.reset_default_graph()
    batch = problem.batches()  # both tasks read one iterator
    x, label, _ = batch
    left, right = dense(x[:, :4], 4, 5, "left", tf.tanh), dense(x[:, 4:], 4, 5, "right", tf.tanh)
    trains = {}
    for task in "ab":
        loss = cross_entropy(label, dense(tf.concat([left, right], 1), 10, 3, "top_" + task))
        trains[task] = getattr(tf.train, kind)(rate).minimize(loss)
    with tf.Session() as session:
        session.run(tf.global_variables_initializer())
        for task in order:
            session.run(trains[task])
        expected = session.run({v.op.name: v for v in tf.trainable_variables()})
    assert_same_weights(both_weights(tmp_path), expected)
