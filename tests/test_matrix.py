"""What holds for every method on every family of pipelines; less known families meet some methods in turn.

Nothing left out is nothing changed, a generation leaves nothing to the next, and a method that is taken
off, or refused, leaves nothing at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import any_pipelines
import families
import pipelines
import pytest
import torch
import transformer_pipelines
from rows import rows_of
from torch import Tensor, nn

import regrow
from regrow import FULL
from regrow.lab.measure.variants import variant
from regrow.methods.base import methods
from regrow.methods.calibrated import Calibrated

STEPS = 4
LAYERS = 4


@dataclass(frozen=True)
class Family:
    """A small pipeline, and how latents are made with it.

    Args:
        make: the pipeline.
        draw: latents, of the pipeline, ``seed``, and further arguments of its call.
        forms: arguments of a call; the first is guided.
        kind: U-Net, transformer, video, or unknown.
        every: it meets one in so many methods.
        steps: of a generation.
    """

    make: Callable[[], Any]
    draw: Callable[..., Tensor]
    forms: Mapping[str, Mapping[str, Any]]
    kind: str
    every: int = 1
    steps: int = STEPS


def unet(kind: str, every: int = 1, steps: int = STEPS) -> Family:
    """A family of `pipelines`."""
    # What begins with a picture has the picture's size.
    size = {} if "image" in pipelines.KINDS[kind][1] else {"height": 32, "width": 32}
    draw = partial(families.of_unet, kind=kind, **size)
    forms = {way: form for way, form in families.UNET_FORMS.items() if way != "wide" or "in" not in kind}
    return Family(partial(pipelines.make, kind), draw, forms, "unet", every, steps)


def transformer(
    make: Callable[[], Any], forms: Mapping[str, Any] = families.WIDE_FORMS, every: int = 1
) -> Family:
    """A family of `transformer_pipelines`."""
    return Family(make, families.of_transformer, forms, "transformer", every)


def video(make: Callable[[], Any]) -> Family:
    """A family of videos."""
    return Family(make, families.of_video, families.VIDEO_FORMS, "video")


def unknown(name: str) -> Family:
    """A family that regrow has no table for."""
    draw = partial(any_pipelines.generate, name)
    forms: Mapping[str, Mapping[str, Any]] = {"one": {}, "batch": {"count": 2}, "text": {"text": 1}}
    return Family(any_pipelines.FAMILIES[name].make, draw, forms, "unknown", 4)


_T = transformer_pipelines
FAMILIES: Mapping[str, Family] = {
    "sd1": unet("sd1"),
    "sd1-four-levels": unet("sd1-four-levels", 4),
    "sd2": unet("sd2", 4),
    "sdxl": unet("sdxl"),
    # They begin late: at the third of six steps.
    "img2img": unet("img2img", 4, steps=6),
    "sdxl-img2img": unet("sdxl-img2img", 4, steps=6),
    "inpaint": unet("inpaint", 4),
    "inpaint-nine-channels": unet("inpaint-nine-channels", 4),
    "sd3": transformer(partial(_T.sd3, LAYERS)),
    "sd35": transformer(_T.sd35, every=3),
    "pixart": transformer(partial(_T.pixart, num_layers=LAYERS)),
    "pixart-sigma": transformer(_T.pixart_sigma, every=3),
    "pixart-sized": transformer(_T.pixart_sized, every=3),
    "dit": transformer(partial(_T.dit, num_layers=LAYERS), families.TEXT_FORMS),
    "flux": transformer(partial(_T.flux, LAYERS), families.FLUX_FORMS),
    "latte": video(_T.latte),
    "wan": video(_T.wan),
    **{name: unknown(name) for name in any_pipelines.FAMILIES},
}


def scheduled(*depth: Any, **parts: Any) -> regrow.Schedule:
    """A schedule of `STEPS` calls."""
    return regrow.Schedule(**{"depth": depth, "ratio": (0.0,) * STEPS} | parts)


FITTED = regrow.Fitted(total=STEPS, steps=({"step": 2, "sources": (0, 1), "weights": (-0.9, 1.9)},))
OUTPUT = scheduled(FULL, FULL, 0, FULL, recovery=FITTED)
ALL_FULL = scheduled(*(FULL,) * STEPS)
MIXED = scheduled(FULL, 1, 0, FULL, ratio=(0.5, 0.3, 0.0, 0.7))
KNOWN = ("unet", "transformer", "video")
EVERY = (*KNOWN, "unknown")


@dataclass(frozen=True)
class Case:
    """A method as it meets families.

    Args:
        some: with which it leaves something out; a short name or a configuration.
        none: with which it leaves nothing out; None if that can't be said.
        kinds: the kinds of families that it works on.
        but: families of these kinds on which it does not.
    """

    some: Any
    none: Any
    kinds: tuple[str, ...]
    but: tuple[str, ...] = ()


CASES: Mapping[str, Case] = {
    "adaptive": Case("adaptive:budget=3", f"adaptive:budget={STEPS}", EVERY),
    "atedm": Case("atedm:0.5:early=0", "atedm:0:early=0", ("unet",)),
    "atedm/reuse": Case("atedm:0.5:recovery=reuse:early=0", "atedm:0:recovery=reuse", ("transformer",)),
    "calibrated": Case(
        Calibrated(steps=STEPS, schedule=OUTPUT, instead_of=8),
        Calibrated(steps=STEPS, schedule=ALL_FULL, instead_of=8),
        EVERY,
    ),
    "cat": Case("cat:0.4:t0=2", "cat:1:t0=2", ("transformer",)),
    "cat+deepcache": Case("cat:0.4:t0=2+deepcache:2", "cat:1:t0=2+deepcache:1", ("transformer",)),
    "dato": Case(regrow.DaTo(schedule=MIXED), regrow.DaTo(schedule=ALL_FULL), ("unet",)),
    "deepcache": Case("deepcache:2:branch=1", "deepcache:1", KNOWN),
    "deepcache+tome": Case("deepcache:2:branch=1+tome:0.5", "deepcache:1+tome:0", ("unet",)),
    "fora": Case("fora:2", "fora:1", KNOWN),
    "l2c": Case("l2c:untrained", None, ("transformer", "video")),
    "l2p": Case(regrow.L2P(fitted=FITTED), None, EVERY),
    "sito": Case("sito:0.5:feed_forward=true", "sito:0", ("unet",)),
    "spectrum": Case("spectrum:fast:full=2", "spectrum:fast:full=50", EVERY),
    "taylorseer": Case("taylorseer:2:first=1", "taylorseer:1", KNOWN),
    "toca": Case("toca:2:ratio=0.6", "toca:1", ("transformer",)),
    "tokencache": Case(
        "tokencache:2:predictor=untrained:last_blocks=1:ratio=0.6",
        "tokencache:2:predictor=untrained:last_blocks=1:ratio=0",
        ("transformer", "video"),
        ("sd3", "sd35", "flux"),
    ),
    "tome": Case("tome:0.5", "tome:0", ("unet",)),
}
"""By the name of a method; behind a slash its variant."""


def works(case: Case, family: str) -> bool:
    """Whether a method works on a family."""
    return FAMILIES[family].kind in case.kinds and family not in case.but


def config_of(method: Any) -> Any:
    """A configuration, also of a short name."""
    return variant(method, STEPS).config if isinstance(method, str) else method


def denoiser_of(pipe: Any) -> nn.Module:
    """What a pipeline calls in every step."""
    parts = (getattr(pipe, name, None) for name in ("unet", "transformer", "prior"))
    return next(part for part in parts if part is not None)


@cache
def pipeline(family: str) -> Any:
    """A family's pipeline, which its cases share: each is to leave it as it was."""
    return FAMILIES[family].make()


