"""The frames of an error that are the user's own."""

from __future__ import annotations

import os
import traceback
from types import TracebackType

import tensorflow

_OWN = os.path.dirname(os.path.abspath(__file__)) + os.sep
_TENSORFLOW = os.path.dirname(os.path.abspath(tensorflow.__file__)) + os.sep


def last_user_line(error: BaseException) -> str:
    """``file:line`` of the innermost frame that is neither efl's nor TensorFlow's; empty where there is none."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not os.path.abspath(frame.filename).startswith((_OWN, _TENSORFLOW)):
            return f"{frame.filename}:{frame.lineno}"
    return ""


def without_own(trace: TracebackType | None) -> TracebackType | None:
    """Returns a traceback without efl's frames, and without those of TensorFlow that efl called.

    Between the line that called ``fit`` and the user's function or hook that failed there may be a dozen frames which
    help nobody; of an op that failed, TensorFlow's message itself names the line that made it.
    """
    frames, beneath_own = [], False
    while trace is not None:
        file = os.path.abspath(trace.tb_frame.f_code.co_filename)
        if file.startswith(_OWN):
            beneath_own = True
        elif not (beneath_own and file.startswith(_TENSORFLOW)):
            beneath_own = False
            frames.append(trace)
        trace = trace.tb_next
    kept: TracebackType | None = None
    for frame in reversed(frames):
        kept = TracebackType(kept, frame.tb_frame, frame.tb_lasti, frame.tb_lineno)
    return kept
