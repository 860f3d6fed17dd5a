"""The two ends of every pair that ``transport.py`` measures: raw TCP, bare gRPC, efl's channel."""

from __future__ import annotations

import contextlib
import queue
import socket
import sys
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any, Protocol

import grpc
import numpy as np

from efl._ports import free_port
from efl.transport import Channel, Endpoint, Hello, Limits, TensorSpec, Tls

MIB = 1 << 20
OPTIONS = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1), ("grpc.so_reuseport", 0)]
PIECE = MIB


def free_address() -> str:
    return f"127.0.0.1:{free_port()}"


def host_port(address: str) -> tuple[str, int]:
    host, port = address.split(":")
    return host, int(port)


def certificates(folder: Path, role: str) -> Tls:
    """A party's certificates, from a folder that ``efl certs`` has written."""
    chain, key, roots = (str(folder / role / f"{name}.pem") for name in ("my_certs", "my_key", "peer_certs"))
    return Tls(chain, key, roots, "follower" if role == "leader" else "leader")


def pems(folder: Path, role: str) -> tuple[bytes, bytes, bytes]:
    """What gRPC takes: certificate, key, and by what the peer is recognised."""
    tls = certificates(folder, role)
    return Path(tls.my_certs).read_bytes(), Path(tls.my_key).read_bytes(), Path(tls.peer_certs).read_bytes()


def channel(role: str, address: str, limits: Limits | None = None, certs: Path | None = None) -> Channel:
    """A channel that has a tensor each way for ``recv``, and one for a callback; with ``certs`` over TLS."""
    leads = role == "leader"
    specs = []
    for name in ("echo", "direct"):
        specs.append(TensorSpec(f"there/{name}", "uint8", (None,), "recv" if leads else "send"))
        specs.append(TensorSpec(f"back/{name}", "uint8", (None,), "send" if leads else "recv"))
    tls = None if certs is None else certificates(certs, role)
    return Channel(Endpoint(role, address, listen=leads, tls=tls), Hello(role, tuple(specs)), limits or Limits())


# ---- the answering side. The first byte of a message (tcp, grpc) says whether it is answered.


def receive_exactly(stream: socket.socket, size: int) -> bytearray:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        got = stream.recv_into(view)
        if not got:
            raise EOFError
        view = view[got:]
    return data


def serve_tcp(address: str, certs: Path | None) -> None:
    with socket.create_server(host_port(address)) as server:
        stream, _ = server.accept()
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with contextlib.suppress(EOFError):
        while True:
            head = receive_exactly(stream, 9)
            data = receive_exactly(stream, int.from_bytes(head[1:], "little"))
            if head[0]:
                stream.sendall(head)
                stream.sendall(data)


