"""Activations that are bounded and noised before they leave."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import tensorflow.compat.v1 as tf

from efl import _graph_checks
from efl._graph import RECEIVED, as_graph_tensor, mark_rowwise
from efl._program import ancestors
from efl._task_scope import current_task_scope
from efl.errors import ModelError
from efl.privacy._beside import Beside
from efl.privacy.optimizers import checked_number

if TYPE_CHECKING:
    from efl.privacy._private_step import NoiseSource

_COLLECTION = "efl_privacy_releases"
_TINY = 1e-24


class GaussianRelease:
    """Clips each row of a tensor and adds Gaussian noise: what to send in place of an activation as it is.

        release = efl.privacy.GaussianRelease(l2_norm_clip=1.0, noise_multiplier=4.0)
        model.send("y", release(y), require_grad=True)

    The peer learns, of each row, its clipped activation plus noise of standard deviation
    ``l2_norm_clip * noise_multiplier`` in every number, once for each step in which the row takes part.
    ``privacy_spent`` composes these with the noise of the sender's updates: a row also speaks through the weights that
    it has moved, so there is a guarantee towards the peer only where the sender's optimizer is private too.

    A row with a number that is not finite fails the step before the tensor is sent.

    A tensor that was made private once can be sent once; make another one for another send. Evaluation releases too:
    leave it out, or count it.

    Args:
      l2_norm_clip: The largest Euclidean norm of a row, over all its numbers.
      noise_multiplier: Standard deviation of the noise in units of ``l2_norm_clip``.

    Raises:
      ConfigError: A number that cannot be.
    """

    def __init__(self, l2_norm_clip: float, noise_multiplier: float) -> None:
        self.l2_norm_clip = checked_number("l2_norm_clip", l2_norm_clip, 0.0, may_be_least=False)
        self.noise_multiplier = checked_number("noise_multiplier", noise_multiplier, 0.0, may_be_least=False)

    def __call__(self, tensor: tf.Tensor) -> tf.Tensor:
        """Makes the private tensor.

        Args:
          tensor: float32 or float64 ``[B, …]`` of static rank, a row for each row of the batch.

        Returns:
          ``[B, …]``; its gradient is that of the clipped tensor.

        Raises:
          ModelError: The tensor has another dtype or no rows.
        """
        tensor = as_graph_tensor(tensor, "GaussianRelease")
        if tensor.dtype not in (tf.float32, tf.float64) or not tensor.shape.rank:
            raise ModelError(
                f"GaussianRelease: got a tensor of {tensor.dtype.name} and shape {tensor.shape}: expected float32 or "
                "float64 with a row for each row of the batch"
            )
        axes = list(range(1, tensor.shape.rank))
        squares = tf.reduce_sum(tf.square(tensor), axes, keepdims=True) if axes else tf.square(tensor)
        clipped = tensor * tf.minimum(
            tf.ones([], tensor.dtype), self.l2_norm_clip * tf.math.rsqrt(tf.maximum(squares, _TINY))
        )
        sent = Sent(self)
        step = tf.train.get_or_create_global_step()
        # No clipping makes such a row finite, and no noise hides which one it is.
        bad = tf.reduce_sum(tf.cast(tf.logical_not(tf.math.is_finite(clipped)), tf.int32))
        text = (
            "a row of what is to be sent is not finite, and cannot be clipped: look for missing values in the columns, "
            "and for zeros under a logarithm, a root or a division. Numbers of that kind"
        )
        finite = _graph_checks.check(tf.equal(bad, 0), f"GaussianRelease of {tensor.op.name}", text, [bad], "privacy")
        sent.beside = Beside([clipped], current_task_scope().wire)
        with tf.control_dependencies([finite, *sent.beside.before]):
            noised = tf.numpy_function(sent.noised, [clipped, step], tensor.dtype, name="efl_release")
        mark_rowwise(noised)
        sent.clipped, sent.op = clipped, noised.op
        # Its value is what has noise, to the last bit: adding what was taken away would round, and tell of it.
        private = tf.ensure_shape(noised, tensor.shape) + (clipped - tf.stop_gradient(clipped))
        tf.add_to_collection(_COLLECTION, (private, sent))
        return private


class Sent:
    """One use of a release.

    Attributes:
      release: What bounds and noises it.
      name: Under which it is sent; empty before.
      source: Adds the noise; None before it is sent.
      beside: What the peer sent that it is made of.
      clipped: What is noised.
      op: That which noises it.
    """

    def __init__(self, release: GaussianRelease) -> None:
        self.release, self.name = release, ""
        self.source: NoiseSource | None = None
        self.clipped: tf.Tensor | None = None
        self.op: tf.Operation | None = None
        self.beside: Beside | None = None

    def noised(self, clipped: np.ndarray, step: np.ndarray) -> np.ndarray:
        """What leaves."""
        if self.source is None:
            raise ModelError("a GaussianRelease was made and never sent: only model.send() can account for it")
        clip, multiplier = self.release.l2_norm_clip, self.release.noise_multiplier
        return self.source.noised(
            clipped,
            step=int(step),
            group=self.name,
            clip=clip,
            noise_multiplier=multiplier,
            rows=len(clipped),
            beside=b"" if self.beside is None else self.beside.digest,
        )


def check_rows(tensor: tf.Tensor, name: str, sampled: bool) -> None:
    """Sees to it that each row of what is released is of one row of the batch: more than one could not be bounded.

    Args:
      tensor: A release.
      name: Under which it is sent.
      sampled: See ``per_example.Objective``.

    Raises:
      ModelError: A row depends on other rows, or there are more of them than the batch has.
    """
    from efl.privacy import per_example

    sent = next(sent for private, sent in tf.get_collection(_COLLECTION) if private is tensor)
    assert sent.clipped is not None and sent.op is not None
    behind = set(ancestors(sent.clipped.op))
    received = [(each.op.name, each) for each in tf.get_collection(RECEIVED) if each.op in behind]
    objective = per_example.Objective(
        None,
        [(name, sent.clipped, tf.zeros_like(sent.clipped))],
        received,
        f"GaussianRelease {name!r}",
        sampled=sampled,
    )
    for expectation in per_example.check(objective):
        numbers = [tf.cast(number, tf.int64) for number in expectation.numbers]
        text = f"{expectation.text}"
        check = _graph_checks.check(expectation.holds, f"GaussianRelease {name!r}", text, numbers, "privacy")
        sent.op._add_control_input(check)


def bind(tensor: tf.Tensor, name: str, source: NoiseSource) -> Sent | None:
    """Notes that a tensor is sent; the release it was made by, or None.

    Args:
      tensor: What is sent.
      name: Scope and name of the message.
      source: Adds the noise.

    Raises:
      ModelError: It was sent before.
    """
    for private, sent in tf.get_collection(_COLLECTION):
        if private is tensor:
            if sent.source is not None:
                raise ModelError(f"send({name!r}): this release was sent as {sent.name!r} before; make another one")
            sent.name, sent.source = name, source
            return sent
    return None
