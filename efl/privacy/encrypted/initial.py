"""First weights of encrypted layers: the sum of a secret part of each party's.

``ELEMENTWISE``: w between 0.5 and 1.5. ``DENSE``: of the variance of Glorot and Bengio's (2010), equation 16.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import tensorflow.compat.v1 as tf

from efl.errors import DataError
from efl.protocol import drawn
from efl.protocol.rounds import first_share
from efl.protocol.widths import Kind

_REFUSED = np.iinfo(np.int64).min  # no share has such a number


def half(kind: Kind, shape: tuple[int, ...]) -> tf.Tensor:
    """One party's part: int64 of that shape, drawn anew whenever the variable is initialised."""

    def draw() -> np.ndarray:
        if kind is Kind.ELEMENTWISE:
            return first_share(0.25 + 0.5 * _unit(shape)).values
        limit = np.sqrt(6.0 / sum(shape)) / np.sqrt(2.0)
        return first_share(limit * (2.0 * _unit(shape) - 1.0)).values

    return tf.ensure_shape(tf.numpy_function(draw, [], tf.int64, name="efl_share"), shape)


def origin(kind: Kind, shape: tuple[int, ...], initializer: Callable[..., tf.Tensor] | None) -> tf.Tensor:
    """The leader's part: ``half``, or all of the weights where there is an initializer for them."""
    if initializer is None:
        return half(kind, shape)

    def convert(weights: np.ndarray) -> np.ndarray:
        try:
            return first_share(np.asarray(weights, np.float64)).values
        except DataError:  # told by the first step: of what fails in an initializer, nobody could read it
            return np.full(shape, _REFUSED)

    values = tf.numpy_function(convert, [initializer(shape, dtype=tf.float32)], tf.int64)
    return tf.ensure_shape(values, shape)


def check_origin(name: str, share: np.ndarray) -> None:
    """Refuses a share that began as weights which cannot be.

    Raises:
      DataError: They were NaN, infinite or beyond ±8.
    """
    if (share == _REFUSED).any():
        raise DataError(
            f"encrypted layer {name!r}: its initializer gives weights that are NaN or beyond ±8: give one of smaller "
            "weights, or none"
        )


def _unit(shape: tuple[int, ...]) -> np.ndarray:
    return drawn.uniform(shape, 53) * 2.0**-53
