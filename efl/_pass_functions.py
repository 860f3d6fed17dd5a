"""What a function within a data set's graph does with the element that it is handed, as far as its own graph tells."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import tensorflow.compat.v1 as tf

from efl._dataset_ops import graph_of, has_attr, is_sampling
from efl._program import ancestors

# Ops whose first input is what they take a part of; the others say which part.
_TAKES = ("Gather", "GatherV2", "GatherNd", "ResourceGather", "ResourceGatherNd", "Slice", "StridedSlice")


def arguments_of(made: Any, caught: int) -> tuple[list[tf.Operation], list[tf.Operation]]:
    """The arguments of a function: what it is handed, and what it has caught of the graph around it.

    Args:
      made: The function's graph.
      caught: How many the latter are.
    """
    arguments = [placeholder.op for placeholder in made.inputs]
    return arguments[: len(arguments) - caught], arguments[len(arguments) - caught :]


def chosen_at_random(graph: tf.Graph, op: tf.Operation) -> str:
    """The op by which a data set's function draws what it brings, instead of making it of its element.

    A random part of the element itself, or an element with something random beside it, is no such draw: so the usual
    random changes to a row are made.

    Args:
      graph: It knows the function.
      op: The data set.
    """
    made = graph_of(graph, op.get_attr("f").name) if has_attr(op, "f") else None
    if made is None:
        return ""
    elements = set(arguments_of(made, len(op.get_attr("Targuments")))[0])
    return next((found for output in made.outputs if (found := _draw_behind(output.op, elements))), "")


def counts_alone(graph: tf.Graph, op: tf.Operation) -> bool:
    """Whether what a scan hands on from element to element has nothing of the elements, as a number has that counts."""
    made = graph_of(graph, op.get_attr("f").name)
    if made is None:
        return False
    states = len(op.get_attr("Tstate"))
    handed, _ = arguments_of(made, len(op.get_attr("Targuments")))
    return not set(handed[states:]) & set(ancestors(*(output.op for output in made.outputs[:states])))


def _draw_behind(output: tf.Operation, elements: Collection[tf.Operation]) -> str:
    """The draw that an output's values come from; empty where they come from the element too."""
    found, seen, stack = "", {output}, [output]
    while stack:
        op = stack.pop()
        if op in elements:
            return ""
        mixed = op.type == "RandomShuffle"
        # Of what is mixed, or at a random place: then the element does not say which, whatever is added to the place.
        drawn = op.type in _TAKES and (
            any(is_sampling(each) for each in ancestors(*(tensor.op for tensor in op.inputs[1:])))
            or any(each.type == "RandomShuffle" for each in ancestors(op.inputs[0].op))
        )
        if drawn or mixed:
            found = found or op.name
        values = {tensor.op for tensor in (op.inputs[:1] if drawn else op.inputs)} - seen
        seen |= values
        stack.extend(values)
    return found
