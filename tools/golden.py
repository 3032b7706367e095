"""Does a changed library still give what it gave? Small pipelines say so, bit for bit, on one machine.

    python tools/golden.py write FOLDER [--only PATTERN] [--jobs N]
    python tools/golden.py compare FOLDER [--only PATTERN] [--jobs N]

`write` keeps what the library gives now, `compare` says what differs from that, and ends with status 1 if
anything does. A case is named ``FAMILY/METHOD/WAY``: a pipeline with random weights, a method by its short
name or one of `CONFIGS`, and a way to run it. PATTERN is as of file names: ``'flux/cat*/guided'``; `write`
keeps of a family only what is like it. Of each family FOLDER has the tensors (``FAMILY.safetensors``), and
their hashes, the report and the warnings, or the error of a method that is refused (``FAMILY.json``).
Weights are float64, so that a rounding that differs is told from a decision that does. Pipelines come from
the tests.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass
from difflib import unified_diff
from fnmatch import fnmatchcase
from functools import lru_cache, partial
from hashlib import sha256
from itertools import groupby, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from time import process_time
from typing import Any, NamedTuple

import diffusers
import torch
from diffusers.utils import logging
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor

import regrow
from regrow.lab.measure.machine import machine
from regrow.lab.measure.variants import variant
from regrow.methods.base import methods
from regrow.methods.calibrated import Calibrated
from regrow.methods.l2c import L2C
from regrow.origin import denoiser_key
from regrow.predictors import CachePredictor, Learned, write_learned

sys.path.append(str(Path(__file__).parents[1] / "tests" / "helpers"))
import any_pipelines
import pipelines
import transformer_pipelines
from families import (
    FLUX_FORMS,
    GUIDED,
    SIZED_FORMS,
    STEPS,
    TEXT_FORMS,
    UNET_FORMS,
    VIDEO_FORMS,
    WIDE_FORMS,
    controlled,
    of_any,
    of_dit,
    of_transformer,
    of_unet,
    of_video,
)

FULL = regrow.FULL
# Of a family's ways to run representative methods one in so many is run, in each family another one.
EVERY = 10
# Lines of a text's difference that are shown.
SHOWN = 8


@dataclass(frozen=True)
class Family:
    """A small pipeline, and how latents are made with it.

    Args:
        make: the pipeline.
        draw: latents, of the pipeline, ``seed`` and further arguments of its call.
        kind: of its denoiser, one of `REPRESENTATIVES`.
        forms: by the name of a way, the arguments of a call.
        more: methods that it meets besides.
        every: of all methods it meets one in so many; None for some of the representative ones alone.
        dtype: of its weights.
    """

    make: Callable[[], Any]
    draw: Callable[..., Tensor]
    kind: str
    forms: Mapping[str, Mapping[str, Any]]
    more: tuple[str, ...] = ()
    every: int | None = 1
    dtype: torch.dtype = torch.float64


LEARNED = ("l2c:trained", "l2c:trained:threshold=0.7", "tokencache:trained", "tokencache:trained:data")


def presets() -> tuple[str, ...]:
    """The short names of all presets."""
    return tuple(f"{name}:{preset}" for name, kind in methods().items() for preset in kind.PRESETS)


def unet_of(kind: str, make: Callable[[], Any] | None = None, **options: Any) -> Family:
    """A family of `pipelines`."""
    draw = partial(of_unet, kind=kind)
    make = make or partial(pipelines.make, kind)
    return Family(make, draw, "unet", UNET_FORMS, **{"every": None} | options)


def sampled(scheduler: Any) -> Family:
    """Stable Diffusion 1 with another sampler."""
    return unet_of("sd1", lambda: pipelines.sd(sampler=pipelines.scheduler(scheduler)))


def transformer_of(make: Callable[[], Any], forms: Any = WIDE_FORMS, **options: Any) -> Family:
    """A family of `transformer_pipelines`."""
    return Family(make, **{"draw": of_transformer, "kind": "transformer", "forms": forms} | options)


def video_of(make: Callable[[], Any], forms: Any = VIDEO_FORMS, **options: Any) -> Family:
    """A family of videos."""
    return Family(make, of_video, "video", forms, **options)


def unknown_of(name: str, **options: Any) -> Family:
    """A family of `any_pipelines`."""
    made = any_pipelines.FAMILIES[name]
    return Family(made.make, partial(of_any, name), "unknown", SIZED_FORMS, **options)


_T = transformer_pipelines
FAMILIES: Mapping[str, Family] = {
    "sd1": unet_of("sd1", every=1, more=presets()),
    "sdxl": unet_of("sdxl", every=2, more=("atedm:paper",)),
    "sd3": transformer_of(_T.sd3, every=2),
    "pixart": transformer_of(_T.pixart, every=2, more=LEARNED),
    "dit": transformer_of(_T.dit, TEXT_FORMS, draw=of_dit, more=(*presets(), *LEARNED)),
    "flux": transformer_of(_T.flux, FLUX_FORMS, every=2),
    "latte": video_of(_T.latte, every=2),
    "wan": video_of(_T.wan, every=2),
    "auraflow": unknown_of("auraflow"),
    "sd1-four-levels": unet_of("sd1-four-levels"),
    "sd2": unet_of("sd2"),
    "sd1-img2img": unet_of("img2img"),
    "sdxl-img2img": unet_of("sdxl-img2img"),
    "sd1-inpaint": unet_of("inpaint-nine-channels"),
    "sd1-heun": sampled(diffusers.HeunDiscreteScheduler),
    "sd1-pndm": sampled(diffusers.PNDMScheduler),
    "sd1-dpm": sampled(diffusers.DPMSolverMultistepScheduler),
    "sd35": transformer_of(_T.sd35, every=None),
    "sd3-perturbed": transformer_of(_T.sd3_perturbed, GUIDED, every=None),
    "sd3-skip-layer": transformer_of(_T.sd3, {"guided": _T.SKIP_LAYER}, every=None),
    "sd3-controlled": transformer_of(_T.sd3_controlled, GUIDED, draw=controlled, every=None),
    "pixart-sized": transformer_of(_T.pixart_sized, GUIDED, every=None),
    "flux-controlled": transformer_of(_T.flux_controlled, GUIDED, draw=controlled, every=None),
    "flux-embedded": transformer_of(_T.flux, GUIDED, every=None),
    "wan-two": video_of(partial(_T.wan, boundary_ratio=0.5), every=None),
    "wan-picture": video_of(
        partial(_T.wan_from_picture, expand_timesteps=True),
        {"guided": {"image": torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(7))}},
        every=None,
    ),
    "cogview4": unknown_of("cogview4", every=None, dtype=torch.float32),
    "animatediff": unknown_of("animatediff", every=None),
}


def scheduled(*depth: Any, ratio: Sequence[float] = (0.0,), recovery: Any = "reuse") -> regrow.Schedule:
    """A schedule of `STEPS` calls."""
    ratios = tuple(ratio) * (len(depth) // len(ratio))
    return regrow.Schedule(depth=depth, ratio=ratios, recovery=recovery)


OUTPUTS = (FULL, FULL, 0, FULL, 0, 0)
MIXED = (FULL, 1, 0, FULL, 2, 1)
RATIOS = (0.5, 0.3, 0.0, 0.7, 0.6, 0.75)
FITTED = regrow.Fitted(
    total=STEPS,
    steps=(
        {"step": 2, "sources": (0, 1), "weights": (-0.9, 1.9)},
        {"step": 4, "sources": (0, 1, 3), "weights": (0.1, -0.6, 1.5)},
        {"step": 5, "sources": (1, 3), "weights": (-0.9, 1.9)},
    ),
)
PER_CALL = ("reuse", "taylor", "taylor2", "chebyshev", "reuse", "taylor")


def calibrated(schedule: regrow.Schedule, **changes: Any) -> Calibrated:
    """A calibrated plan of `STEPS` steps."""
    return Calibrated(**{"steps": STEPS, "schedule": schedule, "instead_of": 2 * STEPS} | changes)


def recorded(pipe: Any) -> regrow.L2P:
    """L2P fitted to a recording of the pipeline."""
    prompts = ["1", "2"] if type(pipe).__name__ == "DiTPipeline" else ["a penguin", "a pizza"]
    return regrow.L2P.fit(regrow.record(pipe, prompts, steps=STEPS), interval=3)


@lru_cache
def scratch() -> TemporaryDirectory[str]:
    """A folder for files of learned methods, for as long as the process lasts."""
    return TemporaryDirectory()


def learned(pipe: Any, kind: str, sites: int, tensors: Mapping[str, Tensor]) -> str:
    """A file of a learned method."""
    file = Path(scratch().name) / f"{kind}.safetensors"
    steps = STEPS if kind == "router" else None
    key = denoiser_key(pipe.transformer)
    write_learned(
        file, Learned(kind=kind, model="small", denoiser=key, sites=sites, steps=steps), dict(tensors)
    )
    return str(file)


def routed(pipe: Any, **changes: Any) -> L2C:
    """Learning-to-Cache with a table by chance, every other step full."""
    names = (name for name, _ in pipe.transformer.named_modules())
    sites = sum(name.endswith((".attn1", ".attn2", ".ff")) for name in names)
    beta = torch.rand(STEPS, sites, generator=torch.Generator().manual_seed(3))
    beta[::2] = 1.0
    return L2C(router=learned(pipe, "router", sites, {"beta": beta, "table": beta > 0.5}), **changes)


def predicted(pipe: Any, **changes: Any) -> regrow.TokenCache:
    """TokenCache with a predictor whose quantiles say that later blocks matter more."""
    sites = len(pipe.transformer.transformer_blocks)
    predictor = CachePredictor.of(pipe.transformer, sites)
    levels = torch.linspace(0, 1, 9) * torch.linspace(0.2, 1, sites)[:, None]
    tensors = {f"predictor.{name}": value for name, value in predictor.state_dict().items()}
    tensors |= {"quantiles": levels.repeat(5, 1, 1), "alpha": torch.linspace(0.2, 0.8, 5)}
    file = learned(pipe, "predictor", sites, tensors)
    return regrow.TokenCache(
        **{"predictor": file, "full_steps": 2, "last_blocks": 1, "ratio": 0.8, "beta": -3} | changes
    )


CONFIGS: Mapping[str, Callable[[Any], Any]] = {
    "plain": lambda pipe: None,
    "schedule:full": lambda pipe: scheduled(FULL, FULL),
    "schedule:output": lambda pipe: scheduled(*OUTPUTS),
    "schedule:output:taylor": lambda pipe: scheduled(*OUTPUTS, recovery="taylor"),
    "schedule:output:taylor2": lambda pipe: scheduled(*OUTPUTS, recovery="taylor2"),
    "schedule:output:chebyshev": lambda pipe: scheduled(*OUTPUTS, recovery="chebyshev"),
    "schedule:output:fitted": lambda pipe: scheduled(*OUTPUTS, recovery=FITTED),
    "schedule:depths": lambda pipe: scheduled(FULL, 1, "head", FULL, 3, 0, recovery=PER_CALL),
    "schedule:layers": lambda pipe: scheduled(FULL, FULL, "layers", 1, "layers", 0, recovery="taylor"),
    "schedule:sites": lambda pipe: scheduled(FULL, "sites"),
    "dato:mixed": lambda pipe: regrow.DaTo(schedule=scheduled(*MIXED, ratio=RATIOS)),
    "dato:mixed:per-call": lambda pipe: regrow.DaTo(
        schedule=scheduled(*MIXED, ratio=RATIOS, recovery=PER_CALL)
    ),
    "dato:mixed:chebyshev": lambda pipe: regrow.DaTo(
        schedule=scheduled(*MIXED, ratio=RATIOS), time_recovery="chebyshev"
    ),
    "dato:mixed:fitted": lambda pipe: regrow.DaTo(
        schedule=scheduled(*OUTPUTS, ratio=(0.5, 0.5, 0.0) * 2, recovery=FITTED)
    ),
    "l2p:given": lambda pipe: regrow.L2P(fitted=FITTED),
    "l2p:recorded": recorded,
    "calibrated:forecast": lambda pipe: calibrated(scheduled(*OUTPUTS, recovery=FITTED)),
    "calibrated:fewer": lambda pipe: calibrated(scheduled(*(FULL,) * STEPS)),
    "calibrated:deep": lambda pipe: calibrated(scheduled(FULL, FULL, 1, 0, FULL, 1, recovery="taylor")),
    "calibrated:pruned": lambda pipe: calibrated(scheduled(*MIXED, ratio=RATIOS)),
    "calibrated:late": lambda pipe: calibrated(scheduled(*OUTPUTS), before=2),
    "l2c:trained": routed,
    "l2c:trained:threshold=0.7": partial(routed, threshold=0.7),
    "tokencache:trained": predicted,
    "tokencache:trained:data": partial(predicted, counts="data"),
}
"""Methods that no short name says, for a pipeline."""

NAMED = (
    "dato:3",
    "dato:2:alignment=off",
    "dato:2:alignment=unconditional",
    "dato:2:alignment=mean",
    "dato:2:score=random",
    "dato:2:features=norm1",
    "dato:2:recovery=mean",
    "dato:2:from_all_kept=true",
    "dato:2:nearby=true:patch=4",
    "dato:2:score_noise=0.1:sign_flip=true:seed=3",
    "dato:2:max_downsample=8",
    "dato:2:time_recovery=taylor2",
    *(f"sito:0.5:base={base.value}" for base in regrow.BaseChoice),
    "sito:0.5:cross_attention=true:feed_forward=true",
    "sito:0.5:self_attention=false:feed_forward=true:features=norm1",
    "sito:0.5:recovery=mean:cross_attention=true",
    "sito:0.5:features=norm1",
    "sito:0.5:patch=4",
    "sito:0.5:noise=0:alignment=conditional",
    "sito:0.5:nearby=true:max_downsample=2",
    "sito:0",
    "tome:0.5",
    "tome:0.5:random=false:recovery=copy",
    "tome:0.5:cross_attention=true:feed_forward=true:max_downsample=8",
    "tome:0.5:patch=4:ratio=0.8",
    "atedm:0.5",
    "atedm:0.5:early=2:early_ratio=0.2:after=feed_forward",
    "atedm:0.5:early=0:similarity=features:heads=mean",
    "atedm:0.5:early=0:max_downsample=2:alignment=conditional:iterations=2",
    "atedm:0.5:recovery=reuse:early=2",
    "atedm:0.5:recovery=reuse:early=3:early_ratio=0.2:block=3:alignment=mean",
    "deepcache:3",
    "deepcache:2:branch=1",
    "deepcache:2:branch=4",
    "deepcache:3:center=0.3",
    "deepcache:2:center=0.5:power=1.2:branch=2",
    "deepcache:2:branch=1:recovery=taylor",
    "deepcache:2:recovery=chebyshev",
    "fora:3",
    "fora:2:recovery=taylor2",
    "fora:1",
    "spectrum:quality:full=2",
    "spectrum:fast:full=2:degree=2:mix=0.5",
    "spectrum:sdxl:full=2:stop=0.8",
    "taylorseer:2",
    "taylorseer:3:order=1:first=1",
    "taylorseer:2:order=2:level=last_block",
    "cat:0.4:t0=2",
    "cat:0.4:t0=2:choice=noise",
    "cat:0.4:t0=2:choice=rows",
    "cat:0.4:t0=3:clusters=5:balance=0.5:cluster_share=0.5:seed=3",
    "cat:0.4:t0=2:alignment=off:absolute_noise=true:balance=1",
    "cat:released:t0=2",
    "cat:released:t0=2:alignment=mean:alpha=0.5",
    "toca:2",
    "toca:3:alignment=off:queries=8",
    "toca:2:ratio=0",
    "toca:2:ratio=1",
    "toca:2:self_attention=0.5:cross_attention=0.5:ratio=0.5",
    "toca:2:influence=0:control=0:staleness=1:spread=0",
    "toca:2:recovery=taylor:layer_weight=-0.5:step_weight=-0.5",
    "tokencache:2:predictor=untrained:last_blocks=1:ratio=0.6",
    "tokencache:2:predictor=untrained:last_blocks=1:ratio=0.6:counts=data",
    "tokencache:2:predictor=untrained:last_blocks=0:ratio=0.9:staleness=1",
    "tokencache:2:predictor=untrained:last_blocks=1:ratio=0.6:recovery=taylor",
    "tokencache:2:predictor=untrained:last_blocks=2:ratio=1:spacing=uniform",
    "tokencache:2:choice=random:last_blocks=1:ratio=0.6:seed=3",
    "tokencache:2:choice=toca:last_blocks=1:ratio=0.6",
    "tokencache:2:choice=tome:last_blocks=1:ratio=0.6",
    "l2c:untrained",
    "deepcache:3+tome:0.5",
    "deepcache:2:branch=1+sito:0.5:feed_forward=true",
    "deepcache:2:branch=4+atedm:0.5:early=0",
    "fora:2+tome:0.5",
    "dato:3+sito:0.5",
    "cat:0.4:t0=2+deepcache:2",
    "cat:0.4:t0=2+deepcache:2:branch=1",
    "cat:0.4:t0=2+deepcache:2:recovery=taylor",
    "cat:released:t0=2+dato:3",
    "atedm:0.5:recovery=reuse:early=2+deepcache:2",
    "cat:0.4:t0=2+fora:2",
)
"""Methods by their short names."""

ANY = (
    "plain",
    "schedule:output:taylor",
    "schedule:depths",
    "deepcache:2:branch=1:recovery=taylor",
    "fora:2:recovery=taylor2",
    "taylorseer:2",
    "spectrum:quality:full=2",
)
REPRESENTATIVES: Mapping[str, tuple[str, ...]] = {
    "unet": (
        *ANY,
        "dato:mixed",
        "dato:2:score_noise=0.1:sign_flip=true:seed=3",
        "sito:0.5:recovery=mean:cross_attention=true",
        "tome:0.5",
        "atedm:0.5:early=2:early_ratio=0.2",
        "deepcache:3+tome:0.5",
    ),
    "transformer": (
        *ANY,
        "cat:0.4:t0=2",
        "cat:0.4:t0=2+deepcache:2",
        "atedm:0.5:recovery=reuse:early=2",
        "toca:2",
        "toca:2:self_attention=0.5:cross_attention=0.5:ratio=0.5",
        "tokencache:2:predictor=untrained:last_blocks=1:ratio=0.6",
        "l2c:untrained",
    ),
    "video": (*ANY, "tokencache:2:predictor=untrained:last_blocks=1:ratio=0.6:counts=data"),
    "unknown": ("plain", "schedule:output:taylor", "schedule:output:chebyshev", "spectrum:quality:full=2"),
}
"""By the kind of a denoiser, a method for each way through the library."""


def config_of(method: str, pipe: Any) -> Any:
    """The configuration of a method for a pipeline; None for the pipeline as it is."""
    return CONFIGS[method](pipe) if method in CONFIGS else variant(method, STEPS).config


def denoiser_of(pipe: Any) -> torch.nn.Module:
    """What a pipeline calls in every step."""
    return next(part for name in ("unet", "transformer") if (part := getattr(pipe, name, None)) is not None)


Made = tuple[Tensor, regrow.Run | None, list[str]]
"""Latents, the run that made them, and what else there is to say."""
Draw = Callable[..., Tensor]


def applied(pipe: Any, config: Any, draw: Draw) -> Made:
    """A generation."""
    with nullcontext() if config is None else regrow.apply(pipe, config) as run:
        return draw(), run, []


def again(pipe: Any, config: Any, draw: Draw) -> Made:
    """A second generation of the run."""
    with nullcontext() if config is None else regrow.apply(pipe, config) as run:
        draw()
        return draw(seed=1), run, []


def longer(pipe: Any, config: Any, draw: Draw) -> Made:
    """A second generation of the run, of more steps."""
    with nullcontext() if config is None else regrow.apply(pipe, config) as run:
        draw()
        return draw(num_inference_steps=STEPS + 3), run, []


def removed(pipe: Any, config: Any, draw: Draw) -> Made:
    """What the pipeline gives when the method is off again.

    Raises:
        AssertionError: if that is not what it gave before.
    """
    before = draw()
    _, run, _ = applied(pipe, config, draw)
    after = draw()
    assert torch.equal(before, after), "after remove() the pipeline is not as before"
    return after, run, []


def bare(pipe: Any, config: Any, draw: Draw) -> Made:
    """With the method on the denoiser instead of the pipeline."""
    if config is None:
        return applied(pipe, config, draw)
    with regrow.apply(denoiser_of(pipe), config, scheduler=pipe.scheduler) as run:
        return draw(), run, []


def anew(pipe: Any, config: Any, draw: Draw) -> Made:
    """What depends on the text alone is computed in every call."""
    if config is None:
        return applied(pipe, config, draw)
    with regrow.apply(pipe, config, keep_text=False) as run:
        return draw(), run, []


def interrupted(pipe: Any, config: Any, draw: Draw) -> Made:
    """A generation after one that ended in its third call."""
    calls: list[int] = []

    def stop(*_: Any) -> None:
        calls.append(len(calls))
        if len(calls) == 3:
            raise KeyboardInterrupt

    with ExitStack() as stack:
        run = None if config is None else stack.enter_context(regrow.apply(pipe, config))
        handle = denoiser_of(pipe).register_forward_pre_hook(stop)
        with suppress(KeyboardInterrupt):
            draw()
        handle.remove()
        return draw(seed=1), run, []


def inferred(pipe: Any, config: Any, draw: Draw) -> Made:
    """In inference mode."""
    with torch.inference_mode():
        latents, run, said = applied(pipe, config, draw)
    return latents.clone(), run, said


def watched(pipe: Any, config: Any, draw: Draw) -> Made:
    """With what an observer is told."""
    if config is None:
        return applied(pipe, config, draw)
    told: list[str] = []

    def look(seen: regrow.Observation) -> None:
        kept = {k: "all" if s is None else digest(s.kept) for k, s in seen.blocks.items()}
        chosen = "all" if seen.tokens is None else digest(seen.tokens)
        layers = {name: digest(tokens) for name, tokens in seen.refreshed.items()}
        told.append(f"observed {seen.grid} {seen.leading} {kept} {chosen} {layers}")

    with regrow.apply(pipe, config) as run, run.observed(look):
        return draw(), run, told


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WAYS: Mapping[str, Callable[[Any, Any, Draw], Made]] = {
    "unguided": applied,
    "batch": applied,
    "wide": applied,
    "again": again,
    "longer": longer,
    "removed": removed,
    "bare": bare,
    "anew": anew,
    "interrupted": interrupted,
    "inferred": inferred,
    "watched": watched,
    "float32": applied,
    "bfloat16": applied,
}
"""How a representative method is run, besides the plain way, ``guided``."""


class Case(NamedTuple):
    """What is run: see above."""

    family: str
    method: str
    way: str

    def __str__(self) -> str:
        return "/".join(self)


def every_case(pattern: str = "*") -> list[Case]:
    """All cases whose names are like a pattern, those of a family together."""
    return [case for case in _cases() if fnmatchcase(str(case), pattern)]


def _cases() -> Iterator[Case]:
    for place, (name, family) in enumerate(FAMILIES.items()):
        some = REPRESENTATIVES[family.kind]
        yield from (Case(name, method, "guided") for method in _plainly(place, family))
        known = [way for way in WAYS if way not in UNET_FORMS or way in family.forms]
        both = [(way, method) for way in known for method in some]
        if family.every is not None:
            yield from (Case(name, method, way) for way, method in both[place % EVERY :: EVERY])


def _plainly(place: int, family: Family) -> tuple[str, ...]:
    """The methods of a family, which has this place among all, that are run in the plain way."""
    some = REPRESENTATIVES[family.kind]
    if family.every is None:
        return some[place % 3 :: 3]
    every = [*(name for name in CONFIGS if name not in LEARNED), *NAMED]
    return tuple(dict.fromkeys((*some, *every[place % family.every :: family.every], *family.more)))


class Outcome(NamedTuple):
    """What a case gave.

    Args:
        latents: None if the method was refused.
        lines: the report, warnings and errors.
        seconds: that it took.
    """

    latents: Tensor | None
    lines: list[str]
    seconds: float = 0.0

    @property
    def error(self) -> str:
        """Type of the error that it ended with; empty if there was none."""
        return self.lines[-1].split(":")[0].removeprefix("error ") if self.latents is None else ""


@lru_cache(maxsize=2)
def pipeline(family: str, dtype: torch.dtype) -> Any:
    """A family's pipeline, which its cases share."""
    return FAMILIES[family].make().to(dtype)


