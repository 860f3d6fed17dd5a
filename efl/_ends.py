"""Layers that two parties compute together: what the step of a model has to do for each.

A layer is made with a ``Communicator``; the model that owns it asks here, while it builds its steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import tensorflow.compat.v1 as tf

from efl._gradients import Sent


@dataclass
class End:
    """This party's end of one layer in one task and mode.

    Attributes:
      name: Of the layer.
      gate: What the step waits for, and what has read the layer's variables.
      sent: The tensor that went into the layer, and the gradient that comes back for it; None where none does.
      received: What came out of the layer, whose gradient goes back; None where none does.
      give_back: Takes the gradient of ``received``, and adds to ``gate``.
      update: Makes the ops that move the layer's variables; called where all of ``gate`` has run.
    """

    name: str
    gate: list[tf.Tensor] = field(default_factory=list)
    sent: Sent | None = None
    received: tf.Tensor | None = None
    give_back: Callable[[tf.Tensor], None] = lambda gradient: None
    update: Callable[[], Sequence[tf.Operation]] = lambda: ()
