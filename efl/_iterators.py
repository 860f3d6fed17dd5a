"""Where a user's own iterators stand: in the checkpoint where TensorFlow can write it, in a warning where it cannot.

An iterator is saved if efl can also start it: initializable, over a data set that needs no feeding. Whether TensorFlow
can write its position (it cannot where the data set calls Python or draws at random) is found by trying, in a session
of its own, before the parties agree on a checkpoint. To restore one, its initializer runs first; the position follows.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import tensorflow.compat.v1 as tf

from efl import _random_ops, _readers
from efl._program import Program, ancestors, feature_tensors, survives_step
from efl._quiet import no_deprecation_warnings
from efl._session import default_config
from efl._task_scope import TaskScope
from efl.errors import CheckpointError

_log = logging.getLogger("efl")
_EXAMINED = "efl_own_iterators"
_OF_A_READER = "efl_reader/"  # iterators of efl.data: their position is a variable


@dataclass
class _Iterator:
    """An iterator behind some samples.

    Attributes:
      handle: The op that is the iterator.
      scopes: Whose samples it feeds.
      lost: Why its position does not survive a restart; empty where it does.
      maker: Starts it; None where there is none that efl could run.
      saveable: What a saver takes.
      restore: Moves it, once it was started, to where a checkpoint has it.
      unseeded: A shuffle before a repeat that draws another order in each process, or empty.
    """

    handle: tf.Operation
    scopes: list[TaskScope] = field(default_factory=list)
    lost: str = ""
    maker: tf.Operation | None = None
    saveable: Any = None
    restore: tf.Operation | None = None
    unseeded: str = ""

    def __str__(self) -> str:
        return f"{', '.join(map(str, self.scopes))}: {self.handle.name}"


class OwnIterators:
    """The iterators behind the samples of a model's programs that are not efl's.

    Args:
      programs: Compiled.

    Attributes:
      saveables: For a saver, beside the variables. They can be saved once the iterators were started.
      kept: Scope -> whether a restarted run finds the place in its input again; without inputs that have no place.
    """

    def __init__(self, programs: Collection[Program]) -> None:
        self._programs = list(programs)
        self._iterators: dict[tf.Operation, _Iterator] = {}
        self._others: dict[TaskScope, str] = {}  # inputs that nobody can find the place in, and that no iterator reads
        self._size_told = False
        self.kept: dict[str, bool] = {}
        for program in self._programs:
            self._examine(program)
        self._try_saving()
        self.saveables = [i.saveable for i in self._iterators.values() if not i.lost]
        for scope in list(self.kept):
            self.kept[scope] &= not any(i.lost and scope in map(str, i.scopes) for i in self._iterators.values())

    @classmethod
    def of(cls, programs: Collection[Program]) -> tuple[OwnIterators, list[str]]:
        """The iterators of these programs, examined once, and then what a user should know about restarts."""
        for held in tf.get_collection(_EXAMINED):
            if list(map(id, held._programs)) == list(map(id, programs)):
                return held, []
        made = cls(programs)
        tf.add_to_collection(_EXAMINED, made)
        return made, made._warnings()

    def restore(self, session: tf.Session, prefix: str, scopes: Collection[TaskScope], strict: bool) -> set[TaskScope]:
        """Moves the iterators of some scopes, which were started, to where a checkpoint has them.

        Args:
          session: Of the run.
          prefix: Of the checkpoint.
          scopes: Whose inputs go on.
          strict: A position that does not fit its data set is an error; otherwise the iterator begins anew.

        Returns:
          Scopes of which an iterator begins anew.

        Raises:
          CheckpointError: A data set is another one than that of the checkpoint.
        """
        anew: set[TaskScope] = set()
        wanted = [i for i in self._iterators.values() if not i.lost and set(i.scopes) & set(scopes)]
        held = tf.train.load_checkpoint(prefix).get_variable_to_shape_map() if wanted else {}
        for iterator in wanted:
            if iterator.saveable.specs[0].name not in held:
                _log.warning("%s: the checkpoint does not have the position of this iterator; it begins anew", iterator)
                anew |= set(iterator.scopes)
                continue
            try:
                session.run(iterator.restore, {self._prefix: prefix})
            except tf.errors.OpError as error:
                why = f"{iterator}: its position in the checkpoint does not fit its data set ({_reason(error)})"
                if strict:
                    raise CheckpointError(
                        f"{why}. Is the data set what it was when the checkpoint was made? Put it back, or begin with "
                        "another checkpoint_dir"
                    ) from None
                _log.warning("%s; it begins anew", why)
                session.run(iterator.maker)
                anew |= set(iterator.scopes)
        return anew

    def reordered(self, scopes: Collection[TaskScope]) -> set[TaskScope]:
        """Of some scopes whose iterators were restored, those whose later passes come in another order than before."""
        return {scope for each in self._iterators.values() if each.unseeded for scope in each.scopes} & set(scopes)

    def tell_size(self, prefix: str) -> None:
        """Logs once how much of a checkpoint is iterators (elements in shuffle buffers, mostly)."""
        if self._size_told or not self.saveables or not _log.isEnabledFor(logging.DEBUG):
            return
        self._size_told = True
        reader = tf.train.load_checkpoint(prefix)
        shapes, dtypes = reader.get_variable_to_shape_map(), reader.get_variable_to_dtype_map()
        names = set(shapes) - {saveable.specs[0].name for saveable in self.saveables}
        variables = sum(math.prod(shapes[name]) * dtypes[name].size for name in names)
        files = sum(file.stat().st_size for file in Path(prefix).parent.glob(f"{Path(prefix).name}.data-*"))
        _log.debug(
            "the positions of %s take about %d bytes of a checkpoint; a shuffle buffer is saved with its elements",
            ", ".join(i.handle.name for i in self._iterators.values() if not i.lost),
            max(0, files - variables),
        )

    # ---- private

    def _examine(self, program: Program) -> None:
        if program.sample is None:
            return
        scope, handles = program.scope, sorted(_readers.iterators_of(program), key=lambda op: op.name)
        own = [handle for handle in handles if not handle.name.startswith(_OF_A_READER)]
        for handle in own:
            self._iterators.setdefault(handle, _Iterator(handle)).scopes.append(scope)
        if handles or _readers.own(program):
            self.kept[str(scope)] = True
            return
        for tensor in feature_tensors(program.sample):
            if not survives_step(tensor):
                self._others[scope] = f"no iterator reads {tensor.name}"
                self.kept[str(scope)] = False

    def _try_saving(self) -> None:
        for iterator in self._iterators.values():
            iterator.lost = self._judge(iterator)
        candidates = [i for i in self._iterators.values() if not i.lost]
        if not candidates:
            return
        graph = candidates[0].handle.graph
        with graph.as_default(), tf.name_scope(None), tf.control_dependencies(None), no_deprecation_warnings():
            self._prefix = tf.placeholder(tf.string, [], "efl_iterators/prefix")
            for iterator in candidates:
                resource = SimpleNamespace(_iterator_resource=iterator.handle.outputs[0])
                iterator.saveable = tf.data.experimental.make_saveable_from_iterator(resource)
                (state,) = tf.raw_ops.RestoreV2(
                    prefix=self._prefix, tensor_names=[iterator.saveable.specs[0].name], shape_and_slices=[""],
                    dtypes=[tf.variant],
                )  # fmt: skip
                iterator.restore = iterator.saveable.restore([state], None)
        config = default_config()
        config.device_count["GPU"] = 0  # the run's own session takes it as the user says
        config.allow_soft_placement = config.graph_options.place_pruned_graph = True
        with tf.Session(graph=graph, config=config) as session:
            for iterator in candidates:
                try:
                    session.run(iterator.maker)
                    session.run(iterator.saveable.specs[0].tensor.op)
                except tf.errors.OpError as error:
                    iterator.lost = _reason(error)

    def _judge(self, iterator: _Iterator) -> str:
        handle = iterator.handle
        if handle.type == "OneShotIterator":
            return "a one-shot iterator, which cannot be started at a place"
        if handle.type not in ("IteratorV2", "Iterator"):
            return f"{handle.type}, of which efl does not know the data set"
        makers = [op for op in handle.outputs[0].consumers() if op.type == "MakeIterator"]
        if len(makers) != 1:
            return f"{len(makers)} initializers, of which efl does not know the last one that ran"
        if not _readers.independent(makers[0]):
            return "its data set is fed from placeholders or variables"
        behind = ancestors(makers[0].inputs[0].op)
        drawn = _random_ops.random_ops(handle.graph, behind)
        if drawn:
            return f"each start draws its data anew ({drawn[0]})"
        iterator.maker, iterator.unseeded = makers[0], _unseeded(behind)
        return ""

    def _warnings(self) -> list[str]:
        lost = [f"{i} ({i.lost})" for i in self._iterators.values() if i.lost]
        lost += [f"{scope} ({why})" for scope, why in self._others.items()]
        unseeded = [f"{i} ({i.unseeded})" for i in self._iterators.values() if i.unseeded and not i.lost]
        texts = []
        if lost:
            texts.append(
                f"the position of this input will not survive a restart, which begins it anew: {'; '.join(lost)}. "
                "Use efl.data.DataIO or efl.data.FederalDataIO, or tf.data.make_initializable_iterator over files, "
                "with no Python function and nothing random in the data set but shuffle(…, seed=…)"
            )
        if unseeded:
            texts.append(
                f"shuffled without a seed: {'; '.join(unseeded)}. After a restart the epoch goes on where it was, and "
                "later epochs come in another order than they would have; shuffle(…, seed=…) keeps it"
            )
        return texts


def _unseeded(dataset_ops: Iterable[tf.Operation]) -> str:
    """The first shuffle below a repeat that makes up its seeds, which are in no checkpoint."""
    for repeat in dataset_ops:
        if repeat.type != "RepeatDataset":
            continue
        for op in sorted(ancestors(repeat), key=lambda op: op.name):
            names = [argument.name for argument in op.op_def.input_arg]
            if not op.type.startswith("Shuffle") or "seed" not in names:
                continue
            seeds = [tf.get_static_value(op.inputs[names.index(name)]) for name in ("seed", "seed2")]
            if all(seed is not None and int(seed) == 0 for seed in seeds):
                return str(op.name)
    return ""


def _reason(error: Exception) -> str:
    """TensorFlow's message without where in the graph it came from."""
    lines = [line.strip() for line in str(getattr(error, "message", error)).splitlines()]
    noise = re.compile(r"Graph execution error|Detected at|File \"|Node: |\[\[|\(\d+\)|$")
    return next((line for line in lines if not noise.match(line)), type(error).__name__)[:200]
