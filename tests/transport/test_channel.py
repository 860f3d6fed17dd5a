"""Channels over real gRPC on loopback, both parties in this process."""

from __future__ import annotations

import contextlib
import logging
import re
import socket
import threading
import time

import grpc
import numpy as np
import pytest

from efl.errors import (
    ConfigError,
    DataError,
    DeadlineError,
    HandshakeError,
    LinkError,
    PeerClosed,
    PeerFailed,
    PeerLost,
    ProtocolError,
)
from efl.transport import Hello, Limits, frame
from efl.transport.link import Link
from tests.transport.peers import (
    both,
    connected,
    follower,
    free_address,
    host_port,
    leader,
    meet,
    mirrored,
    receives,
    sends,
)

TENSORS = (sends("g", shape=(None, 3)), receives("x", shape=(None, 3)))
X = np.arange(12, dtype=np.float32).reshape(4, 3)


# ---- exchange


def test_tensors_go_both_ways():
    with connected(*TENSORS) as (one, two):
        for step in range(20):
            two.send("x", step, X + step)
            one.send("g", step, 2 * one.recv("x", step, 5))
            np.testing.assert_array_equal(two.recv("g", step, 5), 2 * (X + step))
        assert one.stats.messages_sent == two.stats.messages_received == 20
        assert 20 * X.nbytes < one.stats.bytes_received <= two.stats.bytes_sent
        assert one.peer.role == "follower"
        assert two.peer.role == "leader"
        assert one.error is None


def test_a_name_may_go_both_ways_and_steps_may_be_taken_in_any_order():
    with connected(sends("x"), receives("x"), sends("s", "string")) as (one, two):
        for step in (3, 7, 8):
            one.send("x", step, X + step)
            two.send("x", step, X - step)
        one.send("s", 0, np.array([[b"a", b""], [b"\x00\xff", b"long" * 99]], object))
        for step in (8, 3, 7):
            np.testing.assert_array_equal(two.recv("x", step, 5), X + step)
            np.testing.assert_array_equal(one.recv("x", step, 5), X - step)
        assert two.recv("s", 0, 5).tolist() == [[b"a", b""], [b"\x00\xff", b"long" * 99]]


def test_large_tensors_travel_in_pieces_from_many_threads():
    limits = Limits(chunk_bytes=1000, max_outstanding_bytes=50_000)
    names = [f"t{i}" for i in range(6)]
    with connected(*(sends(n, "int64") for n in names), limits=limits) as (one, two):

        def sender(name):
            for step in range(10):
                one.send(name, step, np.full(300 * int(name[1]) + 7, step))

        def taker(name):
            for step in range(10):
                array = two.recv(name, step, 20)
                assert array.size == 300 * int(name[1]) + 7
                assert (array == step).all()

        actions = [lambda n=n, f=f: f(n) for n in names for f in (sender, taker)]
        assert both(*actions) == [None] * len(actions)


def test_several_conversations_in_one_process():
    addresses = [free_address() for _ in range(3)]
    leaders = [leader(a, *TENSORS) for a in addresses]
    followers = [follower(a, *mirrored(TENSORS)) for a in addresses]
    meet(*leaders, *followers)
    for number, channel in enumerate(followers):
        channel.send("x", 0, X + number)
    for number, channel in enumerate(leaders):
        np.testing.assert_array_equal(channel.recv("x", 0, 5), X + number)
    both(*(c.close for c in leaders + followers))


def test_callbacks_run_in_order_and_get_the_digest():
    seen, done = [], threading.Event()

    def prepare(one, two):
        one.subscribe("x", lambda step, array, digest: seen.append((step, float(array[0, 0]), digest)))
        one.on_control("note", lambda body: seen.append(body))
        one.on_peer_closed(lambda peer: (seen.append("closed"), done.set()))

    with connected(*TENSORS, prepare=prepare) as (one, two):
        two.send("x", 0, X, b"d" * 16)
        two.send_control("note", {"a": 1})
        two.send("x", 1, X + 1)
        both(two.close, lambda: (done.wait(10), one.close()))
    assert seen == [(0, 0.0, b"d" * 16), {"a": 1}, (1, 1.0, b""), "closed"]


