"""Trains one model on images that are split between two processes, and compares it with the alternatives.

Makes data, runs ``leader.py`` and ``follower.py`` with ``efl run``, then the same network in one process on
whole images and on each half alone (``single.py``), and prints accuracy and speed. It also checks, after the
first ten steps, that the two processes have computed the same weights as the one.

    python demo.py                  scikit-learn's digits: no network needed
    python demo.py --data DIR       MNIST, from the folder with its four IDX files
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))  # a checkout that is not installed

from efl.cli.noise import Noise

# How far float32 rounding may carry the weights apart in ten steps.
TOLERANCE = 1e-5
PARITY_STEPS = 10
DIGITS_STEPS = 5  # of an epoch of the digits

_log = Console(highlight=False)


def run(title: str, *command: str | Path) -> None:
    """Runs a program, shows its output, and ends the demo if it fails."""
    _log.rule(f"[bold]{title}", align="left")
    shown = " ".join(str(part) for part in command)
    _log.print(f"$ {shown.replace(str(HERE), '.').replace(sys.executable, 'python')}", style="dim", soft_wrap=True)
    # The programs run as a user would run them; a checkout that is not installed is found as well.
    path = os.pathsep.join(filter(None, [str(HERE.parents[1]), os.environ.get("PYTHONPATH")]))
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONWARNINGS": "ignore::UserWarning:__main__"}
    environ = {**quiet, **os.environ, "PYTHONPATH": path}
    process = subprocess.Popen(
        [str(part) for part in command], env=environ, stderr=subprocess.PIPE, text=True, errors="replace"
    )
    assert process.stderr is not None
    noise = Noise()
    for line in process.stderr:  # stdout stays what it is: on a terminal it shows progress
        if not noise.is_noise(line.rstrip("\n")):
            print(line, end="", file=sys.stderr, flush=True)
    code = process.wait()
    if code:
        sys.exit(f"demo.py: {title} failed (exit code {code})")


def curve(history: list[dict[str, Any]]) -> dict[int, float]:
    """Training step -> accuracy on the test images (of an evaluation's log lines the last one counts)."""
    return {entry["step"]: entry["accuracy"] for entry in history if entry["mode"] == "eval"}


def steps_per_second(history: list[dict[str, Any]]) -> float:
    """Median over the log lines of training; the first one holds the warming up."""
    rates = [entry["steps_per_second"] for entry in history if entry["mode"] == "train"]
    return statistics.median(rates[1:] or rates)


def largest_difference(folder: Path, steps: int = PARITY_STEPS) -> float:
    """Largest difference of a weight, two processes and one, relative to its tensor's largest weight."""
    whole = np.load(folder / f"whole-{steps}.npz")
    ours = {
        f"single/{role}/{name}": value
        for role in ("leader", "follower")
        for name, value in np.load(folder / f"{role}-{steps}.npz").items()
    }
    if set(ours) != set(whole.files):
        raise AssertionError(f"different variables: {sorted(ours)} and {sorted(whole.files)}")
    return max(float(np.abs(ours[name] - whole[name]).max() / np.abs(whole[name]).max()) for name in ours)


def plot(curves: dict[str, dict[int, float]], path: Path) -> None:
    """Draws the learning curves."""
    import matplotlib

    matplotlib.use("Agg")  # draws without a screen
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 5), layout="constrained")
    styles = {"whole": {"linewidth": 4, "alpha": 0.35}}
    for name, points in curves.items():
        axes.plot(list(points), list(points.values()), label=_TITLES[name], marker=".", **styles.get(name, {}))
    axes.set(xlabel="training step", ylabel="accuracy on the test images", ylim=(None, 1))
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2)  # nowhere inside would it leave every curve to be seen
    figure.savefig(path, dpi=120)


_TITLES = {
    "leader": "federated, two processes",
    "whole": "one process, whole images",
    "left": "leader alone, left halves",
    "right": "follower alone, right halves",
}


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder with MNIST's IDX files")
    parser.add_argument(
        "--out", type=Path, default=Path("demo_output"), help="folder to write to (default: %(default)s)"
    )
    parser.add_argument("--epochs", type=int, help="default: 60 for the digits, 10 for MNIST")
    parser.add_argument("--quick", action="store_true", help="fewer epochs: a check that everything runs")
    options = parser.parse_args(arguments)
    epochs = options.epochs or (60 if options.data is None else 10) // (6 if options.quick else 1)
    out, python = options.out.resolve(), Path(sys.executable)
    data = ["--data", options.data.resolve()] if options.data else []

    every = 235 if options.data else 10 if options.quick else 25
    flags = ["--data_dir", out, "--epochs", str(epochs), "--log_step", str(every), "--eval_every", str(every)]
    steps = PARITY_STEPS if options.data else min(PARITY_STEPS, epochs * DIGITS_STEPS)
    flags += ["--save", out / "results", "--snapshot", str(steps)]
    run("data", python, HERE / "generate_data.py", "--out", out, *data)
    efl_run = [python, "-m", "efl.cli", "run"]
    run("two processes", *efl_run, HERE / "leader.py", HERE / "follower.py", "--", *flags)
    run("one process", python, HERE / "single.py", *flags)

    names = ["leader", "whole", "left", "right"]
    histories = {name: json.loads((out / "results" / f"{name}.json").read_text()) for name in names}
    curves = {name: curve(histories[name]) for name in names}
    plot(curves, out / "learning_curves.png")

    table = Table()
    table.add_column("model")
    table.add_column("test accuracy", justify="right")
    table.add_column("steps/s", justify="right")
    for name in names:
        accuracy = list(curves[name].values())[-1]
        table.add_row(_TITLES[name], f"{accuracy:.2%}", f"{steps_per_second(histories[name]):.0f}")
    _log.print()
    # Not as the table's title, which would be filled with blanks to its width.
    data_set, times = "MNIST" if options.data else "scikit-learn digits", "epoch" if epochs == 1 else "epochs"
    _log.print(f"{data_set}, {epochs} {times}", style="italic")
    _log.print(table)
    difference = largest_difference(out / "results", steps)
    exact = " (bit for bit the same)" if difference == 0 else ""
    _log.print(f"largest relative difference of a weight after {steps} steps: {difference:.1e}{exact}", soft_wrap=True)
    _log.print(f"learning curves: {out / 'learning_curves.png'}", soft_wrap=True)
    if not difference <= TOLERANCE:
        sys.exit(f"demo.py: the weights should agree to {TOLERANCE:.0e}")


if __name__ == "__main__":
    main()
