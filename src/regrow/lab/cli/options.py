"""From the options of the command line to a method's configuration."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from regrow.fields import explain
from regrow.hub import PLANS
from regrow.methods.base import MethodConfig, Options
from regrow.methods.catalogue import configured, default_of
from regrow.methods.names import named, plain
from regrow.words import offer, one_line


def method_config(
    name: str,
    *,
    preset: str | None = None,
    schedule: Path | None = None,
    ratio: float | None = None,
    interval: int | None = None,
    steps: int,
    more: Sequence[str] = (),
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
        more: other options with their values, each named as a field of the method.

    Raises:
        ValueError: naming the option, the value and what is allowed.
        ScheduleError: if the schedule file can't be used.
        OSError: if it can't be read.
    """
    options = Options(preset, schedule, ratio, interval)
    given = [f"--{option}" for option in options.given]
    changes = fields_in(more)
    if ":" in name or "+" in name or name.endswith(PLANS):
        return _with_settings(name, [*given, *map(option_of, changes)], steps)
    kind = configured(name)
    for field in changes:
        own = [name for name in kind.model_fields if name not in ("method", "version", "found")]
        if field not in own:
            raise _no_option(option_of(field), [option_of(name) for name in own])
    taken = [f"--{option}" for option in kind.options()]
    for option in given:
        if option not in taken:
            allowed = ", ".join(taken) or "none"
            raise ValueError(f"{option}: {name} does not take it; allowed are {allowed}")
    try:
        config: MethodConfig = kind.from_options(options, steps) if given else default_of(name)
        return config.changed(changes) if changes else config
    except ValidationError as error:
        raise ValueError(explain(error)) from error


def fields_in(more: Sequence[str]) -> dict[str, Any]:
    """Fields with their values, from options such as ``--full-steps 12`` or ``--full-steps=12``.

    Raises:
        ValueError: if one has no value.
    """
    rest, found = list(more), dict[str, Any]()
    while rest:
        option, equals, text = rest.pop(0).partition("=")
        if not option.startswith("--"):
            raise _no_option(option)
        if not (equals or rest):
            raise ValueError(f"{one_line(option)}: it has no value, one must follow")
        found[option.removeprefix("--").replace("-", "_")] = plain(text if equals else rest.pop(0))
    return found


def option_of(field: str) -> str:
    """The option that sets a field."""
    return f"--{field.replace('_', '-')}"


def refuse(more: Sequence[str]) -> None:
    """Refuse options that are none, where no method is named whose fields they could be.

    Raises:
        ValueError: naming the first.
    """
    if more:
        raise _no_option(more[0].partition("=")[0])


def _no_option(option: str, allowed: Sequence[str] = ()) -> ValueError:
    return ValueError(f"no such option: {one_line(option)}{offer(option, allowed)}")


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
    more: Sequence[str] = (),
) -> str:
    """A short name of what was asked for, for tables and pictures."""
    words = [name]
    words += [] if preset is None else [preset]
    words += [] if schedule is None else [schedule.stem]
    words += [] if interval is None else [f"1:{interval}"]
    words += [] if ratio is None else [f"r={ratio:g}"]
    words += [f"{field}={value}" for field, value in fields_in(more).items()]
    return " ".join(words)
