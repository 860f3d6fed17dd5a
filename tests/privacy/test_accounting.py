"""What releases cost and for whom that is a guarantee: published figures, other implementations, and laws."""

from __future__ import annotations

import ast
import importlib.util
import itertools
import logging
import math
import re
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from efl.errors import ConfigError
from efl.privacy import accounting
from efl.privacy.accounting import (
    AdversaryTable,
    Mechanism,
    Party,
    PureMechanism,
    Releases,
    _gaussian,
    adversary_table,
    compute_dp_sgd_privacy,
    compute_epsilon,
    compute_noise,
    jointly,
    max_steps,
    overflow_probability,
    unknown_party,
)

N, BATCH, EPOCHS, DELTA = 60_000, 256, 20, 1e-5
Q, STEPS = BATCH / N, math.ceil(EPOCHS * N / BATCH)
POISSON = Mechanism.sampled(1.3, STEPS, Q)
SHUFFLED = Mechanism.shuffled(1.3, 20 * 235, N, BATCH)

dp_accounting = pytest.importorskip("dp_accounting")


def mnist(noise: float, **how: Any) -> float:
    return compute_dp_sgd_privacy(N, BATCH, noise, EPOCHS, DELTA, **how).epsilon


@lru_cache
def pld(mechanisms: tuple[Mechanism, ...], delta: float = DELTA) -> float:
    return compute_epsilon(mechanisms, delta).epsilon


# --- The figures of the issue -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("noise", "epsilon"), [(1.3, 1.11), (1.0, 1.76), (0.7, 4.50), (0.5, 14.3)])
def test_poisson_by_renyi_divergence(noise: float, epsilon: float) -> None:
    assert mnist(noise) == pytest.approx(epsilon, rel=0.01)


def test_poisson_by_privacy_loss_distributions() -> None:
    assert pld((POISSON,)) == pytest.approx(1.01, rel=0.01)
    assert mnist(1.3, accountant="pld") == pld((POISSON,))


def test_without_amplification() -> None:
    assert mnist(1.3, sampling="none") == pytest.approx(19.9, rel=0.005)
    assert mnist(1.3, sampling="none", relation="replace_one") == pytest.approx(52, rel=0.01)
    assert compute_epsilon([SHUFFLED], DELTA, sampling="none").epsilon == mnist(1.3, sampling="none")


def test_a_shorter_sequence_meets_the_least_noise() -> None:
    """It may have begun later than the others, and nobody says when."""
    quiet, loud = Mechanism(1.0, 100, None, 0.01, poisson=True), Mechanism(3.0, 100, None, 0.01, poisson=True)
    late = Mechanism(1.5, 100, None, 0.01, poisson=True)
    worst = pld((*jointly([[quiet], [late]]), loud))
    best = pld((quiet, *jointly([[loud], [late]])))
    assert worst > best * 1.05
    for order in ([quiet, loud], [loud, quiet]):
        assert pld(jointly([order, [late]])) == pytest.approx(worst, rel=1e-9)
        assert pld(jointly([[late], order])) == pytest.approx(worst, rel=1e-9)


def test_two_parties_jointly() -> None:
    assert pld(jointly([[POISSON], [POISSON]])) == pytest.approx(1.86, rel=0.01)
    both = jointly([[SHUFFLED], [SHUFFLED]])
    assert compute_epsilon(both, DELTA, sampling="none").epsilon == pytest.approx(31.9, rel=0.005)
    assert compute_epsilon(both, DELTA, sampling="none", relation="replace_one").epsilon == pytest.approx(88, rel=0.005)


# --- Other implementations ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "batch", "noise", "epochs", "delta"), [(60_000, 256, 1.1, 15, 1e-5), (5000, 50, 2, 3, 1e-4)]
)
def test_default_is_tensorflow_privacys(n: int, batch: int, noise: float, epochs: float, delta: float) -> None:
    theirs, _ = tensorflow_privacy("compute_dp_sgd_privacy_lib").compute_dp_sgd_privacy(n, batch, noise, epochs, delta)
    epsilon, order = compute_dp_sgd_privacy(n, batch, noise, epochs, delta)
    # They try fewer orders.
    assert epsilon == pytest.approx(theirs, rel=0.005)
    assert order is not None and order > 1


def test_noise_is_tensorflow_privacys(capsys: pytest.CaptureFixture[str]) -> None:
    theirs = tensorflow_privacy("compute_noise_from_budget_lib").compute_noise(N, BATCH, 3.0, EPOCHS, DELTA, 0.1)
    assert compute_noise(N, BATCH, 3.0, EPOCHS, DELTA) == pytest.approx(theirs, rel=0.005)


