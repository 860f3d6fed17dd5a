"""Standard normal variates from a cryptographic stream, and the grid on which what they are added to is released.

The stream is AES-256 in counter mode: whoever does not know the key cannot tell it from random bits. Each variate is
made of 64 of them, by the ziggurat method (Marsaglia and Tsang, 2000, "The ziggurat method for generating random
variables"), in double precision: the last ten say which of 1024 layers of equal area under the density, all of them
where in that layer. 3 in 1000 end near the layer's rim, where further bits of the stream decide, or draw again.

What floating point promises. No sampler with finitely many values is exactly Gaussian, and which values a release can
take at all may tell what the noise was added to (Mironov, 2012, "On significance of the least significant bits for
differential privacy"). So every release is rounded to a grid (``on_grid``) that does not depend on the data, of steps
of 2**-10 to 2**-9 standard deviations of its noise. A value on it stands for an interval of the real line. Of the 2**54
places in a layer 2**41 or more lie in each interval that the layer covers, and no two variates share any bits. What is
released is a rounded Gaussian, but for errors that move the ends of these intervals: of the places themselves, a few
units in the 53rd bit of the variate, and of the sum, 2**-53 of its size. For sums of up to 2**8 standard deviations
they are less than 2**-44 of a standard deviation, and change the probability of what is released by less than one part
in 2**33 on average. (Errors of the layers' tables, logarithm and exponential change it by parts in 2**46.) Over a run
that releases 2**27 numbers (26 000 weights, 5 000 steps) that adds less than 0.02 to ε if all of them point the same
way, some 10**-6 if they do not. Variates reach 13 standard deviations; beyond lies a probability of 10**-38.

That is an argument, not a proof: logarithm and exponential are numpy's. Nothing is promised of how long anything takes,
though no draw depends on the data. Nor of the sums themselves: they are formed in single precision, where rounding may
make two neighbouring ones differ by slightly more than the clip (Casacuberta et al., 2022, arXiv:2207.10635).
"""

from __future__ import annotations

import functools
import math
import threading
from dataclasses import dataclass

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

KEY_BYTES = 32
VERSION = 3  # changes with what a key draws: a release of another version cannot be repeated
_START = bytes(16)
_AT_ONCE = 1 << 14  # variates, so that what is worked on stays in the processor's cache
_LAYERS = 1 << 10
_STEPS = 9  # the grid has 2**9 to 2**10 steps in a standard deviation


def gaussian(key: bytes, count: int) -> np.ndarray:
    """Standard normal variates.

    Args:
      key: 32 bytes, used for nothing else.
      count: How many.

    Returns:
      float64 ``[count]``, the same for the same key and count.
    """
    out = np.empty(count)
    if count:
        _Ziggurat(key).fill(out)
    return out


class _Room(threading.local):
    """What a thread works in: to ask for it anew takes longer than to fill it."""

    def __init__(self) -> None:
        # As much as the cipher asks for.
        self.nothing, self.drawn = memoryview(bytes(8 * _AT_ONCE)), bytearray(8 * _AT_ONCE + 15)
        self.places, self.at_rim = np.empty(_AT_ONCE, np.int64), np.empty(_AT_ONCE, bool)
        self.numbers, self.sizes = np.empty((2, _AT_ONCE))


_ROOM = _Room()


