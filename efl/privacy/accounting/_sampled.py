"""What Gaussian releases over Poisson samples cost, under add/remove; dp-accounting does the mathematics.

* RDP: Mironov, Talwar and Zhang, "Rényi Differential Privacy of the Sampled Gaussian Mechanism", arXiv:1908.10530.
* PLD: Koskela, Jälkö and Honkela, arXiv:1906.03049; discretised from above (Doroshenko et al., "Connect the Dots",
  arXiv:2207.04380), so that the result is an upper bound whatever the grid.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from efl.errors import ConfigError

# The deviation of one release's rounding, as a share of that release's own deviation of the privacy loss.
_ROUNDING = 0.1
_RENYI_PRECISION = 1e-12
_FINEST, _COARSEST = 2e-6, 5e-3
_LARGE = 100.0


class Sampled(NamedTuple):
    """``releases`` Gaussian releases over samples that are drawn afresh each time.

    Attributes:
      noise: Standard deviation over sensitivity.
      probability: Of a row, in each sample.
      releases: How many.
    """

    noise: float
    probability: float
    releases: int


class Pure(NamedTuple):
    """``times`` mechanisms of pure ``epsilon``."""

    epsilon: float
    times: int


def library(name: str = "dp_accounting") -> Any:
    """A module of dp-accounting, imported when it is needed.

    Args:
      name: The module.

    Returns:
      The module.

    Raises:
      ConfigError: It is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            "efl.privacy: the privacy of sampled training is computed by the package dp-accounting, which cannot be "
            f"imported ({error}). Install the extra 'privacy': pip install '.[privacy]' in efl's sources"
        ) from error


def epsilon_of(
    sampled: Sequence[Sampled], pure: Sequence[Pure], overflow: float, delta: float, accountant: str
) -> tuple[float, float | None]:
    """ε of everything together.

    A sample that is cut to a cap differs from a Poisson sample with a probability η. Over all samples of a run,
    P(S) ≤ P'(S) + η for either data set, so δ grows by at most (1 + e^ε)·η (Chua et al., "Scalable DP-SGD: Shuffling
    vs. Poisson Subsampling", arXiv:2411.04205).

    Args:
      sampled: Gaussian releases over Poisson samples.
      pure: Mechanisms of pure ε.
      overflow: η, summed over all samples.
      delta: The target.
      accountant: ``"rdp"`` or ``"pld"``; above an ε of 100 by the former, it is used for both.

    Returns:
      ε, and the order of Rényi divergence that gave it (None for PLD).
    """
    ask = _rdp(sampled, pure)
    # The grid of privacy losses is as long as the losses are large, and so is the time: where there is next to no
    # privacy, Rényi's figure, an upper bound too, will do.
    if accountant == "pld" and ask(delta)[0] <= _LARGE:
        ask = _pld(sampled, pure)
    epsilon, order = ask(delta)
    while overflow > 0 and math.isfinite(epsilon):
        left = delta - overflow * (1 + math.exp(epsilon)) if epsilon < 700 else -1.0
        if left <= 0:
            return math.inf, None
        larger, order = ask(left)
        if larger <= epsilon * (1 + 1e-12):
            break
        # A little more than was found, so that the search ends and errs upwards.
        epsilon = larger * (1 + 1e-6)
    return epsilon, order


def _rdp(sampled: Sequence[Sampled], pure: Sequence[Pure]) -> Any:
    """A function from δ to ε and the best order."""
    library()
    rdp = library("dp_accounting.rdp")
    orders = np.asarray(rdp.RdpAccountant().orders, dtype=np.float64)
    divergences = np.zeros_like(orders)
    for part in sampled:
        divergences = divergences + part.releases * _divergence(part.noise, part.probability)
    for each in pure:
        divergences = divergences + each.times * _response_divergence(each.epsilon, orders)

    def ask(delta: float) -> tuple[float, float | None]:
        epsilon, order = rdp.compute_epsilon(orders, divergences, delta)
        return float(epsilon), float(order) if math.isfinite(epsilon) else None

    return ask


@lru_cache(maxsize=64)
def _divergence(noise: float, probability: float) -> Any:
    """Rényi divergence of one release, at the accountant's orders."""
    events = library()
    event = events.GaussianDpEvent(noise)
    if probability < 1:
        event = events.PoissonSampledDpEvent(probability, event)
    spent = library("dp_accounting.rdp").RdpAccountant().compose(event)
    # The logarithm of a sum near 1, added up to this precision: without the term, very large noise would cost nothing.
    rounding = _RENYI_PRECISION / (np.asarray(spent.orders, dtype=np.float64) - 1)
    return np.asarray(spent.rdp, dtype=np.float64) + (rounding if probability < 1 else 0)


def _response_divergence(epsilon: float, orders: Any) -> Any:
    """Rényi divergence of a randomised response, the worst case of pure ε (Mironov, arXiv:1702.07476, table II)."""
    both = np.logaddexp(orders * epsilon, (1 - orders) * epsilon) - np.logaddexp(0, epsilon)
    return both / (orders - 1)


def _pld(sampled: Sequence[Sampled], pure: Sequence[Pure]) -> Any:
    """A function from δ to ε and None."""
    library()
    distributions = library("dp_accounting.pld.privacy_loss_distribution")
    common = library("dp_accounting.pld.common")
    interval = _interval(sampled)
    spent = distributions.identity(value_discretization_interval=interval)
    for part in sampled:
        if part.probability < 1:
            one = _distribution(part.noise, part.probability, interval)
            one = one.self_compose(part.releases) if part.releases > 1 else one
        else:
            one = distributions.from_gaussian_mechanism(
                part.noise / math.sqrt(part.releases), value_discretization_interval=interval
            )
        spent = spent.compose(one)
    for each in pure:
        worst = common.DifferentialPrivacyParameters(each.epsilon, 0)
        one = distributions.from_privacy_parameters(worst, value_discretization_interval=interval)
        spent = spent.compose(one.self_compose(each.times) if each.times > 1 else one)
    return lambda delta: (float(spent.get_epsilon_for_delta(delta)), None)


@lru_cache(maxsize=8)
def _distribution(noise: float, probability: float, interval: float) -> Any:
    """The privacy loss distribution of one release; to make it takes longer than to compose it with itself."""
    distributions = library("dp_accounting.pld.privacy_loss_distribution")
    return distributions.from_gaussian_mechanism(
        noise, value_discretization_interval=interval, sampling_prob=probability
    )


def _interval(sampled: Sequence[Sampled]) -> float:
    """The grid of privacy losses.

    Rounding adds at most interval²/4 of variance for each release; a release's own is about q²(e^(1/σ²) − 1) (Bu et
    al., arXiv:1911.11607, section 4). Measured over nine settings: ε at most 0.07 % above that on dp-accounting's
    default grid of 1e-4, which is itself 2 % too large at q = 0.001, σ = 5.
    """
    releases = sum(part.releases for part in sampled if part.probability < 1)
    if not releases:
        return 1e-4
    variance = sum(
        part.releases * part.probability**2 * math.expm1(min(part.noise**-2, 20.0))
        for part in sampled
        if part.probability < 1
    )
    wanted = min(max(_ROUNDING * math.sqrt(variance / releases), _FINEST), _COARSEST)
    # Few different grids, so that distributions made for one composition serve the next.
    return float(2.0 ** (math.floor(2 * math.log2(wanted)) / 2))