def outcome(case: Case) -> Outcome:
    """Run a case. Whatever it raises is what it gives."""
    family = FAMILIES[case.family]
    pipe = pipeline(case.family, DTYPES.get(case.way, family.dtype))
    draw = partial(family.draw, pipe, **family.forms.get(case.way, family.forms["guided"]))
    begin = process_time()
    torch.manual_seed(0)
    latents, lines = None, []
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        try:
            config = config_of(case.method, pipe)
            latents, run, said = WAYS.get(case.way, applied)(pipe, config, draw)
            lines = [*said, f"chance {digest(torch.get_rng_state())}", *reported(run)]
        except Exception as error:
            lines = [f"error {type(error).__name__}: {error}"]
    told = [f"warning: {w.message}" for w in heard if w.category is UserWarning]
    lines = [line.replace(scratch().name, "SCRATCH") for line in (*told, *lines)]
    return Outcome(latents, lines, process_time() - begin)


def reported(run: regrow.Run | None) -> Iterator[str]:
    """A run's report: the text, the sums, and every call."""
    if run is None:
        return
    report = run.report()
    yield from str(report).splitlines()
    yield f"macs {report.macs} of {report.full_macs}, selection {report.selection_macs}"
    yield from (f"call {json.dumps(call)}" for call in report.to_dict()["calls"])


def digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes, type and shape."""
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode() + data).hexdigest()


def prepare() -> None:
    """One thread, and algorithms that give the same every time."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    logging.set_verbosity_error()


def outcomes(cases: Sequence[Case], jobs: int, console: Console) -> Iterator[tuple[Case, Outcome]]:
    """Run cases, in so many processes; what each gave, in their order."""
    with ExitStack() as stack:
        made: Iterable[Outcome] = map(outcome, cases)
        if jobs > 1:
            spawn = multiprocessing.get_context("spawn")
            pool = stack.enter_context(ProcessPoolExecutor(jobs, spawn, prepare))
            made = pool.map(outcome, cases, chunksize=16)
        yield from zip(cases, track(made, "cases", total=len(cases), console=console), strict=True)


def write(folder: Path, family: str, cases: Mapping[str, Outcome]) -> None:
    """The two files of a family."""
    tensors = {name: one.latents.contiguous() for name, one in cases.items() if one.latents is not None}
    save_file(tensors, folder / f"{family}.safetensors")
    entries = {
        name: {
            "shape": None if one.latents is None else list(one.latents.shape),
            "sha256": None if one.latents is None else digest(one.latents),
            "lines": one.lines,
        }
        for name, one in cases.items()
    }
    text = json.dumps({"machine": machine(), "cases": entries}, indent=1, ensure_ascii=False)
    (folder / f"{family}.json").write_text(text + "\n", encoding="utf-8")