class _Ziggurat:
    """The variates of one key, in order."""

    def __init__(self, key: bytes) -> None:
        self._cipher = Cipher(algorithms.AES(key), modes.CTR(_START)).encryptor()

    def fill(self, out: np.ndarray) -> None:
        """Fills a float64 vector."""
        layers, at_rim, their_places = _layers(), [], []
        for begin in range(0, out.size, _AT_ONCE):
            part = out[begin : begin + _AT_ONCE]
            bits, numbers = self._bits(part.size), _ROOM.numbers[: part.size]
            places = np.bitwise_and(bits, _LAYERS - 1, out=_ROOM.places[: part.size])
            np.copyto(part, bits)
            # Every place is inside: "wrap" only spares the check.
            part *= layers.widths.take(places, out=numbers, mode="wrap")
            size = np.abs(part, out=_ROOM.sizes[: part.size])
            layers.inner.take(places, out=numbers, mode="wrap")
            rim = np.flatnonzero(np.greater_equal(size, numbers, out=_ROOM.at_rim[: part.size]))
            at_rim.append(rim + begin)
            their_places.append(places[rim])
        rim = np.concatenate(at_rim)
        if rim.size:
            out[rim] = self._settled(out[rim], np.concatenate(their_places))

    def _settled(self, values: np.ndarray, places: np.ndarray) -> np.ndarray:
        """What becomes of variates that lie at the rim of their layers, float64 ``[R]``; ``places`` says which."""
        layers = _layers()
        heights = layers.heights[places] + self._uniform(values.size) * layers.rises[places]
        above = heights >= np.exp(-0.5 * values * values)
        if not places.all():
            tail = places == 0
            above &= ~tail
            values[tail] = np.copysign(self._tail(int(tail.sum())), values[tail])
        again = np.empty(np.count_nonzero(above))
        if again.size:
            self.fill(again)
            values[above] = again
        return values

    def _tail(self, count: int) -> np.ndarray:
        """Variates above the lowest layer's end (Marsaglia, 1964, "Generating a variable from the tail")."""
        end, found = _layers().end, np.empty(count)
        left = np.arange(count)
        while left.size:
            beyond = -np.log(self._uniform(left.size)) / end
            good = -2.0 * np.log(self._uniform(left.size)) > beyond * beyond
            found[left[good]] = end + beyond[good]
            left = left[~good]
        return found

    def _uniform(self, count: int) -> np.ndarray:
        """Above 0, up to 1, in steps of 2**-53."""
        out = np.empty(count)
        for begin in range(0, count, _AT_ONCE):
            part = out[begin : begin + _AT_ONCE]
            part[:] = (self._bits(part.size).view(np.uint64) >> np.uint64(11)) + np.uint64(1)
        out *= 2.0**-53
        return out

    def _bits(self, count: int) -> np.ndarray:
        """int64 ``[count]`` of the stream; what was given out before is overwritten."""
        self._cipher.update_into(_ROOM.nothing[: 8 * count], _ROOM.drawn)
        return np.frombuffer(_ROOM.drawn, np.int64, count)


@dataclass(frozen=True)
class _Layers:
    """Layers of equal area under exp(-x²/2), ``[1024]`` from the lowest up; the tail belongs to the lowest.

    Attributes:
      end: Where the lowest one ends and the tail begins.
      widths: Of a layer over 2**63: by it an int64 becomes a place in the layer. Of the lowest, with the tail as a part
        of the same height.
      inner: What is nearer to zero than this is under the density for certain; of the lowest, what is not in the tail.
      heights: Of the layer's lower side.
      rises: From there to its upper side.
    """

    end: float
    widths: np.ndarray
    inner: np.ndarray
    heights: np.ndarray
    rises: np.ndarray


@functools.cache
def _layers() -> _Layers:
    low, high = 2.0, 8.0  # where the lowest layer may end
    while low < (end := (low + high) / 2) < high:
        low, high = (low, end) if _outer_ends(end)[1] < 1.0 else (end, high)
    outer, _ = _outer_ends(high)
    inner = np.array([*outer, 0.0])
    density = np.exp(-0.5 * np.square(inner))
    lower = np.array([0.0, *density[:-1]])
    widths = np.array([_area(high) / density[0], *outer]) * 2.0**-63
    return _Layers(high, widths, inner, lower, density - lower)


def _outer_ends(end: float) -> tuple[list[float], float]:
    """The ends of all layers but the lowest, which is ``end`` for the first of them, and the last one's upper side."""
    area, ends = _area(end), [end]
    height = math.exp(-0.5 * end * end) + area / end
    while len(ends) < _LAYERS - 1 and height < 1.0:
        ends.append(math.sqrt(-2.0 * math.log(height)))
        height += area / ends[-1]
    return ends, height if len(ends) == _LAYERS - 1 else math.inf


def _area(end: float) -> float:
    """Of the lowest layer with its tail, where it ends there."""
    return end * math.exp(-0.5 * end * end) + math.sqrt(math.pi / 2) * math.erfc(end / math.sqrt(2))


def on_grid(values: np.ndarray, deviation: float) -> np.ndarray:
    """Rounds values, in place, to the grid of noise with a standard deviation; the nearest, ties to even.

    Args:
      values: float64, noise included.
      deviation: Standard deviation of that noise, positive. The grid's step is a power of two.

    Returns:
      ``values``.
    """
    step = 2.0 ** (math.frexp(deviation)[1] - 1 - _STEPS)
    values *= 1 / step  # exact, as the power of two that it is
    np.rint(values, out=values)
    values *= step
    return values


#: Rows of tables whose noise waits lie on a grid; it holds weights of so many steps exactly in single precision.
ROOM = 2.0**23
_STEPS_OF_ROWS = 10


def grid_of_rows(deviation: float) -> np.float64:
    """The step of the grid on which rows lie whose updates have noise of a standard deviation.

    Args:
      deviation: Of the first step's noise, in units of the weights; positive.

    Returns:
      A power of two, 2**-11 to 2**-10 of it. (Later noise may be 64 times smaller, if the learning rate falls.)
    """
    return np.float64(2.0 ** (math.frexp(deviation)[1] - 1 - _STEPS_OF_ROWS))
