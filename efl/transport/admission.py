"""Who may come in: the first message of a connection that does not carry the conversation yet.

A newcomer opens with a hello (it wants to begin) or with a claim (it wants to go on where a connection was lost).
A hello never ends a conversation whose connection is alive; a claim is taken from who knows the names of both sides.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, NamedTuple

from efl.errors import PeerRestarted, ProtocolError
from efl.transport import events, handshake, stream
from efl.transport import frame as wire
from efl.transport.handshake import Hello

if TYPE_CHECKING:
    from efl.transport.conversation import Conversation

logger = logging.getLogger("efl")


class _Verdict(NamedTuple):
    """Why a newcomer is not let in; it is where there are no reasons."""

    reasons: list[str]
    busy: bool = False  # it may try again soon
    unknown: bool = False  # what it wants to go on with is not known here


_WELCOME = _Verdict([])


def admit(talk: Conversation, connection: stream.Connection, message: bytes) -> bool:
    """Reads the first message on a connection that is not the conversation's (yet): whether it is now.

    Who is turned away is told why, and its connection ended.
    """
    try:
        if connection is talk.candidate:
            return _answered(talk, connection, wire.decode(message)[0])
        if not talk.endpoint.listen:
            return False  # the late answer to an attempt that was given up; the peer may take it for the conversation
        with talk.reading_first:
            first = events.read_first(message, talk.limits)
        if isinstance(first, events.Claim):
            verdict = _of_claim(talk, connection, first)
        else:
            verdict = _of_hello(talk, connection, first)
        if not verdict.reasons:
            return True
    except wire.DamagedFrame as error:
        talk.warn_of(f"refused a connection from {connection.peer}: {error}", "damaged")
        verdict = _Verdict([str(error)], busy=connection is not talk.candidate)
    except ProtocolError as error:
        kind = " ".join(str(error).split()[:2])  # of the rest, who comes may say what he likes
        talk.warn_of(f"refused a connection from {connection.peer}: {error}", kind)
        verdict = _Verdict([str(error)])
    connection.outbox.cut([events.refusal(*verdict)])
    return False


def _busy(talk: Conversation) -> _Verdict:
    return _Verdict([f"the {talk.hello.role} is busy with another conversation"], busy=True)


def _of_claim(talk: Conversation, connection: stream.Connection, claim: events.Claim) -> _Verdict:
    with talk.lock:
        old = talk.connection
        if talk.link is None or not talk.met or not talk.link.is_ours(claim):
            return _Verdict([f"the {talk.hello.role} does not know this conversation"], unknown=True)
        if talk.failing or talk.over:
            return _Verdict([f"the {talk.hello.role} has ended this conversation"])
        if talk.link.is_stale(claim):
            return _busy(talk)
        talk.link.lost()  # the peer has given the old connection up, whether or not it seems good from here
        talk.connection = connection
    if old is not None:
        old.given_up = True
        old.close()
    return _WELCOME


def _of_hello(talk: Conversation, connection: stream.Connection, hello: Hello) -> _Verdict:
    with talk.lock:
        if talk.link is None and not talk.over and not talk.closing and talk.error is None:
            talk.adopt(connection, f"the {hello.role} ({connection.peer})")
            return _WELCOME
        if not talk.met or talk.away_since is None or talk.error is not None or talk.over:
            return _busy(talk)
        known = talk.link is not None and talk.link.peer is not None and talk.link.peer.instance == hello.instance
        if known:
            return _busy(talk)  # a late copy of the hello that this conversation began with: each attempt has its own
    reasons = handshake.disagreements(talk.hello, hello) or talk.judge(hello)
    if reasons:
        why = "; ".join(reasons)
        talk.warn_of(f"somebody came in place of the lost {talk.partner} and was refused, since both disagree: {why}")
        return _Verdict(reasons)
    talk.end(PeerRestarted(f"the {hello.role} ({connection.peer}) was started again"))
    return _busy(talk)  # its next try finds the next channel of this party


def _answered(talk: Conversation, connection: stream.Connection, frame: wire.Frame) -> bool:
    """The first answer to a claim of ours."""
    if frame.kind is wire.Kind.RESUME:
        claim = events.read_claim(frame.payload)
        with talk.lock:
            if talk.link is None or not talk.link.is_ours(claim):
                raise ProtocolError("it answers for another conversation")
            if talk.candidate is not connection or talk.over or talk.error is not None:
                return False
            talk.link.lost()
            talk.connection, talk.candidate = connection, None
        return True
    refused = events.read_refusal(frame.payload) if frame.kind is wire.Kind.REFUSE else events.Refused(())
    if refused.unknown:
        talk.end(PeerRestarted(f"{talk.label} was started again"))
    connection.close()
    return False
