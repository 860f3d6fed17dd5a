"""A second death while both recover from the first, of whichever party: still the same weights, bit for bit."""

import pytest

from tests.faults.runs import OPTIMIZERS, TRAIN, Death, Federation, program, weights, write_data

FIRST = Death("after", "train", 7)  # both go back to step 6
# Where the second one takes place: who dies, at which place.
SECOND = {
    "before-it-connects": ("victim", Death("starting", "train", 2)),
    "while-it-restores": ("victim", Death("restoring", "train", 6)),
    "in-its-first-step": ("victim", Death("within", "train", 7)),
    "after-its-first-step": ("victim", FIRST),
    "survivor-that-learns-it": ("survivor", Death("losing", "train", 1)),
    "survivor-while-it-restores": ("survivor", Death("restoring", "train", 6)),
    "survivor-in-its-first-step": ("survivor", Death("sent", "train", 7, time=2)),
}
SAMPLE = {
    ("leader", "while-it-restores", "adam"),
    ("follower", "survivor-that-learns-it", "momentum"),
    ("leader", "survivor-while-it-restores", "momentum"),
}
CASES = [
    (victim, second, optimizer) for victim in ("leader", "follower") for second in SECOND for optimizer in OPTIMIZERS
]


@pytest.mark.parametrize(
    ("victim", "second", "optimizer"),
    [pytest.param(*case, marks=() if case in SAMPLE else pytest.mark.full) for case in CASES],
)
def test_a_second_death_while_both_recover(tmp_path, undisturbed, tally, victim, second, optimizer):
    who, death = SECOND[second]
    other = "follower" if victim == "leader" else "leader"
    deaths = {victim: [FIRST], other: []}
    deaths[victim if who == "victim" else other].append(death)
    write_data(tmp_path)
    federation = Federation(tmp_path, program(TRAIN, OPTIMIZERS[optimizer]))
    federation.run(deaths)
    starts = {role: 1 + len(planned) for role, planned in deaths.items()}
    assert federation.starts == starts, federation.told()
    expected, _ = undisturbed(TRAIN, OPTIMIZERS[optimizer])
    tally.compare(f"second kill -9 during recovery, of the {who}", 2, weights(tmp_path), expected)
