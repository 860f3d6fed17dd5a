"""Values with noise added, which is fresh for each release, and entered in the ledger before they leave."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from efl.errors import ConfigError
from efl.privacy.noise.ahead import Ahead
from efl.privacy.noise.ledger import Ledger
from efl.privacy.noise.pool import Pool
from efl.privacy.noise.seed import Seed
from efl.privacy.noise.stream import VERSION, on_grid

LEAST_STEPS = 16  # of a grid, in the noise of rows of tables
_AT_ONCE = 1 << 18  # numbers, so that noise for a large table needs little room


@dataclass(frozen=True)
class Rows:
    """The end of what is released: sums of single rows of tables, which are to become updates on a grid.

    Attributes:
      start: Where they begin.
      scale: By what sum and noise are multiplied.
      step: Of the grid.
    """

    start: int
    scale: float
    step: float


class Releases:
    """Adds noise. May be called from any thread.

    Every release has noise of its own: the key of its draw follows from the secret seed, a random name that each
    process gives its stream, and a number that is counted up in it. No two draws share a key, whatever is lost or
    rolled back.

    With one exception: a release that is identical to an earlier one (same group, step, clip, multiplier, rows,
    stretch of the input and *values*, compared by a digest under the seed) gets the noise that the earlier one had,
    which the ledger knows. So a step that is taken again after a recovery tells nothing new, and is counted once. Were
    noise to follow from the step alone, a peer that makes us repeat a step with another activation would subtract the
    two answers and have their exact difference. Were it to follow from the digest, it could not be drawn before the
    values are there.
    """

    def __init__(self, seed: Seed, ledger: Ledger) -> None:
        """Args:
        seed: The secret.
        ledger: Where releases are entered.
        """
        self._seed, self.ledger = seed, ledger
        self._ahead = Ahead(lambda stream, number: seed.key(b"efl noise", stream, number.to_bytes(8, "little")))
        self._pool = Pool(lambda name, number: seed.key(b"efl noise pool", name, number.to_bytes(8, "little")))
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
        tables: Rows | None = None,
        beside: bytes = b"",
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
          tables: What of the values are rows of tables whose other rows are noised later. Such a release is never
            taken for a replay: the noise of the rows that it does not hold would not be the same.
          beside: A digest of what else has to be the same in a replay.

        Returns:
          An array of the same dtype and shape, on a grid of steps of 2**-10 to 2**-9 of that deviation.

        Raises:
          ConfigError: A dtype that has no noise.
          CheckpointError: The ledger cannot be written; nothing may leave then.
        """
        if values.dtype not in (np.float32, np.float64):
            raise ConfigError(f"noise for {values.dtype} ({group}): expected float32 or float64")
        held = np.ascontiguousarray(values)
        # Only within a stretch of steps in which the input was read on and on is a step again about the same rows.
        stretch = (conditions or {}).get("stretch")
        what = [VERSION, group, step, clip, noise_multiplier, rows, held.dtype.str, held.shape, beside.hex(), stretch]
        terms = {**(conditions or {}), "group": group, "clip": clip, "noise_multiplier": noise_multiplier}
        # Evaluation takes one step after the other of the same number: nothing there is a step that is taken again.
        repeatable = tables is None and not terms.get("in_each")
        digest = self._digest(json.dumps(what).encode(), held) if repeatable else os.urandom(16)
        drawn = self.ledger.enter(terms, step, rows, digest, self._ahead.next())
        deviation = clip * noise_multiplier
        if tables is not None and 0.0 < abs(tables.scale) * deviation < LEAST_STEPS * tables.step:
            # Rounding would be larger than noise: rows that the step read would stay where they are, others move.
            raise ConfigError(
                f"{group}: the learning rate has become so small that the noise of a step is "
                f"{abs(tables.scale) * deviation / tables.step:.2g} steps of the grid on which embedding rows lie, "
                f"expected at least {LEAST_STEPS}: set opt_config={{'DEFER_NOISE': False}}, which noises whole tables "
                "in every step, or begin with a rate that is nearer to the smallest"
            )
        if deviation == 0.0:
            return held
        whole = held.size if tables is None else tables.start
        noise = self._ahead.take(drawn, whole, group)
        noise *= deviation
        noise += held.reshape(-1)[:whole]
        # Rounded in double precision, to what no input of the same deviation could not give; see stream.
        out = on_grid(noise, deviation).astype(held.dtype)
        if tables is not None:
            out = np.concatenate([out, self._rows(held[whole:], deviation, tables)])
        self._ahead.begin(group)  # not before: both would wait for each other's interpreter
        return out.reshape(held.shape)

    def _rows(self, sums: np.ndarray, deviation: float, tables: Rows) -> np.ndarray:
        noise = self._pool.take(sums.size)
        noise *= deviation
        noise += sums
        noise *= tables.scale / tables.step
        return _on_steps(noise, tables.step, np.empty(sums.size, sums.dtype))

    def overdue(self, deviations: np.ndarray, widths: np.ndarray, step: float) -> np.ndarray:
        """Noise that rows of tables are owed for steps in which they took no part.

        Those steps are in the ledger, for what they released was noise added to the whole table.

        Args:
          deviations: float64 ``[R]``, of each row's numbers: the root of the sum over steps of the variance of noise
            and of rounding to the grid.
          widths: ``[R]``, how many numbers a row has.
          step: Of the grid.

        Returns:
          float32 ``[sum of widths]``, on the grid, of fresh noise.
        """
        # It is rounded once, which adds its own variance.
        each = np.sqrt(np.maximum(np.square(deviations) - (deviations > 0) * step**2 / 12, 0.0)) / step
        out = np.empty(int(widths.sum()), np.float32)
        ends = np.cumsum(widths)
        alike = int(widths[0]) if len(widths) and (widths == widths[0]).all() else 0
        first = 0
        while first < len(each):
            begin = int(ends[first] - widths[first])
            last = max(first + 1, int(np.searchsorted(ends, begin + _AT_ONCE, side="right")))
            noise = self._pool.take(int(ends[last - 1]) - begin)
            if alike:  # which numpy does several times as fast
                noise.reshape(-1, alike)[:] *= each[first:last, np.newaxis]
            else:
                noise *= np.repeat(each[first:last], widths[first:last])
            _on_steps(noise, step, out[begin : begin + noise.size])
            first = last
        return out

    def secret(self, *purpose: bytes) -> bytes:
        """32 bytes that follow from the seed, for a purpose other than noise."""
        return self._seed.key(b"efl secret", *purpose)

    def _digest(self, what: bytes, values: np.ndarray) -> bytes:
        """16 bytes that are equal for equal releases only, and tell nothing to whoever does not know the seed."""
        # A universal hash under a secret key is enough, and the fastest that there is; its tag stays secret.
        tag = self._tag.encrypt(bytes(12), b"", values.data.cast("B") if values.size else b"")
        return self._seed.key(b"efl ledger", tag, what)[:16]


def _on_steps(steps: np.ndarray, step: float, out: np.ndarray) -> np.ndarray:
    """Rounds numbers of steps, in place, and writes what they stand for, which float32 holds exactly. Returns it."""
    np.rint(steps, out=steps)
    return np.multiply(steps, step, out=out, casting="same_kind")
