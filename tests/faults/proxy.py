"""A bad line between two parties: a TCP proxy on loopback that delays, throttles, cuts, swallows, damages and repeats.

    with BadLine(to="127.0.0.1:50051") as line:  # the follower dials line.address
        line.cut()                               # every connection is reset; new ones are accepted
        line.close_for(3.0)                      # nobody answers at the address for so long
        line.black_hole(30.0)                    # bytes vanish, connections stay; those that come are accepted
        line.delay(0.05)                         # everything arrives so much later, each way
        line.throttle(1_000_000)                 # bytes a second, each way
        line.cut_after(5000)                     # cut when so many more bytes have passed, both ways together
        line.damage(1)                           # one bit of the next piece of at least 200 bytes flips
        line.duplicate()                         # what the follower said and says goes over a second connection too
        line.duplicate_next(2, ahead=True)       # the same for the next connections, the copy ahead of the original

It knows nothing of what passes.
"""

from __future__ import annotations

import contextlib
import random
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

from efl._ports import free_port

_PIECE = 64 << 10
_UNDER_WAY = 32 << 20  # bytes that a delayed line holds, each way; its end takes more only when some have arrived
_REMEMBERED = 4 << 20  # bytes of a connection's beginning; one that has carried more is not duplicated


class _Crossing:
    """One connection: its two ends, what its dialler has said, and the copies that say the same."""

    def __init__(self, near: socket.socket, far: socket.socket) -> None:
        self.near, self.far = near, far
        # On a connection that has lost bytes in a hole nothing passes any more, in either direction.
        self.broken = threading.Event()
        self.lock = threading.Lock()
        self.said = bytearray()
        self.copies: list[socket.socket] = []
        self.ahead = False

    def pass_on(self, piece: bytes) -> None:
        """The dialler said this."""
        with self.lock:
            if len(self.said) <= _REMEMBERED:
                self.said += piece
            if self.ahead:
                self._repeat(piece)
            self.far.sendall(piece)
            if not self.ahead:
                self._repeat(piece)

    def _repeat(self, piece: bytes) -> None:
        for copy in list(self.copies):
            try:
                copy.sendall(piece)
            except OSError:  # the listener has turned it away
                self.copies.remove(copy)

    def add_copy(self, copy: socket.socket) -> bool:
        """Says everything again on another connection, and goes on with it. False: too much was said."""
        with self.lock:
            if len(self.said) > _REMEMBERED:
                return False
            copy.settimeout(5)  # a listener that reads no more must not hold up the original
            with contextlib.suppress(OSError):
                copy.sendall(self.said)
            self.copies.append(copy)
        return True


