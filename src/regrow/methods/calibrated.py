"""A plan that `regrow.calibrate` found for a model: as many steps, and what each call of them does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from importlib import resources
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from regrow.core.recipe import MadeFor, Recipe, recipe_of
from regrow.fields import MOST_CALLS, Calls, Checked, Count
from regrow.methods.base import About, MethodConfig, register
from regrow.methods.dato import DaTo
from regrow.schedule import FULL, Schedule

Timestep = Annotated[float, Field(ge=0, le=MOST_CALLS)]


BUNDLED = ("emoji-2x", "emoji-4x", "emoji-6x", "cifar10-3x", "cifar10-5x", "cifar10-10x")
"""Plans of the bundled models: see ``benchmarks/forecasts.py``."""


class Tried(Checked):
    """A candidate of a calibration.

    Args:
        name: what it does, in words.
        psnr: in dB, of its pictures to the unaccelerated ones, the mean; 99 stands for equal pictures.
        error: standard error of that.
        behind: how much nearer the chosen plan is, in dB, the mean of the pictures.
        behind_error: standard error of that.
        prompts: how many it was measured on.
    """

    name: str
    psnr: float
    error: float = 0.0
    behind: float = 0.0
    behind_error: float = 0.0
    prompts: Count


@register
class Calibrated(MethodConfig):
    """A calibrated plan.

    Args:
        steps: of the sampler: give it to the pipeline as ``num_inference_steps``.
        timesteps: instead, to give to the pipeline as ``timesteps``; None for the sampler's own.
        before: timesteps of the sampler that come before the first call (image-to-image begins late).
        schedule: what each call does.
        instead_of: steps of the unaccelerated runs that it was compared with.
        speedup: as measured in the calibration, with the whole pipeline; None if it was not.
        tried: the candidates, the nearest to the unaccelerated pictures first.
    """

    ABOUT: ClassVar[About] = About(
        title="Calibrated plan",
        what="what regrow calibrate found for a model: forecasts, or fewer steps where these are nearer",
        models="any model",
        note="a file: regrow calibrate --speedup 3, then --method FILE.json",
        place=5,
    )

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        name: {"file": f"{name}.json"} for name in BUNDLED
    }

    method: Literal["calibrated"] = "calibrated"
    steps: Calls
    timesteps: tuple[Timestep, ...] | None = None
    before: Annotated[int, Field(ge=0, le=MOST_CALLS)] = 0
    schedule: Schedule
    instead_of: Calls
    speedup: float | None = Field(None, gt=0)
    tried: tuple[Tried, ...] = ()

    @model_validator(mode="after")
    def _as_many_timesteps(self) -> Self:
        if self.timesteps is not None and len(self.timesteps) != self.steps:
            raise ValueError(f"timesteps: {len(self.timesteps)} entries for {self.steps} steps")
        return self

    @classmethod
    def of_preset(cls, fields: Mapping[str, Any]) -> Self:
        """The plan of a bundled file."""
        file = resources.files("regrow") / "presets" / fields["file"]
        return cls.model_validate_json(file.read_text(encoding="utf-8"))

    @property
    def leaves_out(self) -> bool:
        """Whether some call is not full; if none is, the plan is fewer steps."""
        return any(step.ratio or step.depth != FULL for step in self.schedule.kinds())

    @property
    def sampler_steps(self) -> int:
        """`steps`."""
        return self.steps

    @property
    def unaccelerated_steps(self) -> int:
        """`instead_of`."""
        return self.instead_of

    def arguments(self) -> Mapping[str, Any]:
        """The timesteps, if they are not the sampler's own."""
        return {} if self.timesteps is None else {"timesteps": list(self.timesteps)}

    def at(self, calls: int) -> Self:
        """The same with the schedule of so many calls."""
        return self.model_copy(update={"schedule": self.schedule.resample(calls)})


@recipe_of.register
def _(config: Calibrated) -> Recipe:
    made_for = MadeFor(config.steps, config.schedule.calls, config.before, config.timesteps)
    if config.schedule.max_ratio:
        return replace(recipe_of(DaTo(schedule=config.schedule)), made_for=made_for)
    return Recipe(config.schedule, whole=not config.leaves_out, made_for=made_for)
