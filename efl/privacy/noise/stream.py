"""Standard normal variates from a cryptographic stream, and the grid on which what they are added to is released.

The stream is AES-256 in counter mode: whoever does not know the key cannot tell it from random bits. Points that are
uniform in the unit disc become pairs of normal variates by the polar method (Marsaglia and Bray, 1964, "A convenient
method for generating normal variables"), in double precision throughout: 64 random bits for each coordinate of a point,
of which the 53 leading ones of its value are kept.

What floating point promises. No sampler with finitely many values is exactly Gaussian, and which values a release can
take at all may tell what the noise was added to (Mironov, 2012, "On significance of the least significant bits for
differential privacy"). It is not enough to look at single numbers: two variates of one pair share a radius and an
angle, and if either has few bits, the pair tells. So every release is rounded to a grid (``on_grid``) that does not
depend on the data, of steps of 2**-10 to 2**-9 standard deviations of its noise. A value on it stands for an interval
of the real line, two of one pair for a square of the plane, in which 2**83 points of the disc end or more. What is
released is a rounded Gaussian, but for errors that move the ends of these intervals: rounding of logarithm, root and
product, a few units in the 53rd bit of the variate, and of the sum, 2**-53 of its size. For sums of up to 2**8
standard deviations they are less than 2**-44 of a standard deviation, and change the probability of what is released
by less than one part in 2**33 on average. Over a run that releases 2**27 numbers (26 000 weights, 5 000 steps) that
adds less than 0.02 to ε if all of them point the same way, some 10**-6 if they do not. Variates reach 13 standard
deviations; beyond lies a probability of 10**-38.

That is an argument, not a proof: logarithm and root are numpy's. Nothing is promised of how long anything takes,
though no draw depends on the data. Nor of the sums themselves: they are formed in single precision, where rounding may
make two neighbouring ones differ by slightly more than the clip (Casacuberta et al., 2022, arXiv:2207.10635).
"""

from __future__ import annotations

import math

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

KEY_BYTES = 32
VERSION = 2  # changes with what a key draws: a release of another version cannot be repeated
_START = bytes(16)
_AT_ONCE = 1 << 13  # points, so that what is worked on stays in the processor's cache
_SPARE = 1.3  # points drawn for each that is needed: 4 / π lie outside of the disc, and some more by chance
_STEPS = 9  # the grid has 2**9 to 2**10 steps in a standard deviation


def gaussian(key: bytes, count: int) -> np.ndarray:
    """Standard normal variates.

    Args:
      key: 32 bytes, used for nothing else.
      count: How many.

    Returns:
      float64 ``[count]``, the same for the same key and count.
    """
    stream = Cipher(algorithms.AES(key), modes.CTR(_START)).encryptor()
    half = (count + 1) // 2
    out = np.empty((2, half))
    most = min(_AT_ONCE, _drawn_for(half))
    nothing, drawn = memoryview(bytes(16 * most)), bytearray(16 * most + 15)  # as much room as the cipher asks for
    room = np.empty((4, most))
    done = 0
    while done < half:
        points = min(most, _drawn_for(half - done))
        stream.update_into(nothing[: 16 * points], drawn)
        x, y, square, work = room[:, :points]
        np.multiply(np.frombuffer(drawn, np.int64, 2 * points).reshape(2, points), 2.0**-63, out=room[:2, :points])
        np.multiply(x, x, out=square)
        square += np.multiply(y, y, out=work)
        inside = np.flatnonzero(square < 1.0)[: half - done]
        end = done + inside.size
        # Every index is inside: "clip" only spares the check.
        squared = square.take(inside, out=work[: inside.size], mode="clip")
        factor = np.log(squared, out=square[: inside.size])
        factor /= squared
        factor *= -2.0
        np.sqrt(factor, out=factor)
        for axis, ready in ((x, out[0, done:end]), (y, out[1, done:end])):
            axis.take(inside, out=ready, mode="clip")
            ready *= factor
        done = end
    return out.reshape(-1)[:count]


def _drawn_for(points: int) -> int:
    return int(_SPARE * points) + 32


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
