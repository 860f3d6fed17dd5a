"""What a checkpoint of the split MNIST model costs, and how long a run takes to go on from one.

    python benchmarks/checkpoint.py [--data DIR] [--quick] [--folder DIR] [--record benchmarks/results/checkpoint.md]

**Cost**: the federated program of ``mnist_split.py``, leader and follower in processes of their own, twice over and by
turns: without checkpoints, and with one every so many steps. The difference of the two times, for each checkpoint: what
a save adds to the run, whoever of the parties is slower. Beside it, how large the checkpoint is (leader's). The inputs:

    records        efl.data.FederalDataIO over TFRecord files; the place in them is in the checkpoint
    one-shot       tf.data.make_one_shot_iterator over arrays, constants of the graph; its place cannot be saved
    initializable  tf.data.make_initializable_iterator over the same; TensorFlow writes its place into the checkpoint
    shuffled       the same, with shuffle(10 000); TensorFlow writes the rows in its buffer too, 16 MB

**Resume**: the program runs until both hold a checkpoint of some hundred steps; then both processes, or one of them,
are killed (SIGKILL) and started again as before. What is held against the goal is the time from where the started
process has imported TensorFlow and efl to the end of its first step after the restored checkpoint: making the graph,
compiling it, finding the peer (and the peer finding out that it was lost), restoring, the first step. Beside it, the
same time of the run's own beginning, where there was nothing to restore. Arrays in memory are constants of the graph
(94 MB of MNIST for each party), which TensorFlow copies at each new set of fetches, and Grappler several times more:
a start takes long with them, whether there is a checkpoint or not.

Checkpoints are written to ``--folder`` (a temporary folder by default) and synchronised to its disk. The last line is
JSON.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from _report import Goal, command_line, finish, goals_table, table
from _running import MEMORY_ROWS, Program, Running, difference_ms, make_data, measure, step_ms

from efl._ports import free_port

PARTIES = ("leader", "follower")
SAVE_MS, RESUME_S = 50.0, 5.0
INPUTS = {
    "records": ("small", ()),
    "one-shot": ("memory", ()),
    "initializable": ("memory", ("--initializable",)),
    "shuffled": ("memory", ("--initializable", "--shuffle", "10000")),
}
VICTIMS = {"both": PARTIES, "leader": ("leader",), "follower": ("follower",)}
RESUMES = [*((who, "records") for who in VICTIMS), ("both", "one-shot"), ("both", "shuffled")]


def saving(folder: Path, every: int) -> tuple[str, ...]:
    """Arguments of a program that keeps checkpoints."""
    return ("--checkpoint-dir", str(folder), "--save-steps", str(every))


def size_of(folder: Path) -> int:
    """Bytes of the newest checkpoint in a party's folder."""
    newest = max(entry for entry in folder.iterdir() if entry.name.startswith("step-"))
    return sum(file.stat().st_size for file in newest.iterdir())


def measure_cost(data: Path, folder: Path, name: str, rounds: int, every: int, saves: int) -> dict[str, float]:
    """Milliseconds that a save adds, those of a step, and the checkpoint's size.

    Args:
      data: Both parties' columns.
      folder: For the checkpoints.
      name: Of the input.
      rounds: Of each program.
      every: Steps between two checkpoints.
      saves: Checkpoints in a round.
    """
    size, more = INPUTS[name]
    without = Program(PARTIES, more)
    programs = {"without": without, "with": replace(without, more=(*more, *saving(folder / name, every)))}
    results = measure(programs, data, size, rounds, every * saves)
    return {
        "save_ms": difference_ms(results["with"], results["without"]) * every,
        "step_ms": step_ms(results["without"]),
        "bytes": size_of(folder / name / "leader" / "0"),
    }