class BadLine:
    """The proxy. All methods may be called from any thread.

    Attributes:
      address: What to dial.
      passed: Bytes that went through, both ways together.
      connections: How many were made, copies not counted.
      copies: How many connections were duplicated.
      cuts: How often a count of bytes has cut the line.
      damaged: Pieces in which a bit was flipped.
    """

    def __init__(self, to: str, seed: int = 0) -> None:
        host, port = to.rsplit(":", 1)
        self._to = (host, int(port))
        self._random = random.Random(seed)
        self._listener: socket.socket | None = None
        self._lock = threading.Lock()
        self._crossings: list[_Crossing] = []
        self._delay = 0.0
        self._rate = 0.0
        self._hole_until = 0.0
        self._cut_at: int | None = None
        self._damages = 0
        self._duplicates = (0, False)
        self._over = threading.Event()
        self.passed = 0
        self.connections = 0
        self.copies = 0
        self.cuts = 0
        self.damaged = 0
        self._port = free_port()
        self.address = f"127.0.0.1:{self._port}"
        self._open()

    def __enter__(self) -> BadLine:
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._shut()
        self.cut()

    # ---- faults

    def cut(self) -> None:
        """Resets every connection."""
        with self._lock:
            crossings, self._crossings = self._crossings, []
        for crossing in crossings:
            for end in (crossing.near, crossing.far, *crossing.copies):
                _reset(end)

    def close_for(self, seconds: float) -> None:
        """Resets every connection and refuses new ones for a while."""
        self._shut()
        self.cut()

        def reopen() -> None:
            if not self._over.is_set():
                self._open()

        threading.Timer(seconds, reopen).start()

    def black_hole(self, seconds: float) -> None:
        """Swallows everything for a while; what was swallowed on a connection makes that connection useless."""
        self._hole_until = time.monotonic() + seconds

    def delay(self, seconds: float) -> None:
        """Delivers everything so much later than it came; what is under way keeps the time that it has."""
        self._delay = seconds

    def throttle(self, bytes_per_second: float) -> None:
        """Bounds the speed of each direction; 0 lifts the bound."""
        self._rate = bytes_per_second

    def cut_after(self, count: int) -> None:
        """Cuts once ``count`` more bytes have passed, in the middle of whatever passes then."""
        self._cut_at = self.passed + count

    def damage(self, pieces: int) -> None:
        """Flips one bit in each of the next pieces that are large enough to be more than framing."""
        self._damages = pieces

    def duplicate(self) -> None:
        """Opens a second connection for each, on which the dialler's bytes come a second time, from the first on.

        What is answered there is thrown away. The copy stays when the original ends: only the listener ends it, or a
        cut.
        """
        with self._lock:
            crossings = list(self._crossings)
        for crossing in crossings:
            self._copy(crossing)

    def duplicate_next(self, connections: int, ahead: bool = False) -> None:
        """Does the same to the next connections, as they come.

        Args:
          connections: How many.
          ahead: Whether the copy is opened, and gets every piece, before the original.
        """
        self._duplicates = (connections, ahead)

    @property
    def idle(self) -> bool:
        """Whether the cut that ``cut_after`` asked for was made."""
        return self._cut_at is None

    # ---- the line itself

    def _copy(self, crossing: _Crossing) -> None:
        try:
            copy = socket.create_connection(self._to, 5)
        except OSError:
            return
        if not crossing.add_copy(copy):
            copy.close()
            return
        self.copies += 1
        threading.Thread(target=_drain, args=[copy], daemon=True).start()

    def _open(self) -> None:
        if self._listener is not None:  # opened again by another fault that was over sooner
            return
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self._port))
        listener.listen(16)
        self._listener = listener
        threading.Thread(target=self._accept, args=[listener], daemon=True).start()

    def _shut(self) -> None:
        listener, self._listener = self._listener, None
        if listener is not None:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                near, _ = listener.accept()
            except OSError:
                return
            left, ahead = self._duplicates
            crossing = self._cross(near, left > 0 and ahead)
            if crossing is None:
                continue
            if left > 0:
                self._duplicates = (left - 1, ahead)
                if not ahead:
                    self._copy(crossing)
            for ends in ((crossing.near, crossing.far), (crossing.far, crossing.near)):
                threading.Thread(target=self._pump, args=[crossing, *ends], daemon=True).start()

    def _cross(self, near: socket.socket, copy_first: bool) -> _Crossing | None:
        crossing = _Crossing(near, near)
        crossing.ahead = copy_first
        if copy_first:
            self._copy(crossing)
        try:
            crossing.far = socket.create_connection(self._to, 5)
        except OSError:
            for end in (near, *crossing.copies):
                _reset(end)
            return None
        for end in (near, crossing.far):
            end.settimeout(None)
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.connections += 1
        with self._lock:
            self._crossings.append(crossing)
        return crossing

    def _pump(self, crossing: _Crossing, source: socket.socket, target: socket.socket) -> None:
        give = crossing.pass_on if source is crossing.near else target.sendall
        with contextlib.suppress(OSError, ValueError):
            for piece in self._arriving(source):
                if not self._deliver(crossing, piece, give):
                    return
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        with self._lock:  # half-closed or whole: nothing passes any more, and hours of cuts must leave nothing behind
            if crossing in self._crossings and not crossing.copies:
                self._crossings.remove(crossing)

    def _arriving(self, source: socket.socket) -> Iterator[bytes]:
        """The pieces that come from one end, each ``delay`` after it came, until that end has said its last."""
        under_way: deque[tuple[float, bytes]] = deque()
        size, more = 0, True
        while more or under_way:
            wait = max(0.0, under_way[0][0] - time.monotonic()) if under_way else None
            if select.select([source] if more and size < _UNDER_WAY else [], [], [], wait)[0]:
                piece = source.recv(_PIECE)
                under_way.append((time.monotonic() + self._delay, piece))
                size, more = size + len(piece), bool(piece)
            while under_way and under_way[0][0] <= time.monotonic():
                piece = under_way.popleft()[1]
                size -= len(piece)
                if piece:
                    yield piece

    def _deliver(self, crossing: _Crossing, piece: bytes, give: Callable[[bytes], None]) -> bool:
        """Does to a piece what the line does now. False: the line was cut."""
        if time.monotonic() < self._hole_until:
            crossing.broken.set()
        if crossing.broken.is_set():
            return True
        if self._rate:
            time.sleep(len(piece) / self._rate)
        if self._damages > 0 and len(piece) > 200:
            self._damages -= 1
            self.damaged += 1
            piece = self._damaged(piece)
        if self._cut_at is not None and self.passed + len(piece) >= self._cut_at:
            piece, self._cut_at = piece[: max(0, self._cut_at - self.passed)], None
            give(piece)
            self.passed += len(piece)
            self.cuts += 1
            self.cut()
            return False
        give(piece)
        self.passed += len(piece)
        return True

    def _damaged(self, piece: bytes) -> bytes:
        changed = bytearray(piece)
        at = self._random.randrange(len(changed) // 2, len(changed))
        changed[at] ^= 1 << self._random.randrange(8)
        return bytes(changed)


def _reset(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
    end.close()


def _drain(copy: socket.socket) -> None:
    """Throws away what is answered to a copy, until the listener ends it."""
    with contextlib.suppress(OSError, ValueError):  # closed meanwhile by who cuts the line
        while select.select([copy], [], [])[0] and copy.recv(_PIECE):
            pass
    _reset(copy)
