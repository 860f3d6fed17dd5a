"""Products of powers of many bases: out[j] = Π base[i] ** exponents[i, j], for many j at once.

Bases are taken in blocks, and for each block a table of the products of all its subsets is made; one bit of all
exponents of a block then picks one entry (Pippenger's method with subsets; Lim and Lee, CRYPTO '94). Squarings are
shared by all bases, tables by all j. Exponents are not negative: whoever has signed ones adds an offset to all, and
takes it off in the plaintext. How long it takes follows from shapes and from the number of bits, not from the
exponents: the empty subset is multiplied as any other, and stands for a number of full width (``blank``).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import numpy as np
from gmpy2 import mpz

from efl.paillier.factored import ONE, Product, Split

# Microseconds at 2048 bits; only their ratios count: an entry of a table (large tables leave the cache), a product with
# one, a squaring.
_ENTRY, _PRODUCT, _SQUARING = 8.0, 2.9, 4.3
_LARGEST = 13  # bases in a block


@functools.lru_cache(maxsize=64)
def _blocks(bases: int, outputs: int, bits: int) -> tuple[int, ...]:
    """Sizes of the blocks that make it cheapest."""

    def sizes(count: int) -> tuple[int, ...]:
        return tuple(bases // count + (1 if i < bases % count else 0) for i in range(count))

    def cost(held: tuple[int, ...]) -> float:
        return _cost(held, outputs, bits)

    return min((sizes(count) for count in range(-(-bases // _LARGEST), bases + 1)), key=cost)


def _cost(sizes: tuple[int, ...], outputs: int, bits: int) -> float:
    entries = sum(1 << size for size in sizes) * _ENTRY
    return entries + outputs * bits * (len(sizes) * _PRODUCT + _SQUARING)


def seconds(bases: int, outputs: int, bits: int) -> float:
    """About how long ``multiexp`` takes, with a key of 2048 bits."""
    return _cost(_blocks(bases, outputs, bits), outputs, bits) * 1e-6 if bases and outputs else 0.0


def _subsets(block: Sequence[mpz], n: mpz, blank: Split) -> list[Split]:
    """The products of all subsets of some bases, times ``blank``; bit i of an index says whether base i is in it."""
    products = [blank]
    for base in block:
        alone = Split.of(base, n)
        products += [product.times(alone, n) for product in products]
    return products


def _picks(exponents: np.ndarray, sizes: Sequence[int], bits: int) -> Iterator[list[list[int]]]:
    """Of each output, which entry of the joined tables every bit picks: ``[bits][blocks]``, the highest bit first."""
    shifts = np.arange(bits - 1, -1, -1, dtype=np.uint64)[:, np.newaxis]
    ends = np.cumsum(sizes)
    offsets = np.cumsum([0, *(1 << size for size in sizes[:-1])])
    places = np.concatenate([np.arange(size, dtype=np.int64) for size in sizes])
    for column in exponents.T:  # one at a time: all of them would be large as Python's numbers
        chosen = ((column >> shifts) & np.uint64(1)).astype(np.int64) << places
        yield (np.add.reduceat(chosen, [0, *ends[:-1]], axis=1) + offsets).tolist()


def multiexp(bases: Sequence[mpz], exponents: np.ndarray, bits: int, n: mpz, blank: mpz | None = None) -> list[Product]:
    """Π bases[i] ** exponents[i, j] for all j.

    Args:
      bases: Elements of Z*_{n²}.
      exponents: uint64 ``[len(bases), outputs]``, each below 2**bits.
      bits: 1 to 64.
      n: The modulus's root.
      blank: An encryption of zero, which stands for the empty subset: the results are encryptions of the same under
        other masks. None: a one, which is multiplied in less time than others, and so tells how many bits are zero.

    Returns:
      One product for each output.
    """
    outputs = exponents.shape[1]
    if not len(bases) or not outputs:
        return [Product(mpz(1), mpz(0))] * outputs
    sizes = _blocks(len(bases), outputs, bits)
    lows: list[mpz] = []
    tails: list[mpz] = []
    empty, first = ONE if blank is None else Split.of(blank, n), 0
    for size in sizes:
        table = _subsets(bases[first : first + size], n, empty)
        lows += [entry.low for entry in table]
        tails += [entry.tail for entry in table]
        first += size
    square = n * n
    results = []
    for rows in _picks(exponents, sizes, bits):
        head, tail = mpz(1), mpz(0)
        for row in rows:
            head, tail = head * head % square, tail + tail
            for pick in row:
                head = head * lows[pick] % square
                tail += tails[pick]
        results.append(Product(head, tail % n))
    return results
