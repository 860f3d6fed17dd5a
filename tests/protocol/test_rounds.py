"""The rounds against numpy: outputs, gradients, updates; and what is refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from efl.errors import DataError
from efl.paillier import PublicKey
from efl.paillier.engine import Engine
from efl.paillier.scheme import PublicPaillier
from efl.protocol import Kind, PassiveLayer, drawn, exact
from efl.protocol.rounds import first_share
from tests.paillier.keypairs import key
from tests.protocol.pair import Pair

SHAPES = [
    (Kind.DENSE, 1, 1, 1), (Kind.DENSE, 7, 5, 3), (Kind.DENSE, 60, 30, 4), (Kind.DENSE, 3, 2, 9),
    (Kind.ELEMENTWISE, 1, 1, 1), (Kind.ELEMENTWISE, 60, 30, 30), (Kind.ELEMENTWISE, 3, 4, 4),
]  # fmt: skip
# Deviations of what is added, six of which hold always; the rounding of x and of W comes on top.
OUTPUT = {Kind.DENSE: 6 * 2.0**-12, Kind.ELEMENTWISE: 6 * 2.0**-11}


def weights(kind: Kind, inputs: int, outputs: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if kind is Kind.DENSE:
        return rng.normal(size=(inputs, outputs)) / np.sqrt(inputs)
    return 1 + 0.1 * rng.normal(size=inputs)


@pytest.mark.parametrize(("kind", "batch", "inputs", "outputs"), SHAPES)
@pytest.mark.parametrize(("bits", "fast"), [(2048, False), (2048, True), (3072, False)])
def test_a_step_is_numpys(kind: Kind, batch: int, inputs: int, outputs: int, bits: int, fast: bool) -> None:
    if (bits, fast) != (2048, False) and batch > 7:
        pytest.skip("once is enough")
    rng = np.random.default_rng(batch)
    pair = Pair(key(bits, fast), kind, weights(kind, inputs, outputs))
    for _ in range(2):
        x = np.clip(rng.normal(size=(batch, inputs)) * 3, -32, 32)
        gradient = rng.normal(size=(batch, outputs)) / batch / 10
        before, expected = pair.weights, pair.product(x)
        found = pair.step(x, gradient)
        assert not found.errors
        limit = OUTPUT[kind] + 2.0**-13 * np.abs(before).sum(0).max() + 2.0**-16
        assert found.output is not None and np.abs(found.output - expected).max() < limit
        back = gradient @ before.T if kind is Kind.DENSE else gradient * before
        unit = np.abs(gradient).max() * 2.0**-12
        assert found.gradient is not None and found.gradient.dtype == np.float64
        assert np.abs(found.gradient - back).max() < unit * (13 + np.abs(before).sum(-1).max())
        step = x.T @ gradient if kind is Kind.DENSE else (x * gradient).sum(0)
        # Rounding of rate·dY to 2^-13 for one row, half for two, times x; of x to 2^-8, by chance; of W to 2^-16.
        bound = (
            2.0**-16
            + 2.0 ** -(13 + math.ceil(math.log2(batch))) * np.abs(x).sum(0).max()
            + 2.0**-8 * pair.rate * np.abs(gradient).sum(0).max()
        )
        assert np.abs(pair.weights - (before - pair.rate * step)).max() < bound
        assert np.array_equal(pair.leader.tag, pair.follower.tag) and pair.leader.tag.any()
        assert np.abs(pair.leader.values).max() > 1 << 40


def test_evaluation_sends_less_and_changes_nothing() -> None:
    pair = Pair(key(), Kind.DENSE, weights(Kind.DENSE, 4, 2))
    x = np.random.default_rng(0).normal(size=(6, 4))
    found = pair.step(x)
    assert set(found.sent) == {"origin", "head", "xc", "zc", "zp"}
    assert found.output is not None and np.abs(found.output - pair.product(x)).max() < 2e-3
    assert not pair.leader.tag.any()


@pytest.mark.parametrize("kind", list(Kind))
@pytest.mark.parametrize("size", [0.0, 1e-310, 1e-30, 1e2, 1e14, 1e30])
def test_gradients_of_any_size_keep_their_sign(kind: Kind, size: float, caplog: pytest.LogCaptureFixture) -> None:
    outputs = 2 if kind is Kind.DENSE else 3
    pair = Pair(key(), kind, np.abs(weights(kind, 3, outputs)) + 0.5)
    x, gradient = np.ones((4, 3)), np.full((4, outputs), size)
    gradient[0] = -size
    before = pair.weights
    found = pair.step(x, gradient)
    assert not found.errors and found.gradient is not None
    expected = gradient @ before.T if kind is Kind.DENSE else gradient * before
    if 1e-30 <= size <= 1e30:
        np.testing.assert_allclose(found.gradient / size, expected / size, atol=5e-3)
    moved = pair.weights - before
    if size > 1:  # three rows push down, one up, each by the most that there is
        assert (moved < 0).all() and 0.499 < np.abs(moved).max() <= 2 * 2.0**-2
        assert "were clipped" in caplog.text
    else:
        assert np.abs(moved).max() < 1e-3


def test_small_inputs_move_weights_by_what_they_should_in_the_mean() -> None:
    """Multiples of 2^-8 are all that the gradient of the weights sees of x: rounded to the nearest they would be 0."""
    pair = Pair(key(), Kind.DENSE, weights(Kind.DENSE, 2, 1), rate=1.0)
    x, before = np.full((64, 2), 0.0015), pair.weights
    x += 1e-6 * np.arange(64)[:, np.newaxis]  # rows of their own
    for _ in range(12):
        pair.step(x, np.full((64, 1), 0.01))
    expected = -12 * (x * 0.01).sum(0)
    np.testing.assert_allclose((pair.weights - before)[:, 0], expected, rtol=0.25)


def test_many_steps_are_gradient_descent() -> None:
    rng = np.random.default_rng(3)
    pair = Pair(key(), Kind.DENSE, weights(Kind.DENSE, 5, 2), rate=0.5)
    held, x = pair.weights, rng.normal(size=(16, 5))
    target = x @ rng.normal(size=(5, 2))
    for _ in range(12):
        found = pair.step(x, (pair.product(x) - target) / 16 / 4)
        held = held - 0.5 * x.T @ (x @ held - target) / 16 / 4
        assert not found.errors
    assert np.abs(pair.weights - held).max() < 12 * 2.0**-14


def test_inputs_out_of_range(caplog: pytest.LogCaptureFixture) -> None:
    pair = Pair(key(), Kind.DENSE, weights(Kind.DENSE, 3, 2))
    for bad, text in ((33.0, "larger than 32"), (np.nan, "NaN or infinite"), (np.inf, "NaN or infinite")):
        x = np.zeros((4, 3))
        x[1, 2] = bad
        found = pair.step(x, np.zeros((4, 2)))
        assert isinstance(found.errors["follower"], DataError)
        assert "encrypted layer 'hetero'" in str(found.errors["follower"]) and text in str(found.errors["follower"])
    clipping = Pair(key(), Kind.DENSE, weights(Kind.DENSE, 3, 2), clip=True)
    x = np.full((4, 3), 40.0)
    found = clipping.step(x)
    assert np.abs(found.output - clipping.product(np.full((4, 3), 32.0))).max() < 0.1
    assert "12 of 12 values are larger than 32 in magnitude, and were clipped" in caplog.text


def test_an_output_beyond_its_bound_is_met_in_the_guard() -> None:
    pair = Pair(key(), Kind.DENSE, np.full((4, 2), 4.0))
    found = pair.step(np.full((3, 4), 8.0))  # 128, twice the limit
    assert isinstance(found.errors["leader"], DataError) and "beyond 2^" in str(found.errors["leader"])


def test_gradients_that_are_not_finite_are_refused() -> None:
    pair = Pair(key(), Kind.DENSE, weights(Kind.DENSE, 3, 2))
    found = pair.step(np.ones((4, 3)), np.full((4, 2), np.nan))
    assert "8 of 8 numbers of its output's gradient are NaN or infinite" in str(found.errors["leader"])


def rows_of(value: int) -> Any:
    def change(rows: np.ndarray) -> np.ndarray:
        rows[0] = np.frombuffer(value.to_bytes(rows.shape[1], "little"), np.uint8)
        return rows

    return change


def hostile() -> list[tuple[str, Any, str, str]]:
    public = key().public
    n, square = int(public.n), int(public.square)
    prime = int(key()._whole[0].prime)
    found = []
    for name, whose in (("xc", "leader"), ("xr", "leader"), ("u", "leader"), ("zc", "follower"), ("dw", "follower")):
        found += [
            (name, lambda rows: rows[:-1], whose, "expected "),
            (name, lambda rows: rows.astype(np.uint16), whose, "expected "),
            (name, rows_of(0), whose, "is not between 0 and"),
            (name, rows_of(square), whose, "is not between 0 and"),
            (name, rows_of(prime), whose, "is no encryption under key"),
        ]
    twisted = next(x for x in range(2, 100) if _jacobi(x, n) == -1)
    found += [
        ("xc", rows_of(pow(twisted, n, square)), "leader", "was not masked as encryptions"),
        ("head", lambda head: head[:-1], "leader", "head of the follower"),
        ("head", lambda head: np.concatenate([np.full(8, 255, np.uint8), head[8:]]), "leader", "rows"),
        ("head", lambda head: np.concatenate([head[:8], head[8:] ^ 1]), "leader", "not of one another"),
        ("scale", lambda scale: scale + 1000, "follower", "one integer within"),
        ("scale", lambda scale: scale.astype(np.float64), "follower", "one integer within"),
        ("origin", lambda origin: origin + 7, "follower", "one integer within"),
        ("zp", lambda rows: rows[:, :-1], "leader", "expected "),
    ]
    return found


def _jacobi(x: int, n: int) -> int:
    import gmpy2

    return int(gmpy2.jacobi(x, n))


@pytest.mark.parametrize("number", range(33))
def test_what_cannot_be_a_message_is_refused(number: int) -> None:
    cases = hostile()
    assert len(cases) == 33
    name, change, whose, text = cases[number]
    pair = Pair(key(), Kind.DENSE, weights(Kind.DENSE, 3, 2))
    found = pair.step(np.ones((4, 3)), np.full((4, 2), 0.01), {name: change})
    assert isinstance(found.errors[whose], DataError), found.errors
    assert text in str(found.errors[whose]) and "hetero" in str(found.errors[whose])


def test_batches_of_different_sizes_are_refused() -> None:
    pair = Pair(key(), Kind.DENSE, weights(Kind.DENSE, 3, 2))
    found = pair.step(np.ones((4, 3)), rows=5)
    assert "the follower's batch has 4 rows and the leader's 5" in str(found.errors["leader"])


def test_a_key_of_another_making_works_and_says_that_it_is_slow(caplog: pytest.LogCaptureFixture) -> None:
    foreign = PublicKey(int(key().public.n))
    assert foreign.kind == ""
    layer = PassiveLayer(PublicPaillier(Engine(foreign, workers=0)), Kind.DENSE, 2, 1, learning_rate=0.1)
    rows = layer._scheme.encrypt(np.array([[1]], object))
    assert len(rows) == 1 and "was not made by efl: every encryption takes a full-length exponent" in caplog.text


# ---- numbers


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 6), st.integers(4, 18), st.randoms())
def test_exact_products(a: int, k: int, b: int, bits: int, random: Any) -> None:
    rng = np.random.default_rng(random.randrange(1 << 30))
    left = rng.integers(-(1 << bits) + 1, 1 << bits, (a, k))
    right = rng.choice([-(1 << 62), (1 << 62) - 1, 0, -1, 1], (k, b)) + rng.integers(-9, 9, (k, b)) * (
        rng.random() > 0.5
    )
    limbs, weight = exact.matmul(left, bits, right)
    whole = sum(limb.astype(object) << weight * i for i, limb in enumerate(limbs))
    assert (whole == left.astype(object) @ right.astype(object)).all()
    limbs, weight = exact.multiply(left[:, :1], bits, right[:1])
    whole = sum(limb.astype(object) << weight * i for i, limb in enumerate(limbs))
    assert (whole == left[:, :1].astype(object) * right[:1].astype(object)).all()


def test_drawn_numbers_are_distributed_as_they_say() -> None:
    rows = np.arange(4000)[:, np.newaxis]
    found = drawn.bell(b"secret", rows, 10, 16).astype(np.float64)
    assert abs(found.mean()) < 5 * 2**16 / np.sqrt(found.size) and abs(found.std() / 2**16 - 1) < 0.02
    assert np.abs(found).max() < 6 * 2**16
    values = np.tile(np.array([[0.25, -0.75, 3.0]]), (4000, 1)) + 1e-9 * rows
    rounded = drawn.rounded(b"secret", values, 100)
    assert np.abs(rounded.mean(0) - [0.25, -0.75, 3.0]).max() < 0.05 and set(rounded[:, 2]) <= {3, 4}
    share = drawn.share((20_000,)).astype(np.float64)
    assert abs(share.mean()) < 2**61 / 50 and abs(share.std() / (2**62 / np.sqrt(12)) - 1) < 0.03
    wide = drawn.wide((2000,), 75)
    assert max(wide) < 1 << 74 and min(wide) >= -(1 << 74) and max(abs(each) for each in wide) > 1 << 73


def test_weights_become_shares_and_back() -> None:
    assert (first_share(np.array([1.0, -0.5])).values == [1 << 16, -(1 << 15)]).all()
