"""Per-example gradients of a graph: their norms, and weighted sums of them, without the gradients themselves.

    gradients = per_example.differentiate(Objective(loss=vector), variables)
    squares, sums = gradients.clipped(variables, lambda s: tf.minimum(1.0, clip * tf.math.rsqrt(s)))

``layouts`` proves that an example's loss depends on no other example, ``rules`` know the ops that read variables,
``portions`` makes what is large for a part of the batch at a time, ``engine`` puts it together. Nothing here knows of
optimizers or of noise.
"""

from __future__ import annotations

from efl.privacy.per_example.engine import Objective, PerExample, as_vector, check, differentiate
from efl.privacy.per_example.layouts.sources import reads_input

__all__ = ["Objective", "PerExample", "as_vector", "check", "differentiate", "reads_input"]
