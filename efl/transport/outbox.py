"""What waits to be sent on one stream."""

from __future__ import annotations

import collections
import queue
import threading
from collections.abc import Iterator

from efl.transport import operations

_PACK_BYTES = 64 << 10  # frames are joined up to this size


class Outbox:
    """The messages of one direction. Small frames that wait together are joined.

    gRPC draws the first message as from any iterator; the others are written as soon as the one before has left, by
    the thread that brings them or by the one that hears of it, where the call can be written to (``write_to``).
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._frames: collections.deque[bytes] = collections.deque()
        self._operations: operations.Operations | None = None
        self._drawn = False  # gRPC has drawn a message
        self._busy = False  # one that was drawn or written has not left yet
        self._ended = False
        self._news: queue.SimpleQueue[None] = queue.SimpleQueue()  # for gRPC's thread that draws

    def write_to(self, call: operations.Operations | None) -> None:
        """From the second message on, writes to a call in place of waiting to be drawn from."""
        with self._lock:
            self._operations = call
        self._go_on()  # what came meanwhile

    def put(self, *frames: bytes) -> None:
        """Queues frames."""
        with self._lock:
            if self._ended:
                return
            self._frames.extend(frames)
        self._go_on()

    @property
    def waiting(self) -> int:
        """How many frames wait to be drawn."""
        return len(self._frames)

    def end(self) -> None:
        """Ends the direction after what is queued."""
        with self._lock:
            self._ended = True
        self._tell()

    def cut(self, last: list[bytes]) -> None:
        """Ends the direction with ``last``, in place of what is queued."""
        with self._lock:
            self._frames = collections.deque(last)
            self._ended = True
        self._go_on()
        self._tell()

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        with self._lock:
            self._busy = False  # gRPC asks for the next: the one that it drew has left
        self._go_on()
        while True:
            with self._lock:
                if not self._busy:
                    if self._frames and not self._writing:
                        self._busy = self._drawn = True
                        return self._draw()
                    if self._ended and not self._frames:
                        raise StopIteration
            self._news.get()

    @property
    def _writing(self) -> bool:
        return self._operations is not None and self._drawn

    def _tell(self) -> None:
        if self._news.empty():
            self._news.put(None)

    def _go_on(self) -> None:
        """Writes what waits, where nothing is on its way, or leaves it to be drawn."""
        with self._lock:
            call, message = self._operations, None
            if self._writing and self._frames and not self._busy:
                self._busy, message = True, self._draw()
            concerned = not self._writing or (self._ended and not self._frames and not self._busy)
        if call is not None and message is not None:
            if not call.write(message, self._on_left):
                self._on_over()
        elif concerned:
            self._tell()

    def _on_left(self) -> None:
        with self._lock:
            self._busy = False
        self._go_on()

    def _on_over(self) -> None:
        with self._lock:
            self._busy, self._ended = False, True
            self._frames.clear()
        self._tell()

    def _draw(self) -> bytes:
        frame = self._frames.popleft()
        if len(frame) >= _PACK_BYTES or not self._frames:
            return frame
        parts, size = [frame], len(frame)
        while self._frames and size + len(self._frames[0]) <= _PACK_BYTES:
            parts.append(self._frames.popleft())
            size += len(parts[-1])
        return b"".join(parts)
