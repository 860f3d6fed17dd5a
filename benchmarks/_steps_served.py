"""Programs that take training steps when they are asked, in processes of their own, so that several take turns."""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

MIB = 1 << 20


def serve(make: Callable[[], Callable[[], Any]]) -> None:
    """Takes as many steps as each line of the input says, and says how long they took (seconds) and its peak memory.

    Args:
      make: Makes the function that takes a step; what the program prints elsewhere goes to its standard error.
    """
    out, sys.stdout = sys.stdout, sys.stderr
    step = make()
    idle = _resident()
    for line in sys.stdin:
        start = time.perf_counter()
        for _ in range(int(line)):
            step()
        spent = time.perf_counter() - start
        print(json.dumps([spent, max(0, _peak() - idle)]), file=out, flush=True)


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Served:
    """One program's process.

    Args:
      command: Of a program that calls ``serve``.
    """

    def __init__(self, command: list[str]) -> None:
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)

    def steps(self, count: int) -> tuple[float, float]:
        """(milliseconds a step, peak MiB above idle)."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{count}\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit("a program ended before it was measured: run it with --serve to see why")
        spent, peak = json.loads(answer)
        return 1e3 * spent / count, peak / MIB

    def close(self) -> None:
        """Ends it."""
        self._process.kill()
        self._process.wait()


def by_turns(
    commands: Mapping[str, list[str]],
    rounds: int,
    steps: int,
    slow: Mapping[str, int] | None = None,
    before: int = 10,
) -> dict[str, tuple[float, float, float]]:
    """Measures programs by turns; the first of them is what the others are compared with.

    Args:
      commands: Name -> command.
      rounds: How often each takes its turn.
      steps: Of a turn.
      slow: Name of a program that takes one step a turn -> its turns.
      before: Steps of each before anything is measured.

    Returns:
      Name -> (median ms a step, median ratio to the first of the same round, peak MiB).
    """
    slow = slow or {}
    running = {name: Served(command) for name, command in commands.items()}
    times: dict[str, list[float]] = {name: [] for name in commands}
    peaks: dict[str, float] = {}
    try:
        for name, program in running.items():
            program.steps(1 if name in slow else before)
        for number in range(rounds):
            for name, program in running.items():
                if number < slow.get(name, rounds):
                    spent, peaks[name] = program.steps(1 if name in slow else steps)
                    times[name].append(spent)
    finally:
        for program in running.values():
            program.close()
    bare = next(iter(times.values()))
    return {
        name: (statistics.median(held), statistics.median(a / b for a, b in zip(held, bare)), peaks[name])
        for name, held in times.items()
    }
