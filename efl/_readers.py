"""The readers behind a program's sample: starting them, starting them over, and what their errors mean.

Readers of efl (``efl.data``) register themselves; iterators of the user's own are found by walking the graph from the
features to their ``IteratorGetNext``.
"""

from __future__ import annotations

import logging
from collections.abc import Container, Iterable
from typing import Any

import tensorflow.compat.v1 as tf
from tensorflow.core.framework import attr_value_pb2

from efl._program import Program, ancestors, feature_tensors
from efl._task_scope import TaskScope
from efl.errors import DataError

_log = logging.getLogger("efl")
READERS = "efl_readers"
_DEPENDENT = ("Placeholder", "VarHandleOp", "Variable", "VariableV2")


def forget(session: tf.Session, keep: Container[TaskScope]) -> None:
    """Puts restored positions back to the start, but those of the readers of some scopes."""
    for reader in tf.get_collection(READERS):
        if reader.scope not in keep:
            reader.forget(session)


def initialize(session: tf.Session, again: bool = False) -> None:
    """Starts every reader whose hook was not added, and iterators of the user's own that nobody started.

    An initializable iterator is started when its data set does not depend on placeholders or variables.

    Args:
      session: Variables are initialised and restored.
      again: The readers have run in this session before, and positions were restored since.
    """
    for reader in tf.get_collection(READERS):
        if again:
            reader.resume(session)
        else:
            reader.initialize_iter(session)
    graph = session.graph
    makers = [op for op in graph.get_operations() if op.type == "MakeIterator" and independent(op)]
    for op in makers:
        session.run(op)


def tables() -> list[tf.Operation]:
    """What starts lookup tables, and iterators that were added to them, but those that ``initialize`` starts.

    Twice would cost seconds where the graph holds the data: TensorFlow prepares the graph anew for each set of fetches.
    """
    added = tf.get_collection(tf.GraphKeys.TABLE_INITIALIZERS)
    return [op for op in added if op.type != "MakeIterator" or not independent(op)]


def independent(maker: tf.Operation) -> bool:
    """Whether efl can run this initializer: it is an iterator's, and needs neither feeding nor variables."""
    handle = maker.inputs[1].op
    if handle.type not in ("IteratorV2", "Iterator"):
        return False
    return not any(op.type in _DEPENDENT for op in ancestors(maker.inputs[0].op))


def own(program: Program) -> list[Any]:
    """The efl readers that belong to a program."""
    return [reader for reader in tf.get_collection(READERS) if reader.scope == program.scope]


def open_one_shots(session: tf.Session, program: Program) -> None:
    """Makes the one-shot iterators of a program, outside of its steps.

    One that is made by a step which the peer's end cancels keeps that error, and can never be read again.
    """
    if program.one_shots is None:
        handles = () if program.sample is None else iterators_of(program)
        program.one_shots = [handle for handle in handles if handle.type == "OneShotIterator"]
    if program.one_shots:
        session.run(program.one_shots)


def restart(session: tf.Session, program: Program) -> None:
    """Begins a program's data again, after its end."""
    readers = own(program)
    for reader in readers:
        reader.restart(session)
    if readers or program.sample is None:
        return
    for handle in iterators_of(program):
        op = _restart_op(session.graph, handle)
        if op is None:
            _log.warning(
                "%s: the data of this task and mode ended, and its iterator %s cannot be started over (its data set is "
                "fed); further runs will find no data",
                program.scope,
                handle.name,
            )
        else:
            session.run(op)


def shared(programs: Iterable[Program]) -> dict[TaskScope, str]:
    """Scope -> an iterator that samples of another scope are read from too, so that its rows pass by this one."""
    readers: dict[str, list[TaskScope]] = {}
    for program in programs:
        for handle in () if program.sample is None else iterators_of(program):
            readers.setdefault(handle.name, []).append(program.scope)
    return {scope: name for name, scopes in readers.items() if len(scopes) > 1 for scope in scopes}


def iterators_of(program: Program) -> set[tf.Operation]:
    """The iterators that a program's features come from."""
    tensors = feature_tensors(program.sample)
    return {op.inputs[0].op for op in ancestors(*(t.op for t in tensors)) if op.type.startswith("IteratorGetNext")}


def _restart_op(graph: tf.Graph, handle: tf.Operation) -> tf.Operation | None:
    name = f"efl_restart/{handle.name}"
    try:
        return graph.get_operation_by_name(name)
    except KeyError:
        pass
    with graph.as_default():
        if handle.type == "OneShotIterator":
            # The data set of a one-shot iterator is a function of the graph: call it again, into the same iterator.
            listed = attr_value_pb2.AttrValue.ListValue
            attrs = {
                "Tin": attr_value_pb2.AttrValue(list=listed()),
                "Tout": attr_value_pb2.AttrValue(list=listed(type=[tf.variant.as_datatype_enum])),
                "f": attr_value_pb2.AttrValue(func=handle.get_attr("dataset_factory")),
            }
            made = graph.create_op("StatefulPartitionedCall", [], [tf.variant], name=f"{name}/data", attrs=attrs)
            return tf.raw_ops.MakeIterator(dataset=made.outputs[0], iterator=handle.outputs[0], name=name)
    for consumer in handle.outputs[0].consumers():
        if consumer.type == "MakeIterator" and independent(consumer):
            return consumer
    return None


def raise_if_explained(program: Program, error: Exception) -> None:
    """Raises what a step's failure means where one of the program's readers caused it."""
    for reader in own(program):
        explained = reader.explain(error)
        if explained is not None:
            raise explained


def raise_unless_end(program: Program, error: Exception, who: str) -> None:
    """Returns where a step's failure means that this party's data ended; raises what it means otherwise."""
    if isinstance(error, (tf.errors.OutOfRangeError, StopIteration)):
        return
    if isinstance(error, tf.errors.DataLossError):
        raise DataError(f"{who} read damaged data in {program.scope}: {error.message}")
    raise error
