"""The follower's half of the rounds: its x goes in encrypted, its gradient comes back. See ``rounds``."""

from __future__ import annotations

import logging
import math
from dataclasses import replace

import numpy as np

from efl.errors import DataError
from efl.protocol import drawn
from efl.protocol import widths as w
from efl.protocol.channel import Channel
from efl.protocol.products import Products, products_of
from efl.protocol.rounds import SCALE_RANGE, Share
from efl.protocol.scheme import PrivateScheme
from efl.protocol.widths import Kind, Widths

_log = logging.getLogger("efl")
_MOST_SHARE = 1 << w.SHARE_BITS  # a share of the leader's has half of it, and weights are small beside that


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
        values = (share.values - moved).astype(object)
        if np.abs(values).max(initial=0) > _MOST_SHARE:
            raise DataError(
                f"{what}: it makes a share larger than shares are: the parties' shares are not of one layer"
            )
        new = share.updated(values.astype(np.int64), message)
        what = f"{self._name}/dx of the leader"
        plain = scheme.decrypt(channel.recv("dx"), *products.returned, what)
        plain = plain - products.input_gradient_offset(share.values)
        bound = products.widths.input_gradient_bound
        returned = products.as_rows(scheme.unpack(plain, products.gradients, bound, what))
        scale = _number(channel.recv("scale"), SCALE_RANGE, f"{self._name}/scale of the leader")
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
        return products_of(self._scheme, Widths(*self._shape, batch, self._limit, bool(self._momentum)))

    def _checked(self, x: np.ndarray) -> np.ndarray:
        if x.ndim == 2 and not len(x):
            raise DataError(
                f"encrypted layer {self._name!r}: the batch has no rows: end the data with the last batch that has "
                "any, at both parties"
            )
        if x.ndim != 2 or x.shape[1] != self._shape[1]:
            raise DataError(
                f"encrypted layer {self._name!r}: the input is {list(x.shape)}: expected [batch, {self._shape[1]}]"
            )
        return x

    def _encoded(self, x: np.ndarray) -> np.ndarray:
        from efl.paillier.encoding import encode

        who = f"encrypted layer {self._name!r}: its input"
        remedy = "let the layers before it keep them smaller (tf.tanh, a normalisation), or give clip=True"
        return encode(x, w.INPUT_BITS, float(1 << w.INPUT_LIMIT_BITS), self._clip, who, remedy)

    def _rows(self, x: np.ndarray, share: Share) -> np.ndarray:
        """x for the weights' gradient, rounded by chance: small inputs would never move a weight, or always too far."""
        most = 1 << (w.INPUT_LIMIT_BITS + w.INPUT_ROW_BITS)
        secret = drawn.secret_of(b"rows", self._scheme.secret, share.tag.tobytes())
        return drawn.rounded(secret, x.astype(np.float64) * 2.0**w.INPUT_ROW_BITS, most)


def _head(batch: int, tag: np.ndarray) -> np.ndarray:
    return np.frombuffer(batch.to_bytes(8, "little") + tag.tobytes(), np.uint8)


def _number(array: np.ndarray, most: int, what: str) -> int:
    if array.dtype != np.int64 or array.shape != () or abs(int(array)) > most:
        raise DataError(f"{what}: {array.dtype} {list(array.shape)}: expected one integer within ±{most}")
    return int(array)
