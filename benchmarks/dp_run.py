"""A whole run with differential privacy beside one without, evaluations included, in one run.

    python benchmarks/dp_run.py [--quick] [--record benchmarks/results/dp_run.md]

The model is the seed's network for MNIST (two convolutions, two dense layers, batch 256) as ``efl.Model``, trained for
20 epochs of 60 000 random images and evaluated on 10 000 after each. The two programs take turns, epoch by epoch. What
is measured is everything between the first step of an epoch and the last of its evaluation: reading, metrics, the
ledger and checkpoints on disk included.
"""

from __future__ import annotations

import argparse
import queue
import sys
import tempfile
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from _report import Goal, command_line, finish, goals_table, table
from _steps_served import by_turns, serve

PROGRAMS = ("none", "efl")
BATCH, EVALUATED = 256, 250
MOST = 1.5


def epoch_of(program: str, rows: int, test_rows: int) -> Callable[[], Any]:
    """A function that trains for an epoch and evaluates."""
    import dp_step
    import tensorflow.compat.v1 as tf

    import efl

    rng = np.random.default_rng(0)
    steps, evaluations = rows // BATCH, test_rows // EVALUATED

    def reader(count: int, batch: int) -> Any:
        x = rng.uniform(size=(count, 28, 28, 1)).astype(np.float32)
        y = rng.integers(0, 10, (count, 1)).astype(np.int32)
        data = tf.data.Dataset.from_tensor_slices((x, y)).repeat().batch(batch, drop_remainder=True).prefetch(2)
        return tf.data.make_initializable_iterator(data).get_next()

    batches = {efl.MODE.TRAIN: reader(rows, BATCH), efl.MODE.EVAL: reader(test_rows, EVALUATED)}
    model = efl.Model(seed=1)
    label = [tf.feature_column.numeric_column("y", dtype=tf.int32)]
    model.input_fn(lambda m, mode: efl.Sample({"x": batches[mode][0], "y": batches[mode][1]}, {"y": label}))

    def logits_of(sample: Any) -> Any:
        with tf.variable_scope("net", reuse=tf.AUTO_REUSE):
            return dp_step.cnn(sample.features["x"])

    def loss_fn(m: Any, sample: Any) -> Any:
        y = sample.features["y"][:, 0]
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=y, logits=logits_of(sample))
        return tf.reduce_mean(losses) if program == "none" else losses

    def eval_fn(m: Any, sample: Any) -> None:
        y = tf.cast(sample.features["y"][:, 0], tf.int64)
        m.add_metric("accuracy", tf.metrics.accuracy(y, tf.argmax(logits_of(sample), 1)))

    plain, private = tf.train.GradientDescentOptimizer, efl.DPGradientDescentGaussianOptimizer
    optimizer = plain(0.1) if program == "none" else private(1.0, 1.3, learning_rate=0.1)
    model.loss_fn(loss_fn).eval_fn(eval_fn).optimizer_fn(efl.optimizer_fn.optimizer_setter(optimizer))
    asked: queue.SimpleQueue[None] = queue.SimpleQueue()
    done: queue.SimpleQueue[None] = queue.SimpleQueue()

    class First(tf.train.SessionRunHook):
        taken = 0

        def before_run(self, run_context: Any) -> None:
            if self.taken % steps == 0:
                asked.get()
            self.taken += 1

    class Last(tf.train.SessionRunHook):
        taken = 0

        def after_run(self, run_context: Any, run_values: Any) -> None:
            self.taken += 1
            if self.taken % evaluations == 0:
                done.put(None)

    model.add_hooks([First()], mode=efl.MODE.TRAIN)
    model.add_hooks([Last()], mode=efl.MODE.EVAL)
    graph = tf.get_default_graph()
    model.compile(opt_config=None if program == "none" else {"NUM_EXAMPLES": rows, "BATCH_SIZE": BATCH})

    def train() -> None:
        procedure = efl.procedure_fn.train_and_evaluate(train_step=steps, eval_step=evaluations)
        with graph.as_default(), tempfile.TemporaryDirectory() as folder:
            model.fit(procedure, log_step=steps, checkpoint_dir=folder)

    threading.Thread(target=train, daemon=True).start()

    def epoch() -> None:
        asked.put(None)
        done.get()

    return epoch


def measure(epochs: int, rows: int, test_rows: int) -> dict[str, tuple[float, float, float]]:
    """Program -> (median ms an epoch, median ratio to none of the same round, peak MiB)."""
    common = ["--rows", str(rows), "--test_rows", str(test_rows)]
    commands = {name: [sys.executable, __file__, "--serve", name, *common] for name in PROGRAMS}
    return by_turns(commands, epochs, steps=1, before=1)


def main() -> None:
    """Measures and prints."""
    parser = command_line(__doc__, "few epochs of few images")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=int, default=60_000, help=argparse.SUPPRESS)
    parser.add_argument("--test_rows", type=int, default=10_000, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(lambda: epoch_of(arguments.serve, arguments.rows, arguments.test_rows))
        return
    found = measure(3, 12_000, 2000) if arguments.quick else measure(20, 60_000, 10_000)
    rows = [(name, f"{spent / 1e3:,.2f}", f"{ratio:.2f}") for name, (spent, ratio, _) in found.items()]
    ratio = found["efl"][1]
    goals = goals_table([Goal("an epoch and its evaluation: efl / none", ratio, MOST, least=False)])
    text = f"{table(('program', 's an epoch', 'times none'), rows, words=1)}\n\n{goals}\n"
    finish(
        "dp_run",
        text,
        {"benchmark": "dp_run", "ratio": round(ratio, 3), "ms": {n: round(v[0]) for n, v in found.items()}},
        arguments.record,
    )


if __name__ == "__main__":
    main()
