"""The step counter of a model that trains alone; the same interface as ``Exchange``."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class SoloScope:
    """Where one (mode, task) of a model without a peer stands."""

    wire: str
    step: int = 0
    running: int | None = None
    marks: set[str] = field(default_factory=set)


class Solo:
    """Counts steps; there is nobody to wait for, to fail or to end early."""

    def __init__(self) -> None:
        self._scopes: dict[str, SoloScope] = {}

    def scope(self, wire: str) -> SoloScope:
        """The state of a scope, made on first use."""
        return self._scopes.setdefault(wire, SoloScope(wire))

    def rebase(self, scope: SoloScope, step: int) -> None:
        """Counts a scope's steps from ``step`` on."""
        scope.step = step
        scope.marks.clear()

    def enter_stage(self, what: str) -> None:
        """Tells the peer which stage begins: there is none."""

    def begin(self, scope: SoloScope) -> int | None:
        """Starts the next step and returns its number."""
        scope.running = scope.step + 1
        return scope.running

    def complete(self, scope: SoloScope) -> None:
        """Ends the running step. Returns None in place of the seconds waited for a peer: there is none."""
        scope.step, scope.running = scope.step + 1, None

    def interrupted(self, scope: SoloScope) -> bool:
        """Whether a peer is why the running step failed: never."""
        return False

    def end(self, scope: SoloScope, reason: str) -> bool:
        """Ends the round of a scope in its running step. Returns True."""
        scope.step, scope.running = scope.step + 1, None
        scope.marks.clear()
        return True

    def ended_by_peer(self, scope: SoloScope) -> bool:
        """Whether a peer ended the scope: never."""
        return False

    def announce(self, scope: SoloScope, step: int, mark: str) -> None:
        """Marks the step that begins."""
        scope.marks.add(mark)

    def marks_of(self, scope: SoloScope, step: int) -> set[str]:
        """The marks of ``step``, just completed."""
        marks, scope.marks = scope.marks, set()
        return marks