def test_microbatches_double_the_sensitivity_as_in_tensorflow_privacy() -> None:
    one = tensorflow_privacy("compute_dp_sgd_privacy_lib")._compute_dp_sgd_example_privacy
    assert mnist(1.3, microbatched=True) == pytest.approx(one(EPOCHS, 1.3, DELTA, True, Q), rel=0.01)
    unamplified = mnist(1.3, microbatched=True, sampling="none")
    assert unamplified == mnist(1.3, sampling="none", relation="replace_one")
    assert unamplified == mnist(1.3, microbatched=True, sampling="none", relation="replace_one")
    assert unamplified <= one(EPOCHS, 1.3, DELTA, True)


@pytest.mark.parametrize("delta", [1e-3, 1e-9])
@pytest.mark.parametrize("noise", [0.4, 3.0, 100.0])
def test_closed_form_is_the_gaussian_of_dp_accounting(noise: float, delta: float) -> None:
    accountant = dp_accounting.pld.PLDAccountant(value_discretization_interval=1e-3 / noise)
    theirs = accountant.compose(dp_accounting.GaussianDpEvent(noise), 7).get_epsilon(delta)
    ours = compute_epsilon([Mechanism(noise, 7)], delta, sampling="none").epsilon
    assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)


def test_pure_mechanisms_with_and_without_sampling_agree_with_dp_accounting() -> None:
    distributions = importlib.import_module("dp_accounting.pld.privacy_loss_distribution")
    common = importlib.import_module("dp_accounting.pld.common")
    pure = distributions.from_privacy_parameters(common.DifferentialPrivacyParameters(0.5, 0)).self_compose(3)
    whole = pure.compose(distributions.from_gaussian_mechanism(2 / math.sqrt(10)))
    mixed = [Mechanism(2.0, 10), PureMechanism(0.5, 3)]
    exact = compute_epsilon(mixed, DELTA, sampling="none").epsilon
    assert exact == pytest.approx(whole.get_epsilon_for_delta(DELTA), rel=1e-3)
    # Sampling with probability 1 is none: the other way of counting gives the same, from above.
    certain = [Mechanism.sampled(2.0, 10, 1.0), PureMechanism(0.5, 3)]
    assert exact <= compute_epsilon(certain, DELTA).epsilon * (1 + 1e-9) <= exact * 1.001
    assert exact < compute_epsilon(certain, DELTA, accountant="rdp").epsilon < exact * 1.15


def test_pure_mechanisms_alone() -> None:
    for how in ({"sampling": "none"}, {"accountant": "pld"}):
        assert compute_epsilon([PureMechanism(2.0)], 1e-9, **how).epsilon == pytest.approx(2.0, rel=1e-3)
    assert compute_epsilon([PureMechanism(0.1, 400)], 1e-5, sampling="none").epsilon < 400 * 0.1 / 2
    assert compute_epsilon([PureMechanism(0.0)], 1e-9, sampling="none").epsilon == 0
    # δ = p (1 − e^(ε − 2)) for a randomised response with p = 1/(1 + e^−2), with or without a little Gaussian.
    expected = 2 + math.log(1 - 0.3 * (1 + math.exp(-2)))
    for others in ([], [Mechanism(1e4, 1)]):
        together = compute_epsilon([PureMechanism(2.0), *others], 0.3, sampling="none").epsilon
        assert together == pytest.approx(expected, rel=1e-3)


# --- Laws ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{}, {"sampling": "none"}, {"sampling": "none", "relation": "replace_one"}])
def test_more_noise_and_fewer_epochs_and_larger_delta_cost_less(how: dict[str, str]) -> None:
    def epsilon(noise: float = 1.0, epochs: float = 10, delta: float = 1e-5, batch: int = 256) -> float:
        return compute_dp_sgd_privacy(N, batch, noise, epochs, delta, **how).epsilon

    middle = epsilon()
    assert epsilon(noise=1.1) < middle < epsilon(noise=0.9)
    assert epsilon(epochs=9) < middle < epsilon(epochs=11)
    assert epsilon(delta=1.5e-5) < middle < epsilon(delta=1e-6)
    if not how:
        assert epsilon(batch=128) < middle < epsilon(batch=512)


def test_accountants_and_samplings_are_ordered() -> None:
    assert mnist(1.3, accountant="pld") < mnist(1.3) < mnist(1.3, sampling="none")


