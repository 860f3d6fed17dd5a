"""A second death while both recover from the first, and other ways to come back: the same weights, bit for bit."""

import json
import re
import signal
from dataclasses import asdict

import pytest

from efl.cli.certs import write as write_certificates
from tests.faults.proxy import BadLine
from tests.faults.runs import (
    OPTIMIZERS,
    TRAIN,
    Death,
    Federation,
    assert_bit_equal,
    program,
    slow_program,
    weights,
    write_data,
)
from tests.parties import free_address

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
OTHER_HALF = 'dense(dense(tf.concat([s["x"], s["emb"]], axis=1), 7, 7, "between"), 7, 5'
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


def test_a_party_that_comes_back_as_another_model_leaves_the_survivor_waiting(tmp_path, undisturbed, tally):
    # What differs is its own half, which the handshake does not show.
    write_data(tmp_path)
    script = slow_program()
    other = script.replace('dense(tf.concat([s["x"], s["emb"]], axis=1), 7, 5', OTHER_HALF)
    assert other != script
    federation = Federation(tmp_path, script)
    try:
        for role in ("leader", "follower"):
            federation.start(role)
        federation.wait_for_step(10)
        federation.parties["follower"].kill()
        federation.parties["leader"].wait_for("lost the follower", 10)
        wrong = Federation(tmp_path, other, federation.address)
        wrong.start("follower")
        refused = wrong.parties["follower"].wait(30)
        assert refused.returncode == 1
        assert "CheckpointError: the checkpoint of step " in refused.output
        assert "is of another model: between/" in refused.output
        federation.parties["leader"].wait_for("was refused, since both disagree: the follower could not begin", 10)
        federation.start("follower")
        ended = {role: party.wait(60).returncode for role, party in federation.parties.items()}
    finally:
        for party in federation.parties.values():
            party.kill()
    assert ended == {"leader": 0, "follower": 0}, federation.told()
    tally.compare("kill -9, then started as another model", 1, weights(tmp_path),
                  undisturbed(TRAIN, OPTIMIZERS["momentum"])[0])  # fmt: skip


def test_a_peer_that_dies_in_the_last_step_and_stays_away_is_no_good_end(tmp_path):
    write_data(tmp_path)
    script = program(TRAIN, OPTIMIZERS["momentum"]).replace("peer_timeout=60.0", "peer_timeout=2.0")
    federation = Federation(tmp_path, script)
    (tmp_path / "deaths-follower.json").write_text(json.dumps([asdict(Death("after", "train", 22))]))
    for role in ("leader", "follower"):
        federation.start(role)
    ended = {role: party.wait(60) for role, party in federation.parties.items()}
    assert ended["follower"].returncode == -signal.SIGKILL
    assert ended["leader"].returncode == 1, federation.told()
    assert "PeerLost: the follower" in ended["leader"].output.rstrip().splitlines()[-1]
    assert (
        "leader: ended after step 22; started again, both go on from the checkpoint of step " in ended["leader"].output
    )
    held = [p.name for p in (tmp_path / "checkpoints" / "leader" / "0").glob("step-0000000022-*")]
    assert held, "the last step is not saved"


def newest(folder, role):
    return sorted((folder / "checkpoints" / role / "0").glob("step-*"))[-1]


def truncate(checkpoint):
    (file,) = checkpoint.glob("model.data*")
    file.write_bytes(file.read_bytes()[:-100])


def flip(checkpoint):
    (file,) = checkpoint.glob("model.data*")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def alter(checkpoint):
    # Still good JSON: another number of steps behind the stage.
    file = checkpoint / "state.json"
    text = file.read_text()
    changed = re.sub(r'("steps": )(\d+)', lambda found: f"{found[1]}{int(found[2]) - 1}", text)
    assert changed != text
    file.write_text(changed)


