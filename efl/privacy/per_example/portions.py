"""Clipping where the gradient of one example takes much memory: some examples at a time, in a loop.

Norms of all variables are needed before anything is weighed, so what is made for the norm of an example would be kept
until all norms are there, or be made twice. Here all of it is made for a portion of the batch, weighed, and added up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import tensorflow.compat.v1 as tf

from efl.privacy.per_example import parts

# What one portion may take. Less costs time (a product for each example is faster over many), more costs memory.
_PORTION_BYTES = 8 << 20
_AT_ONCE = 2  # portions, so that one is made while another is added up


def rows_at_once(held: Sequence[parts.Rowwise]) -> int:
    """How many examples make a portion."""
    return max(1, _PORTION_BYTES // max(1, sum(part.row_bytes for part in held)))


def clipped(
    held: Sequence[parts.Rowwise],
    others: tf.Tensor | None,
    weigh: Callable[[tf.Tensor], tf.Tensor],
    rows: int,
    count: tf.Tensor,
) -> tuple[tf.Tensor, tf.Tensor, list[tf.Tensor]]:
    """Norms, weights and weighted sums of parts that are made for ``rows`` examples at a time.

    Args:
      held: The parts.
      others: float32 ``[M]``, the squared norms of what is not made in portions; None: there is nothing else.
      weigh: From squared norms ``[m]`` the weights ``[m]``, each from its own.
      rows: Of a portion.
      count: int64 scalar, M.

    Returns:
      Squared norms ``[M]`` over all, weights ``[M]``, and the sum of each part, ``[K, N]`` in the variable's order.
    """
    size = tf.cast(count, tf.int32)
    forms: list[tuple[np.ndarray | None, list[int]]] = []  # of each product: its order, its sizes

    def body(
        start: tf.Tensor, squares: tf.TensorArray, weights: tf.TensorArray, sums: list[tf.Tensor]
    ) -> tuple[tf.Tensor, tf.TensorArray, tf.TensorArray, list[tf.Tensor]]:
        end = tf.minimum(start + rows, size)
        norms, products = [] if others is None else [others[start:end]], []
        forms.clear()
        for part in held:
            made = part.make(*[tf.ensure_shape(t[start:end], [None, *t.shape[1:]]) for t in part.inputs])
            product, order = (made.g, made.rows) if isinstance(made, parts.Product) else (made.product, None)
            forms.append((order, product.shape.as_list()[1:]))
            products.append(product)
            norms.append(tf.cast(parts.sum_of_squares(product, [1, 2]), tf.float32))
        total = tf.add_n(norms)
        weight = weigh(total)
        now = [
            tf.linalg.matvec(tf.reshape(p, [-1, part.numbers]), tf.cast(weight, p.dtype), transpose_a=True)
            for p, part in zip(products, held)
        ]
        number = start // rows
        return (
            start + rows,
            squares.write(number, total),
            weights.write(number, weight),
            [before + more for before, more in zip(sums, now)],
        )

    arrays = [tf.TensorArray(tf.float32, -(-size // rows), infer_shape=False, element_shape=[None]) for _ in range(2)]
    zeros = [tf.zeros([part.numbers], part.inputs[0].dtype) for part in held]
    _, squares, weights, sums = tf.while_loop(
        lambda start, *_: start < size,
        body,
        (tf.constant(0), *arrays, zeros),
        parallel_iterations=_AT_ONCE,
        back_prop=False,
    )
    results = []
    for total, (order, sizes) in zip(sums, forms):
        total = tf.reshape(total, sizes)
        results.append(tf.transpose(total) if order is None else tf.gather(total, order))
    return squares.concat(), weights.concat(), results
