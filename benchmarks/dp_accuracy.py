"""How accurate a small network for MNIST gets with differential privacy, for several settings at the same guarantee.

    python benchmarks/dp_accuracy.py [--quick] [--only NAME …] --data DIR [--record benchmarks/results/dp_accuracy.md]

Each setting is a run of 20 epochs on 60 000 training images; accuracy is that on 10 000 test images, the mean of
the last five epochs. ``DIR`` holds MNIST's four IDX files. What is guaranteed against somebody who may know the batches
depends on how often a row takes part (20 times) and on the noise, not on the batch: a larger one puts more rows beside
the same noise. What is commonly reported depends on the batch as well, and stands beside it.

The best of several settings was chosen by looking at the test images; how many there were is said.
"""

from __future__ import annotations

import importlib
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from _report import command_line, finish, table

_ROOT = Path(__file__).resolve().parents[1]
ROWS, DELTA = 60_000, 1e-5


@dataclass(frozen=True)
class Setting:
    """One run.

    Attributes:
      rate: Learning rate.
      clip: Largest norm of a row's gradient.
      batch: Rows of a batch.
      activation: ``relu`` or ``tanh``.
      average: Decay of the average of weights that is evaluated; 0: the last weights are.
      momentum: Of the optimizer.
      noise: Noise multiplier.
      epochs: Passes over the data.
    """

    rate: float
    clip: float = 1.0
    batch: int = 256
    activation: str = "relu"
    average: float = 0.0
    momentum: float = 0.0
    noise: float = 1.3
    epochs: int = 20


SETTINGS = {
    "seed": Setting(0.25),
    "rate 0.5": Setting(0.5),
    "tanh": Setting(0.5, activation="tanh"),
    "tanh, average": Setting(0.5, activation="tanh", average=0.99),
    "tanh, clip 0.1": Setting(4.0, clip=0.1, activation="tanh", average=0.99),
    "tanh, batch 1024": Setting(2.0, batch=1024, activation="tanh", average=0.95),
    "tanh, batch 2048": Setting(4.0, batch=2048, activation="tanh", average=0.9),
    "tanh, batch 4096": Setting(4.0, batch=4096, activation="tanh", average=0.9),
    "tanh, batch 2048, momentum": Setting(0.5, batch=2048, activation="tanh", average=0.9, momentum=0.9),
    "relu, batch 2048": Setting(2.0, batch=2048, average=0.9),
    "tanh, clip 0.1, batch 2048": Setting(30.0, clip=0.1, batch=2048, activation="tanh", average=0.9),
    "seed, noise 0.7": Setting(0.25, noise=0.7),
    "rate 0.5, noise 0.7": Setting(0.5, noise=0.7),
    "tanh, average, noise 0.7": Setting(0.5, activation="tanh", average=0.99, noise=0.7),
    "tanh, batch 2048, noise 0.7": Setting(4.0, batch=2048, activation="tanh", average=0.9, noise=0.7),
}


