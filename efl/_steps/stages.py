"""Do both parties run the same stages in the same order?

The handshake compares procedures as far as they are data; a procedure of the user's own is a function. So each party
names the stage that it begins, and compares it with what the peer named in that place.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

from efl.errors import EflError, HandshakeError, ProtocolError

_MAX_AHEAD = 1000  # stages that a peer may name ahead of this party
_MOST = 1000  # characters of a stage's name


class Stages:
    """The stages of common steps that both parties have named. Thread-safe.

    Args:
      role: This party's role.
      peer_role: The peer's.
      tell: Sends a note to the peer.
      fail: Ends the run.
    """

    def __init__(
        self, role: str, peer_role: str, tell: Callable[[dict[str, Any]], None], fail: Callable[[EflError], None]
    ) -> None:
        self._role, self._peer_role, self._tell, self._fail = role, peer_role, tell, fail
        self._lock = threading.Lock()
        self.clear()

    def clear(self) -> None:
        """Begins a conversation."""
        self._next = self._peers_next = 0
        self._own: dict[int, str] = {}
        self._peers: dict[int, str] = {}

    def enter(self, what: str) -> None:
        """This party begins a stage."""
        number, self._next = self._next, self._next + 1
        self._tell({"number": number, "what": what})
        self._compare(number, self._own, what)

    def on_note(self, body: Mapping[str, Any]) -> None:
        """The peer begins one."""
        number, what = body.get("number"), body.get("what")
        if number != self._peers_next or isinstance(number, bool) or not isinstance(what, str) or len(what) > _MOST:
            self._fail(ProtocolError(f"{self._peer_role} sent a malformed note of its stage: {body!r:.200}"))
            return
        self._peers_next += 1
        if len(self._peers) > _MAX_AHEAD:
            self._fail(
                ProtocolError(f"{self._peer_role} began over {_MAX_AHEAD} stages that {self._role} has not come to")
            )
            return
        self._compare(number, self._peers, what)

    def _compare(self, number: int, named: dict[int, str], what: str) -> None:
        with self._lock:
            named[number] = what
            mine, peers = self._own.get(number), self._peers.get(number)
            if mine is not None and peers is not None:
                del self._own[number], self._peers[number]  # what waits is what one party has named and the other not
        if mine is not None and peers is not None and mine != peers:
            self._fail(
                HandshakeError(
                    f"stage {number} is '{mine}' at {self._role} and '{peers}' at {self._peer_role}: both parties must "
                    "run the same stages in the same order, with the same steps and times"
                )
            )
