"""Find a plan for a user's own pipeline, never worse than fewer steps: record, fit, run, compare."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
from PIL import Image

from regrow.apply import apply
from regrow.fields import MOST_CALLS, check_within
from regrow.lab.calibration.drift import Growth
from regrow.lab.calibration.levels import other_timesteps
from regrow.lab.calibration.proposals import Proposal, deep_proposals, pruned
from regrow.lab.calibration.recording import Recording, record, watched
from regrow.lab.calibration.search import Answer, FewerSteps, Plan, PlanOutcome, search
from regrow.lab.measure.images import psnr
from regrow.lab.measure.sampling import Pictures, make
from regrow.methods.calibrated import Calibrated, Tried
from regrow.models import denoiser_of, layout_of
from regrow.recover.fit import Array
from regrow.recover.time import REUSE
from regrow.schedule import FULL, Schedule

FEWEST = 4
"""Prompts, of which half are fitted on and half compared."""
EQUAL = 99.0
"""PSNR in dB that stands for the infinite one of equal pictures."""
RATIO = 0.5
"""Share of the tokens that plans prune, where that pays."""
PAYS = 0.9
"""Plans that prune are tried where a full call that does takes at most this share of another."""
SHORT, LONG = 2, 8
"""Steps of the runs that calls are timed in."""
ROUNDS = 3
"""Runs of which a time is the median."""
LADDER = (10.0, 8.0, 6.0, 5.0, 4.0, 3.0, 2.5, 2.0, 1.5, 1.25)
"""Speed-ups that are tried for a wish of quality, the fastest first."""
ENOUGH = 0.99
"""Share of a wished speed-up that passes for it: times differ by as much from run to run."""


class OutOfReachError(ValueError):
    """No plan is as fast as wished."""


@dataclass(frozen=True)
class Wish:
    """What a plan is to give: one of the three.

    Args:
        speedup: of the whole pipeline in measured time, > 1.
        fewer_macs: of the denoiser in MACs, > 1.
        psnr: in dB, > 0, of its pictures to the unaccelerated ones. The fastest plan that reaches it is
            meant.

    Raises:
        ValueError: if none, or more than one, is given, or its value is out of bounds.
    """

    speedup: float | None = None
    fewer_macs: float | None = None
    psnr: float | None = None

    def __post_init__(self) -> None:
        given = {k: v for k, v in vars(self).items() if v is not None}
        if len(given) != 1:
            raise ValueError(f"{', '.join(vars(self))}: one of them must be given, and only one")
        for name, value in given.items():
            least, most = (0, EQUAL) if name == "psnr" else (1, 1000)
            if not least < value <= most:
                raise ValueError(f"{name}: {value} is not allowed, it must be > {least} and <= {most}")


@dataclass(frozen=True)
class Settings:
    """How pictures are made.

    Args:
        steps: of the sampler, unaccelerated.
        guidance: scale; the pipeline's own if None.
        seed: of the first prompt; the others follow.
        height: in pixels; the model's own if None.
        width: in pixels; the model's own if None.
        batch: pictures made at once, also where time is measured.
        model: name, for the plan's file.
        more: further arguments of the pipeline's call.
    """

    steps: int = 50
    guidance: float | None = None
    seed: int = 0
    height: int | None = None
    width: int | None = None
    batch: int = 1
    model: str = ""
    more: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_within("steps", self.steps, 2, MOST_CALLS)
        check_within("batch", self.batch, 1, 10_000)
        for name in ("timesteps", "sigmas", "num_inference_steps", "generator"):
            if name in self.more:
                raise ValueError(f"more: {name} is not allowed in it, it must be left out: it is set here")


@dataclass(frozen=True)
class Costs:
    """What a generation costs, in full calls.

    Args:
        rest: all that is no call of the denoiser.
        output: a call that forecasts the output.
        deep: one that computes a single layer of the up path, or a single block; None where there is none.
        pruning: a full call that prunes tokens; None where that was not timed.
    """

    rest: float
    output: float
    deep: float | None
    pruning: float | None = None

    def full_calls(self, budget: float, calls: int, other: float, full: float = 1.0) -> int:
        """How many of so many calls may be full within a budget, if each of the others costs so much."""
        return min(math.floor((budget - self.rest - calls * other) / (full - other) + 1e-6), calls)

    def least(self, calls: int) -> float:
        """What so many calls cost if two are full and the output of the others is forecast."""
        return self.rest + 2 + (calls - 2) * self.output


@dataclass(frozen=True)
class CalibrationProgress:
    """How far a calibration is.

    Args:
        what: what is done now.
        done: pictures of it that are done.
        total: all of them.
    """

    what: str
    done: int
    total: int


class Calibration:
    """The runs of a calibration.

    Args:
        pipe: a diffusers pipeline; nothing stays on it.
        prompts: at least `FEWEST`; half of them are fitted on, the others compared.
        settings: how pictures are made.
        on_progress: told what is done.
        file: keeps the recording, so that a stopped one is continued; None keeps it in memory.

    Raises:
        ValueError: if there are too few prompts.
    """

    def __init__(
        self,
        pipe: Any,
        prompts: Sequence[str],
        settings: Settings,
        on_progress: Callable[[CalibrationProgress], None] | None = None,
        file: Path | None = None,
    ) -> None:
        if isinstance(prompts, str):
            raise ValueError("prompts: a text is not allowed, it must be a list of texts")
        check_within("prompts", len(prompts), FEWEST, 10_000)
        self.pipe, self.settings, self._file = pipe, settings, file
        half = len(prompts) // 2
        self.fit, self.compared = tuple(prompts[:half]), tuple(prompts[half:])
        self.pictures: dict[Plan, list[Any]] = {}
        """By plan, its pictures of the first compared prompts."""
        self.answer: Answer | None = None
        """The last one that was found."""
        self._tell = on_progress or (lambda progress: None)
        self._plain: list[Any] = []

    @functools.cached_property
    def recording(self) -> Recording:
        """The unaccelerated runs that plans are fitted on."""

        def told(done: int) -> None:
            self._tell(CalibrationProgress("recording unaccelerated runs", done, len(self.fit)))

        told(0)
        deep = layout_of(denoiser_of(self.pipe)).depths > 1
        return record(
            self.pipe, self.fit, **vars(self.settings), deep=deep, file=self._file, on_prompt=told
        )

    @property
    def calls(self) -> int:
        """Calls of the denoiser in an unaccelerated run; PLMS makes one more than steps.

        Raises:
            ValueError: if there is a single one, so that nothing can be left out.
        """
        calls = self.recording.origin.calls
        if calls < 2:
            raise ValueError(
                f"steps: {self.settings.steps} is not allowed, it must be so many that the pipeline calls "
                "its denoiser >= 2 times"
            )
        return calls

    @property
    def calls_a_step(self) -> float:
        """Calls of the denoiser that the sampler makes in a step: nearly 2 of Heun's, less than 1 in
        image-to-image."""
        return self.calls / self.settings.steps

    def plain(self, prompts: int) -> list[Any]:
        """The unaccelerated pictures of the first compared prompts."""
        self._make("unaccelerated", None, self._plain, prompts)
        return self._plain[:prompts]

    def measure(self, plan: Plan, prompts: int) -> Array:
        """The PSNR in dB of a plan's pictures of the first compared prompts to the unaccelerated ones."""
        made = self.pictures.setdefault(plan, [])
        plain = self.plain(prompts)
        self._make(plan.name.split(",")[0], self.config(plan), made, prompts)
        return np.array([_psnr(a, b) for a, b in zip(plain, made[:prompts], strict=True)])

    def config(self, plan: Plan, steps: int | None = None) -> Calibrated:
        """What a plan is as a configuration.

        Args:
            plan: the plan.
            steps: of the sampler, where the plan forecasts; those of the settings if None.
        """
        whole = self.settings.steps
        if isinstance(plan, FewerSteps):
            schedule = Schedule.constant()
            return Calibrated(
                steps=plan.steps, timesteps=plan.timesteps, schedule=schedule, instead_of=whole
            )
        return Calibrated(
            steps=steps or whole, before=plan.before, schedule=plan.schedule(), instead_of=whole
        )

    def _make(self, what: str, config: Calibrated | None, made: list[Any], prompts: int) -> None:
        """Add the pictures that are missing of the first so many compared prompts."""
        steps = self.settings.steps if config is None else config.steps
        while len(made) < prompts:
            part = self.compared[len(made) : min(len(made) + self.settings.batch, prompts)]
            made += list(self._batch(config, steps, part, len(made)).images)
            self._tell(CalibrationProgress(what, len(made), prompts))

    def _batch(
        self, config: Calibrated | None, steps: int, prompts: Sequence[str] = (), place: int = 0
    ) -> Pictures:
        """Make a batch of pictures, under a plan or with the pipeline as it is.

        Args:
            config: the plan; None for none.
            steps: of the sampler.
            prompts: some of the compared ones; the first batch of these if empty.
            place: of the first among the compared ones.
        """
        s = self.settings
        applied = config is not None and config.leaves_out
        with apply(self.pipe, config) if applied else nullcontext():
            return make(
                self.pipe,
                prompts or self.compared[: s.batch],
                steps=steps,
                guidance=s.guidance,
                seed=s.seed + len(self.fit) + place,
                height=s.height,
                width=s.width,
                more={**s.more, **({} if config is None else config.arguments())},
            )

    def speedup(self, config: Calibrated) -> float:
        """The speed-up of a plan as measured: unaccelerated and plan in turn, the median of the rounds."""
        found = []
        for done in range(ROUNDS):
            self._tell(CalibrationProgress("measuring the plan's time", done, ROUNDS))
            plain = self._batch(None, self.settings.steps).seconds
            found.append(plain / self._batch(config, config.steps).seconds)
        return median(found)

    def timed(self) -> Costs:
        """What calls cost in time."""
        self._tell(CalibrationProgress("timing calls", 0, 1))
        (few, short), (many, long) = self._short_run(SHORT), self._short_run(LONG)

        def seconds(steps: int, plan: Proposal | None = None) -> float:
            config = None if plan is None else self.config(plan, steps)
            return median([self._batch(config, steps).seconds for _ in range(ROUNDS)])

        least, most = seconds(few), seconds(many)
        call = max((most - least) / (long.total - short.total), 1e-9)
        rest, others = max(least / call - short.total, 0.0), max(long.total - 1, 1)

        def share(depth: int) -> float:
            cost = seconds(many, replace(long, depth=depth)) / call - rest - 1
            return min(max(cost / others, 0.0), 0.99)

        layout = layout_of(denoiser_of(self.pipe))
        output, deep = share(0), share(1) if layout.depths > 1 else None
        if not layout.blocks:
            return Costs(rest, output, deep)
        pruning = (seconds(many, replace(long, depth=FULL, ratio=RATIO)) / call - rest) / long.total
        return Costs(rest, output, deep, pruning)

    def counted(self) -> Costs:
        """What calls cost in MACs."""
        if layout_of(denoiser_of(self.pipe)).depths == 1:
            return Costs(0.0, 0.0, None)
        steps, plan = self._short_run(LONG)
        with apply(self.pipe, self.config(replace(plan, depth=1), steps)) as run:
            self._batch(None, steps, self.compared[:1])
            last = run.report().calls[-1]
        return Costs(0.0, 0.0, last.macs / last.full_macs if last.full_macs else None)

    def _short_run(self, steps: int) -> tuple[int, Proposal]:
        """Steps, and a plan of them with one full call: so many, or as many as make so many calls."""
        steps = max(steps, math.ceil(steps / self.calls_a_step - 1e-6))
        with watched(self.pipe) as seen:
            self._batch(None, steps)
        calls = len(seen.outputs)
        return steps, Proposal("", (0,), REUSE, calls, seen.before, seen.total - seen.before - calls)

    def find(self, budget: float, costs: Costs) -> Answer:
        """The nearest of the plans within a budget, in full calls."""
        steps, calls, each = self.settings.steps, self.calls, self.calls_a_step
        # In image-to-image, so many make a call.
        least = max(math.ceil(1 / each - 1e-6), 1)
        fewer = min(max(math.floor((budget - costs.rest) / each + 1e-6), least), steps)
        count = max(min(costs.full_calls(budget, calls, costs.output), calls - 1), 2)
        plain, others = list(self._fewer(fewer)), lambda growth: self._others(budget, costs, growth)
        self.answer = search(self.recording, count, plain, self.measure, len(self.compared), others)
        return self.answer

    def _fewer(self, steps: int) -> Iterator[FewerSteps]:
        """Fewer steps: the sampler's own, and others where it takes any."""
        yield FewerSteps(f"{steps} steps", steps)
        if self.recording.before:
            # With other timesteps, a run that begins late would begin with another amount of noise.
            return
        for name, timesteps in other_timesteps(self.pipe, self.settings.steps, steps):
            yield FewerSteps(f"{steps} steps, {name}", len(timesteps), timesteps)

    def _others(self, budget: float, costs: Costs, growth: Growth) -> Iterator[Proposal]:
        """Plans whose cached calls compute some layers, or whose calls prune."""
        calls = self.calls
        if costs.deep is not None:
            count = costs.full_calls(budget, calls, costs.deep)
            if 2 <= count < calls:
                yield from deep_proposals(self.recording, count, growth)
        if costs.pruning is not None and costs.output < costs.pruning < PAYS:
            count = costs.full_calls(budget, calls, costs.output, costs.pruning)
            if 2 <= count < calls:
                yield from pruned(self.recording, count, RATIO)


