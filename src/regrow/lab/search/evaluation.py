"""Measure a plan's quality and cost against unaccelerated runs of the same seeds, which are made once."""

from __future__ import annotations

import copy
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor

from regrow.core.inputs import without_data
from regrow.lab.measure.atomic_files import kept
from regrow.lab.measure.clip import ClipScore
from regrow.lab.measure.evaluate import Setting
from regrow.lab.measure.extractors import Extractor, Network, extractor
from regrow.lab.measure.images import to_picture, to_tensor
from regrow.lab.measure.quality import frechet_distance
from regrow.lab.measure.trace import TracedStep, nearest, watched_steps
from regrow.lab.measure.variants import applied, plain_settings
from regrow.lab.memory import PeakMemory
from regrow.lab.search.objectives import Cost, Objective, Quality
from regrow.models import denoiser_of, module_of
from regrow.origin import denoiser_key, scheduler_key, scheduler_settings

QUARTERS = 4
"""Number of equal parts of a run; the deviation is read at the end of each."""
MOST_PSNR = 100.0


@dataclass(frozen=True)
class Candidate:
    """A plan to evaluate.

    Args:
        steps: number of sampler steps.
        config: the method's configuration; None for the unaccelerated pipeline.
    """

    steps: int
    config: Any

    def settings(self) -> Any:
        """The configuration as plain data."""
        return plain_settings(self.config)

    @property
    def key(self) -> str:
        """A key that is equal for plans that do the same."""
        text = json.dumps([self.steps, self.settings()], sort_keys=True)
        return sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Job:
    """An evaluation to do.

    Args:
        candidate: the plan.
        start: index of the first prompt.
        stop: index after the last prompt.
        limits: a run with a higher mean absolute error at the end of a quarter is given up; used only if
            all prompts fit into one batch.
    """

    candidate: Candidate
    start: int
    stop: int
    limits: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Outcome:
    """The result of an evaluation.

    Args:
        quality: by `Quality`, a figure for each picture, or one for all together; empty if given up or
            failed.
        cost: by `Cost`, the measured costs, without MACs.
        curve: mean absolute error of the latents at the end of each quarter until it was given up.
        seconds: duration, without the unaccelerated runs.
        error: why the plan could not be run.
    """

    quality: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    cost: Mapping[str, float] = field(default_factory=dict)
    curve: tuple[float, ...] = ()
    seconds: float = 0.0
    error: str | None = None


@dataclass(frozen=True)
class Facts:
    """Facts about a pipeline, from its unaccelerated run.

    Args:
        denoiser: its `denoiser_key`.
        scheduler: class of the sampler.
        settings: settings of the sampler, as JSON.
        scheduler_key: key of the sampler, of `regrow.origin`.
        device: kind of device that it runs on.
        steps: number of sampler steps.
        calls: number of calls at each branch of guidance; PLMS makes steps + 1, Heun's method
            2 steps - 1.
        each: number of calls that one more step makes.
        inputs: arguments of the calls of a step, on the meta device.
    """

    denoiser: str
    scheduler: str
    settings: str
    scheduler_key: str
    device: str
    steps: int
    calls: int
    each: int
    inputs: tuple[tuple[Any, Any], ...]

    def calls_at(self, steps: int) -> int:
        """Count the calls of a run of ``steps`` steps."""
        return max(1, self.calls + self.each * (steps - self.steps))

    def claim(self) -> dict[str, Any]:
        """List what figures depend on besides the settings of a search."""
        names = ("denoiser", "scheduler", "settings", "device", "calls")
        return {name: getattr(self, name) for name in names}


class _HopelessError(Exception):
    """The run's error is above its limit."""


