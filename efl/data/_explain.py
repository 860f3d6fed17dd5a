"""Turns what TensorFlow says about a record that it cannot read into a message that names file, record and cure."""

from __future__ import annotations

import re
from collections.abc import Sequence

import tensorflow.compat.v1 as tf

from efl.data._features import FeatureTable
from efl.data._files import Block, first_damage
from efl.data._pipeline import ROW_BITS
from efl.data._whole import said
from efl.errors import DataError

_RECORD = re.compile(r"Name: (\d+), (?:Feature|Key): (.+?)(?: \(data type|, Index)")
_DIM = re.compile(r"Values size: (\d+) but output shape: \[(\d+)\]", re.IGNORECASE)
_TYPE = re.compile(
    r"Data types don't match\. (?:Data type: (\w+) but expected type: (\w+)|Expected type: (\w+), Actual type: (\w+))"
)
_SEARCH_SECONDS = 10.0


def text_of(error: Exception) -> str:
    """Returns what TensorFlow said.

    Where it quotes bytes of a record that are no UTF-8, its Python side fails to decode its own message and raises
    ``UnicodeDecodeError`` instead of an ``OpError``.
    """
    return error.object.decode("utf-8", "replace") if isinstance(error, UnicodeDecodeError) else str(error)


def came_from(error: Exception, node: str) -> bool:
    """Whether an error was raised by the op of that name."""
    return re.search(rf"(\[\[|node ){re.escape(node)}\}}?\}}?\]\]", text_of(error)) is not None


def explain(error: Exception, owner: str, table: FeatureTable, blocks: Sequence[Block], likeliest: int) -> DataError:
    """Returns the error of a reader in clear words.

    Args:
      error: What the reader's op raised.
      owner: Name and folder of the reader, for the message.
      table: Its features.
      blocks: What it reads.
      likeliest: Index of the block that was read last.
    """
    message = text_of(error)
    if isinstance(error, (tf.errors.InvalidArgumentError, UnicodeDecodeError)):
        return DataError(f"{owner}: {_parsing(message, table, blocks)}")
    if isinstance(error, tf.errors.NotFoundError):
        gone = [block.path for block in blocks if block.path in message]
        return DataError(f"{owner}: {gone[0] if gone else 'a file'} is gone; it was there when the model was made")
    if isinstance(error, tf.errors.DataLossError):
        damage = first_damage([*blocks[likeliest:], *blocks[:likeliest]], _SEARCH_SECONDS)
        if damage is None:
            return DataError(f"{owner}: a file is damaged or cut off ({_first_line(message)})")
        block, row = damage
        cause = "it is no TFRecord file" if row == 0 and "even a TFRecord" in message else "it is damaged or cut off"
        return DataError(
            f"{owner}: cannot read record {row} of {block.path!r}: {cause}. Write the file again, or move it away"
        )
    return DataError(f"{owner}: {said(message) or f'reading failed: {_first_line(message)}'}")


def _parsing(message: str, table: FeatureTable, blocks: Sequence[Block]) -> str:
    found = _RECORD.search(message)
    if found is None:
        return "a record is not a serialised tf.train.Example; write records with tf.train.Example"
    place, feature = int(found.group(1)), found.group(2)
    block = blocks[(place >> ROW_BITS) % len(blocks)]
    where = f"record {place & (2**ROW_BITS - 1)} of {block.path!r}"
    if feature not in table:
        return f"{where}: {_first_line(message)}"
    declared = table.describe(feature)
    if "required but could not be found" in message:
        return f"{where} has no feature {feature!r}, declared as {declared}"
    dim, kind = _DIM.search(message), _TYPE.search(message)
    if dim is not None:
        return (
            f"{where} holds {dim.group(1)} value(s) of feature {feature!r}, declared as {declared}; "
            "use the right dim, or varlen_feature where their number differs"
        )
    if kind is not None:
        actual = kind.group(1) or kind.group(4)
        return f"{where} holds {actual} values of feature {feature!r}, declared as {declared}; use a fitting dtype"
    return f"{where}: feature {feature!r}, declared as {declared}: {_first_line(message)}"


def _first_line(message: str) -> str:
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    noise = ("Graph execution error", "Detected at node", "File ", "Node:", "[[")
    return next((line for line in lines if not line.startswith(noise)), message)
