"""What a party declares before the handshake: the tensors of the exchange, and terms that must be equal."""

from __future__ import annotations

from typing import Any, Literal

import tensorflow.compat.v1 as tf

from efl._task_scope import TaskScope
from efl.errors import ModelError
from efl.transport import TensorSpec


class Exchanged:
    """The tensors that a party sends and receives, and its terms. After ``seal`` (the handshake) nothing is added.

    Attributes:
      terms: By name, JSON values.
    """

    def __init__(self) -> None:
        self.terms: dict[str, Any] = {}
        self._specs: dict[tuple[str, str], TensorSpec] = {}
        self._sealed = self._complete = False

    def complete(self) -> None:
        """The steps of all scopes are built: what came later would be part of none."""
        self._complete = True

    def seal(self, sealed: bool = True) -> None:
        """Tells whether the parties have shaken hands."""
        self._sealed = sealed

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        """All tensors, in an order that does not depend on that of their making."""
        return tuple(self._specs[key] for key in sorted(self._specs))

    def declare(self, term: str, value: Any) -> None:
        """Adds a term.

        Raises:
          ModelError: It was declared with another value, or the handshake is over.
        """
        if term in self.terms and self.terms[term] != value:
            raise ModelError(f"{term} is declared as {self.terms[term]!r} already; cannot be {value!r} too")
        if self._sealed and term not in self.terms:
            raise ModelError(f"{term}: too late, the parties have shaken hands")
        self.terms[term] = value

    def add(
        self,
        direction: Literal["send", "recv"],
        name: str,
        scope: TaskScope,
        dtype: tf.DType,
        shape: tf.TensorShape,
        require_grad: bool,
    ) -> str:
        """Adds a tensor and returns its name on the wire.

        Raises:
          ModelError: Not a name, a name that is taken in this scope and direction, or the handshake is over.
        """
        if not isinstance(name, str) or not name or len(name) > 200 or not name.isprintable():
            raise ModelError(
                f"{name!r}: the name of a sent or received tensor is a text of 1 to 200 printable characters"
            )
        if self._complete:
            raise ModelError(f"{name!r}: too late, the model is compiled; send and receive in loss_fn or eval_fn")
        if self._sealed:
            raise ModelError(f"{name!r}: too late, the parties have shaken hands; make all sends and receives before")
        wire = f"{scope.wire}/{name}"
        if (direction, wire) in self._specs:
            raise ModelError(f"{direction} {name!r} exists already in {scope.wire}: names are unique per task and mode")
        dims = None if shape.rank is None else tuple(shape.as_list())
        mode = "" if scope.mode is None else scope.mode.value
        self._specs[direction, wire] = TensorSpec(
            wire, dtype.base_dtype.name, dims, direction, require_grad, mode, scope.task or ""
        )
        return wire

    def remove(self, direction: Literal["send", "recv"], wire: str) -> None:
        """Takes a tensor back whose op could not be made: the peer must not wait for it."""
        del self._specs[direction, wire]

    def __contains__(self, key: tuple[str, str]) -> bool:
        return key in self._specs

    def names(self, direction: str, scope: TaskScope) -> list[str]:
        """Wire names of what is sent (``"send"``) or received (``"recv"``) in a scope."""
        mode = "" if scope.mode is None else scope.mode.value
        return [
            spec.name
            for (way, _), spec in self._specs.items()
            if way == direction and spec.mode == mode and spec.task == (scope.task or "")
        ]
