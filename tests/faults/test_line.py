"""Channels over a bad line: everything arrives, once, in order, and within 3 s of the line's return."""

import contextlib
import socket
import threading
import time

import numpy as np
import pytest

from efl.errors import PeerLost, PeerRestarted
from efl.transport import Channel, Endpoint, Hello, Limits, events, frame, stream, tls_diagnosis
from tests.faults.proxy import BadLine
from tests.transport.peers import both, free_address, meet, mirrored, receives, sends

TENSORS = (sends("down"), receives("up"))
QUICK = Limits(heartbeat_seconds=0.2, dead_seconds=1.0, peer_timeout=30.0)


def pair(line, address, limits=QUICK, tensors=TENSORS):
    one = Channel(Endpoint("leader", address, listen=True), Hello("leader", tensors), limits)
    two = Channel(Endpoint("follower", line.address, listen=False), Hello("follower", mirrored(tensors)), limits)
    return one, two


def ping_pong(one, two, first, last, size=1000):
    """The leader sends each step's array, the follower answers with twice it. Raises what either raised."""

    def lead():
        for step in range(first, last):
            one.send("down", step, np.full(size, step, np.float32))
            assert (one.recv("up", step, 60) == 2 * step).all()

    def follow():
        for step in range(first, last):
            two.send("up", step, 2 * two.recv("down", step, 60))

    for result in both(lead, follow, timeout=120):
        if isinstance(result, BaseException):
            raise result


@pytest.fixture
def line_and_pair():
    address = free_address()
    with BadLine(address) as line:
        one, two = pair(line, address)
        meet(one, two)
        yield line, one, two
        both(lambda: one.close(2), lambda: two.close(2))


def test_a_delay_holds_everything_back_by_the_same_time_not_one_piece_after_the_other():
    # In its time of way a real line takes in more; 4 MiB are some 64 pieces.
    sent = np.random.default_rng(0).bytes(4 << 20)
    with socket.create_server(("127.0.0.1", 0)) as server, BadLine(f"127.0.0.1:{server.getsockname()[1]}") as line:
        line.delay(0.2)
        host, port = line.address.split(":")
        with socket.create_connection((host, int(port))) as near, server.accept()[0] as far:

            def say():
                near.sendall(sent)
                near.shutdown(socket.SHUT_WR)

            started = time.monotonic()
            speaker = threading.Thread(target=say)
            speaker.start()
            got = b"".join(iter(lambda: far.recv(1 << 20), b""))
            took = time.monotonic() - started
            speaker.join()
    assert got == sent
    assert 0.2 <= took < 3


@pytest.mark.parametrize("cuts", [15, pytest.param(200, marks=pytest.mark.full)])
def test_many_cuts(line_and_pair, tally, cuts):
    line, one, two = line_and_pair
    over = threading.Event()

    def cut():
        for number in range(cuts):
            line.cut_after(500 + 397 * (7 * number % 40))  # some in the middle of a resume
            while not line.idle and not over.wait(0.002):
                pass
            if over.is_set():
                return

    cutter = threading.Thread(target=cut)
    cutter.start()
    step = 0
    while cutter.is_alive() and step < 100_000:
        ping_pong(one, two, step, step + 20)
        step += 20
    over.set()
    cutter.join()
    assert line.cuts == cuts
    assert line.connections > cuts
    tally.note("line cut, two channels", line.cuts)


def test_a_large_tensor_is_cut_in_the_middle(line_and_pair):
    line, one, two = line_and_pair
    value = np.arange(3_000_000, dtype=np.float32)
    line.cut_after(5_000_000)
    got, sent = both(lambda: two.recv("down", 0, 60), lambda: one.send("down", 0, value))
    assert sent is None
    np.testing.assert_array_equal(got, value)


@pytest.mark.parametrize("fault", ["closed", "hole"])
def test_training_goes_on_within_3_seconds_of_the_lines_return(line_and_pair, fault):
    line, one, two = line_and_pair
    ping_pong(one, two, 0, 3)
    away = 4.0
    (line.close_for if fault == "closed" else line.black_hole)(away)
    started = time.monotonic()
    ping_pong(one, two, 3, 6)
    assert away - 0.5 < time.monotonic() - started < away + 3.0


