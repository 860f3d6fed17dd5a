"""What a line of 20 ms there and back adds to a step of the split MNIST model.

    python benchmarks/round_trip.py [--data DIR] [--quick] [--record benchmarks/results/round_trip.md]

The federated program of ``mnist_split.py``, leader and follower in processes of their own, three times over, by turns:

    local      the follower dials the leader
    proxy      it dials the proxy of ``tests/faults/proxy.py``, which passes everything on at once: what the proxy costs
    far        the proxy delivers everything 10 ms later than it came, each way

The delay is that of a line: however much is under way, each byte arrives 10 ms after it was sent. A step sends one
tensor there (activations) and one back (their gradients), so one round trip is the least that it can take. What is held
against the goal is far minus local, the proxy's own cost included. The last line is JSON.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from _report import Goal, command_line, finish, goals_table, table
from _running import ROOT, Program, Said, difference_ms, make_data, measure, step_ms

from efl._ports import free_port

sys.path.insert(0, str(ROOT))

from tests.faults.proxy import BadLine

ROUND_TRIP_MS = 20.0
MORE_MS = 10.0  # than a round trip, at most
PARTIES = ("leader", "follower")
SIZES = {"small": "small, records", "memory": "small, memory"}


def measure_lines(data: Path, size: str, rounds: int, steps: int, round_trip_ms: float) -> dict[str, Said]:
    """Runs the model over no line, one without delay, and one with it."""
    programs = {"local": Program(PARTIES)}
    with ExitStack() as stack:
        for name, delay in (("proxy", 0.0), ("far", round_trip_ms / 2000)):
            port = free_port()
            line = stack.enter_context(BadLine(f"127.0.0.1:{port}"))
            line.delay(delay)
            programs[name] = Program(PARTIES, port=port, dial=int(line.address.split(":")[1]))
        return measure(programs, data, size, rounds, steps)


def report(measured: dict[str, dict[str, Said]], data: str, rounds: int) -> tuple[dict[str, object], str]:
    """The numbers of the last line, and what is printed."""
    rows, goals, numbers = [], [], {}
    for size, results in measured.items():
        for name, result in results.items():
            added = "" if name == "local" else f"{difference_ms(result, results['local']):.2f}"
            waits = [statistics.median(said[party]["wait_ms"] for said in result) for party in range(2)]
            rows.append((SIZES[size], name, f"{step_ms(result):.2f}", added, *(f"{wait:.2f}" for wait in waits)))
        more = difference_ms(results["far"], results["local"])
        goals.append(
            Goal(f"{SIZES[size]}: far beyond local, a step", more, ROUND_TRIP_MS + MORE_MS, least=False, unit="ms")
        )
        numbers[size] = {
            **{name: round(step_ms(result), 2) for name, result in results.items()},
            "added": round(more, 2),
            "round_trips": round(more / ROUND_TRIP_MS, 2),
        }
    headings = ("network", "line", "ms/step", "beyond local", "leader waits", "follower waits")
    text = f"{data}, medians of {rounds} interleaved rounds; a round trip is {ROUND_TRIP_MS:g} ms\n\n"
    text += f"{table(headings, rows, 2)}\n\n{goals_table(goals)}"
    return {"benchmark": "round_trip", "ms": numbers, "met": all(goal.met for goal in goals)}, text


def main() -> None:
    """Runs the command line."""
    parser = command_line(__doc__)
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder with MNIST's IDX files (default: digits)")
    options = parser.parse_args()
    rounds, steps = (3, 20) if options.quick else (11, 100)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    with tempfile.TemporaryDirectory() as folder:
        data = make_data(options.data, Path(folder))
        measured = {size: measure_lines(Path(folder), size, rounds, steps, ROUND_TRIP_MS) for size in SIZES}
    numbers, text = report(measured, data, rounds)
    finish("round_trip", text, numbers, options.record)


if __name__ == "__main__":
    main()
