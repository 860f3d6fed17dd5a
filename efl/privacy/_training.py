"""The private half of ``compile``: gradients of a task of which an optimizer is private."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import tensorflow.compat.v1 as tf

from efl import _gradients, _passes, _readers
from efl._gradients import Derivatives, Sent
from efl._program import Program, ancestors
from efl._task_scope import MODE
from efl.errors import ConfigError, ModelError
from efl.privacy import _private_step
from efl.privacy._private_step import Terms
from efl.privacy._spent import RETURNED, UPDATE
from efl.privacy.optimizers import PrivateOptimizer
from efl.privacy.per_example import Objective, PerExample

if TYPE_CHECKING:
    from efl.model import Model
    from efl.privacy._deferred import Deferred


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
    objective = replace(objective, sampled=are_samples(program))
    size = config.batch_size or _batch_size(program)
    found: dict[Any, tf.Tensor] = {}
    first: PerExample | None = None
    checked: list[tf.Operation] = []
    for number, optimizer in enumerate(private):
        group = program.scope.wire if len(private) == 1 else f"{program.scope.wire}/{number}"
        defer = _deferring(model, program, optimizer, size) if len(private) == 1 else None
        terms = Terms(model._noise, _step(model), group, config.reduce, size, where, defer)
        microbatched = optimizer.num_microbatches is not None and optimizer.num_microbatches != size
        if microbatched and are_samples(program):
            raise ConfigError(
                f"{type(optimizer).__name__} of {name}: num_microbatches={optimizer.num_microbatches} with Poisson "
                "samples, whose size differs: leave num_microbatches out, so that each row is clipped by itself"
            )
        note_conditions(model, program, group, UPDATE, microbatched=microbatched)
        with optimizer.trusted():
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
            note_conditions(model, program, terms.group, RETURNED)
            back[position] = _private_step.released_rows(back[position], clip, multiplier, first, terms)
    variables = list(dict.fromkeys(v for held, _ in assignments.values() for v in held))
    ordinary = [v for o, (held, _) in assignments.items() if o not in private for v in held]
    if ordinary:
        found.update(_ordinary(program, config, sent, ordinary))
    return Derivatives([found.get(v.ref()) for v in variables], back)


def _deferring(
    model: Model, program: Program, optimizer: PrivateOptimizer, size: int | None
) -> Callable[[PerExample], Deferred | None] | None:
    """Decides of which tables the noise of rows that a step does not read may wait."""
    if not model._opt_config.defer_noise or size is None or optimizer.num_microbatches not in (None, size):
        return None
    rate = getattr(optimizer, "_learning_rate", None)
    rate = rate() if callable(rate) else rate
    if rate is None or any(op.type.startswith("Placeholder") for op in _behind(rate)):
        return None

    def defer(gradients: PerExample) -> Deferred | None:
        from efl.privacy import _deferred  # only models with large tables need it

        others = [t for p in model._programs.values() if p is not program and p.scope.mode is MODE.TRAIN
                  for t in _targets(model, p)]  # fmt: skip
        tables = _deferred.candidates(optimizer, gradients, _targets(model, program), others)
        chosen = [v for v, _ in tables]
        odd = [v for v in gradients.variables if v.dtype.base_dtype != tf.float32 or v.shape.num_elements() is None]
        if not chosen or odd:
            return None
        assert optimizer.l2_norm_clip is not None and optimizer.noise_multiplier is not None
        with tf.name_scope(None), tf.control_dependencies(None):
            factor = tf.cast(tf.convert_to_tensor(rate), tf.float64) / size
            deviation = optimizer.l2_norm_clip * optimizer.noise_multiplier
            made = _deferred.Deferred(tables, deviation, factor, model._noise.overdue)
        model._noise.deferred.append(made)
        return made

    return defer


def _behind(value: Any) -> list[tf.Operation]:
    return ancestors(value.op) if isinstance(value, tf.Tensor) else []


def _targets(model: Model, program: Program) -> list[Any]:
    """What a training step computes, as far as it is known before its updates are made."""
    sent = [item.tensor for item in model._sent(program.scope)]
    loss = [] if program.loss_given is None else [program.loss_given]
    return [*sent, *loss, *program.step_ops(), *model._shown(program.scope)]


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


def note_conditions(model: Model, program: Program, group: str, kind: str, **more: Any) -> None:
    """Notes what the ledger keeps beside the releases of a group: how often a row takes part follows from it.

    Raises:
      ConfigError: ``BATCH_SIZE`` is not what the data's reader has.
    """
    config, readers, name = model._opt_config, _readers.own(program), program.scope
    if program.scope.mode is not MODE.TRAIN:
        # Other rows than those of training, and nobody says how many, or how often they are read.
        model._noise.conditions[group] = {"kind": kind, "in_each": True, **more}
        return
    read = sorted({reader.batch_size for reader in readers})
    if config.batch_size and len(read) == 1 and read != [config.batch_size]:
        raise ConfigError(
            f"opt_config BATCH_SIZE: {config.batch_size}, but the reader of {name} has batch_size={read[0]}, from "
            "which follows how often a row takes part: leave BATCH_SIZE out"
        )
    batch_size = config.batch_size or _batch_size(program)
    passes = _passes.passes_of(program, batch_size)
    most = passes.most_rows
    if config.num_examples and most is not None and most[0] < config.num_examples:
        raise ConfigError(
            f"opt_config NUM_EXAMPLES: {config.num_examples}, but a pass over the data of {most[1]} has {most[0]} rows "
            f"at most, from which follows how often a row takes part: {name} has to be given the rows of a pass"
        )
    several = _passes.several_sources(_targets(model, program))
    if several:
        more["comes_again"] = several
    elif are_samples(program) and not all(reader.hides_batches for reader in readers):
        more["comes_again"] = (
            "Poisson samples were drawn by a seed of yours, so that some rows are known to come more often than "
            "others: leave seed out, and the draws follow from a secret"
        )
    elif passes.twice:
        advice = "shuffle before you repeat, or use efl.data.DataIO"
        more["comes_again"] = f"a row can come more than once in a pass ({passes.twice}): {advice}"
    if passes.straddles:
        more["straddles"] = True
    if passes.shifted:
        more["shifted"] = True
    model._noise.conditions[group] = {
        "kind": kind,
        "batch_size": batch_size,
        "num_examples": config.num_examples,
        "drop_remainder": _drops(program, passes),
        "poisson": are_samples(program),
        **more,
    }
    if len(readers) == 1:
        model._noise.counts[group] = readers[0].num_examples


def are_samples(program: Program) -> bool:
    """Whether the batches of a task are Poisson samples."""
    readers = _readers.own(program)
    return bool(readers) and all(reader.samples for reader in readers)


def _drops(program: Program, passes: _passes.Passes) -> bool:
    """Whether an epoch may end without its last rows."""
    readers = _readers.own(program)
    if readers:
        return all(reader.drop_remainder for reader in readers)
    # Where nobody can tell, fewer batches are taken for a pass: then there are more passes, and a row comes more often.
    return passes.drops is not False


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
