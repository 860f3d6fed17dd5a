"""Decryption of many ciphertexts at a time, in threads: the private key leaves its owner's process for no worker.

Most of it is done without Python's interpreter, so threads make use of several processors.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from gmpy2 import mpz

if TYPE_CHECKING:
    from efl.paillier.private_key import PrivateKey

_AT_ONCE = 32  # a tenth of a second


def processors() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def decrypted(
    private: PrivateKey,
    ciphertexts: Sequence[mpz],
    whose: str,
    threads: int,
    progress: Callable[[float], None] | None = None,
) -> list[mpz]:
    """Numbers mod n, from 0 up.

    Args:
      private: The key.
      ciphertexts: Under it.
      whose: They are, for messages.
      threads: How many compute.
      progress: Called with the part that is done, 0 to 1. What it raises ends the call.

    Raises:
      DataError: One is no encryption under this key.
    """
    pieces = [ciphertexts[at : at + _AT_ONCE] for at in range(0, len(ciphertexts), _AT_ONCE)]
    found: list[mpz] = []
    with ThreadPoolExecutor(threads) as pool:
        try:
            for number, piece in enumerate(pool.map(functools.partial(private.decrypt_residues, whose=whose), pieces)):
                found += piece
                if progress is not None:
                    progress((number + 1) / len(pieces))
        except BaseException:  # what is under way is of no use any more; raised again
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return found
