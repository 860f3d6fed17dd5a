"""What the messages must not tell. Each of these fails where its protection is taken away."""

from __future__ import annotations

import hashlib
import math
import os
import random
from typing import Any

import numpy as np
import pytest
from gmpy2 import mpz

from efl.paillier import PrivateKey, residues
from efl.paillier.engine import Engine
from efl.paillier.scheme import PublicPaillier
from efl.protocol import Kind, Widths, drawn
from efl.protocol.products import products_of
from tests.paillier.keypairs import key
from tests.protocol.pair import Pair

BATCH, INPUTS, UNITS = 6, 5, 3
X = np.random.default_rng(0).normal(size=(BATCH, INPUTS))
CIPHERTEXTS = ("xc", "xr", "u", "zc", "dw", "dx")


def pair(kind: Kind = Kind.DENSE, seed: int = 0) -> Pair:
    rng = np.random.default_rng(seed)
    return Pair(
        key(), kind, rng.normal(size=(INPUTS, UNITS)) if kind is Kind.DENSE else 1 + 0.1 * rng.normal(size=INPUTS)
    )


def gradient(kind: Kind = Kind.DENSE) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(BATCH, UNITS if kind is Kind.DENSE else INPUTS)) / 100


def decrypted(rows: np.ndarray) -> list[mpz]:
    return key().decrypt_residues(residues.from_rows(rows))


def products(kind: Kind, held: Pair) -> Any:
    return products_of(held.passive._scheme, Widths(kind, INPUTS, UNITS if kind is Kind.DENSE else INPUTS, BATCH))


def slots_of(rows: np.ndarray, kind: Kind, held: Pair) -> np.ndarray:
    """The masked gradient of the weights, all slots of it, as the follower can read them."""
    made = products(kind, held)
    plain = np.empty(made.updated, object)
    plain.ravel()[:] = decrypted(rows)
    return held.passive._scheme.unpack(plain, made.updates, 1 << (made.updates.bits - 1), "test")


@pytest.mark.parametrize("kind", list(Kind))
def test_nothing_is_sent_twice_and_shares_are_fresh(kind: Kind) -> None:
    held, seen, shares = pair(kind), set(), []
    for _ in range(4):  # the same numbers, from the same shares: a step that is taken again
        found = held.step(X, gradient(kind), keep=False)
        rows = [bytes(row) for name in CIPHERTEXTS for row in found.sent[name]]
        assert len(set(rows)) == len(rows) and not seen & set(rows)
        seen |= set(rows)
        assert found.shares is not None
        shares.append(found.shares[0].values)
    together = np.stack(shares)
    assert len(np.unique(together)) == together.size
    # A share tells nothing of what it is a share of: it is spread over 62 bits, whatever the weights.
    assert np.abs(together).max() > 1 << 59 and abs(together.astype(np.float64).mean()) < 2.0**60


@pytest.mark.parametrize("kind", list(Kind))
def test_sizes_do_not_depend_on_values(kind: Kind) -> None:
    sizes = []
    for scale in (0.0, 1.0, 1e4):
        held = pair(kind)
        found = held.step(np.clip(X * scale, -32, 32) * (scale < 2), gradient(kind) * scale)
        assert not found.errors
        sizes.append({name: (array.shape, array.dtype) for name, array in found.sent.items()})
    assert sizes[0] == sizes[1] == sizes[2]


def test_what_the_follower_decrypts_for_the_output_is_uniform() -> None:
    """Whatever is left of it: its low bits too are masked, which without the coarse part would be those of X·V."""
    held = pair()
    low, high = [], []
    for _ in range(6):
        found = held.step(X, keep=False)
        numbers = decrypted(found.sent["zc"])
        low += [int(each) & 0xFFFF for each in numbers]
        high += [int(each >> (int(key().public.n).bit_length() - 17)) for each in numbers]
    assert len(set(low)) > 0.9 * len(low) and len(set(high)) > 0.9 * len(high)
    assert abs(np.mean(low) - 2**15) < 5 * 2**16 / math.sqrt(12 * len(low))


@pytest.mark.parametrize("kind", list(Kind))
def test_every_slot_of_the_weights_gradient_is_masked(kind: Kind) -> None:
    held = pair(kind)
    found = [slots_of(held.step(X, gradient(kind), keep=False).sent["dw"], kind, held) for _ in range(12)]
    made = products(kind, held)
    together = np.stack([each[: INPUTS if kind is Kind.DENSE else made.updates.length] for each in found]).astype(
        object
    )
    shift = made.widths.update_shift
    differences = (together[1:] - together[:-1]).ravel()
    # The products are the same each time: what differs is the mask, coarse and fine.
    assert min(abs(each) for each in differences) > 1 << (shift + 40)
    fine = np.array([int(each) & ((1 << shift) - 1) for each in together.ravel()], np.float64) / (1 << shift)
    assert abs(fine.mean() - 0.5) < 5 / math.sqrt(12 * fine.size) and abs(fine.var() * 12 - 1) < 0.35
    assert len(np.unique(fine)) > min(fine.size, 1 << shift) * 0.5


