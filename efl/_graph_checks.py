"""What a step refuses to go on with: checked inside the graph, and said in words when the step fails of it.

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
_FAILED = re.compile(r"assertion failed: \[(efl\.\w+, [^:]+): (.+?)\] \[(.*)\]\s*$", re.MULTILINE)


def check(
    holds: tf.Tensor, label: str, message: str | tf.Tensor, arrived: Sequence[Any], area: str = "metrics"
) -> tf.Operation:
    """Makes an op that fails where ``holds`` is False.

    Args:
      holds: Scalar bool.
      label: Of the metric, or of what else is checked; without ":".
      message: What is expected, and what to do. Without values of the data, and without "] [".
      arrived: What has arrived instead: texts and tensors, at least one.
      area: The part of efl that checks.
    """
    text = f"efl.{area}, {label}: " + message
    # The raw op: tf.debugging.Assert wraps it in a conditional, which costs more than the check.
    return tf.raw_ops.Assert(condition=holds, data=[text, *arrived], summarize=_SHOWN)


def raise_if_refused(error: Exception, who: str, step: int, wire: str) -> None:
    """Raises what a step's failure means where a check caused it; logs what arrived.

    Raises:
      ModelError: The predictions are none, or what a private optimizer was promised of the model does not hold.
      DataError: Labels or weights cannot be.
    """
    failed = _FAILED.search(error.message) if isinstance(error, tf.errors.InvalidArgumentError) else None
    if failed is None:
        return
    label, message, arrived = (text.replace("\\'", "'").replace('\\"', '"') for text in failed.groups())
    _log.error("%s, step %d of %s: %s: %s", who, step, wire, label, arrived.replace("] [", " "))
    is_model = message.startswith("predictions") or label.startswith("efl.privacy")
    kind = ModelError if is_model else DataError
    raise kind(f"{label}: {message} ({who}, step {step} of {wire})")
