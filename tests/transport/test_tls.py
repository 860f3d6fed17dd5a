"""Two parties with certificates, and everybody who must not get in: each side says why."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import re
import socket
import ssl
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

from efl.errors import ConfigError, EflError, PeerLost, TlsError
from efl.transport import Channel, Endpoint, Hello, Limits, Tls, stream, tls
from efl.transport.limits import DEFAULT_LIMITS
from efl.transport.link import Link
from tests.transport.certificates import Authority, expecting, odd
from tests.transport.peers import both, free_address, host_port, mirrored, receives, sends

TENSORS = (sends("g"), receives("x"))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def abroad(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("abroad"), "a foreign authority")


@pytest.fixture(scope="module")
def leads(home: Authority) -> Tls:
    return home.party("leader", peer_name="follower")


@pytest.fixture(scope="module")
def follows(home: Authority) -> Tls:
    return home.party("follower", peer_name="leader")


def channel(role: str, address: str, files: Tls | None, limits: Limits = DEFAULT_LIMITS) -> Channel:
    tensors = TENSORS if role == "leader" else mirrored(TENSORS)
    return Channel(Endpoint(role, address, role == "leader", files), Hello(role, tensors), limits)


def attempt(address: str, leader: Tls | None, follower: Tls | None, timeout: float = 5.0) -> dict[str, object]:
    """What becomes of two parties that look for each other: role -> the peer's hello, or the error."""
    parties = [channel("leader", address, leader), channel("follower", address, follower)]
    results = both(*(lambda p=p: p.connect(timeout) for p in parties))
    both(*(lambda p=p: p.close(1) for p in parties))
    return dict(zip(("leader", "follower"), results))


@contextlib.contextmanager
def connected(leader: Tls, follower: Tls, limits: Limits = DEFAULT_LIMITS) -> Iterator[tuple[str, Channel, Channel]]:
    address = free_address()
    one, two = channel("leader", address, leader, limits), channel("follower", address, follower, limits)
    for result in both(lambda: one.connect(20), lambda: two.connect(20)):
        assert isinstance(result, Hello), result
    try:
        yield address, one, two
    finally:
        both(lambda: one.close(2), lambda: two.close(2))


def there_and_back(one: Channel, two: Channel, step: int = 0) -> None:
    two.send("x", step, np.full([3], step, np.float32))
    assert one.recv("x", step, 10).tolist() == [step] * 3
    one.send("g", step, np.ones([200_000], np.float32))
    assert two.recv("g", step, 10).shape == (200_000,)


# ---- who is let in


def test_two_parties_with_certificates_talk(leads: Tls, follows: Tls) -> None:
    with connected(leads, follows) as (address, one, two):
        there_and_back(one, two)
        with socket.create_connection(host_port(address)) as line:
            line.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
            assert line.recv(100) == b""  # it is TLS indeed


def test_the_certificate_itself_may_be_what_the_peer_is_recognised_by(tmp_path: Path, home: Authority) -> None:
    leader = home.write("own-leader", odd("leader", None), "follower")
    follower = home.write("own-follower", odd("follower", None), "leader")
    with connected(
        expecting(leader, peer_certs=follower.my_certs), expecting(follower, peer_certs=leader.my_certs)
    ) as c:
        there_and_back(*c[1:])


def test_a_name_of_the_peers_own_choice(home: Authority) -> None:
    bank = home.party("bank", ["bank.example", "b2.bank.example"], peer_name="shop.example")
    shop = home.party("shop", ["shop.example"], peer_name="B2.bank.example")
    with connected(bank, shop) as c:
        there_and_back(*c[1:])


# ---- who is not


class Refusal:
    """A pair of parties that must not come together, and what each says of it."""

    def __init__(self, parties: Callable[..., tuple[Tls | None, Tls | None]], leader: str, follower: str) -> None:
        self.parties, self.leader, self.follower = parties, leader, follower


