"""A session that takes long to close (tf.data may need a minute) keeps nothing waiting but the program's end."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import time
import efl
import tensorflow.compat.v1 as tf

closed = []

def slow(self, plain=tf.Session.close):
    closed.append(self)
    time.sleep(SECONDS)
    plain(self)

tf.Session.close = slow

def model():
    data = tf.data.make_initializable_iterator(tf.data.Dataset.range(40).repeat().batch(4).prefetch(2)).get_next()
    made = efl.Model()
    made.input_fn(lambda m, mode: efl.Sample({"x": tf.cast(data, tf.float32)[:, None]},
                                             {"x": [tf.feature_column.numeric_column("x", 1)]}))
    made.loss_fn(lambda m, s: tf.reduce_mean(tf.square(s["x"] * tf.get_variable("w", [1]) - 1.0)))
    made.optimizer_fn(efl.optimizer_fn.optimizer_setter(tf.train.GradientDescentOptimizer(1e-4)))
    return made.compile()

for _ in range(2):  # the first is collected, the second is left to the end of the program
    tf.reset_default_graph()
    held = model()
    held.fit(efl.procedure_fn.train(max_step=3))
    print("trained", held.steps_trained, held.get_weights()["w"].shape, time.monotonic(), flush=True)
ENDING
"""


@pytest.mark.parametrize(
    ("ending", "seconds"),
    [
        ("", 1.2),
        ("raise SystemExit(3)", 1.2),
        pytest.param("held._close_session(); assert closed", 25.0, marks=pytest.mark.full),
    ],
)
def test_a_session_that_closes_slowly_holds_up_no_training(tmp_path: Path, ending: str, seconds: float) -> None:
    script = SCRIPT.replace("ENDING", ending).replace("SECONDS", str(seconds))
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False
    )
    assert result.returncode == (3 if "Exit" in ending else 0), result.stderr
    first, second = re.findall(r"trained 3 \(1,\) (\S+)", result.stdout)
    assert float(second) - float(first) < 20  # with a close of 25 s in between
