"""Where one (mode, task) of a federation stands."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from efl._steps.sample_ids import IdLedger


class Sink(Protocol):
    """The part of an inbox that an exchange drives."""

    name: str

    def put(self, array: np.ndarray) -> None:
        """Takes one array."""

    def abort(self) -> None:
        """Fails whoever waits."""

    def drain(self) -> None:
        """Drops what was put and not taken."""


@dataclass
class Scope:
    """Where one (mode, task) stands.

    Attributes:
      wire: What the names of its messages begin with, such as ``train`` or ``eval:ctr``.
      sinks: Where its messages go.
      own_sinks: Where goes what threads of this party compute for its steps. A failure does not abort these: the thread
        may have all that it needs, and gives up where it has not.
      step: The last step that ended: completed, or burnt because somebody's data ended in it.
      running: The step under way, or None.
      peer_ends: Steps in which the peer's data ended, in order: a peer whose rounds are empty, or of one step, may be
        done with the next before this party is with one.
      marks: (step, mark) of what both parties do after a step, in order; see ``efl._steps.marks``.
      arrived: Sink's name -> the newest step handed to it.
      held: (sink, step, array) of messages that wait for a session, or for the round before theirs to be closed here.
      ahead: (name, step) of messages of steps not yet begun; they stay in the channel's window.
      ids: The sample ids of its steps.
      waited: Seconds that the running step has waited for the peer.
      idle_since: When it began to wait.
    """

    wire: str
    sinks: list[Sink] = field(default_factory=list)
    own_sinks: list[Sink] = field(default_factory=list)
    step: int = 0
    running: int | None = None
    peer_ends: deque[int] = field(default_factory=deque)
    marks: deque[tuple[int, str]] = field(default_factory=deque)
    arrived: dict[str, int] = field(default_factory=dict)
    held: deque[tuple[Sink, int, np.ndarray]] = field(default_factory=deque)
    ahead: deque[tuple[str, int]] = field(default_factory=deque)
    ids: IdLedger = field(default_factory=IdLedger)
    waited: float = 0.0
    idle_since: float = 0.0

    @property
    def all_sinks(self) -> list[Sink]:
        """All of them."""
        return [*self.sinks, *self.own_sinks]

    def clear(self) -> None:
        """Begins a conversation."""
        self.step, self.running = 0, None
        for held in (self.peer_ends, self.marks, self.held, self.ahead):
            held.clear()
        self.arrived.clear()
        self.ids.clear()

    def missing(self) -> list[str]:
        """Names of what the running step still waits for."""
        if self.running is None:
            return []
        return [sink.name for sink in self.sinks if self.arrived.get(sink.name, 0) < self.running]

    def has_part_of(self, step: int) -> bool:
        """Whether a message of ``step`` has come. A peer that only sends may be gone long before they are taken."""
        return any(self.arrived.get(sink.name, 0) >= step for sink in self.sinks)


def take_up_to(step: int, marks: deque[tuple[int, str]]) -> set[str]:
    """Drops the marks of steps that are not later than ``step``, and returns those of ``step`` itself."""
    taken = set()
    while marks and marks[0][0] <= step:
        at, mark = marks.popleft()
        if at == step:
            taken.add(mark)
    return taken


def drop_up_to(step: int, steps: deque[int]) -> None:
    """Drops from the left all that are not later than ``step``."""
    while steps and steps[0] <= step:
        steps.popleft()