def read(folder: Path, pattern: str) -> tuple[dict[str, Outcome], list[str]]:
    """What was written of the cases whose names are like a pattern, and how its machine was another.

    Raises:
        ValueError: if nothing was, or tensors are not those that were written.
    """
    made: dict[str, Outcome] = {}
    now, unlike = machine(), set()
    for file in sorted(folder.glob("*.json")):
        data = json.loads(file.read_text(encoding="utf-8"))
        unlike |= {k for k in ("processor", "versions", "threads") if data["machine"][k] != now[k]}
        tensors = load_file(file.with_suffix(".safetensors"))
        for name, entry in data["cases"].items():
            latents = tensors.get(name)
            if (None if latents is None else digest(latents)) != entry["sha256"]:
                raise ValueError(f"{file}: {name}: its tensor is not the one that was written")
            if fnmatchcase(name, pattern):
                made[name] = Outcome(latents, entry["lines"])
    if not made:
        raise ValueError(f"{folder}: no case that is like {pattern!r} was written there")
    return made, sorted(unlike)


def differences(before: Outcome | None, now: Outcome | None) -> Iterator[tuple[str, str]]:
    """What differs between two outcomes of a case, and how; nothing if they are equal."""
    if before is None or now is None:
        yield "case", "was not written" if before is None else "is not known any more"
        return
    if before.latents is not None and now.latents is not None:
        if digest(before.latents) != digest(now.latents):
            yield "latents", _distance(before.latents, now.latents)
    elif before.latents is not now.latents:
        yield "latents", "none before" if before.latents is None else "none now"
    if before.lines != now.lines:
        lines = list(islice(unified_diff(before.lines, now.lines, n=0, lineterm=""), 2, None))
        changed = [line for line in lines if not line.startswith("@@")]
        more = [f"and {len(changed) - SHOWN} lines more"] if len(changed) > SHOWN else []
        yield "text", "\n".join([*changed[:SHOWN], *more])


