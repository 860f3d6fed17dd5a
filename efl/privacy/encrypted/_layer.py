"""What both parties' ends of an encrypted layer have in common: key, share, rounds."""

from __future__ import annotations

import numbers
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow.compat.v1 as tf

from efl._ends import End
from efl._rounds import Job, Message, Rounds, Work
from efl._task_scope import MODE, TaskScope, current_task_scope
from efl.communicator import Communicator
from efl.errors import ConfigError, ModelError
from efl.privacy.optimizers import checked_number
from efl.protocol.rounds import HEAD_BYTES, MESSAGES, TAG_BYTES, Form, Share
from efl.protocol.widths import MOMENTUM_BITS, Kind

if TYPE_CHECKING:
    from efl.paillier import PublicKey
    from efl.paillier.engine import Engine

_VERSION = 2  # of the rounds


@dataclass(frozen=True)
class Terms:
    """What both parties have to say alike of a layer.

    Attributes:
      kind: What the layer computes.
      inputs: Columns of the follower's embedding.
      outputs: Columns that come out of it.
      learning_rate: Of the shared weights.
      momentum: Of their updates.
      name: Of the layer.
      output_limit: The largest magnitude of what comes out, a power of two.
    """

    kind: Kind
    inputs: int
    outputs: int
    learning_rate: float
    momentum: float
    name: str
    output_limit: float


class EncryptedLayer:
    """One party's end of a layer whose weights are shared.

    Args:
      communicator: Of a ``FederalModel``.
      public: The follower's key.
      terms: Of the layer.
      role: Whose end this is.
    """

    def __init__(self, communicator: Communicator, public: PublicKey, terms: Terms, role: str) -> None:
        what, name = type(self).__name__, terms.name
        if not isinstance(communicator, Communicator):
            raise ConfigError(f"{what}: communicator={communicator!r:.80}: expected the communicator of a FederalModel")
        if communicator.federal_role != role:
            raise ConfigError(
                f"{what} is the {role}'s end of an encrypted layer, and this party is {communicator.federal_role!r}: "
                "the follower, who holds the private key, uses EncryptActive…, the leader EncryptPassive…"
            )
        if not isinstance(name, str) or not re.fullmatch("[A-Za-z][A-Za-z0-9_]*", name):
            raise ConfigError(
                f"{what}: name={name!r}: expected letters (A-Z, a-z), digits and underscores, a letter first"
            )
        self._communicator, self._public, self._kind, self._name = communicator, public, terms.kind, name
        self._inputs, self._outputs = checked_size(what, "dim", terms.inputs), terms.outputs
        self._learning_rate = checked_number("learning_rate", terms.learning_rate, 0.0, may_be_least=True)
        self._momentum = checked_number("momentum", terms.momentum, 0.0, may_be_least=True)
        least = 2.0**-MOMENTUM_BITS
        if self._momentum and not least <= self._momentum <= 1.0 - least:
            raise ConfigError(
                f"{what}: momentum={terms.momentum!r}: expected 0, or a number below 1, of {MOMENTUM_BITS} bits: "
                f"{least:.2g} to 1 - {least:.2g}"
            )
        self._limit_bits = _limit_bits(what, terms.output_limit)
        declared = {
            "version": _VERSION,
            "kind": terms.kind.value,
            "follower_dim": terms.inputs,
            "outputs": terms.outputs,
            "learning_rate": self._learning_rate,
            "momentum": self._momentum,
            "output_limit": 2.0**self._limit_bits,
            "key": public.fingerprint,
        }
        for term, value in declared.items():
            communicator.declare(f"encrypted/{name}/{term}", value)
        # Worker processes begin before TensorFlow's threads do.
        self._engine(lambda part: None).start()

    @property
    def share_shape(self) -> tuple[int, ...]:
        """Of the weights, and of this party's share of them."""
        return (self._inputs, self._outputs) if self._kind is Kind.DENSE else (self._inputs,)

    def _engine(self, progress: Callable[[float], None]) -> Engine:
        from efl.paillier.engine import Engine

        return Engine(self._public, progress)

    def _scope(self) -> TaskScope:
        scope = current_task_scope()
        if scope.mode is None:
            raise ModelError(
                f"{type(self).__name__} {self._name!r} is called outside of loss_fn and eval_fn: its messages belong "
                "to the steps of a model"
            )
        if any(end.name == self._name for end in self._communicator.ends.get(scope, [])):
            raise ModelError(
                f"encrypted layer {self._name!r} exists already in {scope}: call a layer once per task and mode, "
                "and give each layer of a model a name of its own"
            )
        return scope

    def _rounds(self, scope: TaskScope) -> Rounds:
        follower = self._communicator.federal_role == "follower"
        n_bytes = (self._public.bits + 7) // 8
        shapes: dict[Form, tuple[tf.DType, tuple[int | None, ...]]] = {
            Form.CIPHERTEXTS: (tf.uint8, (None, 2 * n_bytes)),
            Form.PLAINTEXTS: (tf.uint8, (None, n_bytes)),
            Form.HEAD: (tf.uint8, (HEAD_BYTES,)),
            Form.NUMBER: (tf.int64, ()),
        }
        return Rounds(
            self._communicator,
            self._name,
            scope,
            {
                name: Message("send" if message.from_follower == follower else "recv", *shapes[message.form])
                for name, message in MESSAGES.items()
                if scope.mode is MODE.TRAIN or not message.in_training
            },
        )

    def _share(self, draw: Callable[[], tf.Tensor]) -> ShareVariables:
        return ShareVariables(self._name, self.share_shape, draw, bool(self._momentum))

    def _check_input(self, tensor: tf.Tensor, dim: int) -> None:
        what = f"{type(self).__name__} {self._name!r}"
        if tensor.dtype not in (tf.float32, tf.float64):
            raise ModelError(f"{what}: got a tensor of {tensor.dtype.name}: expected float32 or float64")
        if tensor.shape.rank != 2 or tensor.shape[1] != dim:
            raise ModelError(f"{what}: got a tensor of shape {tensor.shape}: expected [batch, {dim}] (its dim)")

    def _add(self, scope: TaskScope, end: End) -> None:
        self._communicator.ends.setdefault(scope, []).append(end)


