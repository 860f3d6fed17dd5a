"""Rounds of two parties over arrays and a channel: layers of which neither party holds the weights.

No TensorFlow, no network: a channel is anything with ``send(name, array)`` and ``recv(name)``. The TensorFlow layers
(``efl.privacy``) run these rounds in a thread of their own. ``docs/architecture/encrypted_layers.md`` tells why the
rounds are as they are.
"""

from __future__ import annotations

from efl.protocol.active import ActiveLayer
from efl.protocol.channel import Channel
from efl.protocol.passive import PassiveLayer
from efl.protocol.widths import Kind, Widths

__all__ = ["ActiveLayer", "Channel", "Kind", "PassiveLayer", "Widths"]