def calibrate(
    pipe: Any,
    prompts: Sequence[str],
    *,
    speedup: float | None = None,
    fewer_macs: float | None = None,
    psnr: float | None = None,
    steps: int = 50,
    guidance: float | None = None,
    seed: int = 0,
    height: int | None = None,
    width: int | None = None,
    batch: int = 1,
    model: str = "",
    more: Mapping[str, Any] = {},
    on_progress: Callable[[CalibrationProgress], None] | None = None,
) -> Calibrated:
    """Find the plan for a pipeline that is nearest to its unaccelerated pictures at a speed.

    Half of the prompts are run unaccelerated and recorded; forecasts are fitted to these runs, and the
    steps that are computed are searched on the recording. The best, and fewer steps of the same cost, are
    run on the other half, which nothing was fitted on. The nearest is the answer: fewer steps, if they are.

    Args:
        pipe: a diffusers pipeline of pictures or videos from text or from classes.
        prompts: at least 4, better 16: like those that the plan is for.
        speedup: of the whole pipeline, in time measured here.
        fewer_macs: instead, of the denoiser in MACs.
        psnr: instead, in dB: the fastest plan that is as near.
        steps: of the unaccelerated sampler.
        guidance: scale; the pipeline's own if None.
        seed: of the first prompt.
        height: in pixels; the model's own if None.
        width: in pixels; the model's own if None.
        batch: pictures made at once; the time is that of such batches.
        model: its name, for the plan's file.
        more: further arguments of the pipeline's call.
        on_progress: told what is done.

    Returns:
        the plan: pass it to `regrow.apply`, and its ``steps`` and what its ``arguments()`` say to the
        pipeline: ``pipe(prompt, num_inference_steps=plan.steps, **plan.arguments())``.

    Raises:
        ValueError: naming the argument that is out of bounds, or if no plan gives what is wished for.
    """
    wish = Wish(speedup, fewer_macs, psnr)
    settings = Settings(steps, guidance, seed, height, width, batch, model, more)
    return plan_for(Calibration(pipe, prompts, settings, on_progress), wish)


