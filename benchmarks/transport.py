"""Round trip and throughput of efl's channel, beside a raw TCP socket and a bare gRPC stream, in one run.

    python benchmarks/transport.py [--quick]

The two ends of every pair are separate processes on loopback. What each of the four does with a tensor:

* ``tcp``: length and bytes over a socket with TCP_NODELAY, into a fresh buffer.
* ``grpc``: bytes over a bidirectional stream without any code of ours; more than 1 MiB in messages of 1 MiB (one large
  message is slower). The server answers when it has all of them.
* ``efl recv``: ``Channel.send`` and ``Channel.recv`` of a numpy array: checksum, sequence, window, mailbox included.
* ``efl callback``: the same with ``Channel.subscribe`` on both sides, as a training step receives.

Round trip: the tensor goes there and comes back; median. Throughput: tensors one way, as fast as the window allows.
Measurements of the four take turns, so that a busy machine slows all of them alike.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from efl.transport import Channel, Endpoint, Hello, Limits, TensorSpec

KIB, MIB = 1 << 10, 1 << 20
SIZES = {"1 KiB": KIB, "128 KiB": 128 * KIB, "1 MiB": MIB, "16 MiB": 16 * MIB, "256 MiB": 256 * MIB}
OPTIONS = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1), ("grpc.so_reuseport", 0)]
PIECE = MIB
TENSORS = tuple((name, way) for way in ("there", "back") for name in ("echo", "direct"))
KINDS = ("tcp", "grpc", "efl recv", "efl callback")


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def host_port(address: str) -> tuple[str, int]:
    host, port = address.split(":")
    return host, int(port)


def channel(role: str, address: str, limits: Limits | None = None) -> Channel:
    leads = role == "leader"
    specs = []
    for name in ("echo", "direct"):
        specs.append(TensorSpec(f"there/{name}", "uint8", (None,), "recv" if leads else "send"))
        specs.append(TensorSpec(f"back/{name}", "uint8", (None,), "send" if leads else "recv"))
    return Channel(Endpoint(role, address, listen=leads), Hello(role, tuple(specs)), limits or Limits())


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


def serve_tcp(address: str) -> None:
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


def serve_grpc(address: str) -> None:
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
    server.add_insecure_port(address)
    server.start()
    sys.stdin.read()
    server.stop(0)


def serve_efl(address: str) -> None:
    """Answers as control messages ask: by mailbox, by callback, or only the last of many."""
    end = channel("leader", address)
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


class Tcp:
    def __init__(self, address: str) -> None:
        self.stream = socket.create_connection(host_port(address))
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
    def __init__(self, address: str) -> None:
        self.outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self.channel = grpc.insecure_channel(address, options=OPTIONS)
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

    def __init__(self, address: str) -> None:
        self.end = channel("follower", address)
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


# ---- memory


def peak_mib() -> float:
    """The most memory this process has held, in MiB (Linux; getrusage would count what its parent held)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return float(line.split()[1]) / 1024
    raise RuntimeError("no VmHWM in /proc/self/status: this part needs Linux")


def memory_side(role: str, address: str, count: int) -> None:
    """Sends or takes ``count`` tensors of 16 MiB; the taker is slow. Prints this process' peak memory above idle."""
    end = channel(role, address, Limits(max_outstanding_bytes=64 * MIB))
    end.connect(60)
    data = np.ones(16 * MIB, np.uint8)
    idle = peak_mib()
    for step in range(count):
        if role == "follower":
            end.send("there/echo", step, data)
        else:
            end.recv("there/echo", step)
            time.sleep(0.05)
    peak = peak_mib()
    end.close()
    print(peak - idle, flush=True)


def memory(counts: tuple[int, ...]) -> dict[int, tuple[float, float]]:
    found = {}
    for count in counts:
        address = free_address()
        sides = [start("memory", role, address, str(count)) for role in ("follower", "leader")]
        sent, taken = (float(side.communicate()[0]) for side in sides)
        found[count] = (sent, taken)
    return found


# ---- the run


def start(*arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    return subprocess.Popen(
        [sys.executable, __file__, "--side", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )


def connect_tcp(address: str) -> Tcp:
    while True:
        try:
            return Tcp(address)
        except ConnectionRefusedError:
            time.sleep(0.05)


def measure(quick: bool) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
    addresses = {kind: free_address() for kind in ("tcp", "grpc", "efl")}
    servers = [start(kind, address) for kind, address in addresses.items()]
    tcp = connect_tcp(addresses["tcp"])
    efl = Efl(addresses["efl"])
    bare = Grpc(addresses["grpc"])
    rounds, budget = (2, 8 * MIB) if quick else (5, 64 * MIB)
    trips: dict[str, dict[str, float]] = {}
    rates: dict[str, dict[str, float]] = {}
    for label, size in SIZES.items():
        data = np.frombuffer(os.urandom(size), np.uint8)
        count = max(3, min(60 if quick else 300, budget // size))
        times: dict[str, list[float]] = {kind: [] for kind in KINDS}
        speeds: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for _ in range(rounds):
            times["tcp"] += tcp.round_trips(data, count)
            times["grpc"] += bare.round_trips(data, count)
            times["efl recv"] += efl.round_trips(data, count)
            times["efl callback"] += efl.callback_round_trips(data, count)
            for kind, side in (("tcp", tcp), ("grpc", bare), ("efl recv", efl)):
                speeds[kind].append(count * size / side.one_way(data, count) / 1e9)
        trips[label] = {kind: statistics.median(values) * 1e6 for kind, values in times.items()}
        rates[label] = {kind: statistics.median(values) for kind, values in speeds.items() if values}
    for side in (tcp, bare, efl):
        side.close()
    for server in servers:
        server.communicate()
    return trips, rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("--side", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        name, *rest = arguments.side
        if name == "memory":
            memory_side(rest[0], rest[1], int(rest[2]))
        else:
            {"tcp": serve_tcp, "grpc": serve_grpc, "efl": serve_efl}[name](rest[0])
        return
    trips, rates = measure(arguments.quick)
    print("| tensor | " + " | ".join(f"{kind}, µs" for kind in KINDS) + " | efl recv / grpc | efl callback / grpc |")
    print("|---" * (len(KINDS) + 3) + "|")
    for label, row in trips.items():
        cells = [f"{row[kind]:,.0f}" for kind in KINDS]
        cells += [f"{row[kind] / row['grpc']:.2f}" for kind in KINDS[2:]]
        print(f"| {label} | " + " | ".join(cells) + " |")
    print("\n| tensor | tcp, GB/s one way | grpc | efl |\n|---|---|---|---|")
    for label, row in rates.items():
        print(f"| {label} | {row['tcp']:.2f} | {row['grpc']:.2f} | {row['efl recv']:.2f} |")
    counts = (16, 64) if arguments.quick else (16, 64, 256)
    peaks = memory(counts)
    print("\n| tensors of 16 MiB, window 64 MiB | sender's peak above idle, MiB | receiver's |\n|---|---|---|")
    for count, (sent, taken) in peaks.items():
        print(f"| {count} | {sent:.0f} | {taken:.0f} |")
    ratios = {label: round(row["efl recv"] / row["grpc"], 3) for label, row in trips.items()}
    summary = {
        "benchmark": "transport",
        "ratio": ratios["128 KiB"],
        "round_trip_us": {label: {k: round(v, 1) for k, v in row.items()} for label, row in trips.items()},
        "ratios": ratios,
        "gbytes_per_second": {label: {k: round(v, 3) for k, v in row.items()} for label, row in rates.items()},
        "peak_mib": {str(count): [round(v) for v in both] for count, both in peaks.items()},
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
