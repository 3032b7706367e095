"""The plan of a generation that is over, as a schedule that does the same again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from regrow.core.call import CallRecord, Generation
from regrow.core.recipe import Recipe, recipe_of
from regrow.schedule import FULL, Schedule


def check_freezable(config: Any) -> None:
    """Refuse a method whose calls a schedule can't say.

    Raises:
        ValueError: if it chooses tokens, or decides for single sites.
    """
    parts = recipe_of(config)
    if _chooses(parts):
        raise ValueError(
            f"method: {getattr(config, 'method', type(config).__name__)} can't be kept as a schedule: its "
            "calls leave out tokens, or parts of layers, that the method chooses, and a schedule has no "
            "more than depths and recoveries"
        )


def _chooses(parts: Recipe) -> bool:
    """Whether calls leave out what the method chooses."""
    kinds, sites = parts.plan.kinds(), parts.sites
    return sites is not None and any(map(sites.acts_in, kinds))


def schedule_of(generation: Generation) -> Schedule:
    """Depth and recovery of every step of a generation, as it was carried out.

    Steps whose calls were all computed in full are full; so are those that it did not make: before the
    beginning of a run that began late, and behind the end of one that was interrupted.

    Raises:
        ValueError: if no step of it is known.
    """
    records = _last_run(generation.records)
    done = dict.fromkeys(range(len(generation.steps)), FULL)
    for record in records:
        if record.position is not None and record.depth != FULL and record.planned is not None:
            done[record.position.index] = record.planned.depth
    if not done:
        raise ValueError("calls: none of them belongs to a generation whose steps are known")
    used = {step: generation.steps[step].recovery for step, depth in done.items() if depth != FULL}
    kinds = set(used.values()) or {generation.steps[0].recovery}
    alike = len(kinds) == 1
    return Schedule(
        depth=tuple(done.values()),
        ratio=(0.0,) * len(done),
        recovery=tuple(kinds) if alike else tuple(step.recovery for step in generation.steps),
        name="frozen",
        note="what a generation did",
    )


def _last_run(records: Sequence[CallRecord]) -> Sequence[CallRecord]:
    """The records of the last run over the steps: members of an ensemble share one list."""
    begins = [i for i, record in enumerate(records) if record.position and record.position.begins]
    return records[begins[-1] :] if begins else records
