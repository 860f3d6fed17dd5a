"""The places of a run at which both parties can be found again."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_NAME = re.compile(r"step-(\d{10,18})-fit-(\d{1,9})-loop-(\d{4,9})-at-(\d{10,18})")


@dataclass(frozen=True, order=True)
class Position:
    """Where a run stands; later positions are greater.

    Both parties pass the same positions in the same order, since every step of a common loop is mutual. What a party
    does alone (a stage that loads weights, a loop over fetches of its own) has no place in it.

    Attributes:
      trained: Training steps that the weights have behind them.
      fit: Number of the ``fit`` in its program, from 1.
      loop: Number of the common loop in that fit, from 0.
      at: Steps of that loop that are done.
    """

    trained: int
    fit: int
    loop: int
    at: int

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"step-{self.trained:010d}-fit-{self.fit}-loop-{self.loop:04d}-at-{self.at:010d}"

    @classmethod
    def of(cls, name: str) -> Position | None:
        """The position that a folder's name says, or None."""
        match = _NAME.fullmatch(name)
        return cls(*map(int, match.groups())) if match else None

    def to_json(self) -> list[int]:
        """As JSON values."""
        return [self.trained, self.fit, self.loop, self.at]

    @classmethod
    def parse(cls, told: Any) -> Position:
        """Reads what ``to_json`` gave.

        Raises:
          ValueError: It is something else.
        """
        if not isinstance(told, Sequence) or isinstance(told, str) or len(told) != 4:
            raise ValueError(told)
        if any(isinstance(n, bool) or not isinstance(n, int) or not 0 <= n < 1 << 58 for n in told):
            raise ValueError(told)
        return cls(*told)

    def __str__(self) -> str:
        """In words, for messages."""
        where = f"step {self.trained}"
        return where if not self.at else f"{where} (loop {self.loop}, {self.at} steps into it)"
