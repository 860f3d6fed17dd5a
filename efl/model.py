"""A model that trains alone: functions in, compile, fit.

    CNN = efl.Model()
    CNN.input_fn(input_fn).loss_fn(loss_fn).eval_fn(eval_fn)
    CNN.optimizer_fn(efl.optimizer_fn.optimizer_setter(tf.train.GradientDescentOptimizer(0.01)))
    CNN.compile()
    CNN.fit(efl.procedure_fn.train_and_evaluate(train_step=100, eval_step=10, max_iter=5))

``FederalModel`` is the same with a peer. The graph is built in TensorFlow's default graph.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow
import tensorflow.compat.v1 as tf

from efl import _compile, _readers
from efl._definition import Definition
from efl._frames import without_own
from efl._gradients import OptConfig
from efl._interrupt import told
from efl._program import Program, ancestors
from efl._run import Run
from efl._session import HookedSession
from efl._steps import Solo
from efl._task_scope import MODE, TaskScope
from efl._undivided import Undivided
from efl.errors import ConfigError, EflError, ModelError
from efl.hooks import Reporter
from efl.settings import Settings
from efl.stage import Stage, StageManager

if TYPE_CHECKING:
    from efl._agreement import PromisedNoise
    from efl._gradients import Sent
    from efl.privacy._holder import NoiseHolder
    from efl.privacy.accounting import AdversaryTable
    from efl.procedure_fn import Procedure

_log = logging.getLogger("efl")


class Model(Definition):
    """Input, loss, evaluation and optimizer of one or several tasks, compiled into one graph and run.

    Args:
      seed: Makes a whole run reproducible (initial weights, shuffling, dropout …); None: ``--seed`` or ``EFL_SEED``.
      settings: Everything else that the command line and the environment may set.

    Attributes:
      history: One dict per log line of the last ``fit``: role, mode, task, step (training steps so far), loss, the
        metrics, steps_per_second; with a peer wait_ms (milliseconds a step waited for it); of evaluations also batches.
        Empty after a fit that an earlier process had finished and this one passed by.

    Raises:
      ConfigError: A setting that efl cannot work with.
    """

    def __init__(self, seed: int | None = None, settings: Settings | None = None) -> None:
        if tf.executing_eagerly():
            raise ModelError(
                "TensorFlow is in eager mode and efl builds graphs: import efl before the first tensor is made (and "
                "leave EFL_KEEP_EAGER unset), or call tf.compat.v1.disable_eager_execution() at the top of the script"
            )
        given: dict[str, Any] = {} if seed is None else {"seed": seed}
        self.settings = settings if settings is not None else Settings.load(**given)
        if self.settings.worker_num > 1:
            raise ConfigError(
                f"worker_num={self.settings.worker_num} (argument, --worker_num, EFL_WORKER_NUM or TF_CONFIG): several "
                "workers per party do not exist yet; leave it at 1"
            )
        if self.settings.seed is not None:
            # Also Python's and numpy's: Keras draws the seeds of its initializers there.
            tensorflow.keras.utils.set_random_seed(self.settings.seed)
            tf.set_random_seed(self.settings.seed)
        self.history: list[dict[str, Any]] = []
        self.steps_trained = 0
        self.unnoised: set[str] = set()
        self.fits: list[str] = []
        self.in_step = False
        self.begun_hooks: list[tf.train.SessionRunHook] = []
        self.shared_seed = 0
        super().__init__()
        self._opt_config = OptConfig()
        self._undivided = Undivided()
        self._released_by_peer: dict[str, float] = {}  # what it said to send noised, and how much
        self._noise_holder: NoiseHolder | None = None
        self._session_config: tf.ConfigProto | None = None
        self._session: HookedSession | None = None
        self._run: Run | None = None
        self._initial_weights: dict[str, np.ndarray] = {}
        self._all_metrics: tuple[tuple[tf.Variable, ...], tf.Operation] | None = None
        self._solo = Solo()
        self._pace: Any = self._solo
        self._stage_manager = StageManager()
        self._training_flag = tf.placeholder_with_default(False, [], name="efl_training_flag")
        self._global_step = tf.train.get_or_create_global_step()

    # ---- compiling and running -----------------------------------------------------------------------------------

    def compile(
        self,
        session_config: tf.ConfigProto | None = None,
        sync_optimizer_config: Mapping[str, Any] | None = None,
        opt_config: Mapping[str, Any] | None = None,
    ) -> Model:
        """Builds the graph of all tasks.

        Args:
          session_config: Options of the session.
          sync_optimizer_config: Only None so far: there is one worker.
          opt_config: ``REDUCE``: how a loss vector becomes a scalar, ``'mean'`` (default), ``'sum'`` or a callable. The
            rest is for private optimizers: ``BACKEND_MODE``, whether gradients that go back to the peer are noised
            (``'noise'``, default, or ``'unnoise'``); ``BATCH_SIZE`` and ``NUM_EXAMPLES``, the nominal rows of a batch
            and those of the training data, where no reader of efl says; ``DEFER_NOISE=False`` noises all rows of every
            embedding table in each step.

        Returns:
          The model itself.

        Raises:
          ConfigError: An option that is not known.
          ModelError: The definition cannot be trained; says what is missing or wrong.
        """
        if self._compiled:
            raise ModelError("the model is compiled already")
        try:
            self._check_and_compile(session_config, sync_optimizer_config, opt_config)
        except KeyboardInterrupt as error:
            _log.warning("%s: interrupted in compile()", self._who)
            raise told(error) from None
        except EflError as error:
            self._could_not_begin(error)
            raise error.with_traceback(None) from None  # the message says it; efl's own frames would bury it
        except Exception as error:
            self._could_not_begin(error)
            raise error.with_traceback(without_own(error.__traceback__))  # noqa: B904  (the same error)
        self._compiled = True
        return self

    def _check_and_compile(
        self,
        session_config: tf.ConfigProto | None,
        sync_optimizer_config: Mapping[str, Any] | None,
        opt_config: Mapping[str, Any] | None,
    ) -> None:
        if session_config is not None and not isinstance(session_config, tf.ConfigProto):
            raise ConfigError(
                f"session_config is a {type(session_config).__name__}: expected a tf.compat.v1.ConfigProto"
            )
        if sync_optimizer_config is not None:
            raise ConfigError("sync_optimizer_config: several workers per party do not exist yet; leave it at None")
        self._opt_config = OptConfig.parse(opt_config)
        self._session_config = session_config
        _compile.compile_model(self)

    def fit(
        self,
        procedure_fn: Procedure | Callable[[Model], None],
        log_step: int = 100,
        project_name: str = "default_prj",
        checkpoint_dir: str | None = None,
        *,
        log_dir: str | None = None,
        save_checkpoint_steps: int | None = None,
        save_checkpoint_secs: float | None = None,
        keep_checkpoints: int | None = None,
        save_graph: bool = False,
    ) -> None:
        """Runs a procedure.

        A second ``fit`` in the same process goes on with the weights and readers that the first one left.

        Args:
          procedure_fn: Made by ``efl.procedure_fn``, or a function of the model that calls ``run_stage``.
          log_step: Steps between two log lines.
          project_name: Names the run in logs; equal on both parties.
          checkpoint_dir: Where checkpoints lie (a folder per role below it). The newest is restored; a run of the same
            procedure goes on in the stage and step it was in, another procedure begins with its weights.
          log_dir: Where TensorBoard summaries go; default: below ``checkpoint_dir``, none without one.
          save_checkpoint_steps: Training steps between two checkpoints; one more is saved at each stage's end. Default:
            1000, or none where ``save_checkpoint_secs`` is given.
          save_checkpoint_secs: Seconds between two checkpoints, by the leader's clock.
          keep_checkpoints: How many of the newest are kept, default 5.
          save_graph: Also writes the graph (``graph.pbtxt``) beside the checkpoints.

        Raises:
          ModelError: Not compiled, or the procedure asks for what the model does not have.
          ConfigError: An argument that cannot be.
          CheckpointError: A checkpoint that is missing, damaged, or of another model.
          EflError: Whatever ends the run early: bad data, a loss that is not finite, and in a federation a peer that
            disagrees, fails or is lost.
        """
        options = {
            "checkpoint_dir": checkpoint_dir,
            "log_dir": log_dir,
            "save_checkpoint_steps": save_checkpoint_steps,
            "save_checkpoint_secs": save_checkpoint_secs,
            "keep_checkpoints": keep_checkpoints,
        }
        self._run = self._checked_run(procedure_fn, log_step, project_name, options, save_graph)
        try:
            self._run.execute()
        except KeyboardInterrupt as error:
            raise told(error) from None
        except EflError as error:
            raise error.with_traceback(None) from None
        except Exception as error:
            raise error.with_traceback(without_own(error.__traceback__))  # noqa: B904  (the same error)

    def _checked_run(
        self,
        procedure_fn: Procedure | Callable[[Model], None],
        log_step: int,
        project_name: str,
        options: Mapping[str, Any],
        save_graph: bool,
    ) -> Run:
        try:
            if not self._compiled:
                raise ModelError("compile() comes before fit()")
            if not callable(procedure_fn):
                raise ModelError(
                    f"fit: {procedure_fn!r:.100} is not a procedure; use e.g. efl.procedure_fn.train(max_step=100)"
                )
            if isinstance(log_step, bool) or not isinstance(log_step, int) or log_step < 1:
                raise ConfigError(f"log_step={log_step!r}: expected a positive number of steps")
            return Run(self, procedure_fn, log_step, project_name, options, save_graph)
        except Exception as error:
            self._could_not_begin(error)
            raise

    def run_stage(self, name: str, stage_or_func: Stage | Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs a stage (or a function) of a procedure, or skips it where a restored checkpoint has it done.

        Args:
          name: Names the stage; equal on both parties and in a restarted run.
          stage_or_func: What to run.
          *args: For its ``run``.
          **kwargs: For its ``run``.

        Returns:
          What it returned; None for a skipped stage.
        """
        return self._stage_manager.stage(self, name, stage_or_func, *args, **kwargs)

    @property
    def _noise(self) -> NoiseHolder:
        """Adds noise for private optimizers."""
        if self._noise_holder is None:
            from efl.privacy._holder import NoiseHolder  # only who trains privately needs it

            self._noise_holder = NoiseHolder()
        return self._noise_holder

    # ---- looking at it -------------------------------------------------------------------------------------------

    def input(self, mode: MODE = MODE.TRAIN, task: str | None = None) -> Any:
        """The sample of a mode of a task."""
        return self._compiled_program(mode, task).sample

    def loss(self, task: str | None = None) -> tf.Tensor | None:
        """The scalar loss of a task; None where only the peer's gradients drive it."""
        return self._compiled_program(MODE.TRAIN, task).loss

    def train_op(self, task: str | None = None) -> tf.Operation:
        """The op of a training step of a task."""
        return self._compiled_program(MODE.TRAIN, task).op

    def eval_op(self, task: str | None = None) -> tf.Operation:
        """The op of an evaluation step of a task."""
        return self._compiled_program(MODE.EVAL, task).op

    def metrics(self, mode: MODE = MODE.TRAIN, task: str | None = None) -> dict[str, Any]:
        """The metrics of a mode of a task, by name: the tensor or the (value, update_op) pair that was added."""
        program = self._programs.get(TaskScope(mode, task))
        return {} if program is None else {m.name: m.given for m in program.metrics.values()}

    def opt_to_vars(self, task: str | None = None) -> dict[Any, tuple[list[tf.Variable], str | None]]:
        """Optimizer -> (the variables it trains, their scope) of a task."""
        return dict(self._compiled_program(MODE.TRAIN, task).optimizers)

    def tasks(self, mode: MODE) -> list[str | None]:
        """The tasks that can be trained or evaluated, in the order of their definition."""
        return list(self._loss_fns if mode is MODE.TRAIN else self._eval_fns)

    def privacy_spent(self, delta: float, accountant: str = "pld", further_steps: int = 0) -> AdversaryTable:
        """What the model's training has given away so far, to whom, across restarts (from the ledger of releases).

        Args:
          delta: δ of (ε, δ)-differential privacy, smaller than one over the number of examples.
          accountant: For figures with Poisson sampling: ``"pld"`` or ``"rdp"``.
          further_steps: What it would be after so many more steps like the last.

        Returns:
          A table with a row for each adversary; ``print`` shows it.

        Raises:
          ModelError: Nothing was released with noise, or how often a row takes part is not known (``NUM_EXAMPLES``,
            ``BATCH_SIZE`` of ``opt_config``).
          ConfigError: δ or ``further_steps`` cannot be, or dp-accounting is not installed (the extra ``privacy``).
        """
        from efl.privacy import _spent  # only who trains privately needs it
        from efl.privacy.accounting import _checks

        _checks.whole("privacy_spent", "further_steps", further_steps, 0)
        return _spent.privacy_spent(self, delta, accountant, further_steps)

    def get_weights(self) -> dict[str, np.ndarray]:
        """The trainable variables' values, by name. During or after ``fit``.

        Raises:
          ModelError: There is no session yet.
        """
        raw = self.session.raw_session()
        self._settle_noise()
        variables = {v.op.name: v for v in raw.graph.get_collection(tf.GraphKeys.TRAINABLE_VARIABLES)}
        with raw.graph.as_default():
            return raw.run(variables) if variables else {}

    def set_weights(self, weights: Mapping[str, np.ndarray]) -> None:
        """Sets variables by name: at once where a session exists, else when ``fit`` has initialised them.

        Raises:
          ModelError: A name or a shape that the graph does not have.
        """
        known = {v.op.name: v for v in tf.global_variables()}
        for name, value in weights.items():
            if name not in known:
                raise ModelError(f"set_weights: no variable {name!r}; there are: {', '.join(sorted(known))}")
            if not known[name].shape.is_compatible_with(np.shape(value)):
                raise ModelError(f"set_weights: {name} has shape {known[name].shape}, got {np.shape(value)}")
        if self._session is None:
            self._initial_weights.update(weights)
        for name, value in weights.items() if self._session is not None else ():
            known[name].load(value, self.session.raw_session())

    @property
    def training_flag(self) -> tf.Tensor:
        """Scalar bool placeholder: True in training steps, False otherwise."""
        return self._training_flag

    @property
    def global_step(self) -> tf.Tensor:
        """Scalar int64: training steps so far, over all tasks."""
        return self._global_step

    @property
    def losses(self) -> dict[str | None, tf.Tensor | None]:
        """Task -> its scalar loss."""
        return {s.task: p.loss for s, p in self._programs.items() if p.has_loss}

    @property
    def inputs(self) -> dict[TaskScope, Any]:
        """Task scope -> its sample."""
        return {s: p.sample for s, p in self._programs.items() if p.sample is not None}

    @property
    def train_ops(self) -> dict[str | None, tf.Operation]:
        """Task -> the op of its training step."""
        return {s.task: p.op for s, p in self._programs.items() if s.mode is MODE.TRAIN and p.op is not None}

    @property
    def metric_variables_initializer(self) -> tf.Operation:
        """An op that starts all metrics afresh; made once, so that a graph that ``fit`` has finalised need not grow."""
        held = tuple(tf.get_collection(tf.GraphKeys.METRIC_VARIABLES))
        if self._all_metrics is None or self._all_metrics[0] != held:
            self._all_metrics = held, tf.variables_initializer(held)
        return self._all_metrics[1]

    @property
    def stage_mgr(self) -> StageManager:
        """Which stage and step the run is in."""
        return self._stage_manager

    @property
    def session(self) -> HookedSession:
        """The session of the running or last ``fit``.

        Raises:
          ModelError: ``fit`` has not run.
        """
        if self._session is None:
            raise ModelError("there is no session: call fit() first")
        return self._session

    # ---- for efl's own modules -----------------------------------------------------------------------------------

    @property
    def _who(self) -> str:
        return "the model"

    @property
    def _reporter(self) -> Reporter:
        assert self._run is not None
        return self._run.reporter

    @property
    def _is_timekeeper(self) -> bool:
        return True

    def _close_session(self) -> None:
        if self._session is not None:
            self._session.close()
            self._session = None

    def _apply_initial_weights(self, session: tf.Session) -> None:
        known = {v.op.name: v for v in tf.global_variables()}
        for name, value in self._initial_weights.items():
            known[name].load(value, session)

    def _pace_of(self, program: Program) -> Any:
        return self._pace if self._has(program) else self._solo

    def _has(self, program: Program) -> bool:
        """Whether it is a task's own, rather than made for a loop over other fetches."""
        return self._programs.get(program.scope) is program

    def _is_common(self, program: Program) -> bool:
        """Whether whoever takes part in the run takes the program's steps."""
        return True

    def _compiled_program(self, mode: MODE, task: str | None) -> Program:
        if not self._compiled:
            raise ModelError("compile() comes first")
        program = self._programs.get(TaskScope(mode, task))
        if program is None or program.op is None:
            what, have = ("loss_fn", self._loss_fns) if mode is MODE.TRAIN else ("eval_fn", self._eval_fns)
            known = ", ".join(map(repr, have)) or "none"
            raise ModelError(f"task {task!r} has no {what}, so nothing to {mode.value}; tasks that have one: {known}")
        return program

    def _program_of(self, run_ops: Any, mode: MODE) -> Program:
        ops = {fetch if isinstance(fetch, tf.Operation) else fetch.op for fetch in tf.nest.flatten(run_ops)}
        behind = set(ancestors(*ops))
        for program in self._programs.values():
            if program.op is not None and behind & set(program.known_ops):
                return program
        self._check_own(behind)
        return Program(TaskScope(mode, None), op=tf.group(*ops))

    def _feeds(self, program: Program, feed_dict: Mapping[Any, Any]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        feeds = dict(feed_dict)
        if program.scope.mode is MODE.TRAIN and self._training_flag.consumers():
            feeds.setdefault(self._training_flag, True)
        return tuple(feeds), tuple(np.asarray(v, f.dtype.as_numpy_dtype) for f, v in feeds.items())

    # What a federation adds to compiling; a model alone exchanges nothing.

    def _could_not_begin(self, error: Exception) -> None:
        pass

    def _fit_ended(self, well: bool) -> None:
        pass

    def _compare_rows(self, program: Program, error: Exception) -> None:
        """Raises ``DataError`` where a step failed, and what was received in it is not of as many rows as its batch."""

    def _batch_is_read(self, scope: TaskScope, sample: Any) -> None:
        pass

    def _sent(self, scope: TaskScope) -> list[Sent]:
        return []

    def _received(self, scope: TaskScope) -> list[tuple[str, tf.Tensor]]:
        return []

    def _return_gradients(self, scope: TaskScope, gradients: Sequence[tf.Tensor], undivided: bool) -> None:
        pass

    def _layers(self, scope: TaskScope) -> list[str]:
        return []

    def _layer_updates(self, scope: TaskScope) -> list[tf.Operation]:
        return []

    def _is_driven_by_peer(self, scope: TaskScope, loss: Any) -> bool:
        return False

    def _check_own(self, ops: set[tf.Operation]) -> None:
        pass

    def _shown(self, scope: TaskScope) -> list[tf.Tensor]:
        return []

    def _sent_raw(self) -> list[str]:
        return []

    def _received_raw(self, gradients_are_noised: bool, released: Mapping[str, float]) -> list[str]:
        return []

    def _gradients_received(self) -> list[str]:
        return []

    def _promised_noise(self) -> dict[str, PromisedNoise]:
        return {}

    def _promised_releases(self) -> dict[str, float]:
        return {}

    def _note_peers_noise(self, told: Mapping[str, PromisedNoise], released: Mapping[str, float]) -> None:
        pass

    def _exchange_ops(self, scope: TaskScope, sample: Any) -> list[Any]:
        return []

    def _check_exchanges(self) -> None:
        pass

    # What the step loop and the stage manager tell.

    def _step_done(self, program: Program) -> None:
        if program.scope.mode is not MODE.TRAIN or not self._is_common(program):
            return
        assert self._run is not None
        self.steps_trained += self._has(program)
        self._run.keeping.maybe_save(self.steps_trained if self._has(program) else self._stage_manager.steps)

    def _check_signals(self) -> None:
        if self._run is not None:
            self._run.leaving.signals.check()

    def _stepping(self, begins: bool) -> None:
        if self._run is not None:
            self._run.leaving.signals.stepping = begins

    def _marks_due(self) -> list[str]:
        return [] if self._run is None else self._run.leaving.marks_due()

    def _at_marks(self, reached: set[str]) -> None:
        assert self._run is not None
        self._run.leaving.at_marks(reached)

    def _stage_done(self) -> None:
        if self._run is not None:
            self._run.keeping.stage_done()

    def _reset_metrics(self, program: Program) -> None:
        if program.metric_variables:
            self.session.raw_session().run(program.metrics_initializer)

    def _settle_noise(self, training: bool = False) -> None:
        """Gives tables the noise that they are owed, before anybody looks; or makes them ready for training."""
        for deferred in () if self._noise_holder is None else self._noise_holder.deferred:
            if training:
                deferred.align(self.session.raw_session())
            else:
                deferred.flush(self.session.raw_session())

    def _open_readers(self, program: Program) -> None:
        _readers.open_one_shots(self.session.raw_session(), program)

    def _restart_readers(self, program: Program) -> None:
        _readers.restart(self.session.raw_session(), program)

    def _explain_reading(self, program: Program, error: Exception) -> None:
        _readers.raise_if_explained(program, error)

    def _raise_if_not_noised(self) -> None:
        if self._noise_holder is not None and self._noise_holder.error is not None:
            raise self._noise_holder.error

    def _own_end(self, program: Program, error: Exception) -> None:
        _readers.raise_unless_end(program, error, self._who)
