"""TaylorSeer: which calls are full, and what the others forecast."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import pipelines
import pytest
import torch
import transformer_pipelines as tp
from diffusers import StableDiffusionImg2ImgPipeline
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from rows import rows_of
from slow_forecasts import Calls, Factors, counted, forecast_outputs
from torch import Tensor, nn

import regrow
from regrow.core.recipe import recipe_of
from regrow.methods.taylorseer import ForecastLevel, TaylorSeer, full_calls
from regrow.recover.time import Taylor
from regrow.schedule import FULL, HEAD, LAYERS

STEPS = 8
CONFIG = TaylorSeer(interval=3, order=2, first=2)
LAST_BLOCK = TaylorSeer(interval=3, order=2, first=2, level=ForecastLevel.LAST_BLOCK)


def by_hand(config: TaylorSeer, calls: int) -> set[int]:
    """Count up from the last of the first calls."""
    full, since = set(), 0
    for call in range(calls):
        since += 1
        if call < config.first or since == config.interval:
            full.add(call)
            since = 0
    return full


@given(interval=st.integers(1, 12), first=st.integers(1, 8), calls=st.integers(1, 60))
def test_the_first_calls_and_every_nth_behind_them_are_full(interval: int, first: int, calls: int) -> None:
    config = TaylorSeer(interval=interval, first=first)
    assert full_calls(config, calls) == by_hand(config, calls)


@pytest.mark.parametrize(
    ("level", "depth"), [(ForecastLevel.LAYERS, LAYERS), (ForecastLevel.LAST_BLOCK, HEAD)]
)
def test_the_others_forecast_at_their_level(level: ForecastLevel, depth: int) -> None:
    plan = recipe_of(TaylorSeer(interval=5, order=1, first=1, level=level)).plan.resample(50)
    assert [d == FULL for d in plan.depth] == [step % 5 == 0 for step in range(50)]
    assert set(plan.depth) == {FULL, depth}


def layers_of(blocks: Sequence[Any], names: Sequence[str]) -> list[nn.Module]:
    """Attentions and feed-forwards."""
    children = [dict(block.named_children()) for block in blocks]
    return [own[name] for own in children for name in names if own.get(name) is not None]


def basic(denoiser: Any) -> list[nn.Module]:
    """Of DiT and PixArt."""
    return layers_of(denoiser.transformer_blocks, ("attn1", "attn2", "ff"))


def joint(denoiser: Any) -> list[nn.Module]:
    """Of Flux: those of both texts and images, and what single blocks make of theirs."""
    double = layers_of(denoiser.transformer_blocks, ("attn", "ff", "ff_context"))
    return [*double, *layers_of(denoiser.single_transformer_blocks, ("proj_out",))]


def of_unet(denoiser: Any) -> list[nn.Module]:
    blocks = [m for m in denoiser.modules() if type(m).__name__ == "BasicTransformerBlock"]
    return layers_of(blocks, ("attn1", "attn2", "ff"))


@dataclass(frozen=True)
class Case:
    """A pipeline, where its layers and last block are, and how it generates.

    Args:
        make: the pipeline.
        layers: all attentions and feed-forwards of its denoiser.
        last: its last block.
        generate: latents.
        calls: of the denoiser a step.
    """

    make: Callable[[], Any]
    layers: Callable[[Any], list[nn.Module]]
    last: Callable[[Any], nn.Module]
    generate: Callable[..., Tensor]
    calls: int = 1


def unet_case(**options: Any) -> Case:
    return Case(
        pipelines.sd,
        of_unet,
        lambda unet: unet.up_blocks[-1],
        lambda pipe: pipelines.generate(pipe, num_inference_steps=STEPS, **options),
    )


def transformer_case(kind: str, layers: Any, calls: int = 1, **options: Any) -> Case:
    stack = "single_transformer_blocks" if layers is joint else "transformer_blocks"
    return Case(
        tp.KINDS[kind],
        layers,
        lambda transformer: getattr(transformer, stack)[-1],
        lambda pipe: tp.generate(pipe, num_inference_steps=STEPS, **options),
        calls,
    )


CASES = {
    "unet": unet_case(),
    "unet-batch": unet_case(prompt=["a penguin", "a pizza"]),
    "dit": transformer_case("dit", basic),
    "dit-batch": transformer_case("dit", basic, count=2),
    "pixart": transformer_case("pixart", basic),
    "flux": transformer_case("flux", joint),
    "flux-two-calls": transformer_case("flux", joint, 2, **tp.TWO_CALLS),
}


@cache
def plain(name: str) -> Tensor:
    """What a case gives without a method."""
    return CASES[name].generate(CASES[name].make())


def denoiser_of(pipe: Any) -> Any:
    return getattr(pipe, "unet", None) or pipe.transformer


def expected(case: Case, config: TaylorSeer, first: int = 0) -> Tensor:
    """By hooks of the test's own, each with the factors that the released code keeps."""
    pipe = case.make()
    denoiser, calls = denoiser_of(pipe), Calls(case.calls, first)
    sites = case.layers(denoiser) if config.level is ForecastLevel.LAYERS else [case.last(denoiser)]
    # A run that begins late computes two values before the first forecast.
    full = by_hand(config, STEPS) | ({first, first + 1} if first else set())
    with (
        counted(denoiser, calls),
        forecast_outputs(sites, calls, full, lambda: Factors(config.order)),
    ):
        return case.generate(pipe)


