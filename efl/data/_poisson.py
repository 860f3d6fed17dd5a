"""Batches that are Poisson samples: every record is drawn with the same probability, by itself, anew for each step.

That is what amplifies differential privacy (Abadi et al., 2016, arXiv:1607.00133, section 3.1), against whoever does
not see the batches: most steps tell nothing of a record, and which ones do is hidden. So the draws follow from a
secret, together with a number that may be saved.

Records are drawn by the gaps between them, which are geometric, so that a step costs what its batch is large and not
what the data are.
"""

from __future__ import annotations

import hashlib
import math
import mmap
from collections.abc import Sequence

import numpy as np
import tensorflow.compat.v1 as tf
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from efl._quiet import no_deprecation_warnings
from efl.data._files import OPTIONS, Block
from efl.errors import ConfigError, DataError

SECRET_BYTES = 32


def poisson_sample(key: bytes, count: int, probability: float) -> np.ndarray:
    """Which of ``count`` records are drawn, each with a probability, independently.

    Args:
      key: 32 bytes, used for nothing else.
      count: How many records there are.
      probability: Above 0, at most 1.

    Returns:
      int64, ascending; the same for the same arguments. Probabilities are right to some 2**-50.
    """
    if probability >= 1:
        return np.arange(count, dtype=np.int64)
    stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
    expected = count * probability
    at_once = int(expected + 6 * math.sqrt(expected)) + 16
    parts: list[np.ndarray] = []
    last = -1
    while last < count:
        words = np.frombuffer(stream.update(bytes(8 * at_once)), np.uint64)
        uniform = (words >> np.uint64(11)).astype(np.float64)
        uniform += 0.5
        uniform *= 2.0**-53
        # Failures before a success: at least k with probability (1 - p) ** k.
        gaps = np.floor(np.log(uniform) / math.log1p(-probability))
        places = last + np.cumsum(np.minimum(gaps, count).astype(np.int64) + 1)
        parts.append(places[places < count])
        last = int(places[-1])
    return np.concatenate(parts)


class Records:
    """The records of some blocks, to be read in any order.

    Every record is read once when this is made, and its checksum compared. Blocks that are not compressed are mapped
    into memory; the records of others are held in it.

    Args:
      blocks: The files.
      owner: Name and folder of their reader, for messages.

    Raises:
      DataError: A file is damaged or gone.
    """

    def __init__(self, blocks: Sequence[Block], owner: str) -> None:
        self._held: list[tuple[mmap.mmap, np.ndarray] | list[bytes]] = [_read(block, owner) for block in blocks]
        sizes = [len(held[1]) - 1 if isinstance(held, tuple) else len(held) for held in self._held]
        self.sizes = np.array(sizes, np.int64)  # of each block
        self._first = np.concatenate([[0], np.cumsum(self.sizes)])

    def __len__(self) -> int:
        return int(self._first[-1])

    def place(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Block and row of records that are counted through all blocks: two int64 arrays."""
        block = np.searchsorted(self._first, numbers, side="right") - 1
        return block, numbers - self._first[block]

    def read(self, block: np.ndarray, row: np.ndarray) -> np.ndarray:
        """Serialised records: an array of bytes objects."""
        found = np.empty(len(block), object)
        for number, (which, place) in enumerate(zip(block.tolist(), row.tolist())):
            held = self._held[which]
            if isinstance(held, tuple):
                mapped, ends = held
                found[number] = mapped[ends[place] + 12 : ends[place + 1] - 4]  # between length and checksums
            else:
                found[number] = held[place]
        return found


def _read(block: Block, owner: str) -> tuple[mmap.mmap, np.ndarray] | list[bytes]:
    kept: list[bytes] = []
    ends = [0]
    try:
        with no_deprecation_warnings():
            records = tf.io.tf_record_iterator(block.path, tf.io.TFRecordOptions(OPTIONS[block.compression]))
        for record in records:
            if block.compression:
                kept.append(record)
            else:
                ends.append(ends[-1] + len(record) + 16)
        if block.compression or block.empty:
            return kept
        with open(block.path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (tf.errors.OpError, OSError) as error:
        number = len(kept) or len(ends) - 1
        why = "it is damaged or cut off" if isinstance(error, tf.errors.DataLossError) else str(error)
        raise DataError(
            f"{owner}: cannot read record {number} of {block.path!r}: {why}. Write the file again, or move it away"
        ) from None
    if len(mapped) != ends[-1]:
        raise DataError(
            f"{owner}: cannot read {block.path!r} to its end: it is cut off, though its last record is whole. Write "
            "the file again, or move it away"
        )
    return mapped, np.array(ends, np.int64)


class PoissonSampler:
    """Draws the batches of one reader. Its state outside of a step is the number of the step.

    Args:
      batch_size: Records that a batch holds on average.
      num_epochs: How often a record is drawn on average in all steps.

    Attributes:
      records: What it draws from; None before ``start``.
    """

    def __init__(self, batch_size: int, num_epochs: int) -> None:
        self._batch_size, self._num_epochs = batch_size, num_epochs
        self.records: Records | None = None
        self._blocks: list[Block] = []
        self._key = b""
        self._steps = 0
        self._probability = 0.0

    def load(self, blocks: Sequence[Block], owner: str) -> Records:
        """Reads the blocks, unless they are the ones that were read last.

        Raises:
          ConfigError: They hold fewer records than a batch does.
          DataError: A file is damaged or gone.
        """
        if self.records is None or self._blocks != list(blocks):
            self.records, self._blocks = Records(blocks, owner), list(blocks)
            if len(self.records) < self._batch_size:
                raise ConfigError(
                    f"{owner}: batch_size={self._batch_size} is more than the {len(self.records)} records that there "
                    "are to be sampled"
                )
            self._probability = self._batch_size / len(self.records)
            self._steps = math.ceil(self._num_epochs / self._probability)
        return self.records

    def start(self, secret: bytes, number: int) -> None:
        """Begins a pass.

        Args:
          secret: 32 bytes.
          number: Never used before with this secret, but to go on with the pass that it began.
        """
        self._key = hashlib.blake2b(
            number.to_bytes(8, "little"), digest_size=32, key=secret, person=b"efl sample pass"
        ).digest()

    def draw(self, step: np.int64) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.bool_]:
        """The batch of a step, from 0: records, the block and row of each, and whether there is such a step."""
        assert self.records is not None
        drawn, attempt, more = np.zeros(0, np.int64), 0, int(step) < self._steps
        # No loss has a mean over no rows. What it means for privacy that empty samples are drawn again is accounted.
        while more and not len(drawn):
            drawn = poisson_sample(self._step_key(int(step), attempt), len(self.records), self._probability)
            attempt += 1
        block, row = self.records.place(drawn)
        return self.records.read(block, row), block, row, np.bool_(more)

    def _step_key(self, step: int, attempt: int) -> bytes:
        # With another probability the draws are others: privacy counts on it that samples are the same or independent.
        sizes = self._batch_size, 0 if self.records is None else len(self.records)
        place = b"".join(number.to_bytes(8, "little") for number in (step, attempt, *sizes))
        return hashlib.blake2b(place, digest_size=32, key=self._key, person=b"efl sample step").digest()
