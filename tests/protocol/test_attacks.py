"""What a party does with all that it sees: each attack succeeds here where the protection is taken away."""

from __future__ import annotations

import math
import secrets
import threading
from collections import defaultdict
from typing import Any

import numpy as np
import pytest

from efl.paillier import PrivateKey, residues
from efl.paillier.engine import Engine
from efl.protocol import Kind, Widths, drawn
from efl.protocol.products import Products, products_of
from efl.protocol.rounds import Share
from tests.paillier.keypairs import key
from tests.protocol.pair import Pair, Step
from tests.protocol.test_steps import foreign

CIPHERTEXTS = ("xc", "xr", "u", "zc", "dw", "dx")
SIGMAS = 5.5  # of some thousand numbers, one is beyond in 10 000 runs


def weights_of(kind: Kind, inputs: int, outputs: int) -> np.ndarray:
    return np.full((inputs, outputs), 0.3) if kind is Kind.DENSE else np.full(inputs, 1.1)


class Seen:
    """What the follower has decrypted, by the last word of what it said that it was."""

    def __init__(self, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
        self.plain: dict[str, list[np.ndarray]] = defaultdict(list)
        scheme = pair.active._scheme
        decrypt = scheme.decrypt

        def spied(rows: np.ndarray, groups: int, m: int, what: str) -> np.ndarray:
            found = decrypt(rows, groups, m, what)
            self.plain[what.split("/")[1].split()[0]].append(found)
            return found

        monkeypatch.setattr(scheme, "decrypt", spied)


def bits_are_even(numbers: list[int], bits: range) -> bool:
    """Whether each bit is set in half of the numbers, and differs from the next in half, as far as chance allows."""
    allowed = SIGMAS * math.sqrt(len(numbers)) / 2

    def half(held: list[int], bit: int) -> bool:
        return abs(sum(each >> bit & 1 for each in held) - len(held) / 2) < allowed

    changes = [each ^ each >> 1 for each in numbers]  # few where the high bits repeat the sign
    return all(half(numbers, bit) for bit in bits) and all(half(changes, bit) for bit in bits[:-1])


def of_pair(pair: Pair, batch: int) -> Products:
    kind, inputs, outputs = pair.active._shape
    return products_of(pair.active._scheme, Widths(kind, inputs, outputs, batch))


# ---- masks of ciphertexts


@pytest.mark.parametrize("kind", list(Kind))
def test_no_two_ciphertexts_have_one_mask(kind: Kind) -> None:
    """c mod n is the mask alone: of two with the same one, the quotient tells the difference of what they hold.

    Over steps, from the same shares (a restart), in both directions.
    """
    n, masks, public, count = key().public.n, set(), set(), 0
    x, dy = np.ones((3, 4)), np.full((3, 2 if kind is Kind.DENSE else 4), 1e-3)
    for attempt in range(3):
        pair = Pair(key(), kind, weights_of(kind, 4, 2))
        for _ in range(1 + attempt % 2):
            found = pair.step(x, dy)
            assert not found.errors
            for name in CIPHERTEXTS:
                elements = residues.from_rows(found.sent[name])
                masks |= {each % n for each in elements}
                count += len(elements)
            public |= {bytes(row) for row in found.sent["zp"]}
    assert len(masks) == count > 50
    assert 1 not in masks  # 1 + n·m: anybody with n reads m
    assert len(public) == 4 * len(found.sent["zp"])


def asked_of(kind: Kind, private: PrivateKey, x: np.ndarray, dy: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Lengths of the exponents that each party drew for masks in one step, message by message; and all exponents."""
    held: dict[int, list[list[int]]] = defaultdict(list)
    exponents: list[int] = []
    randbits, masks = secrets.randbits, Engine.masks
    inside = threading.local()

    def drawing(bits: int) -> int:
        found = randbits(bits)
        if getattr(inside, "now", False):
            held[threading.get_ident()][-1].append(bits)
            exponents.append(found)
        return found

    def asked(self: Engine, count: int, bits: int) -> Any:
        held[threading.get_ident()].append([])
        inside.now = True
        try:
            return masks(self, count, bits)
        finally:
            inside.now = False

    monkeypatch.setattr("efl.paillier.masks.secrets.randbits", drawing)
    monkeypatch.setattr(Engine, "masks", asked)
    found = Pair(private, kind, weights_of(kind, x.shape[1], dy.shape[1])).step(x, dy)
    assert not found.errors
    leader = held.pop(threading.get_ident())
    (follower,) = held.values()
    return found, leader, follower, exponents


@pytest.mark.parametrize("kind", list(Kind))
@pytest.mark.parametrize(("bits", "fast", "fresh"), [(2048, False, 1024), (3072, False, 1536), (2048, True, 640)])
def test_every_mask_is_longer_by_40_bits_than_what_it_hides(
    kind: Kind, bits: int, fast: bool, fresh: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, inputs, outputs = 5, 3, 6 if kind is Kind.DENSE else 3
    x, dy = np.ones((batch, inputs)), np.full((batch, outputs), 1e-3)
    found, leader, follower, exponents = asked_of(kind, key(bits, fast), x, dy, monkeypatch)
    # As if V's 62 bits had multiplied: over the columns, as they did; over the rows; over the units, or as a whole
    # packed vector.
    dense = kind is Kind.DENSE
    needed = {
        "zc": fresh + 62 + (2 if dense else 0) + 40,
        "dw": fresh + 62 + 3 + 40,
        "dx": fresh + 62 + 3 + 40 if dense else bits + 40,
    }
    assert [len(each) for each in leader] == [len(found.sent[name]) for name in needed]
    for lengths, (name, least) in zip(leader, needed.items()):
        assert min(lengths) >= least, name
    assert [len(each) for each in follower] == [len(found.sent[name]) for name in ("xc", "xr", "u")]
    assert min(min(each) for each in follower) >= fresh
    assert len(set(exponents)) == len(exponents)


def test_masks_grow_with_the_number_of_terms(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wide layer, of one row: 1024 + 62 + 7 + 40 bits at 128 columns, as 65 columns have, and 1136 at more."""
    x, dy = np.ones((1, 65)), np.full((1, 1), 1e-3)
    _, leader, _, _ = asked_of(Kind.DENSE, key(), x, dy, monkeypatch)
    assert min(leader[0]) >= 1024 + 62 + 7 + 40
    with monkeypatch.context() as patched:
        _, leader, _, _ = asked_of(Kind.DENSE, key(), np.ones((9, 1)), np.full((9, 1), 1e-3), patched)
    assert min(leader[1]) >= 1024 + 62 + 4 + 40


def test_masks_of_a_foreign_key_are_random_nth_powers(monkeypatch: pytest.MonkeyPatch) -> None:
    below: list[int] = []
    real = secrets.randbelow

    def drawing(most: int) -> int:
        below.append(most)
        return real(most)

    monkeypatch.setattr("efl.paillier.masks.secrets.randbelow", drawing)
    n = int(foreign().public.n)
    pair = Pair(foreign(), Kind.DENSE, weights_of(Kind.DENSE, 2, 1))
    found = pair.step(np.ones((2, 2)), np.zeros((2, 1)))
    count = sum(len(found.sent[name]) for name in CIPHERTEXTS)
    # masks of every message, those that stand for empty subsets, and uniform masks of Z
    assert below.count(n) >= count + len(found.sent["zc"])
    assert len({each % n for name in CIPHERTEXTS for each in residues.from_rows(found.sent[name])}) == count


# ---- sizes


@pytest.mark.parametrize("kind", list(Kind))
def test_sizes_follow_from_shapes_alone(kind: Kind) -> None:
    sizes = []
    outputs = 2 if kind is Kind.DENSE else 3
    for end, size, share in ((0.0, 0.0, 0), (32.0, 1e30, (1 << 61) - 1), (-32.0, -1e-30, -(1 << 61)), (1.0, 1.0, 1)):
        pair = Pair(key(), kind, weights_of(kind, 3, outputs))
        whole = pair.leader.values + pair.follower.values
        pair.leader = Share(np.full_like(whole, share), pair.leader.tag)
        pair.follower = Share(whole - share, pair.follower.tag)
        found = pair.step(np.full((4, 3), end), np.full((4, outputs), size))
        assert not found.errors
        sizes.append({name: (array.shape, array.dtype, array.nbytes) for name, array in found.sent.items()})
    assert len(sizes[0]) == 10 and all(each == sizes[0] for each in sizes)


# ---- what the follower decrypts


@pytest.mark.parametrize("kind", list(Kind))
def test_what_the_follower_decrypts_of_z_is_uniform_in_every_bit(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever part of the mask is taken off, high or low, the rest has the other: bits of X·V would show in either."""
    inputs = 2 if kind is Kind.DENSE else 12
    for share in (0, -(1 << 61)):
        pair = Pair(key(), kind, weights_of(kind, inputs, 12))
        whole = pair.leader.values + pair.follower.values
        pair.leader, pair.follower = Share(whole * 0 + share, pair.leader.tag), Share(whole - share, pair.leader.tag)
        seen = Seen(pair, monkeypatch)
        for _ in range(8):
            assert not pair.step(np.full((1, inputs), 0.75)).errors
        numbers = [int(each) for plain in seen.plain["zc"] for each in plain.ravel()]
        assert len(set(numbers)) == len(numbers) == 96
        assert bits_are_even(numbers, range(2040))  # the highest follow from n


@pytest.mark.parametrize("kind", list(Kind))
def test_the_low_bits_of_the_weights_gradient_are_covered(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    """The follower knows V' - V as well as W: it takes that off, and what is left has to be uniform below 2^sh."""
    inputs, outputs = 6, 6
    pair = Pair(key(), kind, weights_of(kind, inputs, outputs), rate=1.0)
    seen, shift, left, coarse = Seen(pair, monkeypatch), 0, [], []
    x, dy = np.full((2, inputs), 0.01171875), np.full((2, outputs), 2.0**-14)  # x is 3 units, lr·dY one: 6 together
    for _ in range(6 if kind is Kind.DENSE else 12):
        old = pair.follower.values
        assert not pair.step(x, dy).errors
        made = of_pair(pair, 2)
        shift = made.widths.update_shift
        slots = pair.active._scheme.unpack(seen.plain["dw"][-1], made.updates, 1 << (made.updates.bits - 1), "test")
        picked = made.picked(slots) - made.weight_gradient_offset(np.full((2, inputs), 3))
        assert ((picked >> shift) == old - pair.follower.values).all()
        left += [int(each) & ((1 << shift) - 1) for each in picked.ravel()]
        coarse += [int(each) for each in pair.leader.values.ravel()]
    assert shift == 6 and len(left) >= 72
    assert bits_are_even(left, range(shift))
    assert abs(np.mean(left) - 2.0 ** (shift - 1)) < SIGMAS * 2.0**shift / math.sqrt(12 * len(left))
    # What is added is V' << sh: V' is uniform over all its 62 bits, and no two are alike.
    assert len(set(coarse)) == len(coarse) and bits_are_even([each + (1 << 61) for each in coarse], range(62))


def test_slots_that_nobody_asked_for_are_masked_in_every_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an elementwise layer: Enc(x of all features)·dY of one. The others' slots would give the follower xᵀ·dY."""
    inputs = 31  # two plaintexts of 16 slots, the last of which is not used
    pair = Pair(key(), Kind.ELEMENTWISE, weights_of(Kind.ELEMENTWISE, inputs, inputs))
    seen = Seen(pair, monkeypatch)
    found = pair.step(np.full((1, inputs), 32.0), np.full((1, inputs), 0.5))
    assert not found.errors
    made = of_pair(pair, 1)
    assert (made.features.groups, made.features.count) == (2, 16)
    slots = pair.active._scheme.unpack(seen.plain["dw"][0], made.updates, 1 << (made.updates.bits - 1), "test")
    assert slots.shape == (16, inputs)
    own = np.arange(inputs) % 16
    others = [int(slots[s, j]) for j in range(inputs) for s in range(16) if s != own[j]]
    bits = 62 + made.widths.update_shift
    assert len(set(others)) == len(others) == 15 * inputs
    assert max(map(abs, others)) < 1 << bits
    assert bits_are_even([each + (1 << (bits - 1)) for each in others], range(bits - 1))
    assert abs(np.mean([each > 0 for each in others]) - 0.5) < SIGMAS / 2 / math.sqrt(len(others))


def test_slots_beyond_the_features_of_a_dense_layer_are_masked_in_every_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """They hold what the follower put there, times dY of every output: a follower that puts a one reads its sum."""
    inputs, outputs = 31, 210  # two plaintexts of 16 slots
    pair = Pair(key(), Kind.DENSE, weights_of(Kind.DENSE, inputs, outputs))
    seen = Seen(pair, monkeypatch)
    assert not pair.step(np.full((1, inputs), 4.0), np.full((1, outputs), 0.5)).errors
    made = of_pair(pair, 1)
    slots = pair.active._scheme.unpack(seen.plain["dw"][0], made.updates, 1 << (made.updates.bits - 1), "test")
    beyond = [int(each) for each in slots[inputs:].ravel()]
    bits = 62 + made.widths.update_shift
    assert len(beyond) == len(set(beyond)) == (made.updates.length - inputs) * outputs >= 200
    assert max(map(abs, beyond)) < 1 << bits
    assert bits_are_even([each + (1 << (bits - 1)) for each in beyond], range(bits - 1))


# ---- exact numbers: greatest common divisors, periods


def period(numbers: np.ndarray, weight: int) -> float:
    """How much numbers look like multiples: 1 where they are, about 1/√count where they are not."""
    return float(abs(np.exp(2j * np.pi * (numbers % weight) / weight).mean()))


def multiples_of(weight: int, kind: Kind, bell: bool, monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """Z and dX in their integers, of a layer whose weights are all the same."""
    if not bell:
        monkeypatch.setattr(drawn, "bell", lambda secret, rows, columns, bits: np.zeros((len(rows), columns), np.int64))
    rng = np.random.default_rng(4)
    batch, columns = (32, 12) if kind is Kind.ELEMENTWISE else (96, 1)
    pair = Pair(key(), kind, np.full(columns, weight / 2**16) if kind is Kind.ELEMENTWISE else np.array([[2.0]]))
    x, dy = np.clip(rng.normal(size=(batch, columns)), -8, 8), rng.normal(size=(batch, columns)) / batch
    found = pair.step(x, dy)
    assert not found.errors and found.output is not None and found.gradient is not None
    scale = int(found.sent["scale"])
    return [np.rint(found.output * 2.0**28).ravel(), np.rint(np.ldexp(found.gradient, scale + 16)).ravel()]


@pytest.mark.parametrize("kind", list(Kind))
def test_a_weight_does_not_show_as_a_divisor_nor_as_a_period(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither to the leader (x·w) nor to the follower (dY·w), for a weight of 2, where noise hides it least of all.

    A dense layer of one column and one unit is no better than an elementwise one. The attacker is given w, and asks
    only whether it is that.
    """
    weight = 2 << 16
    for numbers in multiples_of(weight, kind, True, monkeypatch):
        assert math.gcd(*map(int, numbers)) < 1000
        assert period(numbers, weight) < SIGMAS / math.sqrt(len(numbers))
    for numbers in multiples_of(weight, kind, False, monkeypatch):  # the attack is one
        assert math.gcd(*map(int, numbers)) % weight == 0 and period(numbers, weight) == pytest.approx(1)


def test_noise_of_an_eighth_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    bell = drawn.bell
    monkeypatch.setattr(drawn, "bell", lambda secret, rows, columns, bits: bell(secret, rows, columns, bits - 3))
    for numbers in multiples_of(2 << 16, Kind.ELEMENTWISE, True, monkeypatch):
        assert period(numbers, 2 << 16) > SIGMAS / math.sqrt(len(numbers))


# ---- noise that repetition does not average away, and that is no other's


def noise_of(pair: Pair, found: Step, x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    fine, whole = np.rint(x * 2.0**12), np.rint(weights * 2.0**16)
    assert found.output is not None and not found.errors
    return np.rint(found.output * 2.0**28 - (fine @ whole if pair.kind is Kind.DENSE else fine * whole))


@pytest.mark.parametrize("kind", list(Kind))
def test_a_row_has_its_noise_wherever_it_stands(kind: Kind) -> None:
    """In another batch, at another place: the mean over many evaluations is no more exact than one of them."""
    pair = Pair(key(), kind, weights_of(kind, 3, 3))
    x = np.random.default_rng(5).normal(size=(6, 3))
    one = noise_of(pair, pair.step(x), x, pair.weights)
    order = [4, 1, 0]
    assert np.array_equal(noise_of(pair, pair.step(x[order]), x[order], pair.weights), one[order])
    assert len(np.unique(one)) == one.size  # no two numbers of it are alike


@pytest.mark.parametrize("kind", list(Kind))
def test_noise_is_another_under_other_weights_shares_and_keys(kind: Kind) -> None:
    """Else it could be taken off: by subtracting two steps, or by whoever can compute it."""
    x = np.random.default_rng(5).normal(size=(6, 3))
    dy, outputs = np.random.default_rng(6).normal(size=(6, 3)) / 100, 3
    first = Pair(key(), kind, weights_of(kind, 3, outputs))
    found = first.step(x, dy, keep=False)
    seen, returned = [noise_of(first, found, x, first.weights)], [found.gradient]
    other = Pair(key(2048, True), kind, weights_of(kind, 3, outputs))  # the same shares, another follower's secret
    seen.append(noise_of(other, other.step(x), x, other.weights))
    for _ in range(2):  # shares of 62 bits, of the same W
        again = Pair(key(), kind, first.weights)
        again.step(x, dy * 0)
        assert np.array_equal(again.weights, first.weights)
        weights = again.weights
        found = again.step(x, dy)
        seen.append(noise_of(again, found, x, weights))
        returned.append(found.gradient)
    for held in (seen, returned):
        numbers = np.stack(held)
        assert all((a != b).mean() > 0.99 for i, a in enumerate(numbers) for b in numbers[:i])
    deviation = np.std(np.stack(seen)) / 2.0 ** Widths(kind, 3, outputs, 6).output_bell_bits
    assert 0.7 < deviation < 1.4


def test_the_follower_cannot_compute_the_leaders_noise_by_trying_weights() -> None:
    """A layer of one weight: for each w that it can be, V and so the noise follow; the one that fits all rows is w."""
    pair = Pair(key(), Kind.ELEMENTWISE, np.array([1.03]))
    rng = np.random.default_rng(7)
    assert not pair.step(rng.normal(size=(4, 1)), rng.normal(size=(4, 1)) / 100).errors
    held, truth = pair.follower, pair.leader.values + pair.follower.values
    dy = np.array([[0.01], [-0.013], [0.02]])
    found = pair.step(np.ones((3, 1)), dy, keep=False)
    scale = int(found.sent["scale"])
    assert found.gradient is not None
    numbers = np.rint(np.ldexp(found.gradient, scale + 16)).astype(np.int64).ravel()

    def fits(weight: np.ndarray, number: int) -> bool:
        secret = drawn.secret_of((weight - held.values).tobytes(), held.tag.tobytes(), b"")
        near = round(number / int(weight[0]))
        steps = np.arange(near - 8, near + 9)[:, np.newaxis]
        return bool((steps * weight + drawn.bell(secret, steps, 1, 17) == number).any())

    found_weights = [each for each in range(-200, 201) if all(fits(truth + each, int(number)) for number in numbers)]
    assert found_weights != [0]
