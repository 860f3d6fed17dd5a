"""What a training run released, as data, and what that costs. No file format, no TensorFlow.

    steps = Mechanism.shuffled(noise_multiplier=1.3, steps=4700, n=60_000, batch_size=256)
    compute_epsilon([steps], 1e-5, sampling="none").epsilon                            # 19.94
    compute_epsilon([steps], 1e-5, sampling="none", relation="replace_one").epsilon    # 52.24

The unit of privacy is a row. The relation says in what two data sets differ that the adversary shall not tell apart:

* ``"add_remove"``: one row contributes, or it does not. Batches that are not drawn row by row are taken to stay where
  they are: the row's place is empty ("zero-out"; Kairouz et al., arXiv:2103.00039, definition 1.1). A clipped row
  moves a sum by at most the clip C.
* ``"replace_one"``: one row has other contents; that it exists, and where, is known. It moves a sum by at most 2C.

A micro-batch of several examples is clipped as a whole, so one row moves the sum by up to 2C under either relation
(Ponomareva et al., "How to DP-fy ML", arXiv:2303.00654, section 5.6).

Without amplification all is exact (Balle and Wang, arXiv:1805.06530). With Poisson sampling that the adversary does not
see it is an upper bound by Rényi divergence (``"rdp"``) or privacy loss distributions (``"pld"``, closer).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from efl.errors import ConfigError
from efl.privacy.accounting import _checks, _gaussian, _sampled

__all__ = ["Mechanism", "Privacy", "PureMechanism", "compute_epsilon", "jointly", "overflow_probability"]

ACCOUNTANTS = ("rdp", "pld")
SAMPLINGS = ("poisson", "none")
RELATIONS = ("add_remove", "replace_one")
_HERE = "efl.privacy.Mechanism"


class Privacy(NamedTuple):
    """An ε, and how it was found. Unpacks into the pair that tensorflow-privacy returns.

    Attributes:
      epsilon: ε; ``inf`` where nothing is promised.
      opt_order: The order of Rényi divergence that gave it; None where no such order was involved.
    """

    epsilon: float
    opt_order: float | None


@dataclass(frozen=True)
class Mechanism:
    """Gaussian releases of one kind: ``releases`` times a clipped sum over a batch, with noise.

    A change of noise, of batch size or of sampling begins another Mechanism; a run is a sequence of them. Two releases
    about one and the same drawn batch (two groups of variables, a step that was repeated) are not two independent
    draws: combine them with ``jointly``.

    Attributes:
      noise_multiplier: Standard deviation of the noise over the clip.
      releases: How many.
      participations: The largest number of them that one row takes part in. None: in all, or, with ``poisson``, in as
        many as chance has it.
      sampling_probability: The share of the rows in a batch. Without ``poisson`` it serves only the figure that is
        commonly reported.
      poisson: Whether every row was drawn independently, with ``sampling_probability``, for each release.
      microbatched: Whether micro-batches of more than one example were clipped as a whole.
      overflow: Probability that one drawn batch was larger than a cap and was cut: ``overflow_probability``.

    Raises:
      ConfigError: A number is out of its range, or ``poisson`` has no probability.
    """

    noise_multiplier: float
    releases: int
    participations: int | None = None
    sampling_probability: float | None = None
    poisson: bool = False
    microbatched: bool = False
    overflow: float = 0.0

    def __post_init__(self) -> None:
        _checks.noise(_HERE, self.noise_multiplier)
        _checks.whole(_HERE, "releases", self.releases)
        if self.participations is not None:
            _checks.whole(_HERE, "participations", self.participations)
            if self.participations > self.releases:
                raise ConfigError(
                    f"{_HERE}: participations={self.participations}: expected at most releases={self.releases}: a row "
                    "cannot take part in more releases than there were"
                )
        if self.sampling_probability is not None:
            _checks.probability(_HERE, "sampling_probability", self.sampling_probability)
        elif self.poisson:
            raise ConfigError(
                f"{_HERE}: sampling_probability=None: expected the probability with which each row was drawn, since "
                "poisson=True"
            )
        expected = "a probability, at least 0 and at most 1"
        if _checks.real(_HERE, "overflow", self.overflow, 0, expected) > 1:
            raise ConfigError(f"{_HERE}: overflow={self.overflow!r}: expected {expected}")

    @classmethod
    def sampled(
        cls, noise_multiplier: float, steps: int, sampling_probability: float, *, microbatched: bool = False
    ) -> Mechanism:
        """Steps over Poisson samples.

        Args:
          noise_multiplier: Standard deviation of the noise over the clip.
          steps: How many.
          sampling_probability: Of each row, in each step.
          microbatched: Whether micro-batches of more than one example were clipped as a whole.

        Returns:
          The mechanism.

        Raises:
          ConfigError: A number is out of its range.
        """
        return cls(noise_multiplier, steps, None, sampling_probability, poisson=True, microbatched=microbatched)

    @classmethod
    def shuffled(
        cls,
        noise_multiplier: float,
        steps: int,
        n: int,
        batch_size: int,
        *,
        first_step: int = 0,
        drop_remainder: bool = False,
        microbatched: bool = False,
    ) -> Mechanism:
        """Steps over batches that are disjoint within an epoch: shuffled, or in the order of the file.

        Args:
          noise_multiplier: Standard deviation of the noise over the clip.
          steps: How many.
          n: Number of rows.
          batch_size: Rows in a batch.
          first_step: Steps of the run before these: a phase that begins inside an epoch may touch one epoch more.
          drop_remainder: Whether an epoch ends with its last full batch.
          microbatched: Whether micro-batches of more than one example were clipped as a whole.

        Returns:
          The mechanism; a row takes part once in each epoch that the steps touch.

        Raises:
          ConfigError: A number is out of its range.
        """
        where = f"{_HERE}.shuffled"
        _checks.whole(where, "steps", steps)
        _checks.whole(where, "first_step", first_step, 0)
        batches = batches_per_epoch(where, n, batch_size, drop_remainder)
        epochs = (first_step + steps - 1) // batches - first_step // batches + 1
        return cls(noise_multiplier, steps, epochs, batch_size / n, microbatched=microbatched)

    def sensitivity(self, relation: str) -> float:
        """How far one row moves the sum, in units of the clip.

        Args:
          relation: ``"add_remove"`` or ``"replace_one"``.

        Returns:
          1.0 or 2.0.
        """
        return 2.0 if relation == "replace_one" or self.microbatched else 1.0


@dataclass(frozen=True)
class PureMechanism:
    """Mechanisms of pure ε, for example labels that were randomised once.

    Attributes:
      epsilon: Of each, for the relation under which it is composed.
      participations: In how many of them one row takes part.

    Raises:
      ConfigError: A number is out of its range.
    """

    epsilon: float
    participations: int = 1

    def __post_init__(self) -> None:
        _checks.real("efl.privacy.PureMechanism", "epsilon", self.epsilon, 0, "a number of at least 0")
        _checks.whole("efl.privacy.PureMechanism", "participations", self.participations)


_LEAST_NOISE = 1e-6  # a release with less costs an ε of 10^11 and more, of which nobody needs the digits


def compute_epsilon(
    mechanisms: Sequence[Mechanism | PureMechanism],
    delta: float,
    *,
    relation: str = "add_remove",
    sampling: str = "poisson",
    accountant: str = "pld",
) -> Privacy:
    """ε of several mechanisms about the same rows, each chosen possibly after those before it was seen.

    Args:
      mechanisms: What was released, one after the other. Of several parties: ``jointly`` first.
      delta: δ.
      relation: ``"add_remove"`` or ``"replace_one"``: see the module.
      sampling: ``"poisson"``: the adversary does not see which rows were drawn, and batches are taken for Poisson
        samples also where they were none (it is the caller who knows whether that is a guarantee:
        ``adversary_table``). ``"none"``: the adversary may know every batch; nothing is amplified. Where
        a mechanism is a Poisson sample, δ is the mean over how often a row was drawn.
      accountant: ``"pld"`` or ``"rdp"``. Without sampling the result is exact and does not depend on it.

    Returns:
      ε, an upper bound; and the order.

    Raises:
      ConfigError: An argument is out of its range; Poisson sampling with ``"replace_one"``, or of a mechanism without
        ``sampling_probability``; dp-accounting is missing.
    """
    where = "efl.privacy.compute_epsilon"
    _checks.delta_of(where, delta)
    check_words(where, relation, sampling, accountant)
    gaussian = [each for each in mechanisms if isinstance(each, Mechanism)]
    pure = [each for each in mechanisms if isinstance(each, PureMechanism)]
    if any(each.noise_multiplier < _LEAST_NOISE for each in gaussian):
        return Privacy(math.inf, None)
    if sampling == "none":
        return Privacy(_unamplified(gaussian, pure, delta, relation), None)
    for each in gaussian:
        if each.sampling_probability is None:
            raise ConfigError(
                f"{where}: a mechanism of {each.releases} releases has sampling_probability=None: expected the share "
                "of the rows in a batch, or sampling='none'"
            )
    parts = [
        _sampled.Sampled(each.noise_multiplier / each.sensitivity(relation), each.sampling_probability, each.releases)
        for each in gaussian
        if each.sampling_probability is not None
    ]
    overflow = sum(each.overflow * each.releases for each in gaussian)
    pures = [_sampled.Pure(each.epsilon, each.participations) for each in pure]
    return Privacy(*_sampled.epsilon_of(parts, pures, overflow, delta, accountant))


def jointly(sequences: Sequence[Sequence[Mechanism]]) -> tuple[Mechanism, ...]:
    """Several sequences of releases that were made about the same batches, step by step, as one sequence.

    Two parties, or two clipping groups of one party, that each add noise about the rows of one batch together make one
    Gaussian release, of multiplier ``1/√(Σ 1/σᵢ²)``. Sequences need not change at the same steps; where one is
    shorter, it meets the least noise of the others, and the rest of these stands alone. (Where batches are no Poisson
    samples and nothing is amplified, ``compute_epsilon`` of the sequences one after the other says the same without
    cutting mechanisms into pieces, each of which keeps the bound on participations of the whole.)

    Args:
      sequences: Each in the order of the steps.

    Returns:
      One sequence.

    Raises:
      ConfigError: Two mechanisms of one step say that its batch was drawn in different ways.
    """
    if len({sum(each.releases for each in held) for held in sequences}) > 1 and (
        len({each.sampling_probability for held in sequences for each in held}) == 1
    ):
        # A shorter one may have begun later: which steps are the same, nobody says. What is released of a row costs
        # most where the least noise meets the least.
        sequences = [sorted(held, key=lambda each: each.noise_multiplier) for held in sequences]
    merged: list[Mechanism] = list(sequences[0]) if sequences else []
    for sequence in sequences[1:]:
        merged = _merge(merged, list(sequence))
    return tuple(merged)


def overflow_probability(n: int, sampling_probability: float, cap: int) -> float:
    """Probability that a Poisson sample has more than ``cap`` rows.

    Args:
      n: Number of rows.
      sampling_probability: Of each row.
      cap: The largest batch that is not cut.

    Returns:
      The probability; 0 where ``cap`` is at least ``n``.

    Raises:
      ConfigError: A number is out of its range.
    """
    where = "efl.privacy.overflow_probability"
    _checks.whole(where, "n", n)
    _checks.whole(where, "cap", cap)
    _checks.probability(where, "sampling_probability", sampling_probability)
    return float(_gaussian.special().bdtrc(cap, n, sampling_probability)) if cap < n else 0.0


def check_words(where: str, relation: object, sampling: object, accountant: object) -> None:
    """The words that choose an accounting; a ConfigError that begins with ``where`` if one is unknown."""
    _checks.choice(where, "relation", relation, RELATIONS)
    _checks.choice(where, "sampling", sampling, SAMPLINGS)
    _checks.choice(where, "accountant", accountant, ACCOUNTANTS)
    if relation == "replace_one" and sampling == "poisson":
        raise ConfigError(
            f"{where}: relation='replace_one' with sampling='poisson': expected relation='add_remove', for which "
            "amplification by sampling is known, or sampling='none'"
        )


def batches_per_epoch(where: str, n: int, batch_size: int, drop_remainder: bool) -> int:
    """Batches in an epoch; a ConfigError that begins with ``where`` if a batch is larger than the data set."""
    _checks.whole(where, "n", n)
    _checks.whole(where, "batch_size", batch_size)
    if batch_size > n:
        raise ConfigError(
            f"{where}: batch_size={batch_size}, n={n}: expected a batch of at most n rows (n is the number of rows in "
            "the data set)"
        )
    return n // batch_size if drop_remainder else -(-n // batch_size)


def _unamplified(gaussian: Sequence[Mechanism], pure: Sequence[PureMechanism], delta: float, relation: str) -> float:
    squares, lost = [], 0.0
    for each in gaussian:
        square = (each.sensitivity(relation) / each.noise_multiplier) ** 2
        counts = _gaussian.certain(each.releases if each.participations is None else each.participations)
        if each.poisson and each.sampling_probability is not None:
            counts, beyond = _gaussian.binomial(each.releases, each.sampling_probability, each.participations)
            lost += beyond
        squares.append((counts[0], counts[1] * square))
    losses = [_gaussian.responses(each.epsilon, each.participations) for each in pure]
    return _gaussian.epsilon_of(_gaussian.total(squares), _gaussian.total(losses), lost, delta)


def _merge(left: list[Mechanism], right: list[Mechanism]) -> list[Mechanism]:
    """Two sequences as one: pieces of equal length are cut off their heads and made one release."""
    result = []
    while left and right:
        one, other = left[0], right[0]
        if (one.poisson, one.sampling_probability) != (other.poisson, other.sampling_probability):
            raise ConfigError(
                f"efl.privacy.jointly: releases of the same steps were drawn in different ways, {one} and {other}: "
                "expected the same poisson and sampling_probability, since the batches are the same"
            )
        both = min(one.releases, other.releases)
        noise = 0.0
        if one.noise_multiplier and other.noise_multiplier:
            noise = 1 / math.hypot(1 / one.noise_multiplier, 1 / other.noise_multiplier)
        # The batches are the same, so what bounds a row's part in one sequence bounds it in the other.
        bounds = [each.participations for each in (one, other) if each.participations is not None]
        result.append(
            Mechanism(
                noise_multiplier=noise,
                releases=both,
                participations=min(*bounds, both) if bounds else None,
                sampling_probability=one.sampling_probability,
                poisson=one.poisson,
                microbatched=one.microbatched or other.microbatched,
                overflow=max(one.overflow, other.overflow),
            )
        )
        left, right = _without(left, both), _without(right, both)
    return result + left + right


def _without(sequence: list[Mechanism], releases: int) -> list[Mechanism]:
    """The sequence after its first releases, which are of its first mechanism."""
    head, rest = sequence[0], sequence[1:]
    left = head.releases - releases
    if not left:
        return rest
    most = None if head.participations is None else min(head.participations, left)
    return [replace(head, releases=left, participations=most), *rest]