def test_control_messages():
    with connected() as (one, two):
        one.send_control("plan", {"blocks": ["a", "b"], "seed": 7})
        one.send_control("other", {})
        one.send_control("plan", {"blocks": []})
        assert two.recv_control("plan", 5) == {"blocks": ["a", "b"], "seed": 7}
        assert two.recv_control("plan", 5) == {"blocks": []}
        assert two.recv_control("other", 5) == {}


def test_a_sender_waits_for_the_window():
    with connected(sends("x"), limits=Limits(window_steps=2)) as (one, two):
        sent = []
        thread = threading.Thread(target=lambda: [(one.send("x", s, X), sent.append(s)) for s in range(5)])
        thread.start()
        while len(sent) < 2:
            time.sleep(0.01)
        time.sleep(0.2)
        assert sent == [0, 1]
        two.recv("x", 0, 5)
        while len(sent) < 3:
            time.sleep(0.01)
        for step in range(1, 5):
            two.recv("x", step, 5)
        thread.join(10)
        assert sent == [0, 1, 2, 3, 4]


def test_a_callback_may_keep_a_message_in_the_window():
    sent, seen = [], []

    def prepare(one, two):
        two.subscribe("x", lambda step, array, digest: (seen.append(step), False)[1])

    with connected(sends("x"), limits=Limits(window_steps=2), prepare=prepare) as (one, two):
        thread = threading.Thread(target=lambda: [(one.send("x", s, X), sent.append(s)) for s in range(6)])
        thread.start()
        while len(seen) < 2:
            time.sleep(0.01)
        time.sleep(0.2)
        assert sent == seen == [0, 1]
        two.consumed([("x", 0), ("x", 0), ("x", 5)])  # only what is there counts, and once
        while len(seen) < 3:
            time.sleep(0.01)
        time.sleep(0.2)
        assert sent == seen == [0, 1, 2]
        two.consumed([("x", 1), ("x", 2)])
        while len(seen) < 5:
            time.sleep(0.01)
        two.consumed([("x", 3)])
        thread.join(10)
        assert sent == [0, 1, 2, 3, 4, 5]


def test_a_peer_that_takes_nothing():
    with connected(sends("x"), limits=Limits(window_steps=1)) as (one, two):
        one.send("x", 0, X, timeout=0.2)
        with pytest.raises(
            DeadlineError, match=r"send\('x', step=1\): the follower .* not taken .* within 0.2 s, but is alive"
        ):
            one.send("x", 1, X, timeout=0.2)
        two.recv("x", 0, 5)
        one.send("x", 1, X, timeout=5)
        np.testing.assert_array_equal(two.recv("x", 1, 5), X)


def test_a_callback_may_answer():
    def prepare(one, two):
        one.subscribe("x", lambda step, array, digest: one.send("g", step, -array))

    with connected(*TENSORS, prepare=prepare) as (_one, two):
        for step in range(50):
            two.send("x", step, X)
            np.testing.assert_array_equal(two.recv("g", step, 5), -X)


def test_a_callback_that_would_wait_for_the_peer_is_refused():
    caught, failed = [], threading.Event()

    def prepare(one, two):
        one.subscribe("x", lambda step, array, digest: [one.send("g", s, X) for s in range(9)])
        one.on_failure(lambda error: (caught.append(error), failed.set()))

    with connected(*TENSORS, limits=Limits(window_steps=2), prepare=prepare) as (_one, two):
        two.send("x", 0, X)
        assert failed.wait(10)
        assert "from a callback of the channel: the peer's window is full" in str(caught[0])
        with pytest.raises(PeerFailed, match="window is full"):
            two.recv("g", 5, 5)


def test_a_peer_is_alive_while_our_own_callback_takes_long():
    def prepare(one, two):
        one.subscribe("x", lambda step, array, digest: time.sleep(1.5))

    limits = Limits(heartbeat_seconds=0.1, dead_seconds=0.5)
    with connected(*TENSORS, limits=limits, prepare=prepare) as (one, two):
        two.send("x", 0, X)
        time.sleep(1.2)
        assert one.error is None
        one.send("g", 0, X)
        np.testing.assert_array_equal(two.recv("g", 0, 5), X)


