"""One ``fit``: connect, agree, restore, run the procedure, save, say goodbye; and again, where the peer died.

``docs/architecture/survival.md`` tells what happens when a party is lost.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tensorflow.compat.v1 as tf

from efl import _random_ops, _readers
from efl._agreement import Facts, Start, shared_seed, where_to_start
from efl._checkpoint import CheckpointStore, Known, mismatches
from efl._iterators import OwnIterators
from efl._position import Position
from efl._session import HookedSession
from efl._signals import TERMINATED, Signals
from efl._steps import marks
from efl._steps.marks import Parted
from efl._task_scope import MODE, TaskScope
from efl.communicator import Communicator
from efl.errors import CheckpointError, EflError, Interrupted, PeerFailed, PeerLost, PeerRestarted
from efl.hooks import Reporter
from efl.procedure_fn import Procedure

if TYPE_CHECKING:
    from efl.model import Model

_log = logging.getLogger("efl")
_DEFAULT_SAVE_STEPS = 1000


class Run:
    """The state of one ``fit`` of a model.

    Args:
      model: Compiled.
      procedure: What to run.
      log_step: Steps between log lines.
      project_name: Compared between the parties.
      options: Settings given to ``fit``; None means that the model's settings stand.
      save_graph: Also write the graph.
    """

    def __init__(
        self,
        model: Model,
        procedure: Procedure | Callable[[Model], None],
        log_step: int,
        project_name: str,
        options: Mapping[str, Any],
        save_graph: bool,
    ) -> None:
        self._model = model
        self._procedure = (
            procedure
            if isinstance(procedure, Procedure)
            else Procedure("custom", {"function": getattr(procedure, "__name__", "procedure")}, procedure)
        )
        settings = replace(model.settings, **{k: v for k, v in options.items() if v is not None})
        self._settings = settings
        self._project_name = project_name
        self._save_graph = save_graph
        self._communicator: Communicator | None = getattr(model, "communicator", None)
        self._role = settings.federal_role if self._communicator is not None else "local"
        self._store: CheckpointStore | None = None
        folder: Path | None = None
        if settings.checkpoint_dir:
            folder = Path(settings.checkpoint_dir) / self._role / str(settings.task_index)
            self._store = CheckpointStore(folder, settings.keep_checkpoints)
        self._saver: tf.train.Saver | None = None
        self._saved: Position | None = None
        self._exhausted_then: set[TaskScope] = set()  # when that was saved
        self._lineage = ""
        self._peer_saved: set[Known] = set()
        self._fit = len(model.fits) + 1
        self._began_cold = False
        self._began_at = 0
        self._peer_saves = False
        self._part_for = ""  # the role that wants to go at the next mark
        self._saved_at = time.monotonic()
        self.signals = Signals(self._on_terminate, self._abort_step)
        # Here, since other threads, which ask for the facts too, have another default graph.
        self._iterators = self._examine_inputs()
        self._goes_on = False  # with the procedure that the restored checkpoint was made in
        self._resumed: set[TaskScope] = set()  # whose inputs go on where that checkpoint has them
        logs = Path(settings.log_dir) / self._role if settings.log_dir else folder / "logs" if folder else None
        model.history = []
        self.reporter = Reporter(
            self._role,
            log_step,
            model.history,
            self._read,
            lambda: model.steps_trained,
            str(logs) if logs else None,
        )

    def _examine_inputs(self) -> OwnIterators:
        """Finds what of the inputs a checkpoint can hold, and says what it cannot."""
        if self._store is None:
            return OwnIterators([])
        programs = self._model._programs.values()
        iterators, warnings = OwnIterators.of(programs)
        if self._procedure.trains:
            for text in warnings:
                _log.warning("%s: %s", self._role, text)
            for text in _random_ops.told(programs) if self._fit == 1 else ():
                _log.info("%s: %s", self._role, text)
        return iterators

    def execute(self) -> None:
        """Runs everything; on an error tells the peer, and raises it."""
        model = self._model
        try:
            if self._store is not None and self._procedure.trains:
                self._store.lock()
            if not self._was_done_before():
                with self.signals:
                    self._execute()
                model.in_step = True
            model.fits.append(self._procedure.describe())
        except BaseException as error:
            for program in model._programs.values():
                program.exhausted = True  # nobody knows how far the peer's readers are: the next fit begins anew
            if isinstance(error, KeyboardInterrupt):
                _log.warning("%s: interrupted after step %d", self._role, model.steps_trained)
            if self._communicator is not None:
                self._communicator.abort(self._reason(error), self._where())
            raise
        finally:
            self.reporter.close()
            if self._store is not None:
                self._store.unlock()

    def _execute(self) -> None:
        lost: PeerLost | None = None
        while True:
            try:
                self._attempt(lost)
                return
            except PeerRestarted as error:
                lost = error
            except Parted as parted:
                lost = self._part(parted.role)
            self._give_up_attempt(lost)

    def _reason(self, error: BaseException) -> BaseException:
        """What the peer is told: an error of ours where somebody outside has ended the program."""
        if isinstance(error, KeyboardInterrupt):
            return Interrupted(f"{self._role} was interrupted (Ctrl-C)")
        if isinstance(error, SystemExit) and error.code == TERMINATED:
            return Interrupted(f"{self._role} was stopped (SIGTERM)")
        return error

    def _where(self) -> str:
        """Where this party's steps are, for the peer's message."""
        running = [scope for scope in self._model._programs if self._model._pace.scope(scope.wire).running]
        if not running:
            return f"after step {self._model.steps_trained}"
        return f"step {self._model._pace.scope(running[0].wire).running} of {running[0].wire}"

    # ---- what one party alone knows -------------------------------------------------------------------------------

    def marks_due(self) -> list[str]:
        """What both parties are to do after the step that begins. The leader's to call, or a model's without a peer."""
        due = []
        every = self._settings.save_checkpoint_secs
        if every is not None and self._store is not None and time.monotonic() - self._saved_at >= every:
            self._saved_at = time.monotonic()
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
            self._save()
        if going:
            raise Parted(going)

    def _on_terminate(self) -> bool:
        if self._store is None or (self._communicator is not None and not self._peer_saves):
            return False
        _log.warning("%s: SIGTERM: saving after a common step, then going", self._role)
        if self._model._is_timekeeper:
            self._part_for = self._role
        elif self._communicator is not None:
            self._communicator.exchange.ask_to_part()
        return True

    def _on_part_asked(self) -> None:
        assert self._communicator is not None
        self._part_for = self._communicator.peer_role

    def _abort_step(self, why: str) -> None:
        if self._communicator is not None:
            self._communicator.exchange.fail(Interrupted(f"{self._role} {why}"))

    def _part(self, role: str) -> PeerLost:
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
            self._role, role, self._model.steps_trained, self._prospects(),
        )  # fmt: skip
        return PeerLost(f"{role} was stopped (SIGTERM) after step {self._model.steps_trained}")

    def _attempt(self, lost: PeerLost | None) -> None:
        """The whole of it, from the handshake to the goodbye.

        Raises:
          PeerRestarted: The peer's process is another one; both have to begin at a checkpoint.
        """
        start = self._agree(lost)
        self._open(start)
        done_before = self._model.stage_mgr.index
        self._procedure(self._model)
        if start.restore is not None and self._model.stage_mgr.index == done_before:
            self._say_nothing_to_do()
        self._save(final=True)
        if self._communicator is not None:
            failure = self._communicator.shutdown(timeout=self._settings.peer_timeout)
            for scope, program in self._model._programs.items():
                # Said after this party's last step: the next fit begins the data anew on both sides.
                program.exhausted |= self._model._pace.ended_by_peer(self._model._pace.scope(scope.wire))
            if isinstance(failure, (PeerRestarted, PeerFailed)):
                raise failure
            if failure is not None:
                _log.warning("%s is done; whether its peer is, nobody knows: %s", self._role, failure)
        self._model.session.end(self._hooks())

    def _say_nothing_to_do(self) -> None:
        _log.info(
            "%s: nothing to do: this run was complete at step %d; another checkpoint_dir begins anew, another "
            "procedure (more steps, say) goes on with these weights",
            self._role,
            self._model.steps_trained,
        )

    # ---- a peer that died ---------------------------------------------------------------------------------------

    def _give_up_attempt(self, lost: PeerLost) -> None:
        """Makes ready for the next attempt.

        Raises:
          PeerLost: There is nothing that both could begin at.
        """
        model = self._model
        untouched = self._began_cold and model.steps_trained == self._began_at and not model.stage_mgr.passed
        if not untouched and not (self._store is not None and self._peer_saves):
            raise PeerLost(f"{lost}. {self._why_not_recoverable()}") from None
        assert self._communicator is not None
        self._communicator.abandon()
        model._close_session()
        model.in_step = False
        for program in model._programs.values():
            program.exhausted = False

    def _why_not_recoverable(self) -> str:
        without = self._role if self._store is None else self._communicator and self._communicator.peer_role
        return f"This run cannot be recovered: {without} has no checkpoint_dir"

    def _prospects(self) -> str:
        wait = f"waiting up to {self._settings.peer_timeout:g} s for it to come back"
        if self._store is None or not self._peer_saves:
            return f"{wait}. {self._why_not_recoverable()}, so only a line that returns can save it, not a program"
        known = self._store.pinned
        where = "" if known is None else f", the newest of {known[0]}"
        return f"{wait}; if its program has ended, start it again as before: both go on from a checkpoint{where}"

    # ---- start -------------------------------------------------------------------------------------------------

    def _was_done_before(self) -> bool:
        """Whether this is a fit of a program that an earlier process finished, and went on to the next."""
        model, store = self._model, self._store
        if store is None or model.in_step:
            return False
        newest = store.newest()
        if newest is None or newest.fit <= self._fit:
            return False
        state = store.state(newest)
        if state["fits"][: self._fit] != [*model.fits, self._procedure.describe()]:
            return False
        self._start_session(Start((newest, state["run"]), cold=True), alone=True)
        _log.info("%s: fit %d was done before; going on with fit %d", self._role, self._fit, newest.fit)
        return True

    def _facts(self) -> Facts:
        model = self._model
        return Facts(
            checkpoints=tuple(self._store.known()) if self._store else (),
            save_steps=self._save_steps if self._store else None,
            steps_trained=model.steps_trained if model.in_step else 0,
            warm=model.in_step,
            inputs=self._iterators.kept,
            run=secrets.token_hex(8),
            seed=None if self._role == "follower" else shared_seed(self._own_seed()),
        )

    def _agree(self, lost: PeerLost | None) -> Start:
        """Connects, and says where both begin."""
        model, communicator = self._model, self._communicator
        mine = self._facts()
        peer = mine
        if communicator is not None:
            terms = {
                "procedure": self._procedure.describe(),
                "fit": self._fit,
                "project_name": self._project_name,
                "tasks": sorted(scope.wire for scope in model._programs),
            }
            communicator.exchange.prospects = self._prospects()
            communicator.exchange.on_saved = self._on_peer_saved
            communicator.exchange.on_part_asked = self._on_part_asked
            told = communicator.connect(
                terms,
                mine.to_json(),
                timeout=None if lost is None else self._settings.peer_timeout,
                judge=self._judge,
                stubborn=lost is not None,
            )
            peer = Facts.parse(told, communicator.peer_role)
        self._peer_saves = peer.save_steps is not None
        leader = peer if self._role == "follower" else mine
        model.shared_seed, self._lineage = leader.seed or 0, leader.run
        peer_role = "" if communicator is None else communicator.peer_role
        start = where_to_start(mine, peer, self._role, peer_role)
        if self._store is not None:
            self._store.pinned, self._peer_saved = start.restore, set(peer.checkpoints)
        if communicator is not None:
            communicator.exchange.prospects = self._prospects()
        if start.restore is None and not self._procedure.trains and self._store is not None and not mine.warm:
            raise CheckpointError(
                f"{self._procedure.describe()} evaluates a checkpoint, and {self._store.folder} holds none; train "
                "first, or leave checkpoint_dir out to evaluate initial weights"
            )
        return start

    def _judge(self, facts: Mapping[str, Any]) -> list[str]:
        """Why somebody with these facts cannot take the place of a peer that was lost."""
        assert self._communicator is not None
        try:
            mine = replace(self._facts(), warm=False)
            where_to_start(mine, Facts.parse(facts, self._communicator.peer_role), self._role,
                           self._communicator.peer_role)  # fmt: skip
        except EflError as error:
            return [str(error)]
        return []

    def _own_seed(self) -> int:
        given = self._model.settings.seed
        return secrets.randbits(63) if given is None else given

    @property
    def _save_steps(self) -> int:
        by_time = self._settings.save_checkpoint_secs is not None
        return self._settings.save_checkpoint_steps or (0 if by_time else _DEFAULT_SAVE_STEPS)

    def _hooks(self) -> list[tf.train.SessionRunHook]:
        return list(dict.fromkeys(hook for program in self._model._programs.values() for hook in program.hooks))

    def _open(self, start: Start) -> None:
        if start.cold and self._model._session is not None:
            self._model._close_session()
        cold = self._model._session is None
        try:
            self._start_session(start)
        except BaseException:
            if cold:
                self._model._close_session()  # half made: a later fit makes a new one
            raise

    def _start_session(self, start: Start, alone: bool = False) -> None:
        model = self._model
        fresh = model._session is None
        graph = tf.get_default_graph()
        for hook in self._hooks():
            if hook not in model.begun_hooks:
                hook.begin()
                model.begun_hooks.append(hook)
        if self._store is not None and self._saver is None:
            held = [*self._held(), *self._iterators.saveables]
            self._saver = tf.train.Saver(held, max_to_keep=0, save_relative_paths=True)
        if fresh:
            model._session = HookedSession(graph, model._session_config)
            raw = model.session.raw_session()
            raw.run([tf.global_variables_initializer(), tf.local_variables_initializer(), tf.tables_initializer()])
            model._apply_initial_weights(raw)
            model.steps_trained, self._saved = 0, None
        raw = model.session.raw_session()
        model.stage_mgr.reset()
        if start.restore is not None:
            self._restore(raw, start.restore[0])
        self._began_cold, self._began_at = fresh, model.steps_trained
        for scope in model._programs:
            # Messages are counted from the same number on both sides, whatever ended an earlier run.
            base = model.steps_trained if scope.mode is MODE.TRAIN else 0
            model._pace.rebase(model._pace.scope(scope.wire), base)
        if alone:
            return
        if self._communicator is not None:
            self._communicator.bind(raw)
        model.session.start(self._hooks())
        if fresh:
            _readers.initialize(raw)
            if start.restore is not None and self._store is not None:
                # A script that only evaluates, or trains alone in another way, may read other data than what saved.
                strict = self._procedure.trains and (self._goes_on or self._communicator is not None)
                self._iterators.restore(raw, self._store.prefix(start.restore[0]), self._resumed, strict)
        else:
            for program in model._programs.values():
                if program.exhausted and program.scope.mode is MODE.TRAIN:
                    _readers.restart(raw, program)
        if self._save_graph and self._store is not None:
            tf.io.write_graph(graph, str(self._store.folder), "graph.pbtxt")
        where = "" if start.restore is None else f", from the checkpoint of {start.restore[0]}"
        _log.info("%s: %s of %s%s", self._role, self._procedure.describe(), self._project_name, where)
        if start.restore is None:
            self._save()

    def _read(self, tensors: dict[str, tf.Tensor]) -> dict[str, Any]:
        return self._model.session.raw_session().run(tensors) if tensors else {}

    # ---- checkpoints -----------------------------------------------------------------------------------------------

    @staticmethod
    def _held() -> list[tf.Variable]:
        return list(dict.fromkeys([*tf.global_variables(), *tf.local_variables()]))

    def _restore(self, raw: tf.Session, position: Position) -> None:
        assert self._store is not None and self._saver is not None
        model = self._model
        prefix = self._store.prefix(position)
        differences = mismatches(prefix, tf.global_variables())
        # Local variables (metrics, readers' positions) that an earlier program did not have begin afresh.
        absent = set(mismatches(prefix, tf.local_variables()))
        if differences:
            raise CheckpointError(
                f"the checkpoint of {position} in {self._store.folder} is of another model: "
                + "; ".join(f"{variable.op.name} {text}" for variable, text in differences.items())
            )
        saver = self._saver
        if absent or self._iterators.saveables:  # these need their initializers first
            saver = tf.train.Saver([v for v in self._held() if v not in absent])
        saver.restore(raw, prefix)
        state = self._store.state(position)
        model.steps_trained = position.trained
        model.history[:] = [row for row in model.history if row["step"] <= position.trained]
        for program in model._programs.values():
            program.exhausted = program.scope.wire in state["exhausted"]
        self._saved, self._exhausted_then = position, self._exhausted()
        self._goes_on = position.fit == self._fit and state["fits"] == [*model.fits, self._procedure.describe()]
        if self._goes_on:
            model.stage_mgr.restore(state["stage"])
            model.shared_seed = int(state["shared_seed"])
            self._resumed = set(model._programs)
        else:
            # Another procedure: training data goes on with the next row unless it had ended, evaluation begins anew.
            self._resumed = {TaskScope(MODE.TRAIN, t) for t in model.tasks(MODE.TRAIN)} - self._exhausted()
            _readers.forget(raw, self._resumed)

    def _exhausted(self) -> set[TaskScope]:
        return {scope for scope, program in self._model._programs.items() if program.exhausted}

    def maybe_save(self) -> None:
        """Called after each training step."""
        every = self._save_steps
        if self._store is not None and every and self._model.steps_trained % every == 0:
            self._save()

    def stage_done(self) -> None:
        """Called between stages."""
        saved = self._saved
        if saved is None or saved.trained != self._model.steps_trained or self._exhausted_then != self._exhausted():
            self._save()

    def _position(self) -> Position:
        manager = self._model.stage_mgr
        return Position(self._model.steps_trained, self._fit, manager.index, manager.steps)

    def _save(self, final: bool = False) -> None:
        model, position = self._model, self._position()
        if self._store is None or self._saver is None or position == self._saved or not self._procedure.trains:
            return
        state = {
            "run": self._lineage,
            "exhausted": sorted(scope.wire for scope in self._exhausted()),
            "stage": model.stage_mgr.state(),
            "fits": [*model.fits, self._procedure.describe()],
            "shared_seed": model.shared_seed,
        }
        started = time.monotonic()
        self._store.save(model.session.raw_session(), self._saver, position, state)
        self._saved, self._exhausted_then, self._saved_at = position, self._exhausted(), time.monotonic()
        if position.trained:
            self._iterators.tell_size(self._store.prefix(position))
        known = position, self._lineage
        if self._communicator is not None:
            if known in self._peer_saved:
                self._store.pinned = known
            self._communicator.exchange.tell_saved({"position": position.to_json(), "run": self._lineage})
            self._communicator.exchange.prospects = self._prospects()
        _log.debug("%s: checkpoint of %s in %.0f ms", self._role, position, 1000 * (time.monotonic() - started))

    def _on_peer_saved(self, body: dict[str, Any]) -> None:
        assert self._store is not None or self._communicator is not None
        try:
            known = Position.parse(body.get("position")), str(body.get("run"))[:64]
        except ValueError:
            return  # it only says what this party need not keep
        self._peer_saved = {known, *sorted(self._peer_saved)[-20:]}
        if self._store is not None and self._saved is not None and known == (self._saved, self._lineage):
            self._store.pinned = known
