"""A bare gRPC stream: alone, and in the place of efl's ``Channel``, to see what the exactly-once link itself costs.

Of gRPC one bidirectional stream. No sequence numbers, acknowledgements, replay, checksums, windows, heartbeats or
checks of what the peer says: whatever is lost is lost.
"""

from __future__ import annotations

import contextlib
import json
import queue
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from typing import Any

import grpc
import numpy as np

from efl.transport import Endpoint, Hello, Limits

_CALL = ("bare.Stream", "Run")
_OPTIONS = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1), ("grpc.so_reuseport", 0)]
_HEAD = struct.Struct("<HBBq")  # index of the name (or _CONTROL), bytes of the digest, rank, step
_CONTROL = 0xFFFF


class Wire:
    """One party's end of the stream.

    Args:
      role: The leader listens, the follower dials.
      address: Where.
      receive: Called with each message, from the thread that reads.
      ended: Called when no more will come.
    """

    def __init__(
        self, role: str, address: str, receive: Callable[[bytes], None], ended: Callable[[], None] = lambda: None
    ) -> None:
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._receive, self._ended = receive, ended
        met = self._met = threading.Event()
        self.send = self._outbox.put
        if role == "leader":
            self._server = grpc.server(futures.ThreadPoolExecutor(2), options=_OPTIONS)
            method = grpc.stream_stream_rpc_method_handler(self._serve)
            handlers = grpc.method_handlers_generic_handler(_CALL[0], {_CALL[1]: method})
            self._server.add_generic_rpc_handlers((handlers,))
            self._server.add_insecure_port(address)
            self._server.start()
        else:
            self._channel = grpc.insecure_channel(address, options=_OPTIONS)
            stream = self._channel.stream_stream("/" + "/".join(_CALL))
            self._start_reading(stream(iter(self._outbox.get, None), wait_for_ready=True))
        if not met.wait(60):
            raise TimeoutError(f"no peer at {address}")

    def _serve(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        self._start_reading(requests)
        return iter(self._outbox.get, None)

    def _start_reading(self, messages: Iterator[bytes]) -> None:
        def read() -> None:
            with contextlib.suppress(Exception):  # gRPC raises bare ones where a call breaks off
                for message in messages:
                    self._receive(message)
            self._ended()

        threading.Thread(target=read, daemon=True).start()
        self._met.set()

    def end(self) -> None:
        """Sends what is queued, and no more."""
        self._outbox.put(None)


class BareChannel:
    """As much of ``efl.transport.Channel`` as a run without faults needs, over a ``Wire``."""

    error = None
    away = False

    def __init__(self, endpoint: Endpoint, hello: Hello, limits: Limits) -> None:
        self._endpoint, self._hello = endpoint, hello
        self._names = sorted(tensor.name for tensor in hello.tensors)
        self._index = {name: index for index, name in enumerate(self._names)}
        self._dtypes = {tensor.name: np.dtype(tensor.dtype) for tensor in hello.tensors}
        self._tensors: dict[str, Callable[..., Any]] = {}
        self._controls: dict[str, Callable[..., Any]] = {}
        self._unread: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._on_closed: list[Callable[[str], None]] = []
        self.peer_closed = False
        # Nothing is handed over before the peer's facts are known: its hello is the first message.
        self._met: queue.SimpleQueue[Hello] = queue.SimpleQueue()

    def subscribe(self, name: str, callback: Callable[..., Any]) -> None:
        """Has a tensor handed to a callback."""
        self._tensors[name] = callback

    def on_control(self, topic: str, callback: Callable[..., Any]) -> None:
        """Has a control message handed to a callback."""
        self._controls[topic] = callback

    def on_peer_closed(self, callback: Callable[[str], None]) -> None:
        """Tells the end of the stream."""
        self._on_closed.append(callback)

    def ignore(self, *arguments: Any) -> None:
        """What only a link can do, or needs."""

    on_away = on_back = on_failure = judge = consumed = ignore

    def connect(self, timeout: float, stubborn: bool = False) -> Hello:
        """Exchanges facts, compares nothing."""
        self._wire = Wire(self._hello.role, self._endpoint.address, self._receive, self._ended)
        self.send_control("hello", self._hello.facts)
        return self._met.get(timeout=timeout)

    def send(self, name: str, step: int, array: np.ndarray, digest: bytes = b"", timeout: float | None = None) -> None:
        """Queues a tensor."""
        head = _HEAD.pack(self._index[name], len(digest), array.ndim, step)
        shape = struct.pack(f"<{array.ndim}q", *array.shape)
        self._wire.send(b"".join((head, shape, digest, np.ascontiguousarray(array).data.cast("B"))))

    def send_control(self, topic: str, body: Mapping[str, Any]) -> None:
        """Queues a control message."""
        self._wire.send(_HEAD.pack(_CONTROL, 0, 0, 0) + json.dumps([topic, body]).encode())

    def recv_control(self, topic: str, timeout: float | None = None) -> dict[str, Any]:
        """The next control message that has no callback: there is one topic of these, a reader's plan."""
        return self._unread.get(timeout=timeout)

    def close(self, timeout: float = 0.0) -> None:
        """Ends the stream."""
        self._wire.end()

    def abandon(self) -> None:
        """Ends the stream."""
        self._wire.end()

    def abort(self, *why: Any) -> None:
        """Ends the stream."""
        self._wire.end()

    def _receive(self, message: bytes) -> None:
        index, digest_bytes, rank, step = _HEAD.unpack_from(message)
        at = _HEAD.size
        if index == _CONTROL:
            topic, body = json.loads(message[at:])
            if topic == "hello":
                self._met.put(Hello("leader" if self._hello.role == "follower" else "follower", facts=body))
            elif topic in self._controls:
                self._controls[topic](body)
            else:
                self._unread.put(body)
            return
        shape = struct.unpack_from(f"<{rank}q", message, at)
        at += 8 * rank
        digest = message[at : at + digest_bytes]
        name = self._names[index]
        array = np.frombuffer(message, self._dtypes[name], offset=at + digest_bytes).reshape(shape)
        self._tensors[name](step, array, digest)

    def _ended(self) -> None:
        self.peer_closed = True
        for callback in self._on_closed:
            callback("the peer")
