"""From the options of the command line to a method's configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from regrow.fields import explain
from regrow.hub import PLANS
from regrow.methods.base import Options
from regrow.methods.catalogue import configured, default_of
from regrow.methods.names import named


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
    options = Options(preset, schedule, ratio, interval)
    given = [f"--{option}" for option in options.given]
    if ":" in name or "+" in name or name.endswith(PLANS):
        return _with_settings(name, given, steps)
    kind = configured(name)
    taken = [f"--{option}" for option in kind.options()]
    for option in given:
        if option not in taken:
            allowed = ", ".join(taken) or "none"
            raise ValueError(f"{option}: {name} does not take it; allowed are {allowed}")
    if not given:
        return default_of(name)
    try:
        return kind.from_options(options, steps)
    except ValidationError as error:
        raise ValueError(explain(error)) from error


def _with_settings(name: str, given: list[str], steps: int) -> Any:
    """The configuration of a short name, which says everything itself."""
    if given:
        raise ValueError(f"{', '.join(given)}: not allowed with --method {name}, which has its settings")
    found = named(name, steps)
    if found.config is None or (found.steps != steps and found.config.sampler_steps is None):
        raise ValueError(f"method: {name!r} is not allowed, it must be a method; steps are --steps")
    return found.config


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
