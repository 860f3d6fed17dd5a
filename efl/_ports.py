"""Ports of this machine: whether one is taken, and one that is not."""

from __future__ import annotations

import contextlib
import errno
import random
import socket

# Linux hands ports from 32768 on to outgoing connections, other systems from 49152 on. A port below is still free when
# the program that is to listen there has started.
_LISTENERS = range(20_000, 32_768)


def check_free(address: str) -> None:
    """Whether a program can listen on all addresses that a host's name stands for.

    Args:
      address: ``host:port``.

    Raises:
      OSError: The port is taken at one of them (``errno.EADDRINUSE``).
    """
    host, _, port = address.rpartition(":")
    with contextlib.suppress(socket.gaierror):  # for whoever listens to say
        for family, kind, number, _, place in socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM):
            with socket.socket(family, kind, number) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as gRPC: what lingers does not matter
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                try:
                    probe.bind(place)
                except OSError as error:
                    if error.errno == errno.EADDRINUSE:
                        raise


def free_port() -> int:
    """A port of ``localhost`` on which nobody listens at this moment.

    Raises:
      OSError: None was found.
    """
    for port in random.SystemRandom().sample(_LISTENERS, 100):
        with contextlib.suppress(OSError):
            check_free(f"localhost:{port}")
            return port
    raise OSError(errno.EADDRINUSE, f"no free port among a hundred from {_LISTENERS.start} to {_LISTENERS.stop - 1}")
