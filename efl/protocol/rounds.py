"""The rounds of a layer whose weights W = V + U nobody holds: the leader has V, the follower U and the private key.

    message   direction   what
    origin    L → F       whether W began as weights that the leader knows, so that U began as 0
    head      F → L       rows of the batch; the tag of U
    xc        F → L       Enc(x), packed along the batch
    xr, u     F → L       Enc(x) packed along the features, Enc(U); in training
    zc        L → F       Enc(x·V + R), R uniform mod n
    zp        F → L       x·V + R + x·U + bell mod n; the leader takes R off and has Z
    dw        L → F       Enc(xᵀ·(learning_rate·dY)·2^sh + mask), mask = (V' - V + μ·P)·2^sh + low; in training
    dx, scale L → F       Enc(dY·(V + U) + bell), and the power of two by which dY was multiplied

After it the shares are V' and U' = U - Q', Q' = ⌊dw / 2^sh + μ·Q⌋, which is an unbiased rounding: W' = W - M', where
M' = μ·M + learning_rate·xᵀ·dY is the velocity, of which the leader's share is P' = V - V' and the follower's Q'.
Without momentum μ is 0. Both parties hash what was sent into the tag of their share, so that shares which are not of
one another are recognised.

The follower learns dX (with a bell on it), the largest magnitude in dY to a power of two, and nothing else; the leader
learns Z (with a bell on it). ``docs/encrypted_layers.md`` tells what follows from these.
"""

from __future__ import annotations

import enum
import hashlib
from dataclasses import dataclass

import numpy as np

from efl.errors import DataError
from efl.protocol import widths as w

TAG_BYTES = 32
HEAD_BYTES = 8 + TAG_BYTES
SCALE_RANGE = 200  # of the power of two by which dY is multiplied


class Form(enum.Enum):
    """What a message consists of: how its static shape follows from the key."""

    CIPHERTEXTS = "ciphertexts"  # uint8 [count, bytes of n²]
    PLAINTEXTS = "plaintexts"  # uint8 [count, bytes of n]
    HEAD = "head"  # uint8 [40]
    NUMBER = "number"  # int64 []


@dataclass(frozen=True)
class Message:
    """One message of the rounds.

    Attributes:
      from_follower: Who sends it.
      form: What it consists of.
      in_training: Whether it is sent in training only.
    """

    from_follower: bool
    form: Form
    in_training: bool = False


MESSAGES = {
    "origin": Message(False, Form.NUMBER),
    "head": Message(True, Form.HEAD),
    "xc": Message(True, Form.CIPHERTEXTS),
    "zc": Message(False, Form.CIPHERTEXTS),
    "zp": Message(True, Form.PLAINTEXTS),
    "xr": Message(True, Form.CIPHERTEXTS, in_training=True),
    "u": Message(True, Form.CIPHERTEXTS, in_training=True),
    "dw": Message(False, Form.CIPHERTEXTS, in_training=True),
    "dx": Message(False, Form.CIPHERTEXTS, in_training=True),
    "scale": Message(False, Form.NUMBER, in_training=True),
}


@dataclass(frozen=True)
class Share:
    """One party's part of W.

    Attributes:
      values: int64, of the shape of W, multiples of 2**-16.
      tag: uint8 ``[32]``; that of the other party's share is the same.
      velocity: This party's part of what W moved by in the last step, as ``values``; None without momentum.
    """

    values: np.ndarray
    tag: np.ndarray
    velocity: np.ndarray | None = None

    def updated(self, values: np.ndarray, message: np.ndarray) -> Share:
        """The share after the update that a message has made."""
        digest = hashlib.sha256(self.tag.tobytes() + np.ascontiguousarray(message).tobytes()).digest()
        moved = None if self.velocity is None else self.values - values
        return Share(values, np.frombuffer(digest, np.uint8), moved)

    def carried(self, momentum: float, shift: int) -> np.ndarray | int:
        """What the last step's movement adds to this one's, times 2**shift, to the nearest integer."""
        if self.velocity is None:
            return 0
        factor = round(momentum * 2.0**w.MOMENTUM_BITS)
        half = 1 << (w.MOMENTUM_BITS - 1)
        return ((self.velocity.astype(object) * factor << shift) + half) >> w.MOMENTUM_BITS


def first_share(values: np.ndarray, momentum: float = 0.0) -> Share:
    """The share of a layer that was never trained, from weights (float64).

    Raises:
      DataError: A weight is NaN, infinite or beyond ±8.
    """
    most = 2.0**w.WEIGHT_LIMIT_BITS
    beyond = np.count_nonzero(~(np.abs(values) <= most))
    if beyond:
        raise DataError(
            f"encrypted layer: {beyond} of {np.size(values)} initial weights are NaN or beyond ±{most:g}: give an "
            "initializer of smaller ones, or none"
        )
    whole = np.rint(values * 2.0**w.WEIGHT_BITS).astype(np.int64)
    return Share(whole, np.zeros(TAG_BYTES, np.uint8), np.zeros_like(whole) if momentum else None)