def plan_for(calibration: Calibration, wish: Wish) -> Calibrated:
    """The answer of `calibrate`."""
    if wish.fewer_macs is not None:
        costs = calibration.counted()
        return plan_of(calibration, calibration.find(_budget(calibration, costs, wish.fewer_macs), costs))
    costs = calibration.timed()
    if wish.speedup is not None:
        return _fast_enough(calibration, costs, wish.speedup)
    for speedup in LADDER:
        try:
            plan = _fast_enough(calibration, costs, speedup)
        except OutOfReachError:
            continue
        if plan.tried[0].psnr >= (wish.psnr or 0.0):
            return plan
    raise ValueError(f"psnr: {wish.psnr} dB is reached by no plan that is {LADDER[-1]}x faster")


def _budget(calibration: Calibration, costs: Costs, factor: float) -> float:
    """What a generation may cost, in full calls.

    Raises:
        OutOfReachError: if two calls cost more.
    """
    whole = costs.rest + calibration.calls
    fastest = whole / costs.least(calibration.calls)
    if factor > fastest:
        raise OutOfReachError(
            f"speedup, fewer_macs: {factor:g} can't be reached, it must be <= {fastest:.3g}: two calls of "
            "the denoiser, and what is no call of it, take the rest"
        )
    return whole / factor


