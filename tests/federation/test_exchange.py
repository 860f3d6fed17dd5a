"""Rounds of steps between two parties whose data ends where it will, over real channels in one process."""

import functools
import queue
import random
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from efl._steps import Exchange
from efl._steps.marks import LAST, parting
from efl._steps.stages import Stages
from efl.errors import PeerClosed, PeerFailed, ProtocolError
from efl.transport import Limits
from tests.transport.peers import both, connected, receives, sends

_ABORTED = object()


class Line:
    """Takes what arrives for one tensor, as an inbox does for a graph."""

    def __init__(self, name):
        self.name = name
        self._items = queue.Queue()

    def put(self, array):
        self._items.put(array)

    def abort(self):
        self._items.put(_ABORTED)

    def drain(self):
        while not self._items.empty():
            self._items.get()

    def get(self):
        return self._items.get(timeout=20)


class Party:
    """Steps through rounds: sends a tensor, waits for the peer's, until its own data or the peer's ends."""

    def __init__(self, role, peer, seed):
        self.exchange = Exchange(role, peer, timeout=20.0)
        self.scope = self.exchange.scope("train")
        self.line = Line(f"train/{peer}")
        self.scope.sinks.append(self.line)
        self.role, self.random = role, random.Random(f"{role}{seed}")
        self.got = []

    def pause(self):
        if self.random.random() < 0.3:
            time.sleep(self.random.random() * 0.004)

    def step(self, turn, number, length):
        """One step; False where the round ended in it or before it."""
        self.pause()
        if self.exchange.begin(self.scope) is None:
            return False
        self.pause()
        if number == length:  # no batch is left
            if not self.exchange.interrupted(self.scope):
                self.exchange.end(self.scope, "data")
            return False
        self.exchange.send(self.scope, f"train/{self.role}", np.array([turn, number]))
        self.pause()
        value = self.line.get()
        if value is _ABORTED:
            assert self.exchange.interrupted(self.scope)
            return False
        self.got.append(tuple(value.tolist()))
        self.exchange.complete(self.scope)
        return True

    def run(self, lengths):
        for turn, length in enumerate(lengths):
            number = 0
            while self.step(turn, number, length):
                number += 1


def talking(one, two, limits=None):
    def prepare(first, second):
        one.exchange.attach(first)
        two.exchange.attach(second)

    tensors = (sends("train/leader", "int64"), receives("train/follower", "int64"))
    return connected(*tensors, prepare=prepare, limits=limits or Limits())


def start(*parties):
    for party in parties:
        party.exchange.start(b"k" * 16)
        party.exchange.bind()


rounds = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=8)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(rounds, st.integers(0, 2**32))
def test_both_take_the_same_steps_of_every_round_whoever_ends_it(lengths, seed):
    leader, follower = Party("leader", "follower", seed), Party("follower", "leader", seed)
    with talking(leader, follower):
        start(leader, follower)
        failed = both(lambda: leader.run([a for a, _ in lengths]), lambda: follower.run([b for _, b in lengths]))
        assert failed == [None, None], failed
        leader.exchange.closing()
        follower.exchange.closing()
    expected = [(turn, number) for turn, pair in enumerate(lengths) for number in range(min(pair))]
    assert leader.got == follower.got == expected
    # Every round burns the step in which it ended.
    assert leader.scope.step == follower.scope.step == len(expected) + len(lengths)
    assert not leader.scope.held and not follower.scope.held
    assert not leader.scope.ahead and not follower.scope.ahead


