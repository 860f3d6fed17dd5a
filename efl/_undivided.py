"""Gradients that go back to the peer, divided by the batch or not, as the peer needs them.

Where losses are averaged over a batch, the gradient of a row is divided by the number of rows. To a peer that clips the
gradient of each row (differential privacy) it must come undivided: row i the gradient of example i's own loss. The
parties say in the handshake who needs that, and who can give it; the graph is built for both.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow.compat.v1 as tf

from efl._gradients import OptConfig, Sent, is_private
from efl._program import Program
from efl._task_scope import TaskScope
from efl.errors import ModelError

_log = logging.getLogger("efl")


class Undivided:
    """What one party needs and gives, by training scope.

    Attributes:
      wanted: Scope on the wire -> this party clips the gradients that come back, row by row.
      given: Scope on the wire -> "", or why this party cannot give gradients row by row.
    """

    def __init__(self) -> None:
        self.wanted: dict[str, bool] = {}
        self.given: dict[str, str] = {}
        self._flags: dict[str, tf.Variable] = {}

    def note(
        self, program: Program, sent: Sequence[Sent], received: Sequence[tuple[str, tf.Tensor]], config: OptConfig
    ) -> None:
        """Notes what a compiled training program needs and gives. Its optimizers are known."""
        wire = program.scope.wire
        private = any(map(is_private, program.optimizers))
        if sent:
            self.wanted[wire] = private
        if received:
            self.given[wire] = "" if private else _why_not_by_row(program, received, config)

    def as_wanted(
        self, scope: TaskScope, program: Program, gradient: tf.Tensor, undivided: bool, config: OptConfig
    ) -> tf.Tensor:
        """A gradient in the form that the peer needs.

        Args:
          scope: Of the step.
          program: Its program; the loss is built.
          gradient: ``[B, …]``.
          undivided: Whether it is the one of each row's own loss, rather than of the reduced loss.
          config: How the loss is reduced.
        """
        if config.reduce != "mean" or gradient.shape.rank == 0:
            return gradient  # a sum is not divided by anything
        if not undivided and program.loss is not None and not _is_vector(program):
            return gradient  # nobody knows what a scalar was divided by
        flag = self._flag(scope.wire)
        rows = tf.cast(tf.shape(gradient)[0], gradient.dtype)
        one = tf.ones([], gradient.dtype)
        factor = tf.where(flag, one, 1 / rows) if undivided else tf.where(flag, rows, one)
        return gradient * factor

    def _flag(self, wire: str) -> tf.Tensor:
        if wire not in self._flags:
            # In no collection: it belongs to the conversation with the peer, not to the model.
            name = tf.get_default_graph().unique_name("efl_peer_wants_undivided")
            self._flags[wire] = tf.get_variable(
                name, initializer=False, trainable=False, collections=[], use_resource=True
            )
        return self._flags[wire].read_value()

    def apply(self, session: tf.Session, peer_wants: Mapping[str, bool]) -> None:
        """Sets the graph to what the peer said that it needs."""
        for wire, flag in self._flags.items():
            session.run(flag.initializer)
            if peer_wants.get(wire, False):
                flag.load(True, session)


def impossible(mine: Any, peer: Any, role: str, peer_role: str) -> list[str]:
    """Where one party needs gradients row by row that the other cannot give.

    Args:
      mine: This party's facts (``wanted`` and ``given`` as in ``Undivided``).
      peer: The peer's.
      role: This party's.
      peer_role: The peer's.
    """
    found = []
    both = ((role, mine, peer_role, peer), (peer_role, peer, role, mine))
    for who, wants, other, gives in sorted(both, key=lambda pair: pair[0]):
        for wire in sorted(wants.wanted):
            why = gives.given.get(wire, "")
            if wants.wanted[wire] and why:
                found.append(
                    f"gradients of {wire}: {who} trains with differential privacy and clips the gradient of each row, "
                    f"which {other} cannot return: {why}"
                )
    return found


def _is_vector(program: Program) -> bool:
    return program.loss_given is not None and bool(program.loss_given.shape.rank)


def _why_not_by_row(program: Program, received: Sequence[tuple[str, tf.Tensor]], config: OptConfig) -> str:
    """ "" where the loss of a row is known to depend on that row alone."""
    if program.loss is None:
        return ""  # its own gradients come from the peer, row by row
    if not _is_vector(program):
        return "its loss_fn returns a scalar; it must return the loss of each row, as a vector (REDUCE then reduces it)"
    if callable(config.reduce):
        return "REDUCE of its opt_config is a function; expected 'mean' or 'sum'"
    from efl.privacy import per_example

    given = program.loss_given
    assert given is not None and given.shape.rank
    rows = given if given.shape.rank == 1 else tf.reduce_mean(given, list(range(1, given.shape.rank)))
    try:
        per_example.check(per_example.Objective(rows, received=received))
    except ModelError as error:
        _log.debug("gradients of single rows: %s", error)
        return "what its loss is for one row depends on other rows, or on operations of which efl does not know that"
    except Exception as error:  # an op of a form that the rules do not expect must not stop ordinary training
        _log.warning("gradients of single rows cannot be told apart: %r", error)
        return "efl cannot tell what its loss is for one row"
    return ""
