"""An error that ends a program between its calls of efl: the peer, which may be waiting for it, is told."""

from __future__ import annotations

import sys
import weakref
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from efl.federal_model import FederalModel

_MARK = "_efl_tells_peers"
_models: weakref.WeakSet[FederalModel] = weakref.WeakSet()


def tell_peer_of(model: FederalModel) -> None:
    """From now on an uncaught error of this program is told to the model's peer, unless it knows of one already."""
    _models.add(model)
    # Not atexit: the interpreter starts no threads by then, and a connection needs some.
    if not hasattr(sys.excepthook, _MARK):
        before = sys.excepthook

        def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
            try:
                if isinstance(error, Exception):
                    for known in list(_models):
                        known._program_failed(error)
            finally:
                before(kind, error, trace)  # the last that is seen

        setattr(hook, _MARK, True)
        sys.excepthook = hook
