"""One ``fit``: connect, agree, restore, run the procedure, save, say goodbye; and again, where the peer died.

``docs/architecture/survival.md`` tells what happens when a party is lost.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tensorflow.compat.v1 as tf

from efl import _agreement as agreement
from efl import _readers
from efl import _undivided as undivided
from efl._agreement import Facts, Start
from efl._checkpoint import Known
from efl._keeping import Keeping
from efl._leaving import Leaving
from efl._position import Position
from efl._session import HookedSession
from efl._steps.marks import Parted
from efl._task_scope import MODE, TaskScope
from efl.communicator import Communicator
from efl.errors import CheckpointError, EflError, PeerFailed, PeerLost, PeerRestarted
from efl.hooks import Reporter
from efl.procedure_fn import Procedure

if TYPE_CHECKING:
    from efl.model import Model

_log = logging.getLogger("efl")


class _PassedBy(Exception):
    """A party came to a fit that is over, as both have seen: it passes it by, and meets the other in a later one.

    Attributes:
      end: Where this party's next fit begins; None where only the other passes by.
    """

    def __init__(self, end: Known | None) -> None:
        super().__init__()
        self.end = end


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
        self.keeping = Keeping(model, self._procedure, settings, self._role)
        self._store = self.keeping.store
        self._fit = self.keeping.fit
        self.leaving = Leaving(model, self.keeping, self._role)
        self._called_peer = False
        self._peer_wants: Mapping[str, bool] = {}
        self._began_cold = False
        self._began_at = 0
        folder = self.keeping.folder
        logs = None if folder is None else folder / "logs"
        if settings.log_dir:
            logs = Path(settings.log_dir) / self._role
        model.history = []
        self.reporter = Reporter(
            self._role,
            log_step,
            model.history,
            self._read,
            lambda: model.steps_trained,
            str(logs) if logs else None,
        )

    def execute(self) -> None:
        """Runs everything; on an error tells the peer, and raises it."""
        model = self._model
        try:
            if self._store is not None and self._procedure.trains:
                self._store.lock()
            with self.leaving.signals:
                if not self._was_done_before():
                    self._open_noise()
                    self._execute()
            model.fits.append(self._procedure.describe())
            model._fit_ended(well=True)
            self.leaving.signals.raise_late()
        except BaseException as error:
            for program in model._programs.values():
                program.exhausted = True  # nobody knows how far the peer's readers are: the next fit begins anew
            self.leaving.last_word(error)
            model._fit_ended(well=False)
            if self._communicator is not None and self._called_peer and self.leaving.is_silent(error):
                self._communicator.abandon()
            elif self._communicator is not None and self._called_peer:
                self._communicator.abort(self.leaving.reason(error), self.leaving.where(error))
            elif isinstance(error, Exception):
                model._could_not_begin(error)
            raise
        finally:
            self.reporter.close()
            if model._noise_holder is not None:
                model._noise_holder.close()
            if self._store is not None:
                self._store.unlock()

    def _execute(self) -> None:
        if self._communicator is not None and not self._model.in_step:
            self.keeping.check_model()
        lost: PeerLost | None = None
        while True:
            try:
                self._attempt(lost)
                self._model.in_step = True
                return
            except _PassedBy as passed:
                assert self._communicator is not None
                self._communicator.shutdown(firm=True)  # both know; whoever is lost meanwhile will come again
                if passed.end is not None:
                    self._pass_by(passed.end)
                    return
                continue
            except PeerRestarted as error:
                lost = error
            except Parted as parted:
                lost = self.leaving.part(parted.roles)
            self._give_up_attempt(lost)

    def _attempt(self, lost: PeerLost | None) -> None:
        """The whole of it, from the handshake to the goodbye.

        Raises:
          PeerRestarted: The peer's process is another one; both have to begin at a checkpoint.
        """
        start = self._agree(lost)
        self._open(start)
        self._procedure(self._model)
        self._model._settle_noise()
        if start.restore is not None and not self._model.stage_mgr.passed:
            self._say_nothing_to_do()
        self.keeping.save()
        if self._communicator is not None:
            failure = self._communicator.shutdown(timeout=self._settings.peer_timeout)
            for scope, program in self._model._programs.items():
                # Said after this party's last step: the next fit begins the data anew on both sides.
                program.exhausted |= self._model._pace.ended_by_peer(self._model._pace.scope(scope.wire))
            if isinstance(failure, (PeerLost, PeerFailed)):
                raise failure  # it may not have saved the last steps, and need this party to take them again
            if failure is not None:
                _log.warning("%s is done; whether its peer is, nobody knows: %s", self._role, failure)
        self._model.session.end(self._hooks())

    def _open_noise(self) -> None:
        """Opens the secret seed and the ledger of private optimizers."""
        holder, folder = self._model._noise_holder, self.keeping.folder
        if holder is None or not (self._procedure.trains or self._model._promised_releases()):
            return
        if folder is None:
            _log.warning(
                "%s: no checkpoint_dir, so the noise seed and the ledger of what is released end with this process",
                self._role,
            )
        elif self.keeping.iterators.saveables:
            _log.warning(
                "%s: checkpoints in %s hold rows of the data: those that wait in the buffers of your own tf.data "
                "iterators (shuffle, prefetch, batch). Give away weights (get_weights), and not this folder; "
                "efl.data.DataIO leaves no rows in it",
                self._role,
                folder,
            )
        if holder.open(None if folder is None else folder / "privacy"):
            _log.warning(
                "%s: the noise seed of %s is gone; a new one was made. Steps that are taken again get other noise, and "
                "count as further releases",
                self._role,
                folder,
            )
        newest = None if self._store is None else self._store.newest()
        if newest is not None and self._store is not None:  # the peer is told before it is restored
            self._model.unnoised |= set(self._store.state(newest).get("unnoised", ()))
            self.keeping.check_ledger(newest)
        for program in self._model._programs.values():
            for reader in _readers.own(program):
                if reader.samples:
                    purpose = f"sampling {program.scope.wire}/{reader.name}"
                    reader.use_secret(holder.releases.secret(purpose.encode()))

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
        assert self._communicator is not None
        untouched = self._began_cold and model.steps_trained == self._began_at and not model.stage_mgr.passed
        if not untouched and not self.keeping.recoverable:
            error = PeerLost(f"{lost}. {self.keeping.why_not_recoverable()}")
            self._communicator.abandon()
            self._communicator.tell_failure(error, begun=True)
            raise error from None
        self._communicator.abandon()
        model._close_session()
        model.in_step = False
        if self._store is not None:
            self._store.look_again()  # what this process wrote may have been damaged since
        for program in model._programs.values():
            program.exhausted = False

    # ---- start -------------------------------------------------------------------------------------------------

    def _was_done_before(self) -> bool:
        """Whether this is a fit without a peer that an earlier process finished, and went on to the next."""
        model, store = self._model, self._store
        if store is None or model.in_step or self._communicator is not None:
            return False
        newest = store.newest()
        if newest is None or newest.fit <= self._fit or not self._is_ours(newest, self._fit):
            return False
        self._pass_by((newest, store.state(newest)["run"]))
        return True

    def _is_ours(self, position: Position, fit: int) -> bool:
        """Whether a checkpoint was made by this program, as far as its fits up to a number go."""
        assert self._store is not None
        made_in = self._store.state(position)["fits"][:fit]
        return bool(made_in == [*self._model.fits, self._procedure.describe()][: len(made_in)])

    def _pass_by(self, end: Known) -> None:
        self._start_session(Start(end, cold=True), alone=True)
        _log.info("%s: fit %d was done before; going on with fit %d", self._role, self._fit, self._fit + 1)

    def _meet_in_one_fit(self, mine: Facts, peer: Facts) -> None:
        """Sees to it that both parties are in the same fit of their programs.

        Raises:
          _PassedBy: One of them, or both, pass a fit by that is over, and meet in the next.
        """
        who = agreement.behind(mine, peer, self._is_ours)
        if who:
            if "mine" not in who:
                _log.info("%s: the peer has begun its program again, and has done fit %d", self._role, peer.fit)
            raise _PassedBy(agreement.newest_common(mine, peer) if "mine" in who else None)

    def _facts(self) -> Facts:
        model = self._model
        return Facts(
            checkpoints=tuple(self._store.known()) if self._store else (),
            save_steps=self.keeping.steps if self._store else None,
            steps_trained=model.steps_trained if model.in_step else 0,
            warm=model.in_step,
            inputs=self.keeping.iterators.kept,
            run=secrets.token_hex(8),
            seed=None if self._role == "follower" else agreement.shared_seed(self._own_seed()),
            fit=self._fit,
            procedures=(*model.fits, self._procedure.describe())[-agreement.REMEMBERED :],
            wanted=model._undivided.wanted,
            given=model._undivided.given,
            noise=model._promised_noise(),
            released=model._promised_releases(),
        )

    def _agree(self, lost: PeerLost | None) -> Start:
        """Connects, and says where both begin."""
        model, communicator = self._model, self._communicator
        mine = self._facts()
        peer = mine
        if communicator is not None:
            terms = {
                "project_name": self._project_name,
                "tasks": sorted(scope.wire for scope in model._programs),
            }
            communicator.exchange.prospects = self.keeping.prospects()
            communicator.exchange.on_saved = self.keeping.on_peer_saved
            communicator.exchange.on_part_asked = self.leaving.on_part_asked
            self._called_peer = True
            try:
                told = communicator.connect(
                    terms,
                    mine.to_json(),
                    timeout=None if lost is None else self._settings.peer_timeout,
                    judge=self._judge,
                    stubborn=lost is not None,
                )
            except PeerLost as error:
                raise self._or_done(error, mine) from None
            peer = Facts.parse(told, communicator.peer_role)
            self._peer_wants = peer.wanted
            self._meet_in_one_fit(mine, peer)
            model._note_peers_noise(peer.noise, peer.released)
        self.keeping.peer_saves = peer.save_steps is not None
        leader = peer if self._role == "follower" else mine
        model.shared_seed, self.keeping.lineage = leader.seed or 0, leader.run
        peer_role = "" if communicator is None else communicator.peer_role
        start = agreement.where_to_start(mine, peer, self._role, peer_role)
        self.keeping.unequal = agreement.unequal_inputs(mine, peer, self._role, peer_role)
        if self.keeping.unequal is not None and self._procedure.trains and self.keeping.saves_with_peer:
            _log.warning("%s: %s", self._role, self.keeping.why_not_recoverable())
        if self._store is not None:
            # Also where both go on with what they have: whoever dies before the next needs it.
            self._store.pinned, self.keeping.peer_saved = agreement.newest_common(mine, peer), set(peer.checkpoints)
        if communicator is not None:
            communicator.exchange.prospects = self.keeping.prospects()
        if start.restore is None and not self._procedure.trains and self._store is not None and not mine.warm:
            raise CheckpointError(
                f"{self._procedure.describe()} evaluates a checkpoint, and {self._store.folder} holds none; train "
                "first, or leave checkpoint_dir out to evaluate initial weights"
            )
        return start

    def _or_done(self, error: PeerLost, mine: Facts) -> PeerLost:
        """The error that there is no peer; perhaps because it is done, and this party died after its last step."""
        if not mine.checkpoints or mine.warm:
            return error
        end = "" if str(error).endswith(("?", ".")) else "."
        return PeerLost(
            f"{error}{end} {self._role} holds a checkpoint of {mine.checkpoints[-1][0]}: if its peer has ended there "
            "properly, start the peer's program again too, with its checkpoint_dir: both then say that nothing is to do"
        )

    def _judge(self, facts: Mapping[str, Any], replaces: bool) -> list[str]:
        """Why somebody with these facts cannot be the peer, or take the place of one that was lost.

        Where nobody could do that, whoever comes shows that the peer is gone for good, and the run ends.
        """
        assert self._communicator is not None
        peer_role = self._communicator.peer_role
        try:
            mine, peer = self._facts(), Facts.parse(facts, peer_role)
            reasons = agreement.different_programs(mine, peer, self._role, peer_role)
            reasons += undivided.impossible(mine, peer, self._role, peer_role)
            if reasons or not replaces or not self.keeping.recoverable:
                return reasons
            mine = replace(mine, warm=False)
            if not agreement.behind(mine, peer, self._is_ours):
                agreement.where_to_start(mine, peer, self._role, peer_role)
        except EflError as error:
            return [str(error)]
        return []

    def _own_seed(self) -> int:
        given = self._model.settings.seed
        return secrets.randbits(63) if given is None else given

    def _hooks(self) -> list[tf.train.SessionRunHook]:
        return list(dict.fromkeys(hook for program in self._model._programs.values() for hook in program.hooks))

    def _open(self, start: Start) -> None:
        if start.cold and self._model._session is not None:
            self._model._close_session()
        cold = self._model._session is None
        try:
            self._start_session(start)
        except BaseException:  # undone, and raised again
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
        self.keeping.make_saver()
        if fresh:
            model._session = HookedSession(graph, model._session_config, model._settle_noise)
            raw = model.session.raw_session()
            raw.run([tf.global_variables_initializer(), tf.local_variables_initializer(), *_readers.tables()])
            model._apply_initial_weights(raw)
            model.steps_trained = 0
            self.keeping.forget()
        raw = model.session.raw_session()
        model.stage_mgr.reset()
        if start.restore is not None:
            self.keeping.restore(raw, start.restore[0])
        self._began_cold, self._began_at = fresh, model.steps_trained
        for scope in model._programs:
            # Messages are counted from the same number on both sides, whatever ended an earlier run.
            base = model.steps_trained if scope.mode is MODE.TRAIN else 0
            model._pace.rebase(model._pace.scope(scope.wire), base)
        if alone:
            return
        if self._communicator is not None:
            self._communicator.bind(raw)
            model._undivided.apply(raw, self._peer_wants)
        model.session.start(self._hooks())
        self._start_input(raw, start, fresh)
        if self._save_graph and self._store is not None:
            tf.io.write_graph(graph, str(self._store.folder), "graph.pbtxt")
        where = "" if start.restore is None else f", from the checkpoint of {start.restore[0]}"
        _log.info("%s: %s of %s%s", self._role, self._procedure.describe(), self._project_name, where)
        if start.restore is None:
            self.keeping.save()

    def _start_input(self, raw: tf.Session, start: Start, fresh: bool) -> None:
        model, kept = self._model, self.keeping.iterators.kept
        anew: set[TaskScope] = set()
        reordered: set[TaskScope] = set()
        if fresh:
            _readers.initialize(raw)
            anew = set(model._programs)
            if start.restore is not None and self._store is not None:
                # A script that only evaluates, or trains alone in another way, may read other data than what saved.
                strict = self._procedure.trains and (self.keeping.goes_on or self._communicator is not None)
                prefix, resumed = self._store.prefix(start.restore[0]), self.keeping.resumed
                lost = self.keeping.iterators.restore(raw, prefix, resumed, strict)
                goes_on = {scope for scope in resumed - lost if kept.get(str(scope))}
                anew -= goes_on
                reordered = self.keeping.iterators.reordered(goes_on)
        else:
            for program in model._programs.values():
                if program.exhausted and program.scope.mode is MODE.TRAIN:
                    _readers.restart(raw, program)
                    anew.add(program.scope)
        if model._noise_holder is not None:
            model._noise_holder.note_shared(_readers.shared(model._programs.values()))
            held = model._noise_holder.conditions.values()
            for why in dict.fromkeys(each["comes_again"] for each in held if each.get("comes_again")):
                _log.warning("%s: %s; privacy_spent will give no figure", self._role, why)
            for scope in model._programs:
                if scope.mode is MODE.TRAIN:
                    model._noise_holder.input_begins(
                        scope.wire, scope in anew, model.steps_trained, reordered=scope in reordered
                    )

    def _read(self, tensors: dict[str, tf.Tensor]) -> dict[str, Any]:
        return self._model.session.raw_session().run(tensors) if tensors else {}
