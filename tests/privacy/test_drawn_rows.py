"""Functions of a data set that draw rows at random, and those that change rows at random."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

from tests.privacy.test_passes import STEPS, numbers, spent, taken
from tests.privacy.test_what_is_public import ROWS, X, compiled, data, no_figure, plain, read

pytest.importorskip("dp_accounting")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def uniform() -> tf.Tensor:
    return tf.random.uniform([], 0, ROWS, tf.int64)


@pytest.mark.parametrize(
    "drawn",
    [
        lambda: numbers(ROWS).map(lambda i: tf.gather(X, uniform())),
        lambda: numbers(ROWS).map(lambda i: tf.constant(X)[(i + uniform()) % ROWS]),
        lambda: numbers(ROWS).map(lambda i: (i, tf.gather(X, uniform())), 2).map(lambda i, x: x),
        lambda: numbers(ROWS).map(lambda i: tf.random.shuffle(X)[i]),
        lambda: numbers(ROWS).flat_map(lambda i: tf.data.Dataset.from_tensors(tf.gather(X, uniform()))),
        lambda: numbers(ROWS).scan(np.int64(0), lambda n, i: (n + 1, tf.gather(X, uniform()))),
    ],
)
def test_a_function_that_draws_rows_at_random_has_no_figure(drawn) -> None:
    no_figure(compiled(lambda: read(drawn().batch(8).repeat()), plain), "draws what it brings at random")


@pytest.mark.parametrize(
    "changed",
    [
        lambda: data().map(lambda x: x + tf.random.normal([3])),
        lambda: data().map(lambda x: x * tf.gather([0.9, 1.1], uniform() % 2)),
        lambda: data().map(lambda x: tf.image.random_flip_left_right(x[None, :, None])[0, :, 0]),
        lambda: data().map(lambda x: tf.image.random_crop(tf.pad(x, [[0, 2]]), [3])),
        lambda: numbers(ROWS).map(lambda i: tf.image.random_crop(tf.gather(np.tile(X, 2), i), [3])),
        lambda: data().map(lambda x: (x, tf.random.normal([3]))).map(lambda x, z: x),
    ],
)
def test_random_changes_to_rows_have_a_figure(changed) -> None:
    assert spent(lambda: read(changed().batch(8).repeat())) == pytest.approx(taken(STEPS // 5))
