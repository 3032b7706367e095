"""A plan for a user's own pipeline that is never worse than fewer steps: recorded, fitted, run, compared."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, median
from typing import Any

import numpy as np
from PIL import Image

from regrow.apply import apply
from regrow.calibration.fit import fitted
from regrow.calibration.influence import Array
from regrow.calibration.positions import Positions, candidates, dense_at_start
from regrow.calibration.recording import Recording, record
from regrow.fields import check_within
from regrow.measure.images import psnr
from regrow.measure.sampling import make
from regrow.methods.calibrated import Calibrated, Tried
from regrow.models import denoiser_of, layout_of
from regrow.recover.time import Chebyshev, Taylor, TimeRecovery
from regrow.schedule import FULL, Schedule

FEWEST = 4
"""Prompts, of which half are fitted on and half compared."""
FIRST = 4
"""Prompts that all candidates are run on; the best go on."""
BEST = 3
"""Candidates that are run on all prompts, besides fewer steps."""
EQUAL = 99.0
"""Stands for the infinite PSNR of equal pictures."""
LAST = 3
"""Values that a fitted forecast is made of; more gain less than a tenth of a dB on the bundled models."""


@dataclass(frozen=True)
class Wish:
    """What a plan is to give; one of the three.

    Args:
        speedup: of the whole pipeline in measured time.
        fewer_macs: of the denoiser in MACs.
        psnr: at least, in dB, of its pictures to the unaccelerated ones; the fastest plan that reaches it.

    Raises:
        ValueError: if none, or more than one, is given, or it is not allowed.
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
        width: likewise.
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


@dataclass(frozen=True)
class Costs:
    """What calls cost, as shares of a full one, and what of a generation is no call.

    Args:
        rest: of the whole generation, in full calls.
        output: of a call that forecasts the output.
        deep: of one that computes one layer of the up path, or one block; None where there is none.
    """

    rest: float
    output: float
    deep: float | None

    def of(self, full: int, others: int = 0, other: float = 0.0) -> float:
        """A generation, in full calls."""
        return self.rest + full + others * other

    def full_calls(self, budget: float, calls: int, other: float) -> int:
        """How many of so many calls may be full, if the others cost so much."""
        return math.floor((budget - self.rest - calls * other) / (1 - other) + 1e-6)


@dataclass(frozen=True)
class Candidate:
    """A plan that is tried.

    Args:
        name: what it does, in words.
        config: it.
        cost: of a generation, in full calls.
    """

    name: str
    config: Calibrated
    cost: float


@dataclass
class _Seen:
    """What a candidate made.

    Args:
        candidate: it.
        psnr: of each picture, in dB.
    """

    candidate: Candidate
    psnr: list[float]

    @property
    def mean(self) -> float:
        return fmean(self.psnr)