def test_the_leader_does_not_get_exact_products() -> None:
    """Exact sums of integers are equations from which lattices find the integers."""
    held = pair()
    found = held.step(X, keep=False)
    fine = np.rint(X * 2.0**12)
    units = np.rint((found.output - (fine * 2.0**-12) @ held.weights) * 2.0**28)
    assert 0.4 < units.std() / 2**16 < 2.5
    again = held.step(X, keep=False)
    assert np.array_equal(found.output, again.output)  # so that repetition averages nothing away
    other = held.step(X + 2.0**-12, keep=False)
    difference = (other.output - found.output - np.full_like(X, 2.0**-12) @ held.weights) * 2.0**28
    assert np.abs(difference).max() > 2**14


def test_the_follower_does_not_get_exact_gradients() -> None:
    """Of x∘w each column of dX would be multiples of one integer, w: a greatest common divisor would tell it."""
    kind = Kind.ELEMENTWISE
    held, dy = pair(kind), gradient(kind)
    found = held.step(X, dy, keep=False)
    scale = int(found.sent["scale"])
    integers = np.rint(found.gradient * 2.0 ** (scale + 16)).astype(np.int64)
    weight = np.rint(held.weights * 2**16).astype(np.int64)
    for column in range(INPUTS):
        assert math.gcd(*map(int, integers[:, column])) < weight[column]
        assert not (integers[:, column] % weight[column] == 0).all()
    exact = np.rint(np.ldexp(dy, scale)).astype(np.int64) * weight
    assert all(math.gcd(*map(int, column)) >= w for column, w in zip(exact.T, weight))  # as it would be
    again = held.step(X, dy, keep=False)
    assert held.leader.tag.any() or not np.array_equal(found.gradient, again.gradient)


def test_a_repeated_step_gives_the_same_gradient_again() -> None:
    rng = np.random.default_rng(2)
    held, x, dy = (
        Pair(key(), Kind.DENSE, rng.normal(size=(8, 4))),
        rng.normal(size=(4, 8)),
        rng.normal(size=(4, 4)) / 100,
    )
    held.step(x, dy)  # V is uniform now
    one, two = (held.step(x, dy, keep=False).gradient for _ in range(2))
    assert np.array_equal(one, two)
    other = held.step(x, dy * 1.5, keep=False).gradient
    assert np.abs(other - 1.5 * one).max() > 0


@pytest.mark.parametrize("kind", list(Kind))
def test_masks_are_as_long_as_what_they_hide(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    plain = Engine.masks
    monkeypatch.setattr(
        Engine, "masks", lambda self, count, bits: asked.append((count, bits)) or plain(self, count, bits)
    )
    held = pair(kind)
    held.step(X, gradient(kind))
    half, share, n = 1024, 62, 2048
    lengths = [bits for _, bits in asked]
    fresh, returned = [bits for bits in lengths if bits == half], [bits for bits in lengths if bits > half]
    assert len(fresh) == 3 and len(returned) == 3  # xc, xr, u; zc, dw, dx
    terms = INPUTS if kind is Kind.DENSE else 1
    assert max(returned) >= half + share + math.ceil(math.log2(terms)) + 40
    assert min(returned) >= half + 14 + math.ceil(math.log2(UNITS if kind is Kind.DENSE else BATCH)) + 40
    if kind is Kind.ELEMENTWISE:
        assert max(returned) == n + 40  # where a packed number is the exponent


def test_shares_of_other_runs_are_recognised_at_any_step() -> None:
    held, other = pair(), pair(seed=1)
    held.step(X, gradient())
    other.step(X, gradient())
    held.follower = other.follower
    found = held.step(X, gradient())
    assert "the parties' shares of its weights are not of one another" in str(found.errors["leader"])


# ---- where chance comes from


def repeat_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operating system's generator begins anew, and gives the same each time that this is called."""
    count = 0

    def urandom(size: int) -> bytes:
        nonlocal count
        count += 1
        return hashlib.shake_256(str(count).encode()).digest(size)

    monkeypatch.setattr(os, "urandom", urandom)
    monkeypatch.setattr(random, "_urandom", urandom)  # of which ``secrets`` makes its numbers


def forbid_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's and numpy's generators."""

    def forbidden(*args: object, **kwargs: object) -> None:
        raise AssertionError("a generator that is not the operating system's")

    for module, names in (
        (np.random, np.random.__all__),
        (random, ("getrandbits", "randbytes", "Random", "randrange")),
    ):
        for name in names:
            if callable(getattr(module, name)):
                monkeypatch.setattr(module, name, forbidden)


def test_all_that_is_random_is_the_operating_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    """No step draws from another generator; where the system's repeats itself, so do keys, shares and elements."""
    pairs = [(kind, pair(kind), gradient(kind)) for kind in Kind]
    told = []
    for _ in range(2):
        with monkeypatch.context() as patched:
            repeat_system(patched)
            forbid_others(patched)
            keys = [PrivateKey.generate(2048, fast) for fast in (False, True)]
            scheme = PublicPaillier(Engine(keys[0].public, workers=0))
            drawn_numbers = drawn.share((4,)), drawn.wide((4,), 100), scheme.uniform(2, 2)
            elements = [each for made in keys for each in made.public.encrypt_residues([1, 2])]
            told.append((keys[0].public, keys[1].public, [each.tolist() for each in drawn_numbers], elements))
    assert told[0] == told[1]
    with monkeypatch.context() as patched:
        forbid_others(patched)
        for kind, held, dy in pairs:
            assert not held.step(X, dy).errors, kind
