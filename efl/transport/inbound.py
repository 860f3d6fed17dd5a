"""The receiving half of the tensor exchange: checks every data frame, puts the pieces of large tensors
together.

Pure: no sockets, threads or clocks. Memory is taken only after a frame has passed every check, once per
tensor, and what is not yet consumed is bounded by the window, whatever the peer does. As much may lie ready for the
next.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from efl.errors import ProtocolError
from efl.transport import codec
from efl.transport.frame import Frame
from efl.transport.handshake import TensorSpec, shape_fits
from efl.transport.limits import Limits
from efl.transport.spares import Spares

_MAX_STEP = 1 << 62
_new = tuple.__new__  # a third of the time of a named tuple's own constructor


class Message(NamedTuple):
    """A whole tensor that arrived. ``nbytes`` is what it counts against the window until it is consumed."""

    name: str
    step: int
    array: np.ndarray
    digest: bytes
    nbytes: int


class _Partial(NamedTuple):
    first: Frame
    buffer: np.ndarray
    filled: int


def _apart(payload: memoryview) -> memoryview:
    """The same bytes, copied where they would keep a message alive that is more than twice as large: the window counts
    only what was asked for.
    """
    whole: bytes = payload.obj  # type: ignore[assignment]  # a frame's payload is a view into the message's bytes
    return memoryview(bytes(payload)) if len(whole) > 2 * len(payload) + 1024 else payload


class Inbound:
    """Turns the peer's data frames into messages.

    Attributes:
      messages: Tensors begun so far.
      bytes: Their bytes.
      consumed: Tensors that this party has taken so far.
      consumed_bytes: Their bytes.
      window: How many messages may be begun and not consumed.
    """

    def __init__(self, specs: Sequence[TensorSpec], limits: Limits) -> None:
        """Args:
        specs: The tensors that the peer sends, in the order of its hello, with the shapes both agreed on.
        limits: This party's bounds.
        """
        self._specs = specs
        self._codes = [codec.code_of(spec.dtype) for spec in specs]
        self._limits = limits
        self._last_step = [-1] * len(specs)
        # The dtype, shape and size that passed the checks last: most tensors never change theirs.
        self._passed: list[tuple[int, tuple[int, ...], int] | None] = [None] * len(specs)
        self._partial: dict[int, _Partial] = {}
        self._spares = Spares(limits.max_outstanding_bytes)
        self.window = limits.window_steps * len(specs)
        self.messages = self.bytes = self.consumed = self.consumed_bytes = 0

    def step_of(self, name: str) -> int:
        """The newest step of tensor ``name`` that has begun to arrive, -1 before the first."""
        return max((self._last_step[i] for i, spec in enumerate(self._specs) if spec.name == name), default=-1)

    def accept(self, frame: Frame) -> Message | None:
        """Takes one data frame.

        Args:
          frame: A frame of kind DATA, in sequence.

        Returns:
          The tensor when this frame completes it, else None.

        Raises:
          ProtocolError: The frame is not what was agreed, or more than the window allows.
        """
        number, total = frame.tensor, frame.total
        if number >= len(self._specs):
            raise ProtocolError(
                f"a frame names tensor number {number}, only {len(self._specs)} were agreed in the handshake"
            )
        if number in self._partial:
            return self._continue(frame, self._partial[number])
        if not self._last_step[number] < frame.step < _MAX_STEP:
            raise self._fail(frame, f"steps must grow; step {self._last_step[number]} has arrived before")
        if self._passed[number] != (frame.dtype, frame.shape, total):
            self._check_form(frame)
        waiting = self.messages - self.consumed
        if waiting:
            self._check_window(frame, waiting)
        self._last_step[number] = frame.step
        self.messages += 1
        self.bytes += total
        if frame.offset == 0 and len(frame.payload) == total:
            return self._finish(frame, _apart(frame.payload))
        self._check_piece(frame, 0)
        try:
            buffer = self._spares.allocate(total, self.messages)
        except MemoryError:
            raise self._fail(frame, f"there is no memory for its {total} bytes") from None
        first = _Partial(frame._replace(payload=memoryview(b"")), buffer, 0)
        return self._continue(frame, first)

    def _fail(self, frame: Frame, what: str) -> ProtocolError:
        return ProtocolError(f"tensor {self._specs[frame.tensor].name!r}, step {frame.step}: {what}")

    def _check_window(self, frame: Frame, waiting: int) -> None:
        waiting_bytes = self.bytes - self.consumed_bytes
        if waiting >= self.window or waiting_bytes + frame.total > self._limits.max_outstanding_bytes:
            raise self._fail(
                frame,
                f"the peer runs ahead of the window: {waiting} messages of {waiting_bytes} bytes are not consumed",
            )

    def _check_form(self, frame: Frame) -> None:
        spec, limits = self._specs[frame.tensor], self._limits
        if frame.dtype != self._codes[frame.tensor]:
            raise self._fail(frame, f"expected dtype {spec.dtype}, got {codec.name_of(frame.dtype)}")
        if any(d < 0 for d in frame.shape) or not shape_fits(frame.shape, spec.shape):
            raise self._fail(frame, f"expected shape {spec.shape}, got {frame.shape}")
        least, most = codec.payload_bytes(frame.dtype, frame.shape)
        if frame.total < least or (most is not None and frame.total > most):
            raise self._fail(frame, f"shape {frame.shape} of {spec.dtype} does not take {frame.total} bytes")
        if frame.total > limits.max_message_bytes:
            raise self._fail(frame, f"{frame.total} bytes; at most max_message_bytes={limits.max_message_bytes}")
        if frame.dtype != codec.STRING:
            self._passed[frame.tensor] = (frame.dtype, frame.shape, frame.total)

    def _check_piece(self, frame: Frame, expected: int) -> None:
        size = len(frame.payload)
        whole = expected == 0 and frame.total == 0
        if frame.offset != expected or expected + size > frame.total or not (size or whole):
            raise self._fail(
                frame,
                f"a piece of {size} bytes at {frame.offset} does not continue {expected} of {frame.total} bytes",
            )

    def _continue(self, frame: Frame, partial: _Partial) -> Message | None:
        first, buffer, filled = partial
        if (frame.step, frame.dtype, frame.shape, frame.total) != (
            first.step,
            first.dtype,
            first.shape,
            first.total,
        ):
            raise self._fail(frame, f"a piece of another message in the middle of step {first.step}")
        self._check_piece(frame, filled)
        end = filled + len(frame.payload)
        buffer[filled:end] = np.frombuffer(frame.payload, np.uint8)
        if end < frame.total:
            self._partial[frame.tensor] = _Partial(first, buffer, end)
            return None
        self._partial.pop(frame.tensor, None)
        return self._finish(first, buffer.data)

    def _finish(self, frame: Frame, payload: memoryview) -> Message:
        try:
            array = codec.decode(frame.dtype, frame.shape, payload)
        except ProtocolError as error:
            raise self._fail(frame, str(error)) from None
        return _new(Message, (self._specs[frame.tensor].name, frame.step, array, frame.digest, frame.total))