def _distance(a: Tensor, b: Tensor) -> str:
    """How far apart two tensors are."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"{a.dtype} {tuple(a.shape)} before, {b.dtype} {tuple(b.shape)} now"
    return f"largest difference {(a.double() - b.double()).abs().max():.3g} of {a.double().abs().max():.3g}"


def compare(before: Mapping[str, Outcome], now: Mapping[str, Outcome], console: Console) -> bool:
    """Print what differs, and say whether nothing does."""
    names = tuple(dict.fromkeys((*now, *before)))
    found = {name: list(differences(before.get(name), now.get(name))) for name in names}
    unequal = {name: rows for name, rows in found.items() if rows}
    if unequal:
        table = Table("case", "differs", "how")
        for name, rows in unequal.items():
            for what, how in rows:
                table.add_row(name, what, how)
        console.print(table)
    console.print(f"{len(names) - len(unequal)} of {len(names)} cases are equal")
    return not unequal


def summary(made: Mapping[str, Outcome]) -> Table:
    """By family, how many cases gave pictures, which errors the others, and the time."""
    table = Table("family", "cases", "errors", "seconds")
    families = dict.fromkeys(name.split("/")[0] for name in made)
    for family in families:
        own = [one for name, one in made.items() if name.split("/")[0] == family]
        errors = Counter(one.error for one in own if one.error)
        listed = ", ".join(f"{count} {name}" for name, count in sorted(errors.items()))
        table.add_row(family, str(len(own)), listed, f"{sum(one.seconds for one in own):.1f}")
    total = sum(one.seconds for one in made.values())
    table.add_row("all", str(len(made)), "", f"{total:.1f}")
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("write", "compare"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="*", metavar="PATTERN", help="cases to run (default: all)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes (default: 1)")
    given = parser.parse_args(arguments)
    console, progress = Console(markup=False, highlight=False), Console(stderr=True)
    prepare()
    before: dict[str, Outcome] = {}
    if given.command == "compare":
        try:
            before, unlike = read(given.folder, given.only)
        except (OSError, ValueError) as error:
            parser.error(str(error))
        if unlike:
            console.print(f"written on a machine of other {', '.join(unlike)}: bits may differ")
    cases = every_case(given.only)
    if not cases:
        parser.error(f"--only: no case is like {given.only!r}")
    made: dict[str, Outcome] = {}
    found = outcomes(cases, given.jobs, progress)
    for family, group in groupby(found, key=lambda pair: pair[0].family):
        own = {str(case): one for case, one in group}
        if given.command == "write":
            given.folder.mkdir(parents=True, exist_ok=True)
            write(given.folder, family, own)
        made |= own
    console.print(summary(made))
    return 0 if given.command == "write" or compare(before, made, console) else 1


if __name__ == "__main__":
    sys.exit(main())
