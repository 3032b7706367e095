"""From the options of the command line to a method's configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from regrow.methods.catalogue import configured
from regrow.methods.dato import DaTo
from regrow.methods.sito import SiTo
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
        name: of the method.
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
    kind = configured(name)
    plans = {"--preset": preset, "--schedule": schedule, "--interval": interval}
    given = [option for option, value in plans.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)}: only one of them is allowed")
    try:
        if kind is SiTo:
            if schedule is not None or interval is not None:
                raise ValueError(f"{given[0]}: sito has no schedule; allowed are --preset and --ratio")
            if preset is not None:
                return SiTo.preset(preset, **({} if ratio is None else {"ratio": ratio}))
            if ratio is None:
                raise ValueError("sito needs --preset or --ratio")
            return SiTo(ratio=ratio)
        if preset is not None:
            plan = DaTo.preset(preset).schedule
        elif schedule is not None:
            plan = Schedule.load(schedule)
        elif interval is not None:
            plan = Schedule.every(interval, steps)
        elif ratio is not None:
            plan = Schedule.constant(ratio)
        else:
            raise ValueError(f"{name} needs --preset, --schedule, --ratio or --interval")
        if ratio is not None:
            plan = plan.with_ratio(ratio)
        if preset is not None:
            return DaTo.preset(preset, schedule=plan)
        return DaTo(schedule=plan)
    except ValidationError as error:
        raise ValueError(explain(error)) from error


def explain(error: ValidationError) -> str:
    """A validation error in one line a field."""
    lines = []
    for issue in error.errors():
        field = ".".join(str(part) for part in issue["loc"])
        message = issue["msg"].removeprefix("Value error, ")
        lines.append(f"{field}: {message} (got {issue['input']!r})" if field else message)
    return "; ".join(lines)


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
