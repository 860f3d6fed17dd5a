"""Ctrl-C in a script of one process: one line, and no traceback."""

import re
import signal
from pathlib import Path

import pytest

from tests.parties import start_party

ROOT = str(Path(__file__).resolve().parents[2])
# A signal that comes just before one long sleep would be seen after it.
MODEL = """
import efl, os, signal, sys, time
import tensorflow.compat.v1 as tf
def idle():
    while True:
        time.sleep(0.05)
batch = tf.data.make_one_shot_iterator(tf.data.Dataset.from_tensors({'x': [[1.0]]}).repeat()).get_next()
model = efl.Model()
model.input_fn(lambda m, mode: efl.Sample(batch, {'x': [tf.feature_column.numeric_column('x')]}))
w = tf.get_variable('w', [], initializer=tf.zeros_initializer())
def loss_fn(m, s):
    return tf.square(tf.reduce_sum(s['x'] * w - 1))
model.loss_fn(loss_fn).optimizer_fn(efl.optimizer_fn.optimizer_setter(tf.train.GradientDescentOptimizer(0.1)))
"""
FIT = "model.compile().fit(efl.procedure_fn.train(), log_step=20)\n"


def interrupted(tmp_path, code, when):
    party = start_party("", MODEL + code, cwd=tmp_path, env={"PYTHONPATH": ROOT})
    try:
        party.wait_for(when)
        party.kill(signal.SIGINT)
        return party.wait(20)
    finally:
        party.kill()


def test_a_run_ends_with_one_line_and_the_exit_code_of_an_interrupted_program(tmp_path):
    result = interrupted(tmp_path, FIT + "print('not reached')", "step=40")
    assert result.returncode == -signal.SIGINT
    assert "Traceback" not in result.output
    assert "not reached" not in result.output
    last = result.output.splitlines()[-1]
    assert re.fullmatch(r"[\d:]{8} local: interrupted after step \d+", last)


def test_so_does_compiling(tmp_path):
    code = "model.loss_fn(lambda m, s: (print('IN LOSS_FN', flush=True), idle()))\nmodel.compile()"
    result = interrupted(tmp_path, code, "IN LOSS_FN")
    assert result.returncode == -signal.SIGINT
    assert result.output.splitlines()[-1] == "the model: interrupted in compile()"
    assert "Traceback" not in result.output


def test_a_script_may_catch_it_and_look_at_what_was_trained(tmp_path):
    code = (
        f"try:\n    {FIT}except KeyboardInterrupt:\n    print('trained', model.steps_trained, model.get_weights()['w'])"
    )
    result = interrupted(tmp_path, code, "step=40")
    assert result.returncode == 0, result.output
    assert re.search(r"trained \d+ 0\.9", result.output)


def test_another_ctrl_c_of_the_script_shows_its_traceback(tmp_path):
    code = f"try:\n    {FIT}except KeyboardInterrupt:\n    print('once', flush=True)\nidle()  # the scripts own"
    party = start_party("", MODEL + code, cwd=tmp_path, env={"PYTHONPATH": ROOT})
    for when in ("step=40", "once"):
        party.wait_for(when)
        party.kill(signal.SIGINT)
    result = party.wait(20)
    assert result.returncode == -signal.SIGINT
    assert "Traceback" in result.output
    assert "the scripts own" in result.output


def test_a_handler_of_the_scripts_own_stays_in_charge(tmp_path):
    code = "signal.signal(signal.SIGINT, lambda *_: (print('own handler'), os._exit(3)))\n" + FIT
    result = interrupted(tmp_path, code, "step=40")
    assert result.returncode == 3, result.output
    assert "own handler" in result.output
    assert "interrupted" not in result.output


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_last_step_of_a_fit_is_not_forgotten(tmp_path, sent):
    code = f"""
def late(value):
    os.kill(os.getpid(), {int(sent)})
    time.sleep(0.3)
    return value
def loss_fn(m, s):
    return tf.square(tf.reshape(tf.numpy_function(late, [tf.reduce_sum(s['x'])], tf.float32), []) * w - 1)
model.loss_fn(loss_fn).compile()
model.fit(efl.procedure_fn.train(max_step=1))
print('not reached')
"""
    result = start_party("", MODEL + code, cwd=tmp_path, env={"PYTHONPATH": ROOT}).wait(60)
    assert result.returncode == {signal.SIGINT: -signal.SIGINT, signal.SIGTERM: 143}[sent], result.output
    assert "not reached" not in result.output
    told = {signal.SIGINT: "interrupted after step 1", signal.SIGTERM: r"stopped after step 1 \(SIGTERM\)"}[sent]
    assert re.search(f"local: {told}", result.output), result.output