@cache
def untouched(family: str) -> Any:
    """Another, on which no method ever is."""
    return FAMILIES[family].make()


@cache
def plain(family: str, form: str, steps: int) -> Tensor:
    """What a form gives without a method. Not to be written to."""
    return drawn(family, untouched(family), form, steps)


@cache
def last_layer(family: str) -> str:
    """The module that a call of its denoiser computes last."""
    pipe, reached = untouched(family), list[str]()
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: reached.append(name))
        for name, module in denoiser_of(pipe).named_modules()
        if not list(module.children())
    ]
    drawn(family, pipe, guided(family), brief(family))
    for handle in handles:
        handle.remove()
    return reached[-1]


def guided(family: str) -> str:
    """The first of its forms."""
    return form_of(family, 0)


def form_of(family: str, turn: int) -> str:
    """A form, each in its turn."""
    forms = list(FAMILIES[family].forms)
    return forms[turn % len(forms)]


def brief(family: str) -> int:
    """Steps of a generation with two calls at least; three if it doesn't begin late."""
    return FAMILIES[family].steps // 2 + 1


def drawn(family: str, pipe: Any, form: str, steps: int = 0, **options: Any) -> Tensor:
    """Latents in a form; in as many steps as the family has unless said otherwise."""
    own = FAMILIES[family]
    return own.draw(pipe, num_inference_steps=steps or own.steps, **own.forms[form], **options)


