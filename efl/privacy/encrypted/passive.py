"""The leader's ends of encrypted layers: it has the public key, and does not see the follower's embedding."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow.compat.v1 as tf

from efl._ends import End
from efl._graph import RECEIVED, as_graph_tensor
from efl._rounds import Job
from efl._task_scope import MODE
from efl.communicator import Communicator
from efl.privacy.encrypted import initial, warned
from efl.privacy.encrypted._layer import (
    EncryptedLayer,
    Terms,
    arrays_of,
    bound_to,
    checked_size,
    file_path,
    share_of,
    work_of,
)
from efl.protocol.passive import PassiveLayer
from efl.protocol.widths import Kind

Initializer = Callable[..., tf.Tensor]


class _Passive(EncryptedLayer):
    """See the classes below."""

    def __init__(
        self,
        communicator: Communicator,
        public_file: str | os.PathLike[str],
        dim: int,
        initializer: Initializer | None,
        terms: Terms,
    ) -> None:
        from efl.paillier import PublicKey

        what = type(self).__name__
        self._dim, self._initializer = checked_size(what, "dim", dim), initializer
        checked_size(what, "recv_dim", terms.inputs)
        public = PublicKey.load(file_path(what, "public_file", public_file))
        super().__init__(communicator, public, terms, "leader")
        if initializer is not None:
            warned.warn(
                f"{what} {terms.name!r}: with an initializer the leader knows the weights of the first step, and can "
                "compute the follower's inputs of that batch; leave it out"
            )

    def _received(self, own: tf.Tensor) -> tf.Tensor:
        """What the follower's embedding has become, ``[batch, outputs]``, of the dtype of ``own``."""
        from efl.paillier.scheme import PublicPaillier

        scope = self._scope()
        rounds, job_of = self._rounds(scope), list[Job]()
        share = self._share(lambda: initial.origin(self._kind, self.share_shape, self._initializer))
        layer = PassiveLayer(
            PublicPaillier(self._engine(bound_to(job_of))),
            self._kind,
            self._inputs,
            self._outputs,
            learning_rate=self._learning_rate,
            momentum=self._momentum,
            name=self._name,
            known_origin=self._initializer is not None,
            output_limit_bits=self._limit_bits,
        )
        as_numpy = own.dtype.as_numpy_dtype

        def forward(job: Job, values: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
            *share, rows = values
            initial.check_origin(self._name, share[0])
            return [layer.forward(job, share_of(share), int(rows)).astype(as_numpy)]

        def backward(job: Job, values: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
            *share, gradient = values
            return arrays_of(layer.backward(job, gradient, share_of(share)))

        rows = tf.shape(own)[0]
        kinds: list[Any] = [(own.dtype, tf.TensorShape([own.shape[0], self._outputs]))]
        (received,) = rounds.run("forward", work_of(job_of, forward), [*share.tensors, rows], kinds)
        tf.add_to_collection(RECEIVED, received)
        end = End(self._name, gate=[received])
        if scope.mode is MODE.TRAIN:
            end.received = received

            def give_back(gradient: tf.Tensor) -> None:
                new = rounds.run("backward", work_of(job_of, backward), [*share.tensors, gradient], share.kinds)
                end.gate += new
                end.update = lambda: share.assign(*new)

            end.give_back = give_back
        self._add(scope, end)
        return received


class EncryptPassiveLayer(_Passive):
    """[own∘w₁ | x∘w₂] of this party's embedding and the follower's x, which it does not see. The leader's end.

    The follower's end is ``EncryptActiveLayer``. w₁ is this party's own variable; w₂ is shared, and nobody holds it.
    What this party learns: x∘w₂ in every step, which shows x up to one factor for each column, near one at the start.
    What the follower learns: the gradient of x, and the largest magnitude in the output's gradient to a power of two.

    Args:
      communicator: ``model.communicator``.
      dim: Columns of the own embedding.
      recv_dim: Columns of the follower's.
      public_file: The follower's ``public_key.json``.
      learning_rate: Of w₂, by gradient descent; the same at both parties. w₁ is trained by the model's optimizer.
      initializer: Of w₁ and w₂. By default both are spread around one, w₂ in two secret parts; with an initializer this
        party knows w₂ until the first update, and so the first batch of x.
      name: Of the layer, the same at both parties; each layer of a model has its own.
      momentum: Of w₂'s updates, 0 up to below 1, as in ``tf.train.MomentumOptimizer``; the same at both parties.
      output_limit: |x∘w₂| stays below it: a power of two, the same at both parties. A larger number ends the run.

    Raises:
      ConfigError: A key file that is missing, damaged or a private one; an argument that cannot be; this party is the
        follower.
    """

    def __init__(
        self,
        communicator: Communicator,
        dim: int,
        recv_dim: int,
        public_file: str | os.PathLike[str],
        learning_rate: float = 0.01,
        initializer: Initializer | None = None,
        name: str = "hetero",
        *,
        momentum: float = 0.0,
        output_limit: float = 64.0,
    ) -> None:
        warned.warn_of_elementwise()
        terms = Terms(Kind.ELEMENTWISE, recv_dim, recv_dim, learning_rate, momentum, name, output_limit)
        super().__init__(communicator, public_file, dim, initializer, terms)

    def __call__(self, embedding: tf.Tensor) -> tf.Tensor:
        """Joins the parties' embeddings, in every step of the current task and mode.

        Args:
          embedding: This party's, float32 or float64 ``[batch, dim]``.

        Returns:
          ``[batch, dim + recv_dim]``.

        Raises:
          ModelError: It has another dtype or shape; the layer was called in this task and mode already, or outside of
            ``loss_fn`` and ``eval_fn``.
        """
        own = as_graph_tensor(embedding, type(self).__name__)
        self._check_input(own, self._dim)
        with tf.variable_scope(tf.VariableScope(tf.AUTO_REUSE, self._name), auxiliary_name_scope=False):
            spread = tf.random_uniform_initializer(0.5, 1.5)
            w1 = tf.get_variable("w1", [self._dim], own.dtype, initializer=self._initializer or spread)
        return tf.concat([own * w1, self._received(own)], -1)


class EncryptPassiveDense(_Passive):
    """own·W₁ + x·W₂ of this party's embedding and the follower's x, which it does not see. The leader's end.

    The follower's end is ``EncryptActiveDense``. W₁ is this party's own variable; W₂ is shared, and nobody holds it.
    What this party learns: x·W₂ in every step. What the follower learns: the gradient of x, and the largest magnitude
    in the output's gradient to a power of two.

    Args:
      communicator: ``model.communicator``.
      dim: Columns of the own embedding.
      recv_dim: Columns of the follower's.
      public_file: The follower's ``public_key.json``.
      units: Columns of the output, the same at both parties.
      learning_rate: Of W₂, by gradient descent; the same at both parties. W₁ is trained by the model's optimizer.
      initializer: Of W₁ and W₂. By default Glorot's uniform one, W₂ in two secret parts; with an initializer this party
        knows W₂ until the first update.
      name: Of the layer, the same at both parties; each layer of a model has its own.
      momentum: Of W₂'s updates, 0 up to below 1, as in ``tf.train.MomentumOptimizer``; the same at both parties.
      output_limit: |x·W₂| stays below it: a power of two, the same at both parties. A larger number ends the run.

    Raises:
      ConfigError: As for ``EncryptPassiveLayer``.
    """

    def __init__(
        self,
        communicator: Communicator,
        dim: int,
        recv_dim: int,
        public_file: str | os.PathLike[str],
        units: int,
        learning_rate: float = 0.01,
        initializer: Initializer | None = None,
        name: str = "hetero",
        *,
        momentum: float = 0.0,
        output_limit: float = 64.0,
    ) -> None:
        what = type(self).__name__
        if checked_size(what, "units", units) == 1:
            warned.warn(
                f"{what}: with one unit the follower can compute W₂ and the output's gradient of each row from two "
                "steps, and with a logistic loss label and score: take several units"
            )
        terms = Terms(Kind.DENSE, recv_dim, units, learning_rate, momentum, name, output_limit)
        super().__init__(communicator, public_file, dim, initializer, terms)

    def __call__(self, embedding: tf.Tensor) -> tf.Tensor:
        """Joins the parties' embeddings, in every step of the current task and mode.

        Args:
          embedding: This party's, float32 or float64 ``[batch, dim]``.

        Returns:
          ``[batch, units]``.

        Raises:
          ModelError: As for ``EncryptPassiveLayer``.
        """
        own = as_graph_tensor(embedding, type(self).__name__)
        self._check_input(own, self._dim)
        with tf.variable_scope(tf.VariableScope(tf.AUTO_REUSE, self._name), auxiliary_name_scope=False):
            glorot = tf.glorot_uniform_initializer()
            w1 = tf.get_variable("w1", [self._dim, self._outputs], own.dtype, initializer=self._initializer or glorot)
        return tf.matmul(own, w1) + self._received(own)
