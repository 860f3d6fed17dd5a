"""What SIGTERM, Ctrl-C, exceptions and time do to both parties."""

import re
import signal
import time

import pytest

from tests.faults.runs import OPTIMIZERS, TRAIN, Federation, program, slow_program, weights, write_data


def started(tmp_path, script):
    write_data(tmp_path)
    federation = Federation(tmp_path, script)
    for role in ("leader", "follower"):
        federation.start(role)
    return federation


@pytest.mark.parametrize("stopped", ["leader", pytest.param("follower", marks=pytest.mark.full)])
def test_sigterm_saves_a_common_step_and_the_peer_waits(tmp_path, undisturbed, tally, stopped):
    federation = started(tmp_path, slow_program(save=1000))
    other = {"leader": "follower", "follower": "leader"}[stopped]
    try:
        federation.parties[stopped].wait_for("step=5 ")
        federation.parties[stopped].kill(signal.SIGTERM)
        gone = federation.parties[stopped].wait(20)
        assert gone.returncode == 143, gone.output
        assert "SIGTERM: saving after a common step, then going" in gone.output
        assert "Traceback" not in gone.output
        federation.parties[other].wait_for(f"{stopped} was stopped (SIGTERM) after step ", 20)
        federation.start(stopped)
        ended = {role: party.wait(60) for role, party in federation.parties.items()}
    finally:
        for party in federation.parties.values():
            party.kill()
    assert {role: result.returncode for role, result in ended.items()} == {"leader": 0, "follower": 0}, (
        federation.told()
    )
    # Of the newest step, not of the initial one: nothing was trained twice.
    assert "from the checkpoint of step 0" not in federation.told()
    tally.compare("SIGTERM", 1, weights(tmp_path), undisturbed(TRAIN, OPTIMIZERS["momentum"])[0])


def test_sigterm_to_both_at_once(tmp_path, undisturbed, tally):
    federation = started(tmp_path, slow_program(save=1000))
    roles = list(federation.parties)
    try:
        federation.parties["leader"].wait_for("step=5 ")
        for role in roles:
            federation.parties[role].kill(signal.SIGTERM)
        gone = [federation.parties[role].wait(20) for role in roles]
        assert [result.returncode for result in gone] == [143, 143], federation.told()
        saved = {re.search(r"saved after step (\d+); going", result.output)[1] for result in gone}
        assert len(saved) == 1, federation.told()
        for role in roles:
            federation.start(role)
        ended = [federation.parties[role].wait(60) for role in roles]
    finally:
        for party in federation.parties.values():
            party.kill()
    assert [result.returncode for result in ended] == [0, 0], federation.told()
    assert f"from the checkpoint of step {saved.pop()} " in ended[0].output
    tally.compare("SIGTERM to both", 2, weights(tmp_path), undisturbed(TRAIN, OPTIMIZERS["momentum"])[0])


def test_sigterm_while_the_peer_is_away(tmp_path, undisturbed, tally):
    federation = started(tmp_path, slow_program())
    try:
        federation.parties["leader"].wait_for("step=10 ")
        federation.parties["follower"].kill()
        federation.parties["leader"].wait_for("lost the follower", 10)
        told = time.monotonic()
        federation.parties["leader"].kill(signal.SIGTERM)
        result = federation.parties["leader"].wait(20)
        assert time.monotonic() - told < 8  # there is nobody to take a step with, or to tell
        assert result.returncode == 143, result.output
        assert "leader: SIGTERM: going, without a step that both could save: the peer is away" in result.output
        assert re.search(
            r"stopped after step \d+ \(SIGTERM\); started again, both go on from .* step 9 ", result.output
        )
        for role in ("leader", "follower"):
            federation.start(role)
        ended = {role: party.wait(60).returncode for role, party in federation.parties.items()}
    finally:
        for party in federation.parties.values():
            party.kill()
    assert ended == {"leader": 0, "follower": 0}, federation.told()
    tally.compare("SIGTERM while the peer is away", 2, weights(tmp_path), undisturbed(TRAIN, OPTIMIZERS["momentum"])[0])


# In a stage of the procedure's own, and while it restores after a restart: no step is under way.
OWN_STAGE = """
def rest():
    import time
    print("resting", flush=True)
    time.sleep(3)
def own(model):
    model.run_stage("one", efl.stage.LoopStage(model.train_op(), step=9))
    model.run_stage("rest", rest)
    model.run_stage("two", efl.stage.LoopStage(model.train_op(), step=13))
"""


