"""Data and command line, the same for all programs in this folder."""

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


def flags(doc: str | None) -> argparse.Namespace:
    """Reads this folder's own flags; ``--federal_role`` and the like are efl's and are left alone."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--data", type=Path, help="folder of MNIST's four IDX files (default: scikit-learn's digits)")
    parser.add_argument("--batch_size", type=digits.positive, default=256)
    parser.add_argument("--epochs", type=digits.positive, default=20)
    parser.add_argument("--noise_multiplier", type=float, default=1.3)
    parser.add_argument("--l2_norm_clip", type=float, default=1.0)
    parser.add_argument("--learning_rate", type=float, help="default: 0.25; 0.1 with --label_epsilon, without clipping")
    parser.add_argument("--delta", type=float, default=1e-5)
    parser.add_argument("--label_epsilon", type=float, help="randomise training labels, in place of noise on updates")
    parser.add_argument("--backend_mode", choices=["noise", "unnoise"], default="unnoise", help="of two parties")
    parser.add_argument("--checkpoint_dir")
    options = parser.parse_known_args()[0]
    if options.learning_rate is None:  # what is not clipped diverges at the larger one, in some runs
        options.learning_rate = 0.25 if options.label_epsilon is None else 0.1
    return options


def load(options: argparse.Namespace, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Images ``[n, 784]`` of values 0 to 1, and labels ``[n]``."""
    images, labels = digits.load_digits(part) if options.data is None else digits.load_mnist(options.data, part)
    return images.reshape(len(images), -1).astype(np.float32) / 255.0, labels.astype(np.int32)


class Input:
    """The images as batches of a ``tf.data`` iterator, whose place TensorFlow can save."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.rows, self.batches, self._next = {}, {}, {}
        for part, mode in (("train", efl.MODE.TRAIN), ("test", efl.MODE.EVAL)):
            images, labels = load(options, part)
            data = tf.data.Dataset.from_tensor_slices((images, labels, np.arange(len(labels))))
            if mode is efl.MODE.TRAIN:
                data = data.shuffle(len(images), seed=1)
            data = data.batch(options.batch_size).repeat()
            self.rows[mode] = len(images)
            self.batches[mode] = -(-len(images) // options.batch_size)
            self._next[mode] = tf.data.make_initializable_iterator(data)

    def __call__(self, model: Any, mode: Any) -> efl.Sample:
        """An ``input_fn``."""
        images, labels, ids = self._next[mode].get_next()
        columns = {
            "img": [tf.feature_column.numeric_column("img", 28 * 28)],
            "label": [tf.feature_column.numeric_column("label", 1, dtype=tf.int32)],
        }
        return efl.Sample({"img": images, "label": labels, "id": ids}, columns)


def labels_of(sample: efl.Sample, options: argparse.Namespace, is_training: bool) -> tf.Tensor:
    """The labels; for training, and where the flags say so, randomised once each."""
    if is_training and options.label_epsilon is not None:
        label_dp = efl.privacy.LabelDP(options.label_epsilon, num_classes=10)
        return tf.cast(label_dp(sample.features["id"], sample["label"]), tf.int32)
    return tf.reshape(tf.cast(sample["label"], tf.int32), [-1])


def convolutions(images: tf.Tensor) -> tf.Tensor:
    """The lower half of the network: ``[B, 784]`` to ``[B, 512]``."""
    y = tf.reshape(images, [-1, 28, 28, 1])
    y = tf.layers.conv2d(y, 16, 8, strides=2, padding="same", activation="relu")
    y = tf.layers.max_pooling2d(y, 2, 1)
    y = tf.layers.conv2d(y, 32, 4, strides=2, padding="valid", activation="relu")
    return tf.layers.flatten(tf.layers.max_pooling2d(y, 2, 1))


def head(model: Any, y: tf.Tensor, labels: tf.Tensor, is_training: bool) -> Any:
    """The upper half: the loss of each row when training, else the accuracy."""
    logits = tf.layers.dense(tf.layers.dense(y, 32, activation="relu"), 10)
    if is_training:  # of randomised labels too: LabelDP's unbiased loss is for models that cannot learn rows by heart
        return tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits)
    accuracy = tf.metrics.accuracy(labels, tf.argmax(logits, axis=-1))
    model.add_metric("accuracy", accuracy, efl.MODE.EVAL)
    return accuracy[1]


def train(model: Any, options: argparse.Namespace, data: Input, has_labels: bool = True) -> None:
    """Compiles, trains as the flags say with ε in the log, and prints the table of adversaries."""
    if options.label_epsilon is None:
        optimizer = efl.DPGradientDescentGaussianOptimizer(
            l2_norm_clip=options.l2_norm_clip,
            noise_multiplier=options.noise_multiplier,
            learning_rate=options.learning_rate,
        )
    else:
        optimizer = tf.train.GradientDescentOptimizer(options.learning_rate)
    model.optimizer_fn(efl.optimizer_fn.optimizer_setter(optimizer))
    rows, batches = data.rows[efl.MODE.TRAIN], data.batches[efl.MODE.TRAIN]
    sizes = {"NUM_EXAMPLES": rows, "BATCH_SIZE": min(options.batch_size, rows)}
    mode = {}
    if options.label_epsilon is None:
        model.add_hooks([efl.privacy.PrivacyHook(model, options.delta, every=batches)], mode=efl.MODE.TRAIN)
        mode = {"BACKEND_MODE": options.backend_mode} if model.settings.federal_role else {}
    model.compile(opt_config={**sizes, **mode})
    model.fit(
        efl.procedure_fn.train_and_evaluate(
            train_step=batches, eval_step=data.batches[efl.MODE.EVAL], max_iter=options.epochs
        ),
        log_step=batches,
        project_name="dp_mnist",
        checkpoint_dir=options.checkpoint_dir,
    )
    if has_labels or options.label_epsilon is None:  # else the other party has the ledger
        print(model.privacy_spent(options.delta))
