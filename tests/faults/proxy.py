"""A bad line between two parties: a TCP proxy on loopback that delays, throttles, cuts, swallows and damages.

    with BadLine(to="127.0.0.1:50051") as line:  # the follower dials line.address
        line.cut()                               # every connection is reset; new ones are accepted
        line.close_for(3.0)                      # nobody answers at the address for so long
        line.black_hole(30.0)                    # bytes vanish, connections stay; those that come are accepted
        line.delay(0.05)                         # each piece arrives so much later
        line.throttle(1_000_000)                 # bytes a second, each way
        line.cut_after(5000)                     # cut when so many more bytes have passed, both ways together
        line.damage(1)                           # one bit of the next piece of at least 200 bytes flips

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

_PIECE = 64 << 10


class BadLine:
    """The proxy. All methods may be called from any thread; ``passed`` counts the bytes that went through."""

    def __init__(self, to: str, seed: int = 0) -> None:
        host, port = to.rsplit(":", 1)
        self._to = (host, int(port))
        self._random = random.Random(seed)
        self._listener: socket.socket | None = None
        self._lock = threading.Lock()
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._delay = 0.0
        self._rate = 0.0
        self._hole_until = 0.0
        self._cut_at: int | None = None
        self._damages = 0
        self._over = threading.Event()
        self.passed = 0
        self.connections = 0
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
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
            pairs, self._pairs = self._pairs, []
        for pair in pairs:
            for end in pair:
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
        """Holds every piece back so long."""
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

    # ---- the line itself

    def _open(self) -> None:
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
            try:
                far = socket.create_connection(self._to, 5)
            except OSError:
                _reset(near)
                continue
            for end in (near, far):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.connections += 1
            with self._lock:
                self._pairs.append((near, far))
            # On a connection that has lost bytes in a hole nothing passes any more, in either direction.
            broken = threading.Event()
            for pair in ((near, far), (far, near)):
                threading.Thread(target=self._pump, args=[*pair, broken], daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, broken: threading.Event) -> None:
        try:
            while True:
                select.select([source], [], [])
                if self._delay:
                    time.sleep(self._delay)
                piece = source.recv(_PIECE)
                if not piece:
                    break
                if time.monotonic() < self._hole_until:
                    broken.set()
                if broken.is_set():
                    continue
                if self._rate:
                    time.sleep(len(piece) / self._rate)
                if self._damages and len(piece) > 200:
                    self._damages -= 1
                    piece = self._damaged(piece)
                if self._cut_at is not None and self.passed + len(piece) >= self._cut_at:
                    piece, self._cut_at = piece[: max(0, self._cut_at - self.passed)], None
                    target.sendall(piece)
                    self.passed += len(piece)
                    self.cut()
                    return
                target.sendall(piece)
                self.passed += len(piece)
        except (OSError, ValueError):
            pass
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

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