# ---- meeting


@pytest.mark.parametrize("late", ["leader", "follower"])
def test_whoever_comes_first_waits_and_says_so(late, caplog):
    caplog.set_level(logging.INFO, "efl")
    address = free_address()
    one, two = leader(address, *TENSORS), follower(address, *mirrored(TENSORS))

    def delayed(channel, role):
        if role == late:
            time.sleep(0.7)
        return channel.connect(20)

    hellos = both(lambda: delayed(one, "leader"), lambda: delayed(two, "follower"))
    assert [h.role for h in hellos] == ["follower", "leader"]
    assert f"leader: waiting for the follower to connect to {address}" in caplog.text
    assert f"follower: waiting for the leader at {address}" in caplog.text
    both(one.close, two.close)


def test_nobody_comes():
    address = free_address()
    channel = leader(address, *TENSORS)
    with pytest.raises(PeerLost, match=f"the leader listened on {address} for 0.3 s and no follower came. Is the foll"):
        channel.connect(0.3)
    with socket.create_server(host_port(address)):
        pass  # the port is free again


def test_nobody_is_there():
    address = free_address()
    with pytest.raises(
        PeerLost, match=f"the follower found no leader at {address} within 0.5 s .*UNAVAILABLE.* started"
    ) as caught:
        follower(address, *TENSORS).connect(0.5)
    assert "(last: no connection: UNAVAILABLE: " in str(caught.value)
    for untrue in (" lost ", "heard", "has ended"):  # it was never there
        assert untrue not in str(caught.value)


def test_who_waits_says_why_in_plain_words(caplog, monkeypatch):
    caplog.set_level(logging.INFO, "efl")
    monkeypatch.setattr("efl.transport.rendezvous._LOG_EVERY", 0.2)
    address = free_address()
    with pytest.raises(PeerLost, match="UNAVAILABLE"):
        follower(address, *TENSORS).connect(2)
    waited = [record.getMessage() for record in caplog.records if "waiting for" in record.getMessage()]
    assert waited[0] == f"follower: waiting for the leader at {address}, 2 s of 2 s left"
    why = f"follower: waiting for the leader at {address} (nobody listens there yet), "
    assert waited[1:]
    assert [line for line in waited[1:] if not line.startswith(why)] == []


def test_a_stranger_is_there():
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(PeerLost, match=f"found no leader at {address} within 1 s"):
            follower(address).connect(1)


def test_the_port_is_taken():
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(
            ConfigError, match=f"the leader cannot listen on '{address}': another program holds the port"
        ):
            leader(address).connect(5)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_the_port_is_taken_at_one_of_localhosts_addresses(host):
    # gRPC would take the other and say nothing: a follower may then meet the other program.
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    if host not in {found[4][0] for found in socket.getaddrinfo("localhost", 1)}:
        pytest.skip(f"localhost is not {host} here")
    with socket.create_server((host, 0), family=family) as server:
        address = f"localhost:{server.getsockname()[1]}"
        with pytest.raises(ConfigError, match="another program holds the port"):
            leader(address).connect(5)


def test_two_leaders_on_one_port():
    address = free_address()
    one = leader(address)
    waiting = threading.Thread(target=lambda: both(lambda: one.connect(30)))
    waiting.start()
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(host_port(address)) == 0:
                break
        time.sleep(0.01)
    with pytest.raises(ConfigError, match="another program holds the port"):
        leader(address).connect(5)
    one.close()
    waiting.join(10)
    assert not waiting.is_alive()


def test_a_host_that_is_not_ours():
    with pytest.raises(ConfigError, match=r"cannot listen on '192.0.2.1:50051'.* not this machine's"):
        leader("192.0.2.1:50051").connect(5)


