"""Noise drawn ahead of its use, in a thread of its own.

Training releases the same groups in the same order step after step, so what comes next is known. To draw it takes
longer than to add it; meanwhile TensorFlow computes what it will be added to. Small draws are made several in a row:
each takes the interpreter and a processor from the step beside it, and the first of a row costs half as much again.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future

import numpy as np

from efl.privacy.noise.stream import gaussian

_LARGEST = 1 << 24  # values of a draw that is kept ready; 128 MiB
_IN_A_ROW, _SMALL = 8, 1 << 20  # draws, as long as they have no more values than that together; 8 MiB


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
        self._follows: dict[str, tuple[str, int]] = {}  # group -> the release after it, and its size
        self._last = self._foreseen = ""  # group of the last release, and of the last one in _ready
        self._ready: dict[int, tuple[int, Future[np.ndarray]]] = {}  # number -> size, values
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
            stream, number = drawn
            known, values = self._ready.pop(number, (size, None)) if stream == self._stream else (size, None)
            if known != size:
                self._drop(list(self._ready))
                values = None
            self._follows[self._last], self._last = (group, size), group
        return gaussian(self._key_of(*drawn), size) if values is None else values.result()

    def begin(self, group: str) -> None:
        """Begins the draws that are likely to be asked for after a release of ``group``, when that one is done."""
        with self._lock:
            self._drop([number for number in self._ready if number <= self._number])  # those were replays
            if len(self._ready) > 1:
                return
            number = max(self._ready, default=self._number)
            before = self._foreseen if self._ready else group
            values = sum(size for size, _ in self._ready.values())
            for _ in range(_IN_A_ROW):
                before, size = self._follows.get(before, ("", 0))
                values += size
                if not 0 < size <= _LARGEST or (self._ready and values > _SMALL):
                    return
                number += 1
                self._foreseen = before
                self._order(number, size)

    def _order(self, number: int, size: int) -> None:
        future = Future[np.ndarray]()
        self._ready[number] = size, future
        if self._orders is None:
            self._orders = queue.SimpleQueue()
            threading.Thread(target=_work, args=(self._orders,), name="efl-noise", daemon=True).start()
        self._orders.put((future, self._key_of(self._stream, number), size))

    def _drop(self, numbers: list[int]) -> None:
        for number in numbers:
            self._ready.pop(number)[1].cancel()


def _work(orders: queue.SimpleQueue[tuple[Future[np.ndarray], bytes, int]]) -> None:
    while True:
        future, key, size = orders.get()
        if not future.set_running_or_notify_cancel():
            continue
        try:
            future.set_result(gaussian(key, size))
        except BaseException as error:  # raised by who waits for it
            future.set_exception(error)
