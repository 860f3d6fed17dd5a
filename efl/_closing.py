"""Sessions are closed in threads of their own, and no fit and no recovery waits long for them.

TensorFlow may take a minute: an iterator whose pipeline prefetches or maps in parallel has a thread that tunes it and
sleeps for up to 60 s in between, and what wakes it when the iterator goes is lost if it comes a moment before the
thread falls asleep (``Model::OptimizeLoop``; with TensorFlow 2.21 one session in a hundred). A recovery or the next fit
would stand still for so long. Only the program's end has to wait: a thread that comes back from TensorFlow while the
interpreter is being taken down ends the process with SIGABRT.
"""

from __future__ import annotations

import atexit
import os
import queue
import threading
import weakref

import tensorflow.compat.v1 as tf

_PATIENCE = 1.0  # seconds; most sessions are closed after some milliseconds
_AT_THE_END = 90.0  # more than TensorFlow ever takes
_Order = tuple[tf.Session, threading.Event]


class _Closer:
    """Takes orders from anywhere, also from a garbage collection, in which no thread may be started."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self.orders: queue.SimpleQueue[_Order] = queue.SimpleQueue()
        self.open: set[weakref.finalize] = set()
        self.closing: set[threading.Event] = set()
        threading.Thread(target=self._serve, name="efl-closing", daemon=True).start()
        atexit.register(self._finish)

    def _serve(self) -> None:
        while True:
            order = self.orders.get()
            threading.Thread(target=self._close, args=order, name="efl-closing-one", daemon=True).start()
            del order  # else it would be kept until the next one comes

    def _close(self, session: tf.Session, closed: threading.Event) -> None:
        try:
            session.close()
        finally:
            self.closing.discard(closed)
            closed.set()

    def _finish(self) -> None:
        if self.process == os.getpid():
            for finalizer in list(self.open):
                finalizer()
            for closed in list(self.closing):
                closed.wait(_AT_THE_END)


_closer: _Closer | None = None


def look_after(owner: object, session: tf.Session) -> weakref.finalize:
    """Has a session closed when its owner is collected, at the program's end, or when the result is called.

    That call returns when the session is closed, or takes too long.
    """
    global _closer
    if _closer is None or _closer.process != os.getpid():  # threads do not survive a fork
        _closer = _Closer()
    finalizer = weakref.finalize(owner, _close, session, _closer)
    finalizer.atexit = False  # see _finish
    _closer.open = {other for other in _closer.open if other.alive} | {finalizer}
    return finalizer


def _close(session: tf.Session, closer: _Closer) -> None:
    if closer.process != os.getpid():
        return  # the parent's
    closed = threading.Event()
    closer.closing.add(closed)
    closer.orders.put((session, closed))
    closed.wait(_PATIENCE)
