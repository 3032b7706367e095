"""The origin of a schedule: what it was searched on, and what it gave there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from math import isfinite
from typing import Annotated, Any

from pydantic import Field

from regrow.fields import Calls, Checked, Count, Guidance, Pixels, Seed

# The PSNR of equal pictures is infinite.
Figure = Annotated[float, Field(allow_inf_nan=True)]


class Origin(Checked):
    """What a plan was searched on.

    Args:
        model: name, folder or hub id.
        denoiser: `denoiser_key` of its denoiser.
        scheduler: class of the sampler.
        scheduler_key: `scheduler_key` of it; empty if not known.
        steps: steps of the sampler.
        calls: calls of the denoiser at each branch of guidance; PLMS makes one more than steps.
        guidance: guidance scale; None for the pipeline's own.
        height: in pixels; None for the model's own.
        width: in pixels; None for the model's own.
        prompts: how many the plan was measured on.
        seed: of the first of them; the others follow.
        quality: what was minimised or maximised, by name.
        cost: what was minimised of the costs, by name; shares are of the unaccelerated run.
        regrow: version that found it.
        date: of that day, ISO 8601.
    """

    model: str
    denoiser: str
    scheduler: str
    scheduler_key: str = ""
    steps: Calls
    calls: Calls
    guidance: Guidance | None = None
    height: Pixels | None = None
    width: Pixels | None = None
    prompts: Count
    seed: Seed = 0
    quality: Mapping[str, Figure] = {}
    cost: Mapping[str, Figure] = {}
    regrow: str = ""
    date: str = ""

    def __hash__(self) -> int:
        return hash(self.model_dump_json())

    def unlike(self, denoiser: Any, scheduler: Any) -> Iterator[str]:
        """What differs where the plan is applied now, a sentence each.

        Args:
            denoiser: that it is applied to.
            scheduler: of the sampler; None if not known.
        """
        if denoiser_key(denoiser) != self.denoiser:
            yield f"it was found on another denoiser, that of {self.model} ({self.denoiser.split(':')[0]})"
        if scheduler is not None and type(scheduler).__name__ != self.scheduler:
            yield f"it was found with {self.scheduler}, not {type(scheduler).__name__}"
        elif scheduler is not None and self.scheduler_key not in ("", scheduler_key(scheduler)):
            yield f"it was found with other settings of {self.scheduler}"


def denoiser_key(denoiser: Any) -> str:
    """Class and settings of a denoiser in a few characters; weights don't count."""
    return _key(denoiser, _settings(denoiser))


def scheduler_key(scheduler: Any) -> str:
    """Class and settings of a scheduler in a few characters."""
    return _key(scheduler, scheduler_settings(scheduler))


def scheduler_settings(scheduler: Any) -> dict[str, Any]:
    """The settings of a scheduler as plain data; numbers that JSON does not know are text."""
    strange = {
        k: str(v) for k, v in _settings(scheduler).items() if isinstance(v, float) and not isfinite(v)
    }
    return json.loads(json.dumps(_settings(scheduler) | strange, default=str))


def _settings(model: Any) -> dict[str, Any]:
    # Names with an underscore say how it was made, some of them in another order in each process.
    return {k: v for k, v in dict(model.config).items() if not k.startswith("_")}


def _key(model: Any, settings: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:12]
    return f"{type(model).__name__}:{digest}"
