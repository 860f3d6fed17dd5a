"""Whole steps of random shapes, to the last unit of the integers that they are made of; foreign keys; known weights."""

from __future__ import annotations

import functools
import secrets
from typing import Any

import gmpy2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from efl.paillier import PrivateKey, PublicKey
from efl.protocol import Kind, PassiveLayer, Widths
from efl.protocol.rounds import Share, first_share
from tests.paillier.keypairs import key
from tests.protocol.pair import Pair

ENDS = (32.0, -32.0, 0.0, 2.0**-13, -(2.0**-9), 1.0)


@functools.cache
def foreign() -> PrivateKey:
    """A key as others make them: one prime is 1 mod 4, so no short exponents."""
    while True:
        p, q = (gmpy2.next_prime(3 << 1022 | secrets.randbits(1022)) for _ in range(2))
        if p % 4 == 1 and q % 4 == 3 and (p * q).bit_length() == 2048:
            return PrivateKey(int(p), int(q), PublicKey(int(p * q)))


def scaled_to_fit(kind: Kind, inputs: int, outputs: int, rng: np.random.Generator) -> np.ndarray:
    """Weights under which |x| ≤ 32 gives |Z| < 64."""
    if kind is Kind.ELEMENTWISE:
        return rng.uniform(-1.9, 1.9, inputs)
    return rng.uniform(-1.9, 1.9, (inputs, outputs)) / inputs


def check(pair: Pair, x: np.ndarray, dy: np.ndarray) -> None:
    """One step, each of its three results against what integers have to give.

    Z: x in units of 2^-12 times W in units of 2^-16, and a bell below six deviations. dX: dY·2^scale rounded up or
    down, times W, and a bell. W: see below.
    """
    kind, before = pair.kind, pair.leader.values + pair.follower.values
    widths = Widths(kind, x.shape[1], dy.shape[1], len(x))
    found = pair.step(x, dy)
    assert not found.errors, found.errors
    assert found.output is not None and found.gradient is not None
    fine = np.rint(x * 2.0**12).astype(np.int64)
    products = fine @ before if kind is Kind.DENSE else fine * before
    assert np.abs(found.output * 2.0**28 - products).max() < 6 << widths.output_bell_bits
    assert np.abs(products * 2.0**-28 - pair_product(kind, x, before)).max() <= 2.0**-13 * norm(kind, before, 0) + 1e-12

    scale = int(found.sent["scale"])
    assert not dy.any() or 2.0**11 < np.abs(dy).max() * 2.0**scale < 2.0**13
    held = np.ldexp(dy, scale)
    exact = held @ before.T.astype(np.float64) if kind is Kind.DENSE else held * before
    error = np.abs(np.ldexp(found.gradient, scale + 16) - exact)
    assert error.max() < norm(kind, before, -1) * 2.0**16 + (6 << widths.input_gradient_bell_bits)

    # x is rounded to units of 2^-8 and lr·dY to some of 2^-s, each up or down; so is their product, to those of W.
    units, steps = x * 2.0**8, dy * pair.rate * 2.0**widths.step_scale_bits
    asked = units.T @ steps if kind is Kind.DENSE else (units * steps).sum(0)
    sums = np.abs(units).sum(0)[:, np.newaxis] if kind is Kind.DENSE else np.abs(units).sum(0)
    moved = before - (pair.leader.values + pair.follower.values)
    most = (sums + np.abs(steps).sum(0) + len(x)) * 2.0**-widths.update_shift
    assert (np.abs(moved - asked * 2.0**-widths.update_shift) < 1 + most).all()


def pair_product(kind: Kind, x: np.ndarray, integers: np.ndarray) -> np.ndarray:
    return x @ (integers * 2.0**-16) if kind is Kind.DENSE else x * (integers * 2.0**-16)


