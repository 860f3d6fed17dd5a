"""What the benchmarks print and write: goals beside what was measured, and a Markdown file with the command."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

_NOTES = "\n## Notes\n"


@dataclass(frozen=True)
class Goal:
    """One thing that was promised.

    Attributes:
      what: In words.
      measured: The number.
      bound: What it is held against.
      least: Whether the bound is the least that is good; otherwise it is the most.
      unit: Of both.
      digits: After the point.
    """

    what: str
    measured: float
    bound: float
    least: bool = True
    unit: str = ""
    digits: int = 2

    @property
    def met(self) -> bool:
        """Whether it is kept."""
        return self.measured >= self.bound if self.least else self.measured <= self.bound


def goals_table(goals: Sequence[Goal]) -> str:
    """A Markdown table of goals."""
    lines = ["| goal | measured | bound | |", "|---|---:|---:|---|"]
    for goal in goals:
        unit = f" {goal.unit}" if goal.unit else ""
        bound = f"{'≥' if goal.least else '≤'} {goal.bound:g}{unit}"
        lines.append(
            f"| {goal.what} | {goal.measured:.{goal.digits}f}{unit} | {bound} | {'met' if goal.met else 'not met'} |"
        )
    return "\n".join(lines)


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """A Markdown table; the first ``words`` columns are words, the others numbers."""
    marks = ["---" if column < words else "---:" for column in range(len(headings))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (headings, marks, *rows))


def command_line(doc: str | None, quick: str = "few, short rounds: a check that it runs") -> argparse.ArgumentParser:
    """What every benchmark is asked for."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--record", type=Path, metavar="FILE", help="write the tables to FILE, as Markdown")
    return parser


def finish(title: str, text: str, numbers: Mapping[str, object], file: Path | None) -> None:
    """Prints the tables and, as the last line, the numbers; writes both to ``file``, where one is given."""
    line = json.dumps(numbers)
    print(f"{text}\n{line}")
    if file is not None:
        record(file, title, f"{text}\n\n```json\n{line}\n```")


def record(path: Path, title: str, text: str) -> None:
    """Writes what was printed, with the command and the machine, as Markdown; notes at the end of the file stay."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("tensorflow", "grpcio", "numpy"))
    machine = f"{os.cpu_count()} cores ({platform.machine()}), Python {platform.python_version()}, {versions}"
    folders = ("--data", "--folder")  # whose folder it was is nobody's concern
    arguments = ["DIR" if before in folders else after for before, after in zip(["", *sys.argv[1:]], sys.argv[1:])]
    command = " ".join(["python", f"benchmarks/{title}.py", *arguments])
    path.parent.mkdir(parents=True, exist_ok=True)
    _, mark, notes = path.read_text().partition(_NOTES) if path.exists() else ("", "", "")
    path.write_text(f"# {title}\n\n`{command}` on {machine}\n\n{text.rstrip()}\n{mark}{notes}")
