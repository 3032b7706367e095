"""Another scheduler for a pipeline, by its name."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import diffusers
import yaml


@dataclass(frozen=True)
class Sampler:
    """A scheduler of diffusers and settings that are not the pipeline's own.

    Args:
        kind: its class.
        options: arguments of the class; all others are taken from the scheduler that it replaces.
    """

    kind: type
    options: dict[str, Any]

    @classmethod
    def parse(cls, text: str) -> Sampler:
        """``EulerDiscreteScheduler``, or ``PNDM:skip_prk_steps=true``; the ending may be left out.

        Raises:
            ValueError: if there is no such scheduler, or it takes no such setting.
        """
        name, _, rest = text.partition(":")
        kind = getattr(diffusers, name.removesuffix("Scheduler") + "Scheduler", None)
        if not (inspect.isclass(kind) and issubclass(kind, diffusers.SchedulerMixin)):
            raise ValueError(
                f"scheduler: {name!r} is not allowed, it must be a class of diffusers such as "
                "EulerDiscreteScheduler"
            )
        taken = inspect.signature(kind).parameters
        options = {}
        for part in rest.split(",") if rest else ():
            key, equals, value = part.partition("=")
            if not equals or key not in taken:
                raise ValueError(
                    f"scheduler: {part!r} is not allowed, it must be NAME=VALUE with a setting of "
                    f"{kind.__name__}: {', '.join(taken)}"
                )
            options[key] = yaml.safe_load(value)
        return cls(kind, options)

    def put_into(self, pipeline: Any) -> None:
        """Replace a pipeline's scheduler.

        Raises:
            ValueError: if the pipeline can't be sampled so.
        """
        known = {kind.__name__ for kind in pipeline.scheduler.compatibles}
        if self.kind.__name__ not in known:
            raise ValueError(
                f"scheduler: {self.kind.__name__} is not allowed with this pipeline, it must be one of "
                f"{', '.join(sorted(known))}"
            )
        kind: Any = self.kind
        pipeline.scheduler = kind.from_config(pipeline.scheduler.config, **self.options)
