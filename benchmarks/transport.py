"""Round trip and throughput of efl's channel, beside a raw TCP socket and a bare gRPC stream, in one run.

    python benchmarks/transport.py [--tls] [--quick] [--record benchmarks/results/transport.md]

The two ends of every pair are separate processes on loopback. What each does with a tensor:

* ``tcp``: length and bytes over a socket with TCP_NODELAY, into a fresh buffer.
* ``grpc``: bytes over a bidirectional stream without any code of ours; more than 1 MiB in messages of 1 MiB (one large
  message is slower). The server answers when it has all of them.
* ``efl recv``: ``Channel.send`` and ``Channel.recv`` of a numpy array: checksum, sequence, window, mailbox included.
* ``efl callback``: the same with ``Channel.subscribe`` on both sides and a queue to a thread that answers, as in a
  training step: two more threads are woken than in bare gRPC's echo.
* ``grpc tls``, ``efl recv tls`` (with ``--tls``): as without, with mutual TLS and the certificates of ``efl certs``.

Round trip: the tensor goes there and comes back; median. Throughput: tensors one way, as fast as the window allows.
Measurements of all take turns, so that a busy machine slows all of them alike. Who asks is a process of its own for
each pair, as a party is: channels of one process share gRPC's poller, and wake each other's threads. All processes are
begun anew in every round: which core their threads come to live on makes as much of a difference as what is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from _report import Goal, command_line, finish, goals_table, table
from _transport_ends import (
    MIB,
    Efl,
    Grpc,
    Side,
    Tcp,
    channel,
    free_address,
    serve_efl,
    serve_grpc,
    serve_tcp,
)

from efl.transport import Limits

KIB = 1 << 10
SIZES = {"1 KiB": KIB, "128 KiB": 128 * KIB, "1 MiB": MIB, "16 MiB": 16 * MIB, "256 MiB": 256 * MIB}
KINDS = ("tcp", "grpc", "efl recv", "efl callback", "grpc tls", "efl recv tls")
RATIOS = (
    ("efl recv", "grpc"),
    ("grpc tls", "grpc"),
    ("efl recv tls", "efl recv"),
    ("efl recv tls", "grpc tls"),
)
LEAST_GBYTES_TLS, LEAST_GBYTES = 0.6, 1.0
LEAST, MOST = 0.9, 1.3  # of the bare stream's throughput, and of its round trip


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


def ask(kind: str, address: str, certs: Path | None) -> None:
    """Measures what it is told to, a line of JSON each: [method, bytes, count]; answers with the method's result."""
    side: Side
    if kind == "tcp":
        side = Tcp(address)
    else:
        side = Grpc(address, certs) if kind == "grpc" else Efl(address, certs)
    data: dict[int, np.ndarray] = {}
    for line in sys.stdin:
        method, size, count = json.loads(line)
        if size not in data:
            data = {size: np.frombuffer(os.urandom(size), np.uint8)}
        print(json.dumps(getattr(side, method)(data[size], count)), flush=True)
    side.close()


class Pair:
    """The two processes of one kind; ``Side``'s methods are carried out by the one that asks."""

    def __init__(self, kind: str, certs: Path | None) -> None:
        address = free_address()
        where = [address, *([] if certs is None else [str(certs)])]
        self._server = start(kind, *where)
        self._asker = start("ask", kind, *where)

    def __call__(self, method: str, size: int, count: int) -> Any:
        assert self._asker.stdin is not None and self._asker.stdout is not None
        self._asker.stdin.write(json.dumps([method, size, count]) + "\n")
        self._asker.stdin.flush()
        return json.loads(self._asker.stdout.readline())

    def close(self) -> None:
        self._asker.communicate()
        self._server.communicate()


