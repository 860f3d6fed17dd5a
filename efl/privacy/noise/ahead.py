"""Noise drawn ahead of its use, in a thread of its own.

Training releases the same groups in the same order step after step, so what comes next is known. To draw it takes
longer than to add it; meanwhile TensorFlow computes what it will be added to.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future

import numpy as np

from efl.privacy.noise.stream import gaussian

_LARGEST = 1 << 24  # values kept ready; 128 MiB


class Ahead:
    """The draws of one stream, in order: number n of a stream is used once, or never.

    Args:
      key_of: (stream, number) -> key. The keys of different streams or numbers have nothing to do with each other.
    """

    def __init__(self, key_of: Callable[[bytes, int], bytes]) -> None:
        self._key_of = key_of
        self._lock = threading.Lock()
        self._begin()

    def _begin(self) -> None:
        # A forked process must not draw what its parent draws.
        self._process, self._stream, self._number = os.getpid(), os.urandom(16), 0
        self._follows: dict[str, int] = {}  # group -> size of the release after it
        self._last = ""
        self._ready: tuple[int, int, Future[np.ndarray]] | None = None  # number, size, values
        self._orders: queue.SimpleQueue[tuple[Future[np.ndarray], bytes, int]] | None = None

    def next(self) -> tuple[bytes, int]:
        """Reserves the next draw: (stream, number)."""
        with self._lock:
            if self._process != os.getpid():
                self._begin()
            self._number += 1
            return self._stream, self._number

    def take(self, drawn: tuple[bytes, int], size: int, group: str) -> np.ndarray:
        """The values of a draw.

        Args:
          drawn: From ``next``, or an earlier one whose values are wanted again.
          size: How many values.
          group: Names the release, to learn the order.
        """
        with self._lock:
            ready, values = self._ready, None
            if ready is not None and ready[0] <= self._number:
                self._ready = None
                values = ready[2] if (self._stream, *ready[:2]) == (*drawn, size) else None
            self._follows[self._last], self._last = size, group
        return gaussian(self._key_of(*drawn), size) if values is None else values.result()

    def begin(self, group: str) -> None:
        """Begins the draw that is likely to be asked for after a release of ``group``, when that one is done."""
        with self._lock:
            size = self._follows.get(group, 0)
            if not 0 < size <= _LARGEST or self._ready is not None:
                return
            key, future = self._key_of(self._stream, self._number + 1), Future[np.ndarray]()
            self._ready = self._number + 1, size, future
            if self._orders is None:
                self._orders = queue.SimpleQueue()
                threading.Thread(target=_work, args=(self._orders,), name="efl-noise", daemon=True).start()
            self._orders.put((future, key, size))


def _work(orders: queue.SimpleQueue[tuple[Future[np.ndarray], bytes, int]]) -> None:
    while True:
        future, key, size = orders.get()
        try:
            future.set_result(gaussian(key, size))
        except BaseException as error:  # raised by who waits for it
            future.set_exception(error)
