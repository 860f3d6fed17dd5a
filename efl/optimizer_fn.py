"""Which optimizer trains which variables: functions to hand to ``model.optimizer_fn``.

    model.optimizer_fn(efl.optimizer_fn.optimizer_setter(tf.train.AdamOptimizer(0.001)))
    model.optimizer_fn(efl.optimizer_fn.scope_optimizer({"wide": tf.train.FtrlOptimizer(0.1),
                                                         "deep": tf.train.AdagradOptimizer(0.01)}))

An optimizer function of your own takes ``(model, task)`` and returns ``{optimizer: (variables, scope)}``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import tensorflow.compat.v1 as tf

from efl.errors import ModelError

if TYPE_CHECKING:
    from efl.model import Model

    OptimizerFn = Callable[[Model, "str | None"], Mapping[Any, tuple[list[tf.Variable], "str | None"]]]

_log = logging.getLogger("efl")


def optimizer_setter(opt: tf.train.Optimizer) -> OptimizerFn:
    """One optimizer for all trainable variables that the task's objective depends on.

    Args:
      opt: A ``tf.train`` optimizer.

    Returns:
      A function for ``model.optimizer_fn``.

    Raises:
      ModelError: ``opt`` is not such an optimizer.
    """
    _check(opt)

    def optimizer_fn(model: Model, task: str | None) -> Mapping[Any, tuple[list[tf.Variable], str | None]]:
        return {opt: (tf.trainable_variables(), None)}

    return optimizer_fn


def scope_optimizer(scope_to_opt: Mapping[str, tf.train.Optimizer]) -> OptimizerFn:
    """One optimizer for each variable scope.

    A variable belongs to the longest of the given scopes that contains it; ``""`` contains all. Variables in none of
    them are not trained, and a warning names them.

    Args:
      scope_to_opt: Variable scope -> optimizer; an optimizer may serve several scopes.

    Returns:
      A function for ``model.optimizer_fn``.

    Raises:
      ModelError: Not a mapping of names to optimizers; when the model is compiled, a scope without trainable variables.
    """
    if not isinstance(scope_to_opt, Mapping) or not scope_to_opt:
        raise ModelError(f"scope_optimizer: expected a dict of variable scope -> optimizer, got {scope_to_opt!r:.100}")
    for scope, opt in scope_to_opt.items():
        if not isinstance(scope, str):
            raise ModelError(f"scope_optimizer: {scope!r} is not the name of a variable scope")
        _check(opt)

    def optimizer_fn(model: Model, task: str | None) -> Mapping[Any, tuple[list[tf.Variable], str | None]]:
        members: dict[str, list[tf.Variable]] = {scope: [] for scope in scope_to_opt}
        orphans = []
        for variable in tf.trainable_variables():
            holders = [s for s in scope_to_opt if not s or variable.op.name.startswith(s.rstrip("/") + "/")]
            if holders:
                members[max(holders, key=len)].append(variable)
            else:
                orphans.append(variable.op.name)
        empty = sorted(scope for scope, held in members.items() if not held)
        if empty:
            names = ", ".join(v.op.name for v in tf.trainable_variables())
            raise ModelError(
                f"scope_optimizer: no trainable variable lies in scope {', '.join(empty)}; there are: {names}"
            )
        if orphans:
            _log.warning("scope_optimizer: in none of the scopes, so not trained: %s", ", ".join(orphans))
        result: dict[Any, tuple[list[tf.Variable], str | None]] = {}
        for scope, opt in scope_to_opt.items():
            held, seen = result.get(opt, ([], None))
            result[opt] = (held + members[scope], scope if opt not in result else f"{seen},{scope}")
        return result

    return optimizer_fn


def _check(opt: Any) -> None:
    if not isinstance(opt, tf.train.Optimizer):
        raise ModelError(
            f"{opt!r:.100} is no optimizer of tf.train: expected an object such as "
            "tf.compat.v1.train.GradientDescentOptimizer(0.1) (a Keras optimizer does not work in a v1 graph)"
        )
