"""What holds for any bytes, and for two links over a line that loses, repeats and reorders connections."""

from __future__ import annotations

import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule

from efl.errors import ConfigError, DataError, ProtocolError
from efl.transport import Hello, Limits, codec, events, frame, handshake
from efl.transport.events import Aborted, Control, Goodbye, Resumed, read_claim
from efl.transport.frame import Kind
from efl.transport.inbound import Inbound, Message
from efl.transport.link import Link, State
from efl.transport.said import read_json
from fuzz.seeds import seeds
from fuzz.targets import TARGETS
from tests.transport.peers import mirrored, receives, sends
from tests.transport.test_link import FLOATS, Interleaving, carry, forged, opened, send

SEEDS = [(target, data) for target, inputs in seeds().items() for data in inputs]


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_fuzzed_holds_for_every_seed_and_for_seeds_cut_short(target):
    for data in (data for name, data in SEEDS if name == target):
        for length in {0, 1, len(data) // 2, len(data) - 1, len(data)}:
            TARGETS[target](data[:length])


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(list(TARGETS)), st.binary(max_size=300))
def test_what_is_fuzzed_holds_for_any_bytes(target, data):
    TARGETS[target](data)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(SEEDS), st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=8))
def test_what_is_fuzzed_holds_for_seeds_with_other_bytes(seed, changes):
    target, data = seed
    changed = bytearray(data)
    for place, value in changes:
        changed[place % len(changed)] = value
    TARGETS[target](bytes(changed))


# ---- memory in proportion to what arrives


def peak(action) -> int:
    """The most memory, in bytes, that ``action`` holds at a time."""
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_message_of_very_many_frames_is_refused_before_they_take_memory():
    one = frame.encode(Kind.PING, shape=(1,) * 32)
    assert len(frame.decode(one * frame.MAX_FRAMES)) == frame.MAX_FRAMES
    flood = one * 60_000

    def read():
        with pytest.raises(frame.DamagedFrame, match="a message of more than 4096 frames"):
            frame.decode(flood)

    assert peak(read) < 16 << 20


def test_strings_take_memory_in_proportion():
    payload = memoryview((1000).to_bytes(4, "little") + bytes((1 << 20) + 1000 - 4))  # all but the first are empty
    assert peak(lambda: codec.decode(codec.STRING, (1 << 18,), payload)) < 9 * len(payload)


def test_a_small_tensor_does_not_keep_a_large_message():
    inbound = Inbound([sends("a")], Limits())
    small = frame.decode(forged(seq=1, dtype=11, shape=(6,), total=24) + frame.encode(Kind.DATA, bytes(1 << 20)))[0]
    message = inbound.accept(small)
    assert len(message.array.base) < 100
    large = frame.decode(forged(seq=2, payload=bytes(4096), dtype=11, shape=(1024,), step=1, total=4096))[0]
    assert inbound.accept(large).array.base is large.payload.obj


def test_a_tensor_for_which_there_is_no_memory_is_refused(monkeypatch):
    def none_left(size):
        raise MemoryError

    monkeypatch.setattr(codec, "allocate", none_left)
    _, two = opened()
    with pytest.raises(ProtocolError, match="tensor 'a', step 0: there is no memory for its 48 bytes"):
        two.receive(frame.decode(forged(seq=1, dtype=11, shape=(12,), total=48)), 0.0)


def test_many_questions_in_one_message_are_answered_once():
    one, _ = opened()
    one.receive(frame.decode(frame.encode(Kind.PING, flags=frame.FLAG_HUNGRY) * 1000), 0.0)
    assert len(one.take(0.0)) == 1


# ---- words of a peer

ANY_TEXT = st.text(st.characters(), max_size=20) | st.text(st.sampled_from("\ud800\udc00\x1b\n\0é"), max_size=5)
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(ANY_TEXT, inner, max_size=4),
    max_leaves=20,
)


@given(ANY_JSON)
def test_json_is_read_as_it_was_meant_or_refused(value):
    value = json.loads(json.dumps(value))  # which makes one character of two halves
    try:
        json.dumps(value, ensure_ascii=False).encode()
        printable = True
    except UnicodeEncodeError:
        printable = False
    try:
        assert read_json(json.dumps(value).encode(), "value") == value
        assert printable
    except ProtocolError:
        assert not printable


@pytest.mark.parametrize("deep", [60, 64, 65, 900, 5000])
@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
def test_json_may_be_nested_a_little(deep, opening, closing):
    text = (opening * deep + "0" + closing * deep).encode()
    if deep <= 64:
        assert read_json(text, "value")
    else:
        with pytest.raises(ProtocolError, match="nested more than 64 deep|not JSON"):
            read_json(text, "value")


