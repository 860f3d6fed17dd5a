"""What a program's output tells about its state, followed line by line: for whom it waits, and why it failed."""

from __future__ import annotations

import re

from efl.settings import ROLES

_ROLE = "|".join(ROLES)
_WAITS = re.compile(rf"(?:^|[\s:])(?:{_ROLE}): waiting for the ({_ROLE})\b")
_MET = re.compile(rf"(?:^|[\s:])(?:{_ROLE}): connected to the (?:{_ROLE})\b")

_TRACEBACK = "Traceback (most recent call last):"
_ERROR = re.compile(r"(?:[^\W\d]\w*\.)*([^\W\d]\w*(?:: .*)?)$")  # as Python writes it: module.Class: message
_LOG_LINE = re.compile(r"\d\d:\d\d:\d\d ")
_MOST_LINES = 8
_MOST_CHARACTERS = 500


class Transcript:
    """Follows the lines of one program.

    Attributes:
      waits_for: The role for which it waits, while it has not been connected yet; None otherwise.
    """

    def __init__(self) -> None:
        self.waits_for: str | None = None
        self._met = False
        self._last = ""
        self._in_frames = False
        self._error: list[str] = []  # its first lines
        self._more = 0  # how many came after those

    def add(self, line: str) -> None:
        """Takes the program's next line."""
        line = line.rstrip()
        self._last = line.strip() or self._last
        if line == _TRACEBACK:
            self._in_frames, self._error, self._more = True, [], 0
            self.waits_for = None
        elif self._in_frames:
            if not line.startswith(" "):
                self._in_frames = False
                error = _ERROR.match(line)
                self._error = [error[1]] if error else []
        elif _LOG_LINE.match(line):
            self._error = []  # the program went on
        elif self._error and len(self._error) < _MOST_LINES:
            self._error.append(line)
        elif self._error:
            self._more += 1
        if _MET.search(line):
            self._met, self.waits_for = True, None
        elif not self._met and (waits := _WAITS.search(line)):
            self.waits_for = waits[1]

    def last_words(self) -> list[str]:
        """The error that ended the program, class and message, or failing that its last line; bounded."""
        lines = list(self._error)
        if self._more:
            lines[-1:] = [f"… ({self._more} more lines)", self._last]
        while lines and not lines[-1]:
            lines.pop()
        lines = lines or [self._last] * bool(self._last)
        return [line if len(line) <= _MOST_CHARACTERS else line[:_MOST_CHARACTERS] + " …" for line in lines]
