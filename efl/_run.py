"""One ``fit``: connect, restore, run the procedure, save, say goodbye."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tensorflow.compat.v1 as tf

from efl import _readers
from efl._agreement import Facts, checkpoint_to_restore, shared_seed
from efl._checkpoint import CheckpointStore, mismatches
from efl._session import HookedSession
from efl._task_scope import MODE, TaskScope
from efl.communicator import Communicator
from efl.errors import CheckpointError
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
        self._saved: tuple[int, set[TaskScope]] = (-1, set())
        self._identity = ""
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

    def execute(self) -> None:
        """Runs everything; on an error tells the peer, and raises it."""
        try:
            restore = self._agree()
            self._open(restore)
            done_before = self._model.stage_mgr.index
            self._procedure(self._model)
            if restore is not None and self._model.stage_mgr.index == done_before:
                _log.info(
                    "%s: nothing to do: this run was complete at step %d; another checkpoint_dir begins anew",
                    self._role,
                    self._model.steps_trained,
                )
            self._save()
            self._model.session.end(self._hooks())
            if self._communicator is not None:
                self._communicator.shutdown()
                for scope, program in self._model._programs.items():
                    # Said after this party's last step: the next fit begins the data anew on both sides.
                    program.exhausted |= self._model._pace.ended_by_peer(self._model._pace.scope(scope.wire))
        except BaseException as error:
            for program in self._model._programs.values():
                program.exhausted = True  # nobody knows how far the peer's readers are: the next fit begins anew
            if self._communicator is not None:
                self._communicator.abort(error)
            raise
        finally:
            self.reporter.close()

    # ---- start -------------------------------------------------------------------------------------------------

    def _agree(self) -> int | None:
        """Connects, and returns the step of the checkpoint to restore, or None."""
        model = self._model
        mine = Facts(
            checkpoints=tuple((step, self._store.state(step)["run"]) for step in self._store.steps())
            if self._store
            else (),
            save_steps=self._save_steps if self._store else None,
            steps_trained=model.steps_trained,
            run=secrets.token_hex(8),
            seed=None if self._role == "follower" else shared_seed(self._own_seed()),
        )
        peer = mine
        if self._communicator is not None:
            terms = {
                "procedure": self._procedure.describe(),
                "project_name": self._project_name,
                "tasks": sorted(scope.wire for scope in model._programs),
            }
            told = self._communicator.connect(terms, mine.to_json())
            peer = Facts.parse(told, self._communicator.peer_role)
        leader = peer if self._role == "follower" else mine
        model.shared_seed, self._identity = leader.seed or 0, leader.run
        peer_role = "" if self._communicator is None else self._communicator.peer_role
        restore = checkpoint_to_restore(mine, peer, self._role, peer_role)
        if restore is None and not self._procedure.trains and self._store is not None and not self._is_warm:
            raise CheckpointError(
                f"{self._procedure.describe()} evaluates a checkpoint, and {self._store.folder} holds none; train "
                "first, or leave checkpoint_dir out to evaluate initial weights"
            )
        return restore

    def _own_seed(self) -> int:
        given = self._model.settings.seed
        return secrets.randbits(63) if given is None else given

    @property
    def _save_steps(self) -> int:
        return self._settings.save_checkpoint_steps or _DEFAULT_SAVE_STEPS

    @property
    def _is_warm(self) -> bool:
        return self._model._session is not None

    def _hooks(self) -> list[tf.train.SessionRunHook]:
        return list(dict.fromkeys(hook for program in self._model._programs.values() for hook in program.hooks))

    def _open(self, restore: int | None) -> None:
        fresh = not self._is_warm
        try:
            self._start_session(restore)
        except BaseException:
            if fresh and self._model._session is not None:
                self._model._session.close()
                self._model._session = None  # half made: a later fit makes a new one
            raise

    def _start_session(self, restore: int | None) -> None:
        model = self._model
        fresh = not self._is_warm
        graph = tf.get_default_graph()
        if fresh:
            for hook in self._hooks():
                hook.begin()
        if self._store is not None:
            self._saver = tf.train.Saver(self._held(), max_to_keep=0, save_relative_paths=True)
        if fresh:
            model._session = HookedSession(graph, model._session_config)
            raw = model.session.raw_session()
            raw.run([tf.global_variables_initializer(), tf.local_variables_initializer(), tf.tables_initializer()])
            model._apply_initial_weights(raw)
        raw = model.session.raw_session()
        model.stage_mgr.reset()
        if restore is not None:
            self._restore(raw, restore)
        for scope in model._programs:
            # Messages are counted from the same number on both sides, whatever ended an earlier run.
            base = model.steps_trained if scope.mode is MODE.TRAIN else 0
            model._pace.rebase(model._pace.scope(scope.wire), base)
        if self._communicator is not None:
            self._communicator.bind(raw)
        model.session.start(self._hooks())
        if fresh or restore is not None:
            _readers.initialize(raw, again=not fresh)
        else:
            for program in model._programs.values():
                if program.exhausted and program.scope.mode is MODE.TRAIN:
                    _readers.restart(raw, program)
        if self._save_graph and self._store is not None:
            tf.io.write_graph(graph, str(self._store.folder), "graph.pbtxt")
        _log.info("%s: %s of %s%s", self._role, self._procedure.describe(), self._project_name, self._from(restore))

    @staticmethod
    def _from(restore: int | None) -> str:
        return "" if restore is None else f", from the checkpoint of step {restore}"

    def _read(self, tensors: dict[str, tf.Tensor]) -> dict[str, Any]:
        return self._model.session.raw_session().run(tensors) if tensors else {}

    # ---- checkpoints -----------------------------------------------------------------------------------------------

    @staticmethod
    def _held() -> list[tf.Variable]:
        return list(dict.fromkeys([*tf.global_variables(), *tf.local_variables()]))

    def _restore(self, raw: tf.Session, step: int) -> None:
        assert self._store is not None and self._saver is not None
        model = self._model
        prefix = self._store.prefix(step)
        differences = mismatches(prefix, tf.global_variables())
        # Local variables (metrics, readers' positions) that an earlier program did not have begin afresh.
        absent = set(mismatches(prefix, tf.local_variables()))
        if differences:
            raise CheckpointError(
                f"the checkpoint of step {step} in {self._store.folder} is of another model: "
                + "; ".join(f"{variable.op.name} {text}" for variable, text in differences.items())
            )
        saver = self._saver
        if absent:
            saver = tf.train.Saver([v for v in self._held() if v not in absent])
        saver.restore(raw, prefix)
        state = self._store.state(step)
        model.steps_trained = int(state["steps_trained"])
        self._identity = state["run"]
        for program in model._programs.values():
            program.exhausted = program.scope.wire in state["exhausted"]
        self._saved = model.steps_trained, self._exhausted()
        if state["procedure"] == self._procedure.describe():
            model.stage_mgr.restore(state["stage"])
            model.shared_seed = int(state["shared_seed"])
        else:
            # Another procedure: training data goes on with the next row unless it had ended, evaluation begins anew.
            _readers.forget(raw, {TaskScope(MODE.TRAIN, t) for t in model.tasks(MODE.TRAIN)} - self._exhausted())

    def _exhausted(self) -> set[TaskScope]:
        return {scope for scope, program in self._model._programs.items() if program.exhausted}

    def maybe_save(self) -> None:
        """Called after each training step."""
        if self._store is not None and self._model.steps_trained % self._save_steps == 0:
            self._save()

    def stage_done(self) -> None:
        """Called between stages."""
        self._save()

    def _save(self) -> None:
        model = self._model
        if (
            self._store is None
            or self._saver is None
            or self._saved == (model.steps_trained, self._exhausted())
            or not self._procedure.trains
        ):
            return
        state = {
            "steps_trained": model.steps_trained,
            "run": self._identity,
            "exhausted": sorted(scope.wire for scope in self._exhausted()),
            "stage": model.stage_mgr.state(),
            "procedure": self._procedure.describe(),
            "shared_seed": model.shared_seed,
        }
        self._store.save(model.session.raw_session(), self._saver, model.steps_trained, state)
        self._saved = model.steps_trained, self._exhausted()
        _log.debug("%s: checkpoint of step %d (pid %d)", self._role, model.steps_trained, os.getpid())
