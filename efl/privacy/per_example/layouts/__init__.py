"""Where every tensor above a loss keeps its examples, and what mixes them.

``layout`` has the kinds, ``walk`` goes from the input to the loss; the other modules have the rules of the ops, which
are registered when they are loaded.
"""

from efl.privacy.per_example.layouts import control, elementwise, linear, shape, sparse

__all__ = ["control", "elementwise", "linear", "shape", "sparse"]