class Evaluator:
    """Evaluates plans on one pipeline.

    Args:
        open_pipeline: loads the pipeline.
        setting: model, prompts, seeds.
        steps: number of steps of the unaccelerated run that plans are compared with.
        objectives: what is measured.
        folder: where unaccelerated runs are kept.
        clip: folder or hub id of a CLIP model, for `Quality.CLIP`.
        rounds: number of alternating timed runs, for `Cost.LATENCY`.

    Raises:
        ImportError: if an objective needs a package that is not installed.
    """

    def __init__(
        self,
        open_pipeline: Callable[[], Any],
        setting: Setting,
        steps: int,
        objectives: Sequence[Objective],
        folder: Path,
        clip: str | None = None,
        rounds: int = 3,
    ) -> None:
        self.setting, self.steps, self.objectives = setting, steps, tuple(objectives)
        self.pipeline = open_pipeline()
        self._folder, self._rounds = folder, rounds
        self._writer = f".{uuid4().hex}"
        self._pictures = any(isinstance(o, Quality) and o.needs_pictures for o in objectives)
        device = str(self.pipeline.device)
        seen = {Quality.FEATURES, Quality.FD} & set(objectives)
        self._extractor: Extractor | None = extractor(Network.EFFNET, device) if seen else None
        self._clip = ClipScore(clip, device) if clip is not None else None
        self._reward = _image_reward(device) if Quality.IMAGE_REWARD in objectives else None

    def __call__(self, job: Job) -> Outcome:
        """Evaluate a plan on some of the prompts.

        An exception by the plan becomes the outcome's error, so that a search can continue after it. If the
        unaccelerated pipeline fails too, its exception is raised.
        """
        chunks = [
            (start, min(start + self.setting.shard, job.stop))
            for start in range(job.start, job.stop, self.setting.shard)
        ]
        bases = [self._baseline(*chunk) for chunk in chunks]
        begin = time.perf_counter()
        try:
            return self._measured(job, chunks, bases, begin)
        except Exception as error:
            self._make(0, 1, self.steps)
            said = f"{type(error).__name__}: {error}"
            return Outcome(seconds=time.perf_counter() - begin, error=said)

    def _measured(
        self,
        job: Job,
        chunks: Sequence[tuple[int, int]],
        bases: Sequence[Mapping[str, Tensor]],
        begin: float,
    ) -> Outcome:
        """Measure a plan on batches of prompts, against their unaccelerated runs."""
        limits = job.limits if len(chunks) == 1 else None
        runs = []
        for chunk, base in zip(chunks, bases, strict=True):
            run = self._run(job.candidate, *chunk, base, limits)
            if run.final is None:
                return Outcome(curve=run.curve, seconds=time.perf_counter() - begin)
            runs.append(run)
        quality = self._quality(runs, bases, job)
        cost = self._cost(job.candidate, *chunks[0]) if job.start == 0 else {}
        sizes = [stop - start for start, stop in chunks]
        curve = tuple(
            sum(run.curve[q] * n for run, n in zip(runs, sizes, strict=True)) / sum(sizes)
            for q in range(QUARTERS)
        )
        return Outcome(quality, cost, curve, time.perf_counter() - begin)

    def facts(self) -> Facts:
        """Learn the facts from one unaccelerated picture, which also warms the pipeline up."""
        inputs: list[Any] = []
        steps: list[int] = []

        def before(module: Any, args: Any, kwargs: Any) -> None:
            if not steps:
                inputs.append(without_data((args, kwargs)))

        hook = module_of(self.pipeline).register_forward_pre_hook(before, with_kwargs=True)
        try:
            with watched_steps(self.pipeline.scheduler, lambda moment: steps.append(1)):
                self._make(0, 1, self.steps)
        finally:
            hook.remove()
        scheduler = self.pipeline.scheduler
        return Facts(
            denoiser_key(denoiser_of(self.pipeline)),
            type(scheduler).__name__,
            json.dumps(scheduler_settings(scheduler), sort_keys=True),
            scheduler_key(scheduler),
            self.pipeline.device.type,
            self.steps,
            len(steps),
            _calls_each(scheduler, self.steps),
            tuple(inputs),
        )

    def _make(self, start: int, stop: int, steps: int) -> list[Any]:
        return self.setting.make(self.pipeline, start, stop, steps, latents=not self._pictures).images

    def _baseline(self, start: int, stop: int) -> dict[str, Tensor]:
        """Make the unaccelerated run of some prompts: x_t after each step ``x (steps, B, ...)``, its
        timesteps ``after (steps,)``, and its pictures, if they are needed."""

        def run() -> dict[str, Tensor]:
            moments: list[TracedStep] = []
            with watched_steps(self.pipeline.scheduler, moments.append):
                images = self._make(start, stop, self.steps)
            out = {
                "x": torch.stack([m.x for m in moments]),
                "after": torch.tensor([*(m.timestep for m in moments[1:]), 0.0]),
            }
            return out | ({"pictures": _pixels(images)} if self._pictures else {})

        s = self.setting
        made_of = (s.model, s.model_key, s.dtype, s.guidance, s.height, s.width)
        prompts = (s.prompts[start:stop], s.seed + start)
        scheduler = self.pipeline.scheduler
        settings = json.dumps(scheduler_settings(scheduler), sort_keys=True)
        made_by = (type(scheduler).__name__, settings, self.pipeline.device.type)
        key = json.dumps([*made_of, *prompts, self.steps, self._pictures, *made_by])
        return kept(self._folder / f"{start:06d}-{stop:06d}.safetensors", key, run, self._writer)

    def _run(
        self,
        candidate: Candidate,
        start: int,
        stop: int,
        base: Mapping[str, Tensor],
        limits: tuple[float, ...] | None,
    ) -> _Run:
        """Make one generation by a plan, or give it up when its error is above the limits."""
        x, after = base["x"], base["after"].tolist()
        scheduler = self.pipeline.scheduler
        curve: list[float] = []
        errors: list[Tensor] = []
        times: list[float] = []

        def moment(now: TracedStep) -> None:
            if not times:
                # Image-to-image begins at a later step.
                whole = [float(t) for t in scheduler.timesteps]
                times.extend(whole[whole.index(now.timestep) :])
            index, total = len(errors) + 1, len(times)
            place = (
                index - 1 if total == len(after) else nearest([*times, 0.0][index : index + 1], after)[0]
            )
            errors.append((now.x - x[place]).abs().flatten(1).mean(1))
            if index < math.ceil((len(curve) + 1) * total / QUARTERS):
                return
            curve.append(float(errors[-1].mean()))
            if index < total and limits is not None and curve[-1] > limits[len(curve) - 1]:
                raise _HopelessError

        try:
            with applied(self.pipeline, candidate.config), watched_steps(scheduler, moment):
                images = self._make(start, stop, candidate.steps)
        except _HopelessError:
            return _Run(tuple(curve), None, None)
        # A run of fewer than four steps skips some quarters.
        whole = (*curve, *(curve[-1],) * (QUARTERS - len(curve)))
        return _Run(whole, errors[-1], _pixels(images) if self._pictures else None)

    def _quality(
        self, runs: Sequence[_Run], bases: Sequence[Mapping[str, Tensor]], job: Job
    ) -> dict[str, tuple[float, ...]]:
        out: dict[str, tuple[float, ...]] = {}
        pictures = [run.pictures for run in runs if run.pictures is not None]
        for kind in self.objectives:
            if kind is Quality.DEVIATION:
                found = torch.cat([run.final for run in runs if run.final is not None])
            elif not isinstance(kind, Quality):
                continue
            else:
                own, others = torch.cat(pictures), torch.cat([base["pictures"] for base in bases])
                found = self._seen(kind, own, others, self.setting.prompts[job.start : job.stop])
            out[kind.value] = tuple(found.double().tolist())
        return out

    def _seen(self, kind: Quality, own: Tensor, others: Tensor, prompts: Sequence[str]) -> Tensor:
        """Compute figures of pictures ``(B, 3, H, W)``, compared with the unaccelerated ones."""
        if kind is Quality.PSNR:
            error = (own.double() - others.double()).square().mean((1, 2, 3)) / 255**2
            return (-10 * error.log10()).clamp(max=MOST_PSNR)
        if kind is Quality.CLIP:
            assert self._clip is not None
            return self._clip(own, prompts)
        if kind is Quality.IMAGE_REWARD:
            assert self._reward is not None
            return self._reward(own, prompts)
        assert self._extractor is not None
        mine, theirs = (self._extractor(x.float() / 255).pooled for x in (own, others))
        if kind is Quality.FD:
            return torch.tensor([frechet_distance(theirs, mine)])
        return 1 - torch.cosine_similarity(mine.double(), theirs.double())

    def _cost(self, candidate: Candidate, start: int, stop: int) -> dict[str, float]:
        """Measure the costs on the first prompts."""
        out: dict[str, float] = {}

        def run() -> float:
            with applied(self.pipeline, candidate.config):
                return self._seconds(start, stop, candidate.steps)

        if Cost.LATENCY in self.objectives:
            turns = [(self._seconds(start, stop, self.steps), run()) for _ in range(self._rounds)]
            plain, own = zip(*turns, strict=True)
            out[Cost.LATENCY.value] = statistics.median(own) / statistics.median(plain)
        if Cost.MEMORY in self.objectives:
            with PeakMemory(self.pipeline.device) as memory:
                run()
            if memory.mib is None:
                raise ValueError("objective: cost:memory can't be measured here; use another cost")
            out[Cost.MEMORY.value] = memory.mib
        return out

    def _seconds(self, start: int, stop: int, steps: int) -> float:
        begin = time.perf_counter()
        self._make(start, stop, steps)
        return time.perf_counter() - begin


