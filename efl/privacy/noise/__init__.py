"""Noise that leaves with what is released: drawn from a secret, keyed by what it covers, counted. No TensorFlow.

``Releases`` adds it; the secret is a ``Seed`` in a file of its own, what was released stands in a ``Ledger``.
"""

from __future__ import annotations

from efl.privacy.noise.labels import LABEL, Labels, Question, carry, label_epsilon
from efl.privacy.noise.ledger import Ledger
from efl.privacy.noise.phase import Phase
from efl.privacy.noise.releases import Releases
from efl.privacy.noise.seed import Seed
from efl.privacy.noise.stream import ROOM, gaussian, grid_of_rows

__all__ = [
    "LABEL",
    "ROOM",
    "Labels",
    "Ledger",
    "Phase",
    "Question",
    "Releases",
    "Seed",
    "carry",
    "gaussian",
    "grid_of_rows",
    "label_epsilon",
]