def test_disagreement_is_told_to_both_sides():
    address = free_address()
    one = leader(address, sends("g"), receives("x", "int32"), terms={"batch size": 256})
    two = follower(address, receives("g"), sends("x"), sends("y"), terms={"batch size": 128})
    for error in both(lambda: one.connect(20), lambda: two.connect(20)):
        assert type(error) is HandshakeError
        assert (
            "tensor 'x': the follower sends it with dtype='float32', the leader receives it with dtype='int32'"
            in str(error)
        )
        assert "tensor 'y': the follower sends it, the leader has no recv of that name" in str(error)
        assert "batch size: the leader has 256, the follower has 128" in str(error)


def test_equal_roles():
    address = free_address()
    one = leader(address)
    hello = Hello("leader")
    waiting: list = []
    thread = threading.Thread(target=lambda: waiting.extend(both(lambda: one.connect(20))))
    thread.start()
    answers = bare_dial(address, Link(hello, Limits(), 0.0).take(0.0))
    thread.join(20)
    assert "both parties have the role 'leader'" in str(waiting[0])
    assert frame.Kind.REFUSE in [f.kind for message in answers for f in frame.decode(message)]


def bare_dial(address: str, messages: list[bytes], wait_for_ready: bool = True) -> list[bytes]:
    """A peer without any of our shell: sends the messages, returns what comes back until the stream ends."""
    with grpc.insecure_channel(address) as channel:
        call = channel.stream_stream("/efl.Link/Stream")(iter(messages), wait_for_ready=wait_for_ready, timeout=10)
        answers = []
        with contextlib.suppress(grpc.RpcError):
            answers.extend(call)
        return answers


GARBAGE = {
    "text": b"hello?",
    "empty": b"",
    "wrong kind": frame.encode(frame.Kind.DATA, b"x" * 16, seq=1),
    "not json": frame.encode(frame.Kind.HELLO, b"\x80\x04pickle"),
    "no fields": frame.encode(frame.Kind.HELLO, b"{}"),
    "damaged": frame.encode(frame.Kind.HELLO, b"{}")[:-1] + b"\x01",
}


def test_garbage_is_refused_on_its_own_connection_only(caplog):
    address = free_address()
    one, two = leader(address, *TENSORS), follower(address, *mirrored(TENSORS))
    waiting = threading.Thread(target=lambda: one.connect(30))
    waiting.start()
    for message in GARBAGE.values():
        (answer,) = bare_dial(address, [message])
        assert frame.decode(answer)[0].kind is frame.Kind.REFUSE
    with socket.create_connection(host_port(address)) as raw:
        raw.sendall(b"\x00" * 1000)
        two.connect(20)
    waiting.join(20)
    for message in GARBAGE.values():
        (answer,) = bare_dial(address, [message])
    two.send("x", 0, X)
    np.testing.assert_array_equal(one.recv("x", 0, 5), X)
    # Each kind once, though everything was said twice: whoever reaches the port may come as often as he likes.
    told = [tuple(words.split()[:2]) for words in re.findall(r"refused a connection from \S+: (.*)", caplog.text)]
    assert len(told) == len(set(told)) > 2, told
    both(one.close, two.close)


def test_a_second_follower_is_told_that_the_leader_is_busy():
    with connected(*TENSORS) as (one, two):
        address = one._talk.endpoint.address
        with pytest.raises(PeerLost, match=r"within 0.6 s \(last: the leader is busy with another conversation\)"):
            follower(address, *mirrored(TENSORS)).connect(0.6)
        two.send("x", 0, X)
        np.testing.assert_array_equal(one.recv("x", 0, 5), X)


def test_a_follower_waits_until_the_leader_has_finished_with_another():
    address = free_address()
    one, two = leader(address), follower(address)
    meet(one, two)
    three = follower(address)
    second = leader(address)

    def change():
        time.sleep(0.3)
        both(one.close, two.close)
        return second.connect(20)

    hellos = both(lambda: three.connect(20), change)
    assert hellos[0].instance == second._talk.hello.instance
    both(three.close, second.close)


def test_each_attempt_to_begin_has_a_name_of_its_own():
    address = free_address()
    two = follower(address)
    before, said = two._talk.hello.instance, set()
    adopt = two._talk.adopt

    def note(*args):
        adopt(*args)
        said.add(two._talk.hello.instance)

    two._talk.adopt = note
    with pytest.raises(PeerLost):
        two.connect(1.5)  # nobody is there: several attempts
    assert len(said) > 1
    assert before not in said


