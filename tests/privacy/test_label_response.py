"""Randomised response by itself: exact probabilities, the best k, keyed words, and the register of what was told."""

from __future__ import annotations

import itertools
import logging
import math
from fractions import Fraction

import numpy as np
import pytest

from efl.errors import CheckpointError, ConfigError, DataError
from efl.privacy.noise import Labels, Ledger, Question, Seed, label_epsilon, response
from efl.privacy.noise.register import Register

EPSILONS = (1e-6, 0.1, 1.0, 3.0, 8.0)
SEED = Seed(bytes(range(32)))


def below_e_to_the(epsilon: float) -> Fraction:
    """A number below e**epsilon, to some 30 digits: a partial sum of its series, which has positive terms only."""
    x, term, total = Fraction(epsilon), Fraction(1), Fraction(1)
    for n in range(1, 120):
        term *= x / n
        total += term
    return total


def counts(label: int, epsilon: float, allowed: np.ndarray) -> list[int]:
    """How many of the 2**64 words lead to each answer, of the code as it runs."""
    k = int(allowed.sum())
    edges = {0, response.WORDS}
    for size in (response.wrong_words(epsilon, k), response.outside_words(k)):
        edges |= {min(size * n, response.WORDS) for n in range(k + 1)}
    found = [0] * len(allowed)
    for first, after in itertools.pairwise(sorted(edges)):
        words = np.array([first, (first + after - 1) // 2, after - 1], np.uint64)
        told = response.respond_among(np.full(3, label), words, epsilon, np.broadcast_to(allowed, (3, len(allowed))))
        assert told[0] == told[1] == told[2]
        found[told[0]] += after - first
    return found


@pytest.mark.parametrize("epsilon", EPSILONS)
@pytest.mark.parametrize("classes", [2, 3, 4, 6])
def test_the_ratio_of_any_two_labels_is_at_most_e_to_the_epsilon_exactly(epsilon, classes):
    limit = below_e_to_the(epsilon)
    for size in range(1, classes + 1):
        for members in itertools.combinations(range(classes), size):
            allowed = np.isin(np.arange(classes), members)
            table = [counts(label, epsilon, allowed) for label in range(classes)]
            for row in table:
                assert sum(row) == response.WORDS
                assert [n > 0 for n in row] == allowed.tolist()
            for one, other in itertools.permutations(table, 2):
                assert all(a <= limit * b for a, b in zip(one, other))
            # And no more noise than that needs: what the paper says, to 2**-53.
            power = math.exp(epsilon)
            for label, row in enumerate(table):
                for answer in members:
                    weight = power if answer == label else 1.0
                    expected = weight / (power + size - 1) if allowed[label] else 1 / size
                    assert row[answer] / response.WORDS == pytest.approx(expected, rel=4e-16, abs=2.0**-53)


def test_large_numbers_of_labels_and_large_epsilons_keep_the_promise():
    for epsilon, k in itertools.product((1e-6, 1.0, 40.0, 44.0, 60.0, 1e300), (2, 1000, response.MOST_CLASSES)):
        wrong, limit = response.wrong_words(epsilon, k), below_e_to_the(min(epsilon, 60.0))
        right = response.WORDS - (k - 1) * wrong
        assert wrong <= right <= wrong * limit
        chunk = response.outside_words(k)
        last = response.WORDS - (k - 1) * chunk
        assert right <= chunk * limit and last <= wrong * limit and chunk <= last


def test_among_all_labels_both_functions_say_the_same():
    rng = np.random.default_rng(0)
    words = rng.integers(0, 1 << 64, 5000, np.uint64, endpoint=False)
    labels = rng.integers(0, 7, 5000)
    told = response.respond(labels, words, 0.7, 7)
    np.testing.assert_array_equal(told, response.respond_among(labels, words, 0.7, np.ones((5000, 7), bool)))
    for label in (0, 6):
        assert set(response.respond(np.full(5000, label), words, 0.7, 7)) == set(range(7))


def test_probabilities_are_those_of_the_accounting_library():
    pld = pytest.importorskip("dp_accounting.pld.privacy_loss_distribution")
    for epsilon, classes in itertools.product((0.1, 1.0, 3.0), (2, 3, 10)):
        replaced = classes * response.wrong_words(epsilon, classes) / response.WORDS
        found = pld.from_randomized_response(replaced, classes, value_discretization_interval=1e-4)
        assert found.get_epsilon_for_delta(0.0) == pytest.approx(epsilon, abs=2e-4)


def right_answers(prior: np.ndarray, epsilon: float, allowed: np.ndarray) -> float:
    """How often the answer is the label, if labels are drawn from the prior."""
    size = int(allowed.sum())
    return float(prior[allowed].sum() * math.exp(epsilon) / (math.exp(epsilon) + size - 1))


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 3.0])
def test_no_mechanism_of_the_same_epsilon_keeps_more_labels(epsilon):
    optimize = pytest.importorskip("scipy.optimize")
    rng = np.random.default_rng(1)
    sizes = set()
    for classes, sharpness in itertools.product((2, 3, 5), (0.3, 1.0, 5.0, 1e4)):
        prior = rng.dirichlet(np.full(classes, sharpness))
        allowed = response.best_answers(prior, epsilon)
        found = right_answers(prior, epsilon, allowed)
        sizes.add((classes, int(allowed.sum())))
        # Every set of answers, and every matrix of probabilities that is epsilon-private.
        sets = [np.isin(np.arange(classes), s) for k in range(1, classes + 1)
                for s in itertools.combinations(range(classes), k)]  # fmt: skip
        assert found == pytest.approx(max(right_answers(prior, epsilon, each) for each in sets), abs=1e-12)
        rows = []
        for answer, one, other in itertools.product(range(classes), repeat=3):
            row = np.zeros((classes, classes))
            row[one, answer] += 1
            row[other, answer] -= math.exp(epsilon)
            rows.append(row.ravel())
        best = optimize.linprog(
            -np.diag(prior).ravel(),
            A_ub=np.array(rows),
            b_ub=np.zeros(len(rows)),
            A_eq=np.kron(np.eye(classes), np.ones(classes)),
            b_eq=np.ones(classes),
        )
        assert found == pytest.approx(-best.fun, abs=1e-8)
    assert len(sizes) > 3  # the priors ask for different k


