"""Whether a process grows: its memory, open files and threads over its life."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

_PAGE_MIB = os.sysconf("SC_PAGE_SIZE") / (1 << 20)
# How much more the last quarter of a life may hold than the second, of which every warming up is behind it.
_BOUNDS = {"rss_mib": (8.0, 0.05), "files": (4.0, 0.0), "threads": (6.0, 0.0)}


@dataclass(frozen=True)
class Sample:
    """What a process holds at one moment, ``seconds`` after the beginning of the run."""

    seconds: float
    rss_mib: float
    files: float
    threads: float

    @classmethod
    def of(cls, pid: int, seconds: float) -> Sample:
        """Looks at a process of this machine."""
        proc = Path("/proc") / str(pid)
        rss = int((proc / "statm").read_text().split()[1]) * _PAGE_MIB
        return cls(seconds, rss, len(os.listdir(proc / "fd")), len(os.listdir(proc / "task")))


@dataclass
class Life:
    """One process from its start to its end."""

    role: str
    samples: list[Sample] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """How long it was looked at."""
        return self.samples[-1].seconds - self.samples[0].seconds if self.samples else 0.0

    def quarter(self, number: int, what: str) -> float:
        """The median of a quarter of its samples."""
        count = len(self.samples)
        part = self.samples[number * count // 4 : (number + 1) * count // 4]
        return statistics.median(getattr(sample, what) for sample in part)


def verdict(lives: Iterable[Life], least: float) -> tuple[list[str], list[str]]:
    """Judges every process that lived long enough to tell.

    Args:
      lives: All of them.
      least: Seconds of a life that can be judged.

    Returns:
      Lines of a Markdown table, and what is wrong, in words.
    """
    lines = ["| process | seconds | RSS MiB | open files | threads |", "|---|---:|---:|---:|---:|"]
    wrong = []
    judged = [life for life in lives if life.seconds >= least and len(life.samples) >= 8]
    for life in judged:
        cells = []
        for what, (more, share) in _BOUNDS.items():
            before, after = life.quarter(1, what), life.quarter(3, what)
            cells.append(f"{before:.0f} → {after:.0f}")
            if after > before + more + share * before:
                wrong.append(f"the {life.role} grows: {what} {before:.1f} → {after:.1f} in {life.seconds:.0f} s")

        lines.append(f"| {life.role} | {life.seconds:.0f} | " + " | ".join(cells) + " |")
    if {life.role for life in judged} != {"leader", "follower"}:
        wrong.append(f"no process of each role lived for {least:.0f} s: nothing is known about its growth")
    return lines, wrong