@pytest.mark.parametrize("how", [{"accountant": "rdp"}, {"accountant": "pld"}, {"sampling": "none"}])
def test_phases_of_one_kind_are_one_phase(how: dict[str, str]) -> None:
    first, second, whole = (Mechanism(1.1, k, k, 0.01, poisson="accountant" in how) for k in (300, 200, 500))
    two = compute_epsilon([first, second], DELTA, **how).epsilon
    assert two == pytest.approx(compute_epsilon([whole], DELTA, **how).epsilon, rel=1e-6)
    assert two > compute_epsilon([first], DELTA, **how).epsilon * 1.05


def test_phases_of_different_noise_and_batch_lie_between_the_extremes() -> None:
    dear, cheap = Mechanism.sampled(0.9, 500, 0.01), Mechanism.sampled(1.5, 500, 0.005)
    for accountant in ("rdp", "pld"):
        low, middle, high = (
            compute_epsilon(phases, DELTA, accountant=accountant).epsilon
            for phases in ([cheap, cheap], [cheap, dear], [dear, dear])
        )
        assert low < middle < high
    fixed = [Mechanism(2.0, 100, 3), Mechanism(1.0, 100, 5)]
    equivalent = [Mechanism(1 / math.sqrt(3 / 4 + 5), 1)]
    mixed = compute_epsilon(fixed, DELTA, sampling="none").epsilon
    assert mixed == pytest.approx(compute_epsilon(equivalent, DELTA, sampling="none").epsilon, rel=1e-9)


def test_a_poisson_sample_that_the_adversary_sees_is_a_mean_over_how_often_a_row_was_drawn() -> None:
    noise, q, steps, delta = 2.0, 0.2, 12, 1e-3
    epsilon = compute_epsilon(
        [Mechanism.sampled(noise, steps, q)], delta, sampling="none", relation="replace_one"
    ).epsilon
    share = [math.comb(steps, k) * q**k * (1 - q) ** (steps - k) for k in range(steps + 1)]
    # Φ is that of the standard library here.
    spent = sum(w * gaussian_delta(2 * math.sqrt(k) / noise, epsilon) for k, w in enumerate(share))
    assert spent == pytest.approx(delta, rel=1e-6)


def test_many_visible_phases_are_merged_upwards_and_hardly() -> None:
    whole = compute_epsilon([Mechanism.sampled(3.0, 6000, 0.02)], DELTA, sampling="none").epsilon
    phases = [Mechanism.sampled(3.0 + 1e-9 * i, 1000, 0.02) for i in range(6)]
    assert whole < compute_epsilon(phases, DELTA, sampling="none").epsilon < whole * 1.01


def test_what_is_left_of_a_binomial_number_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    visible = Mechanism.sampled(2.0, 1000, 0.03)
    exact = compute_epsilon([visible], 0.01, sampling="none").epsilon
    monkeypatch.setattr(_gaussian, "_DEVIATIONS", 3)
    monkeypatch.setattr(_gaussian, "_UNITS", 0)
    (weights, counts), beyond = _gaussian.binomial(1000, 0.03, None)
    assert len(counts) < 40 and 1e-3 < beyond < 1e-2
    assert weights.sum() + beyond == pytest.approx(1, abs=1e-12)
    assert exact < compute_epsilon([visible], 0.01, sampling="none").epsilon < exact * 1.2
    assert compute_epsilon([visible], 1e-4, sampling="none").epsilon == math.inf
    (weights, counts), beyond = _gaussian.binomial(1000, 0.03, 35)
    assert (weights.sum(), beyond, counts.max()) == (pytest.approx(1, abs=1e-12), 0, 35)


def test_a_bound_on_participations_bounds_a_visible_poisson_sample() -> None:
    free, bounded, never = (Mechanism(1.0, 1000, most, 0.01, poisson=True) for most in (None, 12, 1000))
    epsilons = [compute_epsilon([each], DELTA, sampling="none").epsilon for each in (bounded, free, never)]
    assert epsilons[0] < epsilons[1] == epsilons[2]
    assert epsilons[0] < compute_epsilon([Mechanism(1.0, 12)], DELTA, sampling="none").epsilon


def test_joint_releases_add_up_in_the_inverse_square() -> None:
    one, two = Mechanism.sampled(1.0, 10, 0.1), Mechanism.sampled(2.0, 10, 0.1)
    (joint,) = jointly([[one], [two]])
    assert joint.noise_multiplier == pytest.approx(1 / math.sqrt(1 + 1 / 4))
    assert (joint.releases, joint.sampling_probability, joint.poisson) == (10, 0.1, True)
    assert jointly([[one]]) == (one,) and jointly([]) == ()
    assert jointly([[one], [Mechanism(0, 10, None, 0.1, poisson=True)]])[0].noise_multiplier == 0