NOT_OURS = "its certificate was issued by an authority that is not in peer_certs"
REFUSALS = {
    "another party of the authority as the follower": Refusal(
        lambda leads, follows, home, abroad: (leads, home.party("other")),
        r"carries the names \['other'\], expected 'follower'",
        r"turned this follower away: its certificate carries the names \['other'\], expected 'follower'",
    ),
    "another party of the authority as the leader": Refusal(
        lambda leads, follows, home, abroad: (home.party("other", peer_name="follower"), follows),
        r"it refuses this party's certificate",
        r"carries the names \['other'\], expected 'leader'",
    ),
    "the leader's role taken by the follower": Refusal(
        lambda leads, follows, home, abroad: (leads, expecting(leads, "leader")),
        r"carries the names \['leader'\], expected 'follower'",
        r"carries the names \['leader'\], expected 'follower'",
    ),
    "a follower of another authority": Refusal(
        lambda leads, follows, home, abroad: (leads, expecting(abroad.party("follower"), peer_certs=home.file)),
        NOT_OURS,
        r"it refuses this party's certificate \(unknown ca\).*issued by 'a foreign authority' for the names",
    ),
    "a leader of another authority": Refusal(
        lambda leads, follows, home, abroad: (
            expecting(abroad.party("leader", peer_name="follower"), peer_certs=home.file),
            follows,
        ),
        r"it refuses this party's certificate \(unknown ca\)",
        r"its certificate was issued by 'a foreign authority', which peer_certs=.* does not lead to",
    ),
    "a self-signed follower": Refusal(
        lambda leads, follows, home, abroad: (leads, home.write("self-follower", odd("follower", None))),
        "its certificate is self-signed and not in peer_certs",
        r"it refuses this party's certificate \(unknown ca\).*issued by itself \(self-signed\)",
    ),
    "a self-signed leader": Refusal(
        lambda leads, follows, home, abroad: (home.write("self-leader", odd("leader", None), "follower"), follows),
        r"it refuses this party's certificate \(unknown ca\)",
        r"its certificate was issued by itself \(self-signed\), which peer_certs=.* does not lead to",
    ),
    "clear text against a leader with certificates": Refusal(
        lambda leads, follows, home, abroad: (leads, None),
        "it speaks clear text, and this party insists on TLS",
        r"it speaks TLS, and this party has no certificates",
    ),
    "a leader in clear text": Refusal(
        lambda leads, follows, home, abroad: (None, follows),
        r"it expects TLS, and this party has no certificates \(my_certs\)",
        r"it speaks clear text .*, and this party insists on TLS",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_is_refused_by_both_and_each_says_why(case: str, leads, follows, home, abroad, caplog) -> None:
    refusal = REFUSALS[case]
    leader, follower = refusal.parties(leads, follows, home, abroad)
    begun = time.monotonic()
    result = attempt(free_address(), leader, follower)
    assert isinstance(result["follower"], TlsError), result
    assert re.search(refusal.follower, str(result["follower"])), result["follower"]
    assert isinstance(result["leader"], PeerLost), result  # a stranger does not end it
    assert re.search(r"no follower came \(last: turned away .*" + refusal.leader, str(result["leader"])), result[
        "leader"
    ]
    warned = [
        record for record in caplog.records if re.search("leader: turned away .*" + refusal.leader, record.message)
    ]
    assert warned and warned[0].created - caplog.records[0].created < 4.0, "said late, or only at the end"
    assert time.monotonic() - begun < 20


def test_the_dialling_side_does_not_wait_for_what_waiting_cannot_mend(leads: Tls, home: Authority) -> None:
    address = free_address()
    listener = stream.Listener(Endpoint("leader", address, True, leads), Ignoring())
    try:
        begun = time.monotonic()
        for other in (home.party("other"), home.write("self-follower", odd("follower", None))):
            with pytest.raises(TlsError):
                channel("follower", address, other).connect(600)
        assert time.monotonic() - begun < 12
    finally:
        listener.close(0.0)


class Ignoring(stream.Handler):
    """Takes note of what a listener hands on."""

    def __init__(self) -> None:
        self.messages: list[bytes] = []
        self.strangers: list[str] = []

    def on_message(self, connection: stream.Connection, message: bytes) -> None:
        self.messages.append(message)

    def on_end(self, connection: stream.Connection, why: str) -> None:
        pass

    def on_stranger(self, peer: str, why: str) -> None:
        self.strangers.append(why)


def bare_dial(address: str, files: Tls, message: bytes, name: str = "leader") -> grpc.RpcError | None:
    """A party without any of our shell: sends a message; the error with which the call ends."""
    pem = [Path(file).read_bytes() for file in (files.peer_certs, files.my_key, files.my_certs)]
    options = [("grpc.ssl_target_name_override", name), ("grpc.use_local_subchannel_pool", 1)]
    with grpc.secure_channel(address, grpc.ssl_channel_credentials(*pem), options) as line:
        try:
            for _ in line.stream_stream("/efl.Link/Stream")(iter([message]), timeout=3):
                pass
        except grpc.RpcError as error:
            return error
    return None


def test_nothing_is_read_of_whom_the_authority_knows_by_another_name(leads: Tls, follows: Tls, home: Authority) -> None:
    handler, address = Ignoring(), free_address()
    listener = stream.Listener(Endpoint("leader", address, True, leads), handler)
    try:
        error = bare_dial(address, home.party("other"), b"hello")
        assert error is not None and error.code() is grpc.StatusCode.UNAUTHENTICATED
        nameless = home.write("nameless", odd_without_names(home))
        error = bare_dial(address, nameless, b"hello")
        assert error is not None and "no name (no subjectAltName)" in error.details()
        assert handler.messages == [] and len(handler.strangers) == 2
        bare_dial(address, follows, b"hello")
        assert handler.messages == [b"hello"]
    finally:
        listener.close(0.0)


def odd_without_names(home: Authority):
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes

    good = odd("follower", home.issued)
    builder = (
        x509.CertificateBuilder(good.certificate.issuer, good.certificate.subject, good.key.public_key())
        .serial_number(5)
        .not_valid_before(good.certificate.not_valid_before_utc)
        .not_valid_after(good.certificate.not_valid_after_utc)
    )
    return good._replace(certificate=builder.sign(home.issued.key, hashes.SHA256()))


CARELESS = """
import sys
from efl.transport import Channel, Endpoint, Hello, Tls, tls
tls.out_of_date = lambda certificate: ""  # a party that does not look at its own certificate
role, address, *files = sys.argv[1:]
channel = Channel(Endpoint(role, address, role == "leader", Tls(*files)), Hello(role))
channel.connect(6)
print("connected")
"""


def careless(role: str, address: str, files: Tls) -> subprocess.Popen[str]:
    arguments = [role, address, *dataclasses.astuple(files)]
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(CARELESS), *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("first", "last", "words"), [(-9, -2, "has expired"), (2, 9, "is not valid yet")], ids=["expired", "early"]
)
def test_a_follower_out_of_date(first, last, words, leads: Tls, home: Authority) -> None:
    address = free_address()
    process = careless("follower", address, home.dated("follower", first, last))
    try:
        with pytest.raises(PeerLost, match=f"last: turned away .*its certificate {words}"):
            channel("leader", address, leads).connect(5)
    finally:
        output, _ = process.communicate(timeout=20)
    # OpenSSL has an alert for certificates that have expired; for those of tomorrow it says "bad".
    alert = "certificate expired" if last < 0 else "bad certificate"
    assert (
        f"TlsError: the follower cannot talk to the leader at {address}: it refuses this party's certificate" in output
    )
    assert f"({alert})" in output


@pytest.mark.parametrize(
    ("first", "last", "words"),
    [(-9, -2, r"expired on 20\d\d-\d\d-\d\d \d\d:\d\d UTC"), (2, 9, r"is not valid before 20\d\d-\d\d-\d\d")],
    ids=["expired", "early"],
)
def test_a_leader_out_of_date(first, last, words, follows: Tls, home: Authority) -> None:
    address = free_address()
    process = careless("leader", address, home.dated("leader", first, last, "follower"))
    try:
        with pytest.raises(TlsError, match=f"the leader at {address}: its certificate {words}"):
            channel("follower", address, follows).connect(20)
    finally:
        output, _ = process.communicate(timeout=20)
    assert re.search(r"PeerLost: .*\(last: turned away .*it refuses this party's certificate", output), output


def test_versions_of_tls(leads: Tls, follows: Tls, recwarn) -> None:
    """1.1 is offered by a client that would take it (a listener that takes it is the other half of this test)."""
    address = free_address()
    listener = stream.Listener(Endpoint("leader", address, True, leads), Ignoring())
    try:
        assert greeted(tls_client(follows, ssl.TLSVersion.TLSv1_1), address) == ""
        assert greeted(tls_client(follows, ssl.TLSVersion.TLSv1_2), address) == "TLSv1.2"
        assert greeted(tls_client(follows, ssl.TLSVersion.TLSv1_3), address) == "TLSv1.3"
    finally:
        listener.close(0.0)
    permissive = tls.server_context(leads)
    loosen(permissive, ssl.TLSVersion.TLSv1_1)
    with socket.create_server(("127.0.0.1", 0)) as port:
        address = f"127.0.0.1:{port.getsockname()[1]}"

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    raw, _ = port.accept()
                    with raw, contextlib.suppress(OSError), permissive.wrap_socket(raw, server_side=True) as line:
                        line.send(b"x")

        threading.Thread(target=serve, daemon=True).start()
        assert greeted(tls_client(follows, ssl.TLSVersion.TLSv1_1), address) == "TLSv1.1"  # this OpenSSL can
        with pytest.raises(TlsError, match="only versions of TLS older than 1.2|only other versions of TLS"):
            channel("follower", address, follows).connect(10)


def loosen(context: ssl.SSLContext, newest: ssl.TLSVersion) -> None:
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1, newest


def tls_client(files: Tls, newest: ssl.TLSVersion) -> ssl.SSLContext:
    context = tls.client_context(files)
    loosen(context, newest)
    return context


def greeted(context: ssl.SSLContext, address: str) -> str:
    """The version of TLS on which a listener said something; '' where it did not."""
    try:
        with (
            socket.create_connection(host_port(address), 5) as raw,
            context.wrap_socket(raw, server_hostname="leader") as line,
        ):
            return str(line.version()) if line.recv(1) else ""
    except OSError:
        return ""


# ---- strangers do not disturb


def test_who_comes_in_the_middle_of_a_conversation_shows_a_certificate_too(
    leads, follows, home, abroad, caplog
) -> None:
    with connected(leads, follows) as (address, one, two):
        there_and_back(one, two)
        hello = Link(Hello("follower", mirrored(TENSORS)), Limits(), 0.0).take(0.0)[0]
        resume = one._talk.link.knock()  # what only the peer could know, and more
        for message in (hello, resume):
            error = bare_dial(address, home.party("other"), message)
            assert error is not None and error.code() is grpc.StatusCode.UNAUTHENTICATED
            error = bare_dial(address, expecting(abroad.party("follower"), peer_certs=home.file), message)
            assert error is not None and error.code() is grpc.StatusCode.UNAVAILABLE
        assert not one.away and not two.away
        there_and_back(one, two, step=1)
        assert "turned away" in caplog.text and "expected 'follower'" in caplog.text


def test_scanners_keep_nobody_out(leads: Tls, follows: Tls) -> None:
    """Connections that come to nothing make the listener look closer; the peer is let in all the same."""
    address, stop = free_address(), threading.Event()

    def scan() -> None:
        while not stop.wait(0.05):
            with contextlib.suppress(OSError), socket.create_connection(host_port(address), 1):
                stop.wait(0.05)

    one, two = channel("leader", address, leads), channel("follower", address, follows)
    results: list[object] = []
    leading = threading.Thread(target=lambda: results.append(both(lambda: one.connect(40))[0]))
    scanners = [threading.Thread(target=scan) for _ in range(3)]
    for thread in (leading, *scanners):
        thread.start()
    try:
        time.sleep(3.0)
        assert isinstance(two.connect(30), Hello)
        leading.join(30)
        assert isinstance(results[0], Hello)
        there_and_back(one, two)
    finally:
        stop.set()
        both(lambda: one.close(1), lambda: two.close(1))


LEADER = """
import sys, time
from efl.transport import Channel, Endpoint, Hello, TensorSpec, Tls
address, *files = sys.argv[1:]
tensors = (TensorSpec("g", "float32", None, "send"), TensorSpec("x", "float32", None, "recv"))
channel = Channel(Endpoint("leader", address, True, Tls(*files)), Hello("leader", tensors))
channel.connect(30)
time.sleep(60)
"""


def test_a_foreign_leader_after_a_lost_line_is_told_and_waited_out(leads, follows, home, abroad, caplog) -> None:
    caplog.set_level(logging.WARNING)
    address = free_address()
    process = subprocess.Popen([sys.executable, "-c", LEADER, address, *dataclasses.astuple(leads)])
    limits = Limits(heartbeat_seconds=0.2, dead_seconds=1.0, peer_timeout=8.0)
    two = channel("follower", address, follows, limits)
    failures: list[EflError] = []
    two.on_failure(failures.append)
    foreign = expecting(abroad.party("leader", peer_name="follower"), peer_certs=home.file)
    try:
        two.connect(30)
    finally:
        process.kill()
        process.wait()
    handler = Ignoring()
    listener = stream.Listener(Endpoint("leader", address, True, foreign), handler)
    try:
        wait_for(lambda: "issued by 'a foreign authority'" in caplog.text, 8)
        assert two.away and two.error is None
        wait_for(lambda: failures != [], 15)
        assert isinstance(two.error, PeerLost) and "peer_timeout=8 s" in str(two.error)
        assert handler.messages == []
    finally:
        listener.close(0.0)
        two.close(1)


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "it did not come to pass"
        time.sleep(0.02)


# ---- files


def test_files_are_read_when_a_connection_is_made(leads: Tls, follows: Tls, home: Authority, tmp_path, caplog) -> None:
    moving = tmp_path / "leader.pem", tmp_path / "leader.key"

    def become(files: Tls) -> None:
        for target, source in zip(moving, (files.my_certs, files.my_key)):
            target.write_bytes(Path(source).read_bytes())

    become(home.party("other"))
    address = free_address()
    files = dataclasses.replace(leads, my_certs=str(moving[0]), my_key=str(moving[1]))
    handler = Ignoring()
    listener = stream.Listener(Endpoint("leader", address, True, files), handler)
    try:
        assert bare_dial(address, follows, b"1") is not None
        moving[0].write_bytes(Path(leads.my_certs).read_bytes())  # the key not yet
        assert bare_dial(address, follows, b"2", "other") is None or handler.messages == [b"2"]
        assert "goes on with the certificates that it had read before: my_key=" in caplog.text
        become(leads)
        bare_dial(address, follows, b"3")
        assert handler.messages == [b"2", b"3"]
    finally:
        listener.close(0.0)


def file_errors(home: Authority, tmp_path: Path) -> dict[str, tuple[dict[str, str], str]]:
    good = home.party("leader", peer_name="follower")
    text, empty = tmp_path / "text.pem", tmp_path / "empty.pem"
    text.write_text("no certificate\n")
    empty.touch()
    encrypted = tmp_path / "encrypted.key"
    subprocess.run(
        ["openssl", "pkcs8", "-topk8", "-in", good.my_key, "-out", str(encrypted), "-passout", "pass:secret"],
        check=True,
    )
    none = str(tmp_path / "none.pem")
    expired = home.dated("leader", -9, -2)
    early = home.dated("early", 2, 9)
    old = home.write("old-authority", odd("authority", None, -9, -2)).my_certs
    return {
        "no certificate": ({"my_certs": none}, f"my_certs={none!r}: there is no such file"),
        "no key": ({"my_key": none}, f"my_key={none!r}: there is no such file"),
        "no authority": ({"peer_certs": none}, f"peer_certs={none!r}: there is no such file"),
        "a folder": ({"my_key": str(tmp_path)}, f"my_key={str(tmp_path)!r}: cannot be read (Is a directory)"),
        "a text": ({"my_certs": str(text)}, f"my_certs={str(text)!r}: holds no certificate in PEM form"),
        "a key for a certificate": ({"my_certs": good.my_key}, "holds no certificate in PEM form"),
        "an empty authority": ({"peer_certs": str(empty)}, f"peer_certs={str(empty)!r}: holds no certificate"),
        "a certificate for a key": ({"my_key": good.my_certs}, "holds no private key in PEM form"),
        "a passphrase": ({"my_key": str(encrypted)}, "the key is encrypted with a passphrase"),
        "another's key": (
            {"my_key": home.party("other").my_key},
            f"other.key' is not the key of the (first) certificate in my_certs={good.my_certs!r}",
        ),
        "expired": ({"my_certs": expired.my_certs, "my_key": expired.my_key}, "own certificate expired on 20"),
        "early": ({"my_certs": early.my_certs, "my_key": early.my_key}, "own certificate is not valid before 20"),
        "an authority that expired": ({"peer_certs": old}, f"peer_certs={old!r}: its certificate expired on 20"),
    }


FILE_ERRORS = [
    "no certificate", "no key", "no authority", "a folder", "a text", "a key for a certificate", "an empty authority",
    "a certificate for a key", "a passphrase", "another's key", "expired", "early", "an authority that expired",
]  # fmt: skip


@pytest.mark.parametrize("case", FILE_ERRORS)
def test_a_file_that_cannot_be_used_is_named(case: str, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    home = Authority(tmp_path / "home")
    changes, words = file_errors(home, tmp_path)[case]
    files = dataclasses.replace(home.party("leader", peer_name="follower"), **changes)
    with pytest.raises(ConfigError, match=re.escape(words)):
        tls.load(files)
    with pytest.raises(ConfigError, match=re.escape(words)):
        channel("leader", free_address(), files).connect(5)
    with pytest.raises(ConfigError, match=re.escape(words)):
        channel("follower", free_address(), files).connect(5)


def test_a_file_that_may_not_be_read_is_named(leads: Tls, monkeypatch) -> None:
    def refused(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refused)
    with pytest.raises(ConfigError, match=r"my_certs=.*: cannot be read \(Permission denied\)"):
        tls.load(leads)


def test_a_key_that_others_may_read_is_told_once(tmp_path: Path, caplog) -> None:
    files = Authority(tmp_path).party("leader")
    tls.load(files)
    assert caplog.text == ""
    Path(files.my_key).chmod(0o640)
    tls.load(files)
    tls.load(files)
    assert caplog.text.count(f"chmod 600 {files.my_key}") == 1
