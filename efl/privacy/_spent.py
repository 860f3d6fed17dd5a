"""What a trained model has given away: from its ledger, and from what it sends, to the table of adversaries."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from efl._keeping import LEDGER_GONE
from efl._task_scope import MODE
from efl.errors import ModelError
from efl.privacy._further import phases_after
from efl.privacy._moved import without_noise
from efl.privacy.accounting import AdversaryTable, Mechanism, Party, Releases, adversary_table, unknown_party
from efl.privacy.noise import LABEL, Phase, label_epsilon
from efl.privacy.noise.ledger import Runs

if TYPE_CHECKING:
    from efl.model import Model

UPDATE, RETURNED, SENT = "update", "returned gradient", "sent"  # what a release is


def privacy_spent(model: Model, delta: float, accountant: str, further_steps: int = 0) -> AdversaryTable:
    """See ``efl.Model.privacy_spent``."""
    entered = model._noise_holder.phases() if model._noise_holder is not None else []
    labels = label_epsilon(entered)
    phases = [phase for phase in entered if phase.terms.get("kind") != LABEL]
    if further_steps:
        phases = phases_after(model, phases, further_steps)
    if not phases and LEDGER_GONE in model.unnoised:
        raise ModelError(
            "privacy_spent: the ledger of what this model released is gone, so nobody knows what was spent: put it "
            "back from a copy into the checkpoint_dir (the log names the file)"
        )
    if not phases and labels is None:
        raise ModelError(
            "privacy_spent: nothing was released with noise yet: train with a private optimizer "
            "(efl.DPAdamGaussianOptimizer …) or on randomised labels (efl.privacy.LabelDP) first"
        )
    # A role alone, given to a model of one party, makes no federation of it.
    is_federal = hasattr(model, "communicator")
    role = (model.settings.federal_role or "model") if is_federal else "model"
    own = Party(
        role,
        updates=_streams(phases, UPDATE),
        unprotected=tuple(_unprotected(model)),
        sent=_streams(phases, RETURNED) + _streams(phases, SENT),
        sent_raw=tuple(model._sent_raw()),
        label_epsilon=labels,
    )
    if not is_federal:
        return adversary_table([own], delta, accountant=accountant)
    other = "follower" if role == "leader" else "leader"
    # Whoever looks ahead does so before a conversation that may break off.
    parties = [own, _peer(other, phases, model, may_break_off=further_steps > 0)]
    return adversary_table(sorted(parties, key=lambda party: party.name != "leader"), delta, accountant=accountant)


def _streams(phases: Sequence[Phase], kind: str) -> tuple[Releases, ...]:
    """Releases of one kind, by name."""
    by_name: dict[str, list[Phase]] = {}
    for phase in phases:
        if phase.terms.get("kind") == kind:
            by_name.setdefault(phase.terms["group"], []).append(phase)
    return tuple(
        Releases(
            name, _of_stream([_Part(phase, phase.terms["noise_multiplier"], phase.often, phase.runs) for phase in held])
        )
        for name, held in by_name.items()
    )


@dataclass(frozen=True)
class _Part:
    """One phase of a stream of releases, as the accounting sees it.

    Attributes:
      phase: Under one set of terms.
      multiplier: Of the noise.
      often: How often -> number of steps that released so often.
      runs: Which steps these are.
      further: Releases about steps of the phase that are not in ``often``.
      microbatched: Whether micro-batches are clipped as a whole; None: as the terms say.
    """

    phase: Phase
    multiplier: float
    often: Mapping[int, int]
    runs: Runs
    further: int = 0
    microbatched: bool | None = None


def _of_stream(parts: Sequence[_Part]) -> tuple[Mechanism, ...]:
    """What the releases of a stream are to the accounting.

    Raises:
      ModelError: How often a row takes part is not known.
    """
    found: list[Mechanism] = []
    samples: dict[tuple[int | None, int | None], list[_Part]] = {}
    for part in parts:
        terms = part.phase.terms
        if terms.get("poisson") and not (terms.get("in_each") or terms.get("comes_again") or None in _sizes(terms)):
            samples.setdefault(_sizes(terms), []).append(part)
    for part in parts:
        alike = next((held for held in samples.values() if part in held), None)
        if alike is None:
            stream = [each.phase for each in parts if each.phase.terms["group"] == part.phase.terms["group"]]
            found += _mechanisms(part, stream)
        elif part is alike[0]:
            found += _of_samples(alike)
    return tuple(found)


def _sizes(terms: Mapping[str, Any]) -> tuple[int | None, int | None]:
    return terms.get("num_examples"), terms.get("batch_size")


def _of_samples(parts: Sequence[_Part]) -> list[Mechanism]:
    """Of Poisson samples of one size: a step has the same one whenever it is taken, also under other terms.

    (It has another where the input began anew since. To count that as the same is too much, never too little.) So its
    releases are one, with less noise. Those of which the step is not known are about samples that count already, which
    is the worst.
    """
    examples, batch = _sizes(parts[0].phase.terms)
    assert examples is not None and batch is not None
    share = min(1.0, batch / examples)
    # An empty sample is drawn again: what is released differs by that from what a Poisson sample releases.
    empty = (1 - share) ** (examples - 1)
    drawn = min(1.0, share / (1 - empty) if empty < 1 else 1.0)
    changes: dict[int, Counter[float]] = {}
    for part in parts:
        for first, last, times in part.runs:
            changes.setdefault(first, Counter())[part.multiplier] += times
            changes.setdefault(last + 1, Counter())[part.multiplier] -= times
    steps: Counter[tuple[tuple[float, int], ...]] = Counter()  # (multiplier, how often) … -> number of steps
    now: Counter[float] = Counter()
    edges = sorted(changes)
    for edge, following in zip(edges, [*edges[1:], None]):
        now.update(changes[edge])
        held = tuple(sorted((multiplier, times) for multiplier, times in now.items() if times > 0))
        if held and following is not None:
            steps[held] += following - edge
    for part in parts:
        _add_unknown(steps, part.multiplier, part.phase.lost + part.further)
    return [
        Mechanism(_together(held), number, None, drawn, poisson=True, overflow=empty)
        for held, number in sorted(steps.items(), key=lambda item: _together(item[0]))
        if number
    ]


def _add_unknown(steps: Counter[tuple[tuple[float, int], ...]], multiplier: float, releases: int) -> None:
    """Adds releases of different steps that are not known: to those that released most."""
    for held in sorted(steps, key=_together):
        moved = min(releases, steps[held])
        if moved:
            releases -= moved
            steps[held] -= moved
            more = dict(held)
            more[multiplier] = more.get(multiplier, 0) + 1
            steps[tuple(sorted(more.items()))] += moved
    if releases:
        steps[((multiplier, 1),)] += releases


def _together(held: tuple[tuple[float, int], ...]) -> float:
    """The noise multiplier of several releases of one sample, as one release."""
    if any(multiplier == 0 for multiplier, _ in held):
        return 0.0
    if len(held) == 1:
        ((multiplier, times),) = held
        return multiplier / math.sqrt(times)
    return 1 / math.sqrt(sum(times / multiplier**2 for multiplier, times in held))


def _mechanisms(part: _Part, stream: Sequence[Phase]) -> list[Mechanism]:
    """What the releases of a phase are to the accounting, where its batches are no samples.

    Args:
      part: The phase.
      stream: All phases of the same group.

    Raises:
      ModelError: How often a row takes part is not known.
    """
    phase, multiplier, often, further = part.phase, part.multiplier, part.often, part.further
    terms, releases = phase.terms, sum(times * steps for times, steps in often.items()) + phase.lost + further
    if not releases:
        return []
    if terms.get("in_each"):
        return [Mechanism(multiplier, releases)]
    examples, batch = terms.get("num_examples"), terms.get("batch_size")
    if examples is None or batch is None:
        missing = " and ".join(key for key, size in (("NUM_EXAMPLES", examples), ("BATCH_SIZE", batch)) if size is None)
        raise ModelError(
            f"privacy_spent: how often a row takes part is not known: compile(opt_config={{...}}) without {missing}, "
            "and the data's reader does not say. What was released is in the ledger, but cannot be accounted for"
        )
    if terms.get("comes_again"):
        raise ModelError(
            f"privacy_spent: how often a row takes part is not known: {terms['comes_again']}. What was released is in "
            "the ledger, but cannot be accounted for"
        )
    share = min(1.0, batch / examples)
    if batch > examples:
        raise ModelError(
            f"privacy_spent: how often a row takes part is not known: batches of {batch} of {examples} rows hold some "
            "more than once. Make smaller batches"
        )
    batches = max(1, examples // batch if terms.get("drop_remainder") else math.ceil(examples / batch))
    stretch = [each for each in stream if each.terms.get("stretch") == terms.get("stretch")]
    inside = bool(terms.get("inside")) or len(stretch) > 1 or bool(terms.get("shifted"))
    read, rows = sum(often.values()), phase.all_rows
    if len(stretch) > 1 and phase.first_step is not None and phase.last_step is not None:
        # Other phases may have taken steps in between, in which the input was read on.
        total = sum(sum(each.often.values()) + each.lost for each in stretch)
        between = max(0, min(phase.last_step - phase.first_step + 1, total) - read)
        read, rows = read + between, rows + between * max(each.rows for each in stretch)
    # Data that are cut into batches epoch by epoch, or as one stream of all epochs: whatever lets a row in more often.
    epochs = max(math.ceil(read / batches), math.ceil(rows / examples))
    epochs += inside  # what begins inside an epoch may touch one more
    # In each epoch a row is in one step at most, which may be one of those that were taken most often.
    most, left = 0, epochs
    for times, steps in sorted(often.items(), reverse=True):
        most += times * min(left, steps)
        left -= min(left, steps)
    if phase.lost:
        most += math.ceil(phase.lost / batches) + 1
    taken = min(releases, most + further)
    if terms.get("straddles") and inside:
        multiplier /= 2  # where the seams of passes are, nobody knows: in each release a row may be twice
    elif terms.get("straddles") and (examples % batch or phase.rows != batch) and epochs > 1:
        # Two passes meet in a batch that may hold a row of both: what it adds there is twice as long, and counts four
        # times in place of twice. Of e passes at most e / 2 such pairs can be made.
        often_once = all(times == 1 for times in often)
        multiplier /= math.sqrt((epochs + 2 * (epochs // 2)) / epochs if often_once else 2.0)
    noted = bool(terms.get("microbatched")) if part.microbatched is None else part.microbatched
    return [Mechanism(multiplier, releases, taken, share, microbatched=noted)]


def _unprotected(model: Model) -> list[str]:
    """Variables that are changed without noise that efl adds: by an optimizer, or by what runs beside it."""
    names: dict[str, None] = {}
    for scope, program in model._programs.items():
        if scope.mode is MODE.TRAIN:
            names |= dict.fromkeys(v.op.name for v in without_noise(program))
    return list(names | dict.fromkeys(sorted(model.unnoised)))


def _peer(name: str, phases: Sequence[Phase], model: Model, may_break_off: bool) -> Party:
    """The peer as it described itself in the handshake, over the steps that this party took or tried."""
    assert model._noise_holder is not None
    updates = [phase for phase in phases if phase.terms.get("kind") == UPDATE]
    steps = updates or [phase for phase in phases if not phase.terms.get("in_each")]
    told = [phase.terms.get("peer") or {} for phase in steps]
    if not steps:  # labels were randomised and nothing was noised: what the handshake of this process said
        told = [held.get("peer") or {} for held in model._noise_holder.conditions.values()]
        if any(multiplier for each in told for multiplier, _ in each.get("groups") or ()):
            return unknown_party(name)  # it adds noise, but how often, only a ledger of updates would say
    if not all(told):
        return unknown_party(name)
    count = _OfPeer(steps, told, model._noise_holder.broken_off + may_break_off)
    released = {key: noise for each in told for key, noise in each["released"].items()}
    noised = all(each["noises_returns"] for each in told)
    seen: dict[str, Any] = {
        "sent_raw": tuple(model._received_raw(noised, released)),
        # Of an evaluation, of whose steps this party has no ledger.
        "uncounted": tuple(key for key in model._released_by_peer if key not in released),
    }
    sent = [count.released(key) for key in released]
    if noised:
        sent += [count.returned(key) for key in model._gradients_received()]
    groups = [each["groups"] for each in told]
    if not any(groups):
        return Party(name, sent=tuple(sent), **seen)  # it trains nothing
    if not all(held and all(multiplier for multiplier, _ in held) for held in groups):
        return Party(name, unprotected=("its weights",), sent=tuple(sent), **seen)
    trained = [count.updates(number) for number in range(max(len(held or ()) for held in groups))]
    return Party(name, updates=tuple(trained), sent=tuple(sent), **seen)


class _OfPeer:
    """What the peer released, counted by what this party released or repeated in the same steps.

    Args:
      steps: Phases of one group of this party's, or of several.
      told: For each, what the peer said of itself.
      broken_off: In how many further steps the peer may have released what this party did not come to.
    """

    def __init__(self, steps: Sequence[Phase], told: Sequence[Mapping[str, Any]], broken_off: int) -> None:
        self._steps, self._told, self._broken_off = steps, told, broken_off

    def released(self, key: str) -> Releases:
        """A tensor that it sent noised."""
        return self._stream(key, [each["released"].get(key, 0.0) for each in self._told])

    def returned(self, key: str) -> Releases:
        """A gradient that it returned noised, as its private optimizers noise: all alike, or it would not have."""
        noise = [min((sigma for sigma, _ in each["groups"] if sigma), default=0.0) for each in self._told]
        return self._stream(f"gradient of {key}", noise)

    def updates(self, number: int) -> Releases:
        """Updates of one of its clipping groups."""
        held = [each["groups"][number] if number < len(each["groups"]) else (None, False) for each in self._told]
        return self._stream(f"its updates {number}", [sigma for sigma, _ in held], [whole for _, whole in held])

    def _stream(self, name: str, noise: Sequence[float | None], microbatched: Sequence[bool] | None = None) -> Releases:
        """One stream of releases; ``noise`` is None where it did not release this then."""
        # Several groups of one task were released in the same steps, those of several tasks in others.
        one: dict[str, str] = {}
        for phase in self._steps:
            one.setdefault(phase.terms["group"].split("/")[0], phase.terms["group"])
        whole = microbatched or [False] * len(noise)
        held = [
            (phase, value, flag)
            for phase, value, flag in zip(self._steps, noise, whole)
            if value is not None and phase.terms["group"] in one.values()
        ]
        # In which phases conversations broke off, nobody knows: where there was the least noise.
        worst = min(range(len(held)), key=lambda number: held[number][1], default=0)
        parts = [
            _Part(phase, value, phase.tried, phase.tried_runs, self._broken_off if number == worst else 0, flag)
            for number, (phase, value, flag) in enumerate(held)
        ]
        return Releases(name, _of_stream(parts))
