"""A peer, or a stranger, that lies: refused with an error, memory bounded, no crash, and the others go on."""

from __future__ import annotations

import contextlib
import queue
import socket
import struct
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest

from efl.errors import ConfigError, LinkError, PeerFailed, PeerRestarted, ProtocolError
from efl.transport import Channel, Endpoint, Hello, Limits, events, frame, stream, watch
from efl.transport.frame import Kind
from efl.transport.link import Link, State
from tests.parties import run_parties
from tests.transport.peers import follower, free_address, host_port, leader, mirrored, receives, sends

TENSORS = (receives("x"), receives("s", "string"), receives("b", "bool", (None, 2)), sends("y"))
QUICK = Limits(heartbeat_seconds=0.2, dead_seconds=2.0, peer_timeout=30.0, window_steps=4)


class Stranger(stream.Handler):
    """Whoever dials: says any bytes, and hears what comes back."""

    def __init__(self, address: str, role: str = "follower") -> None:
        self.connection = stream.Dialled(Endpoint(role, address, listen=False), self)
        self._heard: queue.Queue[frame.Frame | None] = queue.Queue()
        self.connection.start()

    def __enter__(self) -> Stranger:
        return self

    def __exit__(self, *error: object) -> None:
        self.connection.close()

    def on_message(self, connection, message):
        for one in frame.decode(message):
            self._heard.put(one)

    def on_end(self, connection, why):
        self._heard.put(None)

    def on_stranger(self, peer, why):
        pass

    def say(self, *frames: bytes) -> None:
        """One message."""
        self.connection.outbox.put(b"".join(frames))

    def hear(self, kind: Kind, timeout: float = 10.0) -> frame.Frame:
        """The next frame of a kind; fails where the connection ends before."""
        limit = time.monotonic() + timeout
        while True:
            one = self._heard.get(timeout=max(0.01, limit - time.monotonic()))
            assert one is not None, f"the connection ended and no {kind.name} had come"
            if one.kind is kind:
                return one

    def refusal(self) -> events.Refused:
        """What it is refused with."""
        return events.read_refusal(self.hear(Kind.REFUSE).payload)


class Liar(Stranger):
    """A stranger that has shaken hands as the follower, with the project's own link."""

    def __init__(self, address: str, limits: Limits = QUICK) -> None:
        super().__init__(address)
        self.hello = Hello("follower", mirrored(TENSORS))
        self.link = Link(self.hello, limits, 0.0)
        self.first = b"".join(self.link.take(0.0))
        self.say(self.first)
        while self.link.state is not State.OPEN:
            one = self._heard.get(timeout=10)
            assert one is not None
            self.link.receive([one], 0.0)
            for answer in self.link.take(0.0):
                self.say(answer)

    @property
    def instances(self) -> tuple[str, str]:
        """Of the liar and of its victim."""
        assert self.link.peer is not None
        return self.hello.instance, self.link.peer.instance

    def knock(self, address: str, attempt: int, **fields) -> Stranger:
        """A resume from another connection."""
        other = Stranger(address)
        other.say(frame.encode(Kind.RESUME, events.claim(*self.instances, attempt), **fields))
        return other


def a_liar(address: str, limits: Limits = QUICK) -> Liar:
    """As soon as somebody listens."""
    limit = time.monotonic() + 40
    while True:
        assert time.monotonic() < limit, "nobody listens"
        with contextlib.suppress(OSError), socket.create_connection(host_port(address), 1):
            return Liar(address, limits)
        time.sleep(0.02)


@contextlib.contextmanager
def lied_to(prepare: Callable[[Channel], None] = lambda channel: None) -> Iterator[tuple[Channel, Liar, str]]:
    """A leader, the liar that it talks to, and the address."""
    address = free_address()
    channel = leader(address, *TENSORS, limits=QUICK)
    prepare(channel)
    connecting = threading.Thread(target=lambda: channel.connect(20))
    connecting.start()
    with a_liar(address) as liar:
        connecting.join(20)
        assert channel.peer is not None
        yield channel, liar, address
        channel.abandon()


@pytest.fixture
def victim():
    with lied_to() as scene:
        yield scene