def test_many_rounds_with_the_smallest_window():
    # What is dropped and what waits for its round must not keep the window closed.
    lengths = [(i % 3, (i * 7 + 1) % 4) for i in range(60)]
    leader, follower = Party("leader", "follower", 1), Party("follower", "leader", 1)
    with talking(leader, follower, Limits(window_steps=1)):
        start(leader, follower)
        assert both(lambda: leader.run([a for a, _ in lengths]), lambda: follower.run([b for _, b in lengths])) == [
            None, None,
        ]  # fmt: skip
        leader.exchange.closing()
        follower.exchange.closing()
    assert leader.got == follower.got == [(t, n) for t, pair in enumerate(lengths) for n in range(min(pair))]


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.integers(1, 4), min_size=1, max_size=6), st.integers(0, 2**32))
def test_the_leaders_last_step_is_the_followers_last(lengths, seed):
    leader, follower = Party("leader", "follower", seed), Party("follower", "leader", seed)

    def lead():
        for turn, length in enumerate(lengths):
            for number in range(length):
                if number == length - 1:
                    leader.exchange.announce(leader.scope, leader.scope.step + 1, LAST)
                assert leader.step(turn, number, None)
                assert (LAST in leader.exchange.marks_of(leader.scope, leader.scope.step)) == (number == length - 1)

    def follow():
        for turn in range(len(lengths)):
            number = 0
            while True:
                assert follower.step(turn, number, None)
                number += 1
                if LAST in follower.exchange.marks_of(follower.scope, follower.scope.step):
                    break

    with talking(leader, follower):
        start(leader, follower)
        failed = both(lead, follow)
        assert failed == [None, None], failed
        leader.exchange.closing()
        follower.exchange.closing()
    assert leader.got == follower.got == [(t, n) for t, length in enumerate(lengths) for n in range(length)]


def test_a_peer_that_leaves_or_fails_in_a_step_is_why_it_failed():
    for leave, error in (
        (lambda channel: channel.close(0.1), PeerClosed),
        (lambda channel: channel.abort(ValueError("no")), PeerFailed),
    ):
        leader, follower = Party("leader", "follower", 0), Party("follower", "leader", 0)
        with talking(leader, follower) as (_, second):
            start(leader, follower)
            result, _ = both(
                functools.partial(leader.step, 0, 0, None),
                lambda channel=second, leave=leave: (time.sleep(0.1), leave(channel)),
            )
            assert isinstance(result, error), result
            with pytest.raises(error):
                leader.exchange.begin(leader.scope)


@pytest.mark.parametrize(
    ("says", "hears", "words"),
    [
        (
            lambda party: party.exchange.announce(party.scope, 5, parting("leader")),
            "leader",
            "which is the leader's to",
        ),
        (lambda party: party.exchange.ask_to_part(), "follower", "leader asked for a mark, which is its own to make"),
        (lambda party: party.exchange.announce(party.scope, 10**400, LAST), "follower", "an unknown scope or step"),
    ],
    ids=["mark", "part", "step"],
)
def test_what_only_the_other_role_may_say_ends_the_run(says, hears, words):
    parties = Party("leader", "follower", 0), Party("follower", "leader", 0)
    with talking(*parties):
        start(*parties)
        (hearer,) = [party for party in parties if party.role == hears]
        (speaker,) = [party for party in parties if party.role != hears]
        says(speaker)
        result, _ = both(lambda: hearer.step(0, 0, None), lambda: time.sleep(0.3))
        assert isinstance(result, ProtocolError), result
        assert words in str(result)


def stages():
    told, failed = [], []
    return Stages("leader", "follower", told.append, failed.append), told, failed


def test_a_stage_is_compared_whoever_names_it_first():
    mine, told, failed = stages()
    mine.enter("train, step=3")
    mine.on_note({"number": 0, "what": "train, step=3"})
    mine.on_note({"number": 1, "what": "eval, step=1"})
    assert failed == []
    mine.enter("eval, step=2")
    assert told[1] == {"number": 1, "what": "eval, step=2"}
    assert "stage 1 is 'eval, step=2' at leader and 'eval, step=1' at follower" in str(failed[0])


@pytest.mark.parametrize(
    "note", [{"number": 1, "what": "x"}, {"number": -1, "what": "x"}, {"number": False, "what": "x"}, {"number": 0},
             {"number": 0, "what": "x" * 2000}],
)  # fmt: skip
def test_a_note_that_cannot_be_is_refused(note):
    mine, _, failed = stages()
    mine.on_note(note)
    assert "malformed note of its stage" in str(failed[0])


def test_a_flood_of_stages_is_refused():
    mine, _, failed = stages()
    for number in range(5000):
        mine.on_note({"number": number, "what": "x"})
        if failed:
            break
    assert number < 1100
    assert "began over 1000 stages" in str(failed[0])
