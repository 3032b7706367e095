"""Spectrum: which calls are full, and that the others forecast what the last block returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import floor
from typing import Any

import pipelines
import pytest
import slow_forecasts
import torch
import transformer_pipelines as tp
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
)
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from rows import rows_of
from slow_forecasts import Calls, Spectral, counted, forecast_outputs
from torch import Tensor, nn

import regrow
from regrow.core.recipe import recipe_of
from regrow.methods.spectrum import Spectrum, full_calls
from regrow.schedule import FULL, HEAD

STEPS = 8
CONFIG = Spectrum(full=2, window=2.0, alpha=0.75, mix=0.8)


def by_hand(config: Spectrum, calls: int) -> set[int]:
    """The released code's loop."""
    full, window, skipped = set(), config.window, 0
    for call in range(calls):
        if call < config.full:
            full.add(call)
            continue
        if (skipped + 1) % floor(window) == 0 or call >= config.stop * calls:
            full.add(call)
            window, skipped = window + config.alpha, 0
        else:
            skipped += 1
    return full


@pytest.mark.parametrize(("preset", "count"), [("quality", 14), ("fast", 10)])
def test_the_papers_presets_make_as_many_full_calls(preset: str, count: int) -> None:
    plan = recipe_of(Spectrum.preset(preset)).plan.resample(50)
    assert plan.depth.count(FULL) == count
    assert plan.depth.count(HEAD) == 50 - count


def test_full_calls_become_rarer() -> None:
    assert sorted(full_calls(Spectrum(alpha=3.0), 50)) == [0, 1, 2, 3, 4, 6, 11, 19, 30, 44]


@given(
    full=st.integers(1, 8),
    window=st.floats(1, 5),
    alpha=st.floats(0, 4),
    stop=st.floats(0, 1),
    calls=st.integers(1, 80),
)
def test_windows_are_those_of_a_plain_loop(
    full: int, window: float, alpha: float, stop: float, calls: int
) -> None:
    config = Spectrum(full=full, window=window, alpha=alpha, stop=stop)
    found = full_calls(config, calls)
    assert found == by_hand(config, calls)
    assert 0 in found
    assert found <= set(range(calls))


def before_conv_norm_out(unet: Any) -> nn.Module:
    """What gives the features that a U-Net's last normalization is given."""
    block: nn.Module = unet.up_blocks[-1]
    return block


def last(name: str) -> Callable[[Any], nn.Module]:
    """The last block of a transformer's stack."""
    return lambda transformer: getattr(transformer, name)[-1]


@dataclass(frozen=True)
class Case:
    """A pipeline, its last block, and what else a generation is asked for.

    Args:
        make: the pipeline.
        block: of its denoiser.
        generate: latents.
        calls: of the denoiser a step.
    """

    make: Callable[[], Any]
    block: Callable[[Any], nn.Module]
    generate: Callable[..., Tensor]
    calls: int = 1


def unet_case(kind: str, **options: Any) -> Case:
    options = {"num_inference_steps": STEPS} | options
    return Case(
        lambda: pipelines.make(kind),
        before_conv_norm_out,
        lambda pipe, **more: pipelines.generate(pipe, kind=kind, **options | more),
    )


def transformer_case(kind: str, block: str, calls: int = 1, **options: Any) -> Case:
    options = {"num_inference_steps": STEPS} | options
    return Case(
        tp.KINDS[kind],
        last(block),
        lambda pipe, **more: tp.generate(pipe, **options | more),
        calls,
    )


CASES = {
    "unet": unet_case("sd1"),
    "unet-batch": unet_case("sd1", prompt=["a penguin", "a pizza"]),
    "unet-unguided": unet_case("sd1", guidance_scale=1.0),
    "sdxl": unet_case("sdxl"),
    "dit": transformer_case("dit", "transformer_blocks"),
    "dit-batch": transformer_case("dit", "transformer_blocks", count=2),
    "pixart": transformer_case("pixart", "transformer_blocks"),
    "sd3": transformer_case("sd3", "transformer_blocks"),
    "flux": transformer_case("flux", "single_transformer_blocks"),
    "flux-two-calls": transformer_case("flux", "single_transformer_blocks", 2, **tp.TWO_CALLS),
}


def denoiser_of(pipe: Any) -> Any:
    return getattr(pipe, "unet", None) or pipe.transformer


def spectral() -> Spectral:
    return Spectral(total=STEPS, degree=CONFIG.degree, ridge=CONFIG.ridge, mix=CONFIG.mix)


def expected(case: Case, first: int = 0) -> Tensor:
    """By hooks of the test's own: the last block computes or forecasts, all else is computed."""
    pipe = case.make()
    denoiser, calls = denoiser_of(pipe), Calls(case.calls, first)
    full = by_hand(CONFIG, STEPS) | {first}
    with (
        counted(denoiser, calls),
        forecast_outputs([case.block(denoiser)], calls, full, spectral),
    ):
        return case.generate(pipe)


def assert_near(found: Tensor, wanted: Tensor) -> None:
    """Nearly equal: sums are of another order."""
    assert found.isfinite().all()
    assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max()


