"""A dataset of records that knows, for each record, its block and its number in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow.compat.v1 as tf

from efl.errors import ConfigError

_COMPRESSIONS = ("", "GZIP", "ZLIB")


class FederalDataset(tf.data.Dataset):
    """Records of TFRecord files, block by block.

    An element is ``(record, block_id, sample_index)``: a scalar string, a scalar string, and a scalar int64, the number
    of the record in its block. For readers written by hand; ``FederalDataIO`` needs none.

        dataset = efl.data.FederalDataset(["a.tfrecord", "b.tfrecord"], block_ids=["a", "b"], sample_index=17)
        record, block_id, index = tf.data.make_one_shot_iterator(dataset).get_next()  # record 17 of block "a" first

    Args:
      filenames: Paths: a list, one path, or a string tensor of rank 0 or 1.
      block_ids: Names of the blocks, as many as files; the paths by default.
      sample_index: Number of the record of the first file to begin at; the other files are read from their start.
      compression_type: ``""``, ``"GZIP"`` or ``"ZLIB"``, for all files.
      buffer_size: Bytes of the buffer for reading.

    Raises:
      ConfigError: An argument out of range, or lists of different length.
    """

    def __init__(
        self,
        filenames: str | Sequence[str] | tf.Tensor,
        block_ids: str | Sequence[str] | tf.Tensor | None = None,
        sample_index: int | tf.Tensor = 0,
        compression_type: str = "",
        buffer_size: int = 262144,
    ) -> None:
        if compression_type not in _COMPRESSIONS:
            raise ConfigError(f"compression_type={compression_type!r}: expected one of {_COMPRESSIONS}")
        if not isinstance(buffer_size, int) or isinstance(buffer_size, bool) or buffer_size < 1:
            raise ConfigError(f"buffer_size={buffer_size!r}: expected a positive number of bytes")
        if not tf.is_tensor(sample_index) and (not isinstance(sample_index, int) or sample_index < 0):
            raise ConfigError(f"sample_index={sample_index!r}: expected an integer of at least 0")
        files = _names("filenames", filenames)
        names = files if block_ids is None else _names("block_ids", block_ids)
        if not files.shape.is_compatible_with(names.shape):
            raise ConfigError(f"{names.shape[0]} block_ids for {files.shape[0]} filenames; expected one for each")
        first = tf.cast(sample_index, tf.int64)

        def read(number: tf.Tensor, block: tuple[tf.Tensor, tf.Tensor]) -> tf.data.Dataset:
            skip = tf.where(tf.equal(number, 0), first, 0)
            records = tf.data.TFRecordDataset(block[0], compression_type, buffer_size).skip(skip)
            name = tf.data.Dataset.from_tensors(block[1]).repeat()
            return tf.data.Dataset.zip((records, name, tf.data.Dataset.range(skip, 2**63 - 1)))

        blocks = tf.data.Dataset.from_tensor_slices((files, names))
        self._dataset = blocks.enumerate().flat_map(read)
        super().__init__()

    def _as_variant_tensor(self) -> tf.Tensor:
        return self._dataset._variant_tensor

    def _inputs(self) -> list[tf.data.Dataset]:
        return [self._dataset]

    @property
    def element_spec(self) -> Any:
        """Types of an element: (string, string, int64), all scalar."""
        return self._dataset.element_spec


def _names(argument: str, value: Any) -> tf.Tensor:
    if not tf.is_tensor(value):
        value = [value] if isinstance(value, str) else list(value)
        if not value or not all(isinstance(name, (str, bytes)) for name in value):
            raise ConfigError(f"{argument}={value!r}: expected at least one string")
    tensor = tf.convert_to_tensor(value)
    if tensor.dtype != tf.string or tensor.shape.rank not in (0, 1):
        raise ConfigError(f"{argument}: expected strings of rank 0 or 1, got {tensor.dtype.name} {tensor.shape}")
    return tf.reshape(tensor, [-1])
