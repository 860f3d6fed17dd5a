"""A step of the split MNIST model whose parties both train with differential privacy, beside one without.

    python benchmarks/dp_split.py [--data DIR] [--quick] [--record benchmarks/results/dp_split.md]

The federated program of ``mnist_split.py``, leader and follower in processes of their own on the same cores:

    none       gradient descent
    unnoise    DPGradientDescentGaussianOptimizer at both, BACKEND_MODE 'unnoise': the peer gets exact gradients
    noise      the same, BACKEND_MODE 'noise': the rows that go back are clipped and noised as well

All take turns, and each is compared with ``none`` in the same round. The last line is JSON.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from _report import Goal, command_line, finish, goals_table, table
from _running import Program, Said, make_data, measure, ratio, step_ms

PARTIES = ("leader", "follower")
MOST = 1.5
PROGRAMS = {"none": Program(PARTIES)} | {
    mode: Program(PARTIES, more=("--private", mode)) for mode in ("unnoise", "noise")
}
SIZES = {"small": "records", "memory": "rows in memory"}


def report(measured: dict[str, dict[str, Said]], data: str, rounds: int) -> tuple[dict[str, object], str]:
    """The numbers of the last line, and what is printed."""
    rows, goals, numbers = [], [], {}
    for size, results in measured.items():
        ratios = {name: ratio(result, results["none"]) for name, result in results.items()}
        for name, result in results.items():
            rows.append((SIZES[size], name, f"{step_ms(result):.2f}", f"{ratios[name]:.2f}"))
            if name != "none":
                goals.append(Goal(f"{SIZES[size]}: {name} / none", ratios[name], MOST, least=False))
        numbers[size] = {name: [round(step_ms(results[name]), 3), round(value, 3)] for name, value in ratios.items()}
    text = f"{data}, batch 256, medians of {rounds} interleaved rounds\n\n"
    text += f"{table(('input', 'program', 'ms a step', 'times none'), rows, 2)}\n\n{goals_table(goals)}"
    return {"benchmark": "dp_split", "ratio": numbers["small"]["noise"][1], "steps": numbers}, text


def main() -> None:
    """Runs the command line."""
    parser = command_line(__doc__)
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder with MNIST's IDX files (default: digits)")
    options = parser.parse_args()
    rounds, steps = (3, 20) if options.quick else (15, 100)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    with tempfile.TemporaryDirectory() as folder:
        data = make_data(options.data, Path(folder))
        measured = {size: measure(PROGRAMS, Path(folder), size, rounds, steps) for size in SIZES}
    numbers, text = report(measured, data, rounds)
    finish("dp_split", text, numbers, options.record)


if __name__ == "__main__":
    main()
