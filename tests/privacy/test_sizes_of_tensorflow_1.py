"""Scripts that begin with ``tf.disable_v2_behavior()``, by which an unknown size in a shape is an object, not None.

What it turns off is off for the whole process, so each script has one of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import efl

pytest.importorskip("dp_accounting")

BEFORE = "import tensorflow.compat.v1 as tf\ntf.disable_v2_behavior()\nimport efl\n"
AFTER = "import efl\nimport tensorflow.compat.v1 as tf\ntf.disable_v2_behavior()\ntf.enable_resource_variables()\n"
MODEL = """
import numpy as np
X = np.ones((24, 3), np.float32)
def train(dataset, loss_fn, column="x", steps=2, **config):
    tf.reset_default_graph()
    batch = tf.data.make_initializable_iterator(dataset().repeat()).get_next()
    batch = batch if isinstance(batch, dict) else {"x": batch}
    columns = {column: [tf.feature_column.numeric_column(column, batch[column].shape.as_list()[1])]}
    m = efl.Model(seed=1).input_fn(lambda m, mode: efl.Sample({column: batch[column]}, columns))
    optimizer = efl.DPGradientDescentGaussianOptimizer(1.0, 2.0, learning_rate=0.1)
    m.loss_fn(lambda m, s: loss_fn(s, batch)).optimizer_fn(efl.optimizer_fn.optimizer_setter(optimizer))
    m.compile(opt_config=config)
    m.fit(efl.procedure_fn.train(max_step=steps))
    return m
def dense(s, batch):
    return tf.reduce_sum(tf.square(tf.layers.dense(s["x"], 2)), 1)
"""
PROGRAMS = """
def sliced():
    return tf.data.Dataset.from_tensor_slices(X).batch(8)
def generated():
    return tf.data.Dataset.from_generator(lambda: iter(X), tf.float32, [3]).batch(8)
def static():
    return generated().map(lambda v: tf.reshape(v, [8, 3]))
def tied(s, batch):
    w = tf.get_variable("w", [3, 2])
    return tf.reduce_sum(tf.matmul(tf.matmul(s["x"], w), w, transpose_b=True), 1)
def recurrent(s, batch):
    steps = tf.unstack(tf.reshape(s["x"], [-1, 3, 1]), axis=1)
    return tf.nn.static_rnn(tf.nn.rnn_cell.BasicLSTMCell(2), steps, dtype=tf.float32)[0][-1][:, 0]
for dataset in (sliced, generated, static):
    train(dataset, dense, NUM_EXAMPLES=24)
assert train(sliced, dense, NUM_EXAMPLES=24, BATCH_SIZE=8).privacy_spent(1e-3).rows[0].epsilon > 0
train(sliced, tied, NUM_EXAMPLES=24)
train(sliced, recurrent, NUM_EXAMPLES=24)
print("trained")
"""
# The first batch has eight contexts, the second one, beside eight rows.
OTHER_ROWS = """
def batches():
    made = lambda: iter([{"c": X[:8], "z": X[:8, :1]}] + 9 * [{"c": X[:1], "z": X[:8, :1]}])
    kinds, shapes = {"c": tf.float32, "z": tf.float32}, {"c": [None, 3], "z": [None, 1]}
    return tf.data.Dataset.from_generator(made, kinds, shapes)
def loss(s, batch):
    return (tf.matmul(batch["c"], tf.get_variable("w", [3, 1])) * s["z"])[:, 0]
try:
    train(batches, loss, "z", NUM_EXAMPLES=8, BATCH_SIZE=8)
except efl.errors.ModelError as error:
    print(error)
"""
WITH_VALUE = """
try:
    train(lambda: tf.data.Dataset.from_tensor_slices(X).batch(8), lambda s, batch: s["x"].shape[1].value)
except efl.errors.ModelError as error:
    print(error)
"""


def run(code: str, **env: str) -> str:
    clean = {k: v for k, v in os.environ.items() if k not in ("EFL_KEEP_EAGER", "TF_USE_LEGACY_KERAS")}
    root = str(Path(efl.__file__).parent.parent)
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**clean, "PYTHONPATH": root, "TF_CPP_MIN_LOG_LEVEL": "3", **env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("imports", [BEFORE, AFTER], ids=["before", "after"])
def test_ordinary_programs_train(imports: str) -> None:
    assert "trained" in run(imports + MODEL + PROGRAMS)


@pytest.mark.parametrize("imports", [BEFORE, AFTER], ids=["before", "after"])
def test_an_input_of_another_number_of_rows_is_refused(imports: str) -> None:
    assert "has another number of rows than the loss has values" in run(imports + MODEL + OTHER_ROWS)


def test_who_reads_a_size_as_an_object_is_told_how_to_read_it() -> None:
    told = run(BEFORE + MODEL + WITH_VALUE)
    assert "has no attribute 'value'" in told and "write tensor.shape[1] for tensor.shape[1].value" in told


def test_sizes_that_stay_objects_are_refused() -> None:
    """Where TensorFlow is to be left as it is, and where a function of the model turns them into objects again."""
    fails = (
        "try:\n    train(lambda: tf.data.Dataset.from_tensor_slices(X).batch(8), {loss})\nexcept Exception as error:\n"
    )
    fails += "    print(type(error).__name__, error)\n"
    again = BEFORE + MODEL + "def off(s, batch):\n    tf.disable_v2_tensorshape()\n    return dense(s, batch)\n"
    kept = BEFORE.replace("import efl", "tf.enable_resource_variables()\nimport efl") + MODEL
    message = "ModelError the sizes in a tensor's shape are tf.Dimension objects"
    assert message in run(again + fails.format(loss="off"))
    assert message in run(kept + fails.format(loss="dense"), EFL_KEEP_EAGER="1", TF_USE_LEGACY_KERAS="1")
