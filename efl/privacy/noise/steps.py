"""Which training steps released something, and how often each did.

A step that is taken again after a recovery is about the same rows as the first time. So what counts for a row is not
only how many releases there were, but how many of them were made about one and the same batch.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Mapping


class Steps:
    """Steps, in few numbers where one follows the other and few come twice."""

    def __init__(self) -> None:
        self._first: list[int] = []  # of stretches of steps that follow each other, in order
        self._last: list[int] = []
        self._again: dict[int, int] = {}  # step -> how often beyond the first time

    def add(self, step: int) -> bool:
        """Counts a release of a step. Returns whether it is that step's first."""
        place = bisect.bisect_right(self._first, step) - 1
        if place >= 0 and step <= self._last[place]:
            self._again[step] = self._again.get(step, 0) + 1
            return False
        follows = place >= 0 and self._last[place] == step - 1
        leads = place + 1 < len(self._first) and self._first[place + 1] == step + 1
        if follows and leads:
            self._last[place] = self._last.pop(place + 1)
            del self._first[place + 1]
        elif follows:
            self._last[place] = step
        elif leads:
            self._first[place + 1] = step
        else:
            self._first.insert(place + 1, step)
            self._last.insert(place + 1, step)
        return True

    @property
    def first(self) -> int | None:
        """The lowest step; None where there is none."""
        return self._first[0] if self._first else None

    @property
    def last(self) -> int | None:
        """The highest step; None where there is none."""
        return self._last[-1] if self._last else None

    def runs(self) -> tuple[tuple[int, int, int], ...]:
        """(first step, last step, how often), of which a step may be in several: what it has in all is their sum."""
        again = [(step, step, more) for step, more in sorted(self._again.items())]
        return (*((first, last, 1) for first, last in zip(self._first, self._last)), *again)

    def often(self) -> Mapping[int, int]:
        """How often -> number of steps that released so often."""
        found: Counter[int] = Counter({1: sum(self._last) - sum(self._first) + len(self._first)})
        for more in self._again.values():
            found[1] -= 1
            found[1 + more] += 1
        return {times: steps for times, steps in found.items() if steps}
