"""A gRPC call read and written by its operations, where its own iterators take three more wake-ups for each message.

gRPC's Python draws what a stream sends from an iterator, in a thread of its own that waits until each message has left,
and hands what arrives to another thread, fetching the next only when that asks for it. The operations underneath
(``SendMessageOperation``, ``ReceiveMessageOperation``) need none of this: a message is written by the thread that has
it, or by gRPC's own when that hears that the last one has left, and what arrives is taken in where gRPC finds it. Only
what may take long, or wait, is left to a thread of ours: gRPC's own serves reading and writing of every call.

They are no part of gRPC's public interface. So a call is opened, ended and judged by the public one, the first message
in each direction included; an operation is entered among those which the call has to finish, as gRPC enters its own;
and where anything that is used here is not as expected, the public iterators go on alone. ``EFL_GRPC_ITERATORS=1`` asks
for that.
"""

from __future__ import annotations

import abc
import functools
import logging
import os
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc

logger = logging.getLogger("efl")

_NO_FLAGS = 0
_CALL_OK = 0
_MOST_UNDONE, _MOST_UNDONE_BYTES = 64, 4 << 20  # messages on which there is something left to do

Work = Callable[[], None]


class Operations(abc.ABC):
    """The operations of one call."""

    def __init__(self, cygrpc: Any, call: Any, state: Any) -> None:
        """Args:
        cygrpc: gRPC's module of operations.
        call: gRPC's own call object.
        state: What gRPC keeps of the call: its lock, and the operations that are due.
        """
        self._send, self._receive = cygrpc.SendMessageOperation, cygrpc.ReceiveMessageOperation
        self._call, self._state = call, state

    @abc.abstractmethod
    def _begin(self, operation: Any, done: Callable[[Any], None]) -> bool:
        """Begins an operation; ``done(event)`` follows in gRPC's thread. False where the call is over."""

    def write(self, message: bytes, done: Callable[[], None]) -> bool:
        """Sends one message; no other may be on its way.

        Args:
          message: What to send.
          done: Called from gRPC's thread when the next may be sent.

        Returns:
          Whether the call took it; False when it is over.
        """
        return self._begin(self._send(message, _NO_FLAGS), lambda event: done())

    def read(self, take: Callable[[bytes], Work | None]) -> Iterator[Work]:
        """Takes all messages that are still to come, as gRPC's thread brings them.

        Args:
          take: Called from gRPC's thread with each message, in order. It must not wait; what may is left to do.

        Yields:
          What is left to do, in order, as long as the stream lasts; what ``take`` raises is raised by it. While much is
          left, no more is fetched.
        """
        left: queue.SimpleQueue[tuple[Work | None, int]] = queue.SimpleQueue()
        lock = threading.Lock()
        undone, undone_bytes, fetching = 0, 0, True
        over = threading.Event()

        def end() -> None:
            over.set()
            left.put((None, 0))

        def fetch() -> None:
            if not self._begin(self._receive(_NO_FLAGS), arrived):
                end()

        def arrived(event: Any) -> None:
            nonlocal undone, undone_bytes, fetching
            message: bytes | None = event.batch_operations[0].message()
            if message is None:
                end()
                return
            again = True
            try:
                work = take(message)
            except BaseException as error:
                work, again = functools.partial(_raise, error), False
            if work is not None:
                with lock:
                    undone, undone_bytes = undone + 1, undone_bytes + len(message)
                    fetching = again = again and undone < _MOST_UNDONE and undone_bytes < _MOST_UNDONE_BYTES
                left.put((work, len(message)))
            if again:
                fetch()

        fetch()
        while not over.is_set():
            work, size = left.get()
            if work is None:
                return
            yield work
            with lock:
                undone, undone_bytes = undone - 1, undone_bytes - size
                again, fetching = not fetching, True
            if again:
                fetch()


def _raise(error: BaseException) -> None:
    raise error


def _safely(done: Callable[[Any], None], event: Any) -> None:
    """gRPC's thread serves every call, and must go on."""
    try:
        done(event)
    except Exception:  # and the thread would end with it
        logger.exception("what follows on a gRPC operation failed")


def _begun(begin: Callable[[], bool]) -> bool:
    """Whether an operation has begun; one that cannot ends the stream, as where the call is over."""
    try:
        return bool(begin())
    except Exception:  # of gRPC's inner parts, which raise what they like
        logger.exception("a gRPC operation could not begin")
        return False


class _OfDialled(Operations):
    def _begin(self, operation: Any, done: Callable[[Any], None]) -> bool:
        state, token = self._state, object()

        def tag(event: Any) -> bool:
            _safely(done, event)
            with state.condition:
                state.due.remove(token)
                return not state.due

        with state.condition:
            if state.code is not None:
                return False
            begun = _begun(lambda: self._call.operate((operation,), tag))
            if begun:
                state.due.add(token)
            return begun


class _OfServed(Operations):
    def __init__(self, cygrpc: Any, call: Any, state: Any, server: Any) -> None:
        super().__init__(cygrpc, call, state)
        self._is_active, self._possibly_finish = server._is_rpc_state_active, server._possibly_finish_call

    def _begin(self, operation: Any, done: Callable[[Any], None]) -> bool:
        state, token = self._state, object()

        def tag(event: Any) -> Any:
            _safely(done, event)
            with state.condition:
                return self._possibly_finish(state, token)

        with state.condition:
            if not self._is_active(state):
                return False
            begun = _begun(lambda: self._call.start_server_batch((operation,), tag) == _CALL_OK)
            if begun:
                state.due.add(token)
            return begun


def _wanted() -> bool:
    return os.environ.get("EFL_GRPC_ITERATORS", "") in ("", "0")


def of_dialled(call: grpc.Call) -> Operations | None:
    """The operations of a stream that this side has opened; None where its iterators are to be used alone."""
    try:
        from grpc._cython import cygrpc

        inner, state = call._call, call._state
        known = isinstance(inner, cygrpc.IntegratedCall) and isinstance(state.due, set) and hasattr(state, "code")
        return _OfDialled(cygrpc, inner, state) if known and _wanted() else None
    except (ImportError, AttributeError):
        return None


def of_served(context: grpc.ServicerContext) -> Operations | None:
    """The operations of a stream that was opened to this side; None where its iterators are to be used alone."""
    try:
        from grpc import _server
        from grpc._cython import cygrpc

        inner, state = context._rpc_event.call, context._state
        known = isinstance(inner, cygrpc.Call) and isinstance(state.due, set)
        return _OfServed(cygrpc, inner, state, _server) if known and _wanted() else None
    except (ImportError, AttributeError):
        return None
