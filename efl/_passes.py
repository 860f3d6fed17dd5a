"""Whether a user's own data sets bring a row once in each pass over the data, as far as their graphs tell.

How much a training step may tell of a row is known; how often the row takes part, only the input says. A private
optimizer counts one time in each pass. The graph shows what breaks that: a shuffle of what was repeated before, draws
from data sets that repeat, windows that overlap. It does not show what a Python generator or a function of rows does,
nor what the files hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import tensorflow.compat.v1 as tf

from efl import _readers
from efl._dataset_ops import graph_of
from efl._pass_sizes import pass_size
from efl._pass_walk import Walk, are_sloppy
from efl._program import Program, ancestors

_OF_A_READER = "efl_reader/"  # of efl.data, which knows how often a row comes


@dataclass(frozen=True)
class Passes:
    """What passes over a task's data are, of all its own iterators.

    Attributes:
      twice: The iterator, and why a row can come more than once in a pass; empty where it cannot, or nobody can tell.
      straddles: The same, why a batch can hold a row twice, at the seam of two passes, although a row comes once in
        each: passes come in different orders, and batches are made of them as of one stream. (Where the batch size
        divides the number of rows no batch lies across a seam.)
      shifted: The same, why passes in different orders do not begin where batches do, whatever the batch size.
      drops: Whether passes may leave their last rows out; None where no batches are made that the graph shows.
      most_rows: How many rows a pass has at most, and the iterator; None where the graph does not show it.
    """

    twice: str
    straddles: str
    shifted: str
    drops: bool | None
    most_rows: tuple[int, str] | None


def passes_of(program: Program, batch_size: int | None) -> Passes:
    """Looks at the data sets of a task; its sample is built.

    Args:
      program: Of the task.
      batch_size: How many rows a batch has at most, if that is known.
    """
    own = _own(program)
    streams = [
        (handle.name, Walk(handle.graph, sloppy=are_sloppy(each)).stream(each)) for handle, made in own for each in made
    ]

    unseen = [
        f"{handle.name}: the graph does not show what this iterator reads (a handle that is fed may stand for any): "
        "read by the iterator itself"
        for handle, made in own
        if not made
    ]

    def first(what: str) -> str:
        return next((f"{name}: {getattr(stream, what)}" for name, stream in streams if getattr(stream, what)), "")

    # Of an iterator that reads several data sets by turns nobody knows which it is.
    sizes = [(handle.name, pass_size(made[0])) for handle, made in own if len(made) == 1]
    drops = [size.drops for _, size in sizes if size.drops is not None]
    found = [(size.rows_in_all(batch_size), name) for name, size in sizes]
    rows = [(count, name) for count, name in found if count is not None]
    return Passes(
        first("twice") or "".join(unseen[:1]),
        first("straddles"),
        first("shifted"),
        any(drops) if drops else None,
        min(rows) if rows else None,
    )


def several_sources(targets: Sequence[tf.Tensor | tf.Operation]) -> str:
    """Why a step may bring a row in more than one way.

    Args:
      targets: What the step computes.

    Returns:
      The reason, with what to do; empty where there is one source of rows at most.
    """
    behind = ancestors(*(target.op if isinstance(target, tf.Tensor) else target for target in targets))
    once = [op.name for op in behind if op.type in ("DatasetToSingleElement", "ReduceDataset")]
    if once:
        return (
            f"a step reads a data set from its beginning ({once[0]}), and has the same rows each time: read it by an "
            "iterator"
        )
    devices = [op.name for op in behind if op.type.startswith("MultiDeviceIterator")]
    if devices:
        return f"rows come from {devices[0]}, of whose data set nothing is known: read it by a plain iterator"
    kept = ("Dequeue", "Unstage")
    queues = [op.name for op in behind if any(word in op.type for word in kept) and "efl_recv" not in op.name]
    if queues:
        return (
            f"rows come out of a queue ({queues[0]}), and nobody knows how often one was put into it: read them with "
            "tf.data, or with efl.data.DataIO"
        )
    read = sorted(op.name for op in behind if op.type.startswith("IteratorGetNext"))
    if len(read) > 1:
        return (
            f"a step reads several batches ({', '.join(read[:3])}), and a row may be in more than one: read one, with "
            "the columns of all (tf.data.Dataset.zip before repeat), and use its parts"
        )
    return ""


def _own(program: Program) -> list[tuple[tf.Operation, list[tf.Tensor]]]:
    """The iterators of a task's sample that are not efl's, each with its data sets."""
    handles = () if program.sample is None else _readers.iterators_of(program)
    own = [handle for handle in handles if not handle.name.startswith(_OF_A_READER)]
    return [(handle, _data_sets(handle)) for handle in sorted(own, key=lambda op: op.name)]


def _data_sets(handle: tf.Operation) -> list[tf.Tensor]:
    """What an iterator iterates over: one data set, or several by turns."""
    if handle.type == "OneShotIterator":
        made = graph_of(handle.graph, handle.get_attr("dataset_factory").name)
        return [] if made is None else [made.outputs[0]]
    return [op.inputs[0] for op in handle.outputs[0].consumers() if op.type == "MakeIterator"]
