"""Look inside a generation: where a method departs from the unaccelerated run, and what it computes.

Everything is read from outside: x_t and the guided output from the calls of ``scheduler.step``, features
by native hooks, computed tokens from the run.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from regrow.apply import apply
from regrow.core.install import is_hooked
from regrow.lab.measure.sampling import check_prompts, make
from regrow.lab.measure.token_counts import ComputedCounter, SiteShares
from regrow.lab.measure.variants import Variant
from regrow.lab.measure.x0 import noise_level, predicted_x0, prediction_type, unknown_x0
from regrow.models import denoiser_of, known_layout
from regrow.models.table import Returns

PERCENTILES = (5, 25, 50, 75, 95)
OUTPUT = "predicted noise"

OnStep = Callable[[str, float], None]
"""Called with the variant's name and the finished share of its steps, from 0 to 1."""


@dataclass(frozen=True)
class TracedStep:
    """A step of the sampler.

    Args:
        timestep: timestep of the denoiser's calls.
        x: x_t after the step ``(B, C, H, W)``, float32.
        x0: the x_0 predicted before it, of the same shape and type; None if not known.
    """

    timestep: float
    x: Tensor
    x0: Tensor | None


@dataclass(frozen=True)
class Deviation:
    """Mean absolute error to the unaccelerated run at each step, over pictures and latent values.

    A run with the same number of steps is compared step by step; another run is compared with the
    unaccelerated run's last x_t, or x_0, at the nearest timestep.

    Args:
        timestep: timestep of each step.
        after: timestep of the x_t after each step; 0 at the end.
        x: error of x_t after each step.
        x0: error of the x_0 predicted at each step; None if not known.
        x_against: the step of the unaccelerated run that x_t was compared with, for each step.
        x0_against: the step of the unaccelerated run that x_0 was compared with, for each step.
    """

    timestep: tuple[float, ...]
    after: tuple[float, ...]
    x: tuple[float, ...]
    x0: tuple[float, ...] | None
    x_against: tuple[int, ...]
    x0_against: tuple[int, ...]


@dataclass(frozen=True)
class Difference:
    """Distribution over tokens of |f(t) - f(t + 1)|, mean over channels, in the unaccelerated run.

    Args:
        name: name of the feature.
        timestep: timestep of each step except the first.
        percentiles: `PERCENTILES` of each of these steps.
    """

    name: str
    timestep: tuple[float, ...]
    percentiles: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Traced:
    """The observations of a variant.

    Args:
        name: name of the variant.
        steps: number of its steps.
        deviation: deviation from the unaccelerated run.
        computed: by level, the share of calls and transformer blocks in which each token was computed
            ``(halves, pictures, h, w)``; two halves with guidance, the unconditional one first. None for
            a variant without a method, which computes all.
        sites: by name of a block or layer, the share of its tokens that it computed in each call of the
            first batch; empty if the method does not decide for sites.
        images: its pictures.
    """

    name: str
    steps: int
    deviation: Deviation
    computed: Mapping[int, Tensor] | None
    sites: Mapping[str, tuple[float, ...]]
    images: list[Image.Image]

    def to_dict(self) -> dict[str, Any]:
        """Everything but the pictures as plain data."""
        maps = self.computed or {}
        return {
            "name": self.name,
            "steps": self.steps,
            "deviation": asdict(self.deviation),
            "computed": [
                {
                    "level": level,
                    "share": round(float(share.mean()), 4),
                    "mean": _rounded(share.mean((0, 1))),
                    "halves": [[_rounded(one) for one in half] for half in share],
                }
                for level, share in sorted(maps.items())
            ],
            "sites": {name: [round(one, 4) for one in shares] for name, shares in self.sites.items()},
        }


@dataclass(frozen=True)
class Trace:
    """The observations of all variants.

    Args:
        baseline: name of the unaccelerated run.
        timestep: timesteps of its steps.
        images: its pictures.
        differences: differences of its features from step to step.
        variants: the other variants.
        x0_unknown: why x_0 is not known; None if it is.
    """

    baseline: str
    timestep: tuple[float, ...]
    images: list[Image.Image]
    differences: tuple[Difference, ...]
    variants: tuple[Traced, ...]
    x0_unknown: str | None

    def to_dict(self) -> dict[str, Any]:
        """Everything but the pictures as plain data."""
        return {
            "baseline": self.baseline,
            "timestep": list(self.timestep),
            "x0_unknown": self.x0_unknown,
            "percentiles": list(PERCENTILES),
            "differences": [asdict(d) for d in self.differences],
            "variants": [v.to_dict() for v in self.variants],
        }