class ShareVariables:
    """A share of a layer's weights in the graph: ``name/share`` int64, ``name/tag`` uint8 ``[32]``. In checkpoints.

    With momentum there is ``name/velocity`` int64 too.

    Args:
      name: Of the layer.
      shape: Of the weights.
      draw: Makes the tensor of the initial share.
      momentum: Whether there is a velocity.
    """

    def __init__(self, name: str, shape: tuple[int, ...], draw: Callable[[], tf.Tensor], momentum: bool) -> None:
        # Under the name alone, wherever the layer is called: in training and evaluation it is one layer.
        with tf.variable_scope(tf.VariableScope(tf.AUTO_REUSE, name), auxiliary_name_scope=False), tf.device("/cpu:0"):
            zeros: Any = tf.zeros_initializer()
            made = [("share", shape, tf.int64, lambda *args, **kwargs: draw()), ("tag", (TAG_BYTES,), tf.uint8, zeros)]
            made += [("velocity", shape, tf.int64, zeros)] if momentum else []
            self._variables = [
                tf.get_variable(name, shape, dtype, initializer=start, trainable=False, use_resource=True)
                for name, shape, dtype, start in made
            ]
        self.tensors = [variable.read_value() for variable in self._variables]
        self.kinds = [(variable.dtype, variable.shape) for variable in self._variables]

    def assign(self, *tensors: tf.Tensor) -> list[tf.Operation]:
        """Ops that replace the share, by what ``arrays_of`` has made of another."""
        pairs = zip(self._variables, tensors, strict=True)
        return [variable.assign(tensor, read_value=False) for variable, tensor in pairs]


def bound_to(job_of: list[Job]) -> Callable[[float], None]:
    """What an engine reports to: the job that runs."""

    def progress(part: float) -> None:
        if job_of:
            job_of[-1].check(part)

    return progress


def work_of(job_of: list[Job], function: Callable[[Job, Sequence[np.ndarray]], Sequence[np.ndarray]]) -> Work:
    """A job whose engine reports to it while it runs."""

    def work(job: Job, values: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
        job_of.append(job)
        try:
            return function(job, values)
        finally:
            job_of.clear()

    return work


def share_of(values: Sequence[np.ndarray]) -> Share:
    """The share whose tensors a job was handed."""
    velocity = np.asarray(values[2], np.int64) if len(values) > 2 else None
    return Share(np.asarray(values[0], np.int64), np.asarray(values[1], np.uint8), velocity)


def arrays_of(share: Share) -> list[np.ndarray]:
    """What ``share_of`` makes a share of."""
    return [share.values, share.tag, *([] if share.velocity is None else [share.velocity])]


def checked_size(what: str, argument: str, value: int) -> int:
    """A number of columns.

    Raises:
      ConfigError: It is none.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not 1 <= value <= 1 << 16:
        raise ConfigError(f"{what}: {argument}={value!r}: expected a number of columns, 1 to 65536")
    return int(value)


def file_path(what: str, argument: str, path: str | os.PathLike[str]) -> str:
    """The name of a key file.

    Raises:
      ConfigError: It is none.
    """
    try:
        name = os.fspath(path)
        if "\0" in name:
            raise TypeError
        return name
    except TypeError:
        raise ConfigError(
            f"{what}: {argument}={path!r}: expected the name of a key file; `efl keygen` makes public_key.json and "
            "private_key.json"
        ) from None


def _limit_bits(what: str, limit: float) -> int:
    is_number = isinstance(limit, numbers.Real)
    bits = next((bits for bits in range(4, 21) if is_number and limit == 2.0**bits), None)
    if bits is None:
        raise ConfigError(f"{what}: output_limit={limit!r}: expected a power of two from 16 to 2**20")
    return bits
