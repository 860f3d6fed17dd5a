"""Layouts of what ``tf.cond`` gives, where the condition is one for all rows (dropout that a flag turns off)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import tensorflow.compat.v1 as tf

from efl.errors import ModelError
from efl.privacy.per_example.layouts.kept import CONDITIONALS
from efl.privacy.per_example.layouts.layout import Layout, Mixed, Rows, Shared
from efl.privacy.per_example.layouts.own_gradient import check_gradient
from efl.privacy.per_example.layouts.walk import Walk, rule


class _CannotTell(Exception):
    """A rule needs something of the batch that a branch does not know."""


class _Branch(Walk):
    """The layouts inside of a branch, which is a function: of the batch it knows what its arguments tell."""

    def __init__(self, graph: tf.Graph, layouts: Sequence[Layout], sampled: bool) -> None:
        self.static_size, self.sampled = None, sampled
        self.expectations = []
        self._layouts = {tensor.ref(): layout for tensor, layout in zip(graph.inputs, layouts, strict=True)}
        self._parts = {}
        self._targets = list(graph.outputs)
        self._trained = set()
        for op in graph.get_operations():  # also those between what a variable holds and rows
            check_gradient(op)
        self._visit(graph.outputs)

    @property
    def size(self) -> tf.Tensor:  # an attribute, where it is known
        raise _CannotTell

    def expect(self, holds: tf.Tensor, text: str, *numbers: tf.Tensor) -> None:
        raise _CannotTell

    def expect_rows(self, tensor: tf.Tensor, what: str) -> None:
        raise _CannotTell


@rule(*CONDITIONALS)
def _conditional(op: tf.Operation, ins: list[Layout], walk: Walk) -> list[Layout]:
    def mixed(why: str) -> list[Layout]:
        return [Mixed(op, why)] * len(op.outputs)

    if not isinstance(ins[0], Shared):
        return mixed("a condition on the data: which branch is taken depends on several rows")
    if any(t.dtype in (tf.resource, tf.variant) for t in op.inputs):
        return mixed("a branch that uses a variable; apply the layer, or read the variable, outside of tf.cond")
    if not all(isinstance(layout, (Shared, Rows)) for layout in ins):
        return mixed("a branch that is handed entries of sparse features")
    try:
        from tensorflow.python.ops import cond_v2  # no public name shows a branch's graph

        graphs = cond_v2.get_func_graphs(op)
        given = [replace(layout, elements=None) if isinstance(layout, Rows) else layout for layout in ins[1:]]
        either, other = ([_Branch(g, given, walk.sampled).layout(t) for t in g.outputs] for g in graphs)
    except ModelError:  # a gradient of the user's own
        raise
    # A rule that makes tensors of what it is handed cannot do so from inside of a branch.
    except (_CannotTell, AttributeError, ImportError, TypeError, ValueError):
        return mixed(
            "nothing is known of a branch that reads data of its own, or has an op that asks for the whole batch"
        )
    return [
        first if isinstance(first, (Shared, Rows)) and first == second else _unlike(op, first, second)
        for first, second in zip(either, other, strict=True)
    ][: len(op.outputs)]


def _unlike(op: tf.Operation, first: Layout, second: Layout) -> Layout:
    for layout in (first, second):
        if isinstance(layout, Mixed):
            return Mixed(op, f"in a branch {layout.op.name!r} ({layout.op.type}): {layout.why}")
    return Mixed(op, "its branches give tensors of different kinds: one value for each row, and something else")
