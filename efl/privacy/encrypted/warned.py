"""What users of encrypted layers are warned of."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

_OWN = Path(__file__).parents[2]


class PrivacyWarning(RuntimeWarning):
    """A layer protects less than its name may promise."""


def warn(text: str) -> None:
    """Warns of something in the user's own line: the first one that is not efl's."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and Path(frame.f_code.co_filename).is_relative_to(_OWN):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, PrivacyWarning, stacklevel=level)


def warn_of_elementwise() -> None:
    """Whoever uses the elementwise layer is told what it cannot hide."""
    warn(
        "an encrypted layer that multiplies each column by one weight cannot hide the columns from the leader: what it "
        "computes with is x∘w, so each column of the follower's x is hidden by one unknown factor only (near "
        "one), and no row of it. EncryptActiveDense and EncryptPassiveDense show the leader a projection under weights "
        "that nobody knows"
    )


def warn_of_ignored(**arguments: Any) -> None:
    """Arguments that scripts pass, and that change nothing."""
    given = [f"{name}={value!r:.60}" for name, value in arguments.items()]
    if given:
        warn(
            f"{', '.join(given)}: changes nothing here. Masks and shares are always drawn afresh, by the operating "
            "system's generator; with noise that stays the same every batch could be read"
        )
