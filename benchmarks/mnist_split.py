"""Steps per second of a model that is split between two processes, beside the same model in one process.

    python benchmarks/mnist_split.py [--data DIR] [--quick] [--record benchmarks/results/mnist_split.md]

Programs, each in processes of its own that stay up for the whole run and are asked for a number of steps by
turns, so that all of them meet the same noise of the machine:

    bare       one process, plain TensorFlow: MonitoredSession, tf.data over the same TFRecord files
    model      the same in efl.Model with efl.data.DataIO
    federated  leader and follower over gRPC; sample-id checks, FederalDataIO, metrics, acknowledgements on
    tls        the same with mutual TLS (with --tls, and not for large)

``bare`` and ``model`` hold the network of both parties with both losses and both accuracies, so all three
compute the same. ``small`` is the network of example/mnist at batch 256; ``large`` has a hidden layer more,
so that a step in one process takes 10 ms or longer. ``memory`` leaves the files out: the small network on
arrays in memory, where a step is hardest to hide a message in.

The last line is JSON: ``ratio`` is federated's time for a step over bare's for the small network with
records, ``ratio_memory`` and ``ratio_large`` the same for the others, ``ratio_model`` efl.Model's over bare's,
``ratio_tls`` and ``ratio_memory_tls`` tls's over federated's.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from _mnist_programs import BATCH

ROOT = Path(__file__).resolve().parents[1]
MEMORY_ROWS = 15_000


class Program:
    """A running program of one or two processes."""

    def __init__(self, kinds: list[str], data: Path, size: str, more: list[str]) -> None:
        port = str(free_port())
        environ = {"TF_CPP_MIN_LOG_LEVEL": "3", **os.environ}
        environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environ.get("PYTHONPATH")]))
        self._logs = [tempfile.TemporaryFile("w+") for _ in kinds]  # noqa: SIM115 - as long as the processes
        program = str(ROOT / "benchmarks" / "_mnist_programs.py")
        self._processes = [
            subprocess.Popen(
                [sys.executable, program, kind, "--data", str(data), "--size", size, "--port", port, *more],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environ,
            )
            for kind, log in zip(kinds, self._logs, strict=True)
        ]  # fmt: skip
        for process in self._processes:
            self._answer(process)

    def run(self, steps: int) -> list[dict[str, float]]:
        """Runs ``steps`` steps; what each process says of them."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(f"{steps}\n")
            process.stdin.flush()
        return [json.loads(self._answer(process)) for process in self._processes]

    def _answer(self, process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None
        answer = process.stdout.readline()
        if not answer:
            log = self._logs[self._processes.index(process)]
            log.seek(0)
            sys.exit(f"mnist_split.py: a program ended early. It wrote:\n{log.read()[-3000:]}")
        return answer

    def close(self) -> None:
        """Ends the processes."""
        for process in self._processes:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        for process in self._processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def free_port() -> int:
    """A port that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


# What is measured: its title, and which programs run it.
SIZES = {
    "small": ("small, records", ["bare", "model", "federated"]),
    "memory": ("small, memory", ["bare", "federated"]),
    "large": ("large, records", ["bare", "federated"]),
}
PROGRAMS = {"bare": ["bare"], "model": ["model"], "federated": ["leader", "follower"], "tls": ["leader", "follower"]}


@contextlib.contextmanager
def running(data: Path, size: str, names: list[str]) -> Iterator[dict[str, Program]]:
    """Starts programs; ends them whatever happens."""
    programs: dict[str, Program] = {}
    try:
        for name in names:
            more = ["--certs", str(data / "certs")] if name == "tls" else []
            programs[name] = Program(PROGRAMS[name], data, size, more)
        yield programs
    finally:
        for program in programs.values():
            program.close()


def measure(
    data: Path, size: str, names: list[str], rounds: int, steps: int
) -> dict[str, list[list[dict[str, float]]]]:
    """Runs the programs by turns. Name -> round -> process -> what it says, and its ``step_ms``."""
    results: dict[str, list[list[dict[str, float]]]] = {name: [] for name in names}
    with running(data, size, names) as programs:
        for program in programs.values():
            program.run(max(steps // 2, 20))  # warming up
        for turn in range(rounds):
            order = names if turn % 2 == 0 else names[::-1]
            for name in order:
                said = programs[name].run(steps)
                for one in said:
                    one["step_ms"] = one["seconds"] / steps * 1000
                results[name].append(said)
    return results


def step_ms(result: list[list[dict[str, float]]]) -> float:
    """Median over the rounds of the slowest process."""
    return statistics.median(max(one["step_ms"] for one in said) for said in result)


def ratio(result: list[list[dict[str, float]]], base: list[list[dict[str, float]]]) -> float:
    """Median of the rounds' ratios to the same round of ``base``: neighbours in time share the noise."""
    pairs = zip(result, base, strict=True)
    return statistics.median(max(o["step_ms"] for o in a) / max(o["step_ms"] for o in b) for a, b in pairs)


def serialise_ms() -> float:
    """Milliseconds of Python that a step's bytes cost each party, without gRPC.

    A party turns one ``[256, 128]`` tensor into frames and takes one from frames, with everything the
    protocol keeps account of: two links are made to talk to each other in memory.
    """
    from efl.transport import Hello, Limits, TensorSpec, frame
    from efl.transport.link import Link

    def hello(role: str, sends: str, receives: str) -> Hello:
        shape = (BATCH, 128)
        specs = (TensorSpec(sends, "float32", shape, "send"), TensorSpec(receives, "float32", shape, "recv"))
        return Hello(role, specs)

    links = [
        Link(hello("leader", "down", "up"), Limits(), 0.0),
        Link(hello("follower", "up", "down"), Limits(), 0.0),
    ]

    def deliver(giver: Link, taker: Link) -> list[Any]:
        return [e for data in giver.take(0.0) for e in taker.receive(frame.decode(data), 0.0)]

    for _ in range(2):  # hello, accept
        for giver, taker in (links, links[::-1]):
            deliver(giver, taker)
    array = np.random.default_rng(0).normal(size=(BATCH, 128)).astype(np.float32)

    def message(name: str, step: int, giver: Link, taker: Link) -> None:
        out = giver.prepare(name, step, array, bytes(16))
        while not out.done:
            giver.transmit(out)
        (received,) = deliver(giver, taker)
        taker.consumed(received.nbytes)

    def exchange(step: int) -> None:
        message("up", step, links[1], links[0])
        message("down", step, links[0], links[1])

    times = []
    for step in range(300):
        started = time.perf_counter()
        exchange(step)
        times.append(time.perf_counter() - started)
    return statistics.median(times) * 1000 / 2


def make_data(data: Path | None, out: Path) -> str:
    """Writes the records; returns what they are."""
    sys.path.insert(0, str(ROOT / "example" / "mnist"))
    generate_data = importlib.import_module("generate_data")
    if data is not None:
        images, labels = generate_data.load_mnist(data, "train")
    else:
        images, labels = generate_data.load_digits("train")
        # Ten times over: files as short as these would be opened again every fifth step.
        images, labels = np.tile(images, (10, 1, 1)), np.tile(labels, 10)
    ids = np.arange(len(labels))
    for role, half in (("leader", images[:, :, :14]), ("follower", images[:, :, 14:])):
        generate_data.write_records(out / f"{role}_train", ids, half, labels, 4)
        columns = {"sample_id": ids[:, None], "feature": half.reshape(len(ids), -1), "label": labels[:, None]}
        for name, values in columns.items():
            columns[name] = values[:MEMORY_ROWS].astype(np.int64 if name == "sample_id" else np.float32)
        np.savez(out / f"{role}.npz", **columns)
    return f"{len(labels)} images of {'MNIST' if data is not None else 'scikit-learn, enlarged'}"


def report(measured: dict[str, Any], serialise: float, data: str, rounds: int) -> tuple[dict[str, Any], str]:
    """Prints the tables; returns the numbers of the last line, and what was printed."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=110, record=True)
    console.print(f"{data}, batch {BATCH}, medians of {rounds} interleaved rounds")
    table = Table()
    for heading in ("network", "program", "steps/s", "ms/step", "times bare"):
        table.add_column(heading, justify="left" if heading in ("network", "program") else "right")
    for size, results in measured.items():
        for name, result in results.items():
            took = step_ms(result)
            beside = "1" if name == "bare" else f"{ratio(result, results['bare']):.2f}"
            table.add_row(SIZES[size][0], name, f"{1000 / took:.0f}", f"{took:.2f}", beside)
    console.print(table)

    console.print("Where the time of a federated step goes (ms)")
    table = Table()
    for heading in ("network", "party", "step", "wait for the peer", "serialise", "compute, gRPC, rest"):
        table.add_column(heading, justify="left" if heading in ("network", "party") else "right")
    for size, results in measured.items():
        for party, role in enumerate(PROGRAMS["federated"]):
            took = statistics.median(said[party]["step_ms"] for said in results["federated"])
            waited = statistics.median(said[party]["wait_ms"] for said in results["federated"])
            parts = (took, waited, serialise, took - waited - serialise)
            table.add_row(SIZES[size][0], role, *(f"{part:.2f}" for part in parts))
    console.print(table)

    def times(size: str, name: str, base: str = "bare") -> float:
        return round(ratio(measured[size][name], measured[size][base]), 3)

    numbers = {
        "benchmark": "mnist_split",
        "ratio": times("small", "federated"),
        "ratio_memory": times("memory", "federated"),
        "ratio_large": times("large", "federated"),
        "ratio_model": times("small", "model"),
        **{
            f"ratio{part}_tls": times(size, "tls", "federated")
            for size, part in (("small", ""), ("memory", "_memory"))
            if "tls" in measured[size]
        },
        "steps_per_second": {
            size: {name: round(1000 / step_ms(result), 1) for name, result in results.items()}
            for size, results in measured.items()
        },
        "serialise_ms": round(serialise, 3),
        "rounds": rounds,
        "data": data,
    }
    return numbers, console.export_text()


def record(path: Path, printed: str, last_line: str) -> None:
    """Writes what was printed, with the command and the machine, as Markdown."""
    from importlib.metadata import version

    versions = ", ".join(f"{name} {version(name)}" for name in ("tensorflow", "grpcio", "numpy"))
    machine = f"{os.cpu_count()} cores ({platform.machine()}), Python {platform.python_version()}, {versions}"
    arguments = ["DIR" if before == "--data" else after for before, after in zip(["", *sys.argv[1:]], sys.argv[1:])]
    command = " ".join(["python", "benchmarks/mnist_split.py", *arguments])
    text = f"# mnist_split\n\n`{command}` on {machine}\n\n```\n{printed.rstrip()}\n{last_line}\n```\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder with MNIST's IDX files (default: digits)")
    parser.add_argument("--quick", action="store_true", help="few, short rounds: a check that it runs")
    parser.add_argument("--tls", action="store_true", help="also with mutual TLS")
    parser.add_argument("--record", type=Path, metavar="FILE", help="write the tables to FILE, as Markdown")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    rounds, steps = (3, 60) if options.quick else (11, 400)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    with tempfile.TemporaryDirectory() as folder:
        data = make_data(options.data, Path(folder))
        if options.tls:
            from efl.cli.certs import write

            write(Path(folder) / "certs")
            for size in ("small", "memory"):
                SIZES[size][1].append("tls")
        measured = {
            size: measure(Path(folder), size, names, rounds, max(steps // 8, 20) if size == "large" else steps)
            for size, (_, names) in SIZES.items()
        }
    numbers, printed = report(measured, serialise_ms(), data, rounds)
    print(json.dumps(numbers))
    if options.record is not None:
        record(options.record, printed, json.dumps(numbers))


if __name__ == "__main__":
    main()