def load(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Part -> images ``[n, 28, 28, 1]`` of 0 to 1, and labels."""
    sys.path.append(str(_ROOT / "example" / "mnist"))
    digits = importlib.import_module("generate_data")
    found = {}
    for part in ("train", "test"):
        images, labels = digits.load_mnist(folder, part)
        found[part] = images.reshape(-1, 28, 28, 1).astype(np.float32) / 255.0, labels.astype(np.int32)
    return found


def logits_of(images: Any, activation: str, getter: Callable[..., Any] | None = None) -> Any:
    """The seed's network."""
    import tensorflow.compat.v1 as tf

    act = getattr(tf.nn, activation)
    with tf.variable_scope("net", reuse=tf.AUTO_REUSE, custom_getter=getter):
        h = tf.layers.conv2d(images, 16, 8, strides=2, padding="same", activation=act, name="conv1")
        h = tf.layers.max_pooling2d(h, 2, 1)
        h = tf.layers.conv2d(h, 32, 4, strides=2, padding="valid", activation=act, name="conv2")
        h = tf.layers.flatten(tf.layers.max_pooling2d(h, 2, 1))
        return tf.layers.dense(tf.layers.dense(h, 32, activation=act, name="dense1"), 10, name="dense2")


def run(setting: Setting, data: dict[str, tuple[np.ndarray, np.ndarray]]) -> list[float]:
    """Test accuracy after each epoch."""
    import tensorflow.compat.v1 as tf

    import efl

    tf.reset_default_graph()
    tf.set_random_seed(1)
    rng = np.random.default_rng(1)
    images, labels = data["train"]
    x, y = tf.placeholder(tf.float32, [None, 28, 28, 1]), tf.placeholder(tf.int32, [None])
    loss = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=y, logits=logits_of(x, setting.activation))
    base = tf.train.MomentumOptimizer if setting.momentum else tf.train.GradientDescentOptimizer
    more = {"momentum": setting.momentum} if setting.momentum else {}
    private = efl.make_gaussian_optimizer_class(base)
    step = private(setting.clip, setting.noise, learning_rate=setting.rate, **more).minimize(
        loss, global_step=tf.train.get_or_create_global_step()
    )
    averaged: Callable[..., Any] | None = None
    if setting.average:
        mean = tf.train.ExponentialMovingAverage(setting.average)
        with tf.control_dependencies([step]):
            step = mean.apply(tf.trainable_variables())

        def averaged(getter: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            return mean.average(getter(*args, **kwargs))

    right = tf.equal(tf.argmax(logits_of(x, setting.activation, averaged), 1, output_type=tf.int32), y)
    correct = tf.reduce_sum(tf.cast(right, tf.int32))
    found = []
    with tf.Session() as session:
        session.run(tf.global_variables_initializer())
        for _ in range(setting.epochs):
            order = rng.permutation(len(labels))
            for first in range(0, len(order) - setting.batch + 1, setting.batch):
                chosen = order[first : first + setting.batch]
                session.run(step, {x: images[chosen], y: labels[chosen]})
            tested = data["test"]
            hits = sum(
                session.run(correct, {x: tested[0][i : i + 1000], y: tested[1][i : i + 1000]})
                for i in range(0, len(tested[1]), 1000)
            )
            found.append(hits / len(tested[1]))
    return found


def epsilons(setting: Setting) -> tuple[float, float, float]:
    """Guaranteed if the batches may be known (add or remove a row, replace one), and as commonly reported."""
    import efl

    def spent(**kwargs: Any) -> float:
        sizes = ROWS, setting.batch, setting.noise, setting.epochs, DELTA
        return float(efl.privacy.compute_dp_sgd_privacy(*sizes, **kwargs)[0])

    return spent(sampling="none"), spent(sampling="none", relation="replace_one"), spent(accountant="pld")


def main() -> None:
    """Runs and prints."""
    parser = command_line(__doc__, "one epoch of each setting")
    parser.add_argument("--data", type=Path, required=True, help="folder of MNIST's four IDX files")
    parser.add_argument("--only", nargs="+", choices=list(SETTINGS), help="these settings only")
    arguments = parser.parse_args()
    data, rows, best = load(arguments.data), [], 0.0
    results: dict[str, Any] = {}
    for name in arguments.only or SETTINGS:
        setting = SETTINGS[name]
        if arguments.quick:
            setting = Setting(**{**asdict(setting), "epochs": 1})
        accuracies = run(setting, data)
        mean = statistics.mean(accuracies[-5:])
        best = max(best, mean)
        guaranteed, replaced, reported = epsilons(setting)
        results[name] = {
            "accuracy": round(mean, 4),
            "epsilons": [round(e, 2) for e in (guaranteed, replaced, reported)],
        }
        shown = (setting.activation, setting.batch, setting.rate, setting.clip, setting.average or "-", setting.noise)
        rows.append(
            (name, *map(str, shown), f"{100 * mean:.2f}", f"{guaranteed:.1f}", f"{replaced:.0f}", f"{reported:.2f}")
        )
        print(rows[-1], file=sys.stderr, flush=True)
    heads = ("setting", "activation", "batch", "rate", "clip", "average", "noise", "accuracy, %", "ε, batches known",
             "ε, replace one", "reported, no guarantee")  # fmt: skip

    text = f"{table(heads, rows, words=2)}\n\n{len(results)} settings were tried; each run is one seed.\n"
    finish(
        "dp_accuracy", text, {"benchmark": "dp_accuracy", "best": round(best, 4), "results": results}, arguments.record
    )


if __name__ == "__main__":
    main()