@pytest.mark.parametrize("name", CASES)
def test_the_last_blocks_features_are_forecast_and_the_head_is_computed(name: str) -> None:
    case = CASES[name]
    wanted = expected(case)
    pipe = case.make()
    plain = case.generate(pipe)
    denoiser, heads, blocks = denoiser_of(pipe), Calls(), Calls()
    with regrow.apply(pipe, CONFIG) as run:
        with counted(head_of(denoiser), heads), counted(inside(case.block(denoiser)), blocks):
            found = case.generate(pipe)
        depths = [row.depth for row in rows_of(run)]
    assert_near(found, wanted)
    # The forecast is seen: it isn't what the model would compute.
    assert (found - plain).abs().max() > 1e-3 * plain.abs().max()
    full = by_hand(CONFIG, STEPS)
    assert len(full) < STEPS
    assert heads.count + 1 == STEPS * case.calls
    assert blocks.count + 1 == len(full) * case.calls
    assert depths == [
        "full" if step in full else "head" for step in range(STEPS) for _ in range(case.calls)
    ]


def inside(block: Any) -> nn.Module:
    """A module that runs whenever the block does."""
    children: dict[str, Any] = dict(block.named_children())
    layer: nn.Module = (
        children["resnets"][-1]
        if "resnets" in children
        else next(children[name] for name in ("attn1", "attn") if name in children)
    )
    return layer


def head_of(denoiser: Any) -> nn.Module:
    """A module behind the last block."""
    names = ("conv_out", "proj_out_2", "proj_out")
    return next(getattr(denoiser, n) for n in names if getattr(denoiser, n, None) is not None)


def test_another_prompt_between_changes_nothing(pipe: Any) -> None:
    options = {"num_inference_steps": STEPS}
    with regrow.apply(pipe, CONFIG):
        first = pipelines.generate(pipe, **options)
        other = pipelines.generate(pipe, prompt="a pizza", seed=1, **options)
        assert torch.equal(pipelines.generate(pipe, **options), first)
    with regrow.apply(pipelines.sd(), CONFIG) as run:
        assert torch.equal(pipelines.generate(run._pipeline, prompt="a pizza", seed=1, **options), other)


def test_a_run_that_starts_late_forecasts_by_its_places_in_the_whole() -> None:
    """Image-to-image of strength .75 begins at the third of eight steps."""
    case = Case(
        lambda: pipelines.sd(kind=StableDiffusionImg2ImgPipeline),
        before_conv_norm_out,
        lambda pipe: pipelines.generate(pipe, kind="img2img", num_inference_steps=STEPS, strength=0.75),
    )
    wanted = expected(case, first=2)
    pipe = case.make()
    with regrow.apply(pipe, CONFIG) as run:
        found = case.generate(pipe)
    full = by_hand(CONFIG, STEPS) | {2}
    assert [(row.step, row.depth) for row in rows_of(run)] == [
        (step, "full" if step in full else "head") for step in range(2, STEPS)
    ]
    assert_near(found, wanted)


def with_controlnet() -> Any:
    parts = pipelines.sd().components | {"image_encoder": None}
    torch.manual_seed(5)
    control = tp.seeded(
        ControlNetModel.from_unet(parts["unet"], conditioning_embedding_out_channels=(8, 16, 32))
    )
    made = StableDiffusionControlNetPipeline(**parts, controlnet=control, requires_safety_checker=False)
    return pipelines.quiet(made)


def test_residuals_of_a_controlnet_reach_the_full_calls() -> None:
    case = Case(
        with_controlnet,
        before_conv_norm_out,
        lambda pipe: pipelines.generate(pipe, num_inference_steps=STEPS, image=pipelines.picture()),
    )
    wanted = expected(case)
    pipe = case.make()
    with regrow.apply(pipe, CONFIG) as run:
        found = case.generate(pipe)
    assert [row.depth for row in rows_of(run)].count("head") == STEPS - len(by_hand(CONFIG, STEPS))
    assert_near(found, wanted)
    uncontrolled = pipelines.generate(pipelines.sd(), num_inference_steps=STEPS)
    assert (found - uncontrolled).abs().max() > 1e-3


def test_a_window_of_one_changes_nothing_and_says_so(pipe: Any) -> None:
    plain = pipelines.generate(pipe)
    run = regrow.apply(pipe, Spectrum(full=1, window=1.0, alpha=0.0))
    with pytest.warns(UserWarning, match="saved nothing"), run:
        assert torch.equal(pipelines.generate(pipe), plain)
    assert torch.equal(pipelines.generate(pipe), plain)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"full": 0}, "full"),
        ({"window": 0.5}, "window"),
        ({"alpha": -1.0}, "alpha"),
        ({"degree": 0}, "degree"),
        ({"ridge": 0.0}, "ridge"),
        ({"mix": 1.5}, "mix"),
        ({"stop": -0.1}, "stop"),
        ({"lambda": 0.1}, "lambda"),
    ],
)
def test_wrong_fields_are_named(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        Spectrum(**fields)


def test_the_slow_reference_reproduces_a_parabola() -> None:
    """The reference itself is held to what it must be."""
    times = list(range(0, 20, 2))
    values = torch.tensor([[t**2 / 100] for t in times], dtype=torch.float64).numpy()
    options = {"total": 20, "degree": 2, "ridge": 1e-10}
    assert slow_forecasts.chebyshev(times, values, 19, mix=1.0, **options) == pytest.approx(3.61)
    assert slow_forecasts.chebyshev(times, values, 19, mix=0.0, **options) == pytest.approx(3.58)


def test_a_run_that_begins_late_computes_two_values_before_it_forecasts() -> None:
    pipe = pipelines.make("img2img")
    with regrow.apply(pipe, "spectrum:fast") as run:
        pipelines.generate(pipe, kind="img2img", num_inference_steps=50, strength=0.4)
        depths = [call.depth for call in rows_of(run)]
    assert depths[:2] == ["full", "full"]
    assert "head" in depths
