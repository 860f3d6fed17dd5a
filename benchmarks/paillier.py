"""Paillier's arithmetic and whole steps of encrypted layers, beside python-paillier (phe) in one run.

    python benchmarks/paillier.py [--quick] [--record benchmarks/results/paillier.md]

* Kernels, in one process: encryption of packed numbers (52 in a ciphertext at 2048 bits), decryption, the product of a
  weight and an encrypted number, beside phe's ``encrypt``, ``decrypt``, and ``x * w + y``, which know one number in a
  ciphertext. ``product`` is one multiplication of 2|n| by |n| bits mod n², of which nearly all of it consists: by it
  runs on other machines, or in other hours, can be compared.
* Steps: forward and backward of both parties, batch 256. ``CPU`` counts all processes, where all is computed in one;
  ``wall`` is by the clock, with one and with two worker processes that both parties share. phe's step is put together
  from the three figures above: B·d + d·u encryptions, 3·B·d·u products, B·u + d·u + B·d decryptions.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import phe
from _encrypted_steps import Pair
from _report import Goal, command_line, finish, goals_table, table
from gmpy2 import mpz

from efl.paillier import PrivateKey
from efl.paillier.engine import Engine
from efl.paillier.scheme import PrivatePaillier
from efl.protocol import Kind

BATCH = 256
OUTPUT_SLOT = 39
LAYERS = {
    "dense 128→128": (Kind.DENSE, 128, 128),
    "dense 32→32": (Kind.DENSE, 32, 32),
    "concat 128": (Kind.ELEMENTWISE, 128, 128),
}
MOST_CPU = {"dense 128→128": 14.0, "dense 32→32": 2.7, "concat 128": 10.5}
MOST_FORWARD, MOST_SUBGROUP, MOST_MB = 3.0, 8.5, 2.5
LEAST_ENCRYPTIONS, LEAST_DECRYPTIONS, LEAST_OF_PHE, LEAST_OF_TWO = 1800, 360, 250, 1.75


def seconds(function: Callable[[], Any], rounds: int) -> float:
    """CPU seconds of this thread for one call: the least of some, since a busy core only adds to it."""
    found = []
    for _ in range(rounds):
        begun = time.thread_time()
        function()
        found.append(time.thread_time() - begun)
    return min(found)


def product_microseconds(key: PrivateKey) -> float:
    """One product of 2|n| by |n| bits mod n²."""
    n, square = int(key.public.n), key.public.square
    x, y = mpz(secrets.randbelow(int(square))), mpz(secrets.randbelow(n))

    def many() -> None:
        z = x
        for _ in range(2000):
            z = z * y % square

    return seconds(many, 5) / 2000 * 1e6


def kernels(key: PrivateKey, quick: bool) -> dict[str, float]:
    """encryptions/s, decryptions/s, µs for a weight and an encrypted number, µs of a product."""
    engine = Engine(key.public, workers=0)
    scheme = PrivatePaillier(engine, key)
    slots = scheme.slots(BATCH, OUTPUT_SLOT)
    columns, rounds = (4, 2) if quick else (16, 5)
    values = np.random.default_rng(0).integers(-(1 << 30), 1 << 30, (BATCH, columns))
    rows = scheme.encrypt(scheme.pack(values, slots))
    count = len(rows)
    spent = {
        "encrypt": seconds(lambda: scheme.encrypt(scheme.pack(values, slots)), rounds) / count,
        "decrypt": seconds(lambda: key.decrypt_residues(_numbers(rows)), rounds) / count,
    }
    held = scheme.read(rows, slots.groups, columns, "benchmark")
    exponents = np.random.default_rng(1).integers(0, 1 << 62, (columns, 64), dtype=np.uint64)
    pair = seconds(lambda: scheme.matmul(held, exponents, 62), rounds) / (BATCH * columns * 64)
    return {
        "encryptions": 1 / spent["encrypt"],
        "decryptions": 1 / spent["decrypt"],
        "pair": pair * 1e6,
        "product": product_microseconds(key),
    }


def _numbers(rows: np.ndarray) -> list[mpz]:
    from efl.paillier import residues

    return residues.from_rows(rows)


def of_phe(key: PrivateKey, quick: bool) -> dict[str, float]:
    """Seconds of phe's encryption, decryption, and of one product and sum."""
    p, q = (half.prime for half in key._whole)
    public = phe.PaillierPublicKey(int(key.public.n))
    private = phe.PaillierPrivateKey(public, int(p), int(q))
    numbers = np.random.default_rng(0).normal(size=4 if quick else 20).tolist()
    encrypted = [public.encrypt(number) for number in numbers]
    weights = np.random.default_rng(1).normal(size=len(numbers)).tolist()
    return {
        "encrypt": seconds(lambda: [public.encrypt(number) for number in numbers], 2) / len(numbers),
        "decrypt": seconds(lambda: [private.decrypt(each) for each in encrypted], 2) / len(numbers),
        "pair": seconds(lambda: _dot(encrypted, weights), 3) / len(numbers),
    }


