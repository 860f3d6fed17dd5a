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

import math
import secrets
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import phe
from _encrypted_steps import Pair
from _report import Goal, command_line, finish, goals_table, table
from gmpy2 import mpz

from efl.paillier import PrivateKey
from efl.paillier.engine import Engine
from efl.paillier.public_key import SUBGROUP
from efl.paillier.scheme import Ciphertexts, PrivatePaillier
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


def least(jobs: Mapping[str, tuple[Callable[[], Any], float]], rounds: int) -> dict[str, float]:
    """CPU seconds of this thread for one of what each job makes so many of.

    The least of some rounds, since a busy core only adds to it; all jobs take turns, so that a busy minute is no one's.
    """
    found = dict.fromkeys(jobs, math.inf)
    for _ in range(rounds):
        for name, (function, count) in jobs.items():
            begun = time.thread_time()
            function()
            found[name] = min(found[name], (time.thread_time() - begun) / count)
    return found


def products(key: PrivateKey, count: int) -> Callable[[], None]:
    """Multiplies 2|n| by |n| bits mod n², ``count`` times."""
    n, square = int(key.public.n), key.public.square
    x, y = mpz(secrets.randbelow(int(square))), mpz(secrets.randbelow(n))

    def many() -> None:
        z = x
        for _ in range(count):
            z = z * y % square

    return many


def kernels(key: PrivateKey, quick: bool) -> dict[str, float]:
    """Seconds of an encryption, a decryption, a weight and an encrypted number, a product; and of phe's (``phe …``)."""
    engine = Engine(key.public, workers=0)
    scheme = PrivatePaillier(engine, key)
    slots = scheme.slots(BATCH, OUTPUT_SLOT)
    columns, rounds = (2, 2) if quick else (4, 25)
    values = np.random.default_rng(0).integers(-(1 << 30), 1 << 30, (BATCH, columns))
    rows = scheme.encrypt(scheme.pack(values, slots))
    held = scheme.read(rows, slots.groups, columns, "benchmark")
    wide = scheme.read(scheme.encrypt(scheme.pack(np.repeat(values, 64, 1)[:, :64], slots)), slots.groups, 64, "wide")
    exponents = np.random.default_rng(1).integers(0, 1 << 62, (64, 16), dtype=np.uint64)
    few = Ciphertexts(wide.elements[:1], wide.mask_bits)
    jobs: dict[str, tuple[Callable[[], Any], float]] = {
        "encrypt": (lambda: scheme.encrypt(scheme.pack(values, slots)), len(rows)),
        "decrypt": (lambda: key.decrypt_residues(list(held.elements.ravel())), len(rows)),
        "pair": (lambda: scheme.matmul(few, exponents, 62), slots.count * exponents.size),
        "product": (products(key, 1000), 1000),
    }
    return least(jobs | ({} if key.public.kind == SUBGROUP else of_phe(key)), rounds)


def of_phe(key: PrivateKey) -> dict[str, tuple[Callable[[], Any], float]]:
    """phe's encryption, decryption, and one product and sum."""
    p, q = (half.prime for half in key._whole)
    public = phe.PaillierPublicKey(int(key.public.n))
    private = phe.PaillierPrivateKey(public, int(p), int(q))
    numbers = np.random.default_rng(0).normal(size=4).tolist()
    encrypted = [public.encrypt(number) for number in numbers]
    weights = np.random.default_rng(1).normal(size=len(numbers)).tolist()
    return {
        "phe encrypt": (lambda: [public.encrypt(number) for number in numbers], len(numbers)),
        "phe decrypt": (lambda: [private.decrypt(each) for each in encrypted], len(numbers)),
        "phe pair": (lambda: _dot(encrypted, weights), len(numbers)),
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
        (b * d + d * u) * spent["phe encrypt"]
        + 3 * b * d * u * spent["phe pair"]
        + (b * u + d * u + b * d) * spent["phe decrypt"]
    )


def main() -> None:
    """Measures and prints."""
    arguments = command_line(__doc__, "small layers, one step each").parse_args()
    quick = arguments.quick
    keys = {
        "2048": PrivateKey.generate(2048),
        "2048, subgroup": PrivateKey.generate(2048, fast=True),
        **(
            {} if quick else {"3072": PrivateKey.generate(3072), "3072, subgroup": PrivateKey.generate(3072, fast=True)}
        ),
    }
    measured = {name: kernels(key, quick) for name, key in keys.items()}
    kernel_rows = [
        (
            f"efl, {name}",
            f"{1 / found['encrypt']:,.0f}",
            f"{1 / found['decrypt']:,.0f}",
            f"{found['pair'] * 1e6:.2f}",
            f"{found['product'] * 1e6:.2f}",
        )
        for name, found in measured.items()
    ]
    kernel_rows += [
        (
            f"phe, {name}",
            f"{1 / found['phe encrypt']:,.0f}",
            f"{1 / found['phe decrypt']:,.0f}",
            f"{found['phe pair'] * 1e6:,.0f}",
            "",
        )
        for name, found in measured.items()
        if "phe pair" in found
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
        has_phe = "phe pair" in measured[name] and kind is Kind.DENSE
        of = phe_step(measured[name], inputs, outputs) if has_phe else None
        rows.append(
            (
                layer, name, f"{trained.cpu:.2f}", f"{forward.cpu:.2f}", f"{walls[0]:.2f}", f"{walls[1]:.2f}",
                f"{trained.sent / 1e6:.2f}", f"{trained.error:.1e}",
                "" if of is None else f"{of:,.0f}", "" if of is None else f"{of / trained.cpu:,.0f}",
            )
        )  # fmt: skip
        numbers[f"{layer}, {name}"] = [round(trained.cpu, 2), round(forward.cpu, 2), *(round(w, 2) for w in walls)]
        if quick:
            continue  # goals are of layers of full size
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
        Goal("encryptions/s of one core", 1 / found["encrypt"], LEAST_ENCRYPTIONS, digits=0),
        Goal("decryptions/s of one core", 1 / found["decrypt"], LEAST_DECRYPTIONS, digits=0),
    ]
    text = table(("key", "encryptions/s", "decryptions/s", "µs a weight and number", "µs a product"), kernel_rows)
    headings = (
        "layer", "key", "CPU s", "forward", "wall s, 1 worker", "2 workers", "MB", "largest error", "phe s",
        "phe / efl",
    )  # fmt: skip
    text += f"\n\n{table(headings, rows, words=2)}\n\n{goals_table(goals)}\n"
    line = {"benchmark": "paillier", "ratio": numbers["dense 128→128, 2048"][0], "results": numbers}
    finish("paillier", text, line, arguments.record)


if __name__ == "__main__":
    main()
