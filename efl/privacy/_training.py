"""The private half of ``compile``: gradients of a task of which an optimizer is private."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import tensorflow.compat.v1 as tf

from efl import _gradients, _readers
from efl._gradients import Derivatives, Sent
from efl._program import Program
from efl.errors import ConfigError, ModelError
from efl.privacy import _private_step
from efl.privacy._private_step import Terms
from efl.privacy._spent import RETURNED, UPDATE
from efl.privacy.optimizers import PrivateOptimizer
from efl.privacy.per_example import Objective, PerExample

if TYPE_CHECKING:
    from efl.model import Model


def differentiate(
    model: Model,
    program: Program,
    assignments: Mapping[Any, tuple[list[tf.Variable], str | None]],
    private: Sequence[PrivateOptimizer],
    sent: Sequence[Sent],
    received: Sequence[tuple[str, tf.Tensor]],
    name: str,
) -> Derivatives:
    """Gradients of a training step: private ones for private optimizers, ordinary ones for the others.

    The gradients that the peer returned are per example and not divided, as was agreed with it; so are those that go
    back to it.

    Args:
      model: Whose step it is.
      program: The task's; its loss is built.
      assignments: Optimizer -> (variables, scope).
      private: Which of the optimizers are private.
      sent: Tensors whose gradient the peer returns.
      received: (name, tensor) of those whose gradient goes back.
      name: Of the task, for messages.

    Raises:
      ModelError: The loss is no vector, or an example's loss depends on other examples.
      ConfigError: The options do not fit together.
    """
    config, where = model._opt_config, f"loss_fn of {name}"
    loss = program.loss_given if program.loss is not None else None
    objective = Objective(loss, [(item.name, item.tensor, item.gradient) for item in sent], list(received), where)
    sizes = sizes_of(program, config)
    size = sizes["batch_size"]
    found: dict[Any, tf.Tensor] = {}
    first: PerExample | None = None
    checked: list[tf.Operation] = []
    for number, optimizer in enumerate(private):
        group = program.scope.wire if len(private) == 1 else f"{program.scope.wire}/{number}"
        terms = Terms(model._noise, _step(model), group, config.reduce, size, where)
        microbatched = optimizer.num_microbatches is not None and optimizer.num_microbatches != size
        model._noise.conditions[group] = {"kind": UPDATE, "microbatched": microbatched, **sizes}
        made = _private_step.private_gradients(optimizer, objective, assignments[optimizer][0], terms)
        found.update({v.ref(): g for g, v in made.pairs})
        first = first or made.gradients
        checked.append(made.checked)
    assert first is not None
    with tf.control_dependencies(checked):  # nothing goes back to the peer before it is known to be of single rows
        back = _private_step.finite([tf.identity(g) for g in first.received], where)
    if received and callable(config.reduce) and config.reduce not in (tf.reduce_mean, tf.reduce_sum):
        raise ConfigError(
            "opt_config REDUCE: a function cannot say what part of a private step's gradients belongs to the peer; "
            "expected 'mean' or 'sum'"
        )
    if received and config.backend_mode == "noise":
        clip, multiplier = _one_mechanism(private, name)
        for position, (tensor_name, _) in enumerate(received):
            terms = Terms(model._noise, _step(model), f"{program.scope.wire}/{tensor_name}/grad", where=where)
            model._noise.conditions[terms.group] = {"kind": RETURNED, **sizes}
            back[position] = _private_step.released_rows(back[position], clip, multiplier, first, terms)
    variables = list(dict.fromkeys(v for held, _ in assignments.values() for v in held))
    ordinary = [v for o, (held, _) in assignments.items() if o not in private for v in held]
    if ordinary:
        found.update(_ordinary(program, config, sent, ordinary))
    return Derivatives([found.get(v.ref()) for v in variables], back)


def _ordinary(
    program: Program, config: _gradients.OptConfig, sent: Sequence[Sent], variables: Sequence[tf.Variable]
) -> dict[Any, Any]:
    """Gradients of the reduced loss for optimizers that are not private."""
    if callable(config.reduce) and sent:
        raise ConfigError(
            "opt_config REDUCE: a function cannot reduce the gradients that the peer returns; expected 'mean' or 'sum'"
        )
    divided = [
        Sent(s.name, s.tensor, s.gradient / tf.cast(tf.shape(s.tensor)[0], s.gradient.dtype))
        if config.reduce == "mean"
        else s
        for s in sent
    ]
    derived = _gradients.differentiate(program.loss, divided, variables, [])
    return {v.ref(): g for v, g in zip(variables, derived.variables)}


def sizes_of(program: Program, config: _gradients.OptConfig) -> dict[str, Any]:
    """What the ledger keeps beside a release: how often a row takes part follows from it."""
    size = config.batch_size or _batch_size(program)
    return {"batch_size": size, "num_examples": config.num_examples, "drop_remainder": _drops(program)}


def _drops(program: Program) -> bool:
    readers = _readers.own(program)
    return bool(readers) and all(reader.drop_remainder for reader in readers)


def _batch_size(program: Program) -> int | None:
    """The nominal batch size: as the data's reader says, else as the loss's static shape does."""
    sizes = {reader.batch_size for reader in _readers.own(program)}
    if len(sizes) == 1:
        return int(sizes.pop())
    given = program.loss_given
    return given.shape[0] if given is not None and given.shape.rank else None


def _step(model: Model) -> tf.Tensor:
    return tf.cast(tf.identity(model.global_step), tf.int64)


def _one_mechanism(private: Sequence[PrivateOptimizer], name: str) -> tuple[float, float]:
    kinds = {(o.l2_norm_clip, o.noise_multiplier) for o in private}
    if len(kinds) > 1:
        raise ConfigError(
            f"BACKEND_MODE='noise': the private optimizers of {name} clip and noise differently ({kinds}), so nobody "
            "knows how to noise what is returned to the peer; give them the same, or BACKEND_MODE='unnoise'"
        )
    clip, multiplier = kinds.pop()
    if clip is None or multiplier is None:
        raise ModelError(
            f"BACKEND_MODE='noise': the optimizer of {name} has a mechanism of its own, which cannot noise what is "
            "returned to the peer; use a Gaussian optimizer, or BACKEND_MODE='unnoise'"
        )
    return clip, multiplier
