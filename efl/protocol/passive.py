"""The leader's half of the rounds: Z comes out, its gradient goes in. See ``rounds``."""

from __future__ import annotations

import logging
import os

import numpy as np

from efl.errors import DataError
from efl.protocol import drawn
from efl.protocol import widths as w
from efl.protocol.channel import Channel
from efl.protocol.products import Products, products_of
from efl.protocol.rounds import HEAD_BYTES, SCALE_RANGE, Share
from efl.protocol.scheme import PublicScheme
from efl.protocol.widths import Kind, Widths

_log = logging.getLogger("efl")
_MANY = 32  # weights of which nobody tries all
_MOST_STEP = (1 << w.STEP_BITS) - 1


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
        if gradient.shape != (len(gradient), self._shape[2]):
            raise DataError(
                f"encrypted layer {self._name!r}: its output's gradient is {list(gradient.shape)}: expected "
                f"[batch, {self._shape[2]}]"
            )
        if not np.isfinite(gradient).all():
            raise DataError(
                f"encrypted layer {self._name!r}: {np.count_nonzero(~np.isfinite(gradient))} of {gradient.size} "
                "numbers of its output's gradient are NaN or infinite: is the loss?"
            )
        if np.abs(gradient).max(initial=0.0) >= 2.0**SCALE_RANGE:
            raise DataError(
                f"encrypted layer {self._name!r}: numbers of its output's gradient are beyond 2^{SCALE_RANGE}: the "
                "training diverges, or the loss needs another scale"
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
        return products_of(self._scheme, Widths(*self._shape, batch, self._limit, bool(self._momentum)))

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


def _scale(gradient: np.ndarray) -> int:
    """The power of two by which the largest magnitude is brought below 2^13 - 1, to at least a quarter of it."""
    most = float(np.abs(gradient).max(initial=0.0))
    if not most:
        return 0
    exponent = w.STEP_BITS - 1 - int(np.frexp(most)[1])
    exponent += np.ldexp(most, exponent + 1) <= _MOST_STEP
    return max(-SCALE_RANGE, min(SCALE_RANGE, int(exponent)))
