"""The thread that keeps time in a conversation: heartbeats, the peer's silence, handshakes that come to nothing."""

from __future__ import annotations

import time

from efl.errors import PeerLost
from efl.transport.conversation import Conversation
from efl.transport.link import State

_HANDSHAKE_SECONDS = 10.0
_UNSENT_FRAMES = 1 << 17  # may wait for the stream; what a window and control messages need is far less


def keep_time(talk: Conversation) -> None:
    """Looks at the clock twice in each heartbeat until the conversation ends. Runs in a thread of its own."""
    while not talk.stopped.wait(max(0.02, talk.limits.heartbeat_seconds / 2)):
        if talk.met and talk.listener is not None and talk.listener.failed_handshakes():
            talk.on_stranger("somebody", "the TLS handshake failed (this side cannot see why; the other can)")
        _look(talk)


def _look(talk: Conversation) -> None:
    now = time.monotonic()
    with talk.lock:
        connection, away = talk.connection, talk.away_since
        if talk.link is None or talk.over or talk.error is not None:
            return
        agreeing = talk.link.state is not State.OPEN and not talk.met
        stalled = agreeing and now - talk.adopted_at > _HANDSHAKE_SECONDS
        if talk.in_callback:
            talk.link.alive(now)
        silent = talk.link.tick(now)
        talk.flush()
        if connection is not None and connection.outbox.waiting > _UNSENT_FRAMES:
            silent = silent or "it does not read what is sent to it"
        label = talk.link.peer_label
    if stalled and connection is not None:
        connection.close()
    if silent and connection is not None:
        talk.lose(connection, silent)
        connection.close()
    if away is not None and now - away > talk.limits.peer_timeout:
        talk.end(
            PeerLost(
                f"{label} did not come back within peer_timeout={talk.limits.peer_timeout:g} s. Is its process "
                "alive, and the line between the parties up?"
            )
        )