@dataclass(frozen=True)
class Progress:
    """How far a calibration is.

    Args:
        what: what is done now.
        done: of ``total``.
        total: pictures to make, as far as is known.
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

    Raises:
        ValueError: if there are too few prompts, or a setting is not allowed.
    """

    def __init__(
        self,
        pipe: Any,
        prompts: Sequence[str],
        settings: Settings,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> None:
        check_within("prompts", len(prompts), FEWEST, 10_000)
        check_within("steps", settings.steps, 2, 1000)
        check_within("batch", settings.batch, 1, 10_000)
        self.pipe, self.settings = pipe, settings
        half = len(prompts) // 2
        self.fit, self.held = tuple(prompts[:half]), tuple(prompts[half:])
        self.pictures: dict[str, list[Any]] = {}
        """By the name of a candidate, its pictures of the compared prompts."""
        self._tell = on_progress or (lambda progress: None)
        self._recording: Recording | None = None
        self._costs: Costs | None = None
        self._plain: list[Any] = []

    def record(self) -> Recording:
        """The unaccelerated runs that plans are fitted on."""
        if self._recording is None:
            s = self.settings
            total = len(self.fit)

            def told(done: int) -> None:
                self._tell(Progress("recording unaccelerated runs", done, total))

            told(0)
            self._recording = record(
                self.pipe,
                self.fit,
                steps=s.steps,
                guidance=s.guidance,
                seed=s.seed,
                height=s.height,
                width=s.width,
                model=s.model,
                batch=s.batch,
                more=s.more,
                on_prompt=told,
            )
        return self._recording

    @property
    def calls(self) -> int:
        """Steps in which the sampler is given an output; PLMS makes one more than steps."""
        return len(self.record().influence)

    def plain(self) -> list[Any]:
        """The unaccelerated pictures of the compared prompts."""
        if not self._plain:
            self._plain = self.make(None, self.settings.steps, self.held, "making unaccelerated pictures")
        return self._plain

    def make(self, config: Any, steps: int, prompts: Sequence[str], what: str) -> list[Any]:
        """Pictures of the first compared prompts by a plan, or by none."""
        made: list[Any] = []
        for begin in range(0, len(prompts), self.settings.batch):
            part = prompts[begin : begin + self.settings.batch]
            made += list(self._batch(config, steps, part, len(self.fit) + begin)[0])
            self._tell(Progress(what, len(made), len(prompts)))
        return made

    def _batch(self, config: Any, steps: int, prompts: Sequence[str], place: int) -> tuple[Any, float]:
        """Pictures of one batch, and seconds."""
        s = self.settings
        timesteps = getattr(config, "timesteps", None)
        more = dict(s.more) | ({} if timesteps is None else {"timesteps": list(timesteps)})

        def run() -> tuple[Any, float]:
            done = make(
                self.pipe,
                prompts,
                steps=steps,
                guidance=s.guidance,
                seed=s.seed + place,
                height=s.height,
                width=s.width,
                more=more,
            )
            return done.images, done.seconds

        if config is None or not config.leaves_out:
            return run()
        with apply(self.pipe, config):
            return run()

    def costs(self, *, in_time: bool) -> Costs:
        """What calls cost, in time or in MACs."""
        if self._costs is None:
            self._costs = self._timed() if in_time else self._counted()
        return self._costs

    def _timed(self) -> Costs:
        steps, part = self.settings.steps, self.held[: self.settings.batch]

        def seconds(config: Any, count: int) -> float:
            self._tell(Progress("timing calls", 0, 1))
            return self._batch(config, count, part, len(self.fit))[1]

        def once(depth: int) -> Calibrated:
            return _plan(Schedule(depth=(FULL, *(depth,) * (self.calls - 1)), ratio=(0.0,) * self.calls), steps)

        few = max(steps // 2, 1)
        seconds(None, min(2, steps))
        whole, half = (median([seconds(None, count) for _ in range(2)]) for count in (steps, few))
        call = max((whole - half) / (steps - few), 1e-9)
        rest = max(whole / call - steps, 0.0)

        def share(depth: int) -> float:
            other = (seconds(once(depth), steps) / call - rest - 1) / max(self.calls - 1, 1)
            return min(max(other, 0.0), 0.99)

        return Costs(rest, share(0), share(1) if self._has_depth() else None)

    def _counted(self) -> Costs:
        if not self._has_depth():
            return Costs(0.0, 0.0, None)
        schedule = Schedule(depth=(FULL, 1), ratio=(0.0, 0.0))
        with apply(self.pipe, _plan(schedule, 2)) as run:
            make(self.pipe, self.held[:1], steps=2, guidance=self.settings.guidance, more=self.settings.more)
            last = run.report().calls[-1]
        return Costs(0.0, 0.0, last.macs / last.full_macs if last.full_macs else None)

    def _has_depth(self) -> bool:
        return layout_of(denoiser_of(self.pipe)).depths > 1

    def candidates(self, budget: float, costs: Costs) -> list[Candidate]:
        """Plans of one cost; fewer steps come first.

        Args:
            budget: of a generation, in full calls.
            costs: of calls.
        """
        steps, calls = self.settings.steps, self.calls
        fewer = min(max(math.floor(budget - costs.rest + 1e-6), 1), steps)
        found = [Candidate(f"{fewer} steps", Calibrated.fewer_steps(fewer), costs.of(fewer))]
        found += [
            Candidate(f"{fewer} steps at other noise levels", config, costs.of(fewer))
            for config in self._other_levels(fewer)
        ]
        full = min(costs.full_calls(budget, calls, costs.output), calls)
        if 2 <= full < calls:
            cost = costs.of(full, calls - full, costs.output)
            for name, schedule in self._forecasts(full):
                found.append(Candidate(f"{full} of {calls} calls, {name}", _plan(schedule, steps), cost))
        deep = 0 if costs.deep is None else min(costs.full_calls(budget, calls, costs.deep), calls)
        if costs.deep is not None and 2 <= deep < calls:
            cost = costs.of(deep, calls - deep, costs.deep)
            for name, schedule in self._deep(deep):
                found.append(
                    Candidate(f"{deep} of {calls} calls, deep features {name}", _plan(schedule, steps), cost)
                )
        return found

    def _other_levels(self, steps: int) -> Iterator[Calibrated]:
        """Fewer steps at those of the sampler's own timesteps that are densest at the start."""
        takes = inspect.signature(self.pipe.scheduler.set_timesteps).parameters
        if "timesteps" not in takes or "timesteps" not in inspect.signature(self.pipe.__call__).parameters:
            return
        scheduler = self.pipe.scheduler
        scheduler.set_timesteps(self.settings.steps)
        own = scheduler.timesteps.tolist()
        for power in (1.5, 2.0):
            chosen = [own[i] for i in dense_at_start(len(own), min(steps, len(own)), power)]
            yield Calibrated(steps=len(chosen), timesteps=tuple(chosen), schedule=Schedule.constant())

    def _forecasts(self, full: int) -> Iterator[tuple[str, Schedule]]:
        """Plans that forecast the output: fitted at several positions, and the best of these unfitted."""
        recording, total = self.record(), self.calls
        gram, moves = recording.products, recording.moves
        places = candidates(total, full, lambda one: plan_error(gram, moves, one))
        for positions in dict.fromkeys([*places, dense_at_start(total, full, 2.0)]):
            recovery = fitted(gram, positions, last=LAST)
            yield f"fitted, at {_listed(positions)}", _output_plan(positions, total, recovery)
        best = places[0]
        for name, recovery in (("taylor", Taylor()), ("chebyshev", Chebyshev(degree=3, mix=0.5))):
            yield f"{name}, at {_listed(best)}", _output_plan(best, total, recovery)

    def _deep(self, full: int) -> Iterator[tuple[str, Schedule]]:
        total = self.calls
        for power in (1.0, 1.5):
            positions = dense_at_start(total, full, power)
            for name, recovery in (("taylor", Taylor()), ("chebyshev", Chebyshev(degree=3, mix=0.5))):
                yield f"{name}, at {_listed(positions)}", _output_plan(positions, total, recovery, depth=1)

    def compare(self, found: Sequence[Candidate]) -> list[_Seen]:
        """Run candidates on some prompts, the best on all; the nearest of the latter come first."""
        first = self.held[:FIRST]
        seen = [_Seen(c, self._psnrs(c, first, 0)) for c in found]
        fewer, others = seen[0], sorted(seen[1:], key=lambda s: -s.mean)
        kept, left = [fewer, *others[:BEST]], others[BEST:]
        rest = self.held[FIRST:]
        for one in kept if rest else ():
            one.psnr += self._psnrs(one.candidate, rest, FIRST)
        return [*sorted(kept, key=lambda s: -s.mean), *left]

    def _psnrs(self, candidate: Candidate, prompts: Sequence[str], begin: int) -> list[float]:
        config, made = candidate.config, []
        for place in range(0, len(prompts), self.settings.batch):
            part = prompts[place : place + self.settings.batch]
            made += list(self._batch(config, config.steps, part, len(self.fit) + begin + place)[0])
            self._tell(Progress(f"trying {candidate.name.split(',')[0]}", place + len(part), len(prompts)))
        plain = self.plain()[begin : begin + len(made)]
        self.pictures.setdefault(candidate.name, []).extend(made)
        return [_apart(a, b) for a, b in zip(plain, made, strict=True)]

    def measured(self, config: Calibrated, rounds: int = 3) -> float:
        """The speed-up of a plan in time, plain and plan in turn, the median of the rounds."""
        part, place, found = self.held[: self.settings.batch], len(self.fit), []
        for done in range(rounds):
            self._tell(Progress("measuring the plan's time", done, rounds))
            plain = self._batch(None, self.settings.steps, part, place)[1]
            found.append(plain / self._batch(config, config.steps, part, place)[1])
        return median(found)


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
    on_progress: Callable[[Progress], None] | None = None,
) -> Calibrated:
    """Find the plan for a pipeline that is nearest to its unaccelerated pictures at a speed.

    Half of the prompts are run unaccelerated and recorded; forecasts are fitted to these runs, and the steps
    that are computed are searched on the recording. The best, and fewer steps of the same cost, are run on
    the other half, which nothing was fitted on. The nearest is the answer: fewer steps, if these are.

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
        width: likewise.
        batch: pictures made at once; the time is that of such batches.
        model: its name, for the plan's file.
        more: further arguments of the pipeline's call.
        on_progress: told what is done.

    Returns:
        the plan: pass it to `regrow.apply`, and its ``steps`` to the pipeline.

    Raises:
        ValueError: naming what is not allowed, or if no plan gives what is wished for.
    """
    wish = Wish(speedup, fewer_macs, psnr)
    settings = Settings(steps, guidance, seed, height, width, batch, model, more)
    return plan_for(Calibration(pipe, prompts, settings, on_progress), wish)


LADDER = (10.0, 8.0, 6.0, 5.0, 4.0, 3.0, 2.5, 2.0, 1.5, 1.25)
"""Speed-ups that are tried for a wish of quality, the fastest first."""
ENOUGH = 0.99
"""Share of a wished speed-up that passes for it, since times differ by more from run to run."""


def plan_for(calibration: Calibration, wish: Wish) -> Calibrated:
    """The answer of `calibrate`."""
    if wish.psnr is not None:
        for speedup in LADDER:
            try:
                plan = plan_for(calibration, Wish(speedup=speedup))
            except ValueError:
                continue
            own = plan.tried[0].psnr
            if own is not None and own >= wish.psnr:
                return plan
        raise ValueError(f"psnr: {wish.psnr} dB is reached by no plan that is faster than {LADDER[-1]}x")
    costs = calibration.costs(in_time=wish.speedup is not None)
    whole = costs.of(calibration.calls)
    factor = wish.speedup or wish.fewer_macs or 1.0
    budget = whole / factor
    if budget < costs.rest + 2:
        raise ValueError(
            f"{'speedup' if wish.speedup else 'fewer_macs'}: {factor:g} can't be reached, it must be <= "
            f"{whole / (costs.rest + 2):.3g}: two calls and what is no call of the denoiser take the rest"
        )
    while True:
        seen = calibration.compare(calibration.candidates(budget, costs))
        plan = _answer(calibration, seen, whole)
        if wish.speedup is None:
            return plan
        measured = calibration.measured(plan)
        if measured >= ENOUGH * factor or budget <= costs.rest + 3:
            return plan.model_copy(update={"speedup": measured})
        # One call less, or as many as the time that is missing.
        budget -= max(1.0, (budget - costs.rest) * (1 - measured / factor))


def _answer(calibration: Calibration, seen: Sequence[_Seen], whole: float) -> Calibrated:
    """The nearest of the candidates, with what all of them gave."""
    best, origin = seen[0], calibration.record().origin
    tried = []
    for one in seen:
        pairs = list(zip(best.psnr, one.psnr, strict=False))
        behind = [a - b for a, b in pairs]
        tried.append(
            Tried(
                name=one.candidate.name,
                speedup=round(whole / one.candidate.cost, 3),
                psnr=round(one.mean, 3),
                error=round(_standard_error(one.psnr), 3),
                behind=round(fmean(behind), 3),
                behind_error=round(_standard_error(behind), 3),
                prompts=len(one.psnr),
            )
        )
    config = best.candidate.config
    found = replace_origin(origin, config, prompts=len(best.psnr), psnr=round(best.mean, 3))
    return config.model_copy(update={"tried": tuple(tried), "found": found})


def replace_origin(origin: Any, config: Calibrated, *, prompts: int, psnr: float) -> Any:
    """Where a plan was found, with what it gave there."""
    calls = config.schedule.calls or config.steps
    return origin.model_copy(
        update={"steps": config.steps, "calls": calls, "prompts": prompts, "quality": {"psnr": psnr}}
    )


def plan_error(gram: Array, moves: Array, positions: Positions) -> float:
    """The error of fitted forecasts at some positions, without a run."""
    raise NotImplementedError


def _plan(schedule: Schedule, steps: int) -> Calibrated:
    return Calibrated(steps=steps, schedule=schedule)


def _output_plan(positions: Positions, total: int, recovery: TimeRecovery, depth: int = 0) -> Schedule:
    """Full calls at some positions, the others of a depth."""
    full = set(positions)
    depths = tuple(FULL if i in full else depth for i in range(total))
    return Schedule(depth=depths, ratio=(0.0,) * total, recovery=(recovery,))


def _listed(positions: Positions) -> str:
    return " ".join(map(str, positions))


def _apart(plain: Any, made: Any) -> float:
    """PSNR of a picture, or of the frames of a video, in dB."""
    if isinstance(plain, Image.Image):
        return min(psnr(plain, made), EQUAL)
    if isinstance(plain, (list, tuple)):
        return fmean(_apart(a, b) for a, b in zip(plain, made, strict=True))
    a, b = (np.asarray(x.cpu() if hasattr(x, "cpu") else x, dtype=np.float64) for x in (plain, made))
    error = float(((a - b) ** 2).mean())
    span = float(a.max() - a.min()) or 1.0
    return EQUAL if error == 0 else min(10 * math.log10(span**2 / error), EQUAL)


def _standard_error(values: Sequence[float]) -> float:
    """Of the mean; 0 of a single value."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0