@pytest.mark.parametrize("stopped", ["leader", pytest.param("follower", marks=pytest.mark.full)])
def test_sigterm_between_steps_leaves_the_peer_waiting(tmp_path, undisturbed, tally, stopped):
    federation = started(tmp_path, OWN_STAGE.join(["", program("own", OPTIMIZERS["momentum"])]))
    (other,) = {"leader", "follower"} - {stopped}
    try:
        for party in federation.parties.values():
            party.wait_for("resting")  # both have saved step 9
        federation.parties[stopped].kill(signal.SIGTERM)
        gone = federation.parties[stopped].wait(20)
        assert gone.returncode == 143, gone.output
        assert "stopped after step 9 (SIGTERM); started again, both go on from the checkpoint of step 9" in gone.output
        federation.start(stopped)
        ended = {role: party.wait(60).returncode for role, party in federation.parties.items()}
    finally:
        for party in federation.parties.values():
            party.kill()
    assert ended == {"leader": 0, "follower": 0}, federation.told()
    assert f"lost the {stopped}" in federation.parties[other].output
    tally.compare("SIGTERM between steps", 1, weights(tmp_path), undisturbed(TRAIN, OPTIMIZERS["momentum"])[0])


@pytest.mark.parametrize("pressed", ["leader", "follower"])
def test_ctrl_c_ends_both_in_plain_words(tmp_path, pressed):
    federation = started(tmp_path, slow_program())
    try:
        federation.parties[pressed].wait_for("step=5 ")
        federation.parties[pressed].kill(signal.SIGINT)
        ended = {role: party.wait(30) for role, party in federation.parties.items()}
    finally:
        for party in federation.parties.values():
            party.kill()
    (other,) = set(ended) - {pressed}
    assert ended[pressed].returncode == -signal.SIGINT
    assert f"{pressed}: interrupted after step " in ended[pressed].output
    assert ended[pressed].output.count('File "') <= 6, ended[pressed].output
    assert ended[other].returncode == 1
    assert f"Interrupted: {pressed} was interrupted (Ctrl-C)" in ended[other].output


def test_ctrl_c_while_a_step_waits_for_a_lost_peer(tmp_path):
    federation = started(tmp_path, slow_program())
    try:
        federation.parties["leader"].wait_for("step=5 ")
        federation.parties["follower"].kill()
        federation.parties["leader"].wait_for("lost the follower", 10)
        time.sleep(0.5)
        pressed = time.monotonic()
        federation.parties["leader"].kill(signal.SIGINT)
        result = federation.parties["leader"].wait(20)
    finally:
        for party in federation.parties.values():
            party.kill()
    assert time.monotonic() - pressed < 12
    assert "leader: interrupted after step " in result.output
    assert "pybind11" not in result.output


@pytest.mark.parametrize(("share", "told"), [(False, "(its own log says why)"), (True, "row 7: Jane Doe")])
def test_an_exception_ends_the_other_with_its_type_and_step(tmp_path, share, told):
    fails = """
class Fails(tf.train.SessionRunHook):
    def after_run(self, context, values):
        if ROLE == "follower" and model.steps_trained == 6:
            raise ValueError("row 7: Jane Doe")
model.add_hooks([Fails()], mode=efl.MODE.TRAIN)
model.compile()
"""
    script = program(TRAIN, OPTIMIZERS["momentum"]).replace("\nmodel.compile()\n", fails)
    script = script.replace("seed=3)", f"seed=3, share_error_text={share})")
    federation = started(tmp_path, script)
    ended = {role: party.wait(30) for role, party in federation.parties.items()}
    assert {result.returncode for result in ended.values()} == {1}
    assert "failed at step 7 of train with ValueError" in ended["leader"].output
    assert told in ended["leader"].output
    assert ("Jane" in ended["leader"].output) == share


def test_checkpoints_by_time_are_of_the_same_steps(tmp_path):
    script = slow_program().replace("save_checkpoint_steps=3", "save_checkpoint_secs=0.5")
    federation = started(tmp_path, script)
    ended = {role: party.wait(60) for role, party in federation.parties.items()}
    assert {result.returncode for result in ended.values()} == {0}, federation.told()
    kept = [
        sorted(p.name for p in (tmp_path / "checkpoints" / role / "0").glob("step-*"))
        for role in ("leader", "follower")
    ]
    assert kept[0] == kept[1]
    assert len({name.split("-")[1] for name in kept[0]}) >= 3
