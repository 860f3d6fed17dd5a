"""How a party goes before its run is over: SIGTERM, Ctrl-C, an error. And what both do at a mark."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from efl._keeping import Keeping
from efl._signals import TERMINATED, Signals
from efl._steps import marks
from efl._steps.marks import Parted
from efl.communicator import Communicator
from efl.errors import CheckpointError, ConfigError, HandshakeError, Interrupted, NonFiniteLoss, PeerLost

if TYPE_CHECKING:
    from efl.model import Model

_log = logging.getLogger("efl")
_BEFORE = ConfigError, HandshakeError, CheckpointError  # end what had not begun, or tell of checkpoints themselves


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
        self._part_for: set[str] = set()  # the roles that want to go at the next mark
        self._terminated = self._parted = False
        self.signals = Signals(self._on_terminate, self._abort_step)

    def is_silent(self, error: BaseException) -> bool:
        """Whether the peer is not told: it waits for this party as for one that died, and both go on later."""
        return isinstance(error, SystemExit) and error.code == TERMINATED and self._keeping.recoverable

    def reason(self, error: BaseException) -> BaseException:
        """What the peer is told: an error of ours where somebody outside has ended the program."""
        if isinstance(error, KeyboardInterrupt):
            return Interrupted(f"{self._role} was interrupted (Ctrl-C)")
        if isinstance(error, SystemExit) and error.code == TERMINATED:
            return Interrupted(f"{self._role} was stopped (SIGTERM)")
        return error

    def where(self, error: BaseException) -> str:
        """Where this party's steps are, for the peer's message; empty where the error's own text says it."""
        if isinstance(error, NonFiniteLoss):
            return ""  # told after its step, which is not counted any more
        running = [scope for scope in self._model._programs if self._model._pace.scope(scope.wire).running]
        if not running:
            trained = self._model.steps_trained
            return f"the end of step {trained}" if trained else "the beginning, before its first step"
        return f"step {self._model._pace.scope(running[0].wire).running} of {running[0].wire}"

    def marks_due(self) -> list[str]:
        """What both parties are to do after the step that begins. The leader's to call, or a model's without a peer."""
        due = []
        if self._keeping.seconds_passed():
            due.append(marks.SAVE)
        while self._part_for:
            due.append(marks.parting(self._part_for.pop()))
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

    def last_word(self, error: BaseException) -> None:
        """Says where a party stands that goes at once, or has waited for its peer in vain."""
        if isinstance(error, KeyboardInterrupt):
            _log.warning("%s: interrupted after step %d", self._role, self._model.steps_trained)
        elif isinstance(error, Exception) and not isinstance(error, _BEFORE) and self._keeping.recoverable:
            _log.log(
                logging.INFO if self._communicator is None else logging.WARNING,
                "%s: ended after step %d; %s",
                self._role,
                self._model.steps_trained,
                self._keeping.what_is_left(),
            )
        elif isinstance(error, SystemExit) and error.code == TERMINATED and not self._parted:
            _log.warning(
                "%s: stopped after step %d (SIGTERM); %s",
                self._role,
                self._model.steps_trained,
                self._keeping.what_is_left(),
            )

    def _on_terminate(self) -> bool:
        self._terminated = True
        if not self._keeping.recoverable:
            return False
        if self._communicator is not None and self._communicator.away:
            _log.warning("%s: SIGTERM: going, without a step that both could save: the peer is away", self._role)
            return False
        _log.warning("%s: SIGTERM: saving after a common step, then going", self._role)
        if self._model._is_timekeeper:
            self._part_for.add(self._role)
        elif self._communicator is not None:
            self._communicator.exchange.ask_to_part()
        return True

    def on_part_asked(self) -> None:
        """The peer got SIGTERM, and asks for the mark after which it goes."""
        assert self._communicator is not None
        self._part_for.add(self._communicator.peer_role)

    def _abort_step(self, why: str) -> None:
        if self._communicator is not None:
            self._communicator.exchange.fail(Interrupted(f"{self._role} {why}"))

    def part(self, roles: set[str]) -> PeerLost:
        """Says goodbye for now.

        Raises:
          SystemExit: This party is one that goes.
        """
        if self._communicator is not None:
            self._communicator.shutdown(firm=True)
        step = self._model.steps_trained
        if self._role in roles or self._terminated:  # or will have to go, where its own mark came too late
            _log.warning("%s: saved after step %d; going (SIGTERM)", self._role, step)
            self._parted = True
            raise SystemExit(TERMINATED)
        (other,) = roles
        _log.warning(
            "%s: %s was stopped (SIGTERM) after step %d, which both have saved; %s",
            self._role, other, step, self._keeping.prospects(),
        )  # fmt: skip
        return PeerLost(f"{other} was stopped (SIGTERM) after step {step}")