def test_joint_sequences_change_at_different_steps() -> None:
    one = [Mechanism(1.0, 6, 3, 0.1), Mechanism(2.0, 4, 2, 0.1)]
    other = [Mechanism(1.0, 4, 2, 0.1), Mechanism(3.0, 5, 3, 0.1)]
    merged = jointly([one, other])
    assert [each.releases for each in merged] == [4, 2, 3, 1]
    assert [each.participations for each in merged] == [2, 2, 2, 1]
    inverse = [each.noise_multiplier**-2 for each in merged]
    assert inverse == pytest.approx([2, 1 + 1 / 9, 1 / 4 + 1 / 9, 1 / 4])


def test_joint_releases_keep_what_is_worse_of_each() -> None:
    plain = Mechanism(1.0, 5, 5, 0.1)
    microbatched = Mechanism(1.0, 5, 5, 0.1, microbatched=True, overflow=1e-9)
    for pair in ([plain], [microbatched]), ([microbatched], [plain]):
        (joint,) = jointly(pair)
        assert (joint.microbatched, joint.overflow) == (True, 1e-9)
    assert not jointly([[plain], [plain]])[0].microbatched


def test_shuffled_steps_count_the_epochs_that_they_touch() -> None:
    def epochs(steps: int, first: int = 0, drop: bool = False) -> int | None:
        return Mechanism.shuffled(1.0, steps, 1000, 300, first_step=first, drop_remainder=drop).participations

    assert [epochs(k) for k in (1, 4, 5, 8, 9)] == [1, 1, 2, 2, 3]
    assert [epochs(k, drop=True) for k in (3, 4)] == [1, 2]
    assert [epochs(2, first) for first in (0, 2, 3, 4)] == [1, 1, 2, 1]
    assert Mechanism.shuffled(1.0, 4, 1000, 300).sampling_probability == 0.3


def test_a_cap_on_the_batch_is_accounted() -> None:
    eta = overflow_probability(N, Q, 340)
    assert eta == pytest.approx(sum_of_tail(N, Q, 340), rel=1e-6) and 1e-8 < eta < 1e-6
    assert overflow_probability(100, 0.5, 100) == 0
    cut = Mechanism(1.3, STEPS, None, Q, poisson=True, overflow=1e-10)
    for accountant in ("rdp", "pld"):
        epsilon = compute_epsilon([cut], DELTA, accountant=accountant).epsilon
        left = DELTA - STEPS * 1e-10 * (1 + math.exp(epsilon))
        without = compute_epsilon([POISSON], left, accountant=accountant).epsilon
        assert without <= epsilon <= without * (1 + 1e-4)
        assert epsilon > compute_epsilon([POISSON], DELTA, accountant=accountant).epsilon
    hopeless = Mechanism(1.3, STEPS, None, Q, poisson=True, overflow=eta)
    assert compute_epsilon([hopeless], DELTA, accountant="rdp").epsilon == math.inf
    # Who sees the batches learns nothing from how they were cut.
    assert compute_epsilon([hopeless], DELTA, sampling="none") == compute_epsilon([POISSON], DELTA, sampling="none")


# --- Noise and steps for a target ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "how"),
    [
        (0.5, {}),
        (3.0, {}),
        (0.5, {"sampling": "none"}),
        (40.0, {"sampling": "none"}),
        (40.0, {"sampling": "none", "relation": "replace_one"}),
    ],
)
def test_noise_for_a_target_is_the_smallest(target: float, how: dict[str, str]) -> None:
    noise = compute_noise(N, BATCH, target, EPOCHS, DELTA, **how)
    assert mnist(noise, **how) <= target < mnist(noise / 1.0002, **how)


def test_noise_by_privacy_loss_distributions() -> None:
    noise = compute_noise(2000, 200, 3.0, 10, 1e-4, accountant="pld")
    assert noise < compute_noise(2000, 200, 3.0, 10, 1e-4) * 0.99
    spent = compute_dp_sgd_privacy(2000, 200, noise, 10, 1e-4, accountant="pld").epsilon
    assert 3.0 * (1 - 2e-3) < spent <= 3.0


@pytest.mark.parametrize("accountant", ["rdp", "pld"])
def test_steps_that_a_target_leaves(accountant: str) -> None:
    how = {"accountant": accountant}
    steps = max_steps(N, BATCH, 1.3, 0.5, DELTA, **how)
    here, beyond = (compute_epsilon([Mechanism.sampled(1.3, k, Q)], DELTA, **how).epsilon for k in (steps, steps + 1))
    assert here <= 0.5 < beyond
    assert max_steps(N, BATCH, 1.3, 0.5, DELTA, spent=[Mechanism.sampled(1.3, 40, Q)], **how) == steps - 40


