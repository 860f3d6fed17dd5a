"""The ledger as further steps of this process will leave it, in the worst case."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from efl._gradients import is_private
from efl._task_scope import MODE
from efl.privacy.noise import LABEL, Phase

if TYPE_CHECKING:
    from efl.model import Model


def phases_after(model: Model, phases: Sequence[Phase], steps: int) -> list[Phase]:
    """What was released, after so many further steps of every task.

    A step releases under the terms of now. They may be others than those of the last release (other noise, another
    batch size, an input that began anew), and before the first step the ledger has none.

    Args:
      model: Compiled.
      phases: What was released so far; without labels.
      steps: How many further steps.
    """
    found, holder = list(phases), model._noise_holder
    for terms in [] if holder is None else _terms(model):
        known = [number for number, phase in enumerate(found) if _holds(phase.terms, terms)]
        if known:
            found[known[-1]] = _after(found[known[-1]], steps, model.steps_trained)
        else:
            rows = terms.get("batch_size") or 0
            found.append(_after(Phase(terms, 0, rows, first_step=model.steps_trained), steps, model.steps_trained))
    return found


def _terms(model: Model) -> list[dict[str, Any]]:
    """The terms under which training steps release now, but for the clip, which makes no difference to ε."""
    found, holder = [], model._noise
    for group, conditions in holder.conditions.items():
        multiplier = _multiplier(model, group)
        if conditions.get("kind") == LABEL or conditions.get("in_each") or multiplier is None:
            continue
        if group in holder.counts:
            holder.count_examples(group, holder.counts.pop(group)())
        terms = {**conditions, "group": group, "noise_multiplier": multiplier}
        found.append(json.loads(json.dumps(terms)))  # as the ledger has it
    return found


def _multiplier(model: Model, group: str) -> float | None:
    """The noise of a group's releases; None where efl does not add it."""
    sent = model._promised_releases()
    if group in sent:
        return sent[group]
    for scope, program in model._programs.items():
        if scope.mode is MODE.TRAIN and group.split("/")[0] == scope.wire:
            private = [optimizer for optimizer in program.optimizers if is_private(optimizer)]
            number = group.removeprefix(f"{scope.wire}/")
            # Gradients that go back are noised as all private optimizers of the task noise: alike.
            chosen = private[int(number) : int(number) + 1] if number.isdigit() else private[:1]
            return next((optimizer.noise_multiplier for optimizer in chosen), None)
    return None


def _holds(terms: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    return all(terms.get(key) == value for key, value in wanted.items())


def _after(phase: Phase, steps: int, step: int) -> Phase:
    """A phase after so many steps from ``step`` on, of which those that it had before release again."""
    behind = (phase.first_step or 0) + sum(phase.often.values())
    again = max(0, min(steps, behind - step))
    often, tried = (_again(held, again, steps - again) for held in (phase.often, phase.tried))
    rows = (steps - again) * max(phase.terms.get("batch_size") or 0, phase.rows)
    run = (step, step + steps - 1, 1)
    return replace(
        phase,
        releases=phase.releases + steps,
        all_rows=phase.all_rows + rows,
        often=often,
        tried=tried,
        runs=(*phase.runs, run),
        tried_runs=(*phase.tried_runs, run),
    )


def _again(often: Mapping[int, int], again: int, new: int) -> dict[int, int]:
    """How often -> number of steps: those that released most often do so once more, and others come."""
    found = dict(often)
    for times in sorted(often, reverse=True):
        moved = min(again, found[times])
        again -= moved
        found[times] -= moved
        found[times + 1] = found.get(times + 1, 0) + moved
    found[1] = found.get(1, 0) + again + new
    return {times: number for times, number in found.items() if number}
