"""Follows a data set's graph, and says what it brings: passes, in which order, and why a row may come more often.

Of each op it is known whether it brings every row of what it is made of once; of an op of another kind nothing is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import tensorflow.compat.v1 as tf
from tensorflow.core.framework import dataset_options_pb2

from efl._dataset_ops import drops_rows, graph_of, has_attr, is_sloppy, number_of
from efl._pass_functions import arguments_of, chosen_at_random, counts_alone
from efl._program import ancestors

# Data sets that bring each row of what they are made of once, or leave some out; and those that bring what files hold.
_PLAIN = frozenset(
    {
        "TensorSlice", "Tensor", "SparseTensorSlice", "TFRecord", "TextLine", "FixedLengthRecord", "CSV", "LMDB",
        "Generator", "Map", "ParallelMap", "Filter", "ParallelFilter", "TakeWhile", "Prefetch", "Cache", "Take",
        "Skip", "Shard", "Unbatch", "Options", "Model", "Optimize", "Finalize", "MaxIntraOpParallelism",
        "PrivateThreadPool", "ThreadPool", "Unique", "IgnoreErrors", "AssertCardinality", "AssertNext",
        "ParseExample", "LatencyStats", "BytesProducedStats", "SetStatsAggregator", "NonSerializable", "Repeat",
        "Shuffle", "Identity", "Wrap",
    }
)  # fmt: skip
_FEWER = "{} leaves out rows of each {}, so that a pass has fewer batches than its rows would make"
_CUTS = ("TakeDataset", "SkipDataset", "ShardDataset")
_SHIFTS = (
    "Shuffle", "Skip", "Shard", "Filter", "ParallelFilter", "Unique", "IgnoreErrors", "Window", "GroupByWindow",
    "Interleave", "ParallelInterleave",
)  # fmt: skip


@dataclass(frozen=True)
class Stream:
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
    def joined(cls, parts: Sequence[Stream]) -> Stream:
        """What is common to all data sets that are made of these."""

        def first(name: str) -> str:
            return next((getattr(part, name) for part in parts if getattr(part, name)), "")

        counts = bool(parts) and all(part.counts for part in parts)
        names = ("repeats", "cut", "dropped", "cached", "reorders", "twice", "straddles", "shifted")
        return cls(counts=counts, **{name: first(name) for name in names})


class Walk:
    """Follows a data set's graph from its end to its sources, into the functions that make data sets of elements.

    Args:
      graph: Of the iterator; it knows all functions.
      outside: What stands for the arguments of the function that is walked: a stream.
      elements: Those of these arguments that are an element, where a function is walked.
      sloppy: Whether options let all ops give first what is ready first.
      anew: Whether the data sets are made anew each time, as a function makes them: their orders and caches are their
        own.
    """

    def __init__(
        self,
        graph: tf.Graph,
        outside: Mapping[tf.Operation, Stream] | None = None,
        elements: Sequence[tf.Operation] | None = None,
        sloppy: bool = False,
        anew: bool = False,
    ) -> None:
        self._graph, self._outside, self._elements = graph, dict(outside or {}), elements
        self._sloppy, self._anew = sloppy, anew
        self._known: dict[tf.Operation, Stream] = {}

    def stream(self, tensor: tf.Tensor) -> Stream:
        """What a data set brings."""
        op = tensor.op
        if op in self._outside:
            return self._outside[op]
        if op not in self._known:
            self._known[op] = self._of(op)
        return self._known[op]

    def _of(self, op: tf.Operation) -> Stream:
        held = [self.stream(tensor) for tensor in _inputs(op)]
        data = Stream.joined(held)
        kind = op.type
        if "Interleave" not in kind and is_sloppy(op, self._sloppy):
            late = f"{op.name} gives rows in the order in which they are ready, after {data.repeats} repeated them"
            data = _because(replace(data, reorders=data.reorders or op.name), late if data.repeats else "")
        drawn = chosen_at_random(self._graph, op)
        data = _because(data, f"the function of {op.name} draws what it brings at random ({drawn})" if drawn else "")
        if kind == "RangeDataset":
            return Stream(counts=True)
        if kind == "RandomDataset":
            drawn = f"{op.name} draws numbers at random, and may draw one several times"
            return Stream(reorders=op.name, counts=True, twice=drawn)
        if kind == "RepeatDataset":
            if number_of(op, 1) == 1:
                return data
            again = f"{op.name} repeats what {data.cut} has left of passes of {data.repeats}" if data.cut else ""
            return _because(replace(data, repeats=op.name), again)
        if kind.startswith("Shuffle"):
            return _shuffled(op, data, self._anew)
        if kind in _CUTS:
            return self._cut(op, data)
        if kind == "CacheDataset" and not data.repeats and not self._anew:
            return replace(data, reorders="", cached=data.reorders or data.cached)
        if kind == "TakeWhileDataset" and data.cached:
            return replace(data, reorders=data.reorders or data.cached)
        if kind == "WindowDataset":
            size, shift = number_of(op, 1), number_of(op, 2)
            overlap = size is None or shift is None or size > shift
            data = _because(_straddling(op, data), f"the windows of {op.name} overlap" if overlap else "")
            return self._dropping(op, data)
        if kind.startswith("GroupByWindow"):
            return self._grouped(op, data)
        if kind in ("SnapshotDatasetV2", "LoadDataset"):
            return self._kept_in_files(op, data)
        if kind in ("ConcatenateDataset", "DirectedInterleaveDataset", "ExperimentalDirectedInterleaveDataset"):
            return self._chosen(op, held)
        if kind == "ZipDataset":
            return self._zipped(op, held)
        if kind == "FlatMapDataset" or "Interleave" in kind:
            return self._flattened(op, data)
        if "atch" in kind and not kind.startswith("Unbatch"):
            return self._dropping(op, _straddling(op, data))
        keeps_none = kind == "ScanDataset" and counts_alone(self._graph, op)
        if not keeps_none and kind.removeprefix("Experimental").split("Dataset")[0] not in _PLAIN:
            return _because(data, f"nothing is known of how often {op.name} ({kind}) brings a row")
        return data

    def _dropping(self, op: tf.Operation, data: Stream) -> Stream:
        """Batches, or windows, that may leave rows out."""
        if data.dropped:
            return _because(data, _FEWER.format(data.dropped, "pass before other batches are made"))
        if not drops_rows(op):
            return data
        return _because(replace(data, dropped=op.name), _FEWER.format(op.name, "part") if self._elements else "")

    def _cut(self, op: tf.Operation, data: Stream) -> Stream:
        """A part of the elements."""
        if self._comes_again(op.inputs[0]):
            if not self._is_by_turns(op):  # another part for each element, then
                return _because(
                    data, f"{op.name} takes a part of rows that come again for each element of another data set"
                )
            order = data.reorders or data.cached
            if order:
                return _because(data, f"{op.name} takes parts of rows that {order} orders anew for each part")
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

    def _is_by_turns(self, op: tf.Operation) -> bool:
        """Within a function: whether each element has a shard of its own, that of its number."""
        if op.type != "ShardDataset" or set(self._elements or ()) & set(ancestors(op.inputs[1].op)):
            return False
        number = op.inputs[2].op
        while number.type in ("Cast", "Identity"):
            number = number.inputs[0].op
        return number in (self._elements or ())

    def _comes_again(self, tensor: tf.Tensor) -> bool:
        """Within a function: whether a data set is an element, or one that is not made of the element alone."""
        if self._elements is None:
            return False
        elements, sources = set(self._elements), _sources(tensor)
        return not sources or any(each in elements or not elements & set(ancestors(each)) for each in sources)

    def _chosen(self, op: tf.Operation, held: Sequence[Stream]) -> Stream:
        """One data set after the other, or an element of one, then of another."""
        first = 0 if op.type == "ConcatenateDataset" else 1  # which is not of the data: it says whose turn it is
        data = Stream.joined(held[first:])
        if first:
            data = replace(data, reorders=data.reorders or held[0].reorders)
        if data.repeats:
            return _because(data, f"{op.name} takes rows of several data sets, of which {data.repeats} repeats one")
        shared = _shared(_inputs(op)[first:])
        return _because(data, f"{op.name} takes rows of {shared} several times" if shared else "")

    def _zipped(self, op: tf.Operation, held: Sequence[Stream]) -> Stream:
        rows = [each for each in held if not each.counts]
        data = Stream.joined(rows or held)
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
        if shared and data.reorders:  # it is read once for each
            shifting = [data.reorders]
        return _because(data, f"{op.name} joins rows of {shared} with others of it ({shifting[0]})" if shifting else "")

    def _grouped(self, op: tf.Operation, data: Stream) -> Stream:
        mixes = f"{op.name} groups what {data.repeats} has repeated, so that rows wait for those of later passes"
        data = _because(data, mixes if data.repeats else "")
        before = len(op.get_attr("Tkey_func_other_arguments"))
        count = len(op.get_attr("Treduce_func_other_arguments"))
        inner = self._made_of_one(op, "reduce_func", op.inputs[1 + before : 1 + before + count])
        data = _because(data, _FEWER.format(inner.dropped, "group") if inner.dropped else inner.twice)
        return replace(data, reorders=data.reorders or inner.reorders)

    def _kept_in_files(self, op: tf.Operation, data: Stream) -> Stream:
        """Rows that were written in parts, and are read by a function of the data set of all parts."""
        kept = op.type == "SnapshotDatasetV2"  # else there is no data set before it
        late = f"{op.name} gives rows as its files hold them, after {data.repeats} repeated them"
        data = _because(data, late if data.repeats else "")
        first = 2 if kept else 1
        inner = self._made_of_one(op, "reader_func", op.inputs[first : first + len(op.get_attr("Treader_func_args"))])
        # The first pass comes as it is made, and later ones as the parts are read.
        order = data.reorders or (op.name if kept else inner.reorders)
        return replace(_because(data, inner.twice), reorders=order)

    def _made_of_one(self, op: tf.Operation, attr: str, caught: Sequence[tf.Tensor]) -> Stream:
        """What a function brings that is handed a data set, each row of which is to come once."""
        made = graph_of(self._graph, op.get_attr(attr).name)
        if made is None:
            return Stream(twice=f"nothing is known of {attr} of {op.name}")
        handed, others = arguments_of(made, len(caught))
        outside = {**dict.fromkeys(handed, Stream()), **self._caught(others, caught)}
        inner = Walk(self._graph, outside, sloppy=self._sloppy, anew=True).stream(made.outputs[0])
        more = sorted(each.name for each in _sources(made.outputs[0]) - set(handed))
        inner = _because(inner, f"{attr} of {op.name} brings other rows than it is handed ({more[0]})" if more else "")
        return _because(inner, f"{attr} of {op.name} repeats rows ({inner.repeats})" if inner.repeats else "")

    def _caught(self, arguments: Sequence[tf.Operation], caught: Sequence[tf.Tensor]) -> dict[tf.Operation, Stream]:
        """The data sets that a function uses of the graph around it."""
        both = zip(arguments, caught)
        return {argument: self.stream(tensor) for argument, tensor in both if tensor.dtype == tf.variant}

    def _flattened(self, op: tf.Operation, data: Stream) -> Stream:
        """A data set for each element."""
        made = graph_of(self._graph, op.get_attr("f").name)
        if made is None:
            return _because(data, f"nothing is known of the data sets that {op.name} makes of its elements")
        caught = op.inputs[1 : 1 + len(op.get_attr("Targuments"))]
        elements, others = arguments_of(made, len(caught))
        outside = {**dict.fromkeys(elements, Stream()), **self._caught(others, caught)}
        inner = Walk(self._graph, outside, elements, self._sloppy, anew=True).stream(made.outputs[0])
        both = replace(Stream.joined([data, inner]), repeats=data.repeats)
        alike = not _depends(made.outputs[0], set(elements))
        if alike and _inputs(op)[0].op.type == "TensorDataset":  # a single element, as for a generator
            return replace(both, repeats=inner.repeats)
        turns = "Interleave" in op.type and number_of(op, 1 + len(caught)) != 1
        if turns and is_sloppy(op, self._sloppy):
            both = replace(both, reorders=both.reorders or op.name)
        if turns and (data.repeats or inner.repeats or alike):
            source = data.repeats or inner.repeats or op.name
            return _because(both, f"{op.name} takes turns among data sets that come again ({source})")
        if alike:  # the same for each element: an element is a pass
            return replace(both, repeats=op.name)
        return _because(both, f"{inner.repeats} repeats rows before all have come" if inner.repeats else "")


def _because(stream: Stream, why: str) -> Stream:
    return replace(stream, twice=stream.twice or why)


def _straddling(op: tf.Operation, data: Stream) -> Stream:
    if not (data.repeats and data.reorders) or data.straddles:
        return data
    return replace(
        data,
        straddles=f"{op.name} makes batches across the passes of {data.repeats}, which {data.reorders} orders anew: a "
        "row can be in a batch twice",
    )


def _shuffled(op: tf.Operation, data: Stream, anew: bool) -> Stream:
    if data.repeats:
        data = _because(data, f"{op.name} shuffles what {data.repeats} has repeated")
    fixed = has_attr(op, "reshuffle_each_iteration") and not op.get_attr("reshuffle_each_iteration")
    if anew:  # and then it draws seeds anew, if it was given none
        seeds = number_of(op, 2), number_of(op, 3)
        fixed = fixed and None not in seeds and seeds != (0, 0)
    if not fixed:
        data = replace(data, reorders=op.name)
    return replace(data, repeats=data.repeats or op.name) if op.type.startswith("ShuffleAndRepeat") else data


def are_sloppy(dataset: tf.Tensor) -> bool:
    """Whether the options of a data set let ops give first what is ready first."""
    for op in ancestors(dataset.op):
        if op.type == "OptionsDataset":
            said = dataset_options_pb2.Options.FromString(op.get_attr("serialized_options"))
            if said.WhichOneof("optional_deterministic") and not said.deterministic:
                return True
    return False


def _inputs(op: tf.Operation) -> list[tf.Tensor]:
    """The data sets that a data set is made of, without those that its functions use."""
    caught = len(op.get_attr("Targuments")) if has_attr(op, "Targuments") else 0
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
