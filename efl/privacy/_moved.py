"""What changes a model's variables beside its optimizers: moving averages and whatever the user adds to a step."""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow.compat.v1 as tf

from efl._program import Program, ancestors
from efl.privacy.per_example.layouts.walk import in_order

# Take a variable's handle, and leave the variable as it is.
_READS = frozenset(
    {"ReadVariableOp", "ResourceGather", "ResourceGatherNd", "VariableShape", "VarIsInitializedOp", "DisableCopyOnRead"}
)
_PASS_ON = frozenset({"Identity", "Enter", "Exit", "Switch", "Merge", "NextIteration", "IdentityN"})
# Give numbers that come from no data.
_OWN = frozenset({"Const", "VarHandleOp", "VariableV2", "NoOp", *_READS})


def moved_by_data(program: Program) -> list[tf.Variable]:
    """The variables that ops of a training step change, beside the optimizers, by what depends on the data.

    An average of the weights is not among them: it tells nothing that the weights did not tell.
    """
    roots = [op if isinstance(op, tf.Operation) else op.op for op in [*program.moving, *program.extra_ops]]
    handles = {v.handle.op: v for v in tf.global_variables() if hasattr(v, "handle")}
    trained = {v.ref() for held, _ in program.optimizers.values() for v in held}
    found: dict[object, tf.Variable] = {}
    for op in ancestors(*roots):
        if op.type in _READS or op.type in _PASS_ON:
            continue
        for tensor in op.inputs:
            variable = handles.get(_source(tensor)) if tensor.dtype == tf.resource else None
            if variable is not None and variable.ref() not in trained and _depends_on_data(op.inputs):
                found[variable.ref()] = variable
    return list(found.values())


def _is_random(op: tf.Operation) -> bool:
    return op.type.startswith(("Random", "TruncatedNormal", "StatelessRandom", "Multinomial", "StatelessMultinomial"))


def _source(tensor: tf.Tensor) -> tf.Operation:
    op = tensor.op
    while op.type in _PASS_ON and op.inputs:
        op = op.inputs[0].op
    return op


def _depends_on_data(tensors: Sequence[tf.Tensor]) -> bool:
    # What a variable holds is looked at where it is written.
    return any(
        (op._is_stateful or not op.inputs) and op.type not in _OWN and not _is_random(op) for op in in_order(tensors)
    )