def assert_near(found: Tensor, wanted: Tensor) -> None:
    """Nearly equal: sums are of another order."""
    assert found.isfinite().all()
    assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max()


@pytest.mark.parametrize("config", [CONFIG, LAST_BLOCK], ids=["layers", "last-block"])
@pytest.mark.parametrize("name", CASES)
def test_what_is_forecast_is_the_released_codes_series(name: str, config: TaylorSeer) -> None:
    case = CASES[name]
    wanted = expected(case, config)
    pipe = case.make()
    with regrow.apply(pipe, config) as run:
        found = case.generate(pipe)
        depths = [row.depth for row in rows_of(run)]
    assert_near(found, wanted)
    # The forecast is seen: it isn't what the model would compute.
    unchanged = plain(name)
    assert (found - unchanged).abs().max() > 1e-3 * unchanged.abs().max()
    cached = "layers" if config.level is ForecastLevel.LAYERS else "head"
    full = by_hand(config, STEPS)
    assert depths == [
        "full" if step in full else cached for step in range(STEPS) for _ in range(case.calls)
    ]


@pytest.mark.parametrize("config", [CONFIG, LAST_BLOCK], ids=["layers", "last-block"])
def test_a_run_that_starts_late_forecasts_by_its_places_in_the_whole(config: TaylorSeer) -> None:
    """Image-to-image of strength .75 begins at the third of eight steps."""
    unet = unet_case()
    case = Case(
        lambda: pipelines.sd(kind=StableDiffusionImg2ImgPipeline),
        unet.layers,
        unet.last,
        lambda pipe: pipelines.generate(pipe, kind="img2img", num_inference_steps=STEPS, strength=0.75),
    )
    wanted = expected(case, config, first=2)
    pipe = case.make()
    with regrow.apply(pipe, config) as run:
        found = case.generate(pipe)
    full = by_hand(config, STEPS) | {2, 3}
    assert [row.step for row in rows_of(run) if row.depth == "full"] == sorted(full - {0, 1})
    assert_near(found, wanted)


def test_order_1_at_the_last_block_is_a_line_through_the_last_two() -> None:
    """The same plan written as a schedule, with Lagrange's weights."""
    config = TaylorSeer(interval=3, order=1, first=2, level=ForecastLevel.LAST_BLOCK)
    depth = tuple(FULL if step in by_hand(config, STEPS) else HEAD for step in range(STEPS))
    schedule = regrow.Schedule(depth=depth, ratio=(0.0,) * STEPS, recovery=(Taylor(order=1),))
    found = []
    for one in (config, regrow.DaTo(schedule=schedule)):
        pipe = pipelines.sd()
        with regrow.apply(pipe, one):
            found.append(pipelines.generate(pipe, num_inference_steps=STEPS))
    assert_near(*found)


def test_interval_one_changes_nothing_and_says_so(pipe: Any) -> None:
    plain = pipelines.generate(pipe)
    with pytest.warns(UserWarning, match="prunes nothing and reuses nothing"):
        run = regrow.apply(pipe, TaylorSeer(interval=1))
    with run:
        assert torch.equal(pipelines.generate(pipe), plain)
    assert torch.equal(pipelines.generate(pipe), plain)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"interval": 0}, "interval"),
        ({"order": 0}, "order"),
        ({"order": 9}, "order"),
        ({"first": 0}, "first"),
        ({"level": "block"}, "level"),
        ({"degree": 1}, "degree"),
    ],
)
def test_wrong_fields_are_named(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        TaylorSeer(**fields)
