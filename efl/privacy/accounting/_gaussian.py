"""What Gaussian releases cost without amplification: exact, in closed form, without dp-accounting.

k releases of sensitivity s and deviation σ, each possibly chosen after those before it was seen, cost exactly what one
Gaussian release of mean shift μ = (s/σ)√k costs (Dong, Roth and Su, "Gaussian Differential Privacy", arXiv:1905.02383,
section 3), and its δ(ε) is known (Balle and Wang, "Improving the Gaussian Mechanism for Differential Privacy",
arXiv:1805.06530, theorem 8). No accountant is tighter.

Two things are put into the same formula: a number of releases that is random but known to the adversary (δ is then the
mean over that number), and mechanisms of pure ε, whose worst case is a randomised response (Kairouz, Oh and Viswanath,
arXiv:1311.0776, theorem 3.4): its privacy loss is +ε or −ε, which moves the argument of δ.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

_Array = np.ndarray[Any, np.dtype[np.float64]]
# Weights, values: a distribution of finitely many values.
Atoms = tuple[_Array, _Array]

# More atoms than these are merged, each into the next larger one: the result stays an upper bound.
_MOST_ATOMS = 1000
# How far from its mean a binomial number is followed: so many deviations, and so many units.
_DEVIATIONS, _UNITS = 12, 40


def special() -> Any:
    """scipy.special, imported when it is needed (scikit-learn brings it; it has no types)."""
    return importlib.import_module("scipy.special")


def certain(value: float) -> Atoms:
    """The distribution of a value that is known."""
    return np.ones(1), np.array([float(value)])


def plus(left: Atoms, right: Atoms) -> Atoms:
    """The distribution of the sum of two independent values; rounded up where it has too many atoms."""
    weights = np.multiply.outer(left[0], right[0]).ravel()
    values = np.add.outer(left[1], right[1]).ravel()
    if len(values) <= _MOST_ATOMS:
        return weights, values
    grid: _Array = np.linspace(values.min(), values.max(), _MOST_ATOMS)
    places = np.minimum(np.searchsorted(grid, values, side="left"), _MOST_ATOMS - 1)
    merged: _Array = np.zeros(_MOST_ATOMS)
    np.add.at(merged, places, weights)
    return merged, grid


def binomial(trials: int, probability: float, most: int | None) -> tuple[Atoms, float]:
    """The distribution of how often a row was drawn, and the mass of the upper tail that is left out.

    Args:
      trials: Number of draws.
      probability: Of the row, in each of them.
      most: A bound on the number that holds for another reason, or None.

    Returns:
      The atoms (the lower tail is counted with the smallest of them), and the mass beyond the largest.
    """
    if probability == 1:
        return certain(trials if most is None else min(trials, most)), 0.0
    functions = special()
    mean = trials * probability
    width = _DEVIATIONS * math.sqrt(mean * (1 - probability)) + _UNITS
    first, last = max(0, math.floor(mean - width)), min(trials, math.ceil(mean + width))
    counts = np.arange(first, last + 1, dtype=np.float64)
    logs = (
        functions.gammaln(trials + 1)
        - functions.gammaln(counts + 1)
        - functions.gammaln(trials - counts + 1)
        + counts * math.log(probability)
        + (trials - counts) * math.log1p(-probability)
    )
    weights = np.exp(logs)
    if first:
        weights[0] += functions.bdtr(first - 1, trials, probability)
    beyond = float(functions.bdtrc(last, trials, probability)) if last < trials else 0.0
    if most is not None:
        if most <= last:
            weights[-1] += beyond
            beyond = 0.0
        return (weights, np.minimum(counts, most)), beyond
    return (weights, counts), beyond


def responses(epsilon: float, count: int) -> Atoms:
    """The privacy loss of ``count`` mechanisms of pure ``epsilon``, in the worst case."""
    (weights, losses), _ = binomial(count, 1 / (1 + math.exp(-epsilon)), None)
    return weights, (2 * losses - count) * epsilon


def epsilon_of(squares: Atoms, losses: Atoms, lost: float, delta: float) -> float:
    """The smallest ε with δ(ε) ≤ ``delta``, for a Gaussian release of random shift and further privacy losses.

    Args:
      squares: Distribution of μ², which the adversary knows.
      losses: Distribution of the privacy loss that comes on top.
      lost: Mass for which nothing is promised; it is part of δ.
      delta: The target.

    Returns:
      ε, rounded up in its last digits; inf where no ε will do.
    """
    weights = np.multiply.outer(squares[0], losses[0])
    shifts = np.sqrt(squares[1])[:, None]
    return smallest(lambda epsilon: lost + float(np.sum(weights * _delta(shifts, epsilon - losses[1][None]))), delta)


def smallest(delta_at: Callable[[float], float], delta: float) -> float:
    """The smallest ε ≥ 0 at which a falling function is at most ``delta``, from above; inf beyond 10⁹."""
    if delta_at(0.0) <= delta:
        return 0.0
    low, high = 0.0, 1.0
    while delta_at(high) > delta:
        low, high = high, 2 * high
        if high > 1e9:
            return math.inf
    while high - low > 1e-10 * high:
        middle = (low + high) / 2
        if delta_at(middle) > delta:
            low = middle
        else:
            high = middle
    return high


def _delta(shift: _Array, epsilon: _Array) -> _Array:
    """δ(ε) of a Gaussian release: Φ(μ/2 − ε/μ) − e^ε Φ(−μ/2 − ε/μ), for every real ε."""
    functions = special()
    some = np.where(shift > 0, shift, 1.0)
    upper = some / 2 - epsilon / some
    lower = some / 2 + epsilon / some
    # ε − lower²/2 = −upper²/2, so the large e^ε and the tiny Φ need not be multiplied.
    far = np.exp(-(upper**2) / 2) * functions.erfcx(np.maximum(lower, 0) / math.sqrt(2)) / 2
    near = np.exp(np.minimum(epsilon, 0)) * functions.ndtr(-lower)
    gaussian = functions.ndtr(upper) - np.where(lower > 0, far, near)
    nothing = -np.expm1(np.minimum(epsilon, 0))
    result: _Array = np.maximum(np.where(shift > 0, gaussian, nothing), 0)
    return result


def total(parts: Sequence[Atoms]) -> Atoms:
    """The distribution of a sum of independent values."""
    result = certain(0)
    for part in parts:
        result = plus(result, part)
    return result
