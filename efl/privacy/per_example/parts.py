"""A variable's per-example gradient in factors, its norm, and inner products of such gradients.

An *example* here is whatever is clipped as one: a row of the batch, or a micro-batch of several. There are M of them.
The variable is seen as a vector of n numbers, as a matrix [K, N], or as rows [V, D], always in its own row-major order.

Sources: outer products, Goodfellow (arXiv:1510.01799) and, over positions, Li et al. (arXiv:2110.05679, section 4).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias, TypeVar

import numpy as np
import tensorflow.compat.v1 as tf

# A product [K, N] of each example is made, rather than two [T, T], when it has at most so many numbers or is smaller.
_SMALL_PRODUCT = 32768
# What rounding of float32 takes from, or adds to, a sum of products, relative to the sum of their sizes.
_ROUNDING = 2e-6
_LEAST = 1.2e-38  # a square below it is taken for zero


@dataclass(frozen=True)
class Outer:
    """The sum over positions t of ``a[i, t] ⊗ d[i, t]``.

    Attributes:
      a: ``[M, T, K]``.
      d: ``[M, T, N]``.
    """

    a: tf.Tensor
    d: tf.Tensor

    @property
    def product(self) -> tf.Tensor:
        """``[M, N, K]``: this order is twice as fast as the other here."""
        return tf.matmul(self.d, self.a, transpose_a=True)

    @property
    def is_product_cheaper(self) -> bool:
        """Whether to make the product rather than Gram matrices, as far as the static shapes tell."""
        return is_product_cheaper(self.a.shape[1], self.a.shape[2], self.d.shape[2])


@dataclass(frozen=True)
class Product:
    """The gradient as a matrix for each example, whose rows are in an order of their own.

    Attributes:
      g: ``[M, K, N]``.
      rows: Which row of g is row k of the variable, ``[K]``.
    """

    g: tf.Tensor
    rows: np.ndarray


def is_product_cheaper(positions: int | None, k: int | None, n: int | None) -> bool:
    """Whether to multiply ``[T, K]`` by ``[T, N]`` rather than to make Gram matrices, as far as the sizes tell."""
    if k is None or n is None:
        return False
    return k * n <= _SMALL_PRODUCT or (positions is not None and k * n <= positions * positions)


@dataclass(frozen=True)
class Whole:
    """The gradient itself, ``[M, n]``."""

    g: tf.Tensor


@dataclass(frozen=True)
class Lookup:
    """``d[r]`` added to row ``ids[r]`` for each entry r, which belongs to example ``owner[r]``.

    Attributes:
      ids: int64 ``[R]``.
      owner: int64 ``[R]``.
      d: ``[R, D]``.
      count: int64 scalar, M.
      one_each: Entry i is example i's only one.
    """

    ids: tf.Tensor
    owner: tf.Tensor
    d: tf.Tensor
    count: tf.Tensor
    one_each: bool = False


@dataclass(frozen=True)
class Direction:
    """One direction for all: ``scale[i] * along``, ``[M]`` and ``[n]`` (a penalty on the weights in every loss)."""

    scale: tf.Tensor
    along: tf.Tensor


@dataclass(frozen=True)
class Masked:
    """An outer product, number by number times a matrix that is the same for all: ``(a[i] ⊗ d[i]) * j``.

    Attributes:
      a: ``[M, K]``.
      d: ``[M, N]``.
      j: ``[K, N]``.
    """

    a: tf.Tensor
    d: tf.Tensor
    j: tf.Tensor


@dataclass(frozen=True)
class Rowwise:
    """A part that can be made of some examples at a time, because that of all takes much memory.

    Attributes:
      inputs: ``[M, …]`` each.
      make: From rows of the inputs, the part of these examples: a ``Product`` or an ``Outer``.
      row_bytes: What making it takes for each example.
      numbers: How many the variable has.
    """

    inputs: tuple[tf.Tensor, ...]
    make: Callable[..., Product | Outer]
    row_bytes: int
    numbers: int

    def whole(self) -> Product | Outer:
        """The part of all examples."""
        return self.make(*self.inputs)


Part: TypeAlias = Outer | Whole | Lookup | Direction | Product | Masked


def joined(parts: Sequence[Part]) -> list[Part] | None:
    """Parts of one kind added up where that costs nothing; None where their factors do not fit together."""
    if len(parts) == 1:
        return list(parts)
    if any(isinstance(p, Product) for p in parts):
        return None
    if any(isinstance(p, Masked) for p in parts):
        return _all_masked(parts)
    outers = [p for p in parts if isinstance(p, Outer)]
    wholes = [p for p in parts if isinstance(p, Whole)]
    lookups = [p for p in parts if isinstance(p, Lookup)]
    result: list[Part] = [p for p in parts if isinstance(p, Direction)]
    # Rows of a variable are as long as a lookup sees them, and the last axis of a matrix as an outer product does.
    widths = {p.d.shape[1] for p in lookups} | ({p.d.shape[2] for p in outers} if lookups else set())
    if len(widths) > 1 or None in widths:
        return None
    if outers:
        if not _of_one_form(outers):
            return None
        a, d = ([getattr(p, name) for p in outers] for name in ("a", "d"))
        result.append(outers[0] if len(outers) == 1 else Outer(tf.concat(a, 1), tf.concat(d, 1)))
    if wholes:
        result.append(wholes[0] if len(wholes) == 1 else Whole(tf.add_n([p.g for p in wholes])))
    if lookups:
        result.append(lookups[0] if len(lookups) == 1 else _all_entries(lookups))
    return result


def _all_masked(parts: Sequence[Part]) -> list[Part] | None:
    result: list[Part] = []
    for part in parts:
        if isinstance(part, Outer) and part.a.shape[1] == 1:
            a, d = part.a[:, 0], part.d[:, 0]
            part = Masked(a, d, tf.ones([tf.shape(a)[1], tf.shape(d)[1]], a.dtype))
        if not isinstance(part, Masked):
            return None
        result.append(part)
    return result if _of_one_form(result) else None


def _of_one_form(parts: Sequence[Part]) -> bool:
    """Whether all see the variable as a matrix of the same sizes: the same numbers have other factors in another."""
    forms = {(p.a.shape[-1], p.d.shape[-1]) if isinstance(p, (Outer, Masked)) else None for p in parts}
    return len(parts) == 1 or (len(forms) == 1 and not any(form is None or None in form for form in forms))


def _all_entries(lookups: Sequence[Lookup]) -> Lookup:
    ids, owner, d = (tf.concat([getattr(p, name) for p in lookups], 0) for name in ("ids", "owner", "d"))
    return Lookup(ids, owner, d, lookups[0].count)


def squared_norms(parts: Sequence[Part]) -> tf.Tensor:
    """``[M]``: the squared norm of the sum of joined parts, cross terms included.

    Where terms may cancel it is an upper bound, by what rounding may take away: a norm that came out too small would
    let more through than the clip.
    """
    squares = [_square(part) for part in parts]
    if len(parts) == 1:
        return squares[0]
    terms = list(squares)
    for i, one in enumerate(parts):
        terms.extend(2.0 * _inner(one, other) for other in parts[i + 1 :])
    slack = _ROUNDING * len(parts) * tf.add_n(squares)
    return tf.maximum(tf.add_n(terms), 0.0) + slack


def sum_of_squares(tensor: tf.Tensor, axes: Sequence[int]) -> tf.Tensor:
    """Over some axes, without a tensor of all squares: 2.4 times as fast where it is large (not where it is small)."""
    return tf.square(tf.raw_ops.EuclideanNorm(input=tensor, axis=list(axes)))


def _square(part: Part) -> tf.Tensor:
    if isinstance(part, Whole):
        return sum_of_squares(part.g, [1])
    if isinstance(part, Product):
        return sum_of_squares(part.g, [1, 2])
    if isinstance(part, Masked):
        return _inner(part, part)
    if isinstance(part, Direction):
        part = _balanced(part)
        return tf.square(part.scale) * tf.reduce_sum(tf.square(part.along))
    if isinstance(part, Lookup):
        return _square_of_rows(part)
    if part.a.shape[1] == 1:
        return _square_of_factor(part.a) * _square_of_factor(part.d)
    if part.is_product_cheaper:
        return sum_of_squares(part.product, [1, 2])
    part = _balanced(part)
    gram_a, gram_d = (tf.matmul(factor, factor, transpose_b=True) for factor in (part.a, part.d))
    sizes = tf.sqrt(tf.linalg.diag_part(gram_a)) * tf.sqrt(tf.linalg.diag_part(gram_d))
    slack = _ROUNDING * tf.square(tf.reduce_sum(sizes, 1))  # positions may cancel
    return tf.maximum(tf.reduce_sum(gram_a * gram_d, [1, 2]), 0.0) + slack


_P = TypeVar("_P", bound=Part)


def _balanced(part: _P) -> _P:
    """The same gradients, their size in one factor: the largest number of every other one is 1.

    One factor may be so small that its square, or its product with that of another part, is none, and the other so
    large that their product is one.
    """

    def largest(factor: tf.Tensor, axis: int | None) -> tf.Tensor:
        return tf.maximum(tf.reduce_max(tf.abs(factor), axis, keepdims=axis is not None), _LEAST)

    if isinstance(part, Outer):
        size = largest(part.a, 2)
        return replace(part, a=part.a / size, d=part.d * size)
    if isinstance(part, Direction):
        size = largest(part.along, None)
        return replace(part, scale=part.scale * size, along=part.along / size)
    if isinstance(part, Masked):
        size, of_all = largest(part.a, 1), largest(part.j, None)
        return replace(part, a=part.a / size, j=part.j / of_all, d=part.d * size * of_all)
    return part


def _square_of_factor(factor: tf.Tensor) -> tf.Tensor:
    """Squared norm of ``[M, 1, K]``, and what squares that were too small to count may have been."""
    least = tf.cast(tf.cast(tf.shape(factor)[2], tf.float32) * _LEAST, factor.dtype)
    return tf.reduce_sum(tf.square(factor), [1, 2]) + least


def _square_of_rows(part: Lookup) -> tf.Tensor:
    if part.one_each:
        return sum_of_squares(part.d, [1])
    # An example may look the same row up twice: its entries are added before they are squared.
    rows = tf.reduce_max(tf.concat([part.ids, tf.zeros([1], tf.int64)], 0)) + 1
    pairs, places = tf.unique(part.owner * rows + part.ids, out_idx=tf.int64)
    added = tf.math.unsorted_segment_sum(part.d, places, tf.shape(pairs)[0])
    return tf.math.unsorted_segment_sum(tf.reduce_sum(tf.square(added), 1), pairs // rows, part.count)


def square_of_tables(lookups: Sequence[Lookup], sizes: Sequence[int]) -> tf.Tensor:
    """``[M]``: the sum of the squared norms of lookups in several tables of one width, made at once.

    Args:
      lookups: One for each table.
      sizes: How many rows each table has.
    """
    firsts = np.cumsum([0, *sizes]).tolist()
    ids = tf.concat([p.ids + first if first else p.ids for p, first in zip(lookups, firsts)], 0)
    owner, d = tf.concat([p.owner for p in lookups], 0), tf.concat([p.d for p in lookups], 0)
    pairs, places = tf.unique(owner * firsts[-1] + ids, out_idx=tf.int64)
    added = tf.math.unsorted_segment_sum(d, places, tf.shape(pairs)[0])
    return tf.math.unsorted_segment_sum(tf.reduce_sum(tf.square(added), 1), pairs // firsts[-1], lookups[0].count)


def _inner(one: Part, other: Part) -> tf.Tensor:
    one, other = _balanced(one), _balanced(other)
    if isinstance(one, Masked) and isinstance(other, Masked):
        return tf.reduce_sum(tf.matmul(one.a * other.a, one.j * other.j) * one.d * other.d, 1)
    order = (Lookup, Outer, Whole, Direction)
    if order.index(type(one)) > order.index(type(other)):
        one, other = other, one
    if isinstance(one, Lookup):
        return tf.math.unsorted_segment_sum(_inner_of_entries(one, other), one.owner, one.count)
    if isinstance(one, Outer):
        k, n = tf.shape(one.a)[2], tf.shape(one.d)[2]
        if isinstance(other, Whole):
            return tf.reduce_sum(tf.matmul(one.a, tf.reshape(other.g, [-1, k, n])) * one.d, [1, 2])
        assert isinstance(other, Direction)
        return other.scale * tf.reduce_sum(tf.tensordot(one.a, tf.reshape(other.along, [k, n]), 1) * one.d, [1, 2])
    assert isinstance(other, Direction)
    if isinstance(one, Whole):
        return other.scale * tf.linalg.matvec(one.g, other.along)
    assert isinstance(one, Direction)
    return one.scale * other.scale * tf.tensordot(one.along, other.along, 1)


def _inner_of_entries(one: Lookup, other: Part) -> tf.Tensor:
    """``[R]``: the inner product of each entry with the gradient of its example."""
    width = tf.shape(one.d)[1]
    if isinstance(other, Outer):
        a = tf.gather_nd(tf.transpose(other.a, [0, 2, 1]), tf.stack([one.owner, one.ids], 1))  # [R, T]
        d = tf.linalg.matvec(tf.gather(other.d, one.owner), one.d)  # [R, T]
        return tf.reduce_sum(a * d, 1)
    if isinstance(other, Whole):
        rows = tf.shape(other.g)[1] // width
        row = tf.gather_nd(tf.reshape(other.g, [-1, rows, width]), tf.stack([one.owner, one.ids], 1))
        return tf.reduce_sum(row * one.d, 1)
    assert isinstance(other, Direction)
    row = tf.gather(tf.reshape(other.along, [-1, width]), one.ids)
    return tf.gather(other.scale, one.owner) * tf.reduce_sum(row * one.d, 1)
