"""No variable is updated before every read of its step, and the step's messages, are over.

A model that reads each variable once cannot tell: its gradients are made of the value that was read. So these models
read a variable again, after a late message of the peer, and send the difference of the two values: it has to be none.
"""

import json

import numpy as np
import pytest

import efl  # noqa: F401  (puts TensorFlow into graph mode)

import tensorflow.compat.v1 as tf  # isort: skip
from tests.federation.harness import assert_same_weights, run_both
from tests.federation.problem import cross_entropy, dense, load
from tests.federation.test_parity import joint

# With 10 ms on its way, a message comes long after a gradient that needs nothing of the peer.
REREAD = """
import random, time
def late(x, seconds=lambda: 0.01):
    def wait(value):
        time.sleep(seconds())
        return value
    return tf.ensure_shape(tf.numpy_function(wait, [x], x.dtype), x.shape)
def send_change(m, s, layer, y, message):
    with tf.control_dependencies([message]):
        again = dense(s['x'], 4, y.shape[1], layer, tf.tanh)
    m.send('change_' + layer, again - y)
def log_change(m, layer):
    m.add_metric('change_' + layer, tf.reduce_max(tf.abs(m.recv('change_' + layer))))
"""
TRAIN = """
batch = batches()
model = efl.FederalModel()
model.input_fn(lambda m, mode: sample(m, batch, ROLE)).loss_fn(loss_fn).optimizer_fn(optimizer())
model.compile()
"""
FIT = "model.fit(efl.procedure_fn.train(max_step=10), log_step=1)\n"

LEADER = """
def loss_fn(m, s):
    y = dense(s['x'], 4, 3, 'left', tf.tanh)
    send_change(m, s, 'left', y, m.recv('f'))
    return cross_entropy(s['label'], y)
"""
FOLLOWER = """
def loss_fn(m, s):
    y = dense(s['x'], 4, 3, 'right', tf.tanh)
    m.send('f', late(y))
    log_change(m, 'left')
    return cross_entropy(s['label'], y)
"""
BACKWARD = """
mine, other = ('left', 'right') if ROLE == 'leader' else ('right', 'left')
def loss_fn(m, s):
    with tf.variable_scope('top_' + mine, reuse=tf.AUTO_REUSE):
        top = tf.get_variable('kernel', initializer=start_value('top_' + mine, (10, 3)))
    first = top.read_value()
    @tf.custom_gradient
    def read_again_on_the_way_back(y):
        def gradient(dy):
            with tf.control_dependencies([late(dy)]):
                return dy + tf.reduce_sum(tf.abs(top.read_value() - first))
        return tf.identity(y), gradient
    y = read_again_on_the_way_back(dense(s['x'], 4, 5, mine, tf.tanh))
    m.send('f_' + mine, y, require_grad=True)
    f = m.recv('f_' + other, require_grad=True, shape=[None, 5])
    return cross_entropy(s['label'], dense(tf.concat([y, f], 1), 10, 3, 'top_' + mine))
"""
EACH = """
mine, other = ('left', 'right') if ROLE == 'leader' else ('right', 'left')
def loss_fn(m, s):
    y = dense(s['x'], 4, 3, mine, tf.tanh)
    m.send('f_' + mine, late(y))
    send_change(m, s, mine, y, m.recv('f_' + other))
    log_change(m, other)
    return cross_entropy(s['label'], y)
"""


def apart(x, label, ids):
    left, right = dense(x[:, :4], 4, 3, "left", tf.tanh), dense(x[:, 4:], 4, 3, "right", tf.tanh)
    return cross_entropy(label, left) + cross_entropy(label, right)


def logged(tmp_path, role, name):
    return [row[name] for row in json.loads((tmp_path / f"{role}.json").read_text())]


def both_weights(tmp_path):
    return {**load(tmp_path / "leader.npz"), **load(tmp_path / "follower.npz")}


def test_a_variable_that_is_read_again_after_the_peers_message_is_still_the_steps(tmp_path):
    run_both(tmp_path, REREAD + LEADER + TRAIN + FIT, REREAD + FOLLOWER + TRAIN + FIT)
    assert logged(tmp_path, "follower", "change_left") == [0.0] * 10
    assert_same_weights(both_weights(tmp_path), joint(apart))


def test_variables_that_both_read_again_after_a_message_of_the_other(tmp_path):
    run_both(tmp_path, REREAD + EACH + TRAIN + FIT, REREAD + EACH + TRAIN + FIT)
    assert logged(tmp_path, "follower", "change_left") == [0.0] * 10
    assert logged(tmp_path, "leader", "change_right") == [0.0] * 10
    assert_same_weights(both_weights(tmp_path), joint(apart))


