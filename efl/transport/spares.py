"""Large receive buffers, used again once nobody holds what they brought.

malloc returns a block of more than 32 MiB to the system when it is freed, and the system zeroes every page of the next
one before it can be written: more work than receiving the bytes. A tensor that comes in every step comes into the same
memory again.
"""

from __future__ import annotations

import sys

import numpy as np

from efl.transport import codec

_LARGE = 32 << 20
_IDLE = 256  # messages


class _Spare:
    """A buffer; ``raw`` is referred to by whatever array or view still shows its bytes."""

    __slots__ = ("raw", "size", "used")

    def __init__(self, raw: np.ndarray, size: int, used: int) -> None:
        self.raw, self.size, self.used = raw, size, used

    @property
    def references(self) -> int:
        return sys.getrefcount(self.raw)


_UNUSED = _Spare(np.empty(0, np.uint8), 0, 0).references


class Spares:
    """The buffers of one conversation."""

    def __init__(self, most_bytes: int) -> None:
        """Args:
        most_bytes: How many bytes may lie unused.
        """
        self._most = most_bytes
        self._spares: list[_Spare] = []

    def allocate(self, size: int, count: int) -> np.ndarray:
        """A buffer of ``size`` bytes on a 64-byte boundary; its content is undefined.

        Args:
          size: Bytes.
          count: How many messages have begun: what was not used for 256 of them is given back.

        Raises:
          MemoryError: There is no memory for it.
        """
        if self._spares:
            self._drop(count)
        if size < _LARGE:
            return codec.allocate(size)
        for spare in self._spares:
            if spare.size == size and spare.references == _UNUSED:
                spare.used = count
                return codec.aligned(spare.raw, size)
        buffer = codec.allocate(size)
        assert isinstance(buffer.base, np.ndarray)
        self._spares.append(_Spare(buffer.base, size, count))
        return buffer

    def _drop(self, count: int) -> None:
        lying = 0
        for spare in sorted(self._spares, key=lambda spare: -spare.used):
            if spare.references != _UNUSED:
                continue
            lying += spare.size
            if lying > self._most or count - spare.used >= _IDLE:
                self._spares.remove(spare)
