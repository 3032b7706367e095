"""From the options of the command line to a method's configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from regrow import hub
from regrow.fields import explain
from regrow.methods.atedm import ATEDM
from regrow.methods.cat import CATPruning
from regrow.methods.catalogue import configured, default_of
from regrow.methods.dato import DaTo
from regrow.methods.deepcache import DeepCache
from regrow.methods.fora import FORA
from regrow.methods.names import PLANS, named
from regrow.methods.parts import MethodConfig
from regrow.methods.sito import SiTo
from regrow.methods.toca import ToCa
from regrow.methods.tome import ToMeSD
from regrow.schedule import Schedule


def method_config(
    name: str,
    *,
    preset: str | None = None,
    schedule: Path | None = None,
    ratio: float | None = None,
    interval: int | None = None,
    steps: int,
) -> Any:
    """The configuration a user asked for.

    Args:
        name: of the method, or its short name with settings, such as ``cat:0.3+deepcache:2``. With none of
            the options below, what the name alone means.
        preset: name of a preset.
        schedule: a schedule file.
        ratio: one pruning ratio for all calls.
        interval: a full call every so many, depth 1 between.
        steps: calls in the generation, for ``interval``.

    Raises:
        ValueError: naming the option, the value and what is allowed.
        ScheduleError: if the schedule file can't be used.
        OSError: if it can't be read.
    """
    options = {"--preset": preset, "--schedule": schedule, "--ratio": ratio, "--interval": interval}
    given = [option for option, value in options.items() if value is not None]
    if ":" in name or "+" in name or name.endswith(PLANS):
        return _with_settings(name, given, steps)
    kind = configured(name)
    taken = _OPTIONS[kind]
    for option in given:
        if option not in taken:
            raise ValueError(f"{option}: {name} does not take it; allowed are {', '.join(taken)}")
    if not given:
        return default_of(name)
    try:
        if kind in (DeepCache, FORA):
            return kind(interval=interval or 0)
        if kind is DaTo:
            plans = [option for option in given if option != "--ratio"]
            if len(plans) > 1:
                raise ValueError(f"{' and '.join(plans)}: only one of them is allowed")
            return _dato(preset, schedule, ratio, interval, steps)
        changes: dict[str, Any] = {}
        if ratio is not None:
            changes |= {"alpha": 1 - ratio} if kind is CATPruning else {"ratio": ratio}
        if interval is not None:
            changes |= {"interval": interval}
        return kind(**changes) if preset is None else kind.preset(preset, **changes)
    except ValidationError as error:
        raise ValueError(explain(error)) from error


def _with_settings(name: str, given: list[str], steps: int) -> Any:
    """The configuration of a short name, which says everything itself."""
    if given:
        raise ValueError(f"{', '.join(given)}: not allowed with --method {name}, which has its settings")
    found = named(name, steps)
    if found.config is None or found.steps != steps:
        raise ValueError(f"method: {name!r} is not allowed, it must be a method; steps are --steps")
    return found.config


_OPTIONS: dict[type[MethodConfig], tuple[str, ...]] = {
    DaTo: ("--preset", "--schedule", "--ratio", "--interval"),
    SiTo: ("--preset", "--ratio"),
    CATPruning: ("--preset", "--ratio"),
    ATEDM: ("--preset", "--ratio"),
    ToMeSD: ("--ratio",),
    DeepCache: ("--interval",),
    FORA: ("--interval",),
    ToCa: ("--interval", "--preset", "--ratio"),
}


def _dato(
    preset: str | None, schedule: Path | None, ratio: float | None, interval: int | None, steps: int
) -> DaTo:
    """DaTo with the plan a user asked for."""
    config = None if preset is None else DaTo.preset(preset)
    if config is not None:
        plan = config.schedule
    elif schedule is not None:
        plan = hub.load_schedule(schedule)
    elif interval is not None:
        plan = Schedule.every(interval, steps)
    else:
        plan = Schedule.constant()
    if ratio is not None:
        plan = plan.with_ratio(ratio)
    return DaTo(schedule=plan) if preset is None else DaTo.preset(preset, schedule=plan)


def method_label(
    name: str,
    preset: str | None,
    schedule: Path | None,
    ratio: float | None,
    interval: int | None,
) -> str:
    """A short name of what was asked for, for tables and pictures."""
    words = [name]
    words += [] if preset is None else [preset]
    words += [] if schedule is None else [schedule.stem]
    words += [] if interval is None else [f"1:{interval}"]
    words += [] if ratio is None else [f"r={ratio:g}"]
    return " ".join(words)
