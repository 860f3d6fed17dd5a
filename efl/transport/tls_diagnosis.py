"""Why a line with certificates does not come about, as the side that dials can find out.

gRPC says UNAVAILABLE or "Socket closed" for a certificate that expired, one of another authority, one that the peer
does not accept, and for clear text alike. So after a dial that failed the same is tried once more with Python's ssl,
which says why. Nothing is said on such a connection.
"""

from __future__ import annotations

import enum
import socket
import ssl
import threading
import time
from typing import NamedTuple

from cryptography import x509

from efl.errors import ConfigError
from efl.transport import tls
from efl.transport.limits import Endpoint, Tls
from efl.transport.stream import say_that_tls_is_wanted

_TRY_SECONDS = 2.0
_PAUSE_SECONDS = 0.2
# A listener finds out what is wrong from tries that follow the first, see tls_interview.
_FOR_THE_LISTENER_SECONDS = 2.0
_FOR_ITS_ALERT_SECONDS = 4.0
_EXPIRED, _NOT_YET, _WRONG_NAME, _WRONG_IP = 10, 9, 62, 64  # codes of OpenSSL's verification
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"  # how gRPC begins in clear text


class _Kind(enum.Enum):
    NOTHING = enum.auto()  # nobody there, or nothing that would be certain
    GOOD = enum.auto()
    CLOSED = enum.auto()  # right after this party's certificate was seen
    REFUSED = enum.auto()  # by the peer, which said so
    VERDICT = enum.auto()  # ours
    CLEAR_TEXT = enum.auto()


class _Seen(NamedTuple):
    kind: _Kind
    why: str = ""


_NOTHING = _Seen(_Kind.NOTHING)


def diagnose(endpoint: Endpoint, partner: str, stop: threading.Event) -> str:
    """Finds out whether certificates, or clear text against TLS, are why a dial failed.

    Args:
      endpoint: What was dialled, with which certificates.
      partner: The role of who listens there.
      stop: Ends the search.

    Returns:
      The cause, a sentence; '' where it is none of these, so that the next dial may succeed. A cause is told at once
      or within 4 seconds.
    """
    try:
        seen = _find_out(endpoint, stop)
    except (ConfigError, ssl.SSLError) as error:  # own files, in the middle of their renewal
        return str(error)
    if not seen.why:
        return ""
    return f"the {endpoint.role} cannot talk to the {partner} at {endpoint.address}: {seen.why}"


def _find_out(endpoint: Endpoint, stop: threading.Event) -> _Seen:
    if endpoint.tls is None:
        return _find_out_in_clear(endpoint, stop)
    begun, found, closed = time.monotonic(), _NOTHING, 0
    while not stop.is_set():
        seen = _knock(endpoint, endpoint.tls)
        passed = time.monotonic() - begun
        if seen.kind is _Kind.CLEAR_TEXT:
            say_that_tls_is_wanted(endpoint, _TRY_SECONDS)
            return seen
        if seen.kind is _Kind.REFUSED:
            return seen
        if seen.kind is _Kind.VERDICT:
            found = seen
        closed = closed + 1 if seen.kind is _Kind.CLOSED else closed
        if found is _NOTHING and (seen.kind is _Kind.GOOD or not closed):
            return _NOTHING
        if passed > (_FOR_ITS_ALERT_SECONDS if found is _NOTHING else _FOR_THE_LISTENER_SECONDS):
            break
        stop.wait(_PAUSE_SECONDS)
    if found is _NOTHING and closed > 2:
        return _Seen(_Kind.CLOSED, _seems_refused(endpoint.tls))
    return found


def _find_out_in_clear(endpoint: Endpoint, stop: threading.Event) -> _Seen:
    if not _speaks_tls(endpoint):
        return _NOTHING
    limit = time.monotonic() + _FOR_THE_LISTENER_SECONDS
    while time.monotonic() < limit and not stop.wait(_PAUSE_SECONDS):
        try:
            with socket.create_connection(endpoint.host_port, _TRY_SECONDS) as line:
                line.sendall(_PREFACE)
                line.recv(1)
        except OSError:
            continue
    return _Seen(
        _Kind.VERDICT, "it speaks TLS, and this party has no certificates and speaks clear text (my_certs, my_key, "
        "peer_certs)"
    )  # fmt: skip