def test_a_follower_that_vanishes_while_shaking_hands_is_no_end():
    address = free_address()
    one, two = leader(address), follower(address)
    results: list = []
    waiting = threading.Thread(target=lambda: results.extend(both(lambda: one.connect(30))))
    waiting.start()
    bare_dial(address, Link(Hello("follower"), Limits(), 0.0).take(0.0))  # says hello, never accepts
    two.connect(20)
    waiting.join(20)
    assert results[0].instance == two._talk.hello.instance
    both(one.close, two.close)


# ---- ends


def test_close_frees_the_port_and_may_be_repeated():
    address = free_address()
    for _ in range(5):
        one, two = leader(address, *TENSORS), follower(address, *mirrored(TENSORS))
        meet(one, two)
        two.send("x", 0, X)
        assert both(one.close, two.close) == [None, None]
        one.close()
        two.close()


def test_what_was_sent_before_the_goodbye_can_still_be_taken():
    with connected(*TENSORS) as (one, two):
        for step in range(5):
            two.send("x", step, X + step)
        closing = threading.Thread(target=two.close)
        closing.start()
        for step in range(5):
            np.testing.assert_array_equal(one.recv("x", step, 5), X + step)
        with pytest.raises(PeerClosed, match=r"recv\('x', step=5\): the follower \(.*\) has ended the conversation"):
            one.recv("x", 5, 5)
        with pytest.raises(PeerClosed, match=r"send\('g', step=5\): the follower"):
            one.send("g", 5, X)
        one.close()
        closing.join(10)


def test_a_waiting_receiver_learns_of_the_goodbye():
    with connected(*TENSORS) as (one, two):
        results = both(lambda: one.recv("x", 4, 20), lambda: (time.sleep(0.2), two.close(0.5)))
        assert type(results[0]) is PeerClosed
        assert "recv('x', step=4)" in str(results[0])


def test_close_without_a_peer_is_quick_and_wakes_who_waits():
    address = free_address()
    one = leader(address)
    results = both(lambda: one.connect(30), lambda: (time.sleep(0.3), one.close()))
    assert type(results[0]) is LinkError
    leader(address).close()  # never connected
    two = follower(address)
    results = both(lambda: two.connect(30), lambda: (time.sleep(0.3), two.close()))
    assert type(results[0]) is LinkError


def test_own_close_wakes_own_receivers():
    with connected(*TENSORS) as (one, two):
        results = both(lambda: one.recv("x", 0), lambda: (time.sleep(0.2), both(one.close, two.close)))
        assert "the leader has closed this channel itself" in str(results[0])


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (DataError("block 7 is missing"), "failed with DataError: block 7 is missing"),
        (KeyError("Jane Doe"), r"failed with KeyError \(its own log says why\)"),
    ],
)
def test_abort_reaches_the_peer(error, text):
    failures: list = []
    told = threading.Event()

    def prepare(one, two):
        one.on_failure(lambda error: (failures.append(error), told.set()))

    with connected(*TENSORS, prepare=prepare) as (one, two):
        results = both(lambda: one.recv("x", 0, 20), lambda: two.abort(error))
        with pytest.raises(PeerFailed, match=text):
            raise results[0]
        assert "Jane" not in str(results[0])
        with pytest.raises(PeerFailed, match=text):
            one.send("g", 0, X)
        with pytest.raises(LinkError, match="has closed this channel itself"):
            two.recv("g", 0)
        assert told.wait(10)
        assert [type(f) for f in failures] == [PeerFailed]
        assert type(one.error) is PeerFailed
        late: list = []
        one.on_failure(late.append)
        assert late == [one.error]


def test_a_callback_that_fails_ends_both_sides():
    failures: list = []

    def prepare(one, two):
        def callback(step, array, digest):
            raise ValueError("inside")

        one.subscribe("x", callback)
        one.on_failure(failures.append)

    with connected(*TENSORS, prepare=prepare) as (one, two):
        two.send("x", 0, X)
        with pytest.raises(PeerFailed, match="ValueError"):
            two.recv("g", 0, 10)
        with pytest.raises(LinkError, match="a callback of the channel failed: ValueError"):
            one.recv_control("never", 10)
    assert len(failures) == 1


