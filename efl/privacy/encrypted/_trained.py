"""Whether a tensor depends on variables that are trained."""

from __future__ import annotations

import tensorflow.compat.v1 as tf

from efl._graph import RECEIVED


def depends_on_trained(tensor: tf.Tensor) -> bool:
    """Whether a trainable variable is on the way to a tensor, or what the peer sends, whose layers may be trained."""
    received = {tensor.op for tensor in tf.get_collection(RECEIVED)}
    handles = {variable.handle.op for variable in tf.trainable_variables() if hasattr(variable, "handle")}
    seen: set[tf.Operation] = set()
    stack = [tensor.op]
    while stack:
        op = stack.pop()
        if op in handles or op in received:
            return True
        if op not in seen:
            seen.add(op)
            stack += [each.op for each in op.inputs]
    return False
