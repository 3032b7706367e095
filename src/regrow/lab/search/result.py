"""The results of a search, as plain data and as files for later use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from math import isfinite
from pathlib import Path
from typing import Any

import regrow
from regrow.core.recipe import recipe_of
from regrow.lab.measure.atomic_files import write_text
from regrow.lab.measure.evaluate import Setting
from regrow.lab.search.evaluation import Candidate, Facts
from regrow.lab.search.objectives import Cost, Objective, Quality, label
from regrow.lab.search.proposals import hypervolume, pick
from regrow.lab.search.search import Known, Search
from regrow.origin import Origin
from regrow.report import depth_name
from regrow.schedule import FULL, Schedule

# Weights of quality and cost, scaled to their ranges on the front, for the picked plan of each name.
PICKS = {"quality": 0.25, "balanced": 1.0, "fast": 4.0}


@dataclass(frozen=True)
class Found:
    """A plan of the front.

    Args:
        name: name of its file.
        known: its measured figures.
        schedule: what it does at each call; without a schedule, the equivalent one.
        picked: uses for which it is a good choice.
    """

    name: str
    known: Known
    schedule: Schedule
    picked: tuple[str, ...]


def found(search: Search, facts: Facts, setting: Setting, weight: float | None) -> list[Found]:
    """List the plans of the front with names and origin, sorted by cost, highest first.

    Args:
        search: a finished search.
        facts: facts about its pipeline.
        setting: setting of its pictures.
        weight: w_ps of DaTo's choice of one plan, on unscaled objectives; None for no choice.
    """
    plans = search.front()
    values = [known.values(search.objectives) for known in plans]
    chosen: dict[int, list[str]] = {}
    for name, index in _picked(values, weight).items():
        chosen.setdefault(index, []).append(name)
    return [
        Found(
            f"plan-{i:02d}",
            known,
            _schedule(known, facts, search.objectives, setting),
            tuple(chosen.get(i, ())),
        )
        for i, known in enumerate(plans)
    ]


def _picked(values: Sequence[Sequence[float]], weight: float | None) -> dict[str, int]:
    """Choose plans: their indices by the use that they are picked for."""
    if not values:
        return {}
    columns = [(min(c), max(c) - min(c) or 1.0) for c in zip(*values, strict=True)]
    scaled = [[(v - low) / span for v, (low, span) in zip(row, columns, strict=True)] for row in values]
    out = {name: pick(scaled, w) for name, w in PICKS.items()}
    return out if weight is None else out | {"w_ps": pick(values, weight)}


def schedule_of(candidate: Candidate, calls: int) -> Schedule:
    """Make the schedule of a plan: what it does at each call."""
    if candidate.config is None:
        return Schedule.constant().resample(calls)
    return recipe_of(candidate.config).plan.resample(calls)


def _schedule(known: Known, facts: Facts, objectives: Sequence[Objective], setting: Setting) -> Schedule:
    calls = facts.calls_at(known.candidate.steps)
    figures: dict[type, dict[str, float]] = {Quality: {}, Cost: {}}
    for kind in objectives:
        figures[type(kind)][kind.value] = round(known.value(kind), 6)
    origin = Origin(
        model=setting.model,
        denoiser=facts.denoiser,
        scheduler=facts.scheduler,
        scheduler_key=facts.scheduler_key,
        steps=known.candidate.steps,
        calls=calls,
        guidance=setting.guidance,
        height=setting.height,
        width=setting.width,
        prompts=known.prompts,
        seed=setting.seed,
        quality=figures[Quality],
        cost=figures[Cost],
        regrow=regrow.__version__,
        date=datetime.now(timezone.utc).date().isoformat(),
    )
    return schedule_of(known.candidate, calls).model_copy(update={"origin": origin})


def write_front(plans: Sequence[Found], folder: Path) -> dict[str, str]:
    """Write a file for each plan; files of an earlier front are removed.

    A plan that is only a schedule (DaTo, fewer steps) becomes a schedule file, any other plan the JSON of
    its method's configuration; both contain their origin.

    Returns:
        the names of the files by the names of the plans.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("plan-*"):
        old.unlink()
    files = {}
    for plan in plans:
        config = plan.known.candidate.config
        if config is None or hasattr(config, "schedule"):
            file = folder / f"{plan.name}.yaml"
            plan.schedule.model_copy(update={"name": plan.name}).save(file)
        else:
            file = folder / f"{plan.name}.json"
            write_text(file, config.model_copy(update={"origin": plan.schedule.origin}).dump())
        files[plan.name] = f"{folder.name}/{file.name}"
    return files


def figures(known: Known, objectives: Sequence[Objective]) -> dict[str, float | None]:
    """List the figures of a plan by the names of the objectives; None if it was given up."""
    values = {label(kind): known.value(kind) for kind in objectives}
    return {name: value if isfinite(value) else None for name, value in values.items()}


def to_dict(
    search: Search, plans: Sequence[Found], files: Mapping[str, str], beside: Mapping[str, Known]
) -> dict[str, Any]:
    """Convert the results to plain data."""
    objectives = search.objectives
    best = [plan.known.values(objectives) for plan in plans]
    around = [known.values(objectives) for known in beside.values() if not known.given_up]
    rows = [row for values in (*search.history, best, around) for row in values]
    reference = [max(column) for column in zip(*rows, strict=True)]
    proposed = search.known.values()
    return {
        "objectives": [label(kind) for kind in objectives],
        "economy": search.economy.model_dump(mode="json"),
        # If the search ended within a generation, some of its plans were proposed but not measured.
        "evaluated": sum(known.prompts > 0 or known.given_up for known in proposed),
        "pictures": search.pictures,
        # Only whole generations count: an incomplete one is measured again when the search resumes.
        "seconds": round(search.spent[-1][1], 1) if search.spent else 0.0,
        "front": [
            {
                "name": plan.name,
                "key": plan.known.candidate.key,
                "file": files[plan.name],
                "values": figures(plan.known, objectives),
                "steps": plan.known.candidate.steps,
                "picked": list(plan.picked),
                "depth": [_depth(d) for d in plan.schedule.depth],
                "ratio": list(plan.schedule.ratio),
                "recovery": [recovery.label for recovery in plan.schedule.recoveries],
            }
            for plan in plans
        ],
        "beside": [
            {"name": name, "values": figures(known, objectives), "error": known.error}
            for name, known in beside.items()
        ],
        "hypervolume": {
            "reference": reference,
            "front": hypervolume(best, reference),
            "beside": hypervolume(around, reference),
        },
        "history": [
            {
                "generation": i,
                "pictures": pictures,
                "seconds": round(seconds, 1),
                "hypervolume": hypervolume(values, reference),
                "front": [list(row) for row in values],
            }
            for i, (values, (pictures, seconds)) in enumerate(
                zip(search.history, search.spent, strict=True)
            )
        ],
        "plans": [
            {
                "key": known.candidate.key,
                "steps": known.candidate.steps,
                "config": known.candidate.settings(),
                "generation": known.generation,
                "prompts": known.prompts,
                "given_up": known.given_up,
                "error": known.error,
                "values": figures(known, objectives),
                "curve": list(known.curve),
            }
            for known in proposed
        ],
    }


def _depth(depth: int) -> int | str:
    name = depth_name(depth, FULL)
    return int(name) if name.isdecimal() else name
