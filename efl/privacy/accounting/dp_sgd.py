"""The privacy of DP-SGD from its hyperparameters, the noise for a target, and the steps that a target leaves.

    epsilon, _ = compute_dp_sgd_privacy(60_000, 256, 1.3, 20, 1e-5)                                     # 1.11
    compute_dp_sgd_privacy(60_000, 256, 1.3, 20, 1e-5, accountant="pld").epsilon                        # 1.01
    compute_dp_sgd_privacy(60_000, 256, 1.3, 20, 1e-5, sampling="none").epsilon                         # 19.94
    compute_noise(60_000, 256, 3.0, 20, 1e-5)                                                           # 0.80

The defaults are those of tensorflow-privacy: Poisson sampling, add/remove, RDP. **They are a guarantee only where every
step's batch was drawn by Poisson sampling and the adversary does not see who was drawn.** For shuffled batches the
guarantee is that of ``sampling="none"``; against the peer of a vertical federation, who knows every batch and that a
row exists, that of ``sampling="none", relation="replace_one"``. ``efl.privacy.adversary_table`` tells which is which.

Sources: Abadi et al., "Deep Learning with Differential Privacy", arXiv:1607.00133; those of the accountants stand in
``events``.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from efl.errors import ConfigError
from efl.privacy.accounting import _checks
from efl.privacy.accounting.events import (
    Mechanism,
    Privacy,
    PureMechanism,
    batches_per_epoch,
    check_words,
    compute_epsilon,
)

__all__ = ["compute_dp_sgd_privacy", "compute_noise", "max_steps"]

_log = logging.getLogger("efl.privacy")
# The noise multiplier is found to this share of itself, from above.
_PRECISION = 1e-4
_LARGEST_NOISE = 2.0**20
MOST_STEPS = 10**9


def compute_dp_sgd_privacy(
    n: int,
    batch_size: int,
    noise_multiplier: float,
    epochs: float,
    delta: float,
    *,
    accountant: str = "rdp",
    sampling: str = "poisson",
    relation: str = "add_remove",
    microbatched: bool = False,
) -> Privacy:
    """ε of DP-SGD, with the arguments and the result of tensorflow-privacy's function of this name.

    Args:
      n: Number of rows.
      batch_size: Rows in a batch: the expected number with Poisson sampling. Not the number of micro-batches.
      noise_multiplier: Standard deviation of the noise over the clip. 0 gives an ε of inf.
      epochs: Passes over the rows; may be fractional.
      delta: δ. A warning is logged where it is above 1/n.
      accountant: ``"rdp"`` (Rényi divergence) or ``"pld"`` (privacy loss distributions: closer, slower).
      sampling: ``"poisson"``: every step draws each row with probability ``batch_size / n``, unseen by the adversary.
        ``"none"``: each row takes part once in an epoch, and the adversary may know when; exact, whatever the
        accountant.
      relation: ``"add_remove"``; ``"replace_one"`` with ``sampling="none"`` only.
      microbatched: Whether micro-batches of more than one row are clipped as a whole, which doubles the sensitivity
        under add/remove. (tensorflow-privacy's function of this name does not count that.)

    Returns:
      ``(epsilon, opt_order)``, as tensorflow-privacy's: the second is the order of Rényi divergence that gave ε, and
      None where no such order was involved.

    Raises:
      ConfigError: An argument is out of its range, or dp-accounting is missing (not needed with ``sampling="none"``).
    """
    where = "efl.privacy.compute_dp_sgd_privacy"
    _check(where, n, batch_size, delta, accountant, sampling, relation)
    _checks.noise(where, noise_multiplier)
    run = _run(where, n, batch_size, epochs, microbatched)
    _warn_of_delta(where, n, delta)
    return compute_epsilon(
        [run(float(noise_multiplier), sampling)], delta, relation=relation, sampling=sampling, accountant=accountant
    )


def compute_noise(
    n: int,
    batch_size: int,
    target_epsilon: float,
    epochs: float,
    delta: float,
    *,
    accountant: str = "rdp",
    sampling: str = "poisson",
    relation: str = "add_remove",
    microbatched: bool = False,
) -> float:
    """The smallest noise multiplier with which DP-SGD stays within a target ε.

    Args:
      n: Number of rows.
      batch_size: Rows in a batch.
      target_epsilon: The largest ε that is wanted.
      epochs: Passes over the rows; may be fractional.
      delta: δ. A warning is logged where it is above 1/n.
      accountant: As in ``compute_dp_sgd_privacy``.
      sampling: As in ``compute_dp_sgd_privacy``.
      relation: As in ``compute_dp_sgd_privacy``.
      microbatched: As in ``compute_dp_sgd_privacy``.

    Returns:
      The noise multiplier, at most 0.01 % too large, never too small: ``compute_dp_sgd_privacy`` of it is at most
      ``target_epsilon``.

    Raises:
      ConfigError: An argument is out of its range, no noise reaches the target, or dp-accounting is missing.
    """
    where = "efl.privacy.compute_noise"
    _check(where, n, batch_size, delta, accountant, sampling, relation)
    target = _target(where, target_epsilon)
    run = _run(where, n, batch_size, epochs, microbatched)
    _warn_of_delta(where, n, delta)

    def fits(noise: float) -> bool:
        spent = compute_epsilon(
            [run(noise, sampling)], delta, relation=relation, sampling=sampling, accountant=accountant
        )
        return spent.epsilon <= target

    high = 1.0
    while not fits(high):
        high *= 2
        if high > _LARGEST_NOISE:
            raise ConfigError(
                f"{where}: target_epsilon={target_epsilon!r} with delta={delta!r} is not reached by any noise that the "
                f"accountant {accountant!r} can count: expected a larger target_epsilon or delta"
                + (", or accountant='pld', which is closer" if accountant == "rdp" else "")
            )
    low = high / 2
    while fits(low):
        low, high = low / 2, low
        if high < 1 / _LARGEST_NOISE:
            return high
    while high > low * (1 + _PRECISION):
        middle = math.sqrt(low * high)
        if fits(middle):
            high = middle
        else:
            low = middle
    return high


def max_steps(
    n: int,
    batch_size: int,
    noise_multiplier: float,
    target_epsilon: float,
    delta: float,
    *,
    spent: Sequence[Mechanism | PureMechanism] = (),
    accountant: str = "rdp",
    sampling: str = "poisson",
    relation: str = "add_remove",
    microbatched: bool = False,
) -> int:
    """How many steps may still be taken before a target ε is passed.

    Args:
      n: Number of rows.
      batch_size: Rows in a batch.
      noise_multiplier: Of the steps to come.
      target_epsilon: The largest ε that is wanted.
      delta: δ.
      spent: What was released before. With ``sampling="none"`` the steps to come begin a new epoch.
      accountant: As in ``compute_dp_sgd_privacy``.
      sampling: As in ``compute_dp_sgd_privacy``; without sampling, the answer is a number of epochs of full batches.
      relation: As in ``compute_dp_sgd_privacy``.
      microbatched: As in ``compute_dp_sgd_privacy``.

    Returns:
      The number of steps; 0 where the target is already reached, and never more than 10⁹.

    Raises:
      ConfigError: An argument is out of its range, or dp-accounting is missing.
    """
    where = "efl.privacy.max_steps"
    _check(where, n, batch_size, delta, accountant, sampling, relation)
    _checks.noise(where, noise_multiplier)
    target = _target(where, target_epsilon)
    batches = batches_per_epoch(where, n, batch_size, drop_remainder=True) if sampling == "none" else 1

    def fits(rounds: int) -> bool:
        steps = rounds * batches
        one = Mechanism(
            noise_multiplier,
            steps,
            rounds if sampling == "none" else None,
            batch_size / n,
            poisson=sampling == "poisson",
            microbatched=microbatched,
        )
        total = compute_epsilon([*spent, one], delta, relation=relation, sampling=sampling, accountant=accountant)
        return total.epsilon <= target

    most = MOST_STEPS // batches
    low = 0
    if accountant == "pld" and sampling == "poisson":
        # Rényi divergence is twenty times as fast and not far off: the search begins at its answer.
        guess = max_steps(n, batch_size, noise_multiplier, target, delta, spent=spent, microbatched=microbatched)
        low = guess if guess and fits(guess) else 0
    gap = max(1, low // 8)
    high = low + gap
    while high <= most and fits(high):
        low, gap = high, 2 * gap
        high = low + gap
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low * batches


def _run(where: str, n: int, batch_size: int, epochs: float, microbatched: bool) -> Callable[[float, str], Mechanism]:
    """A function from noise and sampling to the mechanism of the whole run."""
    number = _checks.real(where, "epochs", epochs, 0, "a number above 0", open_end=True)
    steps = math.ceil(number * n / batch_size)

    def run(noise: float, sampling: str) -> Mechanism:
        if sampling == "poisson":
            one = Mechanism.sampled(noise, steps, batch_size / n)
        else:
            one = Mechanism(noise, steps, min(math.ceil(number), steps), batch_size / n)
        return replace(one, microbatched=microbatched)

    return run


def _check(
    where: str, n: object, batch_size: object, delta: object, accountant: object, sampling: object, relation: object
) -> None:
    rows = _checks.whole(where, "n", n)
    batches_per_epoch(where, rows, _checks.whole(where, "batch_size", batch_size), drop_remainder=True)
    _checks.delta_of(where, delta)
    check_words(where, relation, sampling, accountant)


def _target(where: str, value: object) -> float:
    return _checks.real(where, "target_epsilon", value, 0, "a number above 0", open_end=True)


def _warn_of_delta(where: str, n: int, delta: float) -> None:
    if delta > 1 / n:
        _log.warning(
            "%s: delta=%g is above 1/n=%g: publishing a random row as it is would satisfy it. Choose one below 1/n.",
            where,
            delta,
            1 / n,
        )
