"""Which task, and which mode of it, the code being run builds or executes.

A *task scope* is the pair (mode, task). Models with one task leave ``task`` at ``None``. Everything efl counts or
addresses (steps, messages, hooks, metrics) is kept apart by scope.

    with efl.task_scope(mode=efl.MODE.EVAL, task="ctr"):
        ...  # sends, receives, metrics and hooks made here belong to the evaluation of "ctr"
"""

from __future__ import annotations

import contextlib
import contextvars
import enum
import re
from collections.abc import Iterator
from dataclasses import dataclass

from efl.errors import ModelError

_TASK_NAME = re.compile(r"[A-Za-z0-9_.\-]{1,64}")


class MODE(enum.Enum):
    """What a graph or a step is for: ``MODE.TRAIN`` or ``MODE.EVAL``."""

    TRAIN = "train"
    EVAL = "eval"


@dataclass(frozen=True)
class TaskScope:
    """A (mode, task) pair; either may be ``None`` outside any scope.

    Attributes:
      mode: ``MODE.TRAIN``, ``MODE.EVAL`` or ``None``.
      task: The task's name (letters, digits, ``_ . -``, at most 64), or ``None`` where there is only one task.

    Raises:
      ModelError: ``mode`` is not a ``MODE`` or ``task`` is not a name.
    """

    mode: MODE | None = None
    task: str | None = None

    def __post_init__(self) -> None:
        if self.mode is not None and not isinstance(self.mode, MODE):
            raise ModelError(f"mode={self.mode!r}: expected efl.MODE.TRAIN or efl.MODE.EVAL")
        if self.task is not None and not (isinstance(self.task, str) and _TASK_NAME.fullmatch(self.task)):
            raise ModelError(f"task={self.task!r}: expected None or a name of 1 to 64 letters, digits, '_', '.' or '-'")

    @property
    def wire(self) -> str:
        """The prefix of this scope's message names: ``"train"``, ``"eval"``, ``"train:ctr"``."""
        mode = "run" if self.mode is None else self.mode.value
        return mode if self.task is None else f"{mode}:{self.task}"

    def __str__(self) -> str:
        return self.wire


_current: contextvars.ContextVar[TaskScope] = contextvars.ContextVar("efl_task_scope", default=TaskScope())


@contextlib.contextmanager
def task_scope(mode: MODE | None = None, task: str | None = None) -> Iterator[TaskScope]:
    """Makes ``TaskScope(mode, task)`` current inside a ``with`` block.

    Args:
      mode: ``MODE.TRAIN`` or ``MODE.EVAL``.
      task: The task's name, ``None`` where there is only one.

    Yields:
      The new current scope. The previous one is restored on leaving.

    Raises:
      ModelError: ``mode`` or ``task`` is not valid.
    """
    token = _current.set(TaskScope(mode, task))
    try:
        yield _current.get()
    finally:
        _current.reset(token)


def current_task_scope() -> TaskScope:
    """Returns the current ``TaskScope``; outside any, the one whose mode and task are ``None``."""
    return _current.get()
