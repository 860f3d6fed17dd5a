"""How many bits each number of a layer has, and which bounds follow. Both parties derive the same from the same shapes.

    number                fraction bits        bits, sign aside           what bounds it
    x, forward            12                   12 + 5                     |x| ≤ 32, refused or clipped
    x, for dW             8                    8 + 5                      the same
    W                     16                   16 + 3                     |W| ≤ 8, an assumption
    shares of W           16                   62                         drawn so
    learning_rate·dY      13 + ⌈log₂ B⌉        13                         ≤ 2^-⌈log₂ B⌉, clipped
    dY, for dX            follows from max|dY| 13                         the scale
    Z                     28                   28 + output bits           |Z| ≤ output_limit, refused beyond
    momentum              16                   16                         below 1

Hiding: the leader's new share covers Xᵀ·(lr·dY), which has ⌈log₂ B⌉ + 26 bits, by its 62 + sh = 67 + ⌈log₂ B⌉: 41 more.
Slots of Z and dX keep GUARD_BITS beyond their bound: what drifts out of it (larger weights than assumed, a larger
output) is met before it can reach a neighbour. Those of the weights' masked gradient keep two bits: its parts are all
drawn or clipped, and cannot drift.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass

from efl.errors import ConfigError

INPUT_LIMIT_BITS = 5  # |x| ≤ 32
INPUT_BITS, INPUT_ROW_BITS = 12, 8  # fraction of x: forward, and for the weights' gradient
WEIGHT_BITS = 16  # fraction of W
WEIGHT_LIMIT_BITS = 3  # |W| ≤ 8
SHARE_BITS = 62
MOMENTUM_BITS = 16
STEP_BITS = 13  # of learning_rate·dY and of dY, in magnitude
GUARD_BITS = 4
HIDING_BITS = 40
_BELL_BITS = 3  # it is below 2^(deviation + 3)


class Kind(enum.Enum):
    """What a layer computes of the follower's x ``[B, d]``."""

    DENSE = "dense"  # x @ W, W [d, units]
    ELEMENTWISE = "elementwise"  # x * w, w [d]


@dataclass(frozen=True)
class Widths:
    """The numbers of one layer and batch.

    Attributes:
      kind: Of the layer.
      inputs: d, columns of x.
      outputs: Columns of Z; d for ``ELEMENTWISE``.
      batch: B, rows.
      output_limit_bits: |Z| ≤ 2^this.
      momentum: Whether the update carries some of the last one.

    Raises:
      ConfigError: Something is not positive.
    """

    kind: Kind
    inputs: int
    outputs: int
    batch: int
    output_limit_bits: int = 6
    momentum: bool = False

    def __post_init__(self) -> None:
        if min(self.inputs, self.outputs, self.batch) < 1:
            raise ConfigError(
                f"encrypted layer: inputs={self.inputs}, outputs={self.outputs}, batch={self.batch}: expected "
                "positive numbers"
            )

    @property
    def share_shape(self) -> tuple[int, ...]:
        """Of W and of its shares."""
        return (self.inputs, self.outputs) if self.kind is Kind.DENSE else (self.inputs,)

    # ---- Z

    @property
    def output_bell_bits(self) -> int:
        """Deviation of what is added to Z, in units of 2^-28: 2.4e-4 for a sum of products, else 4.9e-4.

        Multiples of w, as x∘w are, show w by their period, unless it is lost in the noise: for |w| ≤ 2 it needs some
        10^15 numbers under the same w. Sums of several have none.
        """
        return 16 if self.kind is Kind.DENSE and self.inputs > 1 else 17

    @property
    def output_bits(self) -> int:
        """Fraction bits of Z."""
        return INPUT_BITS + WEIGHT_BITS

    @property
    def output_bound(self) -> int:
        """The largest magnitude of Z's integers."""
        return (1 << (self.output_bits + self.output_limit_bits)) + (1 << (self.output_bell_bits + _BELL_BITS))

    @property
    def output_slot_bits(self) -> int:
        """Of a slot of Z, at least. The bell, far smaller than the limit, takes a little of the guard."""
        return self.output_bits + self.output_limit_bits + 1 + GUARD_BITS

    # ---- the update of W

    @property
    def step_scale_bits(self) -> int:
        """Fraction bits of learning_rate·dY."""
        return STEP_BITS + _ceil_log2(self.batch)

    @property
    def update_shift(self) -> int:
        """sh: by how many bits the weights' gradient is finer than W."""
        return INPUT_ROW_BITS + self.step_scale_bits - WEIGHT_BITS

    @property
    def update_slot_bits(self) -> int:
        """Of a slot of the weights' masked gradient."""
        gradient = _ceil_log2(self.batch) + INPUT_LIMIT_BITS + INPUT_ROW_BITS + STEP_BITS
        if SHARE_BITS + self.update_shift < gradient + 1 + HIDING_BITS:
            raise AssertionError("a share would not hide the gradient of the weights")
        return SHARE_BITS + self.update_shift + 3 + self.momentum

    @property
    def update_bound(self) -> int:
        """The largest magnitude of the weights' masked gradient: a difference of shares, or two, and what it covers."""
        gradient = _ceil_log2(self.batch) + INPUT_LIMIT_BITS + INPUT_ROW_BITS + STEP_BITS + 2
        return (1 << (SHARE_BITS + self.update_shift + self.momentum)) + (1 << gradient)

    # ---- dX

    @property
    def input_gradient_bell_bits(self) -> int:
        """Deviation of what is added to dX, in units of dY's scale and W's: one unit of dY, or two; see above."""
        return 16 if self.kind is Kind.DENSE and self.outputs > 1 else 17

    @property
    def input_gradient_bound(self) -> int:
        """The largest magnitude of dX's integers."""
        terms = self.outputs if self.kind is Kind.DENSE else 1
        most = terms << (STEP_BITS + WEIGHT_BITS + WEIGHT_LIMIT_BITS)
        return most + (1 << (self.input_gradient_bell_bits + _BELL_BITS))

    @property
    def input_gradient_slot_bits(self) -> int:
        """Of a slot of dX, at least; see ``output_slot_bits``."""
        terms = self.outputs if self.kind is Kind.DENSE else 1
        return STEP_BITS + WEIGHT_BITS + WEIGHT_LIMIT_BITS + _ceil_log2(terms) + 1 + GUARD_BITS


def _ceil_log2(number: int) -> int:
    return math.ceil(math.log2(number)) if number > 1 else 0
