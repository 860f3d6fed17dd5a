"""Randomised response in exact integers: from a label and 64 random bits to the label that is told in its place.

Each of the 2**64 words is as likely as any other, and so many of them lead to each answer that the ratio of
probabilities under two labels is at most e**epsilon *exactly*: counts are rounded to the side that protects. What is
promised is pure differential privacy of one label (delta = 0), whatever the rest of the program does in floating point.

``RRTop-k`` and the choice of k are algorithms 1 and 2 of Ghazi et al., "Deep Learning with Label Differential Privacy"
(NeurIPS 2021, arXiv:2102.06062, section 3); with k = all labels it is Warner's randomised response for several
answers.
"""

from __future__ import annotations

import functools
from decimal import Context, Decimal

import numpy as np

WORDS = 1 << 64
#: Beyond these, 64 bits cannot keep the promise.
LEAST_EPSILON, MOST_CLASSES = 1e-6, 1 << 20


@functools.lru_cache(maxsize=4096)
def wrong_words(epsilon: float, count: int) -> int:
    """How many words lead to each answer that is not the label, if the label is one of ``count`` allowed answers.

    All other words lead to the label itself.

    Args:
      epsilon: At least ``LEAST_EPSILON``.
      count: Allowed answers, at most ``MOST_CLASSES``.
    """
    digits = Context(prec=60)
    power = Decimal(min(epsilon, 100.0)).exp(digits)  # beyond, each wrong answer has one word anyhow
    # One more than the quotient: a wrong answer that is likelier than it need be tells less.
    return int(digits.divide(Decimal(WORDS), digits.add(power, Decimal(count - 1)))) + 1


def outside_words(count: int) -> int:
    """How many words lead to each of ``count`` allowed answers if the label is none of them; the last has the rest."""
    return (WORDS - 1) // count


def best_answers(prior: np.ndarray, epsilon: float) -> np.ndarray:
    """The answers that RRWithPrior allows: the k likeliest labels, k such that the answer is right most often.

    Args:
      prior: float64 ``[…, K]``, not negative; need not sum to one.
      epsilon: ε.

    Returns:
      bool ``[…, K]``: which labels may be answered. Ties go to the label of the smaller number, and to the smaller k.
    """
    order = np.argsort(-prior, axis=-1, kind="stable")
    likeliest = np.take_along_axis(prior, order, -1)
    # Algorithm 2: w_k = e^ε / (e^ε + k - 1) times what the prior says of the k likeliest.
    right = np.cumsum(likeliest, -1) / (1.0 + np.arange(prior.shape[-1]) * np.exp(-epsilon))
    count = np.argmax(right, -1)[..., np.newaxis] + 1
    ranks = np.argsort(order, axis=-1, kind="stable")
    return ranks < count


def respond(labels: np.ndarray, words: np.ndarray, epsilon: float, classes: int) -> np.ndarray:
    """Randomised response among all labels.

    Args:
      labels: int64 ``[B]`` of 0 to ``classes`` - 1.
      words: uint64 ``[B]``, random.
      epsilon: ε.
      classes: How many labels there are.

    Returns:
      int64 ``[B]``.
    """
    count = np.full(len(labels), classes)
    return _places(labels, words, count, epsilon)[0]


def respond_among(labels: np.ndarray, words: np.ndarray, epsilon: float, allowed: np.ndarray) -> np.ndarray:
    """RRTop-k: randomised response among the allowed answers; a label that is not allowed becomes any of them.

    Args:
      labels: int64 ``[B]``.
      words: uint64 ``[B]``, random.
      epsilon: ε.
      allowed: bool ``[B, K]``, at least one in each row.

    Returns:
      int64 ``[B]``.
    """
    rows = np.arange(len(labels))
    # In the order of their numbers, so that it makes no difference in which order a prior has them.
    answers = np.argsort(~allowed, axis=1, kind="stable")
    place = np.cumsum(allowed, 1)[rows, labels] - 1
    inside, outside = _places(place, words, allowed.sum(1), epsilon)
    return answers[rows, np.where(allowed[rows, labels], inside, outside)]


def _places(place: np.ndarray, words: np.ndarray, counts: np.ndarray, epsilon: float) -> tuple[np.ndarray, np.ndarray]:
    """Which of the allowed answers is given: (where the label is the one at ``place``, where it is none of them)."""
    sizes, which = np.unique(counts, return_inverse=True)
    wrong = np.array([wrong_words(epsilon, int(k)) for k in sizes], np.uint64)[which]
    chunk = np.array([outside_words(int(k)) for k in sizes], np.uint64)[which]
    others = words // wrong
    is_wrong = words < wrong * (counts - 1).astype(np.uint64)
    other = np.where(is_wrong, others, 0).astype(np.int64)
    given = np.where(is_wrong, other + (other >= place), place)
    return given, np.minimum(words // chunk, (counts - 1).astype(np.uint64)).astype(np.int64)
