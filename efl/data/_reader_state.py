"""Where a reader stands: which record comes next, in which order of the data.

The position is kept in a graph variable that is assigned in the very step that consumes a batch, so that it is saved
and restored with the weights; ``ReaderState`` is its value outside the graph.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from efl.errors import DataError

LENGTH = 5  # elements of the graph variable
_MAX = 2**63 - 1


@dataclass(frozen=True)
class ReaderState:
    """The next record to read.

    Attributes:
      seed: Seed of the shuffled order; without meaning where nothing is shuffled.
      epoch: Passes over the data that are done.
      position: How many blocks of this pass are done.
      row: How many rows of the current block are done (in the order in which they are read).
      blocks: Fingerprint of the list of blocks that the position counts in; 0 for a reader that never started.
    """

    seed: int = 0
    epoch: int = 0
    position: int = 0
    row: int = 0
    blocks: int = 0

    def __post_init__(self) -> None:
        for name in ("seed", "epoch", "position", "row", "blocks"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _MAX:
                raise DataError(f"reader state: {name}={value!r}; expected an integer from 0 to 2**63 - 1")

    def vector(self) -> np.ndarray:
        """Returns the value of the graph variable: int64 ``[5]``."""
        return np.array([self.seed, self.epoch, self.position, self.row, self.blocks], np.int64)

    @classmethod
    def from_vector(cls, vector: np.ndarray) -> ReaderState:
        """Reads the value of the graph variable."""
        return cls(*(int(value) for value in vector))

    def to_json(self) -> str:
        """Serialises the state, for ``efl.data.DataIO.restore_from_reader_state_op``."""
        return json.dumps(self.__dict__)

    @classmethod
    def from_json(cls, text: str | bytes) -> ReaderState:
        """Reads what ``to_json`` wrote.

        Raises:
          DataError: ``text`` is something else.
        """
        expected = "expected the string that reader_state(sess) returned"
        try:
            fields = json.loads(text)
        except (TypeError, ValueError) as error:
            raise DataError(f"reader_state={text!r} cannot be read ({error}); {expected}") from error
        if not isinstance(fields, dict) or set(fields) != set(cls().__dict__):
            raise DataError(f"reader_state={text!r} is not a reader's state; {expected}")
        return cls(**fields)


def fingerprint(names: Sequence[str]) -> int:
    """Returns a number, never 0, that tells one list of blocks from another."""
    digest = hashlib.blake2b("\0".join(names).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1 or 1
