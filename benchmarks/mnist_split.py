"""Steps per second of a model that is split between two processes, beside the same model in one process.

    python benchmarks/mnist_split.py [--data DIR] [--tls] [--quick] [--record benchmarks/results/mnist_split.md]

Programs, each in processes of its own that stay up for the whole run and are asked for a number of steps by
turns, so that all of them meet the same noise of the machine:

    bare       one process, plain TensorFlow: MonitoredSession, tf.data over the same TFRecord files
    model      the same in efl.Model with efl.data.DataIO
    stream     leader and follower in plain TensorFlow over a bare gRPC stream: nothing of efl's
    unlinked   as federated, over such a stream in the place of efl's link: what exactly-once costs (not for large)
    federated  leader and follower over gRPC; sample-id checks, FederalDataIO, metrics, acknowledgements on
    tls        the same with mutual TLS (with --tls, and not for large)

``bare`` and ``model`` hold the network of both parties with both losses and both accuracies, so all of them
compute the same. ``small`` is the network of example/mnist at batch 256; ``large`` has a hidden layer more,
so that a step in one process takes 10 ms or longer. ``memory`` leaves the files out: the small network on
arrays in memory, where a step is hardest to hide a message in.

The last line is JSON: ``ratio`` is federated's time for a step over bare's for the small network with
records, ``ratio_memory`` and ``ratio_large`` the same for the others, ``ratio_model`` efl.Model's over bare's,
``ratio_tls`` and ``ratio_memory_tls`` tls's over federated's.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from _mnist_programs import BATCH
from _report import Goal, command_line, finish, goals_table, table
from _running import ROOT, Program, Said, make_data, measure, ratio, step_ms

# What is measured: its title, and which programs run it.
SIZES = {
    "small": ("small, records", ["bare", "model", "stream", "unlinked", "federated"]),
    "memory": ("small, memory", ["bare", "stream", "unlinked", "federated"]),
    "large": ("large, records", ["bare", "stream", "federated"]),
}
PARTIES = ("leader", "follower")
PROGRAMS = {
    "bare": Program(("bare",)),
    "model": Program(("model",)),
    "stream": Program(("stream_leader", "stream_follower")),
    "unlinked": Program(PARTIES, ("--bare-channel",)),
    "federated": Program(PARTIES),
}
LEAST = 0.9  # of the steps/s without what is measured
#: Network and program -> the most times the step of bare TensorFlow in one process that it may take.
MOST = {("small", "federated"): 2.3, ("memory", "federated"): 2.3, ("large", "federated"): 1.2}
MOST["small", "model"] = 1.05


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


def report(measured: dict[str, dict[str, Said]], serialise: float) -> tuple[dict[str, Any], str]:
    """The numbers of the last line, and what is printed."""
    rows: list[tuple[str, ...]] = []
    for size, results in measured.items():
        for name, result in results.items():
            took = step_ms(result)
            beside = "1" if name == "bare" else f"{ratio(result, results['bare']):.2f}"
            rows.append((SIZES[size][0], name, f"{1000 / took:.0f}", f"{took:.2f}", beside))
    text = table(("network", "program", "steps/s", "ms/step", "times bare"), rows, 2)

    rows = []
    for size, results in measured.items():
        for party, role in enumerate(PARTIES):
            took = statistics.median(said[party]["step_ms"] for said in results["federated"])
            waited = statistics.median(said[party]["wait_ms"] for said in results["federated"])
            parts = (took, waited, serialise, took - waited - serialise)
            rows.append((SIZES[size][0], role, *(f"{part:.2f}" for part in parts)))
    headings = ("network", "party", "step", "wait for the peer", "serialise", "compute, gRPC, rest")
    text += f"\n\nWhere the time of a federated step goes (ms)\n\n{table(headings, rows, 2)}\n\n"

    goals = []
    for what, name, base in (
        ("exactly once: federated / unlinked", "federated", "unlinked"),
        ("all of efl: federated / stream", "federated", "stream"),
        ("mutual TLS: tls / federated", "tls", "federated"),
    ):
        for size, results in measured.items():
            if {name, base} <= set(results):
                speed = 1 / ratio(results[name], results[base])
                goals.append(Goal(f"{what}, {SIZES[size][0]}", speed, LEAST))
    text += f"Steps/s, beside the program without it\n\n{goals_table(goals)}"

    def times(size: str, name: str, base: str = "bare") -> float:
        return round(ratio(measured[size][name], measured[size][base]), 3)

    steps = [
        Goal(f"{name}, {SIZES[size][0]}", times(size, name), most, least=False) for (size, name), most in MOST.items()
    ]
    text += f"\n\nTimes the step of bare TensorFlow\n\n{goals_table(steps)}"

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
        "goals": {goal.what: round(goal.measured, 3) for goal in [*goals, *steps]},
        "steps_per_second": {
            size: {name: round(1000 / step_ms(result), 1) for name, result in results.items()}
            for size, results in measured.items()
        },
        "serialise_ms": round(serialise, 3),
    }
    return numbers, text


def main() -> None:
    """Runs the command line."""
    parser = command_line(__doc__)
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder with MNIST's IDX files (default: digits)")
    parser.add_argument("--tls", action="store_true", help="also with mutual TLS")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    rounds, steps = (3, 60) if options.quick else (25, 160)  # short ones: neighbours share the noise
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    measured = {}
    with tempfile.TemporaryDirectory() as folder:
        data = make_data(options.data, Path(folder))
        if options.tls:
            from efl.cli.certs import write

            write(Path(folder) / "certs")
            PROGRAMS["tls"] = Program(PARTIES, ("--certs", str(Path(folder) / "certs")))
            for size in ("small", "memory"):
                SIZES[size][1].append("tls")
        for size, (_, names) in SIZES.items():
            count = max(steps // 8, 20) if size == "large" else steps
            measured[size] = measure({name: PROGRAMS[name] for name in names}, Path(folder), size, rounds, count)
    numbers, text = report(measured, serialise_ms())
    numbers |= {"rounds": rounds, "data": data}
    text = f"{data}, batch {BATCH}, medians of {rounds} interleaved rounds\n\n{text}"
    finish("mnist_split", text, numbers, options.record)


if __name__ == "__main__":
    main()
