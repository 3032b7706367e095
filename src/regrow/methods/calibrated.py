"""A plan that `regrow.calibrate` found for a model: as many steps, and what each call of them does."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from regrow.fields import MOST_CALLS, Calls, Checked, Count
from regrow.methods.base import About, MethodConfig, TextError, register
from regrow.methods.dato import DaTo
from regrow.methods.parts import Parts, parts_of
from regrow.origin import Origin
from regrow.schedule import Schedule

Timestep = Annotated[float, Field(ge=0, le=MOST_CALLS)]


class Tried(Checked):
    """A candidate of a calibration.

    Args:
        name: what it does, in words.
        speedup: time of the unaccelerated run over its, by the calls that it makes.
        psnr: in dB, of its pictures to the unaccelerated ones, the mean; None if all are equal.
        error: standard error of that.
        behind: how much nearer the chosen plan is, in dB, the mean of the pictures.
        behind_error: standard error of that.
        prompts: how many it was measured on.
    """

    name: str
    speedup: float
    psnr: float | None
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
        schedule: what each call does.
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

    method: Literal["calibrated"] = "calibrated"
    version: Literal[1] = 1
    steps: Calls
    timesteps: tuple[Timestep, ...] | None = None
    schedule: Schedule
    speedup: float | None = Field(None, gt=0)
    tried: tuple[Tried, ...] = ()

    @model_validator(mode="after")
    def _as_many_timesteps(self) -> Self:
        if self.timesteps is not None and len(self.timesteps) != self.steps:
            raise ValueError(f"timesteps: {len(self.timesteps)} entries for {self.steps} steps")
        return self

    @classmethod
    def from_text(cls, text: str, calls: int) -> Self:
        """There is none by name: plans are in files."""
        raise TextError("nothing: a calibrated plan is a file, give its name as the method")

    @classmethod
    def fewer_steps(cls, steps: int, found: Origin | None = None) -> Self:
        """The sampler with fewer steps, each call of which is full."""
        return cls(steps=steps, schedule=Schedule.constant(), found=found)

    def at(self, calls: int) -> Self:
        """The same with the schedule of so many calls."""
        return self.model_copy(update={"schedule": self.schedule.resample(calls)})


@parts_of.register
def _(config: Calibrated) -> Parts:
    if config.schedule.max_ratio:
        return parts_of(DaTo(schedule=config.schedule))
    return Parts(config.schedule)
