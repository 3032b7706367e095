"""What is not allowed is refused by field, value and what is allowed, and nothing is left behind."""

from __future__ import annotations

import warnings
from typing import Any

import diffusers
import pipelines
import pytest
import torch
from pydantic import ValidationError
from test_exactness import assert_untouched
from torch import nn

import regrow
from regrow import DaTo, Schedule, SiTo, UnsupportedModelError


def refused(kind: type[Exception], *parts: str) -> Any:
    """A context that expects an error whose text holds all parts."""
    pattern = "(?s)" + "".join(f"(?=.*{part})" for part in parts)
    return pytest.raises(kind, match=pattern)


@pytest.mark.parametrize(
    ("ratio", "patch", "allowed"),
    [(0.76, 2, "0.75"), (0.9, 2, "0.75"), (0.9, 3, "0.888"), (0.95, 4, "0.9375")],
)
def test_ratios_that_would_prune_base_tokens(ratio: float, patch: int, allowed: str) -> None:
    with refused(ValidationError, "ratio", str(ratio), f"<= {allowed}"):
        SiTo(ratio=ratio, patch=patch)
    with refused(ValidationError, "ratio", str(ratio), f"<= {allowed}"):
        DaTo(schedule=Schedule.constant(ratio), patch=patch)


@pytest.mark.parametrize("patch", [2, 3, 4])
def test_the_highest_ratio_allowed_is_allowed(pipe: Any, patch: int) -> None:
    highest = 1 - 1 / patch**2
    with regrow.apply(pipe, SiTo(ratio=highest, patch=patch)):
        assert pipelines.generate(pipe).isfinite().all()


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"ratio": -0.1}, ["ratio", ">= 0", "-0.1"]),
        ({"ratio": 1.0}, ["ratio", "< 1"]),
        ({"ratio": float("nan")}, ["ratio", "finite|nan"]),
        ({"ratio": "half"}, ["ratio", "number", "half"]),
        ({}, ["ratio", "required"]),
        ({"ratio": 0.5, "speed": 3}, ["speed", "not permitted", "3"]),
        ({"ratio": 0.5, "patch": 1}, ["patch", ">= 2 and <= 64", "1"]),
        ({"ratio": 0.5, "base": "VII"}, ["base", "'I'", "'VI'", "VII"]),
        ({"ratio": 0.5, "noise": -1}, ["noise", ">= 0", "-1"]),
        ({"ratio": 0.5, "max_downsample": 3}, ["max_downsample", "top", "8", "3"]),
        ({"ratio": 0.5, "recovery": "guess"}, ["recovery", "copy", "mean", "guess"]),
        ({"ratio": 0.5, "features": "none"}, ["features", "block_input", "norm1"]),
        ({"ratio": 0.5, "alignment": "both"}, ["alignment", "conditional", "both"]),
        ({"ratio": 0.5, "version": 2}, ["version", "1", "2"]),
        ({"ratio": 0.5, "method": "dato"}, ["method", "sito", "dato"]),
        ({"ratio": 0.5, "nearby": True, "base": "II"}, ["nearby", "base=II", "I, IV, V, VI"]),
        ({"ratio": 0.5, "nearby": True, "base": "III"}, ["nearby", "base=III", "I, IV, V, VI"]),
        (
            {"ratio": 0.5, "self_attention": False},
            ["self_attention", "cross_attention", "feed_forward", "switch one on"],
        ),
    ],
)
def test_sito_refuses_by_field_and_value(fields: dict[str, Any], parts: list[str]) -> None:
    with refused(ValidationError, *parts):
        SiTo(**fields)


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({}, ["schedule", "required"]),
        ({"schedule": "b1"}, ["schedule", "b1"]),
        ({"schedule": {"depth": [1], "ratio": [2]}}, ["schedule", "ratio", "< 1"]),
        ({"score": "best"}, ["score", "diff", "random", "best"]),
        ({"score_weight": 0}, ["score_weight", "> 0"]),
        ({"score_noise": -0.1}, ["score_noise", ">= 0", "-0.1"]),
        ({"patch": 0}, ["patch", ">= 2 and <= 64", "0"]),
        ({"max_downsample": 16}, ["max_downsample", "16"]),
        ({"ratio": 0.5}, ["ratio", "not permitted"]),
    ],
)
def test_dato_refuses_by_field_and_value(fields: dict[str, Any], parts: list[str]) -> None:
    if fields and "schedule" not in fields:
        fields = {"schedule": Schedule.constant(0.5)} | fields
    with refused(ValidationError, *parts):
        DaTo(**fields)


@pytest.mark.parametrize("method", [SiTo, DaTo])
def test_unknown_presets_are_refused_with_those_there_are(method: Any) -> None:
    with refused(ValueError, "preset", "'z9'", method.__name__, *method.presets()):
        method.preset("z9")


def plain_unet() -> diffusers.UNet2DModel:
    return diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
    )


