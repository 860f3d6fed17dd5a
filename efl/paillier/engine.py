"""Heavy arithmetic under one public key, all cores at once.

An ``Engine`` cuts its work into pieces, has them computed, and puts the results together. With ``workers=0`` it
computes here; otherwise worker processes do (``workers``), since products of large numbers hold Python's interpreter.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from itertools import pairwise
from typing import Any

import numpy as np
from gmpy2 import mpz

from efl.errors import ConfigError
from efl.paillier import kernels, multiexp, residues
from efl.paillier.decryption import processors
from efl.paillier.factored import Product
from efl.paillier.public_key import PublicKey
from efl.paillier.worker import products_of
from efl.paillier.workers import Pool, acquire, release

Progress = Callable[[float], None]
Request = tuple[Mapping[str, Any], Sequence[np.ndarray]]

_PIECE_SECONDS = 2.0  # how soon a call that is no longer wanted ends
_MASKS, _POWERS, _SPREADS = 64, 64, 4  # in a piece
_TELL_SECONDS = 0.5


def default_workers() -> int:
    """How many worker processes an ``Engine`` has: ``EFL_PAILLIER_WORKERS``, or one for each core.

    Raises:
      ConfigError: The variable is no number.
    """
    text = os.environ.get("EFL_PAILLIER_WORKERS", "").strip()
    if not text:
        return processors()
    if not text.isdecimal() or int(text) > 1024:
        raise ConfigError(f"EFL_PAILLIER_WORKERS={text!r}: expected a number of processes from 0 (none) to 1024")
    return int(text)


class Engine:
    """Products, powers and masks under one public key. Engines of one key share their workers.

    Args:
      public: The key.
      progress: Called now and then during a long call with the part of it that is done, 0 to 1. What it raises ends the
        call.
      workers: Processes that compute; by default ``default_workers()``, with 0 none.
    """

    def __init__(self, public: PublicKey, progress: Progress | None = None, workers: int | None = None) -> None:
        self.public = public
        self.progress: Progress = progress or (lambda part: None)
        self._count = default_workers() if workers is None else workers
        self._pool: Pool | None = None
        self._pid, self._guard = os.getpid(), threading.Lock()

    @property
    def threads(self) -> int:
        """How many threads of this process may compute beside it, where that releases the interpreter."""
        return max(1, self._count)

    def start(self) -> None:
        """Starts the workers, without waiting for them."""
        self._workers()

    def masks(self, count: int, bits: int) -> list[mpz]:
        """Random encryptions of zero, as elements mod n². Workers make some ahead, as many as were missing before.

        Args:
          count: How many.
          bits: Of their exponents.
        """
        bits = max(bits, self.public.masks.fresh_bits)
        pool = self._workers()
        if pool is None:
            return self._here(lambda piece: kernels.masks(self.public, piece, bits), _pieces(count, _MASKS))
        ready = pool.take_masks(count, bits)
        sizes = _pieces(count - len(ready), _MASKS)
        answers = self._ask([({"op": "masks", "count": size, "bits": bits}, []) for size in sizes])
        return ready + [each for (rows,) in answers for each in residues.from_rows(rows)]

    def matmul(self, groups: Sequence[Sequence[mpz]], exponents: np.ndarray, bits: int) -> list[list[Product]]:
        """Π groups[g][i] ** exponents[i, j] for all g and j.

        Args:
          groups: Rows of bases, all of one length.
          exponents: uint64 ``[bases, outputs]``, each below 2**bits.
          bits: 1 to 64.
        """
        pool = self._workers()
        bases, outputs = exponents.shape
        scale = (self.public.bits / 2048) ** 2
        parts = _split(len(groups), bases, outputs, bits, 1 if pool is None else self._count, _PIECE_SECONDS / scale)
        found: list[list[Product]]
        if pool is None:
            found = []
            for number, (g, rows_of, columns) in enumerate(parts):
                found.append(kernels.products(self.public, groups[g][rows_of], exponents[rows_of, columns], bits))
                self.progress((number + 1) / len(parts))
        else:
            rows = [self._rows(each) for each in groups]
            header = {"op": "products", "bits": bits}
            answers = self._ask([(header, [rows[g][at], exponents[at, out]]) for g, at, out in parts])
            found = [products_of(arrays) for arrays in answers]
        square = self.public.square
        whole: list[list[Product | None]] = [[None] * outputs for _ in groups]
        for (g, _, columns), products in zip(parts, found):
            for j, product in zip(range(*columns.indices(outputs)), products):
                before = whole[g][j]
                whole[g][j] = product if before is None else before.times(product, square)
        return [[each for each in row if each is not None] for row in whole]

    def powers(self, bases: Sequence[mpz], exponents: Sequence[int]) -> list[mpz]:
        """bases[i] ** exponents[i] mod n²; exponents at least 0 and below 2**64."""
        pieces = _slices(len(bases), _POWERS)
        if self._workers() is None:
            return self._here(lambda at: kernels.powers(self.public, bases[at], exponents[at]), pieces)
        rows, held = self._rows(bases), np.array(exponents, np.uint64)
        answers = self._ask([({"op": "powers"}, [rows[at], held[at]]) for at in pieces])
        return [each for (found,) in answers for each in residues.from_rows(found)]

    def spread(self, bases: Sequence[mpz], digits: np.ndarray, digit_bits: int, slot_bits: int) -> list[list[Product]]:
        """bases[i] ** Σₛ digits[i, s, g]·2^(slot_bits·s) for all i and g.

        Args:
          bases: Elements mod n².
          digits: uint64 ``[bases, slots, groups]``, each below 2**digit_bits.
          digit_bits: At most ``slot_bits``.
          slot_bits: Of a slot.
        """
        groups = digits.shape[2]
        if self._workers() is None:
            return self._here(
                lambda i: [kernels.spread(self.public, bases[i], digits[i], digit_bits, slot_bits)], range(len(bases))
            )
        rows, header = self._rows(bases), {"op": "spread", "bits": digit_bits, "slot_bits": slot_bits}
        answers = self._ask([(header, [rows[at], digits[at]]) for at in _slices(len(bases), _SPREADS)])
        flat = [each for arrays in answers for each in products_of(arrays)]
        return [flat[i : i + groups] for i in range(0, len(flat), groups)]

    def close(self) -> None:
        """Lets the workers go; they end with the last engine of their key."""
        if self._pool is not None:
            release(self._pool)
            self._pool = None

    # ---- private

    def _workers(self) -> Pool | None:
        if not self._count:
            return None
        if os.getpid() != self._pid:  # forked: the pool, and perhaps the lock, are the other process's
            self._pid, self._guard, self._pool = os.getpid(), threading.Lock(), None
        with self._guard:
            if self._pool is None:
                self._pool = acquire(self.public, self._count)
            return self._pool

    def _rows(self, elements: Sequence[mpz]) -> np.ndarray:
        return residues.to_rows(elements, residues.width_of(int(self.public.square)))

    def _here(self, work: Callable[[Any], list[Any]], pieces: Sequence[Any]) -> list[Any]:
        found: list[Any] = []
        for number, piece in enumerate(pieces):
            found += work(piece)
            self.progress((number + 1) / len(pieces))
        return found

    def _ask(self, requests: Sequence[Request]) -> list[list[np.ndarray]]:
        """The workers' answers, in order. Whatever ends it drops what was not begun."""
        pool = self._workers()
        assert pool is not None
        futures: list[Future[list[np.ndarray]]] = []
        waiting: set[Future[list[np.ndarray]]] = set()
        try:
            for request in requests:
                futures.append(pool.submit(*request))
                waiting.add(futures[-1])
            while waiting:
                done, waiting = wait(waiting, _TELL_SECONDS, FIRST_COMPLETED)
                for each in done:
                    each.result()
                self.progress(1 - len(waiting) / len(futures))
            return [each.result() for each in futures]
        finally:
            for each in waiting:
                each.cancel()


