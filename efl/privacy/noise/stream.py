"""Standard normal variates from a cryptographic stream.

The stream is AES-256 in counter mode: whoever does not know the key cannot tell it from random bits. Uniforms become
normal by Box and Muller's method, with a radius of 53 bits and an angle of 24, multiplied in double precision.

What floating point promises. No sampler with finitely many values is exactly Gaussian; whether an attacker can use that
depends on which values a release can take at all (Mironov, 2012, "On significance of the least significant bits for
differential privacy"). Here noise is drawn and added in double precision and the sum is rounded to float32: around any
value there are some 2**29 doubles for each float32, so that every float32 nearby can come of every input, with nearly
its right probability. (Of float64 values this is not so.) This closes the attack that compares sets of possible values;
it is an argument, not a proof. The radius is at most 8.6 standard deviations, which changes δ by less than 1e-16 for
each number.
"""

from __future__ import annotations

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

KEY_BYTES = 32
_START = bytes(16)
_AT_ONCE = 1 << 16  # pairs, so that what is worked on stays in the processor's cache


def gaussian(key: bytes, count: int) -> np.ndarray:
    """Standard normal variates.

    Args:
      key: 32 bytes, used for nothing else.
      count: How many.

    Returns:
      float64 ``[count]``, the same for the same key and count.
    """
    stream = Cipher(algorithms.AES(key), modes.CTR(_START)).encryptor()
    out = np.empty(count + count % 2)
    for first in range(0, count, 2 * _AT_ONCE):
        part = out[first : first + 2 * _AT_ONCE]
        pairs = part.size // 2
        bits = np.frombuffer(stream.update(bytes(12 * pairs)), np.uint32)
        radius = (bits[: 2 * pairs].view(np.uint64) >> np.uint64(11)).astype(np.float64)
        radius += 1.0  # in (0, 1]: its logarithm exists
        radius *= 2.0**-53
        np.log(radius, out=radius)
        radius *= -2.0
        np.sqrt(radius, out=radius)
        angle = (bits[2 * pairs :] >> np.uint32(8)).astype(np.float32)
        angle *= np.float32(2 * np.pi * 2.0**-24)
        np.multiply(radius, np.cos(angle), out=part[:pairs])
        np.multiply(radius, np.sin(angle), out=part[pairs:])
    return out[:count]
