"""Why a line with certificates does not come about, as the side that listens can find out.

gRPC tells a listener nothing of a TLS handshake that failed, only that a connection was made. So a listener that still
waits for its peer, and sees connections of which no call comes, listens in gRPC's place for two seconds with Python's
ssl. That says what is wrong, to this side as an error and to the other as an alert. Nothing is read or answered after a
handshake. See ``tls_diagnosis`` for who dials.
"""

from __future__ import annotations

import contextlib
import logging
import selectors
import socket
import ssl
import threading
import time

from efl.errors import ConfigError
from efl.transport import tls
from efl.transport.limits import Endpoint, Tls

_log = logging.getLogger("efl")
_SECONDS = 2.0
_PATIENCE_SECONDS = 1.0  # with one connection
_FIRST_PAUSE, _LAST_PAUSE = 0.5, 60.0
_PAUSE_AFTER_AN_ANSWER = 2.0
_HANDSHAKE = 0x16  # the first byte of every TLS connection
_CAUSES = {
    10: "its certificate has expired",
    9: "its certificate is not valid yet",
    18: "its certificate is self-signed and not in peer_certs",
    19: "its certificate was issued by an authority that is not in peer_certs",
    20: "its certificate was issued by an authority that is not in peer_certs",
    21: "its certificate was issued by an authority that is not in peer_certs",
}


class Interviews:
    """Decides when to look closer, and does it.

    Those who come and say nothing (a scanner, a load balancer's probe) make it rarer, up to once a minute: while it
    lasts, the peer itself would not be let in.
    """

    def __init__(self, endpoint: Endpoint, files: Tls) -> None:
        self._endpoint, self._files = endpoint, files
        self._pause = _FIRST_PAUSE
        self._next = time.monotonic()

    @property
    def patience(self) -> float:
        """After how many seconds a handshake counts as failed: longer, where looking closer has found nothing wrong."""
        return min(self._pause, 10.0)

    @property
    def due(self) -> bool:
        """Whether the last one is long enough ago."""
        return time.monotonic() >= self._next

    def hold(self, stop: threading.Event) -> tuple[str, str]:
        """Listens on the endpoint's address, which must be free, for two seconds or until a cause is found.

        Args:
          stop: Ends it.

        Returns:
          Who came, and why it cannot be let in; two '' where nothing was found out.
        """
        who, why = "", ""
        try:
            who, why = self._listen(tls.server_context(self._files), stop)
        except (ConfigError, OSError) as error:  # the port was taken, or a file is in the middle of its renewal
            _log.debug("%s: %s", self._endpoint.role, error)
        if why:
            self._pause, wait = _FIRST_PAUSE, _PAUSE_AFTER_AN_ANSWER
        else:
            self._pause = wait = min(2 * self._pause, _LAST_PAUSE)
        self._next = time.monotonic() + wait
        return who, why

    def _listen(self, context: ssl.SSLContext, stop: threading.Event) -> tuple[str, str]:
        limit = time.monotonic() + _SECONDS
        with contextlib.ExitStack() as stack, selectors.DefaultSelector() as selector:
            for port in _open(self._endpoint):
                selector.register(stack.enter_context(port), selectors.EVENT_READ)
            while time.monotonic() < limit and not stop.is_set():
                for key, _ in selector.select(0.1):
                    assert isinstance(key.fileobj, socket.socket)
                    raw, address = key.fileobj.accept()
                    with raw:
                        why = _examine(raw, context)
                    if why is None:
                        return "", ""
                    if why:
                        return f"{address[0]}:{address[1]}", why
        return "", ""


def _open(endpoint: Endpoint) -> list[socket.socket]:
    """A listening socket for each address that the host has here."""
    host, number = endpoint.host_port
    ports = []
    for family, kind, protocol, _, address in socket.getaddrinfo(
        host, number, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    ):
        port = socket.socket(family, kind, protocol)
        try:
            port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6 and host != "::":
                port.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            port.bind(address)
            port.listen(8)
        except OSError:
            port.close()
        else:
            ports.append(port)
    if not ports:
        raise OSError(f"cannot listen on {endpoint.address}")
    return ports


def _examine(raw: socket.socket, context: ssl.SSLContext) -> str | None:
    """What is wrong with who came: '' where it does not show, None where nothing is."""
    raw.settimeout(_PATIENCE_SECONDS)
    try:
        first = raw.recv(1, socket.MSG_PEEK)
        if not first:
            return ""
        if first[0] != _HANDSHAKE:
            return "it speaks clear text, and this party insists on TLS, since it has certificates"
        with context.wrap_socket(raw, server_side=True) as line:
            line.send(b"\0")  # to tell a probe, which waits for a first byte, that it is well
            return None
    except ssl.SSLCertVerificationError as error:
        return _CAUSES.get(error.verify_code, f"its certificate is not accepted: {error.verify_message}")
    except ssl.SSLError as error:
        return _of_reason(error.reason or "")
    except OSError:
        return ""


def _of_reason(reason: str) -> str:
    if reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE":
        return "it shows no certificate"
    if reason in ("UNSUPPORTED_PROTOCOL", "VERSION_TOO_LOW", "NO_PROTOCOLS_AVAILABLE"):
        return "it speaks only versions of TLS older than 1.2"
    if "ALERT" in reason:
        said = reason.split("ALERT_")[-1].replace("_", " ").lower()
        return f"it refuses this party's certificate ({said}); its own log says why"
    return ""
