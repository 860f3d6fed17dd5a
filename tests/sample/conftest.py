"""Every test builds in a fresh graph, in graph mode."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import tensorflow.compat.v1 as tf

import efl  # noqa: F401  (puts TensorFlow into graph mode)


@pytest.fixture(autouse=True)
def graph() -> Iterator[tf.Graph]:
    """A graph for this test alone."""
    with tf.Graph().as_default() as graph:
        yield graph
