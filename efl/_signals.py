"""Ctrl-C and SIGTERM while a model is being run.

The main thread sits in TensorFlow for most of a run, where Python runs no signal handlers, for minutes where it waits
for a peer. But the C handler writes to the wake-up descriptor at once; a thread reads it. A handler that raised in the
middle of a step would hit TensorFlow's own error handling, so within a step it only notes the wish, and the step loop
looks.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from efl.errors import EflError

_log = logging.getLogger("efl")
TERMINATED = 128 + signal.SIGTERM  # the exit code of who ends for a SIGTERM
_PATIENCE = 0.5  # seconds that a step has to end by itself after Ctrl-C
_GRACE = 10.0  # seconds that a party has to come to a mark after SIGTERM


class Signals:
    """Watches SIGINT and SIGTERM inside a ``with`` block. Does nothing outside the main thread.

    Args:
      on_terminate: Called from a thread when SIGTERM arrives; False where nothing can be saved together with the peer.
      abort_step: Called from a thread to end a step that waits.

    Attributes:
      stepping: Whether a step loop runs, which looks by itself.
      interrupted: Ctrl-C arrived.
      terminated: SIGTERM arrived.
      overdue: SIGTERM arrived, and there is nothing more to wait for.
    """

    def __init__(self, on_terminate: Callable[[], bool], abort_step: Callable[[str], None]) -> None:
        self.stepping = self.interrupted = self.terminated = self.overdue = False
        self._on_terminate, self._abort_step = on_terminate, abort_step
        self._handlers: dict[int, Any] = {}
        self._old_fd = -1
        self._ends: tuple[socket.socket, socket.socket] | None = None
        self._over = threading.Event()

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            reading, writing = self._ends = socket.socketpair()
            writing.setblocking(False)
            self._old_fd = signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):  # the user's own stay
                    self._handlers[number] = signal.signal(number, self._handle)
            threading.Thread(target=self._watch, args=[reading], name="efl-signals", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        if self._ends is not None:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._old_fd)
            for end in self._ends:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
                end.close()

    def check(self) -> None:
        """Ends a step loop where that was wished.

        Raises:
          KeyboardInterrupt: Ctrl-C.
          SystemExit: SIGTERM, and nothing can be saved.
        """
        if self.interrupted:
            raise KeyboardInterrupt
        if self.overdue:
            raise SystemExit(TERMINATED)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self.interrupted or not self.stepping:
                raise KeyboardInterrupt
            self.interrupted = True
        elif not self.stepping:
            raise SystemExit(TERMINATED)
        else:
            self.terminated = True

    def raise_late(self) -> None:
        """Ends the program where that was wished in the last step: nothing has looked since.

        Raises:
          KeyboardInterrupt: Ctrl-C.
          SystemExit: SIGTERM.
        """
        self.overdue |= self.terminated
        self.check()

    def _watch(self, reading: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := reading.recv(16):
                for number in data:
                    if number in self._handlers and self.stepping:
                        threading.Thread(target=self._answer, args=[number], daemon=True).start()

    def _answer(self, number: int) -> None:
        if number == signal.SIGINT:
            self._over.wait(_PATIENCE)
            why = "was interrupted (Ctrl-C)"
        else:
            waits = False
            with contextlib.suppress(EflError):  # the conversation is over: nothing to wait for
                waits = self._on_terminate()
            if waits:
                self._over.wait(_GRACE)
            why = "was stopped (SIGTERM)"
            self.overdue = True
        if not self._over.is_set():
            self._abort_step(why)