def test_ties_and_batches_of_priors():
    even = np.full((3, 4), 0.25)
    assert response.best_answers(even, 0.5).all()
    sure = np.array([0.0, 1.0, 0.0, 0.0])
    assert response.best_answers(sure, 0.5).tolist() == [False, True, False, False]
    rng = np.random.default_rng(2)
    priors = rng.dirichlet(np.ones(6), 50)
    together = response.best_answers(priors, 1.5)
    for row, allowed in zip(priors, together):
        np.testing.assert_array_equal(allowed, response.best_answers(row, 1.5))


def test_one_word_for_two_sets_of_answers_would_tell_everything():
    words = np.linspace(0, response.WORDS - 2**12, 10_000).astype(np.uint64)
    two = np.broadcast_to([True, True, False], (len(words), 3))
    pairs = {}
    for label in range(3):
        same = np.full(len(words), label)
        told = response.respond(same, words, 1.0, 3), response.respond_among(same, words, 1.0, two)
        pairs[label] = set(zip(*(each.tolist() for each in told)))
    assert (1, 0) in pairs[2] and (1, 0) not in pairs[0] | pairs[1]


# ---- keyed by the sample id


def labels_of(seed: Seed = SEED, folder=None, ledger=None) -> Labels:
    return Labels(seed, ledger or Ledger.in_memory(), folder)


