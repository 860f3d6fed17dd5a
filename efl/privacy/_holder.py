"""Whoever adds noise for a model: opened when a run begins, asked from inside the graph."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from efl.errors import EflError

if TYPE_CHECKING:
    from efl.privacy.noise import Phase, Releases


class NoiseHolder:
    """Stands in the graph for the releases of the run that is on.

    Attributes:
      error: Why noise could not be added in the step that failed; TensorFlow tells of it only as text.
      conditions: Name of a release -> what the ledger keeps beside it.
    """

    def __init__(self) -> None:
        self._releases: Releases | None = None
        self._folder: Path | None = None
        self.error: EflError | None = None
        self.conditions: dict[str, dict[str, Any]] = {}
        self._phases: list[Phase] = []

    @property
    def releases(self) -> Releases:
        """Of the run; in memory where there is no ``checkpoint_dir``."""
        if self._releases is None:
            self.open(None)
        assert self._releases is not None
        return self._releases

    def open(self, folder: Path | None) -> bool:
        """Opens seed and ledger, unless they are open.

        Args:
          folder: Where they lie; None keeps them in memory, those of this process.

        Returns:
          Whether the seed is new although the ledger is not: what was released before cannot be repeated.

        Raises:
          ConfigError: The seed's file is not as secret as it must be.
          CheckpointError: The ledger is damaged.
        """
        from efl.privacy.noise import Ledger, Releases, Seed

        if self._releases is not None and folder == self._folder:
            return False
        if folder is None:
            self._releases = self._releases or Releases(Seed.fresh(), Ledger.in_memory())
            return False
        ledger = Ledger(folder)
        seed, is_new = Seed.load_or_create(folder / "noise_seed")
        self._releases, self._folder = Releases(seed, ledger), folder
        return is_new and bool(ledger.phases())

    def close(self) -> None:
        """Closes a ledger on disk; it is opened again by the next run."""
        if self._releases is not None and self._folder is not None:
            self._releases.ledger.close()
            self._phases = self._releases.ledger.phases()
            self._releases, self._folder = None, None

    def phases(self) -> list[Phase]:
        """What was released so far, across restarts; of the last run where none is on."""
        return self._phases if self._releases is None else self._releases.ledger.phases()

    def noised(
        self, values: np.ndarray, *, step: int, group: str, clip: float, noise_multiplier: float, rows: int
    ) -> np.ndarray:
        """See ``efl.privacy.noise.Releases.noised``."""
        try:
            return self.releases.noised(
                values,
                step=step,
                group=group,
                clip=clip,
                noise_multiplier=noise_multiplier,
                rows=rows,
                conditions=self.conditions.get(group),
            )
        except EflError as error:
            self.error = error
            raise
