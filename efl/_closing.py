"""Sessions are closed in threads of their own, and nobody waits long for them.

TensorFlow may take a minute: an iterator whose pipeline prefetches or maps in parallel has a thread that tunes it and
sleeps for up to 60 s in between, and what wakes it when the iterator goes is lost if it comes a moment before the
thread falls asleep (``Model::OptimizeLoop``; with TensorFlow 2.21 one session in a hundred). A recovery, the next fit
or the end of the program would stand still for so long.
"""

from __future__ import annotations

import os
import queue
import threading

import tensorflow.compat.v1 as tf

_PATIENCE = 1.0  # seconds; most sessions are closed after some milliseconds
_Order = tuple[tf.Session, threading.Event]


class _Closer:
    """Takes orders from anywhere, also from a garbage collection, in which no thread may be started."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self.orders: queue.SimpleQueue[_Order] = queue.SimpleQueue()
        threading.Thread(target=self._serve, name="efl-closing", daemon=True).start()

    def _serve(self) -> None:
        while True:
            order = self.orders.get()
            threading.Thread(target=_close, args=order, name="efl-closing-one", daemon=True).start()
            del order  # else it would be kept until the next one comes


def _close(session: tf.Session, closed: threading.Event) -> None:
    try:
        session.close()
    finally:
        closed.set()


_closer: _Closer | None = None


def prepare() -> None:
    """Makes closing possible; call it before ``close`` may be."""
    global _closer
    if _closer is None or _closer.process != os.getpid():  # threads do not survive a fork
        _closer = _Closer()


def close(session: tf.Session) -> None:
    """Closes a session; returns when it is closed, or takes too long."""
    if _closer is None or _closer.process != os.getpid():
        return  # the parent's
    closed = threading.Event()
    _closer.orders.put((session, closed))
    closed.wait(_PATIENCE)
