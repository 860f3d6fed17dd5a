"""Where efl's log lines go when the user's script has not said so."""

from __future__ import annotations

import logging
import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_log = logging.getLogger("efl")


class _ConsoleHandler(logging.Handler):
    """Prints above a progress bar where there is one."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console
        self.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))

    def emit(self, record: logging.LogRecord) -> None:
        self.console.print(self.format(record), markup=False, highlight=False, soft_wrap=True)


def console() -> Console:
    """The console of this process's log lines; makes them visible unless the script configured logging itself."""
    for handler in _log.handlers:
        if isinstance(handler, _ConsoleHandler):
            return handler.console
    made = Console(file=sys.stdout, force_terminal=None)
    if not _log.handlers and not logging.getLogger().handlers:
        _log.addHandler(_ConsoleHandler(made))
        _log.propagate = False
        if _log.level == logging.NOTSET:
            _log.setLevel(logging.INFO)
    return made


def progress_bar(target: Console) -> Progress | None:
    """A progress bar with the time left, on a terminal; None elsewhere."""
    if not target.is_terminal:
        return None
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=target,
        transient=True,
    )
