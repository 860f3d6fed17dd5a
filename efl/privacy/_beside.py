"""What the peer sent, or chose, that a release is made of: the release is a replay only where that is the same too.

A step that is taken again has the same sums where a row of a message makes no difference to them. Would it get the same
noise then, a peer that changes the message on purpose would see that it makes none, which no noise hides. So would a
peer that says which rows are read: with it, all features of the batch are looked at, sample ids among them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import tensorflow.compat.v1 as tf

from efl._graph import RECEIVED
from efl._program import ancestors


def batch_collection(scope: str) -> str:
    """Names the collection of all that a batch of a scope consists of, where a peer may have chosen the rows."""
    return f"efl_batch/{scope}"


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
        # Of a model with a peer; see FederalModel._batch_is_read.
        received += tf.get_collection(batch_collection(scope))
        self.noted: tf.Operation | None = None
        if received:
            self.noted = tf.numpy_function(self._note, received, [], name="efl_beside")

    @property
    def before(self) -> list[tf.Operation]:
        """What the release has to wait for."""
        return [] if self.noted is None else [self.noted]

    def _note(self, *arrays: np.ndarray) -> None:
        digest = hashlib.sha256()
        for array in arrays:
            digest.update(f"{array.dtype.str}{array.shape}".encode())
            if array.dtype == object:
                for each in array.ravel():
                    digest.update(len(each).to_bytes(8, "little") + each)
            else:
                digest.update(array.tobytes())
        self.digest = digest.digest()
