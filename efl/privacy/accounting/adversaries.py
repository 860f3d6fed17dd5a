"""Who learns how much from a training run: the table of adversaries.

    noisy = Mechanism.shuffled(noise_multiplier=1.3, steps=4700, n=60_000, batch_size=256)
    leader = Party("leader", updates=(Releases("weights", (noisy,)),), sent_raw=("y_train",))
    follower = Party("follower", updates=(Releases("weights", (noisy,)),), sent_raw=("embedding",))
    print(adversary_table([leader, follower], delta=1e-5))

What is assumed, and why a figure is what it is:

* **An outsider sees models**, at every step if it likes, and nothing else; in particular neither party publishes what
  the other sent it. Neighbouring data sets differ by one row, in both tables (add/remove). An outsider who also knows
  which rows were in which batch knows that a row exists: then replace-one, and no amplification.
* **One party's model is as good as both.** Where the peer sends anything, this party's updates are computed from what
  the peer's weights made of *all* rows of a batch, and the peer's weights carry what they took from one row at earlier
  steps. Clipping bounds a row's own part of an update, not that. So the guarantee about one model is that of both
  parties' updates together, and there is none where the peer's weights are updated without noise. Only a party
  to which the peer sends nothing has a guarantee of its own noise alone.
* **The peer** knows its own columns, every batch and that a row exists: neighbouring data sets differ in the other
  party's columns of one row (replace-one), and nothing is amplified. What it learns of a row comes in two ways: through
  that row's own messages, which must be clipped and noised (``Party.sent``), and through the sender's weights, which
  make the messages of all later rows; so these must be updated with noise too. The two are composed. The figure holds
  also if the peer sees this party's model in the end, and if it deviates from the protocol in what it sends (as long
  as releases and participations are those that there really were).
* **The Poisson figure** is a guarantee for an outsider if every batch of every update was a Poisson sample that it does
  not see. Else it is given beside the guarantee "as commonly reported, not a guarantee here"; of one party's
  model, that is the figure of its own noise alone.
* **Labels alone.** If labels were randomised (``LabelDP``), and everything was computed from the randomised ones,
  whoever sees anything learns at most ε about a row's label, at δ = 0; of labels that were randomised several times,
  the sum of the ε. Columns are no secret of that promise.

Weights that are never updated are taken to be independent of the data. Metrics that are published, and the number of
rows, are
outside of all of this. A person with several rows is protected less: ε grows at least in proportion.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from efl.errors import ConfigError
from efl.privacy.accounting import _checks
from efl.privacy.accounting.events import ACCOUNTANTS, Mechanism, compute_epsilon, jointly

__all__ = ["AdversaryRow", "AdversaryTable", "Party", "Releases", "adversary_table", "unknown_party"]

_HERE = "efl.privacy.adversary_table"
_SHOWN = 4
_HEADS = (
    "adversary",
    "neighbouring tables",
    "amplified by sampling",
    "epsilon",
    "as commonly reported, not a guarantee here",
)
_BOTH = "of both parties' updates together: a model depends on the weights that made the messages it learned from"
_UNTRAINED = "no weights were updated"
_SILENT = "nothing computed from these rows was sent"
_RELATIONS = {"add_remove": "add/remove a row", "replace_one": "replace one row", "replace_label": "replace one label"}


@dataclass(frozen=True)
class Releases:
    """One stream of noised releases: the updates of a group of variables, or a tensor that was sent.

    Attributes:
      name: Of the group or tensor.
      mechanisms: In the order of the steps.
    """

    name: str
    mechanisms: tuple[Mechanism, ...]


@dataclass(frozen=True)
class Party:
    """What one party did with its rows.

    Attributes:
      name: ``"leader"``, ``"follower"``, or what it is called in the table.
      updates: Of its variables that are updated with noise, by clipping group.
      unprotected: Its variables that are updated without noise: trainable ones, and others that are computed from
        rows (moving averages of batch normalisation).
      sent: What it sent to the peer clipped row by row and noised: activations, returned gradients.
      sent_raw: Names of what it sent to the peer as it was, of everything that is computed from its rows.
      label_epsilon: ε of its labels if they were randomised and nothing was computed from others (the sum, if they were
        randomised several times); else None.
      known: False where it is not known what this party did.
      uncounted: Names of what it sent noised, of which it is not known how often.

    Raises:
      ConfigError: ``unprotected``, ``sent_raw`` or ``uncounted`` is a single string, or ``label_epsilon`` is out of its
        range.
    """

    name: str
    updates: tuple[Releases, ...] = ()
    unprotected: tuple[str, ...] = ()
    sent: tuple[Releases, ...] = ()
    sent_raw: tuple[str, ...] = ()
    label_epsilon: float | None = None
    known: bool = True
    uncounted: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("unprotected", "sent_raw", "uncounted"):
            if isinstance(getattr(self, name), str):
                raise ConfigError(
                    f"efl.privacy.Party: {name}={getattr(self, name)!r}: expected a tuple of names, not one string"
                )
        if self.label_epsilon is not None:
            _checks.real("efl.privacy.Party", "label_epsilon", self.label_epsilon, 0, "None or a number of at least 0")


@dataclass(frozen=True)
class AdversaryRow:
    """What one adversary learns at most.

    Attributes:
      adversary: Who sees what.
      relation: ``"add_remove"``, ``"replace_one"`` or ``"replace_label"``: what it cannot tell apart.
      amplified: Whether ε counts on Poisson sampling that this adversary does not see.
      epsilon: The guarantee; None where there is none.
      reason: Why there is none; empty where there is one.
      reported: The Poisson figure where it is no guarantee and is known; else None.
      note: What is worth saying about the guarantee; may be empty.
    """

    adversary: str
    relation: str
    amplified: bool
    epsilon: float | None
    reason: str = ""
    reported: float | None = None
    note: str = ""

    @property
    def guarantee(self) -> str:
        """ε, or ``none`` with the reason, as the table shows it."""
        return self.reason if self.epsilon is None else f"{self.epsilon:.3g}"


@dataclass(frozen=True)
class AdversaryTable:
    """The rows of a run, for one δ.

    Attributes:
      rows: One for each adversary.
      delta: δ.
    """

    rows: tuple[AdversaryRow, ...]
    delta: float

    def format(self) -> str:
        """The table as aligned plain text.

        Returns:
          Lines: δ, the head, the rows, and notes on guarantees that are marked with stars.
        """
        notes = list(dict.fromkeys(row.note for row in self.rows if row.note))
        lines = [_HEADS]
        for row in self.rows:
            amplified = "yes (Poisson, hidden)" if row.amplified else "no"
            stars = " " + "*" * (notes.index(row.note) + 1) if row.note else ""
            reported = "" if row.reported is None else f"{row.reported:.3g}"
            lines.append((row.adversary, _RELATIONS[row.relation], amplified, row.guarantee + stars, reported))
        widths = [max(len(line[column]) for line in lines) for column in range(len(_HEADS))]
        text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]
        text += [f"{'*' * (index + 1)} {note}" for index, note in enumerate(notes)]
        return "\n".join([f"What each adversary learns about a row (delta = {self.delta:g})", *text])

    def __str__(self) -> str:
        return self.format()


def unknown_party(name: str) -> Party:
    """A peer of which it is not known how it updated its weights and what it sent.

    Args:
      name: What it is called in the table.

    Returns:
      The party; every guarantee that depends on it is none.
    """
    return Party(name, known=False)


def adversary_table(
    parties: Sequence[Party], delta: float, *, batches_hidden: bool = True, accountant: str = "pld"
) -> AdversaryTable:
    """What each adversary learns: outsiders who see models, and each party of the other.

    Args:
      parties: One (no federation) or both.
      delta: δ.
      batches_hidden: Whether outsiders do not know which rows were in which batch. False where sample ids of batches,
        or the seed that draws them, are published. It makes no difference to the peer, who knows them.
      accountant: For Poisson figures: ``"pld"`` or ``"rdp"``.

    Returns:
      The table.

    Raises:
      ConfigError: Not one or two parties, two of the same name, an argument out of range, or dp-accounting is missing.
    """
    _checks.delta_of(_HERE, delta)
    _checks.choice(_HERE, "accountant", accountant, ACCOUNTANTS)
    names = [party.name for party in parties]
    if len(parties) not in (1, 2) or len(set(names)) != len(names):
        raise ConfigError(f"{_HERE}: parties are {names}: expected one party, or two of different names")
    count = _Count(delta, accountant, batches_hidden)
    if len(parties) == 1:
        rows = [_outsider("outsider who sees the model", parties, parties, count)]
    else:
        rows = [_outsider(f"outsider who sees the {each.name}'s model", [each], parties, count) for each in parties]
        rows.append(_outsider("outsider who sees both models", parties, parties, count))
        first, second = parties
        rows += [_peer(watcher, about, count) for watcher, about in ((second, first), (first, second))]
    for party in parties:
        if party.label_epsilon is not None:
            about = f"anyone, about the {party.name}'s labels alone"
            note = "at delta = 0, if the labels were used for nothing else; the columns are no secret of this promise"
            rows.append(AdversaryRow(about, "replace_label", False, party.label_epsilon, note=note))
    return AdversaryTable(tuple(rows), delta)


@dataclass(frozen=True)
class _Count:
    """How figures are computed for one table."""

    delta: float
    accountant: str
    batches_hidden: bool

    def unamplified(self, streams: Sequence[Releases], relation: str) -> float:
        sequences = [stream.mechanisms for stream in streams]
        # A random number of participations is the same one for all streams, which saw the same batches.
        if any(each.poisson for sequence in sequences for each in sequence):
            # What is of no batch of training (of an evaluation, say) stands by itself.
            apart = [held for held in sequences if all(each.sampling_probability is None for each in held)]
            sequences = [jointly([held for held in sequences if held not in apart]), *apart]
        flat = [each for sequence in sequences for each in sequence]
        return compute_epsilon(flat, self.delta, relation=relation, sampling="none").epsilon

    def sampled(self, streams: Sequence[Releases]) -> float | None:
        """The Poisson figure; None where there is none, or it is not known what the samples would have been."""
        if not streams or any(each.sampling_probability is None for one in streams for each in one.mechanisms):
            return None
        try:
            flat = jointly([_as_if_poisson(stream.mechanisms) for stream in streams])
        except ConfigError:
            return None
        epsilon = _figure(flat, self.delta, self.accountant)
        return epsilon if math.isfinite(epsilon) else None


@functools.lru_cache(maxsize=64)
def _figure(mechanisms: tuple[Mechanism, ...], delta: float, accountant: str) -> float:
    # Several rows of a table show the same one.
    return compute_epsilon(mechanisms, delta, accountant=accountant).epsilon


def _as_if_poisson(mechanisms: Sequence[Mechanism]) -> tuple[Mechanism, ...]:
    return tuple(
        Mechanism(
            each.noise_multiplier,
            each.releases,
            None,
            each.sampling_probability,
            poisson=True,
            microbatched=each.microbatched,
            overflow=each.overflow,
        )
        for each in mechanisms
    )


def _outsider(adversary: str, seen: Sequence[Party], parties: Sequence[Party], count: _Count) -> AdversaryRow:
    relation = "add_remove" if count.batches_hidden else "replace_one"
    # A model depends on the weights of its own party, and on the peer's if the peer sends anything.
    behind = [
        each for each in parties if each in seen or each.sent or each.sent_raw or each.uncounted or not each.known
    ]
    streams = _streams(behind)
    shown = None if any(each.unprotected or not each.known for each in seen) else count.sampled(_streams(seen))
    reason = _why_none(behind, streams)
    if reason:
        return AdversaryRow(adversary, relation, False, None, reason, shown)
    if not streams:
        return AdversaryRow(adversary, relation, False, 0.0, note=_UNTRAINED)
    note = _BOTH if len(behind) > len(seen) else ""
    if count.batches_hidden and all(each.poisson for stream in streams for each in stream.mechanisms):
        amplified = count.sampled(streams)
        if amplified is not None:
            other = shown if len(behind) > len(seen) else None
            return AdversaryRow(adversary, relation, True, amplified, "", other, note)
    return _unamplified(adversary, relation, streams, shown, note, count)


def _peer(watcher: Party, about: Party, count: _Count) -> AdversaryRow:
    adversary = f"the {watcher.name}, with all that it received, about the {about.name}'s rows"
    relation = "replace_one"
    streams = [*_streams([about]), *(stream for stream in about.sent if stream.mechanisms)]
    shown = None if about.unprotected or not about.known else count.sampled(streams)
    if about.sent_raw:
        reason = f"none: {_listed(about.sent_raw)} {'was' if len(about.sent_raw) == 1 else 'were'} sent raw"
        return AdversaryRow(adversary, relation, False, None, reason, shown)
    if about.uncounted:
        reason = f"none: how often {_listed(about.uncounted)} was sent, noised, only the {about.name}'s ledger has"
        return AdversaryRow(adversary, relation, False, None, reason, shown)
    if about.known and not about.sent:
        return AdversaryRow(adversary, relation, False, 0.0, note=_SILENT)
    reason = _why_none([about], streams)
    if reason:
        return AdversaryRow(adversary, relation, False, None, reason, shown)
    return _unamplified(adversary, relation, streams, shown, "", count)


def _unamplified(
    adversary: str, relation: str, streams: Sequence[Releases], shown: float | None, note: str, count: _Count
) -> AdversaryRow:
    try:
        epsilon = count.unamplified(streams, relation)
    except ConfigError as error:
        # A table at the end of a run says what it can.
        return AdversaryRow(adversary, relation, False, None, f"none ({error})", shown)
    if math.isinf(epsilon):
        return AdversaryRow(adversary, relation, False, None, "none (no finite epsilon for this delta)", shown)
    return AdversaryRow(adversary, relation, False, epsilon, "", shown, note)


def _streams(parties: Sequence[Party]) -> list[Releases]:
    return [stream for party in parties for stream in party.updates if stream.mechanisms]


def _why_none(behind: Sequence[Party], streams: Sequence[Releases]) -> str:
    """Why there is no guarantee about weights that these parties updated and streams that were released; or ``""``."""
    unknown = [party.name for party in behind if not party.known]
    if unknown:
        return f"none (not known how the {_listed(unknown)} updated its weights)"
    bare = [f"{party.name}: {_listed(party.unprotected)}" for party in behind if party.unprotected]
    if bare:
        return f"none (weights updated without noise): {'; '.join(bare)}"
    silent = [stream.name for stream in streams if any(each.noise_multiplier == 0 for each in stream.mechanisms)]
    if silent:
        return f"none (noise multiplier 0): {_listed(silent)}"
    return ""


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"
