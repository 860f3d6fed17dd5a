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
import logging
import math
import os
from dataclasses import dataclass, replace

import numpy as np

from efl.errors import DataError
from efl.protocol import drawn
from efl.protocol import widths as w
from efl.protocol.channel import Channel
from efl.protocol.products import PRODUCTS, Products
from efl.protocol.scheme import PrivateScheme, PublicScheme
from efl.protocol.widths import Kind, Widths

_log = logging.getLogger("efl")
TAG_BYTES = 32
HEAD_BYTES = 8 + TAG_BYTES
_SCALE_RANGE = 200
_MANY = 32  # weights of which nobody tries all
_MOST_STEP = (1 << w.STEP_BITS) - 1


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
    """The share of a layer that was never trained, from weights (float64)."""
    whole = np.rint(values * 2.0**w.WEIGHT_BITS).astype(np.int64)
    return Share(whole, np.zeros(TAG_BYTES, np.uint8), np.zeros_like(whole) if momentum else None)


class ActiveLayer:
    """The follower's half: its x goes in, its gradient comes back.

    Args:
      scheme: With the private key.
      kind: Of the layer.
      inputs: Columns of x.
      outputs: Of Z.
      momentum: Of W's updates, from 0 up to 1; the same at both parties.
      name: Of the layer, for messages.
      output_limit_bits: |Z| ≤ 2^this.
      clip: Whether larger inputs than 32 are clipped, counted and logged rather than refused.
    """

    def __init__(
        self,
        scheme: PrivateScheme,
        kind: Kind,
        inputs: int,
        outputs: int,
        *,
        momentum: float = 0.0,
        name: str = "hetero",
        output_limit_bits: int = 6,
        clip: bool = False,
    ) -> None:
        self._scheme, self._shape, self._name, self._clip = scheme, (kind, inputs, outputs), name, clip
        self._momentum, self._limit, self._warned, self._looked = momentum, output_limit_bits, False, False

    def forward(self, channel: Channel, x: np.ndarray, share: Share, train: bool) -> Share:
        """Gives the leader its Z.

        Args:
          channel: Of this step.
          x: Real ``[B, inputs]``.
          share: U.
          train: Whether ``backward`` follows.

        Returns:
          The share for ``backward``: U, or nothing where W begins as weights that the leader knows.

        Raises:
          DataError: x is not finite or beyond ±32; or what comes is no answer to what was sent.
        """
        x = self._checked(x)
        products = self._products(len(x))
        fine = self._encoded(x)
        if train and not self._looked:
            self._looked = True
            self._look_at(fine)
        channel.send("head", _head(len(x), share.tag))
        channel.send("xc", self._scheme.encrypt(self._scheme.pack(fine, products.outputs)))
        if _number(channel.recv("origin"), 1, f"{self._name}/origin of the leader") and not share.tag.any():
            share = replace(share, values=np.zeros_like(share.values))
            self._warn_of_origin()
        if train:
            rows = self._rows(x, share)
            channel.send("xr", self._scheme.encrypt(self._scheme.pack(rows.T, products.features)))
            channel.send("u", self._scheme.encrypt(products.pack_share(share.values)))
        groups, m = products.outputs.groups, products.widths.outputs
        masked = self._scheme.decrypt(channel.recv("zc"), groups, m, f"{self._name}/zc of the leader")
        secret = drawn.secret_of(self._scheme.secret, share.tag.tobytes(), share.values.tobytes())
        bell = drawn.bell(secret, fine, m, products.widths.output_bell_bits)
        channel.send("zp", self._scheme.to_rows(masked + products.own_output(fine, share.values, bell)))
        return share

    def backward(self, channel: Channel, x: np.ndarray, share: Share) -> tuple[Share, np.ndarray]:
        """Takes the step that the leader's gradient asks for.

        Args:
          channel: Of this step.
          x: As in ``forward``.
          share: What ``forward`` returned.

        Returns:
          (the new share, dX float64 ``[B, inputs]``).

        Raises:
          DataError: What comes cannot be.
        """
        x = self._checked(x)
        products, scheme = self._products(len(x)), self._scheme
        rows = self._rows(x, share)
        message, what = channel.recv("dw"), f"{self._name}/dw of the leader"
        plain = scheme.decrypt(message, *products.updated, what)
        bound = products.widths.update_bound
        masked = products.picked(scheme.unpack(plain, products.updates, bound, what))
        shift = products.widths.update_shift
        moved = (masked - products.weight_gradient_offset(rows) + share.carried(self._momentum, shift)) >> shift
        new = share.updated((share.values - moved).astype(np.int64), message)
        what = f"{self._name}/dx of the leader"
        plain = scheme.decrypt(channel.recv("dx"), *products.returned, what)
        plain = plain - products.input_gradient_offset(share.values)
        bound = products.widths.input_gradient_bound
        returned = products.as_rows(scheme.unpack(plain, products.gradients, bound, what))
        scale = _number(channel.recv("scale"), _SCALE_RANGE, f"{self._name}/scale of the leader")
        return new, np.ldexp(returned.astype(np.float64), -(scale + w.WEIGHT_BITS))

    def _look_at(self, fine: np.ndarray) -> None:
        """Says where the first batch is of a kind that this layer hides less than others; only its values show it."""
        kind, _, outputs = self._shape
        if kind is Kind.ELEMENTWISE:
            return
        found = np.linalg.svd(fine * 2.0**-w.INPUT_BITS, compute_uv=False) / math.sqrt(len(fine))
        rank = int(np.count_nonzero(found > 2.0**-w.INPUT_BITS))
        if rank <= outputs and len(fine) > rank:
            _log.warning(
                "encrypted layer %r: its inputs have %d independent columns and it has %d units, so over two steps "
                "the leader can compute the products between rows of these inputs, also of new ones: take fewer units",
                self._name, rank, outputs,
            )  # fmt: skip
        if not (fine & 63).any():
            _log.warning(
                "encrypted layer %r: its inputs are multiples of 1/64, as raw features are: small integers can be "
                "found exactly out of one batch. Let trained layers come before it",
                self._name,
            )

    def _warn_of_origin(self) -> None:
        if not self._warned:
            self._warned = True
            _log.warning(
                "encrypted layer %r: the leader has given it weights that it knows; until the first update is made it "
                "can compute the inputs of this layer from what it gets",
                self._name,
            )

    def _products(self, batch: int) -> Products:
        return _products(self._scheme, self._shape, batch, self._limit, self._momentum)

    def _checked(self, x: np.ndarray) -> np.ndarray:
        if x.ndim != 2 or x.shape[1] != self._shape[1] or not len(x):
            raise DataError(
                f"encrypted layer {self._name!r}: the input is {list(x.shape)}: expected [batch, {self._shape[1]}]"
            )
        return x

    def _encoded(self, x: np.ndarray) -> np.ndarray:
        from efl.paillier.encoding import encode

        who = f"encrypted layer {self._name!r}: its input"
        return encode(x, w.INPUT_BITS, float(1 << w.INPUT_LIMIT_BITS), self._clip, who)

    def _rows(self, x: np.ndarray, share: Share) -> np.ndarray:
        """x for the weights' gradient, rounded by chance: small inputs would never move a weight, or always too far."""
        most = 1 << (w.INPUT_LIMIT_BITS + w.INPUT_ROW_BITS)
        secret = drawn.secret_of(b"rows", self._scheme.secret, share.tag.tobytes())
        return drawn.rounded(secret, x.astype(np.float64) * 2.0**w.INPUT_ROW_BITS, most)