def data(payload: bytes = bytes(24), **fields) -> bytes:
    form = {"seq": 1, "tensor": 0, "dtype": 11, "shape": (len(payload) // 4,), "total": len(payload), **fields}
    return frame.encode(Kind.DATA, payload, **form)


def control(text: bytes, seq: int = 1) -> bytes:
    return frame.encode(Kind.CONTROL, text, seq=seq)


LIES = {
    "a negative shape": ([data(shape=(-6,))], "expected shape"),
    "an enormous shape": ([data(shape=(1 << 62, 1 << 62))], "does not take 24 bytes"),
    "an enormous empty shape": ([data(b"", shape=(0, 1 << 62, 1 << 62))], "no array can have the shape"),
    "an empty shape of strings": ([data(b"", shape=(0, 1 << 62, 1 << 62), tensor=1, dtype=32)], "no array can have"),
    "an enormous tensor": ([data(shape=(1 << 40,), total=1 << 42)], "at most max_message_bytes"),
    "an unknown name": ([data(tensor=3)], "tensor number 3, only 3 were agreed"),
    "a wrong dtype": ([data(dtype=12)], "expected dtype float32, got float64"),
    "a wrong rank": ([data(tensor=2, dtype=1)], r"expected shape \(None, 2\)"),
    "a bool of 7": ([data(b"\7\7", tensor=2, dtype=1, shape=(1, 2))], "neither 0 nor 1"),
    "an enormous step": ([data(step=1 << 63)], "steps must grow"),
    "a step again": ([data(), data(seq=2)], "steps must grow; step 0 has arrived before"),
    "a gap": ([data(seq=5)], "expected sequence number 1, got 5"),
    "a piece out of place": ([data(total=96, shape=(24,), offset=48)], "does not continue 0 of 96 bytes"),
    "wrong lengths": (
        [data(struct.pack("<2I", 1, 1 << 31) + b"a", tensor=1, dtype=32, shape=(2,))],
        "the lengths of 2 strings add up to 2147483649 bytes, 1 came",
    ),
    "more strings than came": ([data(bytes(8), tensor=1, dtype=32, shape=(1 << 30,))], "does not take 8 bytes"),
    "the window": ([data(seq=n + 1, step=n) for n in range(20)], "runs ahead of the window: 12 messages"),
    "an acknowledgement of nothing": ([frame.encode(Kind.PING, ack=7)], "acknowledges 7 frames; only 0 were sent"),
    "credit for nothing": ([frame.encode(Kind.ACK, consumed=1)], "has consumed 1 tensors of 0 bytes; only 0"),
    "a ping of a megabyte": ([frame.encode(Kind.PING, bytes(1 << 20))], "PING with a payload of 1048576 bytes"),
    "a second hello": ([frame.encode(Kind.HELLO, b"{}")], "HELLO in the middle of the conversation"),
    "deep nesting": ([control(b'["t", {"x": ' + b"[" * 500 + b"]" * 500 + b"}]")], "nested more than 64 deep"),
    "very deep nesting": ([control(b"[" * 60_000)], "control message that is not JSON"),
    "a bomb of lists": ([control(b'["t", {"x": [' + b"[]," * 300_000 + b"0]}]")], "300003 lists and objects"),
    "a huge int": ([control(b'["t", {"x": ' + b"9" * 100_000 + b"}]")], "not JSON"),
    "NaN": ([control(b'["t", {"x": NaN}]')], "not JSON"),
    "an infinity": ([control(b'["t", {"x": 1e999}]')], "not JSON"),
    "invalid UTF-8": ([control(b'["t", {"x": "\xff\xfe"}]')], r"not JSON \(UnicodeDecodeError\)"),
    "half a character": ([control(b'["\\ud800", {}]')], r"not JSON \(UnicodeEncodeError\)"),
    "an oversized control message": ([control(b'["t", {"x": "%s"}]' % bytes(1 << 20))], "at most 1048576"),
    "many control messages": ([control(b'["t", {}]', n) for n in range(1, 1100)], "max_unread_controls=1024"),
    "large control messages": (
        [control(b'["t", {"x": "%s"}]' % (b"x" * 1_000_000), n) for n in range(1, 20)],
        r"\d{7} bytes of control messages that nobody has read",
    ),
    "tensors after goodbye": ([frame.encode(Kind.BYE, seq=1), data(seq=2)], "DATA after goodbye"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: lie.replace(" ", "-"))
def test_a_lie_is_refused_and_both_are_told(victim, lie):
    channel, liar, _ = victim
    frames, why = LIES[lie]
    failed = threading.Event()
    channel.on_failure(lambda error: failed.set())
    for one in frames:
        liar.say(one)
    told = events.read_abort(liar.hear(Kind.ABORT).payload)
    assert told.error_type == "ProtocolError"
    assert told.text.startswith("the leader refuses what it received: ")
    assert failed.wait(10)
    with pytest.raises(ProtocolError, match=f"the follower .* broke the protocol: .*{why}"):
        channel.recv_control("never")


def test_repeated_keys_in_json_are_no_way_in(victim):
    channel, liar, _ = victim
    liar.say(control(b'["t", {"x": 1, "x": 2}]'))
    assert channel.recv_control("t", 10) == {"x": 2}


# ---- the line


def test_damaged_frames_are_the_lines_fault_until_there_are_too_many(victim):
    channel, liar, address = victim
    good = data()
    peer: Stranger = liar
    for attempt, bad in enumerate([good[:-16], good[:40] + b"\1" + good[41:], b"x" * 500, good + b"\0"], 1):
        peer.say(bad)
        peer = liar.knock(address, attempt)
        peer.hear(Kind.RESUME)
        assert channel.error is None
    peer.say(good)
    assert channel.recv("x", 0, 10).sum() == 0
    for attempt in range(5, 11):
        peer.say(good[:-16])
        if attempt < 10:
            peer = liar.knock(address, attempt)
            peer.hear(Kind.RESUME)
    with pytest.raises(ProtocolError, match="broke the protocol: frame of .* in a message that has"):
        channel.recv("x", 1, 10)


@pytest.mark.parametrize("size", [21 << 20, 200_000 * 80], ids=["oversized", "very-many-frames"])
def test_a_message_that_is_too_large_costs_the_connection(victim, size):
    channel, liar, address = victim
    ping = frame.encode(Kind.PING)
    liar.say(ping * (size // len(ping)) if size < 20 << 20 else bytes(size))
    limit = time.monotonic() + 10
    while not channel.away:
        assert time.monotonic() < limit
        liar.say(ping)  # it is not for its silence
        time.sleep(0.05)
    with liar.knock(address, 1) as again:
        again.hear(Kind.RESUME)
        again.say(data())
        assert channel.recv("x", 0, 10).size == 6


# ---- somebody else


def test_strangers_are_turned_away_from_a_conversation(victim):
    channel, liar, address = victim
    me, victims = liar.instances
    with Stranger(address) as other:  # the same role again
        other.say(b"".join(Link(Hello("follower", mirrored(TENSORS)), QUICK, 0.0).take(0.0)))
        assert other.refusal().busy
    for claim in (("f" * 32, victims, 1), (me, "f" * 32, 1), (victims, me, 1), ("é", "", 1)):
        with Stranger(address) as other:
            other.say(frame.encode(Kind.RESUME, events.claim(*claim)))
            assert other.refusal().unknown
    for claim in (b'["\\ud800", "x", 1]', b"[" * 999, b"x" * 1001, b'["a", "b", true]', b'["a", "b", -1]'):
        with Stranger(address) as other:
            other.say(frame.encode(Kind.RESUME, claim))
            assert not other.refusal().unknown
    liar.say(data())
    assert channel.recv("x", 0, 10).size == 6
    assert not channel.away


def test_claims_before_any_conversation_are_unknown():
    address = free_address()
    channel = leader(address, *TENSORS, limits=QUICK)
    connecting = threading.Thread(target=lambda: channel.connect(20))
    connecting.start()
    while channel._talk.listener is None:
        time.sleep(0.01)
    with Stranger(address) as other:
        other.say(frame.encode(Kind.RESUME, events.claim("1" * 32, "2" * 32, 1)))
        assert other.refusal().unknown
    with a_liar(address):
        connecting.join(20)
        assert channel.error is None
        channel.abandon()


def test_a_copy_of_the_first_hello_is_no_newcomer_however_early_the_line_was_cut(victim):
    channel, liar, address = victim  # nothing but the handshake has passed
    liar.connection.close()
    limit = time.monotonic() + 10
    while not channel.away and time.monotonic() < limit:
        time.sleep(0.01)
    with Stranger(address) as copy:
        copy.say(liar.first)
        assert copy.refusal().busy
    assert channel.error is None
    with liar.knock(address, 1) as again:
        again.hear(Kind.RESUME)
        again.say(data())
        assert channel.recv("x", 0, 10).size == 6


def test_while_the_peer_is_away_only_itself_or_one_that_agrees_comes_in(victim):
    channel, liar, address = victim
    liar.say(data())
    assert channel.recv("x", 0, 10).size == 6
    liar.connection.close()
    limit = time.monotonic() + 10
    while not channel.away and time.monotonic() < limit:
        time.sleep(0.01)
    with Stranger(address) as copy:  # the hello with which the conversation began, again
        copy.say(liar.first)
        assert copy.refusal().busy
    with Stranger(address) as zombie:  # of an earlier run, which had other tensors
        zombie.say(b"".join(Link(Hello("follower", ()), QUICK, 0.0).take(0.0)))
        assert "no send of that name" in str(zombie.refusal().reasons)
    with Stranger(address) as bomb:
        many = {f"term {n}": n for n in range(4000)}
        bomb.say(b"".join(Link(Hello("follower", mirrored(TENSORS), many), Limits(), 0.0).take(0.0)))
        refused = bomb.refusal()
        assert sum(map(len, refused.reasons)) < 1 << 20
    assert channel.away
    assert channel.error is None
    with liar.knock(address, 3) as again:
        again.hear(Kind.RESUME)
        with liar.knock(address, 2) as stale:  # a connection that was overtaken by the third
            assert stale.refusal().busy
        again.say(data(seq=2, step=1))
        assert channel.recv("x", 1, 10).size == 6
    while not channel.away and time.monotonic() < limit:
        time.sleep(0.01)
    with Stranger(address) as newcomer:
        newcomer.say(b"".join(Link(Hello("follower", mirrored(TENSORS)), QUICK, 0.0).take(0.0)))
        assert newcomer.refusal().busy
        with pytest.raises(PeerRestarted):
            channel.recv("x", 2, 10)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"ack": 9}, "acknowledges 9 frames; only 1 were sent"),
        ({"ack": 0}, "it has 0 frames, and had acknowledged 1"),
        ({"ack": 1, "consumed": 2}, "has consumed 2 tensors of 0 bytes; only 1"),
        ({"ack": 1, "consumed_bytes": 1 << 60}, "has consumed 0 tensors of"),
    ],
    ids=["beyond", "behind", "consumed", "bytes"],
)
def test_a_resume_with_counters_that_cannot_be(victim, fields, why):
    channel, liar, address = victim
    channel.send("y", 0, np.ones(3, np.float32))
    liar.say(frame.encode(Kind.PING, ack=1), data(ack=1))
    channel.recv("x", 0, 10)
    with liar.knock(address, 1, **fields) as again:
        assert why in events.read_abort(again.hear(Kind.ABORT).payload).text
    with pytest.raises(ProtocolError, match=why):
        channel.recv("x", 1, 10)


def test_a_hundred_silent_connections_do_not_keep_the_peer_out(victim):
    channel, liar, address = victim
    liar.connection.close()
    with contextlib.ExitStack() as crowd:
        for _ in range(100):
            crowd.enter_context(Stranger(address))
        time.sleep(0.5)
        began = time.monotonic()
        for attempt in range(1, 20):
            with liar.knock(address, attempt) as again, contextlib.suppress(AssertionError, queue.Empty):
                again.hear(Kind.RESUME, 2.0)
                again.say(data())
                assert channel.recv("x", 0, 10).size == 6
                break
            time.sleep(0.1)
        assert time.monotonic() - began < 4.0
        assert channel.stats.messages_received == 1


def test_a_peer_that_asks_and_does_not_read_loses_its_connection(victim, monkeypatch, caplog):
    monkeypatch.setattr(watch, "_UNSENT_FRAMES", 100)
    channel, liar, address = victim
    me, victims = liar.instances
    deaf = grpc.insecure_channel(address, [("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0)])
    over = threading.Event()

    def ask():
        yield frame.encode(Kind.RESUME, events.claim(me, victims, 1))
        while not over.is_set() and not channel.away:
            yield frame.encode(Kind.PING, flags=frame.FLAG_HUNGRY)

    call = deaf.stream_stream("/efl.Link/Stream")(ask())  # nobody draws the answers
    limit = time.monotonic() + 120
    while not channel.away and time.monotonic() < limit:
        time.sleep(0.01)
    over.set()
    assert channel.away
    assert "it does not read what is sent to it" in caplog.text
    call.cancel()
    deaf.close()
    with liar.knock(address, 2) as again:
        again.hear(Kind.RESUME)
    assert channel.error is None


LAST_WORDS = {
    "a failure": (
        frame.encode(Kind.ABORT, events.abort(ConfigError("enough"), "step 3", False)),
        PeerFailed,
        "failed at step 3 with ConfigError: enough",
    ),
    "a lie": (data(seq=2, step=1, dtype=12), ProtocolError, "expected dtype float32, got float64"),
}


@pytest.mark.parametrize("words", LAST_WORDS, ids=lambda words: words.replace(" ", "-"))
def test_last_words_count_where_the_stream_ends_before_they_are_worked_off(words):
    message, error, why = LAST_WORDS[words]
    busy = threading.Event()
    with lied_to(lambda channel: channel.subscribe("x", lambda *tensor: busy.wait(10))) as (channel, liar, _):
        liar.say(data())
        liar.say(message)
        liar.connection.outbox.end()
        time.sleep(0.5)
        busy.set()
        with pytest.raises(error, match=why):
            channel.recv_control("never", 10)
        assert not channel.away


# ---- whoever listens


class Trap(stream.Handler):
    """Somebody who listens where a leader should, and answers each first message with what it is told to."""

    def __init__(self, address: str, answer: bytes) -> None:
        self.answer, self.asked = answer, threading.Event()
        self.listener = stream.Listener(Endpoint("leader", address, listen=True), self)

    def on_message(self, connection, message):
        connection.outbox.put(self.answer)
        self.asked.set()

    def on_end(self, connection, why):
        pass

    def on_stranger(self, peer, why):
        pass


ANSWERS = {
    "another conversation": frame.encode(Kind.RESUME, events.claim("1" * 32, "2" * 32, 1)),
    "a malformed claim": frame.encode(Kind.RESUME, b'["\\ud800"'),
    "a tensor": data(),
    "garbage": b"x" * 300,
    "a malformed refusal": frame.encode(Kind.REFUSE, b"[" * 5000),
    "an abort": frame.encode(Kind.ABORT, b'{"type": "Bomb", "text": "x"}'),
}


@pytest.mark.parametrize("answer", ANSWERS, ids=lambda answer: answer.replace(" ", "-"))
def test_somebody_in_the_leaders_place_does_not_end_a_conversation(answer):
    address = free_address()
    one, two = leader(address, *TENSORS, limits=QUICK), follower(address, *mirrored(TENSORS), limits=QUICK)
    meeting = threading.Thread(target=lambda: one.connect(20))
    meeting.start()
    two.connect(20)
    meeting.join(20)
    one._talk.over = True  # as after kill -9, without the process
    one._talk.stopped.set()
    one._talk.connection.close()
    one._talk.listener.close(0)
    trap = Trap(address, ANSWERS[answer])
    assert trap.asked.wait(10)
    time.sleep(0.3)
    assert two.away
    assert two.error is None
    trap.listener.close(0)
    two.abandon()


@pytest.mark.parametrize("answer", ANSWERS, ids=lambda answer: answer.replace(" ", "-"))
def test_somebody_in_the_leaders_place_is_no_peer_to_begin_with(answer):
    address = free_address()
    trap = Trap(address, ANSWERS[answer])
    two = follower(address, *mirrored(TENSORS), limits=QUICK)
    with pytest.raises(LinkError, match=r"broke the protocol|damaged on the way|refused|Bomb|failed"):
        two.connect(1.0)
    trap.listener.close(0)


# ---- memory

VICTIM = """
import resource, sys
from efl.errors import EflError
from efl.transport import Channel, Endpoint, Hello, Limits, TensorSpec
tensors = tuple(TensorSpec(*t) for t in {tensors!r})
channel = Channel(Endpoint("leader", {address!r}, True), Hello("leader", tensors), Limits(heartbeat_seconds=0.2))
kib = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = kib()
try:
    channel.connect(60)
    channel.recv_control("never", {seconds})
except EflError as error:
    print(type(error).__name__, str(error)[:300])
print((kib() - before) >> 10)
channel.abandon()
"""


def _pinned(liar: Liar) -> None:
    # As many as the window allows; each comes in a message of 16 MiB that it must not keep alive.
    for step in range(24):
        liar.say(data(bytes(4), seq=step + 1, step=step), data(bytes(16 << 20), seq=1, step=0))


def _strings(liar: Liar) -> None:
    count = 3 << 20
    payload = struct.pack("<I", 0) * count
    for begin in range(0, len(payload), 1 << 20):
        piece = payload[begin : begin + (1 << 20)]
        liar.say(
            data(piece, seq=1 + (begin >> 20), tensor=1, dtype=32, shape=(count,), total=len(payload), offset=begin)
        )


def _lists(liar: Liar) -> None:
    for number in range(1, 200):
        liar.say(control(b'["t%d", {"x": [' % number + b"{}," * 30_000 + b"0]}]", number))


def _claimed(liar: Liar) -> None:
    # Two GiB are announced, and a piece of it comes: only what has come takes memory.
    liar.say(data(bytes(1 << 20), shape=(1 << 29,), total=2 << 30))


def _many_frames(liar: Liar) -> None:
    shapes = (1,) * 32
    one = frame.encode(Kind.DATA, seq=0, shape=shapes)
    for attempt in range(1, 5):
        liar.knock(liar.connection.peer, attempt).say(one * ((19 << 20) // len(one)))
        time.sleep(0.3)
    liar.knock(liar.connection.peer, 5)


FLOODS = {"pinned": (_pinned, 200), "strings": (_strings, 150), "lists": (_lists, 150), "claimed": (_claimed, 40),
          "frames": (_many_frames, 150)}  # fmt: skip


@pytest.mark.parametrize("flood", FLOODS)
def test_memory_is_bounded(flood):
    send, most = FLOODS[flood]
    address = free_address()
    tensors = [(t.name, t.dtype, t.shape, t.direction) for t in TENSORS]
    script = textwrap.dedent(VICTIM.format(tensors=tensors, address=address, seconds=3.0))
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    with a_liar(address, Limits()) as liar:
        send(liar)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert int(output.split()[-1]) < most, output


# ---- a whole run


def test_a_model_is_not_hurt_by_a_broken_peer(tmp_path: Path):
    script = """
    import numpy as np
    import tensorflow.compat.v1 as tf
    import efl
    from efl.transport.link import Link

    plain = Link.transmit

    def broken(self, out):
        if self._hello.role == "follower" and out.step == 5:
            out.shape = (-4, 1 << 61)
        plain(self, out)

    Link.transmit = broken

    def input_fn(m, mode):
        rows = tf.data.Dataset.from_tensors(np.ones((4, 2), np.float32)).repeat()
        x = tf.data.make_one_shot_iterator(rows).get_next()
        columns = {"x": [tf.feature_column.numeric_column("x", 2)]}
        return efl.FederalSample({"x": x}, columns, m.federal_role, m.communicator, verify_id=False)

    def loss_fn(m, s):
        h = tf.layers.dense(s["x"], 1, name="own")
        if m.federal_role == "follower":
            m.send("h", h, require_grad=True)
            return h
        return tf.reduce_mean(tf.square(h + m.recv("h", require_grad=True)))

    m = efl.FederalModel()
    optimizer = efl.optimizer_fn.optimizer_setter(tf.train.GradientDescentOptimizer(0.1))
    m.input_fn(input_fn).loss_fn(loss_fn).optimizer_fn(optimizer)
    m.compile()
    m.fit(efl.procedure_fn.train(max_step=10))
    """
    results = run_parties({"leader": script, "follower": script}, cwd=tmp_path, timeout=90)
    assert "broke the protocol: tensor 'train/h', step 5: expected shape" in results["leader"].output
    assert "the leader refuses what it received: tensor 'train/h', step 5" in results["follower"].output
    assert results["leader"].returncode != 0
    assert results["follower"].returncode != 0