def traces(denoiser: nn.Module) -> Iterator[str]:
    """Whatever a method could have left on a denoiser, by module."""
    for name, module in denoiser.named_modules():
        state = module.__dict__
        hooks = [hook for hook in state if hook.startswith("_forward") and state[hook]]
        # Flux's and Wan's pipelines give their denoisers a registry of hooks themselves.
        registry = getattr(module, "_diffusers_hook", None)
        hooks += list(registry.hooks) if registry is not None else []
        yield from (f"{name}: {what}" for what in (*hooks, *({"forward", "_call_impl"} & state.keys())))


class StopError(Exception):
    """Ends a generation."""


def stopped(family: str, pipe: Any, form: str) -> None:
    """A generation that ends in the last layer of the third call that computes it."""
    entered: list[int] = []

    def stop(*_: Any) -> None:
        entered.append(1)
        if len(entered) == 3:
            raise StopError

    handle = denoiser_of(pipe).get_submodule(last_layer(family)).register_forward_pre_hook(stop)
    try:
        with pytest.raises(StopError):
            drawn(family, pipe, form, seed=3)
    finally:
        handle.remove()


def test_every_method_is_met() -> None:
    assert {name.split("/")[0] for name in CASES if "+" not in name} == set(methods())


def met() -> Iterator[tuple[str, str]]:
    """Families with methods that work on them."""
    for place, (family, own) in enumerate(FAMILIES.items()):
        names = [name for name, case in CASES.items() if works(case, family)]
        yield from ((family, name) for name in names[place % own.every :: own.every])


MET = tuple(met())


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("family", "name"), MET, ids=["-".join(pair) for pair in MET])
def test_it_leaves_nothing_behind(family: str, name: str) -> None:
    pipe, config = pipeline(family), config_of(CASES[name].some)
    turn = list(FAMILIES).index(family) + list(CASES).index(name)
    form, steps = form_of(family, turn // 2), FAMILIES[family].steps
    with regrow.apply(pipe, config) as run:
        # What it is not to leave anything of, by turns: a generation that ended, of other steps, or was
        # stopped.
        if turn % 2:
            drawn(family, pipe, guided(family), steps - 1, seed=1)
        else:
            stopped(family, pipe, form)
        after = drawn(family, pipe, form)
        rows = rows_of(run)
    assert any(row.depth != "full" or row.ratio for row in rows)
    assert after.isfinite().all()
    assert not torch.equal(after, plain(family, form, steps))
    with regrow.apply(pipe, config):
        assert torch.equal(drawn(family, pipe, form), after)
    assert not [*traces(denoiser_of(pipe))]
    assert "step" not in pipe.scheduler.__dict__
    short = guided(family), brief(family)
    assert torch.equal(drawn(family, pipe, *short), plain(family, *short))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_left_out_is_bit_for_bit_the_plain_pipeline(family: str) -> None:
    own, pipe, place = FAMILIES[family], pipeline(family), list(FAMILIES).index(family)
    names = [name for name, case in CASES.items() if works(case, family) and case.none is not None]
    # Of the three that every unknown family meets, one.
    every, steps = min(own.every, len(names)), brief(family)
    for turn, name in enumerate(names[place % every :: every]):
        form = form_of(family, turn)
        with regrow.apply(pipe, config_of(CASES[name].none)):
            assert torch.equal(drawn(family, pipe, form, steps), plain(family, form, steps)), name
        assert not [*traces(denoiser_of(pipe))], name


@pytest.mark.parametrize("family", FAMILIES)
def test_what_does_not_work_is_refused_and_changes_nothing(family: str) -> None:
    pipe = pipeline(family)
    for name in CASES:
        if not works(CASES[name], family):
            config = config_of(CASES[name].some)
            with pytest.raises(regrow.UnsupportedModelError, match="model: "):
                regrow.apply(pipe, config)
            assert not [*traces(denoiser_of(pipe))], name
            assert "step" not in pipe.scheduler.__dict__
    short = guided(family), brief(family)
    assert torch.equal(drawn(family, pipe, *short), plain(family, *short))
