"""What the runs with faults have shown: rows of a table that is printed at the end of ``make faults``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import astuple, dataclass

import numpy as np

from tests.faults.runs import assert_bit_equal, differing

KEY = "fault"  # of the property that carries a row from a test to the report
_HEADS = ("fault", "runs", "faults injected", "differences found")


@dataclass(frozen=True)
class Row:
    """One run, or the sum of some.

    Attributes:
      fault: What kind.
      runs: How many.
      injected: Faults in them.
      differences: Weights (or messages) that are not those of the undisturbed run.
    """

    fault: str
    runs: int
    injected: int
    differences: int


class Tally:
    """Notes the run of a test.

    Args:
      record: pytest's ``record_property``.
    """

    def __init__(self, record: Callable[[str, object], None]) -> None:
        self._record = record

    def compare(self, fault: str, injected: int, got: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
        """Notes a run that ended with ``got``, and fails where that is not ``expected``, bit for bit."""
        self.note(fault, injected, len(differing(got, expected)))
        assert_bit_equal(got, expected)

    def note(self, fault: str, injected: int, differences: int = 0) -> None:
        """Notes a run that the test has compared in its own way."""
        self._record(KEY, list(astuple(Row(fault, 1, injected, differences))))


def table(rows: Iterable[Row]) -> list[str]:
    """The sums of each kind of fault, and of all, as lines of a Markdown table."""
    sums: dict[str, Row] = {}
    for row in sorted(rows, key=lambda row: row.fault):
        for kind in (row.fault, "all"):
            old = sums.get(kind, Row(kind, 0, 0, 0))
            sums[kind] = Row(kind, old.runs + row.runs, old.injected + row.injected, old.differences + row.differences)
    if not sums:
        return []
    sums["all"] = sums.pop("all")  # to the end
    cells = [_HEADS, *(tuple(map(str, astuple(row))) for row in sums.values())]
    widths = [max(len(line[column]) for line in cells) for column in range(len(_HEADS))]
    lines = [
        "| " + " | ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) + " |" for line in cells
    ]
    lines.insert(1, "|" + "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|")
    return lines
