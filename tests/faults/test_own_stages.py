"""Stages that one party runs alone: the parties' checkpoints stay comparable, and a restart repeats none of them."""

import json

import pytest

from tests.faults.runs import OPTIMIZERS, TRAIN, Death, Federation, program, weights, write_data

# One party loads something, counts in a loop over fetches of its own, and runs stages within a stage.
OWN = """
import tensorflow.compat.v1 as tf
count = tf.get_variable("count", [], initializer=tf.zeros_initializer(), trainable=False, use_resource=True)
def _look(value):
    die("own", "train", int(value))
counted = tf.assign_add(count, 1.0)
with tf.control_dependencies([tf.numpy_function(_look, [counted], [])]):
    counted = tf.identity(counted)

def told(what):
    with open(f"{ROLE}-stages.txt", "a") as file:
        file.write(what + "\\n")

def procedure(m):
    own = ROLE == OWNER
    if own:
        m.run_stage("load", lambda: told("load"))
    for turn in range(2):
        train = efl.stage.LoopStage(m.train_op(), step=11)
        if own and turn:
            m.run_stage("around", lambda: (m.run_stage("within", lambda: told("within")), m.run_stage("train", train)))
        else:
            m.run_stage("train", train)
        if own:
            m.run_stage("counting", efl.stage.LoopStage(counted, step=3))
    if own:
        m.run_stage("export", lambda: told("export"))

model = efl.FederalModel("""
END = """
assert model.steps_trained == model.session.run(model.global_step) == 22
print("count", int(model.session.run(count)))
"""


def script(owner, evaluating=False):
    text = program("procedure", OPTIMIZERS["momentum"], epochs=40, evaluate=evaluating)
    text = text.replace("model = efl.FederalModel(", OWN.replace("OWNER", repr(owner)), 1)
    return text + END


DEATHS = {
    "in-the-first-loop": (Death("after", "train", 7), 1),
    "in-the-second-loop": (Death("after", "train", 16), 1),
    "in-a-loop-of-its-own": (Death("own", "train", 5), 1),
    "after-the-last-common-step": (Death("own", "train", 6), 1),
}


@pytest.mark.parametrize(
    ("place", "owner"),
    [
        pytest.param(place, owner, marks=[] if (number + who) % 2 else pytest.mark.full)  # half of them, of every kind
        for number, place in enumerate(DEATHS)
        for who, owner in enumerate(("leader", "follower"))
    ],
)
def test_death_beside_stages_of_one_party(tmp_path, undisturbed, tally, owner, place):
    death, starts = DEATHS[place]
    write_data(tmp_path)
    federation = Federation(tmp_path, script(owner))
    victims = [owner] if death.where == "own" else ["leader", "follower"]
    federation.run({role: [death] for role in victims})
    assert federation.starts == {role: 1 + starts * (role in victims) for role in ("leader", "follower")}
    expected, _ = undisturbed(TRAIN, OPTIMIZERS["momentum"])
    tally.compare("kill -9 beside one party's stages", len(victims), weights(tmp_path), expected)
    assert "count 6" in federation.parties[owner].output
    assert "from the checkpoint of step 0" not in federation.told()
    stages = (tmp_path / f"{owner}-stages.txt").read_text().split()
    assert stages == ["load", "within", "export"], federation.told()


def test_a_finished_run_with_stages_of_one_party_is_evaluated_where_it_ended(tmp_path):
    write_data(tmp_path)
    federation = Federation(tmp_path, script("leader", evaluating=True))
    federation.run({})
    folders = {role: {entry.name for entry in (tmp_path / "checkpoints" / role / "0").glob("step-*")}
               for role in ("leader", "follower")}  # fmt: skip
    assert folders["leader"] == folders["follower"]
    again = Federation(tmp_path, script("leader", evaluating=True))
    again.run({})
    assert again.told().count("nothing to do: this run was complete at step 22") == 2, again.told()
    text = script("leader", evaluating=True).replace("model.fit(procedure,", "model.fit(efl.procedure_fn.eval(3),")
    evaluated = Federation(tmp_path, text)
    evaluated.run({})
    assert evaluated.told().count("from the checkpoint of step 22") == 2, evaluated.told()
    assert [row["step"] for row in json.loads((tmp_path / "leader.json").read_text())] == [22]
