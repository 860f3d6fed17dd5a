"""Ctrl-C that a line of the log has told needs no traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import TracebackType
from typing import TypeAlias

_Hook: TypeAlias = Callable[[type[BaseException], BaseException, TracebackType | None], object]
_TOLD = "_efl_told"


def told(error: KeyboardInterrupt) -> KeyboardInterrupt:
    """Returns an interruption, to be raised again, of which the log has told.

    Where nothing catches it, Python prints no traceback, and ends as it ends any interrupted program: a shell sees the
    exit code 130. Of another one Python prints what it always prints.
    """
    setattr(error, _TOLD, True)
    if not hasattr(sys.excepthook, _TOLD):
        sys.excepthook = _silent_about_told(sys.excepthook)
    return error.with_traceback(None)


def _silent_about_told(before: _Hook) -> _Hook:
    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not hasattr(error, _TOLD):
            before(kind, error, trace)

    setattr(hook, _TOLD, True)
    return hook