def norm(kind: Kind, integers: np.ndarray, axis: int) -> float:
    """The largest sum of magnitudes of weights along an axis."""
    magnitudes = np.abs(integers) * 2.0**-16
    return float(magnitudes.sum(axis).max() if kind is Kind.DENSE else magnitudes.max())


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from(list(Kind)),
    st.integers(1, 20),
    st.integers(1, 8),
    st.integers(1, 8),
    st.sampled_from([0.0, 1e-30, 1e-6, 1.0]),
    st.integers(0, 2**31),
)
def test_steps_of_random_shapes(kind: Kind, batch: int, inputs: int, units: int, size: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    outputs = units if kind is Kind.DENSE else inputs
    pair = Pair(key(), kind, scaled_to_fit(kind, inputs, outputs, rng), rate=0.03)
    for _ in range(2):  # of whole shares from the second on
        x = np.clip(rng.normal(size=(batch, inputs)) * 8, -32, 32)
        x = np.where(rng.random(x.shape) < 0.3, rng.choice(ENDS, x.shape), x)
        check(pair, x, rng.uniform(-1, 1, (batch, outputs)) * size / batch)


@pytest.mark.parametrize("kind", list(Kind))
@pytest.mark.parametrize("batch", [1, 55])  # 55 rows: two plaintexts of 28 slots, of which one is not used
def test_all_inputs_at_their_ends(kind: Kind, batch: int) -> None:
    outputs = 2 if kind is Kind.DENSE else 3
    weights = np.full((3, 2), 0.6) if kind is Kind.DENSE else np.full(3, -1.9)
    for end in (32.0, -32.0):
        pair = Pair(key(), kind, weights, rate=0.03)
        check(pair, np.full((batch, 3), end), np.full((batch, outputs), -1.0 / batch))


def test_a_larger_layer() -> None:
    """More features than lie in one plaintext, in each of the three packings."""
    rng = np.random.default_rng(1)
    pair = Pair(key(), Kind.DENSE, scaled_to_fit(Kind.DENSE, 54, 3, rng), rate=0.03)
    check(pair, rng.uniform(-32, 32, (54, 54)), rng.normal(size=(54, 3)) / 100)


@pytest.mark.parametrize("kind", list(Kind))
def test_a_key_that_others_made(kind: Kind) -> None:
    private = foreign()
    assert private.public.kind == ""
    rng = np.random.default_rng(2)
    outputs = 2
    pair = Pair(private, kind, scaled_to_fit(kind, 2, outputs, rng), rate=0.03)
    for _ in range(2):
        check(pair, rng.uniform(-32, 32, (3, 2)), rng.normal(size=(3, outputs)) / 10)


def test_steps_that_follow_their_own_outputs_are_gradient_descent(caplog: pytest.LogCaptureFixture) -> None:
    """Least squares, dY from the Z that came, beside float64.

    What a step adds to W's error is the update's (one unit; what rounding lr·dY and x costs) and
    rate·xᵀ times Z's. Where no eigenvalue of I - rate·xᵀx/B is beyond ±1, errors of steps do not
    grow: they add up at most.
    """
    rng = np.random.default_rng(3)
    batch, inputs, outputs, rate, count = 16, 4, 2, 0.2, 6
    x = np.clip(rng.normal(size=(batch, inputs)), -3, 3)
    assert rate * np.linalg.eigvalsh(x.T @ x / batch).max() < 2
    pair = Pair(key(), Kind.DENSE, rng.normal(size=(inputs, outputs)) / 2, rate=rate)
    held, target, bound = pair.weights, x @ (pair.weights + rng.normal(size=(inputs, outputs)) / 3), 0.0
    for _ in range(count):
        assert not pair.step(x, (pair_output(pair, x) - target) / batch).errors
        dy = (x @ held - target) / batch
        sums, scale = np.abs(x).sum(0)[:, np.newaxis], Widths(Kind.DENSE, inputs, outputs, batch).step_scale_bits
        added = 2.0**-16 + sums * 2.0**-scale + 2.0**-8 * (rate * np.abs(dy).sum(0) + batch * 2.0**-scale + 1e-4)
        added += sums * rate / batch * (6 * 2.0**-12 + 2.0**-13 * np.abs(held).sum(0).max())
        bound += float(np.linalg.norm(added))
        held = held - rate * x.T @ dy
    assert "clipped" not in caplog.text
    assert np.linalg.norm(pair.weights - held) < bound < 0.02
    assert np.linalg.norm(pair.weights - held) < 1e-3  # as errors have a mean of zero


def pair_output(pair: Pair, x: np.ndarray) -> np.ndarray:
    found = pair.step(x)
    assert found.output is not None and not found.errors
    return found.output


def test_updates_smaller_than_a_unit_are_taken_by_chance() -> None:
    """Half a unit each: rounded to the nearest all would move or none, by cutting those of one sign only."""
    pair = Pair(key(), Kind.DENSE, np.zeros((12, 12)), rate=1.0)
    before = pair.leader.values + pair.follower.values
    # x is 16 units of 2^-8, lr·dY one of 2^-13: the product is 16 where 32 are one unit of W.
    assert not pair.step(np.full((1, 12), 2.0**-4), np.tile([[2.0**-13, -(2.0**-13)]], (1, 6))).errors
    moved = pair.leader.values + pair.follower.values - before
    for half, numbers in ((-0.5, moved[:, ::2]), (0.5, moved[:, 1::2])):
        assert set(np.unique(numbers)) == {0, 2 * half}
        assert abs(numbers.mean() - half) < 5 * 0.5 / np.sqrt(numbers.size)


def test_a_gradient_of_nothing_moves_nothing_and_gives_noise_only() -> None:
    for kind in Kind:
        pair = Pair(key(), kind, np.full((2, 2), 0.7) if kind is Kind.DENSE else np.full(2, 0.7))
        before, old = pair.weights, pair.leader.values
        found = pair.step(np.ones((3, 2)), np.zeros((3, 2)))
        assert not found.errors and found.gradient is not None
        assert np.array_equal(pair.weights, before) and (pair.leader.values != old).all()
        assert np.abs(found.gradient).max() < 12 and int(found.sent["scale"]) == 0


# ---- weights that the leader knows


def knowing(kind: Kind, weights: np.ndarray) -> Pair:
    pair = Pair(key(), kind, weights)
    outputs = weights.shape[-1]
    pair.passive = PassiveLayer(
        pair.passive._scheme, kind, len(weights), outputs, learning_rate=pair.rate, known_origin=True
    )
    pair.leader = first_share(weights)
    pair.follower = first_share(np.random.default_rng(9).normal(size=weights.shape))  # its half, which is to be nothing
    return pair


@pytest.mark.parametrize("kind", list(Kind))
def test_weights_that_the_leader_gives_are_those_of_the_first_step(
    kind: Kind, caplog: pytest.LogCaptureFixture
) -> None:
    weights = np.full((3, 2), 0.5) if kind is Kind.DENSE else np.ones(3)
    x, dy = np.ones((2, 3)), np.full((2, 2 if kind is Kind.DENSE else 3), 0.5)
    pair = knowing(kind, weights)
    expected = x @ weights if kind is Kind.DENSE else x * weights
    for _ in range(2):  # evaluations do not end it
        assert np.abs(pair_output(pair, x) - expected).max() < 5e-3
    found = pair.step(x, dy)
    assert found.output is not None and np.abs(found.output - expected).max() < 5e-3
    assert found.gradient is not None
    np.testing.assert_allclose(found.gradient, dy @ weights.T if kind is Kind.DENSE else dy * weights, atol=2e-3)
    step = x.T @ dy if kind is Kind.DENSE else (x * dy).sum(0)
    assert np.abs(pair.weights - (weights - pair.rate * step)).max() < 2.0**-12
    assert caplog.text.count("the leader has given it weights that it knows") == 1
    # From now on the follower has a share of its own, whatever the leader says.
    after = pair.weights
    assert np.abs(pair.follower.values).min() > 0 and np.abs(pair.leader.values - first_share(after).values).min() > 1
    expected = x @ after if kind is Kind.DENSE else x * after
    assert np.abs(pair_output(pair, x) - expected).max() < 5e-3


def test_a_share_that_was_trained_is_never_given_up() -> None:
    """A leader that says that it knew the weights, later, would else learn x∘V."""
    pair = Pair(key(), Kind.DENSE, np.full((2, 2), 0.5))
    x = np.ones((2, 2))
    assert not pair.step(x, np.ones((2, 2)) / 100).errors
    found = pair.step(x, changes={"origin": lambda _: np.array(1, np.int64)})
    assert found.output is not None and np.abs(found.output - pair.product(x)).max() < 5e-3


# ---- evaluation


@pytest.mark.parametrize("kind", list(Kind))
def test_evaluation_leaves_shares_as_they_are(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(key(), kind, np.full((2, 2), 0.5) if kind is Kind.DENSE else np.ones(2))
    returned: list[Share] = []
    forward = pair.active.forward

    def spied(*given: Any) -> Share:
        returned.append(forward(*given))
        return returned[-1]

    monkeypatch.setattr(pair.active, "forward", spied)
    before = [pair.leader.values.copy(), pair.follower.values.copy()]
    trained = pair.step(np.ones((3, 2)), np.zeros((3, 2)), keep=False)
    evaluated = pair.step(np.ones((3, 2)))
    assert set(trained.sent) - set(evaluated.sent) == {"xr", "u", "dw", "dx", "scale"}
    assert set(evaluated.sent) < set(trained.sent) and evaluated.shares is None
    assert all(share is pair.follower for share in returned)
    assert all(np.array_equal(a, b.values) for a, b in zip(before, (pair.leader, pair.follower)))


@pytest.mark.parametrize("kind", list(Kind))
@pytest.mark.parametrize("momentum", [0.9, 0.3])
def test_momentum_is_tensorflows(kind: Kind, momentum: float) -> None:
    """Of batches of several sizes, so that the update is masked at several scales."""
    rng = np.random.default_rng(3)
    weights = rng.uniform(-0.3, 0.3, (5, 3) if kind is Kind.DENSE else 5)
    pair, velocity = Pair(key(), kind, weights, rate=0.5, momentum=momentum), np.zeros_like(weights)
    for batch in (8, 8, 40, 3, 8, 8):
        x = rng.uniform(-1, 1, (batch, 5))
        dy = rng.normal(size=(batch, weights.shape[-1])) * 0.1 / batch
        found = pair.step(x, dy)
        assert not found.errors, found.errors
        # tf.train.MomentumOptimizer: accumulation = momentum * accumulation + gradient; w -= rate * accumulation.
        velocity = momentum * velocity + 0.5 * (x.T @ dy if kind is Kind.DENSE else (x * dy).sum(0))
        weights = weights - velocity
    assert np.abs(velocity).max() > 0.01
    # x is rounded to 2^-8, the update to 2^-16, and what a step is off by moves the weights 1 / (1 - momentum) times.
    np.testing.assert_allclose(pair.weights, weights, rtol=0, atol=6 * 2.0**-13 / (1 - momentum))
    moved = pair.leader.velocity + pair.follower.velocity
    np.testing.assert_allclose(moved * 2.0**-16, velocity, rtol=0, atol=2.0**-13 / (1 - momentum))


def test_a_velocity_is_shared_as_weights_are() -> None:
    """Each part is a difference of two uniform shares; either alone is the same for other gradients."""
    rng = np.random.default_rng(4)
    for gradient in (0.0, 0.1):
        pair = Pair(key(), Kind.DENSE, rng.normal(size=(8, 6)) * 0.1, momentum=0.9)
        for _ in range(2):
            pair.step(rng.normal(size=(4, 8)), np.full((4, 6), gradient))
        for share in (pair.leader, pair.follower):
            size = np.abs(share.velocity.astype(np.float64))
            assert size.max() < 2.0**62 + 2.0**30
            assert abs(size.mean() / (2.0**62 / 3) - 1) < 0.4  # of a difference of two uniform ones: a third


# ---- what a step costs, as the documentation has it


@pytest.mark.parametrize("kind", list(Kind))
@pytest.mark.parametrize(("bits", "batch", "inputs", "units"), [(2048, 60, 31, 7), (3072, 5, 3, 2), (2048, 1, 30, 1)])
def test_a_step_has_as_many_ciphertexts_as_the_cost_model_says(
    kind: Kind, bits: int, batch: int, inputs: int, units: int
) -> None:
    dense = kind is Kind.DENSE
    u = units if dense else inputs
    rng = np.random.default_rng(0)
    found = Pair(key(bits), kind, rng.normal(size=(inputs, u) if dense else inputs) * 0.1).step(
        rng.normal(size=(batch, inputs)), rng.normal(size=(batch, u)) / batch / 10
    )
    assert not found.errors

    def groups(length: int, slot: int) -> int:
        return -(-length // ((bits - 1) // slot))

    log_b, log_u = ((count - 1).bit_length() for count in (batch, units))
    a, b = groups(batch, 39), groups(inputs, 70 + log_b)
    g = groups(inputs, 37 + log_u) if dense else groups(batch, 37)
    expected = {
        "xc": a * inputs, "xr": b * batch, "u": g * u if dense else inputs, "zc": a * u, "zp": a * u,
        "dw": b * u if dense else inputs, "dx": g * (batch if dense else inputs),
    }  # fmt: skip
    for name, count in expected.items():
        assert found.sent[name].shape == (count, bits // 8 if name == "zp" else bits // 4), name