def _fast_enough(calibration: Calibration, costs: Costs, speedup: float) -> Calibrated:
    """The nearest plan that is so fast when measured; as long as it is not, with fewer full calls.

    Raises:
        OutOfReachError: if none is.
    """
    budget, least = _budget(calibration, costs, speedup), costs.least(calibration.calls)
    while True:
        plan = plan_of(calibration, calibration.find(budget, costs))
        measured = calibration.speedup(plan)
        if measured >= ENOUGH * speedup:
            return plan.model_copy(update={"speedup": round(measured, 3)})
        if budget < least + 1:
            raise OutOfReachError(
                f"speedup: {speedup:g} can't be reached, the fastest plan gave {measured:.3g}"
            )
        budget = max(budget - max(1.0, (budget - costs.rest) * (1 - measured / speedup)), least)


def plan_of(calibration: Calibration, answer: Answer) -> Calibrated:
    """The configuration of an answer, with all that was tried: the plan first."""
    best = answer.best

    def tried(one: PlanOutcome) -> Tried:
        figures = {"psnr": one.mean, "error": one.error}
        figures["behind"], figures["behind_error"] = best.gain(one)
        rounded = {name: round(value, 3) for name, value in figures.items()}
        return Tried(name=one.plan.name, prompts=len(one.psnr), **rounded)

    config = calibration.config(best.plan)
    changes = {
        "steps": config.steps,
        "calls": config.schedule.calls or round(config.steps * calibration.calls_a_step),
        "prompts": len(best.psnr),
        "quality": {"psnr": round(best.mean, 3)},
    }
    outcomes = [best, *(one for one in answer.outcomes if one is not best)]
    origin = calibration.recording.origin.model_copy(update=changes)
    return config.model_copy(update={"tried": tuple(map(tried, outcomes)), "origin": origin})


def _psnr(plain: Any, made: Any) -> float:
    """PSNR of two pictures, or of the frames of two videos, in dB; at most `EQUAL`."""
    if isinstance(plain, Image.Image):
        return min(psnr(plain, made), EQUAL)
    if isinstance(plain, (list, tuple)):
        return fmean(_psnr(a, b) for a, b in zip(plain, made, strict=True))
    a, b = (np.asarray(x.cpu() if hasattr(x, "cpu") else x, dtype=np.float64) for x in (plain, made))
    error, span = float(((a - b) ** 2).mean()), float(a.max() - a.min()) or 1.0
    return EQUAL if error == 0 else min(10 * math.log10(span**2 / error), EQUAL)
