"""The soak's judgement of memory, open files and threads can fail."""

import random

import pytest

from tests.faults.flat import Life, Sample, verdict


def life(role, seconds=900, **growth):
    """A process with some noise that grows by so much over its life."""
    noise = random.Random(role)
    start = {"rss_mib": 350.0, "files": 15.0, "threads": 30.0}
    samples = []
    for second in range(seconds):
        warm = min(1.0, second / (0.2 * seconds))  # the first fifth of a life holds less
        held = {n: v * (0.8 + 0.2 * warm) + growth.get(n, 0) * second / seconds for n, v in start.items()}
        samples.append(Sample(second, **{name: value + noise.uniform(-1, 1) for name, value in held.items()}))
    return Life(role, samples)


def test_what_does_not_grow_is_well():
    lines, wrong = verdict([life("leader"), life("follower"), life("leader", 20)], 300)
    assert wrong == []
    assert len(lines) == 2 + 2  # the short life is not judged
    assert "350 → 350" in lines[2]


@pytest.mark.parametrize("grown", [{"rss_mib": 70}, {"files": 15}, {"threads": 20}])
def test_a_leak_is_told(grown):
    _, wrong = verdict([life("leader", **grown), life("follower")], 300)
    assert len(wrong) == 1
    assert wrong[0].startswith(f"the leader grows: {next(iter(grown))} ")


def test_processes_that_never_lived_long_are_no_proof():
    _, wrong = verdict([life("leader"), life("follower", 20)], 300)
    assert wrong == ["no process of each role lived for 300 s: nothing is known about its growth"]
