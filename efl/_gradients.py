"""One backward pass for everything that a training step differentiates.

A party's parameters are driven by its own loss and by the gradients that the peer returns for tensors sent to it; the
tensors received with ``require_grad`` want a gradient too. All of it is one call of ``tf.gradients``:

    d(loss)/dx + sum over sent tensors s of (ds/dx)^T * g_s,   for x in variables and received tensors

which equals the gradient of the joint loss, so a federated step is the step of the same model in one process.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import tensorflow.compat.v1 as tf

from efl.errors import ConfigError, ModelError

_log = logging.getLogger("efl")
Gradient: TypeAlias = tf.Tensor | tf.IndexedSlices | None
REDUCTIONS: Mapping[str, Callable[[tf.Tensor], tf.Tensor]] = {"mean": tf.reduce_mean, "sum": tf.reduce_sum}
BACKEND_MODES = ("noise", "unnoise")
_KEYS = ("REDUCE", "BACKEND_MODE", "BATCH_SIZE", "NUM_EXAMPLES", "DEFER_NOISE")


@dataclass(frozen=True)
class OptConfig:
    """``opt_config`` of ``compile``, checked.

    Attributes:
      reduce: Makes a scalar of a loss vector: ``"mean"``, ``"sum"`` or a callable.
      backend_mode: Whether differential privacy noises returned gradients; nothing else reads it.
      is_mode_given: Whether the user chose the ``backend_mode``.
      batch_size: Nominal rows of a batch, for differential privacy; None: as the data's reader says.
      num_examples: Rows of the training data, for differential privacy; None: as the data's reader says.
      defer_noise: Whether noise of embedding rows that nobody reads may wait.
    """

    reduce: str | Callable[[tf.Tensor], tf.Tensor] = "mean"
    backend_mode: str = "noise"
    is_mode_given: bool = False
    batch_size: int | None = None
    num_examples: int | None = None
    defer_noise: bool = True

    @classmethod
    def parse(cls, config: Mapping[str, Any] | None) -> OptConfig:
        """Checks a user's ``opt_config``.

        Raises:
          ConfigError: Not a mapping, an unknown key or an unknown value; names the known ones.
        """
        if config is None:
            return cls()
        if not isinstance(config, Mapping):
            raise ConfigError(
                f"opt_config is a {type(config).__name__}: expected a dict with keys among {', '.join(_KEYS)}"
            )
        unknown = sorted(set(map(str, config)) - set(_KEYS))
        if unknown:
            raise ConfigError(f"opt_config has unknown keys {', '.join(unknown)}; known are {', '.join(_KEYS)}")
        reduce = config.get("REDUCE", "mean")
        if not callable(reduce) and not (isinstance(reduce, str) and reduce in REDUCTIONS):
            raise ConfigError(f"opt_config REDUCE={reduce!r}: expected 'mean', 'sum' or a callable")
        mode = config.get("BACKEND_MODE", "noise")
        if not (isinstance(mode, str) and mode in BACKEND_MODES):
            raise ConfigError(f"opt_config BACKEND_MODE={mode!r}: expected 'noise' or 'unnoise'")
        batch, examples = (_size(config, key) for key in ("BATCH_SIZE", "NUM_EXAMPLES"))
        if batch is not None and examples is not None and batch > examples:
            raise ConfigError(f"opt_config BATCH_SIZE={batch}: more rows than NUM_EXAMPLES={examples}")
        defer = config.get("DEFER_NOISE", True)
        if not isinstance(defer, bool):
            raise ConfigError(f"opt_config DEFER_NOISE={defer!r}: expected True or False")
        return cls(reduce, mode, "BACKEND_MODE" in config, batch, examples, defer)

    def warn_if_unread(self, optimizers: Iterable[Any]) -> None:
        """Logs that a ``BACKEND_MODE`` was chosen which none of the optimizers reads.

        An optimizer that reads it says so by an attribute ``reads_backend_mode``. Who chooses between noise and no
        noise believes that there is some.
        """
        held = list(optimizers)
        if not self.is_mode_given or any(map(is_private, held)):
            return
        names = ", ".join(sorted({type(optimizer).__name__ for optimizer in held})) or "none"
        _log.warning(
            "opt_config BACKEND_MODE=%r has no effect: no optimizer of this model is a differentially private one (its "
            "optimizers: %s), so no gradient is noised, neither what trains here nor what is returned to a peer; leave "
            "it out",
            self.backend_mode,
            names,
        )

    def to_scalar(self, loss: tf.Tensor, where: str) -> tf.Tensor:
        """Reduces a loss of any shape to a scalar.

        Raises:
          ModelError: The callable returned something that is not a scalar.
        """
        if loss.shape.rank == 0:
            return loss
        reduce = self.reduce if callable(self.reduce) else REDUCTIONS[self.reduce]
        scalar = tf.convert_to_tensor(reduce(loss))
        if scalar.shape.rank not in (0, None):
            raise ModelError(f"{where}: REDUCE returned a tensor of shape {scalar.shape}, expected a scalar")
        return scalar


def _size(config: Mapping[str, Any], key: str) -> int | None:
    size = config.get(key)
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        raise ConfigError(f"opt_config {key}={size!r}: expected a positive number of rows")
    return size


@dataclass(frozen=True)
class Sent:
    """A tensor sent with ``require_grad``, and the gradient that comes back for it."""

    name: str
    tensor: tf.Tensor
    gradient: tf.Tensor


@dataclass(frozen=True)
class Derivatives:
    """What one backward pass gave: gradients of variables (None where unconnected) and of received tensors."""

    variables: list[Gradient]
    received: list[tf.Tensor]
    unconnected: list[int] = field(default_factory=list)  # numbers of received tensors that only get zeros


def differentiate(
    loss: tf.Tensor | None,
    sent: Sequence[Sent],
    variables: Sequence[tf.Variable],
    received: Sequence[tf.Tensor],
) -> Derivatives:
    """Gradients of the joint objective with respect to this party's variables and its received tensors.

    Args:
      loss: Scalar loss of this party, or None where only the peer's gradients drive it.
      sent: Tensors whose gradient the peer returns.
      variables: Trainable variables.
      received: Received tensors whose gradient goes back to the peer.

    Returns:
      The gradients; a received tensor that the objective does not depend on gets zeros, since the peer waits for it.
    """
    ys = ([] if loss is None else [loss]) + [s.tensor for s in sent]
    grad_ys = ([] if loss is None else [None]) + [s.gradient for s in sent]
    if not ys:
        return Derivatives([None] * len(variables), [tf.zeros_like(t) for t in received])
    gradients = tf.gradients(ys, list(variables) + list(received), grad_ys=grad_ys)
    back = [
        tf.zeros_like(t) if g is None else tf.convert_to_tensor(g)
        for t, g in zip(received, gradients[len(variables) :])
    ]
    none = [number for number, g in enumerate(gradients[len(variables) :]) if g is None]
    return Derivatives(gradients[: len(variables)], back, none)


def surrogate(loss: tf.Tensor | None, sent: Sequence[Sent]) -> tf.Tensor:
    """A scalar whose gradient is the joint objective's: for optimizers that differentiate by themselves."""
    terms = [] if loss is None else [loss]
    for item in sent:
        terms.append(tf.reduce_sum(item.tensor * tf.stop_gradient(item.gradient)))
    return tf.add_n(terms)


def differentiates_itself(optimizer: Any) -> bool:
    """Whether an optimizer replaces ``compute_gradients`` (loss scaling, clipping ...), the private ones aside."""
    return not is_private(optimizer) and (type(optimizer).compute_gradients is not tf.train.Optimizer.compute_gradients)


def is_private(optimizer: Any) -> bool:
    """Whether an optimizer is one of ``efl.privacy.optimizers``."""
    return bool(getattr(optimizer, "reads_backend_mode", False))


def finished(gradient: Gradient) -> list[tf.Tensor]:
    """The tensors that exist once a gradient is computed; nothing for None."""
    if gradient is None:
        return []
    return [gradient.values, gradient.indices] if isinstance(gradient, tf.IndexedSlices) else [gradient]