def serve_grpc(address: str, certs: Path | None) -> None:
    def answer(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        for head in requests:
            left = int.from_bytes(head[1:9], "little") - len(head) + 9
            pieces = [head]
            while left > 0:
                pieces.append(next(requests))
                left -= len(pieces[-1])
            if head[0]:
                yield from pieces

    server = grpc.server(futures.ThreadPoolExecutor(2), options=OPTIONS)
    method = grpc.stream_stream_rpc_method_handler(answer)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bare.Echo", {"Echo": method}),))
    if certs is None:
        server.add_insecure_port(address)
    else:
        chain, key, roots = pems(certs, "leader")
        credentials = grpc.ssl_server_credentials([(key, chain)], roots, require_client_auth=True)
        server.add_secure_port(address, credentials)
    server.start()
    sys.stdin.read()
    server.stop(0)


def serve_efl(address: str, certs: Path | None) -> None:
    """Answers as control messages ask: by mailbox, by callback, or only the last of many."""
    end = channel("leader", address, certs=certs)
    outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    end.subscribe("there/direct", lambda step, array, digest: outbox.put((step, array)))
    end.connect(60)
    while True:
        run = end.recv_control("run")
        if run["how"] == "stop":
            break
        for step in range(run["first"], run["first"] + run["count"]):
            if run["how"] == "callback":
                _, array = outbox.get()
                end.send("back/direct", step, array)
                continue
            array = end.recv("there/echo", step)
            if run["how"] == "echo" or step == run["first"] + run["count"] - 1:
                end.send("back/echo", step, array if run["how"] == "echo" else array[:1])
    end.close()


# ---- the asking side


class Side(Protocol):
    """Who asks, and takes the time."""

    def round_trips(self, data: np.ndarray, count: int) -> list[float]:
        """Seconds of each of ``count`` echoes."""

    def one_way(self, data: np.ndarray, count: int) -> float:
        """Seconds until ``count`` tensors have arrived."""

    def close(self) -> None:
        """Ends it."""


class Tcp:
    def __init__(self, address: str) -> None:
        while True:
            with contextlib.suppress(ConnectionRefusedError):  # its server is starting
                self.stream = socket.create_connection(host_port(address))
                break
            time.sleep(0.05)
        self.stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def _send(self, echo: bool, data: np.ndarray) -> None:
        self.stream.sendall(bytes([echo]) + data.size.to_bytes(8, "little"))
        self.stream.sendall(data.data)

    def round_trips(self, data: np.ndarray, count: int) -> list[float]:
        def once() -> None:
            self._send(True, data)
            receive_exactly(self.stream, 9 + data.size)

        return timed(once, count)

    def one_way(self, data: np.ndarray, count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            self._send(False, data)
        self._send(True, data[:1])
        receive_exactly(self.stream, 10)
        return time.perf_counter() - start

    def close(self) -> None:
        self.stream.close()


class Grpc:
    def __init__(self, address: str, certs: Path | None = None) -> None:
        self.outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        if certs is None:
            self.channel = grpc.insecure_channel(address, options=OPTIONS)
        else:
            chain, key, roots = pems(certs, "follower")
            name = ("grpc.ssl_target_name_override", "leader")
            credentials = grpc.ssl_channel_credentials(roots, key, chain)
            self.channel = grpc.secure_channel(address, credentials, options=[*OPTIONS, name])
        stream = self.channel.stream_stream("/bare.Echo/Echo")
        self.answers = stream(iter(self.outbox.get, None), wait_for_ready=True)

    def _send(self, echo: bool, data: np.ndarray) -> None:
        view = data.data
        self.outbox.put(b"".join((bytes([echo]), data.size.to_bytes(8, "little"), view[:PIECE])))
        for at in range(PIECE, data.size, PIECE):
            self.outbox.put(bytes(view[at : at + PIECE]))

    def _receive(self, size: int) -> None:
        left = size + 9
        pieces = []
        while left > 0:
            pieces.append(next(self.answers))
            left -= len(pieces[-1])

    def round_trips(self, data: np.ndarray, count: int) -> list[float]:
        def once() -> None:
            self._send(True, data)
            self._receive(data.size)

        return timed(once, count)

    def one_way(self, data: np.ndarray, count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            self._send(False, data)
        self._send(True, data[:1])
        self._receive(1)
        return time.perf_counter() - start

    def close(self) -> None:
        self.outbox.put(None)
        self.answers.cancel()
        self.channel.close()


class Efl:
    """Both ways of receiving, over one channel."""

    def __init__(self, address: str, certs: Path | None = None) -> None:
        self.end = channel("follower", address, certs=certs)
        self.inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.end.subscribe("back/direct", lambda step, array, digest: self.inbox.put(array))
        self.end.connect(60)
        self.step = 0

    def _run(self, how: str, count: int) -> None:
        self.end.send_control("run", {"how": how, "first": self.step, "count": count})

    def round_trips(self, data: np.ndarray, count: int) -> list[float]:
        self._run("echo", count + 1)

        def once() -> None:
            self.end.send("there/echo", self.step, data)
            self.end.recv("back/echo", self.step)
            self.step += 1

        return timed(once, count)

    def callback_round_trips(self, data: np.ndarray, count: int) -> list[float]:
        self._run("callback", count + 1)

        def once() -> None:
            self.end.send("there/direct", self.step, data)
            self.inbox.get()
            self.step += 1

        return timed(once, count)

    def one_way(self, data: np.ndarray, count: int) -> float:
        self._run("one way", count)
        start = time.perf_counter()
        for _ in range(count):
            self.end.send("there/echo", self.step, data)
            self.step += 1
        self.end.recv("back/echo", self.step - 1)
        return time.perf_counter() - start

    def close(self) -> None:
        self._run("stop", 0)
        self.end.close()


def timed(action: Callable[[], Any], count: int) -> list[float]:
    """Seconds of each of ``count`` calls, after one that is not counted."""
    action()
    times = []
    for _ in range(count):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return times