def _speaks_tls(endpoint: Endpoint) -> bool:
    try:
        with (
            socket.create_connection(endpoint.host_port, _TRY_SECONDS) as raw,
            tls.blind_context(None).wrap_socket(raw, server_hostname=None) as line,
        ):
            return line.version() is not None  # of a connection that was reset by then ssl does not say that it is
    except ssl.SSLError as error:
        return "ALERT" in (error.reason or "")
    except OSError:
        return False


def _knock(endpoint: Endpoint, files: Tls) -> _Seen:
    context = tls.client_context(files)
    try:
        raw = socket.create_connection(endpoint.host_port, _TRY_SECONDS)
    except OSError:
        return _NOTHING
    with raw:
        try:
            with context.wrap_socket(raw, server_hostname=files.peer_name) as line:
                # A listener that does not accept this party's certificate ends the connection, or says why, now.
                return _Seen(_Kind.GOOD) if line.recv(1) else _Seen(_Kind.CLOSED)
        except ssl.SSLCertVerificationError as error:
            return _Seen(_Kind.VERDICT, _name(endpoint, files, error))
        except ssl.SSLEOFError:
            return _NOTHING  # a tunnel without an end, a process that died
        except ssl.SSLError as error:
            return _of_reason(error.reason or "", files)
        except ConnectionResetError:
            return _Seen(_Kind.CLOSED)
        except OSError:
            return _NOTHING


def _of_reason(reason: str, files: Tls) -> _Seen:
    if "ALERT" in reason:
        said = reason.split("ALERT_")[-1].replace("_", " ").lower()
        if "VERSION" in reason:
            return _Seen(_Kind.VERDICT, "it takes only other versions of TLS; efl speaks 1.2 and 1.3")
        return _Seen(_Kind.REFUSED, f"it refuses this party's certificate ({said}); {_own(files)}")
    if reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG"):
        return _Seen(
            _Kind.CLEAR_TEXT,
            "it speaks clear text (or something that is not TLS at all), and this party insists on TLS, since it has "
            "certificates",
        )
    if reason in ("UNSUPPORTED_PROTOCOL", "NO_PROTOCOLS_AVAILABLE"):
        return _Seen(_Kind.VERDICT, "it speaks only versions of TLS older than 1.2")
    return _NOTHING


def _name(endpoint: Endpoint, files: Tls, error: ssl.SSLCertVerificationError) -> str:
    """Why its certificate is not accepted, in words that take it by its contents."""
    fallback = f"its certificate is not accepted: {error.verify_message}"
    try:
        with (
            socket.create_connection(endpoint.host_port, _TRY_SECONDS) as raw,
            tls.blind_context(files).wrap_socket(raw, server_hostname=files.peer_name) as line,
        ):
            der = line.getpeercert(binary_form=True)
        certificate = x509.load_der_x509_certificate(der or b"")
    except (OSError, ValueError):
        return fallback
    if error.verify_code in (_EXPIRED, _NOT_YET):
        wrong = tls.out_of_date(certificate)
        return f"its certificate {wrong}" if wrong else f"{fallback} (an authority between)"
    if error.verify_code in (_WRONG_NAME, _WRONG_IP):
        return tls.wrong_name(certificate, files.peer_name) or fallback
    return (
        f"its certificate was issued by {tls.issuer_of(certificate)}, which peer_certs={files.peer_certs!r} does not "
        f"lead to ({error.verify_message})"
    )


def _own(files: Tls) -> str:
    try:
        leaf = tls.load(files).leaf
    except ConfigError as error:
        return str(error)
    return (
        f"my_certs={files.my_certs!r} was issued by {tls.issuer_of(leaf)} for the names {tls.names_in(leaf)}, expires "
        f"on {leaf.not_valid_after_utc:%Y-%m-%d}; does the peer's peer_certs hold its authority?"
    )


def _seems_refused(files: Tls) -> str:
    return f"it ends the connection when it has seen this party's certificate, and does not say why; {_own(files)}"
