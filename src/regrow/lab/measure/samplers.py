"""Replace a pipeline's scheduler by another one, by name."""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from math import isfinite
from typing import Any

import diffusers
from diffusers.utils import DummyObject

from regrow.methods.names import plain
from regrow.words import offer, shown

STEPS = 10
"""Number of steps with which a new scheduler is tested."""


@dataclass(frozen=True)
class Sampler:
    """A scheduler of diffusers, with settings that differ from the pipeline's.

    Args:
        kind: its class.
        options: arguments of the class; the others are copied from the replaced scheduler.
    """

    kind: Any
    options: dict[str, Any]

    @classmethod
    def parse(cls, text: str) -> Sampler:
        """Read ``EulerDiscreteScheduler``, or ``PNDM:skip_prk_steps=true``; "Scheduler" may be left out.

        Raises:
            ValueError: if there is no such scheduler, or it takes no such setting.
            ImportError: if it needs a package that is not installed.
        """
        name, _, rest = text.partition(":")
        kind: Any = getattr(diffusers, name.removesuffix("Scheduler") + "Scheduler", None)
        if isinstance(kind, DummyObject):
            # Its error names the missing package.
            kind.from_config({})
        if not _is_scheduler(kind):
            raise ValueError(
                f"scheduler: {shown(name)} is not allowed, it must be a class of diffusers such as "
                f"EulerDiscreteScheduler{offer(name, _names())}"
            )
        taken = inspect.signature(kind).parameters
        options: dict[str, Any] = {}
        for part in rest.split(",") if rest else ():
            key, equals, value = part.partition("=")
            if not equals or key not in taken or key in options:
                raise ValueError(
                    f"scheduler: {shown(part)} is not allowed, it must be NAME=VALUE with a setting of "
                    f"{kind.__name__}, each once: {', '.join(taken)}{offer(key, taken)}"
                )
            options[key] = plain(value)
            usual = taken[key].default
            wanted = _wanted(options[key], usual)
            if wanted is not None:
                raise ValueError(f"scheduler: {part!r} is not allowed, {key} must be {wanted}")
        return cls(kind, options)

    def put_into(self, pipeline: Any) -> None:
        """Replace a pipeline's scheduler.

        Raises:
            ValueError: if the pipeline can't use this scheduler.
        """
        pipeline.scheduler = self.instead_of(pipeline.scheduler)

    def instead_of(self, scheduler: Any) -> Any:
        """Make a scheduler with the settings of another.

        Raises:
            ValueError: if it can't have these settings.
        """
        known = {kind.__name__ for kind in scheduler.compatibles if _is_scheduler(kind)}
        if self.kind.__name__ not in known:
            raise ValueError(
                f"scheduler: {self.kind.__name__} is not allowed with this pipeline, it must be one of "
                f"{', '.join(sorted(known))}"
            )
        try:
            made = self.kind.from_config(scheduler.config, **self.options)
            if not made.config.get("use_dynamic_shifting", False):
                copy.deepcopy(made).set_timesteps(STEPS)
        except (ValueError, TypeError, RuntimeError) as error:
            # NotImplementedError is a RuntimeError.
            raise ValueError(f"scheduler: {self.kind.__name__} with {self.options}: {error}") from error
        return made


def _names() -> list[str]:
    """List the names of diffusers' schedulers, with and without the ending."""
    names = [name for name in dir(diffusers) if name.endswith("Scheduler")]
    return [*names, *(name.removesuffix("Scheduler") for name in names)]


def _is_scheduler(kind: Any) -> bool:
    """Whether an object of diffusers is a scheduler that can be used here."""
    scheduler = inspect.isclass(kind) and issubclass(kind, diffusers.SchedulerMixin)
    return scheduler and not isinstance(kind, DummyObject)


def _wanted(value: Any, usual: Any) -> str | None:
    """Name what a value must be, if the default is a truth value or a number; None if the value is fine."""
    if isinstance(usual, bool):
        return None if isinstance(value, bool) else "true or false"
    if isinstance(usual, int):
        return None if isinstance(value, int) and not isinstance(value, bool) else "a whole number"
    if isinstance(usual, float):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return None if number and isfinite(value) else "a number"
    return None
