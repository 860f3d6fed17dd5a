"""What a metric refuses to count: checked inside the graph, and said in words when a step fails of it.

TensorFlow hands on what fails a step as text. The text of a check is ours up to its first bracket; the values come
after it. They stay in this party's log: the text of an error of efl is told to the peer.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Any

import tensorflow.compat.v1 as tf

from efl.errors import DataError, ModelError

_log = logging.getLogger("efl")
_SHOWN = 8  # values
_FAILED = re.compile(r"assertion failed: \[(efl\.metrics, [^:]+): (.+?)\] \[(.*)\]\s*$", re.MULTILINE)


def check(holds: tf.Tensor, label: str, message: str, arrived: Sequence[Any]) -> tf.Operation:
    """Makes an op that fails where ``holds`` is False.

    Args:
      holds: Scalar bool.
      label: Name of the metric.
      message: What is expected, and what to do. Without values of the data, and without "] [".
      arrived: What has arrived instead: texts and tensors.
    """
    # The raw op: tf.debugging.Assert wraps it in a conditional, which costs more than the check.
    return tf.raw_ops.Assert(condition=holds, data=[f"efl.metrics, {label}: {message}", *arrived], summarize=_SHOWN)


def raise_if_refused(error: Exception, who: str, step: int, wire: str) -> None:
    """Raises what a step's failure means where a check of a metric caused it; logs what arrived.

    Raises:
      ModelError: The predictions are none.
      DataError: Labels or weights cannot be.
    """
    failed = _FAILED.search(error.message) if isinstance(error, tf.errors.InvalidArgumentError) else None
    if failed is None:
        return
    label, message, arrived = failed.groups()
    _log.error("%s, step %d of %s: %s: %s", who, step, wire, label, arrived.replace("] [", " "))
    kind = ModelError if message.startswith("predictions") else DataError
    raise kind(f"{label}: {message} ({who}, step {step} of {wire})")
