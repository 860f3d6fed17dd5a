"""What a reader parses (the declared features) and what it hands out (``Features``)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tensorflow.compat.v1 as tf

from efl.errors import ConfigError


@dataclass(frozen=True)
class Origin:
    """Where the rows of a batch come from.

    Attributes:
      block: ``[batch]`` int64, index of each row's block in the reader's list of blocks.
      row: ``[batch]`` int64, number of the row in its block (in the file, whatever the order of reading).
      blocks: Names of the blocks.
    """

    block: tf.Tensor
    row: tf.Tensor
    blocks: tuple[str, ...]


class Features(dict[str, Any]):
    """A batch: feature name to tensor, in the order of declaration; also knows where its rows come from.

    Attributes:
      origin: The rows' blocks and numbers; ``efl.FederalSample`` uses them to say which row is out of line.
        None for the values that ``session.run(features)`` returns.
    """

    def __init__(self, tensors: Any = (), origin: Origin | None = None) -> None:
        super().__init__(tensors)
        self.origin = origin


class FeatureTable:
    """The features declared for a reader: how each is stored in a record and what it becomes."""

    def __init__(self, owner: str) -> None:
        self._owner = owner
        self._stored: dict[str, Any] = {}
        self._dtypes: dict[str, tf.DType] = {}

    def __len__(self) -> int:
        return len(self._stored)

    def __iter__(self) -> Any:
        return iter(self._stored)

    def add(self, name: str, dim: int | None, dtype: tf.DType) -> None:
        """Declares a feature of ``dim`` values a record, or of any number where ``dim`` is None.

        Raises:
          ConfigError: A bad or repeated name, a bad ``dim``, a dtype that no record can hold.
        """
        if not isinstance(name, str) or not name:
            raise ConfigError(f"{self._owner}: feature name {name!r}: expected a string that is not empty")
        if name in self._stored:
            raise ConfigError(f"{self._owner}: feature {name!r} is declared twice")
        if dim is not None and (not isinstance(dim, int) or isinstance(dim, bool) or dim < 1):
            raise ConfigError(f"{self._owner}: feature {name!r} has dim={dim!r}: expected a positive integer")
        try:
            dtype = tf.as_dtype(dtype)
        except TypeError as error:
            raise ConfigError(f"{self._owner}: feature {name!r} has dtype={dtype!r}: {error}") from error
        stored = _stored_dtype(dtype)
        if stored is None:
            raise ConfigError(
                f"{self._owner}: feature {name!r} has dtype={dtype.name}: a record holds strings, integers and "
                "floats; use a string, bool, integer or floating dtype"
            )
        self._dtypes[name] = dtype
        if dim is None:
            self._stored[name] = tf.io.VarLenFeature(stored)
        else:
            self._stored[name] = tf.io.FixedLenFeature([dim], stored)

    def describe(self, name: str) -> str:
        """Returns the declaration of a feature as the user wrote it."""
        spec, dtype = self._stored[name], self._dtypes[name].name
        if isinstance(spec, tf.io.FixedLenFeature):
            return f"fixedlen_feature({name!r}, {spec.shape[0]}, tf.{dtype})"
        return f"varlen_feature({name!r}, tf.{dtype})"

    def parse(self, records: tf.Tensor, record_names: tf.Tensor) -> dict[str, Any]:
        """Parses a batch of serialised ``tf.train.Example``.

        Args:
          records: ``[batch]`` strings.
          record_names: ``[batch]`` strings that errors of parsing quote.

        Returns:
          Name to a ``[batch, dim]`` tensor or a SparseTensor, cast to the declared dtypes.
        """
        parsed = tf.io.parse_example(records, self._stored, example_names=record_names)
        return {name: _cast(parsed[name], dtype) for name, dtype in self._dtypes.items()}


def _stored_dtype(dtype: tf.DType) -> tf.DType | None:
    if dtype in (tf.string, tf.int64, tf.float32):
        return dtype
    if dtype.is_integer or dtype.is_bool:
        return tf.int64
    return tf.float32 if dtype.is_floating else None


def _cast(value: Any, dtype: tf.DType) -> Any:
    return value if value.dtype == dtype else tf.cast(value, dtype)
