"""The link without a network: two state machines whose bytes are carried by hand, in any order of events."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from efl.errors import ConfigError, DataError, ProtocolError
from efl.transport import Hello, Limits, frame
from efl.transport.events import Aborted, Accepted, Control, Goodbye, Refused, Resumed, read_claim, read_first, refusal
from efl.transport.frame import Kind
from efl.transport.inbound import Message
from efl.transport.link import Link, State
from tests.transport.peers import mirrored, receives, sends

SMALL = Limits(window_steps=3, max_outstanding_bytes=400, chunk_bytes=64)
TENSORS = (sends("a"), sends("b", "int32", (None, 2)), receives("a"), receives("s", "string"))


def pair(tensors=TENSORS, limits=SMALL, theirs=None):
    one = Link(Hello("leader", tensors), limits, 0.0, "the follower (test)")
    two = Link(Hello("follower", mirrored(tensors) if theirs is None else theirs), limits, 0.0, "the leader (test)")
    return one, two


def carry(sender: Link, receiver: Link, now: float = 0.0) -> list:
    message = b"".join(sender.take(now))
    return receiver.receive(frame.decode(message), now) if message else []


def shake(one: Link, two: Link) -> list:
    events = []
    for _ in range(3):
        events += carry(one, two)
        events += carry(two, one)
    return events


def opened(**kwargs):
    one, two = pair(**kwargs)
    assert [type(e) for e in shake(one, two)] == [Accepted, Accepted]
    return one, two


def send(link: Link, name: str, step: int, array: np.ndarray, digest: bytes = b"") -> None:
    out = link.prepare(name, step, array, digest)
    while not out.done:
        assert link.ready(out)
        link.transmit(out)


def send_through(sender: Link, receiver: Link, name: str, step: int, array: np.ndarray) -> list:
    """Sends a tensor that is larger than what may wait unacknowledged; returns what arrives."""
    out, events = sender.prepare(name, step, array), []
    while not out.done:
        if sender.ready(out):
            sender.transmit(out)
        else:
            sender.starve()
        events += carry(sender, receiver)
        carry(receiver, sender)
    return events


FLOATS = np.arange(6, dtype=np.float32)


# ---- the beginning


def test_both_learn_the_other_hello():
    one, two = opened()
    assert one.peer.role == "follower"
    assert two.peer.role == "leader"
    assert one.state is two.state is State.OPEN


def test_disagreement_ends_both_with_the_same_reasons():
    one, two = pair(theirs=mirrored(TENSORS[:-1]))
    events = shake(one, two)
    assert {type(e) for e in events} == {Refused}
    assert {e.reasons for e in events} == {
        ("tensor 's': the leader receives it, the follower has no send of that name",)
    }
    assert one.state is two.state is State.OVER


def test_busy_is_told_from_disagreement():
    _, two = pair()
    (event,) = two.receive(frame.decode(refusal(["busy with another"], busy=True)), 0.0)
    assert event == Refused(("busy with another",), busy=True)


@pytest.mark.parametrize("kind", [k for k in Kind if k is not Kind.HELLO])
def test_a_conversation_opens_with_a_hello(kind):
    with pytest.raises(ProtocolError):
        read_first(frame.encode(kind, b"{}"), Limits())
    _, two = pair()
    if kind not in (Kind.ABORT, Kind.REFUSE):
        with pytest.raises(ProtocolError, match=r"the leader .test. broke the protocol: expected a hello first"):
            two.receive(frame.decode(frame.encode(kind, seq=1)), 0.0)


def test_nothing_travels_before_both_have_accepted():
    one, two = pair()
    hello = one.take(0.0)
    two.receive(frame.decode(b"".join(hello)), 0.0)
    assert two.state is State.AGREED
    with pytest.raises(ProtocolError, match="DATA before both sides have accepted"):
        two.receive(frame.decode(frame.encode(Kind.DATA, seq=1)), 0.0)


# ---- tensors


def test_tensors_arrive_with_step_digest_and_name():
    one, two = opened()
    send(one, "a", 5, FLOATS, bytes(range(16)))
    send(one, "b", 1, np.zeros((0, 2), np.int32))
    first, second = carry(one, two)
    assert (first.name, first.step, first.digest) == ("a", 5, bytes(range(16)))
    np.testing.assert_array_equal(first.array, FLOATS)
    assert (second.name, second.step, second.digest, second.array.shape) == ("b", 1, b"", (0, 2))


def test_a_large_tensor_travels_in_pieces_and_lets_others_pass():
    one, two = opened()
    large = one.prepare("a", 0, np.arange(80, dtype=np.float32))
    one.transmit(large)
    send(one, "b", 0, np.ones((1, 2), np.int32))
    while not large.done:
        one.transmit(large)
    events = carry(one, two)
    assert [e.name for e in events] == ["b", "a"]
    np.testing.assert_array_equal(events[1].array, np.arange(80))


def test_strings_travel_in_pieces():
    one, two = opened()
    words = np.array([b"x" * n for n in range(0, 40, 3)], object)
    (event,) = send_through(two, one, "s", 3, words)
    assert event.array.tolist() == words.tolist()


def test_the_array_may_change_once_it_is_queued():
    one, two = opened()
    array = FLOATS.copy()
    send(one, "a", 0, array)
    array[:] = -1
    np.testing.assert_array_equal(carry(one, two)[0].array, FLOATS)


@pytest.mark.parametrize(
    ("name", "step", "array", "digest", "message"),
    [
        ("c", 0, FLOATS, b"", r"send\('c'\): not in this party's hello, which sends \['a', 'b'\]"),
        ("s", 0, FLOATS, b"", "not in this party's hello"),
        ("a", -1, FLOATS, b"", "expected a step of 0"),
        ("a", 0, FLOATS, b"abc", "expected a digest of 16 bytes or none, got 3"),
        ("a", 0, FLOATS.astype(np.float64), b"", "dtype float32 was agreed, the array has float64"),
        ("b", 0, np.zeros((2, 3), np.int32), b"", r"shape \(None, 2\) was agreed, the array has \(2, 3\)"),
        ("b", 0, np.zeros(2, np.int32), b"", r"shape \(None, 2\) was agreed, the array has \(2,\)"),
    ],
)
def test_what_was_not_agreed_is_not_sent(name, step, array, digest, message):
    one, _ = opened()
    with pytest.raises(ConfigError, match=message):
        one.prepare(name, step, array, digest)


def test_the_peers_shape_binds_the_sender():
    one, _ = opened(tensors=(sends("a"),), theirs=(receives("a", shape=(4,)),))
    with pytest.raises(ConfigError, match=r"shape \(4,\) was agreed, the array has \(6,\)"):
        one.prepare("a", 0, FLOATS)


def test_the_smaller_message_limit_binds_the_sender():
    one = Link(Hello("leader", TENSORS), SMALL, 0.0)
    two = Link(Hello("follower", mirrored(TENSORS)), Limits(max_message_bytes=20), 0.0)
    shake(one, two)
    with pytest.raises(ConfigError, match="24 bytes; max_message_bytes of the two parties allows 20"):
        one.prepare("a", 0, FLOATS)


def test_steps_grow():
    one, _ = opened()
    send(one, "a", 5, FLOATS)
    send(one, "b", 5, np.zeros((1, 2), np.int32))
    with pytest.raises(ConfigError, match=r"send\('a', step=5\): step 5 has been sent before; steps must grow"):
        one.transmit(one.prepare("a", 5, FLOATS))


# ---- the window


def test_a_sender_stops_at_the_window_and_goes_on_with_credit():
    one, two = opened(tensors=(sends("a"),))
    for step in range(3):
        send(one, "a", step, FLOATS)
    fourth = one.prepare("a", 3, FLOATS)
    assert not one.ready(fourth)
    events = carry(one, two)
    two.consumed(events[0].nbytes)
    one.starve()
    carry(one, two)
    carry(two, one)
    assert one.ready(fourth)


def test_bytes_are_bounded_but_one_message_always_passes():
    one, two = opened(tensors=(sends("a"),))
    (event,) = send_through(one, two, "a", 0, np.zeros(300, np.float32))  # 1200 bytes, 400 are allowed
    second = one.prepare("a", 1, FLOATS)
    assert not one.ready(second)
    one.starve()
    carry(one, two)
    two.consumed(event.nbytes)
    carry(two, one)
    assert one.ready(second)


def test_a_waiting_sender_is_told_of_what_is_consumed_later():
    one, two = opened(tensors=(sends("a"),), limits=replace(SMALL, window_steps=8))
    (event,) = send_through(one, two, "a", 0, np.zeros(300, np.float32))
    second = one.prepare("a", 1, FLOATS)
    for _ in range(5):  # everything that can be asked has been asked and answered
        one.starve()
        carry(one, two)
        carry(two, one)
    assert not one.ready(second)
    two.consumed(event.nbytes)
    carry(two, one)
    assert one.ready(second)


def test_a_form_that_passed_once_does_not_open_the_door():
    one, two = opened()
    send(one, "b", 0, np.zeros((3, 2), np.int32))
    carry(one, two)
    with pytest.raises(ConfigError, match=r"shape \(None, 2\) was agreed, the array has \(2, 3\)"):
        one.prepare("b", 1, np.zeros((2, 3), np.int32))
    with pytest.raises(ConfigError, match="dtype int32 was agreed, the array has int64"):
        one.prepare("b", 1, np.zeros((3, 2), np.int64))
    wrong = forged(seq=2, tensor=1, dtype=7, shape=(2, 3), step=1, total=24)
    with pytest.raises(ProtocolError, match=r"tensor 'b', step 1: expected shape \(None, 2\), got \(2, 3\)"):
        two.receive(frame.decode(wrong), 0.0)


def test_ping_pong_costs_no_extra_frame():
    tensors = (sends("g"), receives("x"))
    one, two = opened(tensors=tensors, limits=Limits())
    array = np.zeros((256, 128), np.float32)
    for step in range(50):
        for sender, receiver, name in ((two, one, "x"), (one, two, "g")):
            send(sender, name, step, array)
            frames = sender.take(0.0)
            assert len(frames) == 1
            (event,) = receiver.receive(frame.decode(frames[0]), 0.0)
            receiver.consumed(event.nbytes)
    assert one.kept_bytes < 2 * array.nbytes


def test_one_way_traffic_is_acknowledged_before_the_sender_must_stop():
    one, two = opened(tensors=(sends("a"),), limits=Limits(window_steps=8))
    for step in range(100):
        out = one.prepare("a", step, FLOATS)
        assert one.ready(out), f"stopped at step {step}"
        one.transmit(out)
        (event,) = carry(one, two)
        two.consumed(event.nbytes)
        carry(two, one)


# ---- control messages, goodbye, abort, time


def test_control_messages_keep_their_place_among_tensors():
    one, two = opened()
    send(one, "a", 0, FLOATS)
    one.send_control("plan", {"blocks": [1, 2]})
    send(one, "a", 1, FLOATS)
    one.goodbye()
    events = carry(one, two)
    assert [type(e) for e in events] == [Message, Control, Message, Goodbye]
    assert events[1] == Control("plan", {"blocks": [1, 2]})


@pytest.mark.parametrize(
    ("topic", "body", "message"),
    [
        ("", {}, "expected a topic"),
        ("t" * 300, {}, "expected a topic"),
        ("t", {"x": b"bytes"}, "must be a JSON object"),
        ("t", {"x": float("inf")}, "must be a JSON object"),
        ("t", {"x": "y" * (2 << 20)}, "max_control_bytes of the two parties is 1048576"),
    ],
)
def test_bad_control_messages_are_not_sent(topic, body, message):
    one, _ = opened()
    with pytest.raises(ConfigError, match=message):
        one.send_control(topic, body)


def test_goodbye_is_acknowledged_at_once():
    one, two = opened()
    send(one, "a", 0, FLOATS)
    one.goodbye()
    one.goodbye()
    assert not one.flushed
    assert [type(e) for e in carry(one, two)] == [Message, Goodbye]
    assert carry(two, one) == []
    assert one.flushed
    assert two.peer_goodbye


def test_nothing_follows_a_goodbye():
    one, two = opened()
    one.goodbye()
    send(one, "a", 0, FLOATS)
    with pytest.raises(ProtocolError, match="DATA after goodbye"):
        carry(one, two)


@pytest.mark.parametrize(
    ("error", "text"), [(DataError("file x is cut"), "file x is cut"), (ValueError("row 7: Jane Doe"), "")]
)
def test_an_abort_tells_the_text_of_our_own_errors_only(error, text):
    one, two = opened()
    send(one, "a", 0, FLOATS)
    one.take(0.0)
    one.abort(error)
    assert carry(one, two) == [Aborted(type(error).__name__, text)]
    assert one.state is two.state is State.OVER


def test_heartbeats_keep_a_silent_conversation_alive():
    one, two = opened(limits=Limits(heartbeat_seconds=1.0, dead_seconds=4.0))
    for second in range(1, 30):
        one.tick(float(second))
        two.tick(float(second))
        carry(one, two, float(second))
        carry(two, one, float(second))
    assert one.state is two.state is State.OPEN


def test_a_silent_connection_is_given_up_and_what_was_heard_last_is_known():
    one, two = opened(limits=Limits(heartbeat_seconds=1.0, dead_seconds=4.0))
    send(two, "a", 7, FLOATS)
    carry(two, one, 10.0)
    assert one.tick(14.0) == ""
    assert one.tick(14.5) == "nothing came for more than dead_seconds=4"
    assert one.last_heard(14.5) == "last heard 4.5 s ago (tensor 'a' of step 7)"


# ---- a peer that lies


def forged(**fields) -> bytes:
    return frame.encode(fields.pop("kind", Kind.DATA), fields.pop("payload", bytes(24)), **fields)


GOOD = {"seq": 1, "tensor": 0, "dtype": 11, "shape": (6,), "step": 0, "total": 24}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"tensor": 2}, "tensor number 2, only 2 were agreed"),
        ({"tensor": 2**32 - 1}, "only 2 were agreed"),
        ({"dtype": 7}, "tensor 'a', step 0: expected dtype float32, got int32"),
        ({"dtype": 99}, "got unknown dtype code 99"),
        ({"shape": (-1,)}, r"expected shape None, got \(-1,\)"),
        ({"shape": (-2, -3)}, "expected shape"),
        ({"shape": (2**40,)}, "does not take 24 bytes"),
        ({"shape": (2**62, 2**62)}, "does not take 24 bytes"),
        ({"shape": (2**40,), "total": 2**42, "payload": bytes(64)}, "at most max_message_bytes"),
        ({"shape": (5,)}, "does not take 24 bytes"),
        ({"shape": (9,), "total": 36, "offset": 12}, "a piece of 24 bytes at 12 does not continue 0 of 36"),
        ({"payload": bytes(25)}, "a piece of 25 bytes"),
        ({"payload": b""}, "a piece of 0 bytes"),
        ({"step": 2**63}, "steps must grow"),
        ({"seq": 2}, "expected sequence number 1, got 2"),
        ({"ack": 1}, "it acknowledges 1 frames"),
        ({"consumed": 1}, "it has consumed 1 tensors of 0 bytes; only 0 of 0"),
        ({"consumed_bytes": 1}, "0 tensors of 1 bytes"),
        ({"kind": Kind.HELLO}, "HELLO in the middle"),
        ({"kind": Kind.ACCEPT}, "ACCEPT in the middle"),
        ({"kind": Kind.REFUSE}, "REFUSE in the middle"),
        ({"kind": Kind.CONTROL}, "not JSON"),
        ({"kind": Kind.CONTROL, "payload": b'["x", 5]'}, "malformed control"),
        ({"kind": Kind.CONTROL, "payload": b'["", {}]'}, "control topic"),
        ({"kind": Kind.CONTROL, "payload": b'["x", {"y": "' + b"y" * (2 << 20) + b'"}]'}, "at most 1048576"),
    ],
    ids=str,
)
def test_what_a_lying_peer_sends_is_refused_and_told(change, message):
    one, two = opened()
    frames = frame.decode(forged(**{**GOOD, **change}))
    if message is None:
        assert isinstance(two.receive(frames, 0.0)[0], Message)
        return
    with pytest.raises(ProtocolError, match="the leader .test. broke the protocol: .*" + message):
        two.receive(frames, 0.0)
    assert two.state is State.OVER
    (told,) = carry(two, one)
    assert told.error_type == "ProtocolError"
    assert told.text.startswith("the follower refuses what it received: ")


def test_a_repeated_step_is_refused():
    _, two = opened()
    two.receive(frame.decode(forged(**GOOD)), 0.0)
    with pytest.raises(ProtocolError, match="tensor 'a', step 0: steps must grow; step 0 has arrived before"):
        two.receive(frame.decode(forged(**{**GOOD, "seq": 2})), 0.0)


def test_a_replayed_frame_is_dropped():
    _, two = opened()
    assert len(two.receive(frame.decode(forged(**GOOD)), 0.0)) == 1
    assert two.receive(frame.decode(forged(**GOOD)), 0.0) == []
    two.last_heard(1.0)


def test_pieces_of_two_messages_do_not_mix():
    _, two = opened()
    piece = {**GOOD, "shape": (12,), "total": 48}
    two.receive(frame.decode(forged(**piece)), 0.0)
    with pytest.raises(ProtocolError, match="a piece of another message in the middle of step 0"):
        two.receive(frame.decode(forged(**{**piece, "seq": 2, "step": 1, "offset": 24})), 0.0)


def test_a_peer_that_ignores_the_window_is_refused():
    _, two = opened()
    for step in range(6):  # 3 steps of 2 tensors
        two.receive(frame.decode(forged(**{**GOOD, "seq": step + 1, "step": step})), 0.0)
    with pytest.raises(ProtocolError, match="the peer runs ahead of the window: 6 messages of 144 bytes"):
        two.receive(frame.decode(forged(**{**GOOD, "seq": 7, "step": 6})), 0.0)


def test_a_peer_that_ignores_the_byte_limit_is_refused():
    _, two = opened()
    large = {**GOOD, "shape": (90,), "total": 360, "payload": bytes(360)}
    two.receive(frame.decode(forged(**large)), 0.0)
    with pytest.raises(ProtocolError, match="the peer runs ahead of the window: 1 messages of 360 bytes"):
        two.receive(frame.decode(forged(**{**large, "seq": 2, "step": 1})), 0.0)


FORGED = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(Kind),
        "payload": st.binary(max_size=40) | st.sampled_from([b"[]", b"{}", b'["x", {}]', b'{"reasons": 1}']),
        "flags": st.sampled_from([0, frame.FLAG_HUNGRY]),
        "dtype": st.integers(0, 40),
        "shape": st.lists(st.integers(-2, 9) | st.sampled_from([2**40, 2**62]), max_size=3).map(tuple),
        "tensor": st.integers(0, 4),
        "seq": st.integers(0, 4),
        "ack": st.integers(0, 2),
        "consumed": st.integers(0, 1),
        "step": st.integers(0, 3) | st.just(2**63),
        "total": st.integers(0, 60) | st.just(2**50),
        "offset": st.integers(0, 40),
    }
)


@settings(max_examples=300)
@given(st.lists(FORGED, max_size=6), st.booleans())
def test_no_forged_frame_does_more_than_end_the_conversation(many, is_open):
    one = opened()[0] if is_open else pair()[0]
    one.take(0.0)
    try:
        for fields in many:
            for event in one.receive(frame.decode(frame.encode(**fields)), 0.0):
                if isinstance(event, Message):
                    assert event.array.nbytes < 1000
                    one.consumed(event.nbytes)
            one.last_heard(1.0)
    except ProtocolError:
        assert one.state is State.OVER
        last = frame.decode(one.take(0.0)[-1])[-1]
        assert last.kind is Kind.ABORT
        assert json.loads(bytes(last.payload))["type"] == "ProtocolError"


# ---- random interleavings


class Interleaving(RuleBasedStateMachine):
    """Two links; messages, credit and heartbeats move in any order. What is promised: order, once, within bounds."""

    limits = SMALL
    names = {"leader": ("a", "b"), "follower": ("a", "s")}  # noqa: RUF012

    @initialize()
    def begin(self):
        one, two = opened()
        self.links = {"leader": one, "follower": two}
        self.other = {"leader": "follower", "follower": "leader"}
        self.air = {"leader": [], "follower": []}  # frames on their way from
        self.active = {"leader": [], "follower": []}  # tensors being sent by
        self.step = {(role, name): 0 for role, names in self.names.items() for name in names}
        self.sent = {"leader": [], "follower": []}  # (name, step, value) in the order of completion
        self.got = {"leader": [], "follower": []}
        self.unread = {"leader": [], "follower": []}
        self.now = 0.0

    roles = st.sampled_from(["leader", "follower"])

    def make(self, name, step, size):
        if name == "a":
            return np.full(size, step, np.float32)
        if name == "b":
            return np.full((size // 2, 2), step, np.int32)
        return np.array([b"%d" % step] * (size // 4), object)

    @rule(role=roles, which=st.integers(0, 1), size=st.integers(0, 150))
    def start(self, role, which, size):
        name = self.names[role][which]
        if len(self.active[role]) > 3:
            return
        self.step[role, name] += 1
        step = self.step[role, name]
        out = self.links[role].prepare(name, step, self.make(name, step, size))
        self.active[role].append(out)

    @rule(role=roles, which=st.integers(0, 3))
    def transmit(self, role, which):
        if not self.active[role]:
            return
        out = self.active[role][which % len(self.active[role])]
        earlier = [o for o in self.active[role] if o.name == out.name and o.step < out.step]
        if earlier:  # steps of one name are sent in order, as callers do
            out = earlier[0]
        link = self.links[role]
        if not link.ready(out):
            link.starve()
            return
        link.transmit(out)
        if out.done:
            self.active[role].remove(out)
            self.sent[role].append((out.name, out.step, math.prod(out.shape)))

    @rule(role=roles, count=st.integers(1, 5))
    def deliver(self, role, count):
        self.air[role] += self.links[role].take(self.now)
        if self.links["follower"].state is State.AWAY:
            self.air[role] = []  # of the connection that the follower has given up
        batch, self.air[role] = self.air[role][:count], self.air[role][count:]
        if batch:
            target = self.other[role]
            for event in self.links[target].receive(frame.decode(b"".join(batch)), self.now):
                if isinstance(event, Resumed):
                    continue
                assert isinstance(event, Message)
                self.got[target].append((event.name, event.step, event.array.size))
                if event.array.size:
                    expected = self.make(event.name, event.step, 4)
                    assert event.array.ravel()[0] == expected.ravel()[0]
                self.unread[target].append(event)

    @rule(role=roles, which=st.integers(0, 9))
    def consume(self, role, which):
        if self.unread[role]:
            self.links[role].consumed(self.unread[role].pop(which % len(self.unread[role])).nbytes)

    @rule(leader_notices=st.booleans())
    def cut(self, leader_notices):
        """What is under way is lost."""
        self.air = {"leader": [], "follower": []}
        self.links["follower"].lost()
        if leader_notices:
            self.links["leader"].lost()

    @rule()
    def redial(self):
        leader, follower = self.links["leader"], self.links["follower"]
        if follower.state is not State.AWAY:
            return
        (knock,) = frame.decode(follower.knock())
        assert leader.is_ours(read_claim(knock.payload))
        assert not leader.is_stale(read_claim(knock.payload))
        leader.lost()
        assert leader.receive([knock], self.now) == [Resumed()]
        answer = leader.take(self.now)
        assert frame.decode(answer[0])[0].kind is Kind.RESUME
        self.air["leader"] = answer[1:]
        assert follower.receive(frame.decode(answer[0]), self.now) == [Resumed()]

    @rule(seconds=st.floats(0, 2))
    def time_passes(self, seconds):
        self.now += seconds
        for role in ("leader", "follower"):
            self.links[role].alive(self.now)
            self.links[role].tick(self.now)

    @invariant()
    def ordered_once_and_bounded(self):
        if not hasattr(self, "links"):
            return
        for role in ("leader", "follower"):
            target = self.other[role]
            assert self.got[target] == self.sent[role][: len(self.got[target])]
            waiting = self.unread[target]
            assert len(waiting) <= self.limits.window_steps * 2
            if len(waiting) > 1:
                assert sum(m.nbytes for m in waiting) <= self.limits.max_outstanding_bytes
            assert self.links[role].kept_bytes <= self.limits.keep_bytes + 64 + 224
            assert self.links[role].state in (State.OPEN, State.AWAY)

    @precondition(lambda self: hasattr(self, "links"))
    @rule()
    def everything_gets_through(self):
        """Whatever the state, carrying all and consuming all lets every begun tensor arrive."""
        self.redial()
        for turn in range(400):
            for role in ("leader", "follower"):
                self.transmit(role, turn)  # every sender gets its turn, as every thread does
                self.deliver(role, 50)
                while self.unread[role]:
                    self.consume(role, 0)
            if not any(self.active.values()) and not any(self.air.values()):
                break
        for role in ("leader", "follower"):
            self.deliver(role, 50)
            assert not self.active[role]
            assert self.got[self.other[role]] == self.sent[role]


TestInterleaving = Interleaving.TestCase
TestInterleaving.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
