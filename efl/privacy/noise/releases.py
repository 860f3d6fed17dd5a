"""Values with noise added, which is fresh for each release, and entered in the ledger before they leave."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from efl.errors import ConfigError
from efl.privacy.noise.ahead import Ahead
from efl.privacy.noise.ledger import Ledger
from efl.privacy.noise.seed import Seed
from efl.privacy.noise.stream import on_grid


class Releases:
    """Adds noise. May be called from any thread.

    Every release has noise of its own: the key of its draw follows from the secret seed, a random name that each
    process gives its stream, and a number that is counted up in it. No two draws share a key, whatever is lost or
    rolled back.

    With one exception: a release that is identical to an earlier one (same group, step, clip, multiplier, rows and
    *values*, compared by a digest under the seed) gets the noise that the earlier one had, which the ledger knows. So a
    step that is taken again after a recovery tells nothing new, and is counted once. Were noise to follow from the step
    alone, a peer that makes us repeat a step with another activation would subtract the two answers and have their
    exact difference. Were it to follow from the digest, it could not be drawn before the values are there.
    """

    def __init__(self, seed: Seed, ledger: Ledger) -> None:
        """Args:
        seed: The secret.
        ledger: Where releases are entered.
        """
        self._seed, self.ledger = seed, ledger
        self._ahead = Ahead(lambda stream, number: seed.key(b"efl noise", stream, number.to_bytes(8, "little")))
        self._tag = AESGCM(seed.key(b"efl tag"))

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
          An array of the same dtype and shape, on a grid of steps of 2**-10 to 2**-9 of that deviation.

        Raises:
          ConfigError: A dtype that has no noise.
          CheckpointError: The ledger cannot be written; nothing may leave then.
        """
        if values.dtype not in (np.float32, np.float64):
            raise ConfigError(f"noise for {values.dtype} ({group}): expected float32 or float64")
        held = np.ascontiguousarray(values)
        what = json.dumps([group, step, clip, noise_multiplier, rows, held.dtype.str, held.shape]).encode()
        terms = {**(conditions or {}), "group": group, "clip": clip, "noise_multiplier": noise_multiplier}
        drawn = self.ledger.enter(terms, step, rows, self._digest(what, held), self._ahead.next())
        deviation = clip * noise_multiplier
        if deviation == 0.0:
            return held
        noise = self._ahead.take(drawn, held.size, group)
        noise *= deviation
        noise += held.reshape(-1)
        # Rounded in double precision, to what no input of the same deviation could not give; see stream.
        out = on_grid(noise, deviation).astype(held.dtype).reshape(held.shape)
        self._ahead.begin(group)  # not before: both would wait for each other's interpreter
        return out

    def _digest(self, what: bytes, values: np.ndarray) -> bytes:
        """16 bytes that are equal for equal releases only, and tell nothing to whoever does not know the seed."""
        # A universal hash under a secret key is enough, and the fastest that there is; its tag stays secret.
        tag = self._tag.encrypt(bytes(12), b"", values.data.cast("B") if values.size else b"")
        return self._seed.key(b"efl ledger", tag, what)[:16]
