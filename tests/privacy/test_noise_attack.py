"""What the last bits of a release tell: nothing of what the noise was added to.

The attacker knows two candidates for the values before noise, the deviation, and this code. It takes each candidate
away and looks whether what is left can be noise: two variates of one pair share a radius and an angle, and if those
were of few bits, they would lie on a grid for the right candidate and anywhere for the wrong one. (Mironov, 2012, "On
significance of the least significant bits for differential privacy", for single numbers.)
"""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

import efl
from efl.privacy import release
from efl.privacy.noise import Ledger, Releases, Seed, gaussian, releases

SIZE, DEVIATION = 12_000, 3.0
PAIRS = SIZE // 2
TOO_MUCH = 6.0  # standard deviations


def candidates() -> tuple[np.ndarray, np.ndarray]:
    """Sums that differ by one example's clipped gradient."""
    rng = np.random.default_rng(5)
    values, example = rng.normal(size=(2, SIZE)).astype(np.float32)
    return values, values + example / np.linalg.norm(example)


def released(number: int = 0) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """A release of the first candidate, and both."""
    both = candidates()
    made = Releases(Seed(bytes([number] * 32)), Ledger.in_memory())
    out = made.noised(both[0], step=1, group="train", clip=1.0, noise_multiplier=DEVIATION, rows=8)
    assert out.dtype == np.float32
    return out, both


def evidence(out: np.ndarray, candidate: np.ndarray) -> float:
    """How far what is left lies on a grid of angles or radii, in standard deviations of what chance makes."""
    left = (out.astype(np.float64) - candidate) / DEVIATION
    x, y = left[:PAIRS], left[PAIRS:]
    angle, uniform = np.arctan2(y, x) / (2 * np.pi), np.exp(-(x * x + y * y) / 2)
    most = 0.0
    for number in (angle, uniform):
        for bits in range(12, 40):
            cells = number * 2.0**bits
            distance = np.abs(cells - np.rint(cells)).mean()  # 1/4 where nothing is known, with variance 1/48
            most = max(most, (0.25 - distance) * np.sqrt(48 * PAIRS))
    return most


def with_few_bits(key: bytes, count: int, bits: int = 24) -> np.ndarray:
    """Noise that keeps the attack honest: Box and Muller's, exact but for an angle of 24 bits."""
    rng = np.random.default_rng(list(key))
    radius = np.sqrt(-2 * np.log1p(-rng.random(count // 2)))
    angle = rng.integers(1 << bits, size=count // 2) * (2 * np.pi * 2.0**-bits)
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])


def test_the_attack_tells_noise_of_few_bits_that_is_rounded_to_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("efl.privacy.noise.ahead.gaussian", with_few_bits)
    monkeypatch.setattr(releases, "on_grid", lambda values, deviation: values)
    out, (right, wrong) = released()
    assert evidence(out, right) > 5 * TOO_MUCH
    assert evidence(out, wrong) < TOO_MUCH


@pytest.mark.parametrize("number", range(5))
def test_what_is_left_tells_nothing_of_the_candidate(number: int) -> None:
    out, both = released(number)
    for candidate in both:
        assert evidence(out, candidate) < TOO_MUCH


def test_the_stream_alone_has_no_grid_that_float32_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(releases, "on_grid", lambda values, deviation: values)
    out, both = released()
    assert all(evidence(out, candidate) < TOO_MUCH for candidate in both)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("multiplier", [0.3, 1.0, 1.1, 7.0])
@pytest.mark.parametrize("size", [0.0, 1e-6, 1.0, 1e4])
def test_a_release_lies_on_a_grid_that_does_not_depend_on_the_values(
    dtype: type, multiplier: float, size: float
) -> None:
    values = (size * np.random.default_rng(1).normal(size=2000)).astype(dtype)
    made = Releases(Seed(bytes(32)), Ledger.in_memory())
    out = made.noised(values, step=1, group="train", clip=2.0, noise_multiplier=multiplier, rows=8)
    step = 2.0 ** (np.floor(np.log2(2.0 * multiplier)) - 9)
    assert 2.0**-10 < step / (2.0 * multiplier) <= 2.0**-9
    np.testing.assert_array_equal(out % dtype(step), 0.0)
    assert abs((out - values).std() / (2.0 * multiplier) - 1) < 0.1


def test_rounding_is_to_the_nearest_so_the_noise_stays_what_it_is() -> None:
    made = Releases(Seed(bytes(32)), Ledger.in_memory())
    values = np.linspace(-1, 1, 100_000)
    out = made.noised(values, step=1, group="train", clip=1.0, noise_multiplier=1.0, rows=8)
    number = made.ledger.phases()[0].releases
    assert number == 1
    left = out - values
    assert abs(left.mean()) < 4 / np.sqrt(left.size)
    assert abs(left.var() - 1) < 4 * np.sqrt(2 / left.size)


def test_a_sent_release_has_the_value_that_was_noised_to_the_last_bit() -> None:
    tf.reset_default_graph()
    x = tf.placeholder(tf.float32, [None, 3])
    private = efl.privacy.GaussianRelease(1.0, 0.7)(x)
    sent = release.bind(private, "train/x", Releases(Seed(bytes(32)), Ledger.in_memory()))
    assert sent is not None
    (gradient,) = tf.gradients(private, x)
    rows = np.random.default_rng(0).normal(size=(500, 3))
    with tf.Session() as sess:
        sess.run(tf.global_variables_initializer())
        got, back = sess.run([private, gradient], {x: rows})
    np.testing.assert_array_equal(got % np.float32(2.0**-10), 0.0)
    assert np.all(np.isfinite(back)) and np.abs(back).max() > 0


@pytest.mark.parametrize("count", [2, 1000, 12_000, 40_000])
def test_every_point_makes_one_pair(count: int) -> None:
    z = gaussian(bytes(32), count)
    assert np.isfinite(z).all()
    assert len(np.unique(z)) == count