def _dot(encrypted: list[Any], weights: list[float]) -> Any:
    total = encrypted[0] * weights[0]
    for each, weight in zip(encrypted[1:], weights[1:]):
        total = total + each * weight
    return total


def phe_step(spent: dict[str, float], inputs: int, outputs: int) -> float:
    """Seconds of a dense step, as one would write it with phe."""
    b, d, u = BATCH, inputs, outputs
    return (
        (b * d + d * u) * spent["encrypt"] + 3 * b * d * u * spent["pair"] + (b * u + d * u + b * d) * spent["decrypt"]
    )


def main() -> None:
    """Measures and prints."""
    arguments = command_line(__doc__, "small layers, one step each").parse_args()
    quick = arguments.quick
    keys = {
        "2048": PrivateKey.generate(2048),
        "2048, subgroup": PrivateKey.generate(2048, fast=True),
        **({} if quick else {"3072": PrivateKey.generate(3072)}),
    }
    measured = {name: kernels(key, quick) for name, key in keys.items()}
    theirs = {name: of_phe(key, quick) for name, key in keys.items() if "subgroup" not in name}
    kernel_rows = [
        (
            f"efl, {name}",
            f"{found['encryptions']:,.0f}",
            f"{found['decryptions']:,.0f}",
            f"{found['pair']:.2f}",
            f"{found['product']:.2f}",
        )
        for name, found in measured.items()
    ]
    kernel_rows += [
        (f"phe, {name}", f"{1 / t['encrypt']:,.0f}", f"{1 / t['decrypt']:,.0f}", f"{t['pair'] * 1e6:,.0f}", "")
        for name, t in theirs.items()
    ]
    steps = 1 if quick else 3
    rows, goals, numbers = [], [], {}
    jobs = [("2048", layer) for layer in LAYERS] + [("2048, subgroup", "dense 128→128")]
    jobs += [] if quick else [("3072", "dense 128→128")]
    for name, layer in jobs:
        kind, inputs, outputs = LAYERS[layer]
        if quick:
            inputs, outputs = inputs // 16, outputs // 16
        pair = Pair(keys[name], kind, inputs, outputs, BATCH, workers=0)
        trained, forward = pair.median(steps), pair.median(steps, train=False)
        pair.close()
        walls = []
        for workers in (1, 2):
            pair = Pair(keys[name], kind, inputs, outputs, BATCH, workers)
            walls.append(pair.median(steps).wall)
            pair.close()
        of = phe_step(theirs[name], inputs, outputs) if name in theirs and kind is Kind.DENSE else None
        rows.append(
            (
                layer, name, f"{trained.cpu:.2f}", f"{forward.cpu:.2f}", f"{walls[0]:.2f}", f"{walls[1]:.2f}",
                f"{trained.sent / 1e6:.2f}", f"{trained.error:.1e}",
                "" if of is None else f"{of:,.0f}", "" if of is None else f"{of / trained.cpu:,.0f}",
            )
        )  # fmt: skip
        numbers[f"{layer}, {name}"] = [round(trained.cpu, 2), round(forward.cpu, 2), *(round(w, 2) for w in walls)]
        if name == "2048":
            goals.append(Goal(f"{layer}: CPU", trained.cpu, MOST_CPU[layer], least=False, unit="s"))
        if (name, layer) == ("2048", "dense 128→128"):
            goals += [
                Goal("dense 128→128, forward only: CPU", forward.cpu, MOST_FORWARD, least=False, unit="s"),
                Goal("dense 128→128: phe / efl", (of or 0) / trained.cpu, LEAST_OF_PHE, digits=0),
                Goal("dense 128→128: two workers / one", walls[0] / walls[1], LEAST_OF_TWO),
                Goal("dense 128→128: sent", trained.sent / 1e6, MOST_MB, least=False, unit="MB"),
            ]
        if name == "2048, subgroup":
            goals.append(Goal("dense 128→128, subgroup: CPU", trained.cpu, MOST_SUBGROUP, least=False, unit="s"))
    found = measured["2048"]
    goals += [
        Goal("encryptions/s of one core", found["encryptions"], LEAST_ENCRYPTIONS, digits=0),
        Goal("decryptions/s of one core", found["decryptions"], LEAST_DECRYPTIONS, digits=0),
    ]
    headings = ("key", "encryptions/s", "decryptions/s", "µs a weight and number", "µs a product")
    text = table(headings, kernel_rows)
    headings = (
        "layer", "key", "CPU s", "forward", "wall s, 1 worker", "2 workers", "MB", "largest error", "phe s",
        "phe / efl",
    )  # fmt: skip
    text += f"\n\n{table(headings, rows, words=2)}\n\n{goals_table(goals)}\n"
    line = {"benchmark": "paillier", "ratio": numbers["dense 128→128, 2048"][0], "results": numbers}
    finish("paillier", text, line, arguments.record)


if __name__ == "__main__":
    main()