@pytest.mark.parametrize("kind", ["numbers", "text"])
def test_frequencies_are_those_promised_and_ids_are_independent(kind):
    stats = pytest.importorskip("scipy.stats")
    rows, classes, epsilon = 60_000, 5, 1.2
    ids = np.arange(rows) if kind == "numbers" else np.array([b"user-%d" % i for i in range(rows)], object)
    labels = np.random.default_rng(3).integers(0, classes, rows)
    told = labels_of().randomised(Question("y", epsilon, classes), ids, labels)
    kept = math.exp(epsilon) / (math.exp(epsilon) + classes - 1)
    seen = np.histogram2d(labels, told, bins=classes)[0]
    shares = np.where(np.eye(classes) == 1, kept, (1 - kept) / (classes - 1))
    expected = shares * seen.sum(1, keepdims=True)
    assert stats.chisquare(seen, expected, ddof=classes - 1, axis=None).pvalue > 1e-3
    changed = told != labels  # of neighbours in the order of ids
    both = np.histogram2d(changed[:-1], changed[1:], bins=2)[0]
    assert stats.chi2_contingency(both).pvalue > 1e-3


def test_a_label_is_a_function_of_seed_name_and_id():
    ids, labels, question = np.arange(500), np.arange(500) % 10, Question("y", 1.0, 10)
    told = labels_of().randomised(question, ids, labels)
    again = labels_of()
    assert again.randomised(question, ids[:0], labels[:0]).shape == (0,)
    assert again.randomised(question, ids[:0], labels[:0], np.full((0, 10), 0.1)).shape == (0,)
    shuffled = np.random.default_rng(4).permutation(500)
    parts = [again.randomised(question, ids[p], labels[p]) for p in (shuffled[:130], shuffled[130:])]
    np.testing.assert_array_equal(np.concatenate(parts), told[shuffled])
    np.testing.assert_array_equal(labels_of().randomised(question, ids.astype(np.int32), labels), told)
    others = {
        "seed": labels_of(Seed(bytes(32))).randomised(question, ids, labels),
        "name": labels_of().randomised(Question("z", 1.0, 10), ids, labels),
        "epsilon": labels_of().randomised(Question("y", 1.0 + 1e-9, 10), ids, labels),
        "text": labels_of().randomised(question, np.array([b"%d" % i for i in ids], object), labels),
    }
    for what, other in others.items():
        assert 0.05 < np.mean(other == told) < 0.4, what  # as two independent draws


def test_an_even_prior_is_no_prior_and_a_prior_that_excludes_answers_has_words_of_its_own():
    ids, labels, question = np.arange(4000), np.arange(4000) % 4, Question("y", 1.0, 4)
    told = labels_of().randomised(question, ids, labels)
    np.testing.assert_array_equal(labels_of().randomised(question, ids, labels, np.full(4, 0.25)), told)
    narrow = labels_of().randomised(question, ids, labels, np.array([0.45, 0.45, 0.05, 0.05]))
    assert set(narrow) == {0, 1}
    first = labels < 2  # in both mechanisms the right answer is likely; apart from that they are independent
    kept, kept_narrow = told[first] == labels[first], narrow[first] == labels[first]
    assert abs(np.corrcoef(kept, kept_narrow)[0, 1]) < 0.06


@pytest.mark.parametrize("with_file", [True, False])
def test_an_id_keeps_its_label_and_its_prior(tmp_path, caplog, with_file):
    folder, question = tmp_path if with_file else None, Question("y", 1.0, 4)
    ids, labels = np.arange(6000), np.arange(6000) % 4
    sharp = np.array([0.6, 0.3, 0.06, 0.04])
    held = labels_of(folder=folder)
    for _ in range(2):  # again is no contradiction, also in one batch
        held.randomised(question, np.concatenate([ids, ids[:5]]), np.concatenate([labels, labels[:5]]))
    if with_file:
        held.close()
        held = labels_of(folder=folder)
    cases = [([17], [3], None), ([17, 18], [1, 3], None), ([9000, 9000], [1, 2], None), ([17], [1], sharp)]
    for number, (some, theirs, prior) in enumerate(cases):
        with (
            caplog.at_level(logging.ERROR, "efl"),
            pytest.raises(DataError, match="'y': a sample id came before with another label, or with a prior") as told,
        ):
            held.randomised(question, np.array(some), np.array(theirs), prior)
        assert not any(str(i) in str(told.value) for i in (17, 18, 9000)), number  # the peer is told the text
        assert f"contradict: {('17', '18', '9000', '17')[number]}" in caplog.records[-1].getMessage()
    # Nothing of a refused batch was kept.
    held.randomised(question, np.array([9000]), np.array([2]))
    # The order of likely labels makes no difference, as long as the answers are the same.
    held.randomised(question, np.array([9001]), np.array([0]), np.array([0.5, 0.4, 0.06, 0.04]))
    held.randomised(question, np.array([9001]), np.array([0]), np.array([0.4, 0.5, 0.04, 0.06]))
    # Of another name everything may be different: it is another release.
    held.randomised(Question("z", 2.0, 4), ids, (labels + 1) % 4, sharp)


