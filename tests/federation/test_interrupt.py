"""Ctrl-C wherever a party waits: one line and no traceback there, plain words at the other."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from tests.federation.harness import script
from tests.federation.test_parity import FOLLOWER, LEADER
from tests.parties import free_address, start_party

ROOT = str(Path(__file__).resolve().parents[2])
FIT = "model.compile().fit(efl.procedure_fn.train(max_step=10))"
ENDLESS = "model.compile().fit(efl.procedure_fn.train(), log_step=20)"
STALLS = """
import os, time
class Stalls(tf.train.SessionRunHook):
    def before_run(self, context):
        if model.steps_trained == 7:
            print('stalled', flush=True)
            while not os.path.exists('go on'):
                time.sleep(0.05)
"""


def start(tmp_path, **bodies):
    address = free_address()
    env = {"PYTHONPATH": ROOT}
    return [start_party(role, script(body), cwd=tmp_path, address=address, env=env) for role, body in bodies.items()]


def assert_told_in_one_line(result, line):
    assert result.returncode == -signal.SIGINT, result.output  # what a shell shows as 130
    assert "Traceback" not in result.output
    assert re.fullmatch(r"[\d:]{8} " + line, result.output.splitlines()[-1]), result.output


def test_a_party_that_waits_for_a_message_of_its_peer(tmp_path):
    follower = STALLS + FOLLOWER.replace(FIT, "model.add_hooks([Stalls()])\n" + FIT)
    leader, follower = parties = start(tmp_path, leader=LEADER, follower=follower)
    try:
        follower.wait_for("stalled")
        leader.kill(signal.SIGINT)
        assert_told_in_one_line(leader.wait(20), "leader: interrupted after step 7")
        (tmp_path / "go on").touch()
        result = follower.wait(20)
        assert result.returncode == 1
        assert "failed at step 8 of train with Interrupted: leader was interrupted (Ctrl-C)" in result.output
    finally:
        for party in parties:
            party.kill()


def test_a_party_whose_peer_has_not_come(tmp_path):
    (leader,) = start(tmp_path, leader=LEADER)
    leader.wait_for("waiting for the follower")
    leader.kill(signal.SIGINT)
    assert_told_in_one_line(leader.wait(20), "leader: interrupted after step 0")


def test_both_parties_under_efl_run(tmp_path):
    for role, body in (("leader", LEADER), ("follower", FOLLOWER)):
        (tmp_path / f"{role}.py").write_text(script(body.replace(FIT, ENDLESS)))
    process = subprocess.Popen(
        [sys.executable, "-m", "efl.cli", "run", "leader.py", "follower.py"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": ROOT},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    lines = []
    while not lines or "step=40" not in lines[-1]:
        lines.append(process.stdout.readline())
        assert lines[-1], "".join(lines[:-1])
    process.send_signal(signal.SIGINT)
    text = process.communicate(timeout=30)[0]
    assert process.returncode == 130
    assert "Traceback" not in text
    for role in ("leader", "follower"):
        assert re.search(rf"^{role} +\| [\d:]{{8}} {role}: interrupted after step \d+$", text, re.M), text