def test_steps_without_amplification_are_epochs() -> None:
    target = mnist(1.3, sampling="none")
    assert max_steps(N, BATCH, 1.3, target, DELTA, sampling="none") == 20 * (N // BATCH)
    assert max_steps(N, BATCH, 1.3, target * 0.999, DELTA, sampling="none") == 19 * (N // BATCH)
    left = max_steps(N, BATCH, 1.3, target, DELTA, sampling="none", spent=[Mechanism(1.3, 235 * 15, 15)])
    assert left == 5 * (N // BATCH)


def test_steps_at_the_ends() -> None:
    assert max_steps(N, BATCH, 1.3, 0.5, DELTA, spent=[Mechanism.sampled(0.5, 1000, Q)]) == 0
    assert max_steps(N, BATCH, 0.0, 0.5, DELTA) == 0
    assert max_steps(10**9, 1, 1e5, 10.0, DELTA) == 10**9


# --- Arguments ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{}, {"accountant": "pld"}, {"sampling": "none"}])
def test_no_noise_is_no_privacy(how: dict[str, str]) -> None:
    assert compute_dp_sgd_privacy(N, BATCH, 0, EPOCHS, DELTA, **how) == (math.inf, None)


def test_the_result_unpacks_and_has_names() -> None:
    privacy = compute_dp_sgd_privacy(N, BATCH, 1.3, EPOCHS, DELTA)
    epsilon, order = privacy
    assert (privacy.epsilon, privacy.opt_order) == (epsilon, order)
    assert compute_dp_sgd_privacy(N, BATCH, 1.3, 1, DELTA, accountant="pld").opt_order is None


def test_numpy_numbers_are_numbers() -> None:
    arguments = (np.int64(N), np.int32(BATCH), np.float32(1.3), np.int64(EPOCHS), np.float64(DELTA))
    assert compute_dp_sgd_privacy(*arguments, sampling="none").epsilon == pytest.approx(19.94, rel=1e-3)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"batch_size": 60_001}, "batch_size=60001, n=60000: expected a batch of at most n rows"),
        ({"batch_size": 0}, "batch_size=0: expected a whole number of at least 1"),
        ({"batch_size": 2.5}, "batch_size=2.5: expected a whole number of at least 1"),
        ({"n": True}, "n=True: expected a whole number of at least 1"),
        ({"noise_multiplier": -1}, "noise_multiplier=-1: expected a number of at least 0"),
        ({"noise_multiplier": math.nan}, "noise_multiplier=nan: expected a number of at least 0"),
        ({"noise_multiplier": "1.3"}, "noise_multiplier='1.3': expected a number of at least 0"),
        ({"epochs": 0}, "epochs=0: expected a number above 0"),
        ({"delta": 0}, "delta=0: expected a number strictly between 0 and 1"),
        ({"delta": 1.0}, "delta=1.0: expected a number strictly between 0 and 1"),
        ({"accountant": "gdp"}, "accountant='gdp': expected 'rdp' or 'pld'"),
        ({"sampling": "shuffle"}, "sampling='shuffle': expected 'poisson' or 'none'"),
        ({"relation": "swap"}, "relation='swap': expected 'add_remove' or 'replace_one'"),
        ({"relation": "replace_one"}, "relation='replace_one' with sampling='poisson': expected relation='add_remove'"),
    ],
)
def test_wrong_arguments_are_named(wrong: dict[str, Any], message: str) -> None:
    right = {"n": N, "batch_size": BATCH, "noise_multiplier": 1.3, "epochs": EPOCHS, "delta": DELTA}
    with pytest.raises(ConfigError, match="^efl.privacy.compute_dp_sgd_privacy: " + re.escape(message)):
        compute_dp_sgd_privacy(**{**right, **wrong})
    if "noise_multiplier" not in wrong:
        del right["noise_multiplier"]
        with pytest.raises(ConfigError, match="^efl.privacy.compute_noise: " + re.escape(message)):
            compute_noise(**{**right, "target_epsilon": 3.0, **wrong})
    if "epochs" not in wrong:
        right = {"n": N, "batch_size": BATCH, "noise_multiplier": 1.3, "target_epsilon": 3.0, "delta": DELTA}
        with pytest.raises(ConfigError, match="^efl.privacy.max_steps: " + re.escape(message)):
            max_steps(**{**right, **wrong})


