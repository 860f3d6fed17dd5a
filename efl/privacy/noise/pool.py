"""Noise drawn ahead for whoever cannot say how much it will need.

A step that reads rows of tables needs a variate for each of their numbers, and how many that are the batch says. What
is drawn here is used once, by whoever comes first, and never again: a replay does not find it.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable

import numpy as np

from efl.privacy.noise.stream import gaussian

_CHUNK = 1 << 14  # variates
_MOST = 1 << 22  # kept ready; 32 MiB


class Pool:
    """Standard normal variates, each given out once. May be called from any thread.

    Args:
      key_of: (16 random bytes, number) -> key. The keys of different arguments have nothing to do with each other.
    """

    def __init__(self, key_of: Callable[[bytes, int], bytes]) -> None:
        self._key_of = key_of
        self._lock = threading.Lock()
        self._begin()

    def _begin(self) -> None:
        # A forked process must not give out what its parent gives out.
        self._process, self._name, self._number = os.getpid(), os.urandom(16), 0
        self._ready: deque[np.ndarray] = deque()
        self._left = 0  # variates that are ready
        self._wanted = 0  # how many are to be kept ready
        self._wake: threading.Condition | None = None

    def take(self, count: int) -> np.ndarray:
        """float64 ``[count]``."""
        with self._lock:
            if self._process != os.getpid():
                self._begin()
            out = np.empty(count)
            done = 0
            while done < count and self._ready:
                chunk = self._ready.popleft()
                used = min(len(chunk), count - done)
                out[done : done + used] = chunk[:used]
                if used < len(chunk):
                    self._ready.appendleft(chunk[used:])
                self._left -= used
                done += used
            key = self._next_key() if done < count else b""
            self._wanted = min(_MOST, max(2 * count, self._wanted - self._wanted // 64))
            self._fill()
        if done < count:
            out[done:] = gaussian(key, count - done)
        return out

    def _next_key(self) -> bytes:
        self._number += 1
        return self._key_of(self._name, self._number)

    def _fill(self) -> None:
        if self._wake is None:
            self._wake = threading.Condition(self._lock)
            threading.Thread(target=self._work, args=(self._wake,), name="efl-noise-pool", daemon=True).start()
        self._wake.notify()

    def _work(self, wake: threading.Condition) -> None:
        while True:
            with wake:
                while self._left >= self._wanted:
                    wake.wait()
                key = self._next_key()
            chunk = gaussian(key, _CHUNK)
            with wake:
                self._ready.append(chunk)
                self._left += len(chunk)
