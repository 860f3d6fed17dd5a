"""Keys for tests, made once in a process."""

from __future__ import annotations

import functools

from efl.paillier import PrivateKey


@functools.cache
def key(bits: int = 2048, fast: bool = False) -> PrivateKey:
    return PrivateKey.generate(bits, fast)