def test_targets_that_cannot_be_reached_are_refused() -> None:
    with pytest.raises(ConfigError, match="target_epsilon=0: expected a number above 0"):
        compute_noise(N, BATCH, 0, EPOCHS, DELTA)
    with pytest.raises(ConfigError, match="target_epsilon=1e-05 .* not reached by any noise .* or accountant='pld'"):
        compute_noise(N, BATCH, 1e-5, EPOCHS, 1e-12)


def test_a_large_delta_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="efl.privacy"):
        mnist(1.3)
        assert not caplog.records
        compute_dp_sgd_privacy(N, BATCH, 1.3, EPOCHS, 1e-4, sampling="none")
        compute_noise(N, BATCH, 3, EPOCHS, 1e-4, sampling="none")
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "efl.privacy.compute_dp_sgd_privacy",
        "efl.privacy.compute_noise",
    ]
    assert "delta=0.0001 is above 1/n=1.66667e-05" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1.3, 0), "releases=0: expected a whole number of at least 1"),
        ((-1.3, 1), "noise_multiplier=-1.3: expected a number of at least 0"),
        ((1.3, 10, 11), "participations=11: expected at most releases=10"),
        ((1.3, 10, 0), "participations=0: expected a whole number of at least 1"),
        ((1.3, 10, None, 1.5), "sampling_probability=1.5: expected a number above 0 and at most 1"),
        (
            (1.3, 10, None, None, True),
            "sampling_probability=None: expected the probability with which each row was drawn",
        ),
        ((1.3, 10, None, 0.1, True, False, 2), "overflow=2: expected a probability"),
    ],
)
def test_wrong_mechanisms_are_named(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ConfigError, match="^efl.privacy.Mechanism: " + re.escape(message)):
        Mechanism(*arguments)


def test_wrong_compositions_are_named() -> None:
    with pytest.raises(
        ConfigError, match="a mechanism of 5 releases has sampling_probability=None: expected the share"
    ):
        compute_epsilon([Mechanism(1.0, 5)], DELTA)
    with pytest.raises(ConfigError, match="jointly: releases of the same steps were drawn in different ways"):
        jointly([[Mechanism(1.0, 5, 5, 0.1)], [Mechanism(1.0, 5, 5, 0.2)]])
    with pytest.raises(ConfigError, match="PureMechanism: epsilon=-1: expected a number of at least 0"):
        PureMechanism(-1)
    with pytest.raises(ConfigError, match="first_step=-1: expected a whole number of at least 0"):
        Mechanism.shuffled(1.0, 1, 10, 5, first_step=-1)


def test_without_dp_accounting_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    for accountant in ("rdp", "pld"):
        with pytest.raises(ConfigError, match=re.escape("pip install '.[privacy]'")):
            mnist(1.3, accountant=accountant)
    assert mnist(1.3, sampling="none") == pytest.approx(19.94, rel=1e-3)


def test_the_package_imports_neither_tensorflow_nor_dp_accounting() -> None:
    here = Path(accounting.__file__).parent
    for path in sorted(here.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.startswith(("tensorflow", "tf_keras", "dp_accounting")) for name in names), path
    code = "import sys, efl.privacy.accounting; sys.exit('dp_accounting' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


# --- The table ----------------------------------------------------------------------------------------------------


def party(name: str, mechanism: Mechanism | None = POISSON, **how: Any) -> Party:
    updates = (Releases("weights", (mechanism,)),) if mechanism else ()
    return Party(name, updates=updates, **how)


def figures(table: AdversaryTable) -> list[tuple[str, Any, Any]]:
    def short(value: float | None) -> float | None:
        return None if value is None else float(f"{value:.3g}")

    return [
        (row.relation, short(row.epsilon) if row.epsilon is not None else row.reason, short(row.reported))
        for row in table.rows
    ]


def test_one_party_alone() -> None:
    assert figures(adversary_table([party("leader")], DELTA)) == [("add_remove", 1.01, None)]
    assert figures(adversary_table([party("leader", SHUFFLED)], DELTA)) == [("add_remove", 19.9, 1.01)]
    # Who knows the batches knows that a row exists.
    shown = adversary_table([party("leader", SHUFFLED)], DELTA, batches_hidden=False)
    assert figures(shown) == [("replace_one", 52.2, 1.01)] and not shown.rows[0].amplified


def test_the_federation_of_the_issue() -> None:
    leader = party("leader", SHUFFLED, sent_raw=("y_train", "labels_train"))
    follower = party("follower", SHUFFLED, sent_raw=("embedding",))
    table = adversary_table([leader, follower], DELTA)
    assert [row.adversary for row in table.rows] == [
        "outsider who sees the leader's model",
        "outsider who sees the follower's model",
        "outsider who sees both models",
        "the follower, with all that it received, about the leader's rows",
        "the leader, with all that it received, about the follower's rows",
    ]
    assert figures(table) == [
        ("add_remove", 31.9, 1.01),
        ("add_remove", 31.9, 1.01),
        ("add_remove", 31.9, 1.86),
        ("replace_one", "none: y_train, labels_train were sent raw", 1.01),
        ("replace_one", "none: embedding was sent raw", 1.01),
    ]
    assert not any(row.amplified for row in table.rows)


