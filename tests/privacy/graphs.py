"""Models for the tests of per-example gradients, and the reference: one example at a time, by plain TensorFlow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

from efl.privacy import per_example
from efl.privacy.per_example import portions

BATCH = 6
CLIPPED = "all, clipped"
Feeds = dict[str, np.ndarray]


@dataclass(frozen=True)
class Built:
    """A loss vector of a fresh graph and the placeholders it is made of."""

    loss: tf.Tensor
    inputs: dict[str, tf.Tensor]


def image(name: str, *shape: int) -> tf.Tensor:
    return tf.placeholder(tf.float32, [None, *shape], name)


def random(*shape: int, seed: int = 0, batch: int = BATCH) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(batch, *shape)).astype(np.float32)


def numbers(high: int, *shape: int, seed: int = 0, batch: int = BATCH) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, high, (batch, *shape))


def _weigh(squares: Any) -> Any:
    return 1.0 / (0.5 + squares)


def norms_and_sums(
    build: Callable[[], Built], feeds: Feeds, rows: int = 1
) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], dict[str, tuple[np.ndarray, np.ndarray]], float]:
    """What the engine gives and what the reference gives: variable -> (squared norms, weighted sum); the experiment.

    Beside the variables there is ``CLIPPED``: all of them at once, with weights that follow from the norms.
    """
    tf.reset_default_graph()
    tf.set_random_seed(3)
    built = build()
    variables = tf.trainable_variables()
    gradients = per_example.differentiate(per_example.Objective(built.loss), variables, rows=rows)
    # Before anything else asks for it whole. Portions are of four examples, and of the two left.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(portions, "rows_at_once", lambda held: 4)
        squares, sums = gradients.clipped(gradients.variables, _weigh)
    weights = tf.placeholder(tf.float32, [None])
    ours = {
        v.op.name: (gradients.squared_norm(v), tf.convert_to_tensor(gradients.weighted_sum(v, weights)))
        for v in gradients.variables
    }
    ours[CLIPPED] = squares, tf.concat([tf.reshape(tf.convert_to_tensor(each), [-1]) for each in sums], 0)
    experiment = gradients.experiment(tf.constant(True))
    holds = [e.holds for e in gradients.groups.walk.expectations]
    alone = tf.gradients(tf.reduce_sum(built.loss), gradients.variables)
    alone = [tf.convert_to_tensor(g) for g in alone]
    batch = len(next(iter(feeds.values())))
    given = np.random.default_rng(1).uniform(0.2, 1.0, batch // rows).astype(np.float32)
    with tf.Session() as sess:
        sess.run(tf.global_variables_initializer())
        feed: dict[Any, np.ndarray] = {t: feeds[name] for name, t in built.inputs.items()}
        found, off, right = sess.run([ours, experiment, holds], {**feed, weights: given})
        assert all(right)
        singles = [sess.run(alone, {t: value[i : i + 1] for t, value in feed.items()}) for i in range(batch)]
    expected, all_norms, wholes = {}, np.zeros(batch // rows), []
    for position, variable in enumerate(gradients.variables):
        each = np.stack([np.ravel(single[position]) for single in singles]).astype(np.float64)
        each = each.reshape(batch // rows, rows, -1).sum(1)
        expected[variable.op.name] = ((each**2).sum(1), given.astype(np.float64) @ each)
        all_norms += (each**2).sum(1)
        wholes.append(each)
    expected[CLIPPED] = all_norms, _weigh(all_norms) @ np.concatenate(wholes, 1)
    return found, expected, float(off)


def assert_equal(
    build: Callable[[], Built], feeds: Feeds, rows: int = 1, names: Sequence[str] = (), above: float = 0.0
) -> None:
    """Norms and sums are those of the reference, to 1e-5 of their largest.

    Args:
      build: Makes the graph.
      feeds: Of its inputs.
      rows: How many are clipped as one.
      names: Variables that have to be among those compared.
      above: How much larger squared norms may be beside: where terms may cancel they are upper bounds.
    """
    found, expected, off = norms_and_sums(build, feeds, rows)
    assert set(found) == set(expected) and set(names) <= set(found) and found
    for name, (squares, total) in expected.items():
        largest, largest_sum = squares.max(), abs(total).max()
        assert largest > 0, f"{name}: the test shows nothing"
        np.testing.assert_array_less(squares - 1e-5 * largest, found[name][0], err_msg=name)
        np.testing.assert_array_less(found[name][0], squares + (1e-5 + above) * largest, err_msg=name)
        # Weights follow from the norms of all.
        off_by = 1e-5 + (above if name == CLIPPED else 0.0)
        np.testing.assert_allclose(np.ravel(found[name][1]), total, rtol=0, atol=off_by * largest_sum, err_msg=name)
    assert off < 1e-4
