"""Every error that efl raises on purpose.

All derive from ``EflError``; each message says what was expected, what arrived, from whom, and what to do.
"""

from __future__ import annotations


class EflError(RuntimeError):
    """Base of all errors raised by efl on purpose."""


class ConfigError(EflError, ValueError):
    """A setting, argument or address that efl cannot work with."""


class ModelError(EflError, ValueError):
    """A model definition that cannot be trained: a missing function, a wrong return value, an unknown name."""


class DataError(EflError):
    """Input data that is missing, damaged or not what the columns ask for."""


class SampleMismatch(DataError):
    """The two parties' batches hold different sample ids (or the same in another order)."""


class NonFiniteLoss(EflError, ArithmeticError):
    """The loss of a step is NaN or infinite."""


class CheckpointError(EflError):
    """A checkpoint that is missing, damaged, or does not fit the model or the peer's checkpoints."""


class Interrupted(EflError):
    """The program was interrupted (Ctrl-C) or stopped (SIGTERM)."""


class LinkError(EflError):
    """Base of everything that ends the conversation with a peer."""


class TlsError(LinkError):
    """A certificate that one of the parties does not accept, or one that speaks TLS to one that speaks clear text."""


class HandshakeError(LinkError):
    """The parties disagree on what they are about to run; the message lists every disagreement."""


class ProtocolError(LinkError):
    """The peer sent bytes that the protocol does not allow (malformed, out of bounds, out of order)."""


class PeerLost(LinkError, ConnectionError):
    """The peer cannot be reached, or has not been heard of for longer than the timeout."""


class PeerRestarted(PeerLost):
    """The peer's process is another one than before: what the two had under way is gone, their checkpoints are not."""


class PeerFailed(LinkError):
    """The peer reported that its own program failed, and the run cannot go on."""


class PeerClosed(LinkError):
    """The peer ended the conversation although this party still expected something of it."""


class DeadlineError(LinkError, TimeoutError):
    """A message did not arrive in time although the peer is alive."""
