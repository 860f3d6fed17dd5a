"""A worker process: computes what it is asked for, on what it is handed. It never has a private key.

``workers.Worker`` starts it. It sees nothing of the program that it works for: not its script, not its working folder's
modules, not its terminal (Ctrl-C is for the program, which ends it).
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from gmpy2 import mpz

from efl.paillier import frames, kernels, residues
from efl.paillier.factored import Product
from efl.paillier.public_key import SUBGROUP, PublicKey

_LOOK_SECONDS = 1.0


def key_frame(public: PublicKey) -> tuple[dict[str, Any], list[np.ndarray]]:
    """The first frame that a worker reads."""
    h = public._h if public.kind == SUBGROUP else None
    return {"op": "key", "n": f"{public.n:x}", "masks": public.kind, "h": f"{h or 0:x}"}, []


def compute(public: PublicKey, header: dict[str, Any], arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """What one request asks for.

    Args:
      public: The key.
      header: ``op`` and its numbers.
      arrays: As ``request`` functions of ``engine`` make them.

    Returns:
      Rows of bytes: elements, or heads and tails of products.
    """
    op, square = header["op"], public.square
    if op == "masks":
        return [residues.to_rows(kernels.masks(public, header["count"], header["bits"]), residues.width_of(square))]
    if op == "powers":
        found = kernels.powers(public, residues.from_rows(arrays[0]), arrays[1].tolist())
        return [residues.to_rows(found, residues.width_of(square))]
    if op == "products":
        return _rows(public, kernels.products(public, residues.from_rows(arrays[0]), arrays[1], header["bits"]))
    if op == "spread":
        made: list[Product] = []
        for base, digits in zip(residues.from_rows(arrays[0]), arrays[1]):
            made += kernels.spread(public, base, digits, header["bits"], header["slot_bits"])
        return _rows(public, made)
    raise ValueError(f"op {op!r}")


def _rows(public: PublicKey, products: Sequence[Product]) -> list[np.ndarray]:
    heads = residues.to_rows([product.head for product in products], residues.width_of(public.square))
    tails = residues.to_rows([product.tail % public.n for product in products], residues.width_of(public.n))
    return [heads, tails]


def products_of(arrays: Sequence[np.ndarray]) -> list[Product]:
    """Products, from what a worker answered."""
    return [Product(*pair) for pair in zip(*map(residues.from_rows, arrays))]


def main(requests: int, answers: int, parent: int) -> None:
    """Serves until the program is gone.

    Args:
      requests: File descriptor of a pipe, to be read.
      answers: File descriptor of a pipe, to be written.
      parent: Process id of the program.
    """
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)  # it ends with the program, which may need it for its last step
    logging.getLogger("efl").setLevel(logging.ERROR)  # the program says it once, for all
    threading.Thread(target=_watch, args=[parent], daemon=True).start()
    with contextlib.suppress(EOFError, OSError):
        header, _ = frames.read(requests)
        public = PublicKey(mpz(header["n"], 16), header["masks"], mpz(header["h"], 16) or None)
        while True:
            header, arrays = frames.read(requests)
            try:
                found = compute(public, header, arrays)
            except Exception as error:  # told to the program, whose mistake it is
                frames.write(answers, {"error": f"{type(error).__name__}: {error}"}, [])
            else:
                frames.write(answers, {}, found)


def _watch(parent: int) -> None:
    # A process that the program forked holds the pipe open after the program's death.
    while os.getppid() == parent:
        time.sleep(_LOOK_SECONDS)
    os._exit(0)