def _pieces(count: int, size: int) -> list[int]:
    return [min(size, count - at) for at in range(0, count, size)]


def _slices(count: int, size: int) -> list[slice]:
    return [slice(at, min(at + size, count)) for at in range(0, count, size)]


def _split(
    groups: int, bases: int, outputs: int, bits: int, workers: int, most: float = _PIECE_SECONDS
) -> list[tuple[int, slice, slice]]:
    """Cuts products of several groups into pieces: (group, bases, outputs) of each.

    Whole groups are cheapest: a table serves all outputs, squarings serve all bases. Long ones are cut by outputs. What
    is left over when all workers have had the same number is cut by bases, so that none waits for another.
    """
    cuts = max(1, min(outputs, math.ceil(multiexp.seconds(bases, outputs, bits) / most)))
    edges = np.linspace(0, outputs, cuts + 1).astype(int).tolist()
    whole = [(g, slice(0, bases), slice(a, b)) for g in range(groups) for a, b in pairwise(edges)]
    left = len(whole) % workers
    if not left or bases < 2 * workers:
        return whole
    edges = np.linspace(0, bases, workers + 1).astype(int).tolist()
    cut = [(g, slice(a, b), out) for g, _, out in whole[-left:] for a, b in pairwise(edges)]
    return whole[:-left] + cut
