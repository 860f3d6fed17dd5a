"""A private training step of a model with large embedding tables beside one without privacy, in one run.

    python benchmarks/dp_embedding.py [--quick] [--batch 256] [--record benchmarks/results/dp_embedding.md]

The model is that of the Criteo example on one machine: 21 categorical features, hashed, with an embedding of 8 numbers
each, 10 dense ones, layers of 128 and 64, gradient descent. Features are drawn as words are (Zipf's law), so that a
step reads a small part of a large table. The programs are ``efl.Model`` three times:

* ``none``: with ``tf.train.GradientDescentOptimizer``.
* ``waiting``: with ``efl.DPGradientDescentGaussianOptimizer``; noise of rows that nobody reads waits.
* ``whole``: the same with ``DEFER_NOISE=False``: every table is noised as a whole in every step.

They take turns, each table size in a run of its own.
"""

from __future__ import annotations

import argparse
import queue
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from _report import Goal, command_line, finish, goals_table, table
from _steps_served import by_turns, serve

PROGRAMS = ("none", "waiting", "whole")
TABLES, WIDTH, DENSE = 21, 8, 10
SIZES = (10_000, 100_000, 1_000_000)
MOST = 2.0


def step_of(program: str, rows: int, batch: int) -> Callable[[], Any]:
    """A function that takes one training step of a model in a thread of its own."""
    import tensorflow.compat.v1 as tf

    import efl

    rng = np.random.default_rng(0)
    many = 64 * batch
    ids = np.char.mod("%x", rng.zipf(1.2, (many, TABLES)) % (1 << 40)).astype(object)
    dense, label = rng.normal(size=(many, DENSE)).astype(np.float32), rng.integers(0, 2, many).astype(np.float32)
    data = (
        tf.data.Dataset.from_tensor_slices((ids, dense, label)).repeat().batch(batch, drop_remainder=True).prefetch(2)
    )
    read = tf.data.make_initializable_iterator(data).get_next()
    model = efl.Model(seed=1)

    def input_fn(m: efl.Model, mode: efl.MODE) -> efl.Sample:
        names = [f"feature{i}" for i in range(TABLES)]
        columns: dict[str, Any] = {
            name: tf.feature_column.embedding_column(
                tf.feature_column.categorical_column_with_hash_bucket(name, rows),
                WIDTH,
                initializer=tf.random_normal_initializer(stddev=0.01),
            )
            for name in names
        }
        columns["dense"] = [tf.feature_column.numeric_column("dense", DENSE)]
        columns["label"] = [tf.feature_column.numeric_column("label")]
        features = {name: read[0][:, i : i + 1] for i, name in enumerate(names)}
        return efl.Sample({**features, "dense": read[1], "label": read[2][:, None]}, columns)

    def loss_fn(m: efl.Model, sample: efl.Sample) -> tf.Tensor:
        embedded = [sample[f"feature{i}"] for i in range(TABLES)]
        h = tf.layers.dense(tf.concat([*embedded, sample["dense"]], 1), 128, activation="relu")
        logits = tf.layers.dense(tf.layers.dense(h, 64, activation="relu"), 1)
        losses = tf.nn.sigmoid_cross_entropy_with_logits(labels=sample["label"], logits=logits)[:, 0]
        return tf.reduce_mean(losses) if program == "none" else losses

    plain, private = tf.train.GradientDescentOptimizer, efl.DPGradientDescentGaussianOptimizer
    optimizer = plain(0.1) if program == "none" else private(1.0, 1.0, learning_rate=0.1)
    model.input_fn(input_fn).loss_fn(loss_fn).optimizer_fn(efl.optimizer_fn.optimizer_setter(optimizer))
    asked: queue.SimpleQueue[None] = queue.SimpleQueue()
    done: queue.SimpleQueue[None] = queue.SimpleQueue()

    class Turn(tf.train.SessionRunHook):
        def before_run(self, run_context: Any) -> None:
            asked.get()

        def after_run(self, run_context: Any, run_values: Any) -> None:
            done.put(None)

    model.add_hooks([Turn()])
    graph = tf.get_default_graph()
    model.compile(opt_config=None if program == "none" else {"DEFER_NOISE": program == "waiting"})

    def train() -> None:
        with graph.as_default():
            model.fit(efl.procedure_fn.train(), log_step=10**9)

    threading.Thread(target=train, daemon=True).start()

    def step() -> None:
        asked.put(None)
        done.get()

    return step


def measure(rows: int, batch: int, rounds: int, steps: int, whole: bool) -> dict[str, tuple[float, float, float]]:
    """Program -> (median ms a step, median ratio to none of the same round, peak MiB)."""
    common = ["--rows", str(rows), "--batch", str(batch)]
    programs = [name for name in PROGRAMS if name != "whole" or whole]
    commands = {name: [sys.executable, __file__, "--serve", name, *common] for name in programs}
    return by_turns(commands, rounds, steps, {"whole": 3})


def main() -> None:
    """Measures and prints."""
    parser = command_line(__doc__, "few rounds, without the largest tables")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=int, default=SIZES[0], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(lambda: step_of(arguments.serve, arguments.rows, arguments.batch))
        return
    rounds, steps = (3, 10) if arguments.quick else (15, 20)
    rows, goals, results = [], [], {}
    for size in SIZES[:2] if arguments.quick else SIZES:
        # The whole of the largest tables is 168 million numbers a step.
        found = measure(size, arguments.batch, rounds, steps, whole=size < 10**6)
        results[size] = {name: [round(value, 3) for value in held] for name, held in found.items()}
        for name, (spent, ratio, peak) in found.items():
            rows.append((f"{size:,}", name, f"{spent:,.2f}", f"{ratio:.2f}", f"{peak:,.0f}"))
        goals.append(Goal(f"tables of {size:,} rows: waiting / none", found["waiting"][1], MOST, least=False))
    heads = ("rows of a table", "program", "ms a step", "times none", "peak MiB above idle")
    text = f"{table(heads, rows, words=2)}\n\n{goals_table(goals)}"
    ratio = max(held["waiting"][1] for held in results.values())
    finish("dp_embedding", text, {"benchmark": "dp_embedding", "ratio": ratio, "results": results}, arguments.record)


if __name__ == "__main__":
    main()
