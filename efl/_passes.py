"""Whether a user's own data sets bring a row once in each pass over the data, as far as their graphs tell.

How much a training step may tell of a row is known; how often the row takes part, only the input says. A private
optimizer counts one time in each pass. The graph shows what breaks that: a shuffle of what was repeated before, draws
from data sets that repeat, windows that overlap. It does not show what a Python generator or a function of rows does,
nor what the files hold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import tensorflow.compat.v1 as tf
from tensorflow.core.framework import dataset_options_pb2
from tensorflow.python.framework.function_def_to_graph import function_def_to_graph

from efl import _readers
from efl._pass_sizes import pass_size
from efl._program import Program, ancestors

_OF_A_READER = "efl_reader/"  # of efl.data, which knows how often a row comes
# Data sets that bring each row of what they are made of once, or leave some out; and those that bring what files hold.
_PLAIN = frozenset(
    {
        "TensorSlice", "Tensor", "SparseTensorSlice", "TFRecord", "TextLine", "FixedLengthRecord", "CSV", "LMDB",
        "Generator", "Map", "ParallelMap", "Filter", "TakeWhile", "Prefetch", "Cache", "Take", "Skip", "Shard",
        "Unbatch", "Options", "Model", "Optimize", "Finalize", "MaxIntraOpParallelism", "PrivateThreadPool",
        "ThreadPool", "Unique", "IgnoreErrors", "AssertCardinality", "AssertNext", "ParseExample", "LatencyStats",
        "BytesProducedStats", "SetStatsAggregator", "NonSerializable", "Load", "Repeat", "Shuffle", "Identity",
    }
)  # fmt: skip
_FEWER = "{} leaves out rows of each {}, so that a pass has fewer batches than its rows would make"
_CUTS = ("TakeDataset", "SkipDataset", "ShardDataset")
_SHIFTS = ("Shuffle", "Skip", "Shard", "Filter", "Window", "Interleave", "ParallelInterleave")


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


def passes_of(program: Program) -> Passes:
    """Looks at the data sets of a task; its sample is built."""
    own = _own(program)
    streams = [
        (handle.name, _Walk(handle.graph, sloppy=_are_sloppy(each)).stream(each))
        for handle, made in own
        for each in made
    ]

    def first(what: str) -> str:
        return next((f"{name}: {getattr(stream, what)}" for name, stream in streams if getattr(stream, what)), "")

    # Of an iterator that reads several data sets by turns nobody knows which it is.
    sizes = [(handle.name, pass_size(made[0])) for handle, made in own if len(made) == 1]
    drops = [size.drops for _, size in sizes if size.drops is not None]
    rows = [(size.rows_in_all, name) for name, size in sizes if size.rows_in_all is not None]
    return Passes(
        first("twice"), first("straddles"), first("shifted"), any(drops) if drops else None, min(rows) if rows else None
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
        made = _graph_of(handle.graph, handle.get_attr("dataset_factory").name)
        return [] if made is None else [made.outputs[0]]
    return [op.inputs[0] for op in handle.outputs[0].consumers() if op.type == "MakeIterator"]


@dataclass(frozen=True)
class _Stream:
    """What a data set brings.

    Attributes:
      repeats: The op that makes it bring pass after pass; empty for one pass.
      cut: The op that takes a part of such passes: what repeats it brings those rows more often than others.
      dropped: The op that leaves out what fills no whole batch.
      cached: The op that reorders what a cache holds, if the cache is ever filled.
      reorders: The op that makes each pass come in another order.
      counts: Whether it is numbers that others are joined with, rather than rows.
      twice: Why a row can come more than once in a pass.
      straddles: Why a batch can hold a row of two passes.
      shifted: What makes passes begin inside of batches.
    """

    repeats: str = ""
    cut: str = ""
    dropped: str = ""
    cached: str = ""
    reorders: str = ""
    counts: bool = False
    twice: str = ""
    straddles: str = ""
    shifted: str = ""

    @classmethod
    def joined(cls, parts: Sequence[_Stream]) -> _Stream:
        """What is common to all data sets that are made of these."""

        def first(name: str) -> str:
            return next((getattr(part, name) for part in parts if getattr(part, name)), "")

        counts = bool(parts) and all(part.counts for part in parts)
        names = ("repeats", "cut", "dropped", "cached", "reorders", "twice", "straddles", "shifted")
        return cls(counts=counts, **{name: first(name) for name in names})


class _Walk:
    """Follows a data set's graph from its end to its sources, into the functions that make data sets of elements.

    Args:
      graph: Of the iterator; it knows all functions.
      outside: What stands for the arguments of the function that is walked: a stream.
      elements: Those of these arguments that are an element, where a function is walked.
      sloppy: Whether options let all ops give first what is ready first.
    """

    def __init__(
        self,
        graph: tf.Graph,
        outside: Mapping[tf.Operation, _Stream] | None = None,
        elements: Sequence[tf.Operation] | None = None,
        sloppy: bool = False,
    ) -> None:
        self._graph, self._outside, self._elements = graph, dict(outside or {}), elements
        self._sloppy = sloppy
        self._known: dict[tf.Operation, _Stream] = {}

    def stream(self, tensor: tf.Tensor) -> _Stream:
        """What a data set brings."""
        op = tensor.op
        if op in self._outside:
            return self._outside[op]
        if op not in self._known:
            self._known[op] = self._of(op)
        return self._known[op]

    def _of(self, op: tf.Operation) -> _Stream:
        held = [self.stream(tensor) for tensor in _inputs(op)]
        data = _Stream.joined(held)
        kind = op.type
        if kind == "RangeDataset":
            return _Stream(counts=True)
        if kind == "RandomDataset":
            drawn = f"{op.name} draws numbers at random, and may draw one several times"
            return _Stream(reorders=op.name, counts=True, twice=drawn)
        if kind == "RepeatDataset":
            if _number(op, 1) == 1:
                return data
            again = f"{op.name} repeats what {data.cut} has left of passes of {data.repeats}" if data.cut else ""
            return _because(replace(data, repeats=op.name), again)
        if kind.startswith("Shuffle"):
            return _shuffled(op, data)
        if kind in _CUTS:
            return self._cut(op, data)
        if kind == "CacheDataset" and not data.repeats:
            return replace(data, reorders="", cached=data.reorders)
        if kind == "TakeWhileDataset" and data.cached:
            return replace(data, reorders=data.reorders or data.cached)
        if kind.startswith("ParallelMap") and self._is_sloppy(op):
            late = f"{op.name} gives rows in the order in which they are ready, after {data.repeats} repeated them"
            return _because(replace(data, reorders=data.reorders or op.name), late if data.repeats else "")
        if kind == "WindowDataset":
            size, shift = _number(op, 1), _number(op, 2)
            overlap = size is None or shift is None or size > shift
            data = _because(_straddling(op, data), f"the windows of {op.name} overlap" if overlap else "")
            return self._dropping(op, data)
        if kind.startswith("GroupByWindow"):
            mixes = f"{op.name} groups what {data.repeats} has repeated, so that rows wait for those of later passes"
            data = _because(data, mixes if data.repeats else "")
            made = _graph_of(self._graph, op.get_attr("reduce_func").name)
            inside = [] if made is None else [each.name for each in made.get_operations() if _drops(each)]
            return _because(data, _FEWER.format(inside[0], "group") if inside else "")
        if kind in ("ConcatenateDataset", "DirectedInterleaveDataset", "ExperimentalDirectedInterleaveDataset"):
            return self._chosen(op, held)
        if kind == "ZipDataset":
            return self._zipped(op, held)
        if kind == "FlatMapDataset" or "Interleave" in kind:
            return self._flattened(op, data)
        if "atch" in kind and not kind.startswith("Unbatch"):
            return self._dropping(op, _straddling(op, data))
        if kind.removeprefix("Experimental").split("Dataset")[0] not in _PLAIN:
            return _because(data, f"nothing is known of how often {op.name} ({kind}) brings a row")
        return data

    def _dropping(self, op: tf.Operation, data: _Stream) -> _Stream:
        """Batches, or windows, that may leave rows out."""
        if data.dropped:
            return _because(data, _FEWER.format(data.dropped, "pass before other batches are made"))
        if not _drops(op):
            return data
        return _because(replace(data, dropped=op.name), _FEWER.format(op.name, "part") if self._elements else "")

    def _is_sloppy(self, op: tf.Operation) -> bool:
        """Whether an op may give first what is ready first."""
        said = op.get_attr("deterministic") if _has(op, "deterministic") else b"default"
        return said == b"false" or (said == b"default" and self._sloppy)

    def _cut(self, op: tf.Operation, data: _Stream) -> _Stream:
        """A part of the elements."""
        by_turns = (
            op.type == "ShardDataset" and self._elements and set(self._elements) & set(ancestors(op.inputs[2].op))
        )
        if not by_turns and self._comes_again(op.inputs[0]):  # another part for each element, then
            return _because(
                data, f"{op.name} takes a part of rows that come again for each element of another data set"
            )
        if not data.repeats:
            # A cache that is not read to its end is never filled, and the order is another one each time.
            return replace(data, reorders=data.reorders or (data.cached if op.type == "TakeDataset" else ""))
        if op.type == "ShardDataset":
            return _because(
                data, f"{op.name} takes a part of what {data.repeats} has repeated: the same rows each time"
            )
        data = replace(data, cut=op.name)
        if op.type == "SkipDataset" and data.reorders:
            data = replace(data, shifted=f"{op.name} begins inside of a pass of {data.repeats}")
        return data

    def _comes_again(self, tensor: tf.Tensor) -> bool:
        """Within a function: whether a data set is an element, or one that is not made of the element alone."""
        if self._elements is None:
            return False
        elements, sources = set(self._elements), _sources(tensor)
        return not sources or any(each in elements or not elements & set(ancestors(each)) for each in sources)

    def _chosen(self, op: tf.Operation, held: Sequence[_Stream]) -> _Stream:
        """One data set after the other, or an element of one, then of another."""
        first = 0 if op.type == "ConcatenateDataset" else 1  # which is not of the data: it says whose turn it is
        data = _Stream.joined(held[first:])
        if first:
            data = replace(data, reorders=data.reorders or held[0].reorders)
        if data.repeats:
            return _because(data, f"{op.name} takes rows of several data sets, of which {data.repeats} repeats one")
        shared = _shared(_inputs(op)[first:])
        return _because(data, f"{op.name} takes rows of {shared} several times" if shared else "")

    def _zipped(self, op: tf.Operation, held: Sequence[_Stream]) -> _Stream:
        rows = [each for each in held if not each.counts]
        data = _Stream.joined(rows or held)
        data = replace(data, reorders=data.reorders or data.cached)  # the other may end first
        if not rows and len(held) > 1 and data.repeats:
            return _because(data, f"{op.name} joins numbers that {data.repeats} repeats with others")
        again = [each.repeats for each in rows if each.repeats]
        if again and len(rows) > 1:
            return _because(
                data,
                f"{op.name} joins what {again[0]} repeats with other rows, of which there may be more or fewer: zip "
                "first, then repeat",
            )
        if not all(each.repeats for each in rows):
            data = replace(data, repeats="")  # it ends with what does not repeat
        shared = _shared(_inputs(op))
        behind = [set(ancestors(tensor.op)) for tensor in _inputs(op)]
        apart = set().union(*behind) - set.intersection(*behind) if shared else set()
        shifting = sorted(each.name for each in apart if each.type.startswith(_SHIFTS))
        return _because(data, f"{op.name} joins rows of {shared} with others of it ({shifting[0]})" if shifting else "")

    def _flattened(self, op: tf.Operation, data: _Stream) -> _Stream:
        """A data set for each element."""
        made = _graph_of(self._graph, op.get_attr("f").name)
        if made is None:
            return data
        caught = op.inputs[1 : 1 + len(op.get_attr("Targuments"))]
        arguments = [placeholder.op for placeholder in made.inputs]
        elements = arguments[: len(arguments) - len(caught)]
        outside = {
            argument: self.stream(tensor)
            for argument, tensor in zip(arguments[len(elements) :], caught)
            if tensor.dtype == tf.variant
        }
        inner = _Walk(self._graph, {**dict.fromkeys(elements, _Stream()), **outside}, elements, self._sloppy).stream(
            made.outputs[0]
        )
        both = replace(_Stream.joined([data, inner]), repeats=data.repeats)
        alike = not _depends(made.outputs[0], set(elements))
        if alike and _inputs(op)[0].op.type == "TensorDataset":  # a single element, as for a generator
            return replace(both, repeats=inner.repeats)
        turns = "Interleave" in op.type and _number(op, 1 + len(caught)) != 1
        if turns and self._is_sloppy(op):
            both = replace(both, reorders=both.reorders or op.name)
        if turns and (data.repeats or inner.repeats or alike):
            source = data.repeats or inner.repeats or op.name
            return _because(both, f"{op.name} takes turns among data sets that come again ({source})")
        if alike:  # the same for each element: an element is a pass
            return replace(both, repeats=op.name)
        return _because(both, f"{inner.repeats} repeats rows before all have come" if inner.repeats else "")


def _because(stream: _Stream, why: str) -> _Stream:
    return replace(stream, twice=stream.twice or why)


def _straddling(op: tf.Operation, data: _Stream) -> _Stream:
    if not (data.repeats and data.reorders) or data.straddles:
        return data
    return replace(
        data,
        straddles=f"{op.name} makes batches across the passes of {data.repeats}, which {data.reorders} orders anew: a "
        "row can be in a batch twice",
    )


def _shuffled(op: tf.Operation, data: _Stream) -> _Stream:
    if data.repeats:
        data = _because(data, f"{op.name} shuffles what {data.repeats} has repeated")
    if not _has(op, "reshuffle_each_iteration") or op.get_attr("reshuffle_each_iteration"):
        data = replace(data, reorders=op.name)
    return replace(data, repeats=data.repeats or op.name) if op.type.startswith("ShuffleAndRepeat") else data


def _drops(op: tf.Operation) -> bool:
    """Whether an op that makes batches, or windows, may leave out what does not fill one."""
    if not op.type.endswith(("BatchDataset", "BatchDatasetV2", "MapAndBatchDataset", "WindowDataset")):
        return False
    flag = next((t for t in op.inputs if t.dtype == tf.bool), None)
    value = None if flag is None else tf.get_static_value(flag)
    return flag is not None and (value is None or bool(value))


def _are_sloppy(dataset: tf.Tensor) -> bool:
    """Whether the options of a data set let ops give first what is ready first."""
    for op in ancestors(dataset.op):
        if op.type == "OptionsDataset":
            said = dataset_options_pb2.Options.FromString(op.get_attr("serialized_options"))
            if said.WhichOneof("optional_deterministic") and not said.deterministic:
                return True
    return False


def _has(op: tf.Operation, attr: str) -> bool:
    return any(each.name == attr for each in op.op_def.attr)


def _number(op: tf.Operation, place: int) -> int | None:
    """A scalar input, where it is known."""
    value = tf.get_static_value(op.inputs[place])
    return None if value is None else int(value)


def _inputs(op: tf.Operation) -> list[tf.Tensor]:
    """The data sets that a data set is made of, without those that its functions use."""
    caught = len(op.get_attr("Targuments")) if _has(op, "Targuments") else 0
    return [t for place, t in enumerate(op.inputs) if t.dtype == tf.variant and not 1 <= place <= caught]


def _sources(tensor: tf.Tensor) -> set[tf.Operation]:
    """The ops behind a data set that make one of something else."""
    found = set()
    for op in ancestors(tensor.op):
        if any(out.dtype == tf.variant for out in op.outputs) and not any(t.dtype == tf.variant for t in op.inputs):
            found.add(op)
    return found


def _depends(tensor: tf.Tensor, elements: set[tf.Operation]) -> bool:
    """Whether which rows a function's data set brings depends on its arguments, rather than their order or values."""
    for op in ancestors(tensor.op):
        if not any(out.dtype == tf.variant for out in op.outputs) or op.type.startswith(
            ("Shuffle", "Map", "ParallelMap")
        ):
            continue
        if op in elements or any(elements & set(ancestors(t.op)) for t in op.inputs if t.dtype != tf.variant):
            return True
    return False


def _shared(tensors: Sequence[tf.Tensor]) -> str:
    """A source of rows that is behind several of these data sets, or empty."""
    seen: set[tf.Operation] = set()
    for tensor in tensors:
        own = {op for op in _sources(tensor) if op.type != "RandomDataset"}
        if own & seen:
            return min(op.name for op in own & seen)
        seen |= own
    return ""


def _graph_of(graph: tf.Graph, function: str) -> Any:
    """A function's graph, with its inputs and outputs; None where it cannot be made."""
    held = graph._get_function(function)
    if held is None:
        return None
    with graph.as_default():  # which has the functions that it calls
        return function_def_to_graph(held.cached_definition)
