"""Whether a tensor depends on variables that are trained."""

from __future__ import annotations

import tensorflow.compat.v1 as tf


def depends_on_trained(tensor: tf.Tensor) -> bool:
    """Whether a trainable variable is on the way to a tensor."""
    handles = {variable.handle.op for variable in tf.trainable_variables() if hasattr(variable, "handle")}
    seen: set[tf.Operation] = set()
    stack = [tensor.op]
    while stack:
        op = stack.pop()
        if op in handles:
            return True
        if op not in seen:
            seen.add(op)
            stack += [each.op for each in op.inputs]
    return False