class PassiveLayer:
    """The leader's half: Z comes out, its gradient goes in.

    Args:
      scheme: With the public key.
      kind: Of the layer.
      inputs: Columns of the follower's x.
      outputs: Of Z.
      learning_rate: Of W.
      momentum: Of W's updates, from 0 up to 1; the same at both parties.
      name: Of the layer, for messages.
      known_origin: Whether W begins as weights that the leader knows, so that the follower's share is nothing.
      output_limit_bits: |Z| ≤ 2^this.
    """

    def __init__(
        self,
        scheme: PublicScheme,
        kind: Kind,
        inputs: int,
        outputs: int,
        *,
        learning_rate: float,
        momentum: float = 0.0,
        name: str = "hetero",
        known_origin: bool = False,
        output_limit_bits: int = 6,
    ) -> None:
        self._origin = np.array(known_origin, np.int64)
        self._scheme, self._shape, self._rate, self._name = scheme, (kind, inputs, outputs), learning_rate, name
        self._momentum, self._limit = momentum, output_limit_bits

    def forward(self, channel: Channel, share: Share, batch: int | None = None) -> np.ndarray:
        """Gets Z.

        Args:
          channel: Of this step.
          share: V.
          batch: Rows of this party's batch, to be compared with the follower's.

        Returns:
          float64 ``[B, outputs]``.

        Raises:
          DataError: The batches or the shares do not belong together, or what comes cannot be.
        """
        channel.send("origin", self._origin)
        rows = self._batch_of(channel.recv("head"), share, batch)
        products, scheme = self._products(rows), self._scheme
        what = f"{self._name}/xc of the follower"
        product = products.output(scheme.read(channel.recv("xc"), *products.inputs, what), share.values)
        groups, m = products.outputs.groups, products.widths.outputs
        mask = scheme.uniform(groups, m)
        channel.send("zc", scheme.finish(product, mask))
        what = f"{self._name}/zp of the follower"
        plain = scheme.from_rows(channel.recv("zp"), groups, m, what) - mask
        found = scheme.unpack(plain, products.outputs, products.widths.output_bound, what)
        return found.astype(np.float64) * 2.0**-products.widths.output_bits

    def backward(self, channel: Channel, gradient: np.ndarray, share: Share) -> Share:
        """Updates W, and gives the follower its gradient.

        Args:
          channel: Of this step.
          gradient: dY, real ``[B, outputs]``.
          share: As in ``forward``.

        Returns:
          The new share.

        Raises:
          DataError: The gradient is not finite, or what comes is none of what was expected.
        """
        gradient = np.asarray(gradient, np.float64)
        if not np.isfinite(gradient).all():
            raise DataError(
                f"encrypted layer {self._name!r}: {np.count_nonzero(~np.isfinite(gradient))} of {gradient.size} "
                "numbers of its output's gradient are NaN or infinite: is the loss?"
            )
        products, scheme = self._products(len(gradient)), self._scheme
        widths = products.widths
        # V is uniform once it was updated; before, it may be what somebody can guess. And the follower, who has W - V,
        # could try all W of a few weights.
        origin = b"" if share.tag.any() and share.values.size >= _MANY else os.urandom(32)
        secret = drawn.secret_of(share.values.tobytes(), share.tag.tobytes(), origin)
        step = self._step(gradient, widths, secret)
        fresh = drawn.share(widths.share_shape)
        change = (fresh.astype(object) - share.values) << widths.update_shift
        change += share.carried(self._momentum, widths.update_shift)
        mask = products.update_mask(change + drawn.uniform(widths.share_shape, widths.update_shift))
        rows = products.features.groups, widths.batch
        x = scheme.read(channel.recv("xr"), *rows, f"{self._name}/xr of the follower")
        product = products.weight_gradient(x, step)
        message = scheme.finish(product, scheme.pack(mask, products.updates))
        channel.send("dw", message)
        scale = _scale(gradient)
        step = drawn.rounded(b"dx" + secret, np.ldexp(gradient, scale), _MOST_STEP)
        bell = drawn.bell(secret, step, widths.inputs, widths.input_gradient_bell_bits)
        other = scheme.read(channel.recv("u"), *products.shares, f"{self._name}/u of the follower")
        returned = products.input_gradient(other, step)
        channel.send("dx", scheme.finish(returned, products.own_input_gradient(share.values, step, bell)))
        channel.send("scale", np.array(scale, np.int64))
        return share.updated(fresh, message)

    def _products(self, batch: int) -> Products:
        return _products(self._scheme, self._shape, batch, self._limit, self._momentum)

    def _step(self, gradient: np.ndarray, widths: Widths, secret: bytes) -> np.ndarray:
        scaled = gradient * self._rate * 2.0**widths.step_scale_bits
        beyond = np.count_nonzero(np.abs(scaled) > _MOST_STEP)
        if beyond:
            _log.warning(
                "encrypted layer %r: %d of %d numbers of learning_rate times the output's gradient are larger than "
                "%.2g, and were clipped; a smaller learning_rate avoids it, or a loss that is the mean over the batch",
                self._name, beyond, scaled.size, _MOST_STEP * 2.0**-widths.step_scale_bits,
            )  # fmt: skip
        return drawn.rounded(b"dw" + secret, scaled, _MOST_STEP)

    def _batch_of(self, head: np.ndarray, share: Share, batch: int | None) -> int:
        if head.dtype != np.uint8 or head.shape != (HEAD_BYTES,):
            raise DataError(f"{self._name}/head of the follower: {head.dtype} {list(head.shape)}: not an efl of now")
        rows = int.from_bytes(head[:8].tobytes(), "little")
        if batch is not None and rows != batch:
            raise DataError(
                f"encrypted layer {self._name!r}: the follower's batch has {rows} rows and the leader's {batch}: give "
                "both the same batch size"
            )
        if not 1 <= rows <= 1 << 20:
            raise DataError(f"{self._name}/head of the follower: a batch of {rows} rows: expected 1 to 2^20")
        if head[8:].tobytes() != share.tag.tobytes():
            raise DataError(
                f"encrypted layer {self._name!r}: the parties' shares of its weights are not of one another: one party "
                "restored another checkpoint than the other. Let both restore the same, or start anew"
            )
        return rows


def _products(
    scheme: PublicScheme, shape: tuple[Kind, int, int], batch: int, limit_bits: int, momentum: float
) -> Products:
    kind, inputs, outputs = shape
    return PRODUCTS[kind](scheme, Widths(kind, inputs, outputs, batch, limit_bits, bool(momentum)))


def _head(batch: int, tag: np.ndarray) -> np.ndarray:
    return np.frombuffer(batch.to_bytes(8, "little") + tag.tobytes(), np.uint8)


def _scale(gradient: np.ndarray) -> int:
    """The power of two by which the largest magnitude is brought below 2^13 - 1, to at least a quarter of it."""
    most = float(np.abs(gradient).max(initial=0.0))
    if not most:
        return 0
    exponent = w.STEP_BITS - 1 - int(np.frexp(most)[1])
    exponent += np.ldexp(most, exponent + 1) <= _MOST_STEP
    return max(-_SCALE_RANGE, min(_SCALE_RANGE, int(exponent)))


def _number(array: np.ndarray, most: int, what: str) -> int:
    if array.dtype != np.int64 or array.shape != () or abs(int(array)) > most:
        raise DataError(f"{what}: {array.dtype} {list(array.shape)}: expected one integer within ±{most}")
    return int(array)
