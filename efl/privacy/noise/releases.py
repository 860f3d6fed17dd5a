"""Values with noise added, keyed by what they are and entered in the ledger before they leave."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from efl.errors import ConfigError
from efl.privacy.noise.ledger import Ledger
from efl.privacy.noise.seed import Seed
from efl.privacy.noise.stream import gaussian


class Releases:
    """Adds noise. May be called from any thread.

    The noise of a release follows from the secret seed and *everything* that the release is made of: group, step, clip,
    multiplier, and the values themselves. So a step that is taken again after a recovery, with the same values, gets
    the same noise: it tells nothing new, and is counted once. Were the noise to follow from the step alone, a peer that
    makes us repeat a step with another activation would subtract the two answers and have their exact difference.
    """

    def __init__(self, seed: Seed, ledger: Ledger) -> None:
        """Args:
        seed: The secret.
        ledger: Where releases are entered.
        """
        self._seed, self.ledger = seed, ledger

    def noised(
        self,
        values: np.ndarray,
        *,
        step: int,
        group: str,
        clip: float,
        noise_multiplier: float,
        rows: int,
        conditions: Mapping[str, Any] | None = None,
    ) -> np.ndarray:
        """Adds Gaussian noise of standard deviation ``clip * noise_multiplier``.

        Args:
          values: float32 or float64, whose sensitivity is ``clip``.
          step: Training step.
          group: Names what is released.
          clip: The largest norm of what one example contributes.
          noise_multiplier: 0 adds nothing, which the ledger shows.
          rows: Rows of the batch.
          conditions: JSON values that the ledger keeps beside the release (batch size, number of examples, …).

        Returns:
          An array of the same dtype and shape.

        Raises:
          ConfigError: A dtype that has no noise.
          CheckpointError: The ledger cannot be written; nothing may leave then.
        """
        if values.dtype not in (np.float32, np.float64):
            raise ConfigError(f"noise for {values.dtype} ({group}): expected float32 or float64")
        held = np.ascontiguousarray(values)
        what = json.dumps([group, step, clip, noise_multiplier, rows, held.dtype.str, held.shape]).encode()
        key = self._seed.key(
            b"efl noise", len(what).to_bytes(8, "little"), what, held.data.cast("B") if held.size else b""
        )
        digest = self._seed.key(b"efl ledger", key)[:16]
        terms = {**(conditions or {}), "group": group, "clip": clip, "noise_multiplier": noise_multiplier}
        self.ledger.enter(terms, step, rows, digest)
        if noise_multiplier == 0.0:
            return held
        noise = gaussian(key, held.size)
        noise *= clip * noise_multiplier
        noise += held.reshape(-1)  # in double precision; see stream
        return noise.astype(held.dtype).reshape(held.shape)