def test_what_no_peer_would_accept_is_not_sent():
    one, _ = opened()
    for body in ({"x": "\ud800"}, {"x": [[]] * 70_000}, {"x": json.loads("[" * 80 + "]" * 80)}):
        with pytest.raises(ConfigError, match="must be a JSON object: a control message"):
            one.send_control("t", body)
    with pytest.raises(ConfigError, match="own hello is not valid: a hello that is not JSON"):
        handshake.to_bytes(Hello("leader", terms={"file": "caf\udce9"}), Limits())


def test_the_name_of_a_file_that_is_no_text_still_tells_why_a_party_failed():
    one, two = opened()
    one.abort(DataError("cannot read 'caf\udce9'"))
    assert carry(one, two) == [Aborted("DataError", "cannot read 'caf?'")]


def test_what_a_terminal_would_obey_is_not_printed():
    told = events.read_abort(b'{"type": "E\\u001b[2J", "text": "a\\nb\\u0007", "where": "\\u202e"}')
    assert told == Aborted("E\ufffd[2J", "a\nb\ufffd", "\ufffd")
    refused = events.read_refusal(b'{"reasons": ["\\u001b]0;x"]}')
    assert refused.reasons == ("\ufffd]0;x",)
    with pytest.raises(ProtocolError, match=r"malformed hello: role 'lead\\x1b'"):
        handshake.parse(b'{"version": 1, "instance": "x", "role": "lead\\u001b"}', Limits())


def test_reasons_are_bounded_whatever_the_hellos_say():
    mine = Hello("leader", terms={"a": 1})
    peer = Hello("follower", terms={f"{n}" * 300: "y" * 1500 for n in range(4000)})
    reasons = handshake.disagreements(mine, peer)
    assert sum(map(len, reasons)) < 1 << 20
    assert reasons[-1].startswith("... and ")
    assert handshake.disagreements(peer, mine) == reasons
    assert max(map(len, reasons)) < 2200
    with pytest.raises(ProtocolError, match="more than 4096 terms or facts"):
        handshake.parse(handshake_with(facts={f"{n}": n for n in range(5000)}), Limits())


def handshake_with(**changes) -> bytes:
    return json.dumps({**json.loads(handshake.to_bytes(Hello("leader"), Limits())), **changes}).encode()


# ---- connections that are lost, repeated and overtaken


class Survival(Interleaving):
    """As above, with large tensors, control messages, goodbyes, and knocks that arrive late, twice or never."""

    roles = st.sampled_from(["leader", "follower"])

    @initialize()
    def begin_more(self):
        self.late = []
        self.said = 0

    @rule(role=roles, which=st.integers(0, 1), size=st.integers(0, 150) | st.integers(200, 450))
    def start(self, role, which, size):
        if not self.links[role].said_goodbye and len(self.active[role]) <= 3:
            name = self.names[role][which]
            self.step[role, name] += 1
            step = self.step[role, name]
            self.active[role].append(self.links[role].prepare(name, step, self.make(name, step, size)))

    @rule(role=roles)
    def control(self, role):
        if not self.links[role].said_goodbye and self.said < 20:
            self.said += 1
            self.links[role].send_control("t", {"n": self.said})
            self.sent[role].append(("t", self.said, 0))

    @rule(role=roles)
    def goodbye(self, role):
        if not self.active[role]:
            self.links[role].goodbye()
            self.links[role].goodbye()

    @rule(role=roles, count=st.integers(1, 5))
    def deliver(self, role, count):
        self.air[role] += self.links[role].take(self.now)
        if self.links["follower"].state is State.AWAY:
            self.air[role] = []
        batch, self.air[role] = self.air[role][:count], self.air[role][count:]
        if not batch:
            return
        target = self.other[role]
        for event in self.links[target].receive(frame.decode(b"".join(batch)), self.now):
            if isinstance(event, Message):
                self.got[target].append((event.name, event.step, event.array.size))
                if event.array.size:
                    assert (event.array.ravel() == self.make(event.name, event.step, 4).ravel()[0]).all()
                self.unread[target].append(event)
            elif isinstance(event, Control):
                self.got[target].append(("t", event.body["n"], 0))
            elif isinstance(event, Goodbye):
                assert self.links[role].said_goodbye
                assert self.got[target] == self.sent[role]
            else:
                assert isinstance(event, Resumed)

    @rule(how_often=st.integers(1, 2))
    def knock_in_vain(self, how_often):
        """The follower dials; what it says is on its way for long, and it gives that connection up."""
        if self.links["follower"].state is State.AWAY:
            knock = self.links["follower"].knock()
            self.late.extend([knock] * how_often)

    @rule(which=st.integers(0, 5))
    def late_knock_arrives(self, which):
        """On a connection that nobody listens to any more."""
        if not self.late:
            return
        leader, follower = self.links["leader"], self.links["follower"]
        (knock,) = frame.decode(self.late.pop(which % len(self.late)))
        assert leader.is_ours(read_claim(knock.payload))
        if leader.is_stale(read_claim(knock.payload)):
            return  # "busy"
        assert follower.state is State.AWAY, "a late knock would end a good connection"
        leader.lost()
        assert leader.receive([knock], self.now) == [Resumed()]
        leader.take(self.now)  # to nobody

    @invariant()
    def ordered_once_and_bounded(self):
        if not hasattr(self, "links") or not hasattr(self, "said"):
            return
        for role in ("leader", "follower"):
            target = self.other[role]
            assert self.got[target] == self.sent[role][: len(self.got[target])]
            waiting = self.unread[target]
            assert len(waiting) <= self.limits.window_steps * 2
            if len(waiting) > 1:
                assert sum(m.nbytes for m in waiting) <= self.limits.max_outstanding_bytes
            more = 128 * (self.said + 1)  # control messages and the goodbye do not wait
            assert self.links[role].kept_bytes <= self.limits.keep_bytes + 64 + 224 + more
            assert self.links[role].state in (State.OPEN, State.AWAY)

    @precondition(lambda self: hasattr(self, "links"))
    @rule()
    def everything_gets_through(self):
        super().everything_gets_through()
        for role in ("leader", "follower"):
            if self.links[role].said_goodbye:
                assert self.links[self.other[role]].peer_goodbye
                assert not self.air[role]


