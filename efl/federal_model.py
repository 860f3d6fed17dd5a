"""A model that trains with a peer: ``efl.Model`` plus ``send`` and ``recv``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow.compat.v1 as tf

from efl._agreement import PromisedNoise
from efl._checkpoint import reason_of
from efl._ends import End
from efl._gradients import Sent, is_private
from efl._graph import RECEIVED, as_graph_tensor, call_python, op_name
from efl._program import Program, feature_tensors
from efl._task_scope import MODE, TaskScope, current_task_scope
from efl._uncaught import tell_peer_of
from efl.communicator import Communicator
from efl.errors import ConfigError, DataError, ModelError
from efl.model import Model
from efl.settings import Settings
from efl.transport import Limits
from efl.transport.handshake import TOKEN


class FederalModel(Model):
    """One party's half of a model that two parties train together.

    Sends and receives are made in ``loss_fn`` and ``eval_fn``; both parties compile the same exchange. The leader
    listens, the follower dials; role and addresses come from arguments, the command line (``--federal_role``,
    ``--local_addr``, ``--peer_addr``) or the environment (``EFL_…``).

    What the peer learns: every tensor sent to it in every step, the gradients returned to it, names, dtypes and static
    shapes of the exchange, procedure and batch size, when steps happen. Columns and weights stay here.

    Args:
      federal_role: ``"leader"`` or ``"follower"``.
      peer_addr: ``host:port`` that a follower dials.
      local_addr: ``host:port`` that a leader listens on.
      seed: As for ``efl.Model``. A run is reproducible only if both parties are given one; the two may differ.
      settings: Everything at once instead.
      **options: Further fields of ``Settings``, such as ``connect_timeout``.

    Raises:
      ConfigError: No role, or a setting that efl cannot work with.
    """

    def __init__(
        self,
        federal_role: str | None = None,
        peer_addr: str | None = None,
        local_addr: str | None = None,
        seed: int | None = None,
        settings: Settings | None = None,
        **options: Any,
    ) -> None:
        given = {
            "federal_role": federal_role,
            "peer_addr": peer_addr,
            "local_addr": local_addr,
            "seed": seed,
            **options,
        }
        if settings is None:
            settings = Settings.load(**{name: value for name, value in given.items() if value is not None})
        if not settings.federal_role:
            raise ConfigError(
                "a FederalModel needs a role: start the script with --federal_role=leader or --federal_role=follower, "
                "set EFL_FEDERAL_ROLE, or pass federal_role="
            )
        super().__init__(settings=settings)
        size = {} if settings.max_message_bytes is None else {"max_message_bytes": settings.max_message_bytes}
        self._communicator = Communicator(
            settings.federal_role,
            settings.peer_addr,
            settings.local_addr,
            settings.client_thread_num,
            settings.server_thread_num,
            settings.scanning_interval_milliseconds,
            settings.default_timeout_milliseconds,
            connect_timeout=settings.connect_timeout,
            limits=Limits(peer_timeout=settings.peer_timeout, **size),
            insecure=settings.insecure,
            share_error_text=settings.share_error_text,
            my_certs=settings.my_certs,
            my_key=settings.my_key,
            peer_certs=settings.peer_certs,
            peer_name=settings.peer_name,
        )
        self._pace = self._communicator.exchange
        self._peer_knows = False  # of an error that ended a compile() or a fit()
        self._send_ops: dict[TaskScope, list[tf.Operation]] = {}
        self._sent_tensors: dict[TaskScope, dict[str, tuple[tf.Tensor, bool]]] = {}
        self._grad_receives: dict[TaskScope, dict[str, tf.Tensor]] = {}
        self._receives: dict[TaskScope, dict[str, tuple[tf.Tensor, bool]]] = {}
        self._released: dict[TaskScope, dict[str, float]] = {}  # sent tensors that are noised, and how much
        self._with_batch: set[TaskScope] = set()
        self._rows_read: dict[TaskScope, tuple[int | None, int | None]] = {}  # the step that runs, and its batch's rows
        self._exchanged_scopes: set[TaskScope] = set()  # those whose exchange ops are made
        tell_peer_of(self)

    def send(
        self,
        name: str,
        tensor: tf.Tensor,
        require_grad: bool = False,
        mode: MODE | None = None,
        task: str | None = None,
    ) -> tf.Operation:
        """Sends a tensor to the peer in every step of a mode of a task, whether or not anything fetches the op.

        Args:
          name: The peer receives it under this name.
          tensor: What to send, dense, of any dtype. The peer sees its values.
          require_grad: The peer returns the gradient of its objective with respect to the tensor in the same step, and
            it joins the gradient of this party's own loss. Training only; floating point only.
          mode: Default: the scope in which it is called.
          task: Default: the scope in which it is called.

        Returns:
          The sending op.

        Raises:
          ModelError: ``mode`` or ``task`` contradicts the scope (the peer would wait for ever), the name is taken, a
            gradient is asked for that cannot exist, ``tensor`` is not a tensor of the graph, or the model is compiled.
        """
        scope = self._exchange_scope(f"send({name!r})", mode, task)
        if current_task_scope().mode is not None and scope not in self._with_batch:
            raise ModelError(
                f"send({name!r}) in input_fn: a message tells the peer that there is a batch for this step, which does "
                "not exist yet; call it in loss_fn or eval_fn"
            )
        tensor = as_graph_tensor(tensor, f"send({name!r})")
        self._check_grad(f"send({name!r})", scope, tensor.dtype, require_grad)
        if tf.get_collection("efl_privacy_releases"):
            from efl.privacy import release  # only who has made one needs it

            sent = release.bind(tensor, f"{scope.wire}/{name}", self._noise)
            if sent is not None:
                self._released.setdefault(scope, {})[name] = sent.release.noise_multiplier
        op = self._communicator.send(name, tensor, scope=scope, require_grad=require_grad)
        self._send_ops.setdefault(scope, []).append(op)
        self._sent_tensors.setdefault(scope, {})[name] = (tensor, require_grad)
        if require_grad:
            gradient = self._communicator.recv(f"{name}/grad", tensor.dtype.base_dtype, shape=tensor.shape, scope=scope)
            tf.add_to_collection(RECEIVED, gradient)
            self._grad_receives.setdefault(scope, {})[name] = gradient
        return op

    def recv(
        self,
        name: str,
        dtype: tf.DType = tf.float32,
        require_grad: bool = False,
        task: str | None = None,
        shape: Any = None,
    ) -> tf.Tensor:
        """Receives what the peer sends under a name, once in every step of the mode in which it is called.

        Args:
          name: The peer's name for it.
          dtype: Its dtype; the handshake compares it.
          require_grad: This party returns the gradient of its objective with respect to the received tensor.
          task: Default: the scope in which it is called.
          shape: Its static shape where known; unknown by default: reshape before use.

        Returns:
          The received tensor.

        Raises:
          ModelError: As for ``send``.
        """
        scope = self._exchange_scope(f"recv({name!r})", None, task)
        self._check_grad(f"recv({name!r})", scope, tf.as_dtype(dtype), require_grad)
        tensor = self._communicator.recv(name, dtype, shape=shape, scope=scope, require_grad=require_grad)
        tf.add_to_collection(RECEIVED, tensor)
        self._receives.setdefault(scope, {})[name] = (tensor, require_grad)
        return tensor

    @property
    def federal_role(self) -> str:
        """``"leader"`` or ``"follower"``."""
        return self._communicator.federal_role

    @property
    def communicator(self) -> Communicator:
        """The channel to the peer, as graph ops."""
        return self._communicator

    @property
    def recv_grad_ops(self) -> dict[TaskScope, dict[str, tf.Tensor]]:
        """Task scope -> name -> received tensor whose gradient goes back to the peer."""
        return {s: {n: t for n, (t, grad) in held.items() if grad} for s, held in self._receives.items()}

    @property
    def require_grad_ops(self) -> dict[TaskScope, dict[str, tf.Tensor]]:
        """Task scope -> name of a sent tensor -> the gradient that the peer returns for it."""
        return {scope: dict(held) for scope, held in self._grad_receives.items()}

    # ---- for efl's own modules -----------------------------------------------------------------------------------

    @property
    def _who(self) -> str:
        return self.federal_role

    @property
    def _is_timekeeper(self) -> bool:
        return self.federal_role == "leader"

    def _is_common(self, program: Program) -> bool:
        return self._has(program)

    def _exchange_scope(self, what: str, mode: MODE | None, task: str | None) -> TaskScope:
        if self._compiled:
            error = ModelError(
                f"{what} after compile(): the steps are built, so it would run in none of them, and the peer would "
                "wait for ever; call it in loss_fn or eval_fn"
            )
            self._could_not_begin(error)
            raise error
        current = current_task_scope()
        for name, asked, here in (("mode", mode, current.mode), ("task", task, current.task)):
            if asked is not None and current.mode is not None and asked != here:
                raise ModelError(
                    f"{what}: {name}={getattr(asked, 'value', asked)} inside {current}: the peer would wait for ever "
                    f"for a tensor that is made in another {name}; leave {name} out"
                )
        scope = TaskScope(mode or current.mode or MODE.TRAIN, task if task is not None else current.task)
        if scope in self._exchanged_scopes:
            raise ModelError(
                f"{what} while the updates of {scope} are made (in an optimizer?): its exchange is complete by then, "
                "and the peer would wait for ever; call it in loss_fn or eval_fn"
            )
        return scope

    @staticmethod
    def _check_grad(what: str, scope: TaskScope, dtype: tf.DType, require_grad: bool) -> None:
        if require_grad and scope.mode is not MODE.TRAIN:
            raise ModelError(f"{what}: require_grad=True in {scope}: there are no gradients in evaluation")
        if require_grad and not dtype.is_floating:
            raise ModelError(f"{what}: require_grad=True on {dtype.name}: only floating point has gradients")

    def _could_not_begin(self, error: Exception) -> None:
        self._peer_knows = True
        self._communicator.tell_failure(error)

    def _fit_ended(self, well: bool) -> None:
        self._peer_knows = not well
        if self._noise_holder is not None:
            self._noise_holder.conversation_ended(well)

    def _program_failed(self, error: Exception) -> None:
        if not self._peer_knows:
            self._could_not_begin(error)

    def _compare_rows(self, program: Program, error: Exception) -> None:
        scope = program.scope
        if not isinstance(error, tf.errors.InvalidArgumentError) or not self._has(program):
            return
        state = self._communicator.scope_state(scope)
        step = state.running
        read, rows = self._rows_read.get(scope, (step, state.ids.size(step or 0)))
        arrived = self._communicator.arrived_shapes(scope)
        shapes = {name: arrived[name] for name in self._receives.get(scope, {}) if arrived.get(name)}
        others = {name: shape[0] for name, shape in shapes.items() if shape[0] != rows}
        if others and rows is not None and read == step:
            told = ", ".join(f"{name!r} with {count} rows" for name, count in others.items())
            raise DataError(
                f"step {step} of {scope.wire} failed ({reason_of(error)}): {self._communicator.peer_role} sent {told}, "
                f"and the batch of {self.federal_role} has {rows}: give both the same batch size"
            )

    def _batch_is_read(self, scope: TaskScope, sample: Any) -> None:
        read = self._communicator.send_after(scope, feature_tensors(sample))
        self._with_batch.add(scope)
        for op in self._send_ops.get(scope, []):  # made before loss_fn or eval_fn was called
            op._add_control_inputs(read)
        ranked = [feature for feature in sample.features.values() if feature.shape.rank != 0]
        if ranked and not self._communicator.verifies_ids(scope):  # which count the rows
            shape = ranked[0].dense_shape if isinstance(ranked[0], tf.SparseTensor) else tf.shape(ranked[0])
            self._send_ops.setdefault(scope, []).append(self._note_rows(scope, shape))

    def _note_rows(self, scope: TaskScope, shape: tf.Tensor) -> tf.Operation:
        state = self._communicator.scope_state(scope)

        def note(rows: np.ndarray) -> None:
            self._rows_read[scope] = state.running, int(rows)

        return call_python(note, [tf.gather(shape, 0)], op_name("efl_rows", scope.wire))

    def _sent(self, scope: TaskScope) -> list[Sent]:
        held = self._sent_tensors.get(scope, {})
        sent = [Sent(name, held[name][0], gradient) for name, gradient in self._grad_receives.get(scope, {}).items()]
        return sent + [end.sent for end in self._ends(scope) if end.sent is not None]

    def _ends(self, scope: TaskScope) -> list[End]:
        return self._communicator.ends.get(scope, [])

    def _check_own(self, ops: set[tf.Operation]) -> None:
        exchanging = sorted(op.name for op in ops if op.name.startswith(("efl_send/", "efl_recv", "efl_sample_ids/")))
        if exchanging:
            raise ModelError(
                f"a LoopStage over fetches of one's own that depend on the exchange with the peer ({exchanging[0]}): "
                "messages and batches belong to steps that both parties take; loop over model.train_op() or "
                "model.eval_op(), and read other tensors in such a step, with a hook"
            )

    def _shown(self, scope: TaskScope) -> list[tf.Tensor]:
        return [tensor for tensor, _ in self._sent_tensors.get(scope, {}).values()]

    def _received(self, scope: TaskScope) -> list[tuple[str, tf.Tensor]]:
        received = [(name, tensor) for name, (tensor, grad) in self._receives.get(scope, {}).items() if grad]
        return received + [(end.name, end.received) for end in self._ends(scope) if end.received is not None]

    def _layer_updates(self, scope: TaskScope) -> list[tf.Operation]:
        return [op for end in self._ends(scope) for op in end.update()]

    def _layers(self, scope: TaskScope) -> list[str]:
        return [end.name for end in self._ends(scope)]

    def _return_gradients(self, scope: TaskScope, gradients: Sequence[tf.Tensor], undivided: bool) -> None:
        program, ends = self._programs[scope], [end for end in self._ends(scope) if end.received is not None]
        of_layers = len(gradients) - len(ends)
        for end, computed in zip(ends, gradients[of_layers:]):
            end.give_back(computed)
        for (name, _), computed in zip(self._received(scope), gradients[:of_layers]):
            gradient = self._undivided.as_wanted(scope, program, computed, undivided, self._opt_config)
            op = self._communicator.send(f"{name}/grad", gradient, scope=scope)
            self._send_ops.setdefault(scope, []).append(op)

    def _sent_raw(self) -> list[str]:
        """What leaves as it is: what is sent without a release, and gradients that are returned without noise."""
        names = [
            n for scope, held in self._sent_tensors.items() for n in held if n not in self._released.get(scope, {})
        ]
        noised = self._opt_config.backend_mode == "noise"
        for scope, program in self._programs.items():
            if scope.mode is MODE.TRAIN and not (noised and any(map(is_private, program.optimizers))):
                names += [f"gradient of {name}" for name, _ in self._received(scope)]
        return list(dict.fromkeys(names))

    def _received_raw(self, gradients_are_noised: bool, released: Mapping[str, float]) -> list[str]:
        noised = {**released, **self._released_by_peer}
        names = [n for scope, held in self._receives.items() for n in held if f"{scope.wire}/{n}" not in noised]
        if not gradients_are_noised:
            names += [f"gradient of {name}" for held in self._grad_receives.values() for name in held]
        return list(dict.fromkeys(names))

    def _gradients_received(self) -> list[str]:
        return list(dict.fromkeys(name for held in self._grad_receives.values() for name in held))

    def _promised_noise(self) -> dict[str, PromisedNoise]:
        found = {}
        for scope, program in self._programs.items():
            if scope.mode is MODE.TRAIN and program.optimizers:
                of_group = {} if self._noise_holder is None else self._noise_holder.conditions
                groups, number = [], 0
                for optimizer in program.optimizers:
                    terms = {}
                    if is_private(optimizer):
                        alone = sum(map(is_private, program.optimizers)) == 1
                        terms = of_group.get(scope.wire if alone else f"{scope.wire}/{number}", {})
                        number += 1
                    multiplier = float(getattr(optimizer, "noise_multiplier", None) or 0.0)
                    groups.append((multiplier, bool(terms.get("microbatched"))))
                # What its weights have behind them, and what moves some of them beside.
                groups += [(0.0, False)] if self.unnoised or (number and _moved_by_data(program)) else []
                noises = number > 0 and self._opt_config.backend_mode == "noise"
                found[scope.wire] = PromisedNoise(tuple(groups), noises)
        return found

    def _promised_releases(self) -> dict[str, float]:
        return {f"{scope.wire}/{name}": noise for scope, held in self._released.items() for name, noise in held.items()}

    def _note_peers_noise(self, told: Mapping[str, PromisedNoise], released: Mapping[str, float]) -> None:
        if self._noise_holder is None:
            return
        self._noise_holder.conversation_begun()
        self._released_by_peer = dict(released)
        for group, conditions in self._noise_holder.conditions.items():
            scope = group.split("/")[0]
            promised = told.get(scope)
            here = {name: noise for name, noise in released.items() if name.split("/")[0] == scope}
            conditions["peer"] = {
                "groups": None if promised is None else [list(each) for each in promised.groups],
                "noises_returns": promised is not None and promised.noises_returns,
                "released": here,
            }

    def _check_exchanges(self) -> None:
        self._communicator.complete()
        for scope in dict.fromkeys([*self._sent_tensors, *self._receives, *self._communicator.ends]):
            if scope not in self._programs or self._programs[scope].op is None:
                there = [*self._sent_tensors.get(scope, {}), *self._receives.get(scope, {})]
                names = ", ".join(map(repr, [*there, *(end.name for end in self._ends(scope))]))
                needed, have = ("loss_fn", self._loss_fns) if scope.mode is MODE.TRAIN else ("eval_fn", self._eval_fns)
                raise ModelError(
                    f"{names}: sent or received in {scope}, but task {scope.task!r} has no {needed}, so there is no "
                    "step of it, and the peer would wait for ever; tasks that have one: "
                    f"{', '.join(map(repr, have)) or 'none'}"
                )
        for scope, held in self._released.items():
            from efl.privacy import _training as private_training
            from efl.privacy import release

            for name in held:
                sampled = private_training.are_samples(self._programs[scope])
                release.check_rows(self._sent_tensors[scope][name][0], name, sampled)
                private_training.note_conditions(self, self._programs[scope], f"{scope.wire}/{name}", "sent")
        for scope, program in self._programs.items():
            if scope.mode is MODE.TRAIN:
                self._undivided.note(program, self._sent(scope), self._received(scope), self._opt_config)

    def _is_driven_by_peer(self, scope: TaskScope, loss: Any) -> bool:
        # In training only what comes back as a gradient drives; what was merely shown to the peer is still a loss.
        if any(end.sent is not None and end.sent.tensor is loss for end in self._ends(scope)):
            return True
        return any(
            loss is tensor and (require_grad if scope.mode is MODE.TRAIN else tensor.shape.rank != 0)
            for tensor, require_grad in self._sent_tensors.get(scope, {}).values()
        )

    def _exchange_ops(self, scope: TaskScope, sample: Any) -> list[Any]:
        # Every step is mutual: without anything to send or to receive, a token says "I have a batch for this step".
        ops: list[Any] = []
        if not self._communicator.names("send", scope):
            token = self._communicator.send(TOKEN, tf.constant(0, tf.int8), scope=scope)
            self._send_ops.setdefault(scope, []).append(token)
        if not self._communicator.names("recv", scope):
            ops.append(self._communicator.recv(TOKEN, tf.int8, shape=[], scope=scope))
        self._exchanged_scopes.add(scope)
        ops += self._send_ops.get(scope, [])
        ops += [tensor for tensor, _ in self._receives.get(scope, {}).values()]
        ops += [tensor for end in self._ends(scope) for tensor in end.gate]
        return ops + list(self._grad_receives.get(scope, {}).values())


def _moved_by_data(program: Program) -> bool:
    from efl.privacy._moved import moved_by_data  # only who asks for privacy pays for it

    return bool(moved_by_data(program))
