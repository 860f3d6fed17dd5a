"""Vertical federated learning for TensorFlow: parties that hold different columns of the same rows train one model.

    import efl
    import tensorflow.compat.v1 as tf

    model = efl.FederalModel()
    model.input_fn(...).loss_fn(...).optimizer_fn(...)
    model.compile()
    model.fit(efl.procedure_fn.train(), log_step=100)

Importing efl parses no arguments, opens no port, and loads no module of its own before it is used. It has one effect:
as soon as both efl and TensorFlow are imported, in either order, TensorFlow is in graph mode with resource variables
and legacy Keras. ``EFL_KEEP_EAGER=1`` in the environment leaves TensorFlow alone.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from efl import _tensorflow

if TYPE_CHECKING:
    from efl import data, errors, hooks, metrics, optimizer_fn, privacy, procedure_fn, settings, stage
    from efl._task_scope import MODE, TaskScope, current_task_scope, task_scope
    from efl.communicator import Communicator
    from efl.federal_model import FederalModel
    from efl.federal_sample import FederalSample
    from efl.model import Model
    from efl.privacy.optimizers import (
        DPAdagradGaussianOptimizer,
        DPAdagradOptimizer,
        DPAdamGaussianOptimizer,
        DPAdamOptimizer,
        DPGradientDescentGaussianOptimizer,
        DPGradientDescentOptimizer,
        make_gaussian_optimizer_class,
        make_optimizer_class,
    )
    from efl.sample import Sample
    from efl.stage import Stage

__version__ = "0.1.0"

__all__ = [
    "MODE",
    "Communicator",
    "DPAdagradGaussianOptimizer",
    "DPAdagradOptimizer",
    "DPAdamGaussianOptimizer",
    "DPAdamOptimizer",
    "DPGradientDescentGaussianOptimizer",
    "DPGradientDescentOptimizer",
    "FederalModel",
    "FederalSample",
    "Model",
    "Sample",
    "Stage",
    "TaskScope",
    "__version__",
    "current_task_scope",
    "data",
    "errors",
    "hooks",
    "make_gaussian_optimizer_class",
    "make_optimizer_class",
    "metrics",
    "optimizer_fn",
    "privacy",
    "procedure_fn",
    "settings",
    "stage",
    "task_scope",
]

# Where each public name comes from. A name that maps to itself is a module.
_SOURCES = {
    "MODE": "efl._task_scope",
    "Communicator": "efl.communicator",
    "DPAdagradGaussianOptimizer": "efl.privacy.optimizers",
    "DPAdagradOptimizer": "efl.privacy.optimizers",
    "DPAdamGaussianOptimizer": "efl.privacy.optimizers",
    "DPAdamOptimizer": "efl.privacy.optimizers",
    "DPGradientDescentGaussianOptimizer": "efl.privacy.optimizers",
    "DPGradientDescentOptimizer": "efl.privacy.optimizers",
    "FederalModel": "efl.federal_model",
    "FederalSample": "efl.federal_sample",
    "Model": "efl.model",
    "Sample": "efl.sample",
    "Stage": "efl.stage",
    "TaskScope": "efl._task_scope",
    "current_task_scope": "efl._task_scope",
    "data": "efl.data",
    "errors": "efl.errors",
    "hooks": "efl.hooks",
    "make_gaussian_optimizer_class": "efl.privacy.optimizers",
    "make_optimizer_class": "efl.privacy.optimizers",
    "metrics": "efl.metrics",
    "optimizer_fn": "efl.optimizer_fn",
    "privacy": "efl.privacy",
    "procedure_fn": "efl.procedure_fn",
    "settings": "efl.settings",
    "stage": "efl.stage",
    "task_scope": "efl._task_scope",
}

_tensorflow.install()


def __getattr__(name: str) -> Any:
    if name not in _SOURCES:
        raise AttributeError(f"module 'efl' has no attribute {name!r}")
    _tensorflow.install()  # again, for a TensorFlow that was halfway through its import when efl was imported
    source = _SOURCES[name]
    module = importlib.import_module(source)
    value = module if source == f"efl.{name}" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
