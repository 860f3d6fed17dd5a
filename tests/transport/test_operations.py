"""Both ways of reading and writing a gRPC call: by its operations, and by gRPC's public iterators alone."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from efl.errors import PeerFailed
from efl.transport import Limits, operations
from efl.transport.link import Link
from tests.transport.peers import both, connected, follower, free_address, leader, meet, mirrored, receives, sends

MIB = 1 << 20
TENSORS = (sends("g", shape=(None, 3)), receives("x", shape=(None, 3)), receives("big", "uint8", (None,)))
X = np.arange(12, dtype=np.float32).reshape(4, 3)


@pytest.fixture(params=["operations", "iterators"])
def way(request, monkeypatch):
    monkeypatch.setenv("EFL_GRPC_ITERATORS", "1" if request.param == "iterators" else "")
    return request.param


def drawing_threads() -> int:
    """Threads in which efl reads a stream."""
    return sum(thread.name == "efl-read" for thread in threading.enumerate())


def test_the_way_is_the_one_that_was_asked_for(way, monkeypatch):
    began = []
    begin = operations.Operations.write
    monkeypatch.setattr(
        operations.Operations, "write", lambda self, *args: (began.append(type(self).__name__), begin(self, *args))[1]
    )
    with connected(*TENSORS) as (one, two):
        for step in range(3):
            two.send("x", step, X)
            one.send("g", step, one.recv("x", step, 5))
            two.recv("g", step, 5)
    assert set(began) == ({"_OfDialled", "_OfServed"} if way == "operations" else set())


def test_everything_arrives_in_order(way):
    large = np.arange(5 * MIB + 3, dtype=np.uint8)
    seen = []

    def prepare(one, two):
        one.subscribe("x", lambda step, array, digest: seen.append((step, array[0, 0])))
        one.on_control("note", lambda body: seen.append(body["n"]))

    with connected(*TENSORS, limits=Limits(window_steps=64), prepare=prepare) as (one, two):
        for step in range(100):
            two.send("x", step, X + step, timeout=10)
            two.send_control("note", {"n": step})
            if step % 25 == 0:
                two.send("big", step, large + step)
                np.testing.assert_array_equal(one.recv("big", step, 10), large + step)
        two.send("big", 100, large[:1])
        one.recv("big", 100, 10)
        both(one.close, two.close)
    assert seen == [item for step in range(100) for item in ((step, step), step)]


def test_a_slow_callback_keeps_nobody_from_speaking(way):
    """gRPC's thread serves both directions: a callback that it waited for would silence this party."""
    limits = Limits(heartbeat_seconds=0.2, dead_seconds=1.5)

    def prepare(one, two):
        one.subscribe("x", lambda step, array, digest: time.sleep(3.5))

    with connected(*TENSORS, limits=limits, prepare=prepare) as (one, two):
        lost = []
        two._talk.on_away.append(lost.append)
        two.send("x", 0, X)
        for step in range(30):
            one.send("g", step, X)
            two.recv("g", step, 5)
            time.sleep(0.1)
        assert not lost


def test_what_is_left_to_do_is_bounded(way):
    """A peer that says more than callbacks can work off is not listened to meanwhile."""
    free = threading.Event()
    worked = []

    def prepare(one, two):
        one.on_control("note", lambda body: (free.wait(30), worked.append(body["n"])))

    limits = Limits(heartbeat_seconds=5, dead_seconds=60)
    note = "n" * 100_000
    with connected(*TENSORS, limits=limits, prepare=prepare) as (one, two):
        for n in range(400):
            two.send_control("note", {"n": n, "text": note})
        last, now = -1, 0
        while now != last:  # until it takes no more
            time.sleep(0.5)
            last, now = now, one.stats.bytes_received
        assert now < 300 * len(note)
        free.set()
        limit = time.monotonic() + 20
        while len(worked) < 400 and time.monotonic() < limit:
            time.sleep(0.05)
    assert worked == list(range(400))