@pytest.mark.parametrize(
    ("survivor", "spoil"),
    [("leader", truncate), pytest.param("follower", flip, marks=pytest.mark.full), ("follower", alter)],
)
def test_a_survivor_whose_checkpoint_was_damaged_goes_back_to_the_one_before(
    tmp_path, undisturbed, tally, survivor, spoil
):
    """It was whole when it was written, by this very process."""
    victim = "follower" if survivor == "leader" else "leader"
    write_data(tmp_path)
    federation = Federation(tmp_path, slow_program())
    try:
        for role in ("leader", "follower"):
            federation.start(role)
        federation.wait_for_step(10)
        federation.parties[victim].kill()
        federation.parties[survivor].wait_for(f"lost the {victim}", 10)
        spoilt = newest(tmp_path, survivor)
        spoil(spoilt)
        federation.start(victim)
        ended = {role: party.wait(60).returncode for role, party in federation.parties.items()}
    finally:
        for party in federation.parties.values():
            party.kill()
    assert ended == {"leader": 0, "follower": 0}, federation.told()
    assert f"checkpoint checkpoints/{survivor}/0/{spoilt.name} is damaged or incomplete: skipped" in federation.told()
    tally.compare("kill -9, and the survivor's checkpoint damaged", 1, weights(tmp_path),
                  undisturbed(TRAIN, OPTIMIZERS["momentum"])[0])  # fmt: skip


def test_a_party_that_dies_after_its_goodbye_is_told_what_to_do(tmp_path):
    write_data(tmp_path)
    script = program(TRAIN, OPTIMIZERS["momentum"])
    script = script.replace("peer_timeout=60.0", "peer_timeout=60.0, connect_timeout=4.0")
    federation = Federation(tmp_path, script)
    federation.run({})
    federation.start("follower")  # as if it had died before its script was done
    ended = federation.parties["follower"].wait(60)
    assert ended.returncode == 1
    assert "PeerLost: the follower found no leader" in ended.output
    assert re.search(
        r"\? follower holds a checkpoint of step 22.*: if its peer has ended there properly, start the peer's program ",
        ended.output,
    )
    federation.run({})  # that is true
    assert federation.told().count("nothing to do: this run was complete at step 22") == 2


def test_a_death_and_cuts_of_an_encrypted_line(tmp_path, undisturbed, tally):
    write_certificates(tmp_path / "certs")
    files = "**{n: f'certs/{ROLE}/{n}.pem' for n in ('my_certs', 'my_key', 'peer_certs')}"
    script = slow_program().replace("efl.FederalModel(", f"efl.FederalModel({files}, ")
    assert files in script

    def cut(run, line):
        for step in (5, 15):
            run.wait_for_step(step)
            line.cut()
        return 2

    address = free_address()
    write_data(tmp_path)
    with BadLine(address, seed=1) as line:
        federation = Federation(tmp_path, script, address=address, dial=line.address)
        federation.run({"leader": [FIRST], "follower": [Death("after", "train", 10)]}, scene=lambda run: cut(run, line))
    assert "is back after" in federation.told()
    assert federation.starts == {"leader": 2, "follower": 2}, federation.told()
    expected, _ = undisturbed(TRAIN, OPTIMIZERS["momentum"])
    tally.compare("kill -9 and cuts of an encrypted line", 4, weights(tmp_path), expected)


@pytest.mark.parametrize("failing", ["leader", "follower"])
def test_an_error_names_the_checkpoint_that_both_go_on_from(tmp_path, undisturbed, failing):
    write_data(tmp_path)
    script = program(TRAIN, OPTIMIZERS["momentum"])
    raises = "def after_run(self, context, values):\n"
    broken = f"        if ROLE == {failing!r} and model.steps_trained == 8:\n            raise ValueError('once')\n"
    federation = Federation(tmp_path, script.replace(raises, raises + broken))
    for role in federation.starts:
        federation.start(role)
    for role, party in federation.parties.items():
        assert party.wait(60).returncode == 1, party.output
        told = f"{role}: ended after step [89]; started again, both go on from the checkpoint of step 6"
        assert re.search(told, party.output), party.output
    Federation(tmp_path, script).run({})
    expected, _ = undisturbed(TRAIN, OPTIMIZERS["momentum"])
    assert_bit_equal(weights(tmp_path), expected)
