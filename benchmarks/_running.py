"""Runs the programs of ``_mnist_programs.py`` by turns, so that all of them meet the same noise of the machine."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from efl._ports import free_port

ROOT = Path(__file__).resolve().parents[1]
MEMORY_ROWS = 15_000
Said = list[list[dict[str, float]]]  # round -> process -> what it says, and its ``step_ms``


@dataclass(frozen=True)
class Program:
    """What runs in one process, or in two that talk to each other.

    Attributes:
      kinds: A program of ``_mnist_programs.py`` for each process.
      more: Further arguments of each.
      port: Where a leader listens; None: wherever is free.
      dial: Which port a follower dials, where it is another one (of a proxy).
    """

    kinds: tuple[str, ...]
    more: tuple[str, ...] = ()
    port: int | None = None
    dial: int | None = None


class Running:
    """A program that is up; made when all its processes are ready, unless it is not to ``wait``."""

    def __init__(self, program: Program, data: Path, size: str, wait: bool = True) -> None:
        port = program.port or free_port()
        environ = {"TF_CPP_MIN_LOG_LEVEL": "3", **os.environ}
        environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environ.get("PYTHONPATH")]))
        self._logs = [tempfile.TemporaryFile("w+") for _ in program.kinds]  # noqa: SIM115 - as long as the processes
        script = str(ROOT / "benchmarks" / "_mnist_programs.py")
        self._processes = []
        for kind, log in zip(program.kinds, self._logs, strict=True):
            where = program.dial if program.dial and kind.endswith("follower") else port
            command = [sys.executable, script, kind, "--data", str(data), "--size", size, "--port", str(where)]
            self._processes.append(
                subprocess.Popen(
                    [*command, *program.more],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    env=environ,
                )
            )
        for process in self._processes if wait else ():
            self._answer(process)

    def run(self, steps: int) -> list[dict[str, float]]:
        """Runs ``steps`` steps; what each process says of them."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(f"{steps}\n")
            process.stdin.flush()
        said = [json.loads(self._answer(process)) for process in self._processes]
        for one in said:
            one["step_ms"] = one["seconds"] / steps * 1000
        return said

    def event(self) -> dict[str, Any]:
        """What a watched program of one process says next."""
        return dict(json.loads(self._answer(self._processes[0])))

    def _answer(self, process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None
        answer = process.stdout.readline()
        if not answer:
            log = self._logs[self._processes.index(process)]
            log.seek(0)
            sys.exit(f"a program of the benchmark ended early. It wrote:\n{log.read()[-3000:]}")
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

    def kill(self) -> None:
        """Ends the processes as a loss of power would."""
        for process in self._processes:
            process.kill()
            process.wait()


@contextlib.contextmanager
def running(programs: Mapping[str, Program], data: Path, size: str) -> Iterator[dict[str, Running]]:
    """Starts programs; ends them whatever happens."""
    started: dict[str, Running] = {}
    try:
        for name, program in programs.items():
            started[name] = Running(program, data, size)
        yield started
    finally:
        for program_up in started.values():
            program_up.close()


def measure(programs: Mapping[str, Program], data: Path, size: str, rounds: int, steps: int) -> dict[str, Said]:
    """Runs the programs by turns, ``steps`` steps at a time."""
    results: dict[str, Said] = {name: [] for name in programs}
    with running(programs, data, size) as started:
        for program in started.values():
            program.run(max(steps // 2, 20))  # warming up
        for turn in range(rounds):
            names = list(programs) if turn % 2 == 0 else list(programs)[::-1]
            for name in names:
                results[name].append(started[name].run(steps))
    return results


def step_ms(result: Said) -> float:
    """Median over the rounds of the slowest process."""
    return statistics.median(_times(result))


def ratio(result: Said, base: Said) -> float:
    """Median of the rounds' ratios to the same round of ``base``: neighbours in time share the noise."""
    return statistics.median(a / b for a, b in zip(_times(result), _times(base), strict=True))


def difference_ms(result: Said, base: Said) -> float:
    """Median of the rounds' differences to the same round of ``base``."""
    return statistics.median(a - b for a, b in zip(_times(result), _times(base), strict=True))


def _times(result: Said) -> list[float]:
    return [max(one["step_ms"] for one in said) for said in result]


def make_data(data: Path | None, out: Path, memory_rows: int | None = MEMORY_ROWS) -> str:
    """Writes both parties' columns, as records and as arrays; returns what they are.

    Args:
      data: Folder of MNIST's IDX files; None: the digits that come with scikit-learn.
      out: Where.
      memory_rows: How many rows the arrays have; None: all.
    """
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
            columns[name] = values[:memory_rows].astype(np.int64 if name == "sample_id" else np.float32)
        np.savez(out / f"{role}.npz", **columns)
    return f"{len(labels)} images of {'MNIST' if data is not None else 'scikit-learn, enlarged'}"