def trace(
    pipeline: Any,
    variants: Sequence[Variant],
    prompts: Sequence[str],
    *,
    modules: Sequence[str] = (),
    guidance: float | None = None,
    seed: int = 0,
    height: int | None = None,
    width: int | None = None,
    batch: int = 4,
    on_step: OnStep = lambda name, done: None,
) -> Trace:
    """Generate the same pictures by all variants, and observe what happens inside.

    Args:
        pipeline: a text-to-image pipeline without a method on it.
        variants: the variants; the first is the unaccelerated run, such as ``steps:50``.
        prompts: a prompt for each picture, prompt number i from seed ``seed + i``.
        modules: names of modules of the denoiser whose outputs are compared from step to step, besides the
            predicted noise; default: the inputs of the transformer blocks at the finest level, and what a
            call of depth 1 would reuse.
        guidance: guidance scale; default: the pipeline's own.
        seed: seed of the first picture.
        height: height in pixels; default: the pipeline's own.
        width: width in pixels; default: the pipeline's own.
        batch: number of pictures in a batch.
        on_step: called after every step.

    Raises:
        ValueError: if there is nothing to compare, the first variant is a method, a method is applied to
            the pipeline already, a module does not exist or does not return tokens, a prompt is not a
            class where one is needed, or a variant can't be applied.
        UnsupportedModelError: if regrow has no table for the model.
    """
    for name, value, least in (
        ("methods", len(variants), 2),
        ("prompts", len(prompts), 1),
        ("batch", batch, 1),
    ):
        if value < least:
            raise ValueError(f"{name}: {value} is not allowed, it must be >= {least}")
    baseline, *others = variants
    if baseline.config is not None:
        raise ValueError(
            f"methods: {baseline.name!r} can't come first; the first must be an unaccelerated run such as "
            "steps:50, with which the others are compared"
        )
    denoiser = denoiser_of(pipeline)
    if is_hooked(denoiser):
        raise ValueError("pipeline: a method is applied to it already; first call remove() on its run")
    places = _chosen(denoiser, modules) if modules else _default_places(denoiser)
    # Refused before any picture is made.
    check_prompts(pipeline, prompts)
    for one in others:
        one.check(pipeline)
    parts = [prompts[start : start + batch] for start in range(0, len(prompts), batch)]
    looks: list[list[_Look]] = [[] for _ in variants]
    options = {"guidance": guidance, "height": height, "width": width}
    for number, part in enumerate(parts):
        for one, found in zip(variants, looks, strict=True):

            def tell(done: float, name: str = one.name, number: int = number) -> None:
                on_step(name, (number + done) / len(parts))

            here = options | {"steps": one.steps, "seed": seed + number * batch}
            features = _Features(places if one is baseline else ())
            found.append(_look(pipeline, one, part, here, features, tell))
    reference = looks[0]
    timestep = tuple(moment.timestep for moment in reference[0].moments)
    return Trace(
        baseline.name,
        timestep,
        [image for look in reference for image in look.images],
        tuple(_difference(place.name, timestep[1:], reference) for place in places),
        tuple(_traced(one, found, reference) for one, found in zip(others, looks[1:], strict=True)),
        unknown_x0(pipeline.scheduler),
    )


@dataclass(frozen=True)
class _Look:
    """One batch of one variant.

    Args:
        moments: its steps.
        images: its pictures.
        computed: as in `Traced`.
        sites: as in `Traced`.
        differences: by feature and step, the differences of all tokens.
    """

    moments: list[TracedStep]
    images: list[Image.Image]
    computed: Mapping[int, Tensor] | None
    sites: Mapping[str, tuple[float, ...]]
    differences: Mapping[str, list[np.ndarray]]


