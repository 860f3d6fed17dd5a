"""What the rounds need of a channel."""

from __future__ import annotations

from typing import Protocol

import numpy as np


class Channel(Protocol):
    """Messages of one layer in one step, by name, each sent once."""

    def send(self, name: str, array: np.ndarray) -> None:
        """Sends an array; does not wait for the peer."""

    def recv(self, name: str) -> np.ndarray:
        """Waits for the peer's array of that name.

        Raises:
          EflError: The conversation has failed.
        """
