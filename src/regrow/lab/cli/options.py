"""From the options of the command line to a method's configuration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from regrow.fields import MOST_CALLS
from regrow.hub import PLANS
from regrow.lab.cli.requests import Request, option
from regrow.methods.base import MethodConfig, Options
from regrow.methods.catalogue import configured, default_of
from regrow.methods.names import named, plain
from regrow.words import offer, one_line

FIELDS = {"allow_extra_args": True, "ignore_unknown_options": True}
"""Settings of the commands that take the fields of the method they are told as options."""


@dataclass(frozen=True, kw_only=True)
class Accelerated(Request):
    """Which method is on the denoiser."""

    method: str | None = option(
        None, "Method; see [b]regrow methods[/b]. Or with settings: cat:0.3+deepcache:2."
    )
    preset: str | None = option(None, "Preset of the method.")
    schedule: Path | None = option(None, "Schedule file, YAML or JSON, or hub:owner/name/file.")
    ratio: float | None = option(None, "One pruning ratio for all calls.")
    interval: int | None = option(None, "A full call every N, depth 1 between.", min=1, max=MOST_CALLS)

    def configured(
        self, steps: int, more: Sequence[str], of_schedule: str | None = None
    ) -> tuple[Any, str]:
        """The configuration of the method, and a short name of what was asked for.

        Args:
            steps: calls in the generation, for ``interval``.
            more: other options with their values, each named as a field of the method.
            of_schedule: name of the method of a schedule file, if none has to be named.

        Returns:
            None and ``unaccelerated`` if there is no method.

        Raises:
            ValueError: naming the option, the value and what is allowed; see `method_config`.
        """
        options = self.part(Options)
        if self.method is None and more:
            raise _no_option(more[0].partition("=")[0])
        method = self.method or (None if self.schedule is None else of_schedule)
        if method is None:
            if options.given:
                dependent = (f"--{name}" for name in vars(options) if name != "schedule" or not of_schedule)
                raise ValueError(f"{', '.join(dependent)}: give --method too")
            return None, "unaccelerated"
        words = [method]
        words += [] if self.preset is None else [self.preset]
        words += [] if self.schedule is None else [self.schedule.stem]
        words += [] if self.interval is None else [f"1:{self.interval}"]
        words += [] if self.ratio is None else [f"r={self.ratio:g}"]
        words += [f"{field}={value}" for field, value in fields_in(more).items()]
        return method_config(method, **vars(options), steps=steps, more=more), " ".join(words)


def method_config(
    name: str,
    *,
    steps: int,
    more: Sequence[str] = (),
    **options: Any,
) -> Any:
    """The configuration a user asked for.

    Args:
        name: of the method, or its short name with settings, such as ``cat:0.3+deepcache:2``. With none of
            the options below, what the name alone means.
        steps: calls in the generation, for ``interval``.
        more: other options with their values, each named as a field of the method.
        options: those of `Options`, by their names.

    Raises:
        ValueError: naming the option, the value and what is allowed.
        ScheduleError: if the schedule file can't be used.
        OSError: if it can't be read.
    """
    asked = Options(**options)
    given = [f"--{name}" for name in asked.given]
    changes = fields_in(more)
    if ":" in name or "+" in name or name.endswith(PLANS):
        return _with_settings(name, [*given, *map(option_of, changes)], steps)
    kind = configured(name)
    for field in changes:
        if field not in settable(kind):
            raise _no_option(option_of(field), [option_of(name) for name in settable(kind)])
    taken = [f"--{option}" for option in kind.options()]
    for one in given:
        if one not in taken:
            allowed = ", ".join(taken) or "none"
            raise ValueError(f"{one}: {name} does not have this option; it has {allowed}")
    config: MethodConfig = kind.from_options(asked, steps) if given else default_of(name)
    return config.changed(changes) if changes else config


def settable(kind: type[MethodConfig]) -> dict[str, FieldInfo]:
    """The fields of a method that a user sets."""
    others = ("method", "version", "origin")
    return {name: info for name, info in kind.model_fields.items() if name not in others}


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
