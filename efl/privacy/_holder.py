"""Whoever adds noise and randomises labels for a model: opened when a run begins, asked from inside the graph."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from efl.errors import ConfigError, EflError, ModelError

if TYPE_CHECKING:
    from efl._task_scope import TaskScope
    from efl.privacy._deferred import Deferred
    from efl.privacy.noise import Labels, Phase, Question, Releases
    from efl.privacy.noise.releases import Rows


class NoiseHolder:
    """Stands in the graph for the releases of the run that is on.

    Attributes:
      error: Why noise could not be added in the step that failed; TensorFlow tells of it only as text.
      conditions: Name of a release -> what the ledger keeps beside it.
      deferred: Tables whose noise waits for whoever reads them.
      counts: Name of a release -> counts the examples, where that is known only when the data are being read.
    """

    def __init__(self) -> None:
        self._releases: Releases | None = None
        self._labels: Labels | None = None
        self._folder: Path | None = None
        self.error: EflError | None = None
        self.conditions: dict[str, dict[str, Any]] = {}
        self.counts: dict[str, Callable[[], int]] = {}
        self.deferred: list[Deferred] = []
        self._phases: list[Phase] = []
        self._broken_off = 0
        self._talking = 0
        self._begun_anew: set[str] = set()  # scopes, while no ledger was open

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
          CheckpointError: The ledger is damaged, or another process has it.
        """
        from efl.privacy.noise import LABEL, Labels, Ledger, Releases, Seed, carry

        self.error = None
        if self._releases is not None and folder == self._folder:
            return False
        if folder != self._folder and any(phase.terms.get("kind") != LABEL for phase in self.phases()):
            # What was spent would be counted by nobody: the rows and the weights go on, the ledger stays where it is.
            where = "in this process, without a checkpoint_dir" if self._folder is None else f"in {self._folder}"
            raise ConfigError(
                f"this model has released something with noise, and its ledger lies {where}: give every fit of a "
                "private model the same checkpoint_dir"
            )
        if folder is None:
            if self._releases is None:
                seed, ledger = Seed.fresh(), Ledger.in_memory()
                self._releases, self._labels = Releases(seed, ledger), Labels(seed, ledger, None)
            return False
        ledger = Ledger(folder)
        try:
            seed, is_new = Seed.load_or_create(folder / "noise_seed")
            begins_anew = is_new and bool(ledger.phases())
            carry(self.phases(), ledger)  # labels that an earlier fit of this process released under a seed of its own
            releases, labels = Releases(seed, ledger), Labels(seed, ledger, folder)
        except BaseException:
            ledger.close()  # another process may mend it
            raise
        self._releases, self._labels, self._folder = releases, labels, folder
        return begins_anew

    def close(self) -> None:
        """Closes a ledger on disk; it is opened again by the next run."""
        if self._releases is not None and self._folder is not None:
            self._releases.ledger.close()
            if self._labels is not None:
                self._labels.close()
            self._phases, self._broken_off = self._releases.ledger.phases(), self.broken_off
            self._releases, self._labels = None, None

    def mark(self) -> dict[str, Any] | None:
        """See ``efl.privacy.noise.Ledger``; None where none is open on disk."""
        return None if self._releases is None else self._releases.ledger.mark()

    def lacks(self, mark: Mapping[str, Any]) -> str:
        """See ``efl.privacy.noise.Ledger``; "" where none is open."""
        return "" if self._releases is None else self._releases.ledger.lacks(mark)

    def phases(self) -> list[Phase]:
        """What was released so far, across restarts; of the last run where none is on."""
        return self._phases if self._releases is None else self._releases.ledger.phases()

    def conversation_begun(self) -> None:
        """See ``efl.privacy.noise.Ledger``; nothing where this run releases nothing."""
        if self._releases is not None:
            self._releases.ledger.conversation_begun()
            self._talking = 1

    def conversation_ended(self, well: bool) -> None:
        """See ``efl.privacy.noise.Ledger``; one that did not end well counts as broken off from now on."""
        if self._releases is not None and self._talking and well:
            self._releases.ledger.conversation_ended()
        self._talking = 0

    @property
    def broken_off(self) -> int:
        """See ``efl.privacy.noise.Ledger``; without the conversation that goes on now."""
        return self._broken_off if self._releases is None else max(0, self._releases.ledger.broken_off - self._talking)

    def note_shared(self, iterators: Mapping[TaskScope, str]) -> None:
        """Notes training scopes whose iterator another scope reads too: what a step does not see, nobody counts."""
        for scope, name in iterators.items():
            for group, conditions in self.conditions.items():
                if group.split("/")[0] == scope.wire and "batch_size" in conditions:
                    conditions.setdefault(
                        "comes_again",
                        f"{name} is read by another task or mode too, so a pass over the data takes fewer steps than "
                        "it seems: give each an iterator of its own",
                    )

    def input_begins(self, scope: str, anew: bool, step: int, reordered: bool = False) -> None:
        """Notes where the input of a training scope stands when a run begins.

        How often a row takes part is counted in stretches of steps in which the input was read on and on. Only within
        one is a step that is taken again about the same rows.

        Args:
          scope: As it travels.
          anew: Whether the input begins with its first row, as one does whose position no checkpoint holds.
          step: Steps that are behind the run.
          reordered: Whether it goes on, but in another order from the next pass on than it had before: then a step that
            is taken again may be about other rows.
        """
        from efl.privacy.noise import LABEL

        if self._releases is None:
            if anew:  # before a run that trains: what that one reads is then where this one has left it
                self._begun_anew.add(scope)
            return
        anew = anew or scope in self._begun_anew
        self._begun_anew.discard(scope)
        self._releases.ledger.rest()
        known = self.phases()
        for group, conditions in self.conditions.items():
            if group.split("/")[0] != scope or conditions.get("kind") == LABEL:
                continue
            phases = [phase for phase in known if phase.terms["group"] == group and "stretch" in phase.terms]
            # Of this process, if it has begun one; else that of the last release.
            stretch = conditions.get("stretch") or (phases[-1].terms["stretch"] if phases else None)
            held = [phase for phase in phases if phase.terms["stretch"] == stretch]
            begun = min((phase.first_step or 0 for phase in held), default=step)
            if stretch is None or anew or step < begun or (reordered and step > 0):
                conditions |= {"stretch": secrets.token_hex(4), "inside": not anew}
            elif "stretch" not in conditions:
                conditions |= {"stretch": stretch, "inside": held[-1].terms.get("inside")}

    def noised(
        self,
        values: np.ndarray,
        *,
        step: int,
        group: str,
        clip: float,
        noise_multiplier: float,
        rows: int,
        tables: Rows | None = None,
        beside: bytes = b"",
    ) -> np.ndarray:
        """See ``efl.privacy.noise.Releases.noised``."""
        try:
            if tables is not None:
                for each in self.deferred:
                    each.dirty = True
            if group in self.counts:
                self.count_examples(group, self.counts.pop(group)())
            conditions = self.conditions.get(group)
            said = None if conditions is None or conditions.get("poisson") else conditions.get("batch_size")
            if said is not None and rows > said:
                raise ConfigError(
                    f"{group}: a batch has {rows} rows, and opt_config BATCH_SIZE (or the shape of the loss) says "
                    f"{said}, from which follows how often a row takes part"
                )
            if conditions is None:  # numbers of another dtype, of a release that is counted under its first part's name
                first = self.conditions.get(group.split("#")[0], {})
                conditions = {name: first[name] for name in ("stretch", "in_each") if name in first}
            return self.releases.noised(
                values,
                step=step,
                group=group,
                clip=clip,
                noise_multiplier=noise_multiplier,
                rows=rows,
                conditions=conditions,
                tables=tables,
                beside=beside,
            )
        except EflError as error:
            self.error = error
            raise

    def count_examples(self, group: str, read: int) -> None:
        """Notes how many records the reader has found.

        Raises:
          ConfigError: ``NUM_EXAMPLES`` says that there are more.
        """
        given = self.conditions[group]["num_examples"]
        if given is not None and given > read:
            raise ConfigError(
                f"opt_config NUM_EXAMPLES: {given}, but the data's reader has {read} records, so a row takes part more "
                "often than that says: leave NUM_EXAMPLES out"
            )
        self.conditions[group]["num_examples"] = read if given is None else given

    def overdue(self, deviations: np.ndarray, widths: np.ndarray, step: float) -> np.ndarray:
        """See ``efl.privacy.noise.Releases.overdue``."""
        return self.releases.overdue(deviations, widths, float(step))

    def randomised(
        self, question: Question, ids: np.ndarray, labels: np.ndarray, prior: np.ndarray | None
    ) -> np.ndarray:
        """See ``efl.privacy.noise.Labels.randomised``.

        Raises:
          ModelError: No run is on: where the seed lies is not known, and another one would release the labels anew.
        """
        try:
            if self._labels is None:
                raise ModelError(
                    f"LabelDP {question.name!r}: labels can be randomised while the model's fit() runs only, which "
                    "knows where the secret seed lies"
                )
            return self._labels.randomised(question, ids, labels, prior)
        except EflError as error:
            self.error = error
            raise
