"""Of what a label is made: the tensors as which it comes into the graph, and which part of a row of each it is."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

import tensorflow.compat.v1 as tf

from efl.errors import ModelError
from efl.privacy._label_columns import HOLDERS, Part, part_behind
from efl.privacy._label_use import LabelUse

# Ops that tell how large a tensor is, and nothing of what is in it.
SIZES = frozenset({"Shape", "ShapeN", "Size", "Rank", "ZerosLike", "OnesLike"})


class Sources(NamedTuple):
    """Of what a label is made.

    Attributes:
      found: The tensors as which it comes into the graph, and which part of each; by their ``ref()``.
      makers: What has the raw label and may: a Python function that makes it.
    """

    found: dict[object, tuple[tf.Tensor, Part]]
    makers: frozenset[tf.Operation]

    @property
    def name(self) -> str:
        """What to call the label."""
        return str(next(iter(self.found.values()))[0].name)


_LOOKUPS = frozenset({"Gather", "GatherV2", "GatherNd", "ResourceGather", "LookupTableFind", "LookupTableFindV2"})
_RESHAPES = frozenset({"Cast", "Reshape", "ExpandDims", "Squeeze", "Identity", "StopGradient"})
_VARIABLES = ("ReadVariable", "Variable", "VarHandle", "ResourceGather", "VarIsInitialized")
_DRAWS = ("Multinomial", "Timestamp")
_PYTHON = ("PyFunc", "EagerPyFunc")
_DATASET = re.compile(r"Dataset(V\d+)?$")


def sources_of(use: LabelUse) -> Sources:
    """Where a label comes from.

    What a Python function gives is as much of what it is handed as of itself. Of a label that is looked up by the row's
    id it is what it is looked up in.

    Raises:
      ModelError: It is read from a variable, whose content no graph shows.
    """
    assert use.op is not None and use.labels is not None
    labels, ids = use.labels, plain(use.op.inputs[0])
    for op in computed_from(labels):
        if op.type.startswith(_VARIABLES):
            raise ModelError(
                f"{use.who}: the label {labels.name} is read from a variable ({op.name}): what was written there, and "
                "is in each checkpoint, may be the label itself. Hand over what the input gave"
            )
    makers: set[tf.Operation] = set()
    parts: dict[object, Part] = {}
    found: dict[object, tf.Tensor] = {}
    stack: list[tuple[tf.Tensor, Part]] = [(labels, None)]
    while stack:
        tensor, part = stack.pop()
        if not add(parts, tensor, part):
            continue
        op = tensor.op
        before = _before(op, ids)
        if not before or brings(op) or _is_looked_up(op, ids):
            found[tensor.ref()] = tensor
        if op.type in HOLDERS or op.type.startswith(_PYTHON):
            makers.add(op)
        stack += [(op.inputs[place], part_behind(tensor, parts[tensor.ref()], place)) for place in before]
    if not found:
        raise ModelError(
            f"{use.who}: efl cannot find out of what the label {labels.name} is made: hand over what the input gave"
        )
    return Sources({ref: (tensor, parts[ref]) for ref, tensor in found.items()}, frozenset(makers))


def _before(op: tf.Operation, ids: tf.Tensor) -> list[int]:
    """The inputs of an op that what it gives is followed to."""
    if op.type in HOLDERS or _is_looked_up(op, ids):
        return [0]
    if _DATASET.search(op.type):
        return []  # what was done before is outside the graph
    given = [place for place, t in enumerate(op.inputs) if t.dtype != tf.resource]
    before = [place for place in given if _is_of_batch(op.inputs[place])]
    # A row that is read by itself may be a single number.
    before = before or [place for place in given if _is_of_batch(op.inputs[place], scalars=True)]
    return [place for place in before if not op.type.startswith(_PYTHON) or plain(op.inputs[place]) is not ids]


def _is_looked_up(op: tf.Operation, ids: tf.Tensor) -> bool:
    # By the row's own id. (A label that a table maps is an index, and is followed to what is mapped.)
    return op.type in _LOOKUPS and plain(op.inputs[1]) is ids


def computed_from(tensor: tf.Tensor) -> Iterator[tf.Operation]:
    """The ops whose numbers a tensor is made of; not those that it waits for, nor of which it has the size."""
    seen, stack = {tensor.op}, [tensor.op]
    while stack:
        op = stack.pop()
        yield op
        if op.type not in SIZES:
            stack += [t.op for t in op.inputs if t.op not in seen]
            seen.update(t.op for t in op.inputs)


def brings(op: tf.Operation) -> bool:
    """Whether what an op gives comes into the graph by it: from a data set, a queue, a caller, a Python function."""
    if op.type.startswith("Placeholder"):
        return True
    return op._is_stateful and not changes(op) and not op.type.startswith(("LookupTable", "HashTable"))


def changes(op: tf.Operation) -> bool:
    """Whether an op gives something else in every step, though it is handed the same."""
    if op.type.endswith("PartitionedCall"):
        held = op.graph._get_function(op.get_attr("f").name)
        return held is not None and any(_is_fickle(node.op) for node in held.cached_definition.node_def)
    return _is_fickle(op.type)


def _is_fickle(kind: str) -> bool:
    return kind.startswith((*_VARIABLES, *_DRAWS)) or "Random" in kind


def plain(tensor: tf.Tensor) -> tf.Tensor:
    """Whose numbers a tensor has, in another shape or dtype at most."""
    while tensor.op.type in _RESHAPES:
        tensor = tensor.op.inputs[0]
    return tensor


def add(parts: dict[object, Part], tensor: tf.Tensor, part: Part) -> bool:
    """Adds to what of a tensor is known; whether that is more than before."""
    old = parts.get(tensor.ref(), frozenset())
    new = None if old is None or part is None else old | part
    parts[tensor.ref()] = new
    return new != old


def _is_of_batch(tensor: tf.Tensor, scalars: bool = False) -> bool:
    """Whether a tensor's values depend on those of a batch; with ``scalars`` also on a single number that is read."""
    seen, stack = {tensor.op}, [tensor]
    while stack:
        here = stack.pop()
        if here.op.type in SIZES or here.dtype == tf.resource:
            continue
        if brings(here.op) and (scalars or here.shape.rank != 0):  # a number may be a rate, or a flag
            return True
        for before in here.op.inputs:
            if before.op not in seen:
                seen.add(before.op)
                stack.append(before)
    return False
