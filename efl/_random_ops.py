"""Random ops whose generator lives in their kernel, where no checkpoint finds it.

A session that begins anew begins their sequence anew, so a run that was restored draws other numbers than one that was
never disturbed. ``tf.random.Generator`` keeps its state in a variable, and ``tf.random.stateless_*`` has none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import tensorflow.compat.v1 as tf

from efl._program import Program, ancestors
from efl._task_scope import MODE

_SHOWN = 3


def random_ops(graph: tf.Graph, ops: Iterable[tf.Operation]) -> list[str]:
    """Names of the stateful random ops among ``ops``, and in the functions (branches, loops) that these call."""
    found = []
    for op in ops:
        if _draws(op.op_def):
            found.append(op.name)
        elif op._is_stateful and not _is_input(op.type):
            inside = (name for attr in op.op_def.attr for name in _functions(op, attr))
            found.extend(f"{op.name}/{node}" for function in inside for node in _inside(graph, function, set()))
    return sorted(found)


def told(programs: Iterable[Program]) -> list[str]:
    """What a user should know about the random ops of training steps: a sentence per task that has some."""
    sentences = []
    for program in programs:
        if program.scope.mode is not MODE.TRAIN or program.op is None:
            continue
        names = random_ops(program.op.graph, ancestors(program.op))
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            sentences.append(
                f"{program.scope}: the state of the random ops of this step is in no checkpoint "
                f"({', '.join(names[:_SHOWN])}{more}): a run that is restored draws other numbers than one that was "
                "never disturbed. tf.random.stateless_* with a seed made of model.global_step draws the same"
            )
    return sentences


def _is_input(type_: str) -> bool:
    # What a data set draws is a matter of its iterator.
    return type_.endswith("Dataset") or "Iterator" in type_


def _draws(definition: Any) -> bool:
    if _is_input(definition.name):
        return False
    return {"seed", "seed2"} <= {attr.name for attr in definition.attr}


def _functions(op: tf.Operation, attr: Any) -> list[str]:
    if attr.type == "func":
        return [op.get_attr(attr.name).name]
    return [function.name for function in op.get_attr(attr.name)] if attr.type == "list(func)" else []


def _inside(graph: tf.Graph, function: str, seen: set[str]) -> Iterator[str]:
    held = graph._get_function(function)
    if held is None or function in seen:
        return
    seen.add(function)
    for node in held.cached_definition.node_def:
        if {"seed", "seed2"} <= set(node.attr) and not _is_input(node.op):
            yield node.name
        for value in node.attr.values():
            called = [value.func, *value.list.func] if value.WhichOneof("value") in ("func", "list") else []
            for inner in called:
                if inner.name:
                    yield from (f"{node.name}/{name}" for name in _inside(graph, inner.name, seen))