def test_an_end_from_a_callback(way):
    """close() and a failure in a callback, on the side that listens and on the one that dials."""
    for closing, other in ((0, 1), (1, 0)):
        address = free_address()
        channels = leader(address, *TENSORS), follower(address, *mirrored(TENSORS))
        closed = threading.Event()
        channels[closing].on_control("go", lambda body, c=channels[closing], e=closed: (c.close(2), e.set()))
        meet(*channels)
        channels[other].send_control("go", {})
        assert closed.wait(10)
        channels[other].close(2)

        address = free_address()
        channels = leader(address, *TENSORS), follower(address, *mirrored(TENSORS))
        channels[closing].on_control("go", lambda body: 1 / 0)
        meet(*channels)
        channels[other].send_control("go", {})
        with pytest.raises(PeerFailed, match="ZeroDivisionError"):
            channels[other].recv_control("never", 10)
        both(channels[closing].close, channels[other].close)
    limit = time.monotonic() + 10
    while drawing_threads() and time.monotonic() < limit:
        time.sleep(0.05)
    assert not drawing_threads()


def test_a_process_that_is_killed_is_noticed_either_way(way):
    """gRPC's threads end with a call whose operations are not finished."""
    address = free_address()
    code = f"""
import numpy as np, time
from tests.transport.peers import *
end = follower({address!r}, receives("g", shape=(None, 3)), sends("x", shape=(None, 3)))
end.connect(30)
end.send("x", 0, np.zeros((4, 3), np.float32))
time.sleep(60)
"""
    peer = subprocess.Popen([sys.executable, "-c", code])
    try:
        one = leader(address, *TENSORS[:2])
        one.connect(30)
        one.recv("x", 0, 10)
        peer.kill()
        limit = time.monotonic() + 10
        while not one.away and time.monotonic() < limit:
            time.sleep(0.02)
        assert one.away
        one.close(0.5, firm=True)
    finally:
        peer.kill()
        peer.wait()


def test_callbacks_come_in_order_and_one_at_a_time_over_lost_connections(way):
    """What is left of a lost connection's messages comes before the next connection's; the loss is noticed at once."""
    seen, inside, most = [], [0], [0]

    def slow(step, array, digest):
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(0.01)
        seen.append(step)
        inside[0] -= 1

    def prepare(one, two):
        one.subscribe("x", slow)

    with connected(*TENSORS, limits=Limits(window_steps=64), prepare=prepare) as (one, two):
        for step in range(300):
            two.send("x", step, X, timeout=20)
            connection = two._talk.connection
            if step % 60 == 59 and connection is not None:
                connection.close()
        both(one.close, two.close)
    assert seen == list(range(300))
    assert most == [1]


def slow_connection(seen):
    def prepare(one, two):
        one.subscribe("x", lambda step, array, digest: (time.sleep(0.02), seen.append(step)))

    return connected(*TENSORS, limits=Limits(window_steps=64), prepare=prepare)


def test_close_waits_for_the_callbacks(way):
    seen = []
    with slow_connection(seen) as (one, two):
        for step in range(30):
            two.send("x", step, X)
        closing = threading.Thread(target=two.close)
        closing.start()
        one.close()
        assert seen == list(range(30))
        closing.join()


def test_no_callback_is_called_for_who_has_broken_off(way):
    seen = []
    with slow_connection(seen) as (one, two):
        for step in range(30):
            two.send("x", step, X)
        time.sleep(0.1)
        one.abandon()
        at_end = len(seen)
        time.sleep(0.5)
        assert len(seen) <= at_end + 1  # the one that was running
        two.abandon()


def test_a_message_that_cannot_be_taken_comes_again(way, monkeypatch, caplog):
    """A fault while a message is taken costs the connection, which is looked for anew; the message is sent again."""
    real, failed = Link.receive, []

    def receive(self, frames, now):
        if not failed and any(one.step == 5 for one in frames):
            failed.append(True)
            raise MemoryError("no room")
        return real(self, frames, now)

    with connected(*TENSORS) as (one, two):
        monkeypatch.setattr(Link, "receive", receive)
        for step in range(10):
            two.send("x", step, X + step)
            np.testing.assert_array_equal(one.recv("x", step, 20), X + step)
        both(one.close, two.close)
    assert failed
    assert "could not be taken" in caplog.text
    assert "no room" in caplog.text