def _look(
    pipeline: Any,
    one: Variant,
    prompts: Sequence[str],
    options: Mapping[str, Any],
    features: _Features,
    on_step: Callable[[float], None],
) -> _Look:
    """Generate one batch, and observe it."""
    moments: list[TracedStep] = []

    def moment(now: TracedStep) -> None:
        moments.append(now)
        features.tick()
        on_step(len(moments) / len(pipeline.scheduler.timesteps))

    def generate() -> list[Image.Image]:
        with features.watching(), watched_steps(pipeline.scheduler, moment):
            return make(pipeline, prompts, **options).images

    if one.config is None:
        return _Look(moments, generate(), None, {}, features.found)
    layout = known_layout(denoiser_of(pipeline))
    counter, sites = ComputedCounter(layout), SiteShares(layout)
    with apply(pipeline, one.config) as run, run.observed(counter), run.observed(sites):
        images = generate()
    shares = {level: share.unflatten(0, (-1, len(prompts))) for level, share in counter.shares().items()}
    return _Look(moments, images, shares, sites.shares(), features.found)


@contextmanager
def watched_steps(scheduler: Any, on_moment: Callable[[TracedStep], None]) -> Iterator[None]:
    """Observe every step of a sampler inside this context.

    ``scheduler.step`` gets the guided output of the denoiser, for any kind of guidance, and the x_t that
    the denoiser saw.

    Args:
        scheduler: scheduler of a pipeline.
        on_moment: called after each step.
    """
    step, before = scheduler.step, scheduler.__dict__.get("step")
    known, prediction = unknown_x0(scheduler) is None, prediction_type(scheduler)
    signature = inspect.signature(step)

    @functools.wraps(step)
    def watched(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        x, output = (
            given[name].detach().to("cpu", torch.float32, copy=True) for name in ("sample", "model_output")
        )
        out = step(*args, **kwargs)
        x0 = None
        if known:
            # Some schedulers find their first index within the step, and then add one.
            index = (getattr(scheduler, "step_index", None) or 1) - 1
            x0 = predicted_x0(x, output, noise_level(scheduler, given["timestep"], index), prediction)
        after = out[0].detach().to("cpu", torch.float32, copy=True)
        on_moment(TracedStep(float(given["timestep"]), after, x0))
        return out

    scheduler.step = watched
    try:
        yield
    finally:
        if before is None:
            del scheduler.step
        else:
            scheduler.step = before


def _traced(one: Variant, looks: Sequence[_Look], reference: Sequence[_Look]) -> Traced:
    """Join the batches of a variant, and compare them with those of the unaccelerated run."""
    maps = [look.computed for look in looks if look.computed is not None]
    return Traced(
        one.name,
        one.steps,
        deviation([look.moments for look in looks], [look.moments for look in reference]),
        {level: torch.cat([m[level] for m in maps], dim=1) for level in maps[0]} if maps else None,
        looks[0].sites,
        [image for look in looks for image in look.images],
    )


def deviation(own: Sequence[Sequence[TracedStep]], reference: Sequence[Sequence[TracedStep]]) -> Deviation:
    """Measure how far runs are from the unaccelerated ones of the same seeds.

    Args:
        own: for each batch, its steps.
        reference: for each batch, the steps of the unaccelerated run.
    """
    timestep, reference_timestep = ([m.timestep for m in batches[0]] for batches in (own, reference))
    after, reference_after = ([*steps[1:], 0.0] for steps in (timestep, reference_timestep))
    x_against = nearest(after, reference_after)
    x0_against = nearest(timestep, reference_timestep)
    known = all(m.x0 is not None for batches in (own, reference) for batch in batches for m in batch)
    x = _mae(own, reference, x_against, attrgetter("x"))
    x0 = _mae(own, reference, x0_against, attrgetter("x0")) if known else None
    return Deviation(tuple(timestep), tuple(after), x, x0, x_against, x0_against)


def _mae(
    own: Sequence[Sequence[TracedStep]],
    reference: Sequence[Sequence[TracedStep]],
    against: Sequence[int],
    of: Callable[[TracedStep], Tensor],
) -> tuple[float, ...]:
    """Compute the mean absolute error at each step, over all pictures of all batches."""
    pictures = [
        torch.stack(
            [(of(m) - of(other[j])).abs().flatten(1).mean(1) for m, j in zip(mine, against, strict=True)]
        )
        for mine, other in zip(own, reference, strict=True)
    ]
    return tuple(torch.cat(pictures, dim=1).mean(1).tolist())


def nearest(own: Sequence[float], reference: Sequence[float]) -> tuple[int, ...]:
    """Find the index of the last nearest timestep for each; with equal numbers, the same index."""
    if len(own) == len(reference):
        return tuple(range(len(own)))
    places = range(len(reference))
    return tuple(min(places, key=lambda j: (abs(reference[j] - t), -j)) for t in own)


def _difference(name: str, timestep: tuple[float, ...], looks: Sequence[_Look]) -> Difference:
    """Compute the distribution of a feature's differences over the tokens of all pictures."""
    if any(len(look.differences[name]) != len(timestep) for look in looks):
        raise ValueError(f"module: {name} is not called at every step")
    steps = (np.concatenate([look.differences[name][i] for look in looks]) for i in range(len(timestep)))
    values = [np.percentile(step, PERCENTILES) for step in steps]
    return Difference(name, timestep, tuple(tuple(float(v) for v in step) for step in values))


@dataclass(frozen=True)
class _Place:
    """A feature: the output of a module, or its input; a joint block returns the text and the image, and
    the image is the feature."""

    name: str
    module: nn.Module
    given: bool = False
    joint: bool = False


class _Features:
    """Differences of features from step to step, of one generation.

    Args:
        places: the features.
    """

    def __init__(self, places: Sequence[_Place]) -> None:
        self._places = places
        # Features of each call of the denoiser at a step; separate calls for guidance give several.
        self._before: dict[str, list[Tensor]] = {}
        self._now: dict[str, list[Tensor]] = {place.name: [] for place in places}
        self.found: dict[str, list[np.ndarray]] = {place.name: [] for place in places}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Collect features inside this context."""
        handles = []
        try:
            for place in self._places:
                handles.append(self._watch(place))
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._before = {}

    def _watch(self, place: _Place) -> Any:
        def given(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._keep(place.name, args[0] if args else kwargs["hidden_states"])

        def returned(module: nn.Module, args: Any, output: Any) -> None:
            # In a block with text and image, the image comes last.
            self._keep(place.name, output[-1] if place.joint else output)

        if place.given:
            return place.module.register_forward_pre_hook(given, with_kwargs=True)
        return place.module.register_forward_hook(returned)

    def _keep(self, name: str, feature: Any) -> None:
        if not isinstance(feature, Tensor):
            feature = feature[0]
        if not isinstance(feature, Tensor) or feature.ndim not in (3, 4):
            raise ValueError(f"module: {name} does not return tokens (B, N, C) or (B, C, H, W)")
        self._now[name].append(feature.detach().to(torch.float32, copy=True))

    def tick(self) -> None:
        """End the sampler's step."""
        if self._before:
            for name, now in self._now.items():
                pairs = zip(now, self._before[name], strict=True)
                tokens = [_token_difference(a, b).flatten().cpu().numpy() for a, b in pairs]
                if tokens:
                    self.found[name].append(np.concatenate(tokens))
        self._before, self._now = self._now, {name: [] for name in self._now}


def _token_difference(a: Tensor, b: Tensor) -> Tensor:
    """Compute |a - b|, mean over channels, of features ``(B, N, C)`` or ``(B, C, H, W)``."""
    return (a - b).abs().mean(-1 if a.ndim == 3 else 1)


def _default_places(denoiser: nn.Module) -> list[_Place]:
    """List the predicted noise, the inputs of blocks at the finest level, what a call of depth 1 reuses."""
    layout = known_layout(denoiser)
    places = [_Place(OUTPUT, denoiser)]
    if layout.depths > 1:
        restoring = [layout.skippable[name] for name in layout.skip_plans[1].restore]
        places += [_Place(p.name, p.module, joint=p.returns is Returns.JOINT) for p in restoring]
    finest = (b for b in layout.blocks if b.downsample == layout.top_level)
    return places + [_Place(f"into {b.name}", b.block, given=True) for b in finest]


def _chosen(denoiser: nn.Module, names: Sequence[str]) -> list[_Place]:
    """List the predicted noise and the outputs of modules."""
    modules, known = dict(denoiser.named_modules()), known_layout(denoiser).skippable
    joint = {name for name, place in known.items() if place.returns is Returns.JOINT}
    for name in names:
        if not name or name not in modules:
            raise ValueError(
                f"module: {name!r} is not in {type(denoiser).__name__}; it must be one of named_modules()"
            )
    chosen = [_Place(name, modules[name], joint=name in joint) for name in dict.fromkeys(names)]
    return [_Place(OUTPUT, denoiser), *chosen]


def _rounded(share: Tensor) -> list[Any]:
    """Convert a map to plain data."""
    return [[round(value, 4) for value in row] for row in share.tolist()]
