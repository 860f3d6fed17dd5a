"""Where rows come in beside the gradients: by variables that a step writes, by a rate that is computed from them."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from typing import Any

import tensorflow.compat.v1 as tf

from efl import _readers
from efl._program import Program, ancestors
from efl.errors import ModelError
from efl.privacy.optimizers import PrivateOptimizer

# Take a variable's handle, and leave the variable as it is.
_READS = frozenset(
    {"ReadVariableOp", "ResourceGather", "ResourceGatherNd", "VariableShape", "VarIsInitializedOp", "DisableCopyOnRead"}
)
_PASS_ON = frozenset({"Identity", "Enter", "Exit", "Switch", "Merge", "NextIteration", "IdentityN"})
# Give numbers that come from no data, or from their inputs alone.
_OWN = frozenset({"Const", "VarHandleOp", "VariableV2", "NoOp", "Print", *_READS})
_ACCOUNTS = "efl_privacy/"  # names of efl's own variables; see _deferred
_ITERATES = ("IteratorGetNext", "OptionalGetValue", "DatasetToSingleElement")
_PLACEHOLDERS = frozenset({"Placeholder", "PlaceholderV2"})


def without_noise(program: Program) -> list[tf.Variable]:
    """The variables that a training step changes without noise that efl adds: by an optimizer, or beside it."""
    bare = [held for optimizer, (held, _) in program.optimizers.items() if multiplier_of(optimizer) == 0.0]
    return list({v.ref(): v for held in [*bare, moved_by_data(program)] for v in held}.values())


def multiplier_of(optimizer: Any) -> float:
    """Of the noise of an optimizer; 0 where it adds none, or by a query of its own."""
    return float(getattr(optimizer, "noise_multiplier", None) or 0.0)


def moved_by_data(program: Program) -> list[tf.Variable]:
    """The variables that a training step changes, beside the optimizers, by what depends on the data.

    Everything that a step runs is looked at: what a loss waits for runs too; and what nobody runs but a hook. An
    average of the weights is not among them: it tells nothing that the weights did not tell. Nor is what a private
    optimizer updates, which has noise, nor where a reader of efl is in its files. Variables of other optimizers are
    named with these.
    """
    if program.op is None:
        return []
    handles = _kept(program.op.graph)
    readers = {reader._read_graph().variable_name for reader in _readers.own(program)}
    updated: set[object] = set()
    unnoised: set[object] = set()
    made: set[tf.Operation] = set()
    for optimizer, (held, _) in program.optimizers.items():
        is_private = isinstance(optimizer, PrivateOptimizer)
        (updated if is_private else unnoised).update(v.ref() for v in [*held, *_state(optimizer)])
        made |= optimizer.made if is_private else set()
    found: dict[object, tf.Variable] = {}
    steps = ancestors(program.op, *(tensor.op for tensor in program.fetched))
    for op in steps:
        if not _writes(op):
            continue
        for tensor in op.inputs:
            variable = handles.get(_source(tensor)) if tensor.dtype == tf.resource else None
            if variable is None or variable.ref() in unnoised or variable.op.name in readers:
                continue
            if op in made and (variable.ref() in updated or variable.op.name.startswith(_ACCOUNTS)):
                continue
            if entrance(op.inputs) is not None:
                found[variable.ref()] = variable
    inside = set(steps)
    readers = {reader._read_graph().variable_name for reader in tf.get_collection(_readers.READERS)}
    for handle, variable in handles.items():
        if variable.op.name in readers or variable.ref() in found:
            continue
        # What no step runs, a hook may.
        beside = [op for op in _writers(handle) if op not in inside and op is not variable.initializer]
        brought = (entrance(op.inputs) for op in beside)
        if any(op is not None and op.type.startswith(_ITERATES) for op in brought):
            found[variable.ref()] = variable
    return list(found.values())


def refuse_rows(optimizer: PrivateOptimizer, numbers: Iterable[tf.Tensor], gradients: Iterable[tf.Tensor]) -> None:
    """Refuses an optimizer whose learning rate, or whatever else it is made with, is computed from rows of a batch.

    It would be multiplied with the noised gradient, and has no noise itself. For what variables hold there is
    ``moved_by_data``.

    Args:
      optimizer: Private.
      numbers: What goes into its updates beside gradients.
      gradients: Private ones: what is made of these is no secret.

    Raises:
      ModelError: There is one.
    """
    known = list(gradients)
    batch: set[tf.Operation] = set()

    def is_number(op: tf.Operation) -> bool:
        """Whether an op is a placeholder of a single number, or at least none of the batch."""
        if op.type not in _PLACEHOLDERS:
            return False
        if op.outputs[0].shape.rank != 0 and not batch:
            batch.update(ancestors(*(tensor.op for tensor in known)))
        return op.outputs[0].shape.rank == 0 or op not in batch

    found = entrance(numbers, {tensor.ref() for tensor in known}, is_number)
    if found is not None:
        raise ModelError(
            f"{type(optimizer).__name__}: its learning rate, or another number that it is made with, is computed from "
            f"what comes in by {found.name!r} ({found.type}). The gradient that it is multiplied with is noised, and "
            "rows of the batch in it are not. Make it of global_step, of variables, or feed it by a placeholder"
        )


def entrance(
    tensors: Iterable[tf.Tensor],
    known: Container[object] = (),
    may_be: Callable[[tf.Operation], bool] = lambda op: False,
) -> tf.Operation | None:
    """An op through which data come into tensors; None where none do.

    What a variable holds is looked at where it is written. One that is in no checkpoint (of a metric, say) is named
    nowhere, so what is written into it is looked at here.

    Args:
      tensors: Which.
      known: References of tensors above which nobody needs to look.
      may_be: Says of an op that brings something from outside that it brings no data.
    """
    seen: set[tf.Operation] = set()
    stack = list(tensors)
    kept = _kept(stack[0].graph) if stack else {}
    while stack:
        tensor = stack.pop()
        op = tensor.op
        if tensor.ref() in known or op in seen:
            continue
        seen.add(op)
        if _brings(op) and not may_be(op):
            return op
        stack.extend(op.inputs)
        if op.type == "VarHandleOp" and op not in kept:
            stack.extend(t for writer in _writers(op) for t in writer.inputs)
    return None


def _kept(graph: tf.Graph) -> dict[tf.Operation, tf.Variable]:
    """Handle -> variable, of those that a checkpoint holds."""
    return {v.handle.op: v for v in graph.get_collection(tf.GraphKeys.GLOBAL_VARIABLES) if hasattr(v, "handle")}


def _writers(handle: tf.Operation) -> list[tf.Operation]:
    """The ops that write a variable, wherever they are run."""
    found: dict[tf.Operation, bool] = {}
    stack = list(handle.outputs)
    while stack:
        for op in stack.pop().consumers():
            if op not in found:
                found[op] = _writes(op)
                stack.extend(op.outputs if op.type in _PASS_ON else ())
    return [op for op, writes in found.items() if writes]


def _brings(op: tf.Operation) -> bool:
    """Whether an op gives what comes neither from its inputs nor from variables nor from chance."""
    if op.type in _OWN or _is_random(op):
        return False
    inside = _called(op)
    if inside is not None:  # where a placeholder is an argument
        return any(_brings(each) for each in inside if each.type != "Placeholder")
    return bool(op._is_stateful or not op.inputs)


def _writes(op: tf.Operation) -> bool:
    """Whether an op does more than read with the variables that it is handed."""
    if op.type in _READS or op.type in _PASS_ON:
        return False
    if not any(tensor.dtype == tf.resource for tensor in op.inputs):
        return False
    inside = _called(op)
    return inside is None or any(map(_writes, inside))


def _called(op: tf.Operation) -> list[tf.Operation] | None:
    """The ops of the functions that an op calls (branches, loops); None where it calls none, or they are not known."""
    named = []
    for attr in op.op_def.attr:
        if attr.type == "func":
            named.append(op.get_attr(attr.name).name)
        elif attr.type == "list(func)":
            named += [function.name for function in op.get_attr(attr.name)]
    functions = [op.graph._get_function(name) for name in named]
    if not functions or not all(hasattr(function, "graph") for function in functions):
        return None
    return [each for function in functions for each in function.graph.get_operations()]


def _is_random(op: tf.Operation) -> bool:
    return op.type.startswith(("Random", "TruncatedNormal", "StatelessRandom", "Multinomial", "StatelessMultinomial"))


def _source(tensor: tf.Tensor) -> tf.Operation:
    op = tensor.op
    while op.type in _PASS_ON and op.inputs:
        op = op.inputs[0].op
    return op


def _state(optimizer: object) -> list[tf.Variable]:
    """An optimizer's own variables."""
    variables = getattr(optimizer, "variables", None)
    return list(variables()) if callable(variables) else []
