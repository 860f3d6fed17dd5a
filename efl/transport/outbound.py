"""The sending half of the tensor exchange: the window, and the pieces of large tensors.

Pure: no sockets, threads or clocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from efl.errors import ConfigError
from efl.transport import codec
from efl.transport.handshake import TensorSpec, shape_fits


class Outgoing:
    """One tensor on its way out; ``offset`` is how far it has got."""

    __slots__ = ("code", "digest", "done", "index", "name", "offset", "payload", "shape", "step", "total")

    def __init__(self, name: str, index: int, step: int, array: codec.Encoded, digest: bytes) -> None:
        self.name, self.index, self.step, self.digest = name, index, step, digest
        self.code, self.shape, self.payload = array
        self.total = len(self.payload)
        self.offset = 0
        self.done = False


class Outbound:
    """Keeps what this party sends within what was agreed and what the peer can hold.

    Attributes:
      messages: Tensors begun so far.
      bytes: Their bytes.
      consumed: Tensors that the peer has said it consumed.
      consumed_bytes: Their bytes.
      window: How many messages may be begun and not consumed.
    """

    def __init__(self, specs: Sequence[TensorSpec], window_steps: int, max_outstanding: int, max_message: int) -> None:
        """Args:
        specs: What this party sends, in the order of its hello, with the shapes both agreed on.
        window_steps: The smaller of both sides'.
        max_outstanding: The smaller of both sides', in bytes.
        max_message: The smaller of both sides', in bytes.
        """
        self._specs = specs
        self._index = {spec.name: i for i, spec in enumerate(specs)}
        self._last_step = [-1] * len(specs)
        # The dtype, shape and size that passed the checks last: most tensors never change theirs.
        self._passed: list[tuple[int, tuple[int, ...], int] | None] = [None] * len(specs)
        self._busy: set[int] = set()
        self._max_outstanding = max_outstanding
        self._max_message = max_message
        self.window = window_steps * len(specs)
        self.messages = self.bytes = self.consumed = self.consumed_bytes = 0

    def prepare(self, name: str, step: int, array: np.ndarray, digest: bytes) -> Outgoing:
        """Checks a tensor against the agreement.

        Args:
          name: A tensor of the hello with direction "send".
          step: Larger than any step of that name before.
          array: What the hello said it would be.
          digest: Empty or 16 bytes.

        Returns:
          The tensor, not begun.

        Raises:
          ConfigError: Something of it is not as agreed.
        """
        index = self._index.get(name)
        if index is None:
            raise ConfigError(f"send({name!r}): not in this party's hello, which sends {sorted(self._index)}")
        encoded = codec.encode(array)
        form = (encoded.code, encoded.shape, len(encoded.payload))
        if not (0 <= step < 1 << 62 and len(digest) in (0, 16) and form == self._passed[index]):
            self._check(self._specs[index], step, encoded, digest)
            self._passed[index] = form
        return Outgoing(name, index, step, encoded, digest)

    def _check(self, spec: TensorSpec, step: int, encoded: codec.Encoded, digest: bytes) -> None:
        where = f"send({spec.name!r}, step={step})"
        if not 0 <= step < 1 << 62:
            raise ConfigError(f"{where}: expected a step of 0 to 2**62")
        if len(digest) not in (0, 16):
            raise ConfigError(f"{where}: expected a digest of 16 bytes or none, got {len(digest)} bytes")
        if encoded.code != codec.code_of(spec.dtype):
            raise ConfigError(f"{where}: dtype {spec.dtype} was agreed, the array has {codec.name_of(encoded.code)}")
        if not shape_fits(encoded.shape, spec.shape):
            raise ConfigError(
                f"{where}: shape {spec.shape} was agreed, the array has {encoded.shape}. Agreed is what the sender's "
                "static shape and the receiver's recv(shape=…) say together; None stands for what varies, as the rows "
                "do where the last batch is shorter"
            )
        if len(encoded.payload) > self._max_message:
            raise ConfigError(
                f"{where}: {len(encoded.payload)} bytes; max_message_bytes of the two parties allows "
                f"{self._max_message}"
            )

    def room(self, out: Outgoing) -> bool:
        """Whether ``out`` may begin now."""
        waiting = self.messages - self.consumed
        if out.index in self._busy or waiting >= self.window:
            return False
        return not waiting or self.bytes - self.consumed_bytes + out.total <= self._max_outstanding

    def begin(self, out: Outgoing) -> None:
        """Counts ``out`` against the window.

        Raises:
          ConfigError: The same or a later step of that name has been sent.
        """
        last = self._last_step[out.index]
        if out.step <= last:
            raise ConfigError(f"send({out.name!r}, step={out.step}): step {last} has been sent before; steps must grow")
        self._last_step[out.index] = out.step
        self._busy.add(out.index)
        self.messages += 1
        self.bytes += out.total

    def end(self, out: Outgoing) -> None:
        """The last piece of ``out`` is on its way."""
        out.done = True
        self._busy.discard(out.index)
