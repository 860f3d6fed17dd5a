from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tensorflow.compat.v1 as tf

EXAMPLE = Path(__file__).resolve().parents[2] / "example"


def load(path: Path) -> ModuleType:
    """Imports a program of the examples under a name of its own (two folders have a ``generate_data.py``)."""
    name = "example_" + "_".join(path.relative_to(EXAMPLE).with_suffix("").parts)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def read_records() -> Callable[[Path], Iterator[dict[str, Any]]]:
    def read(folder: Path) -> Iterator[dict[str, Any]]:
        """Yields the records of a folder's files, in order, as name -> list of values."""
        for file in sorted(folder.glob("*.tfrecord")):
            for record in tf.io.tf_record_iterator(str(file)):
                columns = tf.train.Example.FromString(record).features.feature
                yield {name: list(getattr(column, column.WhichOneof("kind")).value) for name, column in columns.items()}

    return read