TestSurvival = Survival.TestCase
TestSurvival.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)


@given(st.lists(st.sampled_from(["send", "carry", "back", "cut"]), max_size=12), st.booleans(), st.booleans())
def test_an_abort_is_the_end_at_whatever_point(before, line_is_good, leaders):
    one, two = opened(tensors=(sends("a"), receives("a")), limits=Limits(chunk_bytes=8))
    if not leaders:
        one, two = two, one
    step, cut = 0, False
    for what in before:
        if what == "send" and not cut:
            send(one, "a", step, FLOATS)
            step += 1
        elif what == "carry":
            carry(one, two)
        elif what == "back" and not cut:
            carry(two, one)
        elif what == "cut":
            one.lost()
            two.lost()
            cut = True
    one.abort(DataError("why"))
    frames = one.take(0.0)
    assert [f.kind for f in frame.decode(b"".join(frames))] == [Kind.ABORT]
    if line_is_good and not cut:
        assert two.receive(frame.decode(frames[0]), 0.0) == [Aborted("DataError", "why")]
        assert two.state is State.OVER
        two.goodbye()
        two.lost()
        assert two.state is State.OVER
    one.lost()
    one.goodbye()
    assert one.receive(frame.decode(forged(seq=1)), 0.0) == []
    assert one.tick(1e9) == ""
    assert one.state is State.OVER
    assert one.take(0.0) == []


def test_a_large_tensor_goes_on_where_the_line_was_cut():
    one, two = opened(tensors=(sends("a"),), limits=Limits(chunk_bytes=64))
    values = np.arange(400, dtype=np.float32)
    out, events_ = one.prepare("a", 0, values), []
    pieces = 0
    while not out.done:
        one.transmit(out)
        pieces += 1
        if pieces % 3 == 0:
            one.lost()
            two.lost()
            (knock,) = frame.decode(two.knock())
            assert one.receive([knock], 0.0) == [Resumed()]
        events_ += [e for e in carry(one, two) if not isinstance(e, Resumed)]
    assert pieces == 25
    (message,) = events_
    np.testing.assert_array_equal(message.array, values)


def test_two_parties_that_mirror_each_other_agree():
    tensors = (sends("a"), receives("b", "bool", (None, 2)))
    one, two = Hello("leader", tensors), Hello("follower", mirrored(tensors))
    assert handshake.disagreements(one, two) == []
    link = Link(one, Limits(), 0.0)
    link.receive(frame.decode(frame.encode(Kind.HELLO, handshake.to_bytes(two, Limits()))), 0.0)
    assert link.state is State.AGREED
