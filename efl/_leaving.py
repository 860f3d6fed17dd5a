"""How a party goes before its run is over: SIGTERM, Ctrl-C, an error. And what both do at a mark."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from efl._keeping import Keeping
from efl._signals import TERMINATED, Signals
from efl._steps import marks
from efl._steps.marks import Parted
from efl.communicator import Communicator
from efl.errors import Interrupted, PeerLost

if TYPE_CHECKING:
    from efl.model import Model

_log = logging.getLogger("efl")


class Leaving:
    """Decides with the peer after which step a party goes, and says why one went.

    Args:
      model: What is run.
      keeping: Saves before a party goes.
      role: This party's, or ``"local"``.

    Attributes:
      signals: Watches for SIGTERM and Ctrl-C.
    """

    def __init__(self, model: Model, keeping: Keeping, role: str) -> None:
        self._model, self._keeping, self._role = model, keeping, role
        self._communicator: Communicator | None = getattr(model, "communicator", None)
        self._part_for = ""  # the role that wants to go at the next mark
        self.signals = Signals(self._on_terminate, self._abort_step)

    def reason(self, error: BaseException) -> BaseException:
        """What the peer is told: an error of ours where somebody outside has ended the program."""
        if isinstance(error, KeyboardInterrupt):
            return Interrupted(f"{self._role} was interrupted (Ctrl-C)")
        if isinstance(error, SystemExit) and error.code == TERMINATED:
            return Interrupted(f"{self._role} was stopped (SIGTERM)")
        return error

    def where(self) -> str:
        """Where this party's steps are, for the peer's message."""
        running = [scope for scope in self._model._programs if self._model._pace.scope(scope.wire).running]
        if not running:
            return f"the end of step {self._model.steps_trained}"
        return f"step {self._model._pace.scope(running[0].wire).running} of {running[0].wire}"

    def marks_due(self) -> list[str]:
        """What both parties are to do after the step that begins. The leader's to call, or a model's without a peer."""
        due = []
        if self._keeping.seconds_passed():
            due.append(marks.SAVE)
        if self._part_for:
            due.append(marks.parting(self._part_for))
            self._part_for = ""
        return due

    def at_marks(self, reached: set[str]) -> None:
        """Does it, after the step.

        Raises:
          Parted: A party goes now.
        """
        going = marks.who_parts(reached)
        if marks.SAVE in reached or going:
            self._keeping.save()
        if going:
            raise Parted(going)

    def _on_terminate(self) -> bool:
        if not self._keeping.recoverable:
            return False
        _log.warning("%s: SIGTERM: saving after a common step, then going", self._role)
        if self._model._is_timekeeper:
            self._part_for = self._role
        elif self._communicator is not None:
            self._communicator.exchange.ask_to_part()
        return True

    def on_part_asked(self) -> None:
        """The peer got SIGTERM, and asks for the mark after which it goes."""
        assert self._communicator is not None
        self._part_for = self._communicator.peer_role

    def _abort_step(self, why: str) -> None:
        if self._communicator is not None:
            self._communicator.exchange.fail(Interrupted(f"{self._role} {why}"))

    def part(self, role: str) -> PeerLost:
        """Says goodbye for now.

        Raises:
          SystemExit: This party is the one that goes.
        """
        if self._communicator is not None:
            self._communicator.shutdown()
        if role == self._role:
            _log.warning("%s: saved after step %d; going (SIGTERM)", role, self._model.steps_trained)
            raise SystemExit(TERMINATED)
        _log.warning(
            "%s: %s was stopped (SIGTERM) after step %d, which both have saved; %s",
            self._role, role, self._model.steps_trained, self._keeping.prospects(),
        )  # fmt: skip
        return PeerLost(f"{role} was stopped (SIGTERM) after step {self._model.steps_trained}")
