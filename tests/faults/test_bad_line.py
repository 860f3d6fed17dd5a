"""Training over a bad line, and with a party that stands still, ends with the weights of the undisturbed run."""

import random
import signal
import time

import pytest

from tests.faults.proxy import BadLine
from tests.faults.runs import OPTIMIZERS, Federation, program, weights, write_data
from tests.parties import free_address

STEPS = 400
LONG = f"efl.procedure_fn.train(max_step={STEPS})"
MORE = {"epochs": 40, "save": 100}


@pytest.fixture
def train(tmp_path, undisturbed, tally):
    """Trains over a line on which a scene plays that returns how many faults it made; compares; gives the run."""

    def run(fault, optimizer, scene, prepare=lambda line: None):
        address, injected = free_address(), []
        write_data(tmp_path)
        with BadLine(address, seed=1) as line:
            prepare(line)
            script = program(LONG, OPTIMIZERS[optimizer], **MORE)
            federation = Federation(tmp_path, script, address=address, dial=line.address)
            federation.run({}, timeout=280, scene=lambda run: injected.append(scene(run, line)))
        assert federation.starts == {"leader": 1, "follower": 1}
        expected, history = undisturbed(LONG, OPTIMIZERS[optimizer], **MORE)
        assert history[-1]["step"] == STEPS
        tally.compare(fault, injected[0], weights(tmp_path), expected)
        return federation

    return run


def cases(*sample):
    """Both models; those that are not in the sample only in the full matrix."""
    return [pytest.param(name, marks=() if name in sample else pytest.mark.full) for name in OPTIMIZERS]


@pytest.mark.parametrize(
    ("optimizer", "cuts"),
    [
        ("momentum", 12),
        pytest.param("momentum", 200, marks=[pytest.mark.full, pytest.mark.timeout(600)]),
        pytest.param("adam", 200, marks=[pytest.mark.full, pytest.mark.timeout(600)]),
    ],
)
def test_random_cuts(train, optimizer, cuts):
    chance = random.Random(cuts)

    def cut(run, line):
        run.wait_for_step(5)
        for _ in range(cuts):
            # About one step passes, or only half of what the parties say to go on with.
            line.cut_after(chance.randrange(500, 3000))
            while not line.idle:
                assert not run.over.wait(0.002), f"over after {line.cuts} cuts"
        return line.cuts

    train("line cut", optimizer, cut)


@pytest.mark.parametrize(
    ("optimizer", "seconds"), [("adam", 6), *(pytest.param(n, 30, marks=pytest.mark.full) for n in OPTIMIZERS)]
)
def test_black_hole(train, optimizer, seconds):
    def swallow(run, line):
        run.wait_for_step(50)
        line.black_hole(seconds)
        return 1

    began = time.monotonic()
    run = train("black hole of 30 s" if seconds == 30 else "black hole", optimizer, swallow)
    assert time.monotonic() - began > seconds
    assert "lost the follower" in run.parties["leader"].output
    assert "is back after" in run.parties["leader"].output


@pytest.mark.parametrize("stopped", ["leader", "follower"])
@pytest.mark.parametrize("optimizer", cases())
def test_a_party_that_stands_still_for_20_seconds(train, optimizer, stopped):
    other = "follower" if stopped == "leader" else "leader"
    run = train("stopped (SIGSTOP) for 20 s", optimizer, lambda run, line: stand_still(run, stopped, 20))
    assert f"lost the {stopped}" in run.parties[other].output
    assert f"the {stopped}" in run.parties[other].output.partition("is back after")[0].splitlines()[-1]


def test_a_party_that_stands_still_for_a_while(train):
    run = train("stopped (SIGSTOP)", "momentum", lambda run, line: stand_still(run, "follower", 6))
    assert "lost the follower" in run.parties["leader"].output


def stand_still(run, role, seconds):
    run.wait_for_step(50)
    run.parties[role].kill(signal.SIGSTOP)
    run.over.wait(seconds)
    run.parties[role].kill(signal.SIGCONT)
    return 1


@pytest.mark.parametrize("optimizer", cases("adam"))
def test_damaged_bytes(train, optimizer):
    def damage(run, line):
        for turn in range(10):
            run.wait_for_step(10 + 30 * turn)
            line.damage(1)
        while line.damaged < 10:
            assert not run.over.wait(0.002)
        return line.damaged

    train("damaged bytes", optimizer, damage)


@pytest.mark.parametrize("optimizer", cases("momentum"))
def test_duplicated_connections(train, optimizer):
    def duplicate(run, line):
        for turn in range(6):
            run.wait_for_step(10 + 20 * turn)
            line.duplicate()
        for turn in range(6):
            run.wait_for_step(150 + 20 * turn)
            line.duplicate_next(1, ahead=turn % 2 == 0)
            line.cut()
        return line.copies

    train("duplicated connections", optimizer, duplicate)


@pytest.mark.parametrize("optimizer", cases("adam"))
def test_a_slow_and_far_line(train, optimizer):
    def make_it_so(line):
        line.delay(0.005)
        line.throttle(200_000)

    train("throttled and delayed", optimizer, lambda run, line: 1, make_it_so)