LOOKS = """
def loss_fn(m, s):
    y = dense(s['x'], 4, 3, 'left', tf.tanh)
    with tf.control_dependencies([m.recv('f')]):
        change = tf.reduce_max(tf.abs(dense(s['x'], 4, 3, 'left', tf.tanh) - y))
        step = m.global_step + 0
    total = tf.get_variable('total', [], trainable=False, initializer=tf.zeros_initializer)
    LOOK
    return cross_entropy(s['label'], y)
"""
TOTAL = """
total, = [v for v in tf.global_variables() if v.op.name == 'total']
np.save('total.npy', model.session.raw_session().run(total))
"""


@pytest.mark.parametrize(
    ("look", "expected"),
    [
        ("m.add_metric('seen', change)", [0.0] * 10),
        ("m.add_metric('seen', tf.metrics.mean(change))", [0.0] * 10),
        ("m.add_metric('seen', step)", list(range(10))),
        ("m.add_train_op(total.assign_add(change))", None),
        ("tf.add_to_collection(tf.GraphKeys.UPDATE_OPS, total.assign_add(change))", None),
    ],
    ids=["metric", "metric_update", "global_step", "train_op", "update_op"],
)
def test_what_looks_at_a_variable_in_a_step_sees_the_steps(tmp_path, look, expected):
    leader = LOOKS.replace("LOOK", look)
    follower = FOLLOWER.replace("    log_change(m, 'left')\n", "")
    run_both(tmp_path, REREAD + leader + TRAIN + FIT + TOTAL, REREAD + follower + TRAIN + FIT)
    if expected is None:
        assert np.load(tmp_path / "total.npy") == 0.0
    else:
        assert logged(tmp_path, "leader", "seen") == expected


# Gradients in both directions, which drive the layers that are read again, and delays wherever a message passes.
STRESS = """
from efl import _inbox
put = _inbox.Inbox.put
def put_late(self, array):
    time.sleep(random.random() * 0.003)
    put(self, array)
_inbox.Inbox.put = put_late
mine, other = ('left', 'right') if ROLE == 'leader' else ('right', 'left')
def loss_fn(m, s):
    y = dense(s['x'], 4, 5, mine, tf.tanh)
    m.send('f_' + mine, y, require_grad=True)
    f = m.recv('f_' + other, require_grad=True, shape=[None, 5])
    m.send('late_' + mine, late(y, lambda: random.random() * 0.006))
    send_change(m, s, mine, y, m.recv('late_' + other))
    log_change(m, other)
    return cross_entropy(s['label'], dense(tf.concat([y, f], 1), 10, 3, 'top_' + mine))
"""
REPEAT = """
starts = {v.op.name: start_value(v.op.name.split('/')[0], tuple(v.shape.as_list())) if 'kernel' in v.op.name
          else np.zeros(v.shape.as_list(), np.float32) for v in tf.trainable_variables()}
runs = []
for _ in range(50):
    model.set_weights(starts)
    model.fit(efl.procedure_fn.train(max_step=6), log_step=1)
    assert [row['change_' + other] for row in model.history] == [0.0] * 6
    runs.append(model.get_weights())
for name in starts:
    assert all(np.array_equal(run[name], runs[0][name]) for run in runs), name
"""


def test_many_random_delays_change_nothing(tmp_path):
    run_both(tmp_path, REREAD + STRESS + TRAIN + REPEAT, REREAD + STRESS + TRAIN + REPEAT, timeout=240)

    def linked(x, label, ids):
        left, right = dense(x[:, :4], 4, 5, "left", tf.tanh), dense(x[:, 4:], 4, 5, "right", tf.tanh)
        first = cross_entropy(label, dense(tf.concat([left, right], 1), 10, 3, "top_left"))
        return first + cross_entropy(label, dense(tf.concat([right, left], 1), 10, 3, "top_right"))

    assert_same_weights(both_weights(tmp_path), joint(linked, steps=6))


def test_a_variable_that_a_gradient_reads_is_not_updated_before(tmp_path):
    code = REREAD + BACKWARD + TRAIN + FIT
    run_both(tmp_path, code, code)

    def linked(x, label, ids):
        left, right = dense(x[:, :4], 4, 5, "left", tf.tanh), dense(x[:, 4:], 4, 5, "right", tf.tanh)
        return sum(
            cross_entropy(label, dense(tf.concat(pair, 1), 10, 3, f"top_{name}"))
            for name, pair in (("left", [left, right]), ("right", [right, left]))
        )

    assert_same_weights(both_weights(tmp_path), joint(linked))