def test_hidden_poisson_samples_amplify_for_outsiders_and_not_for_the_peer() -> None:
    sent = (Releases("embedding", (POISSON,)),)
    table = adversary_table([party("leader", sent=sent), party("follower", sent=sent)], DELTA)
    assert [row.amplified for row in table.rows] == [True, True, True, False, False]
    assert figures(table)[:3] == [("add_remove", 1.86, 1.01), ("add_remove", 1.86, 1.01), ("add_remove", 1.86, None)]
    seen = compute_epsilon(jointly([[POISSON]] * 2), DELTA, sampling="none", relation="replace_one").epsilon
    assert [row.epsilon for row in table.rows[3:]] == [seen, seen]
    assert seen > 88
    shown = adversary_table([party("leader", sent=sent), party("follower", sent=sent)], DELTA, batches_hidden=False)
    assert [(row.relation, row.amplified) for row in shown.rows] == [("replace_one", False)] * 5


def test_one_party_that_samples_otherwise_ends_the_amplification() -> None:
    table = adversary_table([party("leader", sent_raw=("g",)), party("follower", SHUFFLED, sent_raw=("h",))], DELTA)
    assert [row.amplified for row in table.rows[:3]] == [False] * 3
    assert all("drawn in different ways" in row.reason for row in table.rows[:3])


def test_noised_messages_and_private_weights_are_composed_against_the_peer() -> None:
    follower = party("follower", SHUFFLED, sent=(Releases("embedding", (SHUFFLED,)),))
    table = adversary_table([party("leader", SHUFFLED, sent_raw=("gradient",)), follower], DELTA)
    assert figures(table)[4] == ("replace_one", 88.0, 1.86)
    # The peer's own noise protects nothing of this party's.
    bare = adversary_table([Party("leader", unprotected=("w",), sent_raw=("gradient",)), follower], DELTA)
    assert figures(bare)[4] == ("replace_one", 88.0, 1.86)


def test_weights_without_noise() -> None:
    sent = (Releases("embedding", (SHUFFLED,)),)
    follower = Party("follower", unprotected=("dense/kernel", "dense/bias"), sent=sent)
    table = adversary_table([party("leader", SHUFFLED, sent_raw=("gradient",)), follower], DELTA)
    reason = "none (weights updated without noise): follower: dense/kernel, dense/bias"
    # The leader's model, too: it was trained on what those weights made of all rows.
    assert [row.reason for row in table.rows[:3]] == [reason] * 3
    assert table.rows[4].reason == reason
    assert [row.reported and round(row.reported, 2) for row in table.rows] == [1.01, None, None, 1.01, None]
    mixed = party("leader", SHUFFLED, unprotected=("bias",))
    assert figures(adversary_table([mixed], DELTA)) == [
        ("add_remove", "none (weights updated without noise): leader: bias", None)
    ]


def test_a_peer_that_sends_nothing_does_not_touch_this_model() -> None:
    listener = Party("follower", unprotected=("w",))
    rows = figures(adversary_table([party("leader", SHUFFLED, sent_raw=("h",)), listener], DELTA))
    assert rows[0] == ("add_remove", 19.9, 1.01)
    assert rows[1][1] == rows[2][1] == "none (weights updated without noise): follower: w"
    assert rows[4] == ("replace_one", 0.0, None)


def test_weights_that_are_never_updated() -> None:
    frozen = Party("follower", sent=(Releases("embedding", (SHUFFLED,)),))
    rows = figures(adversary_table([party("leader", SHUFFLED, sent_raw=("g",)), frozen], DELTA))
    assert rows[0] == rows[2] == ("add_remove", 19.9, 1.01)
    assert rows[1] == ("add_remove", 19.9, None)
    assert rows[4] == ("replace_one", 52.2, 1.01)
    assert figures(adversary_table([Party("leader")], DELTA)) == [("add_remove", 0.0, None)]


def test_a_peer_of_which_nothing_is_known() -> None:
    table = adversary_table([party("leader", SHUFFLED, sent_raw=("g",)), unknown_party("follower")], DELTA)
    reason = "none (not known how the follower updated its weights)"
    assert [row.reason for row in table.rows] == [reason, reason, reason, "none: g was sent raw", reason]
    assert [row.reported is not None for row in table.rows] == [True, False, False, True, False]