@dataclass(frozen=True)
class _Run:
    """A generation: its deviation at the quarters and at the end ``(B,)``, and its pictures."""

    curve: tuple[float, ...]
    final: Tensor | None
    pictures: Tensor | None


def _calls_each(scheduler: Any, steps: int) -> int:
    """Count the calls that one more step makes: two by Heun's method."""
    both = []
    for count in (steps, steps + 1):
        copied = copy.deepcopy(scheduler)
        try:
            copied.set_timesteps(count)
        except (ValueError, TypeError):
            # A scheduler that needs more than a number of steps; all of these make one call a step.
            return 1
        both.append(len(copied.timesteps))
    return both[1] - both[0]


def outcome_from(record: Mapping[str, Any]) -> Outcome:
    """Make an outcome from a record."""
    quality = {name: tuple(values) for name, values in record["quality"].items()}
    curve = tuple(record["curve"])
    return Outcome(quality, record["cost"], curve, record["seconds"], record.get("error"))


def _pixels(images: Sequence[Any]) -> Tensor:
    return torch.stack([to_tensor(image) for image in images])


def _image_reward(device: str) -> Callable[[Tensor, Sequence[str]], Tensor]:
    """Load ImageReward's model as a function of pictures and prompts."""
    try:
        import ImageReward
    except ImportError as error:
        raise ImportError(
            "quality:imagereward needs the package image-reward, which needs old libraries: install it, "
            "with regrow, in an environment of its own"
        ) from error
    model = ImageReward.load("ImageReward-v1.0", device=device)

    def score(pictures: Tensor, prompts: Sequence[str]) -> Tensor:
        pairs = zip(prompts, pictures, strict=True)
        return torch.tensor([model.score(prompt, [to_picture(p.float() / 255)]) for prompt, p in pairs])

    return score