def test_damaged_bytes_are_sent_again(line_and_pair, tally):
    line, one, two = line_and_pair
    for turn in range(5):
        line.damage(1)
        ping_pong(one, two, 10 * turn, 10 * turn + 10)
    assert line.connections > 1
    tally.note("damaged bytes, two channels", line.damaged)


def test_what_was_said_comes_again_over_a_second_connection(line_and_pair, tally):
    # From the hello on: a listener that believed it would begin anew, or take a message twice.
    line, one, two = line_and_pair
    connections = line.connections  # more than one where the follower dialled before the leader listened
    for turn in range(5):
        ping_pong(one, two, 10 * turn, 10 * turn + 5)
        line.duplicate()
        ping_pong(one, two, 10 * turn + 5, 10 * turn + 10)
    assert line.copies == 5
    assert line.connections == connections  # undisturbed
    tally.note("duplicated connections, two channels", line.copies)


@pytest.mark.parametrize("ahead", [False, True], ids=["behind", "ahead"])
def test_a_copy_of_every_resume(line_and_pair, tally, ahead):
    # A copy ahead of the original gets the conversation, and loses it to the next attempt: its answers reach nobody.
    line, one, two = line_and_pair
    for turn in range(4):
        line.duplicate_next(1, ahead)
        line.cut()
        started = time.monotonic()
        ping_pong(one, two, 10 * turn, 10 * turn + 10)
        assert time.monotonic() - started < 6
    assert line.copies == 4
    tally.note("duplicated connections, two channels", line.copies)


@pytest.mark.parametrize("ahead", [False, pytest.param(True, marks=pytest.mark.full)], ids=["behind", "ahead"])
def test_a_copy_of_the_first_hello(tally, ahead):
    address = free_address()
    with BadLine(address) as line:
        line.duplicate_next(1, ahead)
        one, two = pair(line, address)
        meet(one, two, timeout=30)
        ping_pong(one, two, 0, 20)
        assert line.copies == 1
        both(lambda: one.close(2), lambda: two.close(2))
    tally.note("duplicated connections, two channels", 1)


def test_connections_that_were_cut_leave_no_threads(line_and_pair):
    line, one, two = line_and_pair
    ping_pong(one, two, 0, 2)
    before = threading.active_count()
    for turn in range(1, 13):
        line.cut()
        ping_pong(one, two, 2 * turn, 2 * turn + 2)
    limit = time.monotonic() + 10
    while threading.active_count() > before + 3 and time.monotonic() < limit:
        time.sleep(0.05)
    assert threading.active_count() <= before + 3, threading.enumerate()


def test_a_late_answer_to_an_attempt_that_was_given_up_is_not_refused(line_and_pair):
    # The leader may have taken that attempt up: a refusal on it would end the conversation for good.
    line, one, two = line_and_pair
    given_up = stream.Dialled(Endpoint("follower", line.address, listen=False), two._talk)
    instances = one._talk.hello.instance, two._talk.hello.instance
    for first in (frame.encode(frame.Kind.RESUME, events.claim(*instances, 1)), frame.encode(frame.Kind.PING)):
        two._talk.on_message(given_up, first)
    assert given_up.outbox.waiting == 0
    ping_pong(one, two, 0, 3)


def test_somebody_who_takes_connections_and_resets_them_does_not_speak_tls():
    # ssl says nothing of a connection that was reset before it began, as a line whose far end is closed does.
    with BadLine(free_address()) as line:
        endpoint = Endpoint("follower", line.address, listen=False)
        assert not any(tls_diagnosis._speaks_tls(endpoint) for _ in range(100))


@pytest.mark.full
def test_copies_of_connections_that_are_cut(line_and_pair, tally):
    line, one, two = line_and_pair
    for turn in range(20):
        line.duplicate()
        line.cut_after(2000 + 500 * turn)
        ping_pong(one, two, 20 * turn, 20 * turn + 20)
    tally.note("duplicated connections, two channels", line.copies)
    tally.note("line cut, two channels", line.cuts)


