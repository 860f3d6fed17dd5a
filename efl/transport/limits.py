"""What one channel is willing to hold, and where it meets its peer."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields

from efl.errors import ConfigError

MIB = 1 << 20
#: No gRPC message of ours is larger: a frame's payload (16 MiB at most), its header, and room to spare.
MAX_WIRE_BYTES = 20 * MIB
#: Largest payload of one frame, whatever ``chunk_bytes`` says.
MAX_PAYLOAD_BYTES = 16 * MIB
#: Frames that are not acknowledged yet are kept for a replay; a sender pauses when they exceed this.
MAX_UNACKNOWLEDGED_BYTES = 32 * MIB


@dataclass(frozen=True)
class Limits:
    """Bounds of a channel. Each side states its own; a sender keeps to the smaller of both.

    Attributes:
      max_message_bytes: Largest tensor, in bytes.
      max_name_bytes: Longest tensor name or control topic, in bytes of UTF-8.
      max_tensors: Most tensors that one hello may list.
      window_steps: How many messages per tensor a sender may be ahead of the receiver (together for all
      tensors).
      max_outstanding_bytes: Bytes sent that the receiver has not yet consumed. One message always passes.
      max_unread_controls: Control messages that wait to be read, all topics together.
      max_control_bytes: Largest control message, in bytes of JSON. 8 times that may wait to be read.
      chunk_bytes: Tensors larger than this travel in pieces of this size.
      heartbeat_seconds: A side that has sent nothing for so long sends a ping.
      dead_seconds: A connection on which nothing has come for so long is given up, and looked for anew.
      peer_timeout: Seconds for which a lost peer is waited for.
    """

    max_message_bytes: int = 2 << 30
    max_name_bytes: int = 256
    max_tensors: int = 4096
    window_steps: int = 8
    max_outstanding_bytes: int = 256 * MIB
    max_unread_controls: int = 1024
    max_control_bytes: int = MIB
    chunk_bytes: int = MIB
    heartbeat_seconds: float = 1.0
    dead_seconds: float = 4.0
    peer_timeout: float = 600.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
                raise ConfigError(f"Limits.{field.name}={value!r}: expected a number above 0")
            if not isinstance(field.default, float) and not isinstance(value, int):
                raise ConfigError(f"Limits.{field.name}={value!r}: expected a whole number")
        for name in ("chunk_bytes", "max_control_bytes"):
            if getattr(self, name) > MAX_PAYLOAD_BYTES:
                raise ConfigError(f"Limits.{name}={getattr(self, name)}: expected at most {MAX_PAYLOAD_BYTES} (16 MiB)")
        if self.dead_seconds < 2 * self.heartbeat_seconds:
            raise ConfigError(
                f"Limits.dead_seconds={self.dead_seconds}: expected at least twice "
                f"heartbeat_seconds={self.heartbeat_seconds}, or a living peer would be taken for dead"
            )

    @property
    def keep_bytes(self) -> int:
        """How many bytes of frames may wait for an acknowledgement before a sender pauses."""
        return min(self.max_outstanding_bytes, MAX_UNACKNOWLEDGED_BYTES)


DEFAULT_LIMITS = Limits()

_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.%]+\]|[A-Za-z0-9_.\-]+):([0-9]{1,5})")


@dataclass(frozen=True)
class Tls:
    """Files (PEM) with which two parties prove to each other who they are. Read anew for every connection.

    Attributes:
      my_certs: This party's certificate, and what leads from it to an authority that the peer trusts.
      my_key: The private key of the certificate.
      peer_certs: Authorities, or single certificates, by which the peer is recognised.
      peer_name: DNS name (or IP address) that the peer's certificate must carry.
    """

    my_certs: str
    my_key: str
    peer_certs: str
    peer_name: str


@dataclass(frozen=True)
class Endpoint:
    """Where two parties meet, as one of them sees it.

    Attributes:
      role: This party's role; it must be the one in its hello.
      address: ``"host:port"``; the address to listen on, or the peer's address to dial. IPv6 hosts in
      brackets.
      listen: True for the side that listens (leader), False for the side that dials (follower).
      tls: Certificates of both; None for clear text.

    Raises:
      ConfigError: The address is not ``host:port`` with a port of 1 to 65535.
    """

    role: str
    address: str
    listen: bool
    tls: Tls | None = None

    def __post_init__(self) -> None:
        match = _ADDRESS.fullmatch(self.address) if isinstance(self.address, str) else None
        if match is None or not 1 <= int(match.group(2)) <= 65535:
            raise ConfigError(
                f"address {self.address!r} of the {self.role}: expected 'host:port' with a port of 1 to 65535, "
                "for example 'localhost:50051' or '[::1]:50051'"
            )

    @property
    def host_port(self) -> tuple[str, int]:
        """Host, without brackets, and port."""
        host, _, port = self.address.rpartition(":")
        return host.strip("[]"), int(port)
