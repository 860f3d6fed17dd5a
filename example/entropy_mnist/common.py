"""Data and command line, the same for both parties."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow.compat.v1 as tf

import efl

sys.path.append(str(Path(__file__).resolve().parents[1] / "mnist"))
import generate_data as digits

# TensorFlow calls its own version 1 API deprecated, once for every function that is used.
tf.logging.set_verbosity(tf.logging.ERROR)
HALVES = {"leader": slice(0, 14), "follower": slice(14, 28)}  # columns of pixels


def flags(doc: str | None) -> argparse.Namespace:
    """Reads this folder's own flags; ``--federal_role`` and the like are efl's and are left alone."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--data", type=Path, help="folder of MNIST's four IDX files (default: scikit-learn's digits)")
    parser.add_argument("--layer", choices=["dense", "concat"], default="dense", help="concat hides little: README.md")
    parser.add_argument(
        "--dim", type=digits.positive, default=32, help="columns of each party's embedding (default: 32)"
    )
    parser.add_argument("--units", type=digits.positive, default=16, help="of the dense layer (default: 16)")
    parser.add_argument("--batch_size", type=digits.positive, default=64)
    parser.add_argument("--max_step", type=digits.positive, default=40, help="training steps (default: 40)")
    parser.add_argument(
        "--eval_batches", type=digits.positive, default=5, help="of evaluation, encrypted too (default: 5)"
    )
    parser.add_argument("--learning_rate", type=float, default=0.3)
    parser.add_argument("--checkpoint_dir")
    return parser.parse_known_args()[0]


class Input:
    """One party's half of the images, and the labels, as batches of a ``tf.data`` iterator."""

    def __init__(self, options: argparse.Namespace, role: str) -> None:
        self._next = {}
        for part, mode in (("train", efl.MODE.TRAIN), ("test", efl.MODE.EVAL)):
            images, labels = digits.load_digits(part) if options.data is None else digits.load_mnist(options.data, part)
            half = images.reshape(-1, 28, 28)[:, :, HALVES[role]].reshape(len(images), -1).astype(np.float32)
            half = half / 255.0 - 0.35  # about zero, or tanh saturates
            data = tf.data.Dataset.from_tensor_slices((half, labels.astype(np.int32), np.arange(len(labels))))
            if mode is efl.MODE.TRAIN:
                data = data.shuffle(len(images), seed=1)  # the same at both parties
            data = data.batch(options.batch_size, drop_remainder=True).repeat()
            self._next[mode] = tf.data.make_initializable_iterator(data)

    def __call__(self, model: Any, mode: Any) -> efl.FederalSample:
        """An ``input_fn``."""
        half, labels, ids = self._next[mode].get_next()
        columns = {
            "half": [tf.feature_column.numeric_column("half", 28 * 14)],
            "label": [tf.feature_column.numeric_column("label", 1, dtype=tf.int32)],
        }
        features = {"half": half, "label": labels, "id": ids}
        return efl.FederalSample(features, columns, model.federal_role, model.communicator, sample_id_name="id")


def embedding(half: tf.Tensor, options: argparse.Namespace) -> tf.Tensor:
    """What a party makes of its half, ``[batch, dim]``, within ±1."""
    return tf.layers.dense(half, options.dim, activation=tf.tanh, name="embedding")


def run(model: efl.FederalModel, options: argparse.Namespace) -> None:
    """Trains, then evaluates."""
    model.optimizer_fn(efl.optimizer_fn.optimizer_setter(tf.train.GradientDescentOptimizer(options.learning_rate)))
    model.compile()
    procedure = efl.procedure_fn.train_and_evaluate(options.max_step, options.eval_batches, max_iter=1)
    model.fit(procedure, log_step=10, project_name="entropy_mnist", checkpoint_dir=options.checkpoint_dir)