def test_a_peer_that_breaks_the_protocol_is_told():
    address = free_address()
    one = leader(address, *TENSORS)
    results: list = []
    thread = threading.Thread(target=lambda: results.extend(both(lambda: (one.connect(20), one.recv("x", 0, 20)))))
    thread.start()
    link = Link(Hello("follower", mirrored(TENSORS)), Limits(), 0.0)
    wrong = frame.encode(frame.Kind.DATA, bytes(24), seq=1, dtype=7, shape=(2, 3), total=24)
    answers = bare_dial(address, [*link.take(0.0), frame.encode(frame.Kind.ACCEPT), wrong])
    thread.join(20)
    assert type(results[0]) is ProtocolError
    assert "broke the protocol: tensor 'x', step 0: expected dtype float32, got int32" in str(results[0])
    last = frame.decode(answers[-1])[-1]
    assert last.kind is frame.Kind.ABORT
    assert b"the leader refuses what it received: tensor 'x', step 0" in bytes(last.payload)
    one.close()


def test_too_many_unread_control_messages():
    with connected(limits=Limits(max_unread_controls=10)) as (_one, two):
        for number in range(11):
            two.send_control("x", {"n": number})
        with pytest.raises(PeerFailed, match="more than max_unread_controls=10 control messages"):
            two.recv_control("y", 10)


# ---- a caller's mistakes


def test_a_tensor_that_is_late():
    with connected(*TENSORS) as (one, two):
        with pytest.raises(
            DeadlineError, match=r"recv\('x', step=3\): the follower \(.*\) did not send it within 0.2 s"
        ):
            one.recv("x", 3, 0.2)
        with pytest.raises(DeadlineError, match=r"recv_control\('y'\): the follower .* within 0.1 s, but is alive"):
            one.recv_control("y", 0.1)
        two.send("x", 3, X)
        np.testing.assert_array_equal(one.recv("x", 3, 5), X)


def test_a_step_that_will_never_come():
    with connected(*TENSORS) as (one, two):
        two.send("x", 9, X)
        one.recv("x", 9, 5)
        with pytest.raises(ProtocolError, match=r"recv\('x', step=4\): the follower .* has sent step 9 already"):
            one.recv("x", 4, 5)


def test_misuse_is_named():
    address = free_address()
    one = leader(address, *TENSORS)
    with pytest.raises(ConfigError, match=r"send\('g', step=0\): connect\(\) first"):
        one.send("g", 0, X)
    with pytest.raises(ConfigError, match=r"recv\('x', step=0\): connect\(\) first"):
        one.recv("x", 0)
    with pytest.raises(ConfigError, match=r"subscribe\('g'\): not in this party's hello, which receives \['x'\]"):
        one.subscribe("g", print)
    one.subscribe("x", lambda *args: None)
    with pytest.raises(ConfigError, match="there is a callback for it already"):
        one.subscribe("x", print)
    one.on_control("c", print)
    two = follower(address, *mirrored(TENSORS))
    meet(one, two)
    with pytest.raises(ConfigError, match="this tensor is subscribed"):
        one.recv("x", 0)
    with pytest.raises(ConfigError, match=r"recv\('z', step=0\): not in this party's hello"):
        one.recv("z", 0)
    with pytest.raises(ConfigError, match="this topic has a callback"):
        one.recv_control("c")
    with pytest.raises(ConfigError, match=r"subscribe\(\): call it before connect"):
        one.subscribe("x", print)
    with pytest.raises(ConfigError, match="was connected before"):
        one.connect(1)
    with pytest.raises(ConfigError, match=r"shape \(None, 3\) was agreed, the array has \(3,\)"):
        one.send("g", 0, X[0])
    both(one.close, two.close)
    with pytest.raises(ConfigError, match="the endpoint's role is 'leader', the hello's 'follower'"):
        type(one)(one._talk.endpoint, Hello("follower"))
