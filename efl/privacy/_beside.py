"""What the peer sent, or chose, that a release is made of: the release is a replay only where that is the same too.

A step that is taken again has the same sums where a row of a message makes no difference to them. Would it get the
same noise then, a peer that changes the message on purpose would see that it makes none, which no noise hides. So would
whoever sees the weights, where the step is about other rows: a peer says which are read, or every process mixes the
data anew. So all features of the batch are looked at, sample ids among them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import tensorflow.compat.v1 as tf
import xxhash

from efl._graph import RECEIVED, batch_collection
from efl._program import ancestors

_NOTES = "efl_beside"


def notes() -> list[tf.Operation]:
    """The ops of this graph that only look whether a step is a replay: what they are handed leaves by none of them."""
    return list(tf.get_collection(_NOTES))


class Beside:
    """The messages behind a release, and the batch that it is about.

    Args:
      released: What is noised.
      scope: Task and mode of the step, as they travel.

    Attributes:
      noted: Reads them in each step; the release has to wait for it. None where there are none.
      digest: Of those of the current step.
    """

    def __init__(self, released: Sequence[tf.Tensor], scope: str) -> None:
        self.digest = b""
        behind = set(ancestors(*(tensor.op for tensor in released)))
        received = [tensor for tensor in tf.get_collection(RECEIVED) if tensor.op in behind]
        self._received = len(received)
        looked_at = [*received, *tf.get_collection(batch_collection(scope))]
        self.noted: tf.Operation | None = None
        if looked_at:
            self.noted = tf.numpy_function(self._note, looked_at, [], name="efl_beside")
            tf.add_to_collection(_NOTES, self.noted)

    @property
    def before(self) -> list[tf.Operation]:
        """What the release has to wait for."""
        return [] if self.noted is None else [self.noted]

    def _note(self, *arrays: np.ndarray) -> None:
        # What a peer has made may be made to collide; own features are many, and nobody's choice.
        messages, features = hashlib.sha256(), xxhash.xxh3_128()
        for place, array in enumerate(arrays):
            digest = messages if place < self._received else features
            digest.update(f"{array.dtype.str}{array.shape}".encode())
            if array.dtype == object:
                for each in array.ravel():
                    digest.update(len(each).to_bytes(8, "little") + each)
            elif array.size:
                digest.update(np.ascontiguousarray(array).data.cast("B"))
        self.digest = messages.digest() + features.digest()
