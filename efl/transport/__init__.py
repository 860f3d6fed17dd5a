"""The transport of efl: a channel of named tensors between two parties. Knows nothing of TensorFlow.

Pure parts: ``frame``, ``codec``, ``handshake``, ``inbound``, ``outbound``,
``ledger``, ``events``, ``link``.
The shell: ``channel``, ``conversation``, ``rendezvous``, ``mailbox``, ``stream``; for TLS ``tls``,
``tls_diagnosis``, ``tls_interview``.
"""

from __future__ import annotations

from efl.transport.channel import Channel
from efl.transport.codec import dtype_names
from efl.transport.handshake import Hello, TensorSpec, disagreements
from efl.transport.limits import Endpoint, Limits, Tls
from efl.transport.stats import Stats

__all__ = ["Channel", "Endpoint", "Hello", "Limits", "Stats", "TensorSpec", "Tls", "disagreements", "dtype_names"]
