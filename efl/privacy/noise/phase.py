"""What a ledger has counted under one set of terms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from efl.privacy.noise.steps import Steps

Terms = Mapping[str, Any]
Runs = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class Phase:
    """Releases under the same terms. How they are mixed with others makes no difference to what they tell.

    Attributes:
      terms: As ``Ledger.enter`` was given them.
      releases: How many, those included that nobody saw.
      rows: Rows of the largest batch among them.
      all_rows: Rows of the batches of all steps together, each step's once; where releases are counted that nobody saw,
        as many as the largest had.
      often: How often -> number of steps that released so often, replays not counted.
      tried: The same with replays: what the peer, whose releases may have differed, has at most released.
      lost: Releases that nobody saw: the machine went down.
      first_step: The lowest step; None where only lost releases are known.
      last_step: The highest.
      runs: Which steps are in ``often``: (first, last, times), which add up where they overlap.
      tried_runs: The same of ``tried``.
    """

    terms: Terms
    releases: int
    rows: int
    all_rows: int = 0
    often: Mapping[int, int] = field(default_factory=dict)
    tried: Mapping[int, int] = field(default_factory=dict)
    lost: int = 0
    first_step: int | None = None
    last_step: int | None = None
    runs: Runs = ()
    tried_runs: Runs = ()


class Held:
    """A phase that is being counted."""

    def __init__(self) -> None:
        self.releases = self.rows = self.all_rows = self.lost = 0
        self.steps, self.tries = Steps(), Steps()

    def phase(self, terms: Terms) -> Phase:
        """As it stands now."""
        return Phase(
            terms,
            self.releases,
            self.rows,
            self.all_rows + self.lost * self.rows,
            self.steps.often(),
            self.tries.often(),
            self.lost,
            self.steps.first,
            self.steps.last,
            self.steps.runs(),
            self.tries.runs(),
        )
