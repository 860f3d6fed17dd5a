"""The follower's ends of encrypted layers: it holds the private key and the embedding that the leader shall not see."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow.compat.v1 as tf

from efl._ends import End
from efl._gradients import Sent
from efl._graph import as_graph_tensor
from efl._rounds import Job
from efl._task_scope import MODE
from efl.communicator import Communicator
from efl.errors import ConfigError
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
from efl.privacy.encrypted._trained import depends_on_trained
from efl.protocol.active import ActiveLayer
from efl.protocol.widths import Kind


class _Active(EncryptedLayer):
    """See the classes below."""

    def __init__(
        self,
        communicator: Communicator,
        public_file: str | os.PathLike[str],
        private_file: str | os.PathLike[str],
        terms: Terms,
        clip: bool,
    ) -> None:
        from efl.paillier import PrivateKey, PublicKey

        what = type(self).__name__
        if not isinstance(clip, bool):
            raise ConfigError(f"{what}: clip={clip!r}: expected True or False")
        public = PublicKey.load(file_path(what, "public_file", public_file))
        self._private = PrivateKey.load(file_path(what, "private_file", private_file))
        if self._private.public != public:
            raise ConfigError(
                f"{what}: {private_file} is of key {self._private.public.fingerprint}, and {public_file} is key "
                f"{public.fingerprint}: give the two files of one pair"
            )
        super().__init__(communicator, public, terms, "follower")
        self._clip = clip

    def __call__(self, embedding: tf.Tensor) -> tf.Tensor:
        """Gives the leader this layer's output, in every step of the current task and mode.

        Args:
          embedding: float32 or float64 ``[batch, dim]``, finite and within ±32.

        Returns:
          ``embedding`` itself. In training, the leader's gradient joins its own.

        Raises:
          ModelError: It has another dtype or shape; the layer was called in this task and mode already, or outside of
            ``loss_fn`` and ``eval_fn``.
        """
        from efl.paillier.scheme import PrivatePaillier

        x, scope = as_graph_tensor(embedding, type(self).__name__), self._scope()
        self._check_input(x, self._inputs)
        rounds, job_of = self._rounds(scope), list[Job]()
        share = self._share(lambda: initial.half(self._kind, self.share_shape))
        layer = ActiveLayer(
            PrivatePaillier(self._engine(bound_to(job_of)), self._private),
            self._kind,
            self._inputs,
            self._outputs,
            momentum=self._momentum,
            name=self._name,
            output_limit_bits=self._limit_bits,
            clip=self._clip,
        )
        trains = scope.mode is MODE.TRAIN

        def work(job: Job, values: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
            effective = layer.forward(job, values[0], share_of(values[1:]), trains)
            if not trains:
                return [np.array(True)]
            new, gradient = layer.backward(job, values[0], effective)
            return [gradient.astype(values[0].dtype), *arrays_of(new)]

        kinds: list[Any] = [(x.dtype, x.shape), *share.kinds] if trains else [(tf.bool, tf.TensorShape([]))]
        results = rounds.run("step", work_of(job_of, work), [x, *share.tensors], kinds)
        end = End(self._name, gate=results)
        if trains:
            if not depends_on_trained(x):
                warned.warn(
                    f"the input of encrypted layer {self._name!r} depends on no trained variable: from what it gets of "
                    "the same rows in several steps, the leader can compute the products between rows of this input. "
                    "Let trained layers come before it"
                )
            end.sent = Sent(self._name, x, results[0])
            end.update = lambda: share.assign(*results[1:])
        self._add(scope, end)
        return x


class EncryptActiveLayer(_Active):
    """Gives the leader x∘w of this party's embedding x; w is shared, and nobody holds it. The follower's end.

    The leader's end is ``EncryptPassiveLayer``. What the leader learns: x∘w, in every step; since w is one factor for a
    column, near one at the start, that hides each column's scale and nothing else (``EncryptActiveDense`` hides more).
    What this party learns: the gradient of x. Protocol after arXiv:2007.06849, with the weights shared.

    Args:
      communicator: ``model.communicator``.
      dim: Columns of the embedding.
      public_file: ``public_key.json``; the leader has the same.
      private_file: ``private_key.json`` of the same pair, which never leaves this party.
      learning_rate: Of w, by gradient descent; the same at both parties.
      noise_initializer: Accepted and without effect: masks and shares are always fresh.
      update_noise: As ``noise_initializer``.
      name: Of the layer, the same at both parties; each layer of a model has its own.
      momentum: Of w's updates, 0 up to below 1, as in ``tf.train.MomentumOptimizer``; the same at both parties.
      output_limit: |x∘w| stays below it: a power of two, the same at both parties. A larger number ends the run.
      clip: Inputs beyond ±32 are clipped, counted and logged rather than refused.

    Raises:
      ConfigError: A key file that is missing, damaged, of the other kind or of another pair; an argument that cannot
        be; this party is the leader.
    """

    def __init__(
        self,
        communicator: Communicator,
        dim: int,
        public_file: str | os.PathLike[str],
        private_file: str | os.PathLike[str],
        learning_rate: float = 0.01,
        noise_initializer: Any = None,
        update_noise: bool = True,
        name: str = "hetero",
        *,
        momentum: float = 0.0,
        output_limit: float = 64.0,
        clip: bool = False,
    ) -> None:
        warned.warn_of_elementwise()
        warned.warn_of_ignored(
            **({} if noise_initializer is None else {"noise_initializer": noise_initializer}),
            **({} if update_noise else {"update_noise": update_noise}),
        )
        terms = Terms(Kind.ELEMENTWISE, dim, dim, learning_rate, momentum, name, output_limit)
        super().__init__(communicator, public_file, private_file, terms, clip)


class EncryptActiveDense(_Active):
    """Gives the leader x·W of this party's embedding x; W is shared, and nobody holds it. The follower's end.

    The leader's end is ``EncryptPassiveDense``. What the leader learns: x·W in every step, with W unknown (and, of rows
    that come again while W hardly moves, more: docs). What this party learns: the gradient of x.

    Args:
      communicator: ``model.communicator``.
      dim: Columns of the embedding.
      public_file: ``public_key.json``; the leader has the same.
      private_file: ``private_key.json`` of the same pair, which never leaves this party.
      units: Columns of x·W, the same at both parties; fewer than ``dim`` hide more.
      learning_rate: Of W, by gradient descent; the same at both parties.
      name: Of the layer, the same at both parties; each layer of a model has its own.
      momentum: Of W's updates, 0 up to below 1, as in ``tf.train.MomentumOptimizer``; the same at both parties.
      output_limit: |x·W| stays below it: a power of two, the same at both parties. A larger number ends the run.
      clip: Inputs beyond ±32 are clipped, counted and logged rather than refused.

    Raises:
      ConfigError: As for ``EncryptActiveLayer``.
    """

    def __init__(
        self,
        communicator: Communicator,
        dim: int,
        public_file: str | os.PathLike[str],
        private_file: str | os.PathLike[str],
        units: int,
        learning_rate: float = 0.01,
        name: str = "hetero",
        *,
        momentum: float = 0.0,
        output_limit: float = 64.0,
        clip: bool = False,
    ) -> None:
        what = type(self).__name__
        if checked_size(what, "units", units) >= checked_size(what, "dim", dim):
            warned.warn(
                f"{what}: {units} units of {dim} columns: with as many outputs as inputs or more, who learned W (by "
                "knowing as many rows as there are columns) could compute the other rows; fewer units hide more"
            )
        terms = Terms(Kind.DENSE, dim, units, learning_rate, momentum, name, output_limit)
        super().__init__(communicator, public_file, private_file, terms, clip)
