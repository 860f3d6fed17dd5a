"""What TensorFlow says, at every start, of the machine and of its own version 1 API; told line by line."""

from __future__ import annotations

import re

# Written before TensorFlow has read its log level (TF_CPP_MIN_LOG_LEVEL).
_MACHINE_NOTE = re.compile(
    r"WARNING: All log messages before absl::InitializeLog\(\)"
    r"|(?:[IWE]\d{4} |\d{4}-\d\d-\d\d ).*\b(?:port|cudart_stub|cuda_platform|cpu_feature_guard)\.cc:\d+\]"
    r"|To enable the following instructions: .*rebuild TensorFlow"
)
# Logged by Python, as several lines, once for each function of the version 1 API that a script calls.
_DEPRECATION = re.compile(
    r"WARNING:tensorflow:From .*: (?:calling )?\S+ \(from (?:tensorflow|tf_keras|keras)\.\S+\) (?:with .* )?"
    r"is deprecated and will be removed "
)
_UPDATING = "Instructions for updating:"


class Noise:
    """Tells TensorFlow's notes from other lines. One for each program, which is given all its lines in order."""

    def __init__(self) -> None:
        self._before = ""  # the part of a deprecation warning that the line before was

    def is_noise(self, line: str) -> bool:
        """Whether the program's next line is a note on the machine, or part of a warning of deprecation."""
        before, self._before = self._before, ""
        if before == "head" and line == _UPDATING:
            self._before = "updating"
        elif before == "updating" or (before == "advice" and line.startswith("    ")):
            self._before = "advice"  # a line; where there are more of it, they are indented
        elif _DEPRECATION.match(line):
            self._before = "head"
        else:
            return _MACHINE_NOTE.match(line) is not None
        return True