def measure_resume(data: Path, folder: Path, who: str, name: str, every: int) -> dict[str, float]:
    """Seconds of a process that is started in the place of a killed one, and of the start before, to the first step.

    Args:
      data: Both parties' columns.
      folder: For the checkpoints.
      who: Dies, and is started again.
      name: Of the input.
      every: Steps between two checkpoints.
    """
    port, (size, more) = free_port(), INPUTS[name]
    arguments = ("--watch", *more, *saving(folder, every))
    parties = {role: Program((role,), arguments, port=port) for role in PARTIES}
    up = {role: Running(program, data, size, wait=False) for role, program in parties.items()}
    try:
        started = [(up[role].event(), up[role].event(), up[role].event()) for role in PARTIES]
        for role in PARTIES:
            while up[role].event()["step"] < 2 * every:
                pass
        for role in VICTIMS[who]:
            up[role].kill()
        for role in VICTIMS[who]:
            up[role] = Running(parties[role], data, size, wait=False)
        resumed = [(up[role].event(), up[role].event(), up[role].event()) for role in VICTIMS[who]]
    finally:
        for party in up.values():
            party.kill()
    if any(first["step"] < every for *_, first in resumed):
        sys.exit("checkpoint.py: a party that was started again did not go on from a checkpoint")

    def longest(events: Sequence[Sequence[dict[str, Any]]], begin: int, end: int) -> float:
        return max(of_one[end]["time"] - of_one[begin]["time"] for of_one in events)

    return {
        "start_s": longest(started, 0, 2),
        "graph_s": longest(resumed, 0, 1),
        "first_step_s": longest(resumed, 1, 2),
        "resume_s": longest(resumed, 0, 2),
    }


def report(
    costs: dict[str, dict[str, float]], resumes: dict[str, dict[str, float]], data: str
) -> tuple[dict[str, object], str]:
    """The numbers of the last line, and what is printed."""
    rows: list[tuple[str, ...]] = [
        (name, f"{cost['save_ms']:.1f}", f"{cost['step_ms']:.2f}", f"{cost['bytes'] / 1e6:.2f}")
        for name, cost in costs.items()
    ]
    text = f"{data}\n\n{table(('input', 'a save adds, ms', 'a step, ms', 'checkpoint, MB'), rows)}\n\n"
    parts = ("start_s", "resume_s", "graph_s", "first_step_s")
    rows = [(who, *(f"{times[part]:.2f}" for part in parts)) for who, times in resumes.items()]
    headings = ("killed, input", "a start anew, s", "a resume, s", "of it: to fit, s", "fit to the first step, s")
    goals = [
        Goal(f"a save, {name}", cost["save_ms"], SAVE_MS, least=False, unit="ms", digits=1)
        for name, cost in costs.items()
    ]
    goals += [
        Goal(f"a resume, {who}", times["resume_s"], RESUME_S, least=False, unit="s") for who, times in resumes.items()
    ]
    text += f"{table(headings, rows)}\n\n{goals_table(goals)}"
    numbers = {
        "benchmark": "checkpoint",
        "cost": {name: {key: round(value, 2) for key, value in cost.items()} for name, cost in costs.items()},
        "resume": {who: {key: round(value, 2) for key, value in times.items()} for who, times in resumes.items()},
        "met": all(goal.met for goal in goals),
    }
    return numbers, text


def main() -> None:
    """Runs the command line."""
    parser = command_line(__doc__)
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder with MNIST's IDX files (default: digits)")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="where checkpoints are written, for the time of it")
    options = parser.parse_args()
    rounds, every, saves, times = (3, 20, 4, 1) if options.quick else (11, 50, 8, 3)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    with tempfile.TemporaryDirectory() as made, tempfile.TemporaryDirectory(dir=options.folder) as kept:
        data = make_data(options.data, Path(made), MEMORY_ROWS if options.quick else None)
        costs = {name: measure_cost(Path(made), Path(kept), name, rounds, every, saves) for name in INPUTS}
        resumes = {}
        for who, name in RESUMES:
            folders = [Path(kept) / f"resume-{who}-{name}-{turn}" for turn in range(times)]
            tries = [measure_resume(Path(made), folder, who, name, 100) for folder in folders]
            resumes[f"{who}, {name}"] = {part: statistics.median(one[part] for one in tries) for part in tries[0]}
    numbers, text = report(costs, resumes, f"{data}, medians of {rounds} interleaved rounds and {times} resumes")
    finish("checkpoint", text, numbers, options.record)


if __name__ == "__main__":
    main()
