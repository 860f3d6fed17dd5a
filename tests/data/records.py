"""Writes the TFRecord files of the tests."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow.compat.v1 as tf


def example(features: Mapping[str, Any]) -> bytes:
    """Serialises a record; a value's type decides how it is stored."""

    def feature(value: Any) -> tf.train.Feature:
        values = np.atleast_1d(np.asarray(value))
        if values.dtype.kind in "SUO":
            encoded = [v if isinstance(v, bytes) else str(v).encode() for v in values.tolist()]
            return tf.train.Feature(bytes_list=tf.train.BytesList(value=encoded))
        if values.dtype.kind == "f":
            return tf.train.Feature(float_list=tf.train.FloatList(value=values.tolist()))
        return tf.train.Feature(int64_list=tf.train.Int64List(value=values.astype(np.int64).tolist()))

    return tf.train.Example(
        features=tf.train.Features(feature={name: feature(value) for name, value in features.items()})
    ).SerializeToString()


def write(path: Path, records: Iterable[bytes], compression: str = "") -> Path:
    """Writes serialised records into one file and returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tf.io.TFRecordWriter(str(path), compression) as writer:
        for record in records:
            writer.write(record)
    return path


def write_ids(folder: Path, sizes: Sequence[int], names: Sequence[str] | None = None) -> list[int]:
    """Writes files of ``sizes`` records with an ``id`` each, counted through all files, and returns the ids."""
    start = 0
    for number, size in enumerate(sizes):
        name = f"part-{number}.tfrecord" if names is None else names[number]
        write(folder / name, (example({"id": i}) for i in range(start, start + size)))
        start += size
    return list(range(start))