def measure(
    quick: bool, certs: Path | None
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]], dict[str, dict[str, float]]]:
    """Round trips in µs, GB/s one way, and ratios of the latter, by tensor and kind."""
    kinds: dict[str, tuple[str, Path | None]] = {
        "tcp": ("tcp", None),
        "grpc": ("grpc", None),
        "efl recv": ("efl", None),
    }
    if certs is not None:
        kinds |= {"grpc tls": ("grpc", certs), "efl recv tls": ("efl", certs)}
    rounds, budget = (2, 8 * MIB) if quick else (7, 64 * MIB)
    times: dict[str, dict[str, list[float]]] = {label: {k: [] for k in (*kinds, "efl callback")} for label in SIZES}
    speeds: dict[str, dict[str, list[float]]] = {label: {k: [] for k in kinds} for label in SIZES}
    for _ in range(rounds):
        pairs = {name: Pair(*kind) for name, kind in kinds.items()}
        for label, size in SIZES.items():
            count = max(2, min(60 if quick else 200, budget // size))
            for name, pair in pairs.items():
                times[label][name].append(statistics.median(pair("round_trips", size, count)))
            again = pairs["efl recv"]("callback_round_trips", size, count)
            times[label]["efl callback"].append(statistics.median(again))
            for name, pair in pairs.items():
                speeds[label][name].append(count * size / pair("one_way", size, count) / 1e9)
        for pair in pairs.values():
            pair.close()
    trips = {label: {k: statistics.median(v) * 1e6 for k, v in row.items()} for label, row in times.items()}
    rates = {label: {k: statistics.median(v) for k, v in row.items()} for label, row in speeds.items()}
    ratios = {
        label: {
            f"{kind} / {base}": statistics.median(a / b for a, b in zip(row[kind], row[base], strict=True))
            for kind, base in RATIOS
            if kind in row
        }
        for label, row in speeds.items()
    }
    return trips, rates, ratios


def report(
    trips: dict[str, dict[str, float]], rates: dict[str, dict[str, float]], ratios: dict[str, dict[str, float]]
) -> str:
    """The tables of round trips and throughput, and the goals."""
    kinds = [kind for kind in KINDS if kind in trips["1 KiB"]]
    headings = ["tensor", *(f"{kind}, µs" for kind in kinds), "efl recv / grpc", "efl callback / grpc"]
    rows = []
    for label, row in trips.items():
        beside = [f"{row[kind] / row['grpc']:.2f}" for kind in ("efl recv", "efl callback")]
        rows.append([label, *(f"{row[kind]:,.0f}" for kind in kinds), *beside])
    text = f"Round trip\n\n{table(headings, rows)}\n\n"
    kinds = [kind for kind in kinds if kind in rates["1 KiB"]]
    beside = list(ratios["1 KiB"])
    rows = []
    for label, row in rates.items():
        cells = [row[kind] for kind in kinds] + [ratios[label][name] for name in beside]
        rows.append([label, *(f"{cell:.2f}" for cell in cells)])
    text += f"One way, GB/s\n\n{table(['tensor', *kinds, *beside], rows)}\n\n"
    goals = [
        Goal(f"round trip: efl recv / grpc, {label}", row["efl recv"] / row["grpc"], MOST, least=False)
        for label, row in trips.items()
    ]
    for label in [label for label, size in SIZES.items() if size >= MIB]:
        goals.append(Goal(f"efl recv, {label}", rates[label]["efl recv"], LEAST_GBYTES, unit="GB/s"))
        if "efl recv tls" in rates[label]:
            goals.append(Goal(f"efl recv tls, {label}", rates[label]["efl recv tls"], LEAST_GBYTES_TLS, unit="GB/s"))
        for name in ("efl recv / grpc", "efl recv tls / grpc tls"):
            if name in ratios[label]:
                goals.append(Goal(f"{name}, {label}", ratios[label][name], LEAST))
    return f"{text}{goals_table(goals)}"


def main() -> None:
    """Runs the command line."""
    parser = command_line(__doc__, "fewer repetitions")
    parser.add_argument("--tls", action="store_true", help="also with mutual TLS")
    parser.add_argument("--side", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        name, *rest = arguments.side
        if name == "memory":
            memory_side(rest[0], rest[1], int(rest[2]))
        elif name == "ask":
            ask(rest[0], rest[1], Path(rest[2]) if rest[2:] else None)
        else:
            serve = {"tcp": serve_tcp, "grpc": serve_grpc, "efl": serve_efl}[name]
            serve(rest[0], Path(rest[1]) if rest[1:] else None)
        return
    with tempfile.TemporaryDirectory() as folder:
        if arguments.tls:
            from efl.cli.certs import write

            write(Path(folder) / "certs")
        trips, rates, ratios = measure(arguments.quick, Path(folder) / "certs" if arguments.tls else None)
    peaks = memory((16, 64) if arguments.quick else (16, 64, 256))
    rows = [(str(count), f"{sent:.0f}", f"{taken:.0f}") for count, (sent, taken) in peaks.items()]
    headings = ("tensors of 16 MiB, window 64 MiB", "sender's peak above idle, MiB", "receiver's")
    text = f"{report(trips, rates, ratios)}\n\nMemory\n\n{table(headings, rows)}"
    trip_ratios = {label: round(row["efl recv"] / row["grpc"], 3) for label, row in trips.items()}
    summary = {
        "benchmark": "transport",
        "ratio": trip_ratios["128 KiB"],
        "round_trip_us": {label: {k: round(v, 1) for k, v in row.items()} for label, row in trips.items()},
        "ratios": trip_ratios,
        "gbytes_per_second": {label: {k: round(v, 3) for k, v in row.items()} for label, row in rates.items()},
        "throughput_ratios": {label: {k: round(v, 3) for k, v in row.items()} for label, row in ratios.items()},
        "peak_mib": {str(count): [round(v) for v in both] for count, both in peaks.items()},
    }
    finish("transport", text, summary, arguments.record)


if __name__ == "__main__":
    main()