def test_who_was_lost_is_told_and_that_it_is_back(caplog):
    caplog.set_level("INFO", logger="efl")
    address = free_address()
    told = []
    with BadLine(address) as line:
        one, two = pair(line, address)
        one.on_away(lambda what: told.append(what))
        one.on_back(lambda seconds: told.append(seconds))
        meet(one, two)
        line.close_for(1.0)
        ping_pong(one, two, 0, 3)
        both(lambda: one.close(5), lambda: two.close(5))
    assert "leader: lost the follower" in told[0]
    assert 0.5 < told[1] < 4
    assert "follower: lost the leader" in caplog.text
    assert "waiting up to 30 s for it" in caplog.text


def test_a_peer_that_stays_away_is_lost():
    address = free_address()
    limits = Limits(heartbeat_seconds=0.2, dead_seconds=0.6, peer_timeout=1.5)
    with BadLine(address) as line:
        one, two = pair(line, address, limits)
        meet(one, two)
        line.close_for(60)
        for channel, name in ((one, "up"), (two, "down")):
            with pytest.raises(PeerLost, match=r"did not come back within peer_timeout=1\.5 s"):
                channel.recv(name, 0)
        both(lambda: one.close(1), lambda: two.close(1))


def test_a_sender_is_bounded_while_the_line_is_away(line_and_pair):
    line, one, two = line_and_pair
    line.black_hole(2.5)
    count = 100  # more than the window

    def send():
        for step in range(count):
            one.send("down", step, np.full(100_000, step, np.float32))

    def take():
        return [float(two.recv("down", step, 60)[0]) for step in range(count)]

    sent, got = both(send, take)
    assert sent is None
    assert got == [float(step) for step in range(count)]


def test_a_goodbye_waits_for_the_line(line_and_pair):
    line, one, two = line_and_pair
    ping_pong(one, two, 0, 2)
    line.close_for(2.0)
    one.send("down", 9, np.ones(5, np.float32))  # sent into the cut, taken before the goodbye
    closed, got = both(lambda: one.close(1.0), lambda: two.recv("down", 9, 30))
    assert closed is None
    assert got.sum() == 5


def test_who_has_to_go_waits_no_longer_than_it_says(line_and_pair):
    line, one, two = line_and_pair
    ping_pong(one, two, 0, 2)
    line.close_for(6.0)
    one.send("down", 9, np.ones(5, np.float32))
    began = time.monotonic()
    one.close(1.0, firm=True)
    assert time.monotonic() - began < 4.0
    two.abandon()


@pytest.mark.parametrize("restarted", ["leader", "follower"])
def test_another_process_in_the_peers_place_is_told_from_a_line_that_returned(restarted):
    address = free_address()
    with BadLine(address) as line:
        one, two = pair(line, address)
        meet(one, two)
        survivor, gone, name = (two, one, "down") if restarted == "leader" else (one, two, "up")
        _kill(gone)
        again = pair(line, address)[0 if restarted == "leader" else 1]
        threading.Thread(target=lambda: _quietly(lambda: again.connect(10)), daemon=True).start()
        with pytest.raises(PeerRestarted, match=f"the {restarted} .* was started again"):
            survivor.recv(name, 0, 20)
        again.close(0.1)
        survivor.close(0.1)


def test_a_newcomer_that_disagrees_does_not_end_the_survivor():
    address = free_address()
    with BadLine(address) as line:
        one, two = pair(line, address)
        meet(one, two)
        _kill(two)
        other = Channel(Endpoint("follower", line.address, listen=False), Hello("follower", ()), QUICK)
        (refused,) = both(lambda: other.connect(10))
        assert "no recv of that name" in str(refused)
        assert one.error is None
        assert one.away
        other.close(0.1)
        one.abandon()  # a goodbye would wait for the line


def _kill(channel):
    """Ends a channel as kill -9 would: no goodbye, nothing said."""
    talk = channel._talk
    with talk.lock:
        talk.over = True
        connection = talk.connection
    talk.stopped.set()
    connection.close()
    if talk.listener is not None:
        talk.listener.close(0)


def _quietly(action):
    with contextlib.suppress(Exception):
        action()
