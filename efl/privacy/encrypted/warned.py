"""What users of encrypted layers are warned of."""

from __future__ import annotations

import warnings
from typing import Any


class PrivacyWarning(RuntimeWarning):
    """A layer protects less than its name may promise."""


def warn(text: str, depth: int = 3) -> None:
    """Warns of something in the user's own line."""
    warnings.warn(text, PrivacyWarning, stacklevel=depth + 1)


def warn_of_elementwise(depth: int = 3) -> None:
    """Whoever uses the elementwise layer is told what it cannot hide."""
    warn(
        "an encrypted layer that multiplies each column by one weight cannot hide the columns from the leader: what it "
        "computes with is x∘w, so each column of the follower's x is hidden by one unknown factor only (near "
        "one), and no row of it. EncryptActiveDense and EncryptPassiveDense show the leader a projection under weights "
        "that nobody knows",
        depth + 1,
    )


def warn_of_ignored(depth: int = 3, **arguments: Any) -> None:
    """Arguments that scripts pass, and that change nothing."""
    given = [f"{name}={value!r:.60}" for name, value in arguments.items()]
    if given:
        warn(
            f"{', '.join(given)}: changes nothing here. Masks and shares are always drawn afresh, by the operating "
            "system's generator; with noise that stays the same every batch could be read",
            depth + 1,
        )
