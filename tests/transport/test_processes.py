"""A peer in another process: killed, frozen, or simply ended."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest

from efl.errors import PeerFailed, PeerLost
from efl.transport import Limits
from efl.transport.limits import DEFAULT_LIMITS
from tests.transport.peers import follower, free_address, leader, receives, sends

PEER = """
import sys
import numpy as np
from efl.transport import Channel, Endpoint, Hello, Limits, TensorSpec
from efl.transport.limits import DEFAULT_LIMITS
role, address = sys.argv[1:]
direction = ("send", "recv") if role == "leader" else ("recv", "send")
tensors = tuple(TensorSpec(n, "float32", None, d) for n, d in zip(("g", "x"), direction))
channel = Channel(Endpoint(role, address, listen=role == "leader"), Hello(role, tensors))
channel.connect(30)
out, back = ("g", "x") if role == "leader" else ("x", "g")
"""
FOREVER = PEER + "for step in range(10**9): channel.send(out, step, channel.recv(back, step))"
LEAVE = PEER + "channel.send(out, 0, np.zeros(3, np.float32)); channel.recv(back, 0)"


def start(role: str, address: str, code: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), role, address])


def partner(role: str, address: str, limits: Limits = DEFAULT_LIMITS):
    if role == "leader":
        return leader(address, sends("g"), receives("x"), limits=limits), "g", "x"
    return follower(address, receives("g"), sends("x"), limits=limits), "x", "g"


@pytest.mark.parametrize("role", ["leader", "follower"])
@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGSTOP])
def test_a_peer_that_dies_or_freezes_is_missed_and_then_lost(role, sign):
    address = free_address()
    other = "follower" if role == "leader" else "leader"
    channel, out, back = partner(role, address, Limits(heartbeat_seconds=0.2, dead_seconds=1.0, peer_timeout=2.0))
    failures: list = []
    missed: list = []
    told = threading.Event()
    channel.on_failure(lambda error: (failures.append(error), told.set()))
    channel.on_away(missed.append)
    process = start(other, address, FOREVER)
    try:
        channel.connect(30)
        for step in range(3):
            channel.send(out, step, np.ones(5, np.float32))
            channel.recv(back, step, 10)
        process.send_signal(sign)
        with pytest.raises(PeerLost, match=rf"the {other} \(.* did not come back within peer_timeout=2 s"):
            channel.recv(back, 3)
        (what,) = missed
        assert what.startswith(f"{role}: lost the {other} (")
        assert "last heard" in what
        if sign == signal.SIGSTOP:
            assert "nothing came for more than dead_seconds=1" in what
        with pytest.raises(PeerLost):
            channel.send(out, 3, np.ones(5, np.float32))
        assert told.wait(10)
        assert [type(f) for f in failures] == [PeerLost]
    finally:
        process.kill()
        process.wait()
        channel.close()


@pytest.mark.parametrize("role", ["leader", "follower"])
def test_a_peer_that_was_stopped_for_a_while_goes_on(role):
    address = free_address()
    other = "follower" if role == "leader" else "leader"
    channel, out, back = partner(role, address, Limits(heartbeat_seconds=0.2, dead_seconds=1.0))
    process = start(other, address, FOREVER)
    try:
        channel.connect(30)
        channel.send(out, 0, np.zeros(5, np.float32))  # both know that they have met
        channel.recv(back, 0, 30)
        process.send_signal(signal.SIGSTOP)
        threading.Timer(3.0, process.send_signal, [signal.SIGCONT]).start()
        for step in range(1, 4):
            channel.send(out, step, np.full(5, step, np.float32))
            channel.recv(back, step, 30)
    finally:
        process.kill()
        process.wait()
        channel.abort(RuntimeError("over"))


@pytest.mark.parametrize("role", ["leader", "follower"])
def test_a_program_that_forgets_to_close_still_ends(role):
    address = free_address()
    other = "follower" if role == "leader" else "leader"
    channel, out, back = partner(role, address, Limits(peer_timeout=1.0))
    process = start(other, address, LEAVE)
    try:
        channel.connect(30)
        channel.recv(back, 0, 10)
        channel.send(out, 0, np.ones(5, np.float32))
        assert process.wait(30) == 0
        with pytest.raises(PeerFailed, match=f"the {other}'s program ended without closing the conversation"):
            channel.recv(back, 1)
    finally:
        process.kill()
        process.wait()
        channel.close()
