"""The products that a layer's two parties compute with shares, one class for each kind of layer.

W = V + U: V is the leader's share, U the follower's. Exponents are not negative, so multipliers have an offset, which
the follower takes off: it knows the sum of what was multiplied.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np

from efl.paillier.slots import Slots
from efl.protocol import drawn, exact
from efl.protocol import widths as w
from efl.protocol.scheme import Plain, PublicScheme
from efl.protocol.widths import Kind, Widths

_SHARE_OFFSET = 1 << (w.SHARE_BITS - 1)
_STEP_OFFSET = 1 << w.STEP_BITS
_STEP_EXPONENT_BITS = w.STEP_BITS + 1


class Products(ABC):
    """What depends on the kind of a layer. All arrays are integers.

    Args:
      scheme: Packs and multiplies.
      widths: Of the layer and batch.

    Attributes:
      outputs: Slots of Z, along the batch.
      features: Slots of x as it is encrypted for the weights' gradient, along the features.
      updates: Slots of that gradient as it is masked.
      gradients: Slots of dX.
      inputs: (groups, m) of x as it is encrypted for Z.
      shares: (groups, m) of U as it is encrypted for dX.
      updated: (groups, m) of the weights' gradient.
      returned: (groups, m) of dX.
      exactly: The product of x or dY with a share, of integers beyond int64: see ``exact``.
    """

    exactly: Callable[[np.ndarray, int, np.ndarray], tuple[list[np.ndarray], int]]

    outputs: Slots
    features: Slots
    updates: Slots
    gradients: Slots
    inputs: tuple[int, int]
    shares: tuple[int, int]
    updated: tuple[int, int]
    returned: tuple[int, int]

    def __init__(self, scheme: PublicScheme, widths: Widths) -> None:
        self.scheme, self.widths = scheme, widths
        self.outputs = scheme.slots(widths.batch, widths.output_slot_bits)
        self.features = scheme.slots(widths.inputs, widths.update_slot_bits)
        self.inputs = self.outputs.groups, widths.inputs

    # ---- the leader's

    @abstractmethod
    def output(self, x: Any, share: np.ndarray) -> Any:
        """Enc(x)·(V + offset)."""

    @abstractmethod
    def weight_gradient(self, x: Any, step: np.ndarray) -> Any:
        """Enc(x)ᵀ·(step + offset)."""

    @abstractmethod
    def update_mask(self, change: np.ndarray) -> np.ndarray:
        """What is added to it, as ``updates`` lie: ``change`` where a weight's gradient is, elsewhere anything."""

    @abstractmethod
    def input_gradient(self, share: Any, step: np.ndarray) -> Any:
        """Enc(U)·(step + offset)."""

    @abstractmethod
    def own_input_gradient(self, share: np.ndarray, step: np.ndarray, bell: np.ndarray) -> Plain:
        """V·step, and a bell ``[B, inputs]``."""

    # ---- the follower's

    @abstractmethod
    def pack_share(self, share: np.ndarray) -> Plain:
        """U, as ``input_gradient`` multiplies it."""

    def own_output(self, x: np.ndarray, share: np.ndarray, bell: np.ndarray) -> Plain:
        """x·(U - offset), and a bell ``[B, outputs]``."""
        bits = w.INPUT_BITS + w.INPUT_LIMIT_BITS + 1
        limbs, limb_bits = self.exactly(x, bits, share - _SHARE_OFFSET)
        limbs[0] = limbs[0] + bell
        return self.scheme.pack_wide(limbs, limb_bits, self.outputs)

    @abstractmethod
    def weight_gradient_offset(self, x: np.ndarray) -> np.ndarray:
        """offset·Σ x, to be taken off."""

    @abstractmethod
    def picked(self, unpacked: np.ndarray) -> np.ndarray:
        """The weights' gradient, of the share's shape, out of what was unpacked as ``updates`` lie."""

    @abstractmethod
    def input_gradient_offset(self, share: np.ndarray) -> Plain:
        """offset·Σ U, to be taken off."""

    @abstractmethod
    def as_rows(self, unpacked: np.ndarray) -> np.ndarray:
        """dX ``[B, inputs]``, out of what was unpacked."""


