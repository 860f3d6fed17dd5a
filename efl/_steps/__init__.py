"""What the parties say to each other step by step: counts, ends of data, sample ids, deadlines. No TensorFlow.

``Exchange`` is the whole of it for two parties, ``Solo`` the same interface for a model without a peer.
"""

from __future__ import annotations

from efl._steps.disputes import Disputed
from efl._steps.exchange import Exchange
from efl._steps.scope import Scope, Sink
from efl._steps.solo import Solo

__all__ = ["Disputed", "Exchange", "Scope", "Sink", "Solo"]
