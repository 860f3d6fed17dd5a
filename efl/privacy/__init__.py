"""Differential privacy (optimizers, per-example gradients, noise, accounting) and encrypted layers.

The optimizers are in ``efl`` too. What is promised, to whom, stands in the documentation, under "Differential privacy"
and "Encrypted layers".
"""

from __future__ import annotations

from efl.privacy.accounting import AdversaryTable, compute_dp_sgd_privacy, compute_noise, max_steps
from efl.privacy.encrypted import (
    EncryptActiveDense,
    EncryptActiveLayer,
    EncryptPassiveDense,
    EncryptPassiveLayer,
    PrivacyWarning,
)
from efl.privacy.hooks import PrivacyHook
from efl.privacy.label_dp import LabelDP, RRWithPrior
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
from efl.privacy.release import GaussianRelease

__all__ = [
    "AdversaryTable",
    "DPAdagradGaussianOptimizer",
    "DPAdagradOptimizer",
    "DPAdamGaussianOptimizer",
    "DPAdamOptimizer",
    "DPGradientDescentGaussianOptimizer",
    "DPGradientDescentOptimizer",
    "EncryptActiveDense",
    "EncryptActiveLayer",
    "EncryptPassiveDense",
    "EncryptPassiveLayer",
    "GaussianRelease",
    "LabelDP",
    "PrivacyHook",
    "PrivacyWarning",
    "RRWithPrior",
    "compute_dp_sgd_privacy",
    "compute_noise",
    "make_gaussian_optimizer_class",
    "make_optimizer_class",
    "max_steps",
]
