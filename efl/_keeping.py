"""What a run keeps: when it saves a checkpoint, what of it is restored, and what the peer knows of it."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tensorflow.compat.v1 as tf

from efl import _random_ops, _readers
from efl._agreement import why_not_together
from efl._checkpoint import CheckpointStore, Known, mismatches, reason_of
from efl._gradients import is_private
from efl._iterators import OwnIterators
from efl._position import Position
from efl._program import Program
from efl._task_scope import MODE, TaskScope
from efl.communicator import Communicator
from efl.errors import CheckpointError
from efl.procedure_fn import Procedure
from efl.settings import Settings

if TYPE_CHECKING:
    from efl.model import Model

_log = logging.getLogger("efl")
_DEFAULT_STEPS = 1000
_NAMES = 5  # of variables that are remembered
LEDGER_GONE = "all that was trained in steps whose ledger is gone"  # in their place, in the table of adversaries


class Keeping:
    """The checkpoints of one ``fit``.

    Args:
      model: What is kept.
      procedure: What is run.
      settings: Folder, times, how many.
      role: This party's, or ``"local"``.

    Attributes:
      store: Where checkpoints lie; None without a ``checkpoint_dir``.
      fit: Number of this fit in its program.
      iterators: The user's own iterators that a checkpoint can hold.
      lineage: Names the attempt that writes.
      peer_saved: What the peer holds, as far as it has told.
      peer_saves: Whether the peer has a ``checkpoint_dir``.
      unequal: Whose training input alone does not survive a restart, and its scope; None where they are alike.
      goes_on: Whether the checkpoint restored was made in this fit of this procedure.
      resumed: Scopes whose inputs go on where that checkpoint has them.
    """

    def __init__(self, model: Model, procedure: Procedure, settings: Settings, role: str) -> None:
        self._model, self._role = model, role
        self._communicator: Communicator | None = getattr(model, "communicator", None)
        self._trains = procedure.trains
        self._fits = [*model.fits, procedure.describe()]
        self._every_seconds = settings.save_checkpoint_secs
        by_time = self._every_seconds is not None
        self.steps = settings.save_checkpoint_steps or (0 if by_time else _DEFAULT_STEPS)
        self._peer_timeout = settings.peer_timeout
        self.store: CheckpointStore | None = None
        self.folder: Path | None = None
        if settings.checkpoint_dir:
            self.folder = Path(settings.checkpoint_dir) / role / str(settings.task_index)
            self.store = CheckpointStore(self.folder, settings.keep_checkpoints)
        self._fit = len(self._fits)
        self._saver: tf.train.Saver | None = None
        self._saved: Position | None = None
        self._saved_state: dict[str, Any] = {}  # what was saved beside it, of this party's own stages and readers
        self._own_steps_then = 0  # when that was saved
        self._saved_at = time.monotonic()
        self._told_of_ledger = False
        self._bare: list[str] | None = None  # variables that this program trains without noise
        self.lineage = ""
        self.peer_saved: set[Known] = set()
        self.peer_saves = False
        self.unequal: tuple[str, str] | None = None
        self.goes_on = False
        self.resumed: set[TaskScope] = set()
        self.iterators = self._examine()

    @property
    def fit(self) -> int:
        """Number of this fit in its program, from 1."""
        return self._fit

    @property
    def recoverable(self) -> bool:
        """Whether both parties could go on from a checkpoint if one of them died."""
        return self.saves_with_peer and self.unequal is None

    @property
    def saves_with_peer(self) -> bool:
        """Whether both parties keep checkpoints."""
        return self.store is not None and (self._communicator is None or self.peer_saves)

    def _examine(self) -> OwnIterators:
        """Finds what of the inputs a checkpoint can hold, and says what it cannot."""
        if self.store is None:
            return OwnIterators([])
        programs = self._model._programs.values()
        iterators, warnings = OwnIterators.of(programs)
        if self._trains:
            for text in warnings:
                _log.warning("%s: %s", self._role, text)
            for text in _random_ops.told(programs) if self._fit == 1 else ():
                _log.info("%s: %s", self._role, text)
        return iterators

    def why_not_recoverable(self) -> str:
        """Why a run whose peer has died is lost, in words."""
        if self.saves_with_peer and self.unequal is not None:
            return f"This run cannot be recovered: {why_not_together(*self.unequal, 'after a restart')}"
        without = self._role if self.store is None else self._communicator and self._communicator.peer_role
        return f"This run cannot be recovered: {without} has no checkpoint_dir"

    def prospects(self) -> str:
        """What becomes of the run while the peer is away, in words."""
        wait = f"waiting up to {self._peer_timeout:g} s for it to come back"
        if self.store is None or not self.recoverable:
            return f"{wait}. {self.why_not_recoverable()}, so only a line that returns can save it, not a program"
        known = self.store.pinned
        where = "" if known is None else f", the newest of {known[0]}"
        return f"{wait}; if its program has ended, start it again as before: both go on from a checkpoint{where}"

    def what_is_left(self) -> str:
        """What a party that goes without saving leaves behind, in words."""
        if self.store is None:
            return "without a checkpoint_dir nothing of it is kept"
        if self._communicator is None:
            saved = self._saved
            return "nothing is saved" if saved is None else f"started again, it goes on from the checkpoint of {saved}"
        if self.store.pinned is None:
            return "no checkpoint is held by both parties"
        return f"started again, both go on from the checkpoint of {self.store.pinned[0]}"

    def make_saver(self) -> None:
        """Makes the ops that save; once, after the graph is complete."""
        if self.store is not None and self._saver is None:
            held = [*self._held(), *self.iterators.saveables]
            self._saver = tf.train.Saver(held, max_to_keep=0, save_relative_paths=True)

    def forget(self) -> None:
        """The session is new: nothing of it is saved."""
        self._saved = None

    def seconds_passed(self) -> bool:
        """Whether it is time for a checkpoint, by this party's clock; counts anew where it is."""
        every = self._every_seconds
        due = every is not None and self.store is not None and time.monotonic() - self._saved_at >= every
        if due:
            self._saved_at = time.monotonic()
        return due

    @staticmethod
    def _held() -> list[tf.Variable]:
        return list(dict.fromkeys([*tf.global_variables(), *tf.local_variables()]))

    def check_model(self) -> None:
        """Looks whether the newest checkpoint is of this model.

        Before the peer is called: it may be one that waits, and a party that could not go on must not end it.

        Raises:
          CheckpointError: It is of another model.
        """
        newest = None if self.store is None else self.store.newest()
        if newest is not None:
            self._check_model(newest)

    def _check_model(self, position: Position) -> None:
        assert self.store is not None
        differences = mismatches(self.store.prefix(position), tf.global_variables())
        if differences:
            raise CheckpointError(
                f"the checkpoint of {position} in {self.store.folder} is of another model: "
                + "; ".join(f"{variable.op.name} {text}" for variable, text in differences.items())
                + ". Run the program that made it, or use another checkpoint_dir"
            )

    def check_ledger(self, position: Position) -> None:
        """Looks whether the open ledger has all that had been released when a checkpoint was saved.

        Where it has not, steps count that nobody can account for. Every checkpoint that is saved from then on says so,
        and so do those from before: the ledger of now is none that they were saved with, however long it becomes.
        """
        assert self.store is not None
        holder, mark = self._model._noise_holder, self.store.state(position).get("ledger")
        lack = "" if holder is None or mark is None else holder.lacks(mark)
        if not lack:
            return
        self._model.unnoised.add(LEDGER_GONE)
        if not self._told_of_ledger:
            self._told_of_ledger = True
            _log.warning(
                "%s: the ledger of what was released is not the one that the checkpoint of %s in %s was saved with: "
                "%s. What these steps spent nobody knows, so privacy_spent gives no figure: stop and put the ledger "
                "back from a copy, or begin in another checkpoint_dir",
                self._role,
                position,
                self.store.folder,
                lack,
            )

    def restore(self, raw: tf.Session, position: Position) -> None:
        """Gives everything that a checkpoint holds back to a session, but the user's own iterators.

        Raises:
          CheckpointError: It is of another model.
        """
        assert self.store is not None and self._saver is not None
        model = self._model
        prefix = self.store.prefix(position)
        self._check_model(position)
        # Local variables (metrics, readers' positions) that an earlier program did not have begin afresh.
        absent = set(mismatches(prefix, tf.local_variables()))
        saver = self._saver
        if absent or self.iterators.saveables:  # these need their initializers first
            saver = tf.train.Saver([v for v in self._held() if v not in absent])
        try:
            saver.restore(raw, prefix)
        except tf.errors.OpError as error:
            self.store.look_again()
            raise CheckpointError(
                f"the checkpoint of {position} in {self.store.folder} cannot be read any more: {reason_of(error)}. "
                "Start both again as before: what is damaged is skipped, and they go on from the newest that both hold"
            ) from None
        state = self.store.state(position)
        model.steps_trained = position.trained
        model.unnoised |= set(state.get("unnoised", ()))
        self.check_ledger(position)
        model.history[:] = [row for row in model.history if row["step"] <= position.trained]
        for program in model._programs.values():
            program.exhausted = program.scope.wire in state["exhausted"]
        self._saved = position
        self.goes_on = position.fit == self._fit and state["fits"] == self._fits
        if self.goes_on:
            model.stage_mgr.restore(state["stage"])
            model.shared_seed = int(state["shared_seed"])
            self.resumed = set(model._programs)
        else:
            # Another procedure: training data goes on with the next row unless it had ended, evaluation begins anew.
            self.resumed = {TaskScope(MODE.TRAIN, t) for t in model.tasks(MODE.TRAIN)} - self._exhausted()
            _readers.forget(raw, self.resumed)
        self._saved_state, self._own_steps_then = self._state(), model.stage_mgr.own_steps

    def _exhausted(self) -> set[TaskScope]:
        return {scope for scope, program in self._model._programs.items() if program.exhausted}

    def maybe_save(self, steps: int) -> None:
        """Called after the training step of that number."""
        if self.store is not None and self.steps and steps % self.steps == 0:
            self.save()

    def stage_done(self) -> None:
        """Called between stages."""
        saved, model = self._saved, self._model
        steps = model.steps_trained, model.stage_mgr.own_steps
        stands = saved is not None and steps == (saved.trained, self._own_steps_then)
        if not stands or self._saved_state["exhausted"] != self._state()["exhausted"]:
            self.save()

    def _position(self) -> Position:
        manager = self._model.stage_mgr
        return Position(self._model.steps_trained, self._fit, manager.common_loops, manager.common_steps)

    def _state(self) -> dict[str, Any]:
        """What a checkpoint holds of this party alone, beside the variables."""
        exhausted = sorted(scope.wire for scope in self._exhausted())
        return {"exhausted": exhausted, "stage": self._model.stage_mgr.state(), "unnoised": self._unnoised()}

    def _unnoised(self) -> list[str]:
        """Variables that were ever trained without the noise of differential privacy; a few names are enough."""
        model = self._model
        if model.steps_trained and self._trains and len(model.unnoised) < _NAMES:
            if self._bare is None:  # programs stay what they are
                trained = [program for program in model._programs.values() if program.scope.mode is MODE.TRAIN]
                self._bare = [v.op.name for program in trained for v in _without_noise(program)][:_NAMES]
            model.unnoised.update(self._bare)
        return sorted(model.unnoised)

    def save(self) -> None:
        """Writes a checkpoint of where the run stands, unless it is written, and tells the peer."""
        model, position = self._model, self._position()
        if self.store is None or self._saver is None or not self._trains:
            return
        own = self._state()
        if (position, own) == (self._saved, self._saved_state):
            return
        state = {**own, "run": self.lineage, "fits": self._fits, "shared_seed": model.shared_seed}
        started = time.monotonic()
        model._settle_noise()
        # Not of what makes one checkpoint another: where nothing but it differs, nothing was trained.
        state["ledger"] = None if model._noise_holder is None else model._noise_holder.mark()
        self.store.save(model.session.raw_session(), self._saver, position, state)
        self._saved, self._saved_state, self._saved_at = position, own, time.monotonic()
        self._own_steps_then = model.stage_mgr.own_steps
        if position.trained:
            self.iterators.tell_size(self.store.prefix(position))
        known = position, self.lineage
        if self._communicator is not None:
            if known in self.peer_saved:
                self.store.pinned = known
            self._communicator.exchange.tell_saved({"position": position.to_json(), "run": self.lineage})
            self._communicator.exchange.prospects = self.prospects()
        _log.debug("%s: checkpoint of %s in %.0f ms", self._role, position, 1000 * (time.monotonic() - started))

    def on_peer_saved(self, body: dict[str, Any]) -> None:
        """The peer has written a checkpoint: where this party holds the same one, it is kept."""
        try:
            known = Position.parse(body.get("position")), str(body.get("run"))[:64]
        except ValueError:
            return  # it only says what this party need not keep
        self.peer_saved = {known, *sorted(self.peer_saved)[-20:]}
        if self.store is not None and self._saved is not None and known == (self._saved, self.lineage):
            self.store.pinned = known
            if self._communicator is not None:
                self._communicator.exchange.prospects = self.prospects()


def _without_noise(program: Program) -> list[tf.Variable]:
    if not any(map(is_private, program.optimizers)):
        return [v for held, _ in program.optimizers.values() for v in held]
    from efl.privacy._moved import without_noise  # only who asks for privacy pays for it

    return without_noise(program)
