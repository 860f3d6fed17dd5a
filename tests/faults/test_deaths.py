"""Runs with deaths end with the weights of the run without, bit for bit."""

import functools
import json

import pytest

from tests.faults.runs import Death, Federation, assert_bit_equal, program, weights, write_data

STEPS = 22
OPTIMIZERS = {
    "momentum": "tf.train.MomentumOptimizer(0.05, 0.9)",
    "adam": "tf.train.AdamOptimizer(0.01)",
}
TRAIN = f"efl.procedure_fn.train(max_step={STEPS})"
BOTH = "efl.procedure_fn.train_and_evaluate(train_step=6, eval_step=4, max_iter=3)"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """(procedure, optimizer) -> the weights of a run in which nobody dies."""

    @functools.cache
    def run(procedure, optimizer, evaluate=False):
        folder = tmp_path_factory.mktemp("undisturbed")
        write_data(folder)
        Federation(folder, program(procedure, OPTIMIZERS[optimizer], evaluate=evaluate)).run({})
        return weights(folder), json.loads((folder / "leader.json").read_text())

    return run


def run(folder, deaths, procedure=TRAIN, optimizer="momentum", evaluate=False, **more):
    write_data(folder)
    federation = Federation(folder, program(procedure, OPTIMIZERS[optimizer], evaluate=evaluate, **more))
    federation.run(deaths)
    planned = sum(map(len, deaths.values()))
    assert sum(federation.starts.values()) == 2 + planned, federation.told()
    return federation


def test_the_runs_train_and_are_reproducible(tmp_path, undisturbed):
    write_data(tmp_path)
    Federation(tmp_path, program(TRAIN, OPTIMIZERS["momentum"])).run({})
    assert_bit_equal(weights(tmp_path), undisturbed(TRAIN, "momentum")[0])
    assert undisturbed(TRAIN, "momentum")[1][-1]["step"] == STEPS


@pytest.mark.parametrize("victims", [["leader"], ["follower"], ["leader", "follower"]], ids="-".join)
def test_death_at_every_one_of_20_steps(tmp_path, undisturbed, victims):
    deaths = {role: [Death("after", "train", step) for step in range(1, 21)] for role in victims}
    run(tmp_path, deaths)
    assert_bit_equal(weights(tmp_path), undisturbed(TRAIN, "momentum")[0])


def test_death_between_what_is_sent_and_what_comes_back(tmp_path, undisturbed):
    federation = run(tmp_path, {"leader": [Death("within", "train", step) for step in (1, 2, 9, 22)]}, optimizer="adam")
    assert_bit_equal(weights(tmp_path), undisturbed(TRAIN, "adam")[0])
    told = federation.parties["follower"].output
    assert "lost the leader" in told
    assert "at step 9 of train; waiting up to 60 s for it to come back; if its program has ended, start" in told
    assert "from the checkpoint of step 6" in told
    assert federation.starts["follower"] == 1  # the survivor's process goes on


@pytest.mark.parametrize("victim", ["leader", "follower"])
def test_death_while_a_checkpoint_is_written(tmp_path, undisturbed, victim):
    run(tmp_path, {victim: [Death("saving", "train", step) for step in (0, 3, 12, 22)]})
    assert_bit_equal(weights(tmp_path), undisturbed(TRAIN, "momentum")[0])


@pytest.mark.parametrize("victim", ["leader", "follower"])
def test_death_in_evaluation(tmp_path, undisturbed, victim):
    run(tmp_path, {victim: [Death("after", "eval", 2), Death("after", "train", 10)]}, BOTH, evaluate=True)
    expected, history = undisturbed(BOTH, "momentum", evaluate=True)
    assert_bit_equal(weights(tmp_path), expected)
    told = json.loads((tmp_path / "leader.json").read_text())
    assert told[-1]["mode"] == "eval"
    assert told[-1]["accuracy"] == history[-1]["accuracy"]


def test_both_die_at_once_and_the_data_ends(tmp_path):
    first, second = tmp_path / "undisturbed", tmp_path / "disturbed"
    for folder, deaths in ((first, []), (second, [Death("after", "train", 17)])):
        folder.mkdir()
        write_data(folder)
        script = program("efl.procedure_fn.train()", OPTIMIZERS["adam"], epochs=2)
        Federation(folder, script).run({"leader": deaths, "follower": deaths})
    assert_bit_equal(weights(second), weights(first))
