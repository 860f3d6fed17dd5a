"""Runs with deaths end with the weights of the run without, bit for bit."""

import json

import pytest

from tests.faults.runs import OPTIMIZERS, TRAIN, Death, Federation, assert_bit_equal, program, weights, write_data

BOTH = "efl.procedure_fn.train_and_evaluate(train_step=6, eval_step=4, max_iter=3)"
EVERY, SOME = range(1, 21), (1, 8, 9, 20)
PLACES = {
    "after": "kill -9 after a step",
    "sent": "kill -9 right after sending in a step",
    "within": "kill -9 between forward send and gradient receipt",
}
VICTIMS = [["leader"], ["follower"], ["leader", "follower"]]
# Of each place and each victim one.
SAMPLE = [("after", VICTIMS[2], "momentum"), ("sent", VICTIMS[1], "adam"), ("within", VICTIMS[1], "momentum")]
MATRIX = [(place, victims, optimizer) for place in PLACES for victims in VICTIMS for optimizer in OPTIMIZERS]


def run(folder, deaths, procedure=TRAIN, optimizer="momentum", **more):
    write_data(folder)
    federation = Federation(folder, program(procedure, OPTIMIZERS[optimizer], **more))
    federation.run(deaths)
    planned = sum(map(len, deaths.values()))
    assert sum(federation.starts.values()) == 2 + planned, federation.told()
    return federation


def case(steps, place, victims, optimizer, *marks):
    return pytest.param(steps, place, victims, optimizer, marks=marks, id="-".join([place, *victims, optimizer]))


def test_the_runs_train_and_are_reproducible(tmp_path, undisturbed):
    write_data(tmp_path)
    Federation(tmp_path, program(TRAIN, OPTIMIZERS["momentum"])).run({})
    expected, history = undisturbed(TRAIN, OPTIMIZERS["momentum"])
    assert_bit_equal(weights(tmp_path), expected)
    assert history[-1]["step"] == 22
    assert history[-1]["loss"] < history[0]["loss"]


@pytest.mark.parametrize(
    ("steps", "place", "victims", "optimizer"),
    [case(SOME, *chosen) for chosen in SAMPLE] + [case(EVERY, *chosen, pytest.mark.full) for chosen in MATRIX],
)
def test_death_at_every_step(tmp_path, undisturbed, tally, steps, place, victims, optimizer):
    run(tmp_path, {role: [Death(place, "train", step) for step in steps] for role in victims}, optimizer=optimizer)
    expected, _ = undisturbed(TRAIN, OPTIMIZERS[optimizer])
    tally.compare(PLACES[place], len(steps) * len(victims), weights(tmp_path), expected)


def test_death_between_what_is_sent_and_what_comes_back(tmp_path, undisturbed, tally):
    deaths = [Death("within", "train", step) for step in (1, 2, 9, 22)]
    federation = run(tmp_path, {"leader": deaths}, optimizer="adam")
    expected, _ = undisturbed(TRAIN, OPTIMIZERS["adam"])
    tally.compare(PLACES["within"], len(deaths), weights(tmp_path), expected)
    told = federation.parties["follower"].output
    assert "lost the leader" in told
    assert "at step 9 of train; waiting up to 60 s for it to come back; if its program has ended, start" in told
    assert "from the checkpoint of step 6" in told
    assert federation.starts["follower"] == 1  # the survivor's process goes on


@pytest.mark.parametrize("victim", ["leader", pytest.param("follower", marks=pytest.mark.full)])
def test_death_while_a_checkpoint_is_written(tmp_path, undisturbed, tally, victim):
    deaths = [Death("saving", "train", step) for step in (0, 3, 12, 22)]
    run(tmp_path, {victim: deaths})
    expected, _ = undisturbed(TRAIN, OPTIMIZERS["momentum"])
    tally.compare("kill -9 while a checkpoint is written", len(deaths), weights(tmp_path), expected)


@pytest.mark.parametrize("victim", ["leader", pytest.param("follower", marks=pytest.mark.full)])
def test_death_in_evaluation(tmp_path, undisturbed, tally, victim):
    deaths = [Death("after", "eval", 2), Death("after", "train", 10)]
    run(tmp_path, {victim: deaths}, BOTH, evaluate=True)
    expected, history = undisturbed(BOTH, OPTIMIZERS["momentum"], evaluate=True)
    tally.compare("kill -9 during evaluation", len(deaths), weights(tmp_path), expected)
    told = json.loads((tmp_path / "leader.json").read_text())
    assert told[-1]["mode"] == "eval"
    assert told[-1]["accuracy"] == history[-1]["accuracy"]


def test_both_die_at_once_and_the_data_ends(tmp_path, undisturbed, tally):
    deaths = [Death("after", "train", 17)]
    run(tmp_path, {"leader": deaths, "follower": deaths}, "efl.procedure_fn.train()", "adam", epochs=2)
    expected, _ = undisturbed("efl.procedure_fn.train()", OPTIMIZERS["adam"], epochs=2)
    tally.compare(PLACES["after"], 2, weights(tmp_path), expected)