class _Dense(Products):
    """Z = X·W, W ``[inputs, outputs]``."""

    exactly = staticmethod(exact.matmul)

    def __init__(self, scheme: PublicScheme, widths: Widths) -> None:
        super().__init__(scheme, widths)
        self.gradients = scheme.slots(widths.inputs, widths.input_gradient_slot_bits)
        self.shares = self.gradients.groups, widths.outputs
        groups, count = self.features.groups, self.features.count
        self.updates = Slots(groups * count, self.features.bits, count, groups)
        self.updated = groups, widths.outputs
        self.returned = self.gradients.groups, widths.batch

    def output(self, x: Any, share: np.ndarray) -> Any:
        return self.scheme.matmul(x, (share + _SHARE_OFFSET).astype(np.uint64), w.SHARE_BITS)

    def weight_gradient(self, x: Any, step: np.ndarray) -> Any:
        return self.scheme.matmul(x, (step + _STEP_OFFSET).astype(np.uint64), _STEP_EXPONENT_BITS)

    def update_mask(self, change: np.ndarray) -> np.ndarray:
        """Slots beyond the features are masked too: they hold what the follower has put there, times the gradient."""
        unused = self.updates.length - self.widths.inputs, self.widths.outputs
        return np.concatenate([change, drawn.wide(unused, w.SHARE_BITS + self.widths.update_shift)])

    def input_gradient(self, share: Any, step: np.ndarray) -> Any:
        exponents = np.ascontiguousarray(step.T + _STEP_OFFSET).astype(np.uint64)
        return self.scheme.matmul(share, exponents, _STEP_EXPONENT_BITS)

    def own_input_gradient(self, share: np.ndarray, step: np.ndarray, bell: np.ndarray) -> Plain:
        limbs, bits = self.exactly(step, _STEP_EXPONENT_BITS, np.ascontiguousarray(share.T))
        limbs[0] = limbs[0] + bell
        return self.scheme.pack_wide([limb.T for limb in limbs], bits, self.gradients)

    def pack_share(self, share: np.ndarray) -> Plain:
        return self.scheme.pack_wide([share], 0, self.gradients)

    def weight_gradient_offset(self, x: np.ndarray) -> np.ndarray:
        return (x.sum(0) << w.STEP_BITS)[:, np.newaxis]

    def picked(self, unpacked: np.ndarray) -> np.ndarray:
        return unpacked[: self.widths.inputs]

    def input_gradient_offset(self, share: np.ndarray) -> Plain:
        total = share.astype(object).sum(1, keepdims=True) << w.STEP_BITS
        limbs = [(total & ((1 << 60) - 1)).astype(np.int64), (total >> 60).astype(np.int64)]
        return self.scheme.pack_wide(limbs, 60, self.gradients)

    def as_rows(self, unpacked: np.ndarray) -> np.ndarray:
        return unpacked.T


class _Elementwise(Products):
    """Z = x∘w, w ``[inputs]``."""

    exactly = staticmethod(exact.multiply)

    def __init__(self, scheme: PublicScheme, widths: Widths) -> None:
        super().__init__(scheme, widths)
        self.gradients = scheme.slots(widths.batch, widths.input_gradient_slot_bits)
        self.shares = 1, widths.inputs
        count = self.features.count
        self.updates = Slots(count, self.features.bits, count, 1)
        self.updated = 1, widths.inputs
        self.returned = self.gradients.groups, widths.inputs

    def output(self, x: Any, share: np.ndarray) -> Any:
        return self.scheme.times(x, (share + _SHARE_OFFSET).astype(np.uint64), w.SHARE_BITS)

    def weight_gradient(self, x: Any, step: np.ndarray) -> Any:
        exponents = (step + _STEP_OFFSET).astype(np.uint64)
        return self.scheme.times_each(x, exponents, _STEP_EXPONENT_BITS, self.features)

    def update_mask(self, change: np.ndarray) -> np.ndarray:
        """Column j is the ciphertext of feature j; its other slots hold products of features that nobody asked for."""
        count, d = self.features.count, self.widths.inputs
        mask = drawn.wide((count, d), w.SHARE_BITS + self.widths.update_shift)
        mask[np.arange(d) % count, np.arange(d)] = change
        return mask

    def input_gradient(self, share: Any, step: np.ndarray) -> Any:
        exponents = (step + _STEP_OFFSET).astype(np.uint64)
        return self.scheme.spread(share, exponents, _STEP_EXPONENT_BITS, self.gradients)

    def own_input_gradient(self, share: np.ndarray, step: np.ndarray, bell: np.ndarray) -> Plain:
        limbs, bits = self.exactly(step, _STEP_EXPONENT_BITS, share)
        limbs[0] = limbs[0] + bell
        return self.scheme.pack_wide(limbs, bits, self.gradients)

    def pack_share(self, share: np.ndarray) -> Plain:
        return share.astype(object)[np.newaxis]

    def weight_gradient_offset(self, x: np.ndarray) -> np.ndarray:
        return x.sum(0) << w.STEP_BITS

    def picked(self, unpacked: np.ndarray) -> np.ndarray:
        features = np.arange(self.widths.inputs)
        return unpacked[features % self.features.count, features]

    def input_gradient_offset(self, share: np.ndarray) -> Plain:
        # In slots of rows only: the exponent of a slot that is not used is 0.
        low, high = (share & ((1 << 40) - 1)) << w.STEP_BITS, share >> 40
        limbs = [np.broadcast_to(limb, (self.widths.batch, self.widths.inputs)) for limb in (low, high)]
        return self.scheme.pack_wide(limbs, 40 + w.STEP_BITS, self.gradients)

    def as_rows(self, unpacked: np.ndarray) -> np.ndarray:
        return unpacked


_OF_KIND: dict[Kind, type[Products]] = {Kind.DENSE: _Dense, Kind.ELEMENTWISE: _Elementwise}


def products_of(scheme: PublicScheme, widths: Widths) -> Products:
    """Of a layer's kind."""
    return _OF_KIND[widths.kind](scheme, widths)