def ddpm() -> Any:
    return diffusers.DDPMPipeline(plain_unet(), diffusers.DDPMScheduler())


def sana() -> nn.Module:
    return diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=4,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=8,
        sample_size=8,
    )


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (plain_unet, "UNet2DModel"),
        (ddpm, "UNet2DModel"),
        (sana, "SanaTransformer2DModel"),
        (lambda: nn.Linear(2, 2), "Linear"),
        (pipelines.vae, "AutoencoderKL"),
        (lambda: None, "NoneType"),
        (lambda: "stable-diffusion-v1-5", "str"),
        (object, "object"),
    ],
    ids=["UNet2DModel", "DDPM", "Sana", "Linear", "vae", "None", "str", "object"],
)
def test_models_without_a_table_are_refused_with_those_that_have_one(make: Any, name: str) -> None:
    target = make()
    with refused(UnsupportedModelError, "model", name, "UNet2DConditionModel"):
        regrow.apply(target, SiTo(ratio=0.5))
    modules = target.modules() if isinstance(target, nn.Module) else []
    for module in modules:
        assert "forward" not in module.__dict__
        assert not hasattr(module, "_diffusers_hook")


def test_unets_with_other_blocks_are_refused_with_the_known_ones() -> None:
    model = pipelines.unet(
        down_block_types=("ResnetDownsampleBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    )
    with refused(UnsupportedModelError, "ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D", "DownBlock2D"):
        regrow.apply(model, SiTo(ratio=0.5))


def assert_as_before(pipe: Any, expected: torch.Tensor) -> None:
    assert_untouched(pipe)
    assert torch.equal(pipelines.generate(pipe), expected)


@pytest.mark.parametrize("name", ["", "b1", "dato:b9", "steps:5"])
def test_a_name_of_no_method_is_refused(pipe: Any, name: str) -> None:
    expected = pipelines.generate(pipe)
    with refused(ValueError, "method", repr(name)):
        regrow.apply(pipe, name)
    assert_as_before(pipe, expected)


@pytest.mark.parametrize("config", [None, {"ratio": 0.5}, 0.5, SiTo], ids=repr)
def test_what_is_no_method_is_refused_with_the_methods(pipe: Any, config: Any) -> None:
    expected = pipelines.generate(pipe)
    with refused(TypeError, "config", type(config).__name__, "DaTo", "SiTo"):
        regrow.apply(pipe, config)
    assert_as_before(pipe, expected)


def test_a_level_without_attention_is_refused(sdxl_pipe: Any) -> None:
    expected = pipelines.generate(sdxl_pipe)
    for config in (
        SiTo(ratio=0.5, max_downsample=1),
        DaTo(schedule=Schedule.constant(0.5), max_downsample=1),
    ):
        with refused(ValueError, "max_downsample", "1", "UNet2DConditionModel", "at 2"):
            regrow.apply(sdxl_pipe, config)
        assert_as_before(sdxl_pipe, expected)


@pytest.mark.parametrize("how", ["torch.compile", "module.compile"])
def test_models_compiled_as_a_whole_are_refused(pipe: Any, how: str) -> None:
    expected = pipelines.generate(pipe)
    plain = pipe.unet
    if how == "torch.compile":
        pipe.unet = torch.compile(plain, backend="eager")
    else:
        plain.compile(backend="eager")
    with refused(UnsupportedModelError, "UNet2DConditionModel", "compiled", "compile_blocks"):
        regrow.apply(pipe, SiTo(ratio=0.5))
    pipe.unet = plain
    plain._compiled_call_impl = None
    assert_as_before(pipe, expected)


@pytest.mark.parametrize("config", [SiTo(ratio=0.5), DaTo.preset("b1")], ids=["sito", "dato"])
def test_a_latent_too_small_to_prune_warns_with_numbers(config: Any) -> None:
    model = pipelines.unet()
    inputs = pipelines.unet_inputs(model, height=1, width=1)
    with (
        regrow.apply(model, config) as run,
        run.generation(3) as clock,
        torch.no_grad(),
        warnings.catch_warnings(record=True) as seen,
    ):
        warnings.simplefilter("always")
        for _ in range(2):
            assert model(**inputs).sample.isfinite().all()
            clock.step()
    told = [str(w.message) for w in seen if "nothing is pruned" in str(w.message)]
    assert len(told) == 1
    assert "latent of 1 x 1" in told[0]


def test_a_wrong_call_of_the_denoiser_fails_as_without_regrow(pipe: Any) -> None:
    with pytest.raises(TypeError) as plain:
        pipe.unet()
    with regrow.apply(pipe, SiTo(ratio=0.5)), torch.no_grad(), pytest.raises(TypeError) as hooked:
        pipe.unet()
    assert str(hooked.value) == str(plain.value)
    expected = pipelines.generate(pipe)
    assert_as_before(pipe, expected)
