"""What a trained model has given away: from its ledger, and from what it sends, to the table of adversaries."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from efl._task_scope import MODE
from efl.errors import ModelError
from efl.privacy._moved import moved_by_data
from efl.privacy.accounting import AdversaryTable, Mechanism, Party, Releases, adversary_table, unknown_party
from efl.privacy.noise import LABEL, Phase, label_epsilon

if TYPE_CHECKING:
    from efl.model import Model

UPDATE, RETURNED, SENT = "update", "returned gradient", "sent"  # what a release is


def _multiplier(optimizer: Any) -> float:
    return float(getattr(optimizer, "noise_multiplier", None) or 0.0)


def privacy_spent(model: Model, delta: float, accountant: str, further_steps: int = 0) -> AdversaryTable:
    """See ``efl.Model.privacy_spent``."""
    entered = model._noise_holder.phases() if model._noise_holder is not None else []
    labels = label_epsilon(entered)
    phases = [phase for phase in entered if phase.terms.get("kind") != LABEL]
    if further_steps:
        newest = {phase.terms["group"]: number for number, phase in enumerate(phases)}
        for number in newest.values():
            phase = phases[number]
            rows = further_steps * (phase.terms.get("batch_size") or phase.rows)
            phases[number] = replace(phase, releases=phase.releases + further_steps, all_rows=phase.all_rows + rows)
    if not phases and labels is None:
        raise ModelError(
            "privacy_spent: nothing was released with noise yet: train with a private optimizer "
            "(efl.DPAdamGaussianOptimizer …) or on randomised labels (efl.privacy.LabelDP) first"
        )
    role = model.settings.federal_role or "model"
    own = Party(
        role,
        updates=_streams(phases, UPDATE),
        unprotected=tuple(_unprotected(model)),
        sent=_streams(phases, RETURNED) + _streams(phases, SENT),
        sent_raw=tuple(model._sent_raw()),
        label_epsilon=labels,
    )
    if not model.settings.federal_role:
        return adversary_table([own], delta, accountant=accountant)
    other = "follower" if role == "leader" else "leader"
    parties = [own, _peer(other, phases, model)]
    return adversary_table(sorted(parties, key=lambda party: party.name != "leader"), delta, accountant=accountant)


def _streams(phases: Sequence[Phase], kind: str) -> tuple[Releases, ...]:
    """Releases of one kind, by name."""
    by_name: dict[str, list[Phase]] = {}
    for phase in phases:
        if phase.terms.get("kind") == kind:
            by_name.setdefault(phase.terms["group"], []).append(phase)
    return tuple(
        Releases(name, tuple(_mechanism(p, p.terms["noise_multiplier"], len(held) > 1) for p in held))
        for name, held in by_name.items()
    )


def _mechanism(phase: Phase, multiplier: float, is_one_of_several: bool) -> Mechanism:
    terms = phase.terms
    examples, batch = terms.get("num_examples"), terms.get("batch_size")
    if examples is None or batch is None:
        missing = " and ".join(key for key, size in (("NUM_EXAMPLES", examples), ("BATCH_SIZE", batch)) if size is None)
        raise ModelError(
            f"privacy_spent: how often a row takes part is not known: compile(opt_config={{...}}) without {missing}, "
            "and the data's reader does not say. What was released is in the ledger, but cannot be accounted for"
        )
    share = min(1.0, batch / examples)
    if terms.get("poisson"):
        # An empty sample is drawn again: what is released differs by that from what a Poisson sample releases.
        empty = (1 - share) ** (examples - 1)
        drawn = share / (1 - empty) if empty < 1 else 1.0
        return Mechanism(multiplier, phase.releases, None, min(1.0, drawn), poisson=True, overflow=empty)
    batches = max(1, examples // batch if terms.get("drop_remainder") else math.ceil(examples / batch))
    # Data that are cut into batches epoch by epoch, or as one stream of all epochs: whatever lets a row in more often.
    epochs = max(math.ceil(phase.releases / batches), math.ceil(phase.all_rows / examples))
    # A stretch that begins inside an epoch may touch one epoch more.
    epochs += is_one_of_several
    return Mechanism(
        multiplier, phase.releases, min(phase.releases, epochs), share, microbatched=bool(terms.get("microbatched"))
    )


def _unprotected(model: Model) -> list[str]:
    """Variables that are changed without noise that efl adds: by an optimizer, or by what runs beside it."""
    names: dict[str, None] = {}
    for scope, program in model._programs.items():
        if scope.mode is MODE.TRAIN:
            bare = [held for optimizer, (held, _) in program.optimizers.items() if _multiplier(optimizer) == 0.0]
            names |= dict.fromkeys(v.op.name for held in [*bare, moved_by_data(program)] for v in held)
    return list(names)


def _peer(name: str, phases: Sequence[Phase], model: Model) -> Party:
    """The peer as it described itself in the handshake, over the same steps."""
    steps = [phase for phase in phases if phase.terms.get("kind") == UPDATE] or list(phases)
    told = [phase.terms.get("peer") or {} for phase in steps]
    if not steps:  # labels were randomised and nothing was noised: what the handshake of this process said
        assert model._noise_holder is not None
        told = [held.get("peer") or {} for held in model._noise_holder.conditions.values()]
        if any(each.get("noise_multiplier") for each in told):
            return unknown_party(name)  # it adds noise, but how often, only a ledger of updates would say
    if not all(told):
        return unknown_party(name)
    released = {key: noise for each in told for key, noise in each["released"].items()}
    raw = tuple(model._received_raw(all(each["noises_returns"] for each in told), released))
    sent = tuple(
        Releases(
            key, tuple(_mechanism(p, each["released"].get(key, 0.0), len(steps) > 1) for p, each in zip(steps, told))
        )
        for key in released
    )
    multipliers = [each["noise_multiplier"] for each in told]
    if all(multiplier is None for multiplier in multipliers):
        return Party(name, sent=sent, sent_raw=raw)  # it trains nothing
    if not all(multipliers):
        return Party(name, unprotected=("its weights",), sent=sent, sent_raw=raw)
    updates = tuple(_mechanism(p, noise, len(steps) > 1) for p, noise in zip(steps, multipliers))
    return Party(name, updates=(Releases("its updates", updates),), sent=sent, sent_raw=raw)
