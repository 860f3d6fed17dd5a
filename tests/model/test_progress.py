"""On a terminal a run shows a progress bar with the time left; elsewhere plain lines only."""

import os
import pty
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import efl
import tensorflow.compat.v1 as tf
batch = tf.data.make_one_shot_iterator(tf.data.Dataset.from_tensors({'x': [[1.0]]}).repeat()).get_next()
model = efl.Model()
model.input_fn(lambda m, mode: efl.Sample(batch, {'x': [tf.feature_column.numeric_column('x')]}))
w = tf.get_variable('w', [], initializer=tf.zeros_initializer())
model.loss_fn(lambda m, s: tf.square(tf.reduce_sum(s['x'] * w - 1)))
model.optimizer_fn(efl.optimizer_fn.optimizer_setter(tf.train.GradientDescentOptimizer(0.1)))
model.compile().fit(efl.procedure_fn.train(max_step=40), log_step=20)
"""


def run(stdout):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "120", "TF_CPP_MIN_LOG_LEVEL": "3"}
    return subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=stdout, stderr=subprocess.DEVNULL, env=env)


def test_a_terminal_shows_the_bar_and_a_file_does_not():
    outer, inner = pty.openpty()
    on_terminal, plain = run(inner), run(subprocess.PIPE)
    os.close(inner)
    shown = b""
    while True:
        try:
            part = os.read(outer, 4096)
        except OSError:  # how Linux tells that the other end is closed
            break
        if not part:
            break
        shown += part
    written = plain.communicate()[0].decode()
    assert on_terminal.wait() == plain.returncode == 0
    text = shown.decode(errors="replace")
    for line in ("step=20", "step=40"):
        assert line in text
        assert line in written
    assert "40/40" in text
    assert "\x1b[" in text
    assert "\x1b[" not in written
    assert "40/40" not in written
