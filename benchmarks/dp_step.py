"""A training step with differential privacy beside one without, in one run: ours, tensorflow-privacy's.

    python benchmarks/dp_step.py [--quick] [--batch 256] [--record benchmarks/results/dp_step.md]

Every program is a process of its own that trains one network on random images, by a plain TensorFlow session:

* ``none``: gradient descent on the mean loss.
* ``efl``: ``efl.DPGradientDescentGaussianOptimizer``: clipped per example, its own noise, a ledger in memory.
* ``tfp``: tensorflow-privacy's ``DPGradientDescentGaussianOptimizer``; ``tfp vectorised``: its vectorised one.
* ``torch none``, ``opacus``: the same in PyTorch without and with Opacus, where these are installed.
* ``jax none``, ``jax vmap``: the same in JAX, compiled, and ``vmap`` over ``grad``, where it is installed.

Networks: ``cnn`` is the seed's (two convolutions, two dense layers), ``dense`` a half of the split MNIST model.
Measurements take turns, so that a busy machine slows all of them alike; a round is some steps of ours and one of the
others. Memory is the peak of the process above what it held when the graph was built.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _other_frameworks
import numpy as np
from _report import Goal, command_line, finish, goals_table, table
from _steps_served import by_turns, serve

_ROOT = Path(__file__).resolve().parents[1]

NETWORKS = ("cnn", "dense")
PROGRAMS = ("none", "efl", "tfp", "tfp vectorised")
SLOW = ("tfp", "tfp vectorised")  # some steps of these are enough
MOST, MOST_DENSE, LEAST_TFP, MOST_MEMORY = 1.6, 1.5, 150.0, 2.0


def cnn(images: Any) -> Any:
    """The seed's network: logits of images ``[batch, 28, 28, 1]``."""
    import tensorflow.compat.v1 as tf

    h = tf.layers.conv2d(images, 16, 8, strides=2, padding="same", activation="relu", name="conv1")
    h = tf.layers.max_pooling2d(h, 2, 1)
    h = tf.layers.conv2d(h, 32, 4, strides=2, padding="valid", activation="relu", name="conv2")
    h = tf.layers.max_pooling2d(h, 2, 1)
    h = tf.layers.dense(tf.layers.flatten(h), 32, activation="relu", name="dense1")
    return tf.layers.dense(h, 10, name="dense2")


def batch_of(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels at random."""
    rng = np.random.default_rng(0)
    x = rng.uniform(size=(size, 28, 28, 1)).astype(np.float32)
    return x, rng.integers(0, 10, size).astype(np.int32)


def build(network: str, batch: int) -> tuple[Any, Any]:
    """A loss vector, and what reads the batch."""
    import tensorflow.compat.v1 as tf

    x, y = batch_of(batch)
    images, labels = tf.data.make_one_shot_iterator(tf.data.Dataset.from_tensors((x, y)).repeat()).get_next()
    images = tf.ensure_shape(images, [batch, 28, 28, 1])
    if network == "cnn":
        logits = cnn(images)
    else:
        h = tf.layers.dense(tf.layers.flatten(images[:, :, :14]), 128, activation="relu")
        logits = tf.layers.dense(tf.layers.dense(h, 128, activation="relu"), 10)
    return tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits), images


def step_of(program: str, network: str, batch: int) -> Callable[[], Any]:
    """A function that takes one training step."""
    if program in _other_frameworks.NEEDS:
        return _other_frameworks.step_of(program, network, *batch_of(batch))
    import tensorflow.compat.v1 as tf

    import efl

    tf.set_random_seed(1)
    loss, _ = build(network, batch)
    if program == "none":
        op = tf.train.GradientDescentOptimizer(0.01).minimize(tf.reduce_mean(loss))
    elif program == "efl":
        op = efl.DPGradientDescentGaussianOptimizer(1.0, 1.3, learning_rate=0.01).minimize(loss)
    else:
        sys.path.insert(0, str(_ROOT))
        from tests.privacy.reference import module

        name = "dp_optimizer" if program == "tfp" else "dp_optimizer_vectorized"
        made = module(f"optimizers.{name}")
        cls = made.DPGradientDescentGaussianOptimizer if program == "tfp" else made.VectorizedDPSGD
        op = cls(1.0, 1.3, num_microbatches=batch, learning_rate=0.01).minimize(loss)
    config = tf.ConfigProto(inter_op_parallelism_threads=2, intra_op_parallelism_threads=2)
    session = tf.Session(config=config)
    session.run(tf.global_variables_initializer())
    return session.make_callable(op)


def measure(
    network: str, batch: int, rounds: int, steps: int, slow: bool, others: bool = False
) -> dict[str, tuple[float, float, float]]:
    """Program -> (median ms a step, median ratio to none of the same round, peak MiB)."""
    common = ["--network", network, "--batch", str(batch)]
    programs = [p for p in PROGRAMS if p not in SLOW or slow] + (_other_frameworks.installed() if others else [])
    commands = {name: [sys.executable, __file__, "--serve", name, *common] for name in programs}
    turns = {name: 2 if name in SLOW else min(rounds, 9) for name in programs if name not in ("none", "efl")}
    return by_turns(commands, rounds, steps, turns)


def main() -> None:
    """Measures and prints."""
    parser = command_line(__doc__, "few rounds, without the slow programs")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--network", default="cnn", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(lambda: step_of(arguments.serve, arguments.network, arguments.batch))
        return
    rounds, steps = (3, 10) if arguments.quick else (21, 30)
    rows, goals, results = [], [], {}
    for network in NETWORKS:
        batches = [arguments.batch] if arguments.quick or network != "cnn" else [arguments.batch, 4 * arguments.batch]
        for batch in batches:
            slow = not arguments.quick and network == "cnn" and batch == arguments.batch
            found = measure(network, batch, rounds, steps, slow, batch == arguments.batch)
            results[f"{network} {batch}"] = {name: [round(value, 3) for value in held] for name, held in found.items()}
            for name, (spent, ratio, peak) in found.items():
                rows.append((f"{network}, {batch}", name, f"{spent:,.2f}", f"{ratio:.2f}", f"{peak:,.0f}"))
            ours, none = found["efl"], found["none"]
            most = MOST if network == "cnn" else MOST_DENSE
            if batch == arguments.batch:
                goals.append(Goal(f"{network}: efl / none", ours[1], most, least=False))
            goals.append(
                Goal(f"{network}, {batch}: memory, efl / none", ours[2] / max(none[2], 1.0), MOST_MEMORY, least=False)
            )
            if "tfp" in found:
                goals.append(Goal(f"{network}: tfp / efl", found["tfp"][0] / ours[0], LEAST_TFP, digits=0))
    heads = ("network, batch", "program", "ms a step", "times none", "peak MiB above idle")
    text = f"{table(heads, rows, words=2)}\n\n{goals_table(goals)}"
    ratio = results[f"cnn {arguments.batch}"]["efl"][1]
    finish("dp_step", text, {"benchmark": "dp_step", "ratio": ratio, "results": results}, arguments.record)


if __name__ == "__main__":
    main()
