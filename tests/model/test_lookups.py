"""Rows of an embedding are looked up as rows: no step copies the table."""

import numpy as np
import pytest

import efl

import tensorflow.compat.v1 as tf  # isort: skip

ROWS, WIDTH = 20_000, 8


class Traces(tf.train.SessionRunHook):
    """Keeps the largest tensor that any op of a step makes, in bytes."""

    def __init__(self):
        self.largest = 0

    def before_run(self, run_context):
        return tf.train.SessionRunArgs(None, options=tf.RunOptions(trace_level=tf.RunOptions.FULL_TRACE))

    def after_run(self, run_context, run_values):
        for device in run_values.run_metadata.step_stats.dev_stats:
            for node in device.node_stats:
                for output in node.output:
                    size = output.tensor_description.allocation_description.requested_bytes
                    self.largest = max(self.largest, size)


@pytest.mark.parametrize("combiner", ["mean", "sum", "sqrtn"])
def test_a_step_makes_no_copy_of_a_table(combiner):
    ids = np.random.default_rng(0).integers(0, ROWS, (64, 3))
    data = tf.data.Dataset.from_tensor_slices((ids, np.ones((64, 1), np.float32))).repeat().batch(16)
    batch = tf.data.make_initializable_iterator(data).get_next()
    column = tf.feature_column.embedding_column(
        tf.feature_column.categorical_column_with_identity("ids", ROWS), WIDTH, combiner=combiner
    )
    columns = {"ids": [column], "y": [tf.feature_column.numeric_column("y")]}
    model = efl.Model(seed=1)
    model.input_fn(lambda m, mode: efl.Sample({"ids": batch[0], "y": batch[1]}, columns))
    model.loss_fn(lambda m, s: tf.losses.mean_squared_error(s["y"], tf.layers.dense(s["ids"], 1)))
    model.eval_fn(lambda m, s: tf.reduce_mean(s["ids"]))
    model.optimizer_fn(efl.optimizer_fn.optimizer_setter(tf.train.GradientDescentOptimizer(0.1)))
    training, evaluating = Traces(), Traces()
    model.add_hooks([training], mode=efl.MODE.TRAIN)
    model.add_hooks([evaluating], mode=efl.MODE.EVAL)
    model.compile()
    model.fit(efl.procedure_fn.train_and_evaluate(train_step=3, eval_step=2, max_iter=2))
    for seen in (training, evaluating):
        assert 0 < seen.largest < ROWS * WIDTH * 4 / 8