def test_no_noise_in_one_phase_is_no_guarantee() -> None:
    broken = Party("leader", updates=(Releases("top", (SHUFFLED, Mechanism(0, 5, 1, Q))),))
    assert figures(adversary_table([broken], DELTA))[0][1] == "none (noise multiplier 0): top"


def test_figures_that_are_not_finite() -> None:
    cut = Mechanism(1.3, STEPS, None, Q, poisson=True, overflow=1e-6)
    (row,) = adversary_table([party("leader", cut)], DELTA).rows
    seen = compute_epsilon([cut], DELTA, sampling="none").epsilon
    assert (row.amplified, row.epsilon, row.reported) == (False, seen, None)
    (row,) = adversary_table([party("leader", Mechanism(1e-6, 1))], DELTA).rows
    assert (row.epsilon, row.reason) == (None, "none (no finite epsilon for this delta)")


def test_labels_alone() -> None:
    table = adversary_table(
        [party("leader", SHUFFLED, sent_raw=("g",), label_epsilon=1.5), party("follower", SHUFFLED, sent_raw=("h",))],
        DELTA,
    )
    assert figures(table)[-1] == ("replace_label", 1.5, None)
    assert table.rows[-1].adversary == "anyone, about the leader's labels alone"


def test_several_clipping_groups_of_one_party_are_one_release() -> None:
    groups = tuple(Releases(name, (POISSON,)) for name in ("a", "b"))
    assert figures(adversary_table([Party("leader", updates=groups)], DELTA)) == [("add_remove", 1.86, None)]


def test_the_table_as_text() -> None:
    leader = party("leader", SHUFFLED, sent_raw=tuple("abcdef"), label_epsilon=1.5)
    follower = party("follower", SHUFFLED, sent=(Releases("h", (SHUFFLED,)),))
    text = str(adversary_table([leader, follower], DELTA))
    lines = text.splitlines()
    assert lines[0] == "What each adversary learns about a row (delta = 1e-05)"
    assert "as commonly reported, not a guarantee here" in lines[1]
    columns = [lines[1].index(head) for head in ("adversary", "neighbouring", "amplified", "epsilon", "as commonly")]
    for line in lines[2:8]:
        for place in columns:
            # Every cell begins under its head.
            assert line[place - 2 : place].strip() == "" and (
                place >= len(line) or line[place] != " " or place == columns[4]
            )
    assert lines[2].split("  ")[0] == "outsider who sees the leader's model"
    assert re.search(r"add/remove a row +no +31\.9 \* +1\.01$", lines[2])
    assert "none: a, b, c, d and 2 more were sent raw" in lines[5]
    assert re.search(r"replace one row +no +88 +1\.86$", lines[6])
    assert lines[8].startswith("* of both parties' updates together") and lines[9].startswith("** at delta = 0")
    assert max(len(line) for line in lines) < 210


def test_wrong_parties_are_named() -> None:
    for names in ([], ["leader", "leader"], ["a", "b", "c"]):
        with pytest.raises(ConfigError, match="expected one party, or two of different names"):
            adversary_table([Party(name) for name in names], DELTA)
    with pytest.raises(ConfigError, match="sent_raw='y_train': expected a tuple of names, not one string"):
        Party("leader", sent_raw="y_train")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="label_epsilon=-1"):
        Party("leader", label_epsilon=-1)
    with pytest.raises(ConfigError, match="adversary_table: delta=2"):
        adversary_table([Party("leader")], 2)


# --- Helpers ------------------------------------------------------------------------------------------------------


def tensorflow_privacy(name: str) -> Any:
    """A file of tensorflow-privacy by itself: importing the package would load TensorFlow."""
    package = importlib.util.find_spec("tensorflow_privacy")
    if package is None or package.origin is None:
        pytest.skip("tensorflow-privacy is not installed")
    path = Path(package.origin).parent / "privacy" / "analysis" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"_their_{name}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def gaussian_delta(shift: float, epsilon: float) -> float:
    def normal(x: float) -> float:
        return math.erfc(-x / math.sqrt(2)) / 2

    if shift == 0:
        return 0.0
    return normal(shift / 2 - epsilon / shift) - math.exp(epsilon) * normal(-shift / 2 - epsilon / shift)


def sum_of_tail(n: int, q: float, cap: int) -> float:
    def log_share(k: int) -> float:
        ways = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
        return ways + k * math.log(q) + (n - k) * math.log1p(-q)

    return math.fsum(math.exp(log_share(k)) for k in itertools.islice(itertools.count(cap + 1), 500))
