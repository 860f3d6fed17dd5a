"""Every test builds in a fresh graph, in graph mode."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ["TF_USE_LEGACY_KERAS"] = "1"

import pytest
import tensorflow.compat.v1 as tf

tf.disable_eager_execution()


@pytest.fixture(autouse=True)
def graph() -> Iterator[tf.Graph]:
    """A graph for this test alone."""
    with tf.Graph().as_default() as graph:
        yield graph