def test_names_are_for_one_question_and_lost_seeds_are_counted(tmp_path, caplog):
    def of(seed: Seed, question: Question, ids: np.ndarray) -> float | None:
        ledger = Ledger(tmp_path)
        try:
            Labels(seed, ledger, tmp_path).randomised(question, ids, np.zeros(4, np.int64))
            return label_epsilon(ledger.phases())
        finally:
            ledger.close()

    ids, question = np.arange(4), Question("y", 1.5, 3)
    assert of(SEED, question, ids) == 1.5
    assert of(SEED, question, ids) == 1.5  # after a restart
    for other in (Question("y", 1.0, 3), Question("y", 1.5, 4)):
        with pytest.raises(ConfigError, match=r"'y': labels of this name .* before with epsilon=1.5, num_classes=3,"):
            of(SEED, other, ids)
    with pytest.raises(ConfigError, match="ids=integer .*, now with .* ids=string"):
        of(SEED, question, ids.astype("S").astype(object))
    assert of(SEED, Question("z", 0.25, 2), ids) == 1.75
    with caplog.at_level(logging.WARNING, "efl"):
        assert of(Seed(bytes(32)), question, ids) == 3.25
    assert "a secret seed that is gone" in caplog.text and "epsilon is 1.5 for each of 2, 3 in all" in caplog.text
    assert of(SEED, question, ids) == 3.25  # it was found again


# ---- the register


def numbers(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    tags, marks = (rng.integers(0, 1 << 64, count, np.uint64, endpoint=False) for _ in range(2))
    return tags, marks


def test_a_register_is_what_a_dictionary_is(tmp_path):
    tags, marks = numbers(30_000, 0)
    register, known = Register(tmp_path / "r"), {}
    rng = np.random.default_rng(1)
    for step in range(300):
        rows = rng.integers(0, 30_000, 150)
        wrong = rng.random(150) < (0.01 if step % 3 else 0.0)
        told = marks[rows] ^ wrong.astype(np.uint64)
        fresh, expected = {}, []
        for tag, mark in zip(tags[rows].tolist(), told.tolist()):
            held = known.get(tag, fresh.setdefault(tag, mark))
            expected.append(held != mark)
        assert register.contradicts(tags[rows], told).tolist() == expected
        if not any(expected):
            known.update(fresh)
        if step == 150:
            register.close()
            register = Register(tmp_path / "r")
        assert len(register) == len(known)
    assert len(known) > 9000  # it was sorted in at least once


def test_a_register_says_when_it_is_damaged_and_drops_what_was_never_finished(tmp_path):
    path = tmp_path / "r"
    register = Register(path)
    assert path.stat().st_mode & 0o777 == 0o600
    first, second = numbers(5, 2), numbers(7, 3)
    register.contradicts(*first)
    whole = path.read_bytes()
    register.contradicts(*second)
    register.close()
    for torn in (path.read_bytes()[:-1], whole + b"\x07\x00\x00"):
        path.write_bytes(torn)
        register = Register(path)
        assert len(register) == 5 and path.read_bytes() == whole
        assert register.contradicts(first[0], first[1] + np.uint64(1)).all()
        register.close()
    for place in (0, 4, 30):
        spoilt = bytearray(whole)
        spoilt[place] ^= 0x5A if place else 1
        path.write_bytes(spoilt)
        with pytest.raises(CheckpointError, match="r: damaged, so nobody knows any more which labels were randomised"):
            Register(path)
    path.write_bytes(bytes(8))
    with pytest.raises(CheckpointError, match="damaged"):
        Register(path)
