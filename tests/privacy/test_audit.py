"""An audit: what an attacker can tell from real updates stays below the epsilon that is claimed.

The attacker knows everything but one row, the canary, and sees one update of the weights. It projects the update onto
the canary's gradient, and says "present" above a threshold. Rates of right and wrong answers bound epsilon from below
(Jagielski et al., 2020, arXiv:2006.07709, section 4; exact binomial bounds).
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

import efl
from efl.privacy.accounting import Mechanism, compute_epsilon

scipy_stats = pytest.importorskip("scipy.stats")
TRIALS, ROWS, DELTA, SIGMA = 4000, 16, 1e-3, 1.0


def updates(multiplier: float, present: bool) -> np.ndarray:
    """How far each of many first updates goes in the canary's direction."""
    tf.reset_default_graph()
    x = tf.placeholder(tf.float32, [ROWS, 4])
    weights = tf.get_variable("w", [4, 1], initializer=tf.zeros_initializer())
    loss = tf.reduce_sum(tf.matmul(x, weights), 1)  # the gradient of a row is the row
    optimizer = efl.DPGradientDescentGaussianOptimizer(1.0, multiplier, learning_rate=float(ROWS))
    # Each is another step: an identical one would get identical noise.
    step = optimizer.minimize(loss, global_step=tf.train.get_or_create_global_step())
    rows = np.random.default_rng(0).normal(size=(ROWS, 4))
    rows[0] = [50.0, 0, 0, 0] if present else 0.0  # clipped to norm 1
    found = []
    with tf.Session() as sess:
        sess.run(tf.global_variables_initializer())
        take, back, read = sess.make_callable(step, [x]), sess.make_callable(weights.initializer), weights.read_value()
        read_it = sess.make_callable(read)
        for _ in range(TRIALS):
            back()
            take(rows)
            found.append(-float(read_it()[0, 0]))
    return np.asarray(found)


def empirical_epsilon(multiplier: float) -> float:
    """A lower bound of epsilon, with 95 % confidence; one half chooses the threshold, the other judges it."""
    present, absent = updates(multiplier, True), updates(multiplier, False)
    half = TRIALS // 2

    def bound(threshold: float, yes: np.ndarray, no: np.ndarray) -> float:
        hits, alarms = int((yes > threshold).sum()), int((no > threshold).sum())
        lower = scipy_stats.beta.ppf(0.025, hits, len(yes) - hits + 1) if hits else 0.0
        upper = scipy_stats.beta.ppf(0.975, alarms + 1, len(no) - alarms) if alarms < len(no) else 1.0
        return math.log((lower - DELTA) / upper) if lower > DELTA else 0.0

    candidates = np.quantile(np.concatenate([present[:half], absent[:half]]), np.linspace(0.02, 0.98, 97))
    best = max(candidates, key=lambda t: bound(t, present[:half], absent[:half]))
    return bound(best, present[half:], absent[half:])


def test_the_claim_holds_and_the_audit_can_fail() -> None:
    claimed = compute_epsilon([Mechanism(SIGMA, 1, 1)], DELTA, sampling="none").epsilon
    found = empirical_epsilon(SIGMA)
    assert 0.4 < found < claimed, "the attack is too weak to show anything, or the claim is false"
    assert empirical_epsilon(SIGMA / 10) > claimed
