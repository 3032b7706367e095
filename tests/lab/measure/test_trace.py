"""What a trace says of a generation is what a slow, independent look at it finds."""

from __future__ import annotations

import functools
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pipelines
import pytest
import torch
import transformer_pipelines
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    TCDScheduler,
    UniPCMultistepScheduler,
)
from PIL import Image
from pipelines import generate
from rows import rows_of
from torch import Tensor

import regrow
from regrow import FULL, DaTo, DeepCache, Schedule, SiTo, ToMeSD, zoo
from regrow.core.recipe import CallInfo, Recipe, recipe_of
from regrow.lab import cli
from regrow.lab.cli.trace_plots import draw
from regrow.lab.measure.machine import model_key
from regrow.lab.measure.token_counts import ComputedCounter
from regrow.lab.measure.trace import PERCENTILES, Trace, TracedStep, deviation, trace, watched_steps
from regrow.lab.measure.variants import Variant, variant
from regrow.lab.measure.x0 import noise_level, predicted_x0, prediction_type, unknown_x0
from regrow.methods.base import MethodConfig
from regrow.methods.l2c import L2C
from regrow.methods.pruning import TokenRule, Where
from regrow.methods.tokencache import TokenCache, full_calls
from regrow.models import layout_of
from regrow.predictors import bundled_for, table_of
from regrow.tokens.grid import Grid
from regrow.tokens.select import Selection

PROMPTS = ["a penguin", "a pizza"]
SIZE = {"height": 48, "width": 64}
SAMPLERS: dict[str, Any] = {
    "ddim": lambda: pipelines.scheduler(),
    "ddim, v": lambda: pipelines.scheduler(prediction_type="v_prediction"),
    "pndm": lambda: pipelines.scheduler(PNDMScheduler, skip_prk_steps=True),
    "euler": lambda: pipelines.scheduler(EulerDiscreteScheduler),
    "euler, v": lambda: pipelines.scheduler(EulerDiscreteScheduler, prediction_type="v_prediction"),
    "dpm++": lambda: pipelines.scheduler(DPMSolverMultistepScheduler),
    "dpm++, karras": lambda: pipelines.scheduler(DPMSolverMultistepScheduler, use_karras_sigmas=True),
}


def plain(steps: int) -> Variant:
    return variant(f"steps:{steps}", steps)


def method(config: Any, steps: int = 4) -> Variant:
    return Variant(type(config).__name__, config, steps)


def moments(pipe: Any, **changes: Any) -> list[TracedStep]:
    found: list[TracedStep] = []
    with watched_steps(pipe.scheduler, found.append):
        generate(pipe, **changes)
    return found


DIFFUSION = (
    DDIMScheduler,
    DDPMScheduler,
    PNDMScheduler,
    LCMScheduler,
    TCDScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    DEISMultistepScheduler,
    UniPCMultistepScheduler,
    EulerDiscreteScheduler,
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
    LMSDiscreteScheduler,
)


@pytest.mark.parametrize("kind", DIFFUSION, ids=lambda kind: kind.__name__)
def test_x0_is_found_in_what_the_scheduler_itself_made_noisy(kind: type) -> None:
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    x0, noise = torch.randn(2, 1, 4, 6, 8)
    alphas = DDIMScheduler(**betas).alphas_cumprod
    for prediction in ("epsilon", "v_prediction", "sample"):
        if kind is EulerAncestralDiscreteScheduler and prediction == "sample":
            continue  # diffusers has not built it.
        scheduler = kind(**betas, prediction_type=prediction)
        scheduler.set_timesteps(8)
        for index in (0, 3, 7):
            t = scheduler.timesteps[index]
            x = scheduler.add_noise(x0, noise, t[None])
            share = float(np.interp(float(t), range(1000), alphas))
            outputs = {
                "epsilon": noise,
                "v_prediction": share**0.5 * noise - (1 - share) ** 0.5 * x0,
                "sample": x0,
            }
            level = noise_level(scheduler, t, index)
            found = predicted_x0(x, outputs[prediction], level, prediction_type(scheduler))
            assert torch.allclose(found, x0, atol=2e-2, rtol=0), (prediction, index)
            if float(t).is_integer() and float(t) < 700:
                assert torch.allclose(found, x0, atol=1e-4, rtol=0), (prediction, index)


@pytest.mark.parametrize("kind", [FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler])
def test_x0_of_flow_matching(kind: type) -> None:
    x0, noise = torch.randn(2, 1, 4, 6, 8)
    for index in (0, 3, 7):
        scheduler = kind(shift=3.0)
        scheduler.set_timesteps(8)
        t = scheduler.timesteps[index]
        x = scheduler.scale_noise(x0, t[None], noise)
        level = noise_level(scheduler, t, index)
        found = predicted_x0(x, noise - x0, level, prediction_type(scheduler))
        assert torch.allclose(found, x0, atol=1e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_x0_is_ddims_own_to_float_precision(monkeypatch: pytest.MonkeyPatch, prediction: str) -> None:
    own: list[Tensor] = []
    step = DDIMScheduler.step

    @functools.wraps(step)
    def recording(*args: Any, **kwargs: Any) -> Any:
        out = step(*args, **(kwargs | {"return_dict": True}))
        own.append(out.pred_original_sample)
        return out.to_tuple()

    monkeypatch.setattr(DDIMScheduler, "step", recording)
    found = moments(pipelines.sd(sampler=pipelines.scheduler(prediction_type=prediction)), prompt=PROMPTS)
    assert len(found) == len(own) == 4
    for moment, expected in zip(found, own, strict=True):
        assert moment.x0 is not None
        assert torch.allclose(moment.x0, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_x0_is_what_dpm_solver_goes_on_with() -> None:
    pipe = pipelines.sd(sampler=SAMPLERS["dpm++, karras"]())
    own: list[Tensor] = []

    def after(*_: Any) -> dict[str, Any]:
        own.append(pipe.scheduler.model_outputs[-1])
        return {}

    found = moments(pipe, callback_on_step_end=after)
    assert len(found) == len(own) == 4
    for moment, expected in zip(found, own, strict=True):
        assert moment.x0 is not None
        assert torch.allclose(moment.x0, expected, rtol=1e-4, atol=1e-4)


def by_hand(pipe: Any, seen: list[tuple[Tensor, Any]], guidance: float) -> list[Tensor]:
    """The predicted x_0 of each step: the denoiser called once more on x_t, guided by hand."""
    scheduler = pipe.scheduler
    positive, negative = pipe.encode_prompt(PROMPTS, "cpu", 1, True)
    sigmas = ((1 - scheduler.alphas_cumprod.double()) / scheduler.alphas_cumprod.double()) ** 0.5
    found = []
    for x, t in seen:
        # Karras' noise levels lie between those of the timesteps they are rounded to.
        exact = (
            scheduler.config.get("use_karras_sigmas")
            and scheduler.sigmas[list(scheduler.timesteps).index(t)]
        )
        sigma = float(exact or np.interp(float(t), range(1000), sigmas.numpy()))
        alpha, beta = (1 + sigma**2) ** -0.5, sigma * (1 + sigma**2) ** -0.5
        taken = x * alpha if isinstance(scheduler, EulerDiscreteScheduler) else x
        conditional, unconditional = (pipe.unet(taken, t, text).sample for text in (positive, negative))
        output = conditional if guidance == 1 else unconditional + guidance * (conditional - unconditional)
        if scheduler.config.prediction_type == "epsilon":
            found.append((taken - beta * output) / alpha)
        else:
            found.append(alpha * taken - beta * output)
    return found


@pytest.mark.parametrize(
    ("sampler", "guidance"), [*((sampler, 5.0) for sampler in SAMPLERS), ("ddim", 1.0), ("euler, v", 1.0)]
)
def test_x_t_and_x0_are_those_of_a_slow_look(sampler: str, guidance: float) -> None:
    pipe = pipelines.sd(pipelines.one_level_unet(), sampler=SAMPLERS[sampler]())
    start = torch.randn(2, 4, 12, 16)
    after: list[Tensor] = []
    timesteps: list[Any] = []

    def end(_: Any, step: int, t: Any, tensors: Any) -> Any:
        timesteps.append(t)
        after.append(tensors["latents"].clone())
        return tensors

    asked = {"prompt": PROMPTS, "guidance_scale": guidance, "latents": start, **SIZE}
    found = moments(pipe, callback_on_step_end=end, **asked)
    assert len(found) == len(after) >= 4
    assert all(torch.equal(m.x, x) for m, x in zip(found, after, strict=True))
    assert [m.timestep for m in found] == [float(t) for t in timesteps]
    before = [start * pipe.scheduler.init_noise_sigma, *after[:-1]]
    with torch.no_grad():
        expected = by_hand(pipe, list(zip(before, timesteps, strict=True)), guidance)
    for moment, x0 in zip(found, expected, strict=True):
        assert moment.x0 is not None
        assert float((moment.x0 - x0).abs().max()) < 2e-4 * float(x0.abs().max())


def test_a_sampler_that_is_not_known_gets_no_x0_and_a_reason() -> None:
    pipe = pipelines.sd(sampler=pipelines.scheduler(KDPM2DiscreteScheduler))
    found = trace(pipe, [plain(3), method(DeepCache(interval=2), 3)], PROMPTS[:1])
    assert "KDPM2DiscreteScheduler" in (found.x0_unknown or "")
    assert found.variants[0].deviation.x0 is None
    assert found.variants[0].deviation.x[-1] > 0
    assert unknown_x0(pipelines.scheduler()) is None


@pytest.fixture(scope="module")
def found() -> Trace:
    configs = [
        SiTo(ratio=0.5),
        DaTo(schedule=Schedule(depth=(FULL, 1, 0, FULL), ratio=(0.5, 0.25, 0.5, 0))),
    ]
    variants = [plain(4), plain(2), *(method(config) for config in configs)]
    return trace(pipelines.sd(), variants, PROMPTS, guidance=5.0, seed=7, **SIZE)


def latents(steps: int, config: Any = None) -> list[Tensor]:
    """x_t after each step, from diffusers' callback."""
    seen: list[Tensor] = []
    pipe = pipelines.sd()
    options = {
        "prompt": PROMPTS,
        "generator": [torch.Generator().manual_seed(7 + i) for i in range(2)],
        "num_inference_steps": steps,
        "callback_on_step_end": lambda p, i, t, tensors: seen.append(tensors["latents"].clone()) or tensors,
    }
    if config is None:
        generate(pipe, **options, **SIZE)
    else:
        with regrow.apply(pipe, config):
            generate(pipe, **options, **SIZE)
    return seen


def test_deviation_is_the_mean_absolute_error_of_each_step(found: Trace) -> None:
    base, own = latents(4), latents(4, SiTo(ratio=0.5))
    one = found.variants[1].deviation
    assert one.x_against == one.x0_against == (0, 1, 2, 3)
    expected = [float((a - b).abs().mean()) for a, b in zip(own, base, strict=True)]
    assert one.x == pytest.approx(expected, rel=1e-5)
    assert min(expected) > 0


def test_fewer_steps_are_compared_at_the_nearest_timestep(found: Trace) -> None:
    half = found.variants[0].deviation
    assert found.timestep == (751.0, 501.0, 251.0, 1.0)
    assert half.timestep == (501.0, 1.0)
    assert half.after == (1.0, 0.0)
    assert half.x_against == (2, 3)
    assert half.x0_against == (1, 3)
    base, own = latents(4), latents(2)
    expected = [float((own[i] - base[j]).abs().mean()) for i, j in enumerate(half.x_against)]
    assert half.x == pytest.approx(expected, rel=1e-5)
    assert found.variants[0].computed is None


def test_a_timestep_that_comes_twice_is_compared_with_its_last() -> None:
    def steps(*timesteps: float) -> list[TracedStep]:
        return [TracedStep(t, torch.full((1, 1, 1, 1), t), torch.full((1, 1, 1, 1), -t)) for t in timesteps]

    found = deviation([steps(900.0, 480.0)], [steps(900.0, 700.0, 700.0, 500.0, 500.0)])
    assert found.x_against == (3, 4)
    assert found.x0_against == (0, 4)
    assert found.x == (400, 20)
    assert found.x0 == (0, 20)


def test_what_prunes_and_caches_nothing_does_not_deviate() -> None:
    pipe = pipelines.sd()
    nothing = [DeepCache(interval=1), SiTo(ratio=0)]
    with pytest.warns(UserWarning, match="prunes nothing and reuses nothing"):
        found = trace(pipe, [plain(4), *map(method, nothing)], PROMPTS)
    for one in found.variants:
        assert one.deviation.x == one.deviation.x0 == (0, 0, 0, 0)
        assert one.computed is not None
        assert all(bool((share == 1).all()) for share in one.computed.values())


def test_batches_make_one_trace() -> None:
    variants = [plain(3), method(DeepCache(interval=2), 3)]
    prompts = [*PROMPTS, "a cactus"]
    whole, parts = (trace(pipelines.sd(), variants, prompts, batch=b, seed=3) for b in (3, 2))
    assert parts.variants[0].deviation.x == pytest.approx(whole.variants[0].deviation.x, rel=1e-3)
    for a, b in zip(whole.differences, parts.differences, strict=True):
        assert np.allclose(a.percentiles, b.percentiles, rtol=1e-3)
    a, b = ((v.variants[0].computed or {})[1] for v in (whole, parts))
    assert a.shape == b.shape == (2, 3, 16, 16)
    assert torch.equal(a, b)
    assert len(parts.images) == len(parts.variants[0].images) == 3


def test_differences_are_the_spread_of_each_tokens_change() -> None:
    pipe = pipelines.sd(pipelines.unet(layers_per_block=2))
    outputs: list[Tensor] = []
    hook = pipe.unet.register_forward_hook(lambda m, a, out: outputs.append(out[0].clone()))
    entering: list[Tensor] = []
    block = pipe.unet.up_blocks[1].attentions[2].transformer_blocks[0]
    other = block.norm1.register_forward_pre_hook(lambda m, args: entering.append(args[0].clone()))
    found = trace(pipe, [plain(4), plain(2)], PROMPTS, guidance=5.0, seed=7, **SIZE)
    hook.remove()
    other.remove()
    by_name = {d.name: d for d in found.differences}
    names = [f"into up_blocks.1.attentions.{i}.transformer_blocks.0" for i in range(3)]
    names += [f"into down_blocks.0.attentions.{i}.transformer_blocks.0" for i in range(2)]
    assert set(by_name) == {"predicted noise", "up_blocks.1.attentions.1", *names}
    for name, values, channels in (("predicted noise", outputs, 1), (names[2], entering, 2)):
        difference = by_name[name]
        assert difference.timestep == found.timestep[1:]
        assert len(values) == 6
        for i, percentiles in enumerate(difference.percentiles):
            tokens = (values[i + 1] - values[i]).abs().mean(channels).numpy()
            assert tokens.size == 4 * 12 * 16
            assert percentiles == pytest.approx(np.percentile(tokens, PERCENTILES), rel=1e-5)


def test_modules_may_be_chosen() -> None:
    pipe = pipelines.sd()
    variants = [plain(2), plain(1)]
    found = trace(pipe, variants, PROMPTS[:1], modules=["mid_block", "down_blocks.0.attentions.0"])
    names = ["predicted noise", "mid_block", "down_blocks.0.attentions.0"]
    assert [d.name for d in found.differences] == names
    with pytest.raises(ValueError, match="module: 'nowhere' is not in UNet2DConditionModel"):
        trace(pipe, variants, PROMPTS[:1], modules=["nowhere"])
    with pytest.raises(ValueError, match="module: time_embedding does not return tokens"):
        trace(pipe, variants, PROMPTS[:1], modules=["time_embedding"])
    with pytest.raises(
        ValueError, match=r"module: mid_block.attentions.0.transformer_blocks is not called"
    ):
        trace(pipe, variants, PROMPTS[:1], modules=["mid_block.attentions.0.transformer_blocks"])
    assert not pipe.unet.time_embedding._forward_hooks


class EveryOther(MethodConfig):
    """Prunes every other token, always the same, for the test."""

    ratio: float = 0.5


@dataclass(frozen=True)
class _EveryOther(TokenRule):
    where = Where()
    patch = 2

    def select(self, x: Tensor, grid: Grid, count: int, prepared: Any, call: CallInfo) -> Selection:
        kept = torch.arange(0, grid.tokens, 2).expand(len(x), -1)
        return Selection.of(
            kept, torch.arange(grid.tokens).div(2, rounding_mode="floor").expand(len(x), -1)
        )


@recipe_of.register
def _(config: EveryOther) -> Recipe:
    return Recipe(Schedule.constant(config.ratio), sites=_EveryOther())


def test_a_rule_that_prunes_the_same_tokens_gives_exactly_that_map() -> None:
    found = trace(pipelines.sd(), [plain(2), method(EveryOther(), 2)], PROMPTS, guidance=5.0, **SIZE)
    computed = found.variants[0].computed
    assert computed is not None
    expected = torch.tensor([1.0, 0.0]).repeat(12 * 8).view(12, 16)
    assert torch.equal(computed[1], expected.expand(2, 2, 12, 16))
    assert torch.equal(computed[2], torch.ones(2, 2, 6, 8))


@pytest.mark.parametrize(
    ("config", "guidance"),
    [
        (SiTo(ratio=0.4), 5.0),
        (SiTo(ratio=0.4, max_downsample=2), 1.0),
        (ToMeSD(ratio=0.5), 1.0),
        (DaTo(schedule=Schedule(depth=(FULL, 1, 0, 2), ratio=(0.5, 0.25, 0.5, 0.1))), 5.0),
    ],
    ids=["sito", "sito, two levels", "tome", "dato"],
)
def test_the_map_counts_as_many_tokens_as_the_report(config: Any, guidance: float) -> None:
    pipe = pipelines.sd(pipelines.unet(layers_per_block=2))
    counter = ComputedCounter(layout_of(pipe.unet))
    with regrow.apply(pipe, config) as run, run.observed(counter):
        generate(pipe, prompt=PROMPTS, guidance_scale=guidance, **SIZE)
    # Two blocks in the way down and three in the way up at the latent's resolution, one in the middle at
    # half of it. Depth 2 runs the first of the way down and the last two of the way up.
    blocks = {1: {"full": 5, "2": 3, "1": 1, "0": 0}, 2: {"full": 1, "2": 0, "1": 0, "0": 0}}
    grids = {1: Grid(12, 16), 2: Grid(6, 8)}
    pruned = {1: True, 2: getattr(config, "max_downsample", "top") == 2}
    expected = {1: 0, 2: 0}
    for call in rows_of(run):
        for level, grid in grids.items():
            stay = grid.tokens - (grid.pruned(call.ratio) if pruned[level] else 0)
            expected[level] += (4 if guidance > 1 else 2) * blocks[level][call.depth] * stay
    assert {level: int(count.sum()) for level, count in counter.counts().items()} == expected
    assert (counter.possible(1), counter.possible(2)) == (4 * 5, 4)
    assert all(int(count.max()) <= counter.possible(level) for level, count in counter.counts().items())


def test_observers_are_told_only_while_they_observe(pipe: Any) -> None:
    told: list[Any] = []
    with regrow.apply(pipe, SiTo(ratio=0.5)) as run:
        with run.observed(told.append):
            generate(pipe)
        assert len(told) == 4
        with pytest.raises(StopError), run.observed(told.append):
            raise StopError
        generate(pipe)
        assert len(told) == 4
    assert [one.record.position.index for one in told] == [0, 1, 2, 3]
    kept = next(iter(told[0].blocks.values())).kept
    assert kept.shape == (2, 128)


class StopError(Exception):
    pass


def clean(pipe: Any) -> bool:
    modules = list(pipe.unet.modules())
    hooks = [h for m in modules for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    return not hooks and "step" not in pipe.scheduler.__dict__ and "forward" not in pipe.unet.__dict__


@pytest.mark.parametrize("name", ["steps:4", "SiTo"])
def test_an_exception_leaves_nothing_behind(pipe: Any, name: str) -> None:
    expected = generate(pipe)

    def stop(running: str, done: float) -> None:
        if running == name and done >= 0.5:
            raise StopError

    with pytest.raises(StopError):
        trace(pipe, [plain(4), method(SiTo(ratio=0.5))], PROMPTS, on_step=stop)
    assert clean(pipe)
    assert torch.equal(generate(pipe), expected)


def test_a_second_trace_says_the_same(pipe: Any) -> None:
    expected = generate(pipe)
    variants = [plain(4), method(DaTo.preset("b1"))]
    first, second = (trace(pipe, variants, PROMPTS).to_dict() for _ in range(2))
    assert first == second
    assert first["variants"][0]["deviation"]["x"][-1] > 0
    assert clean(pipe)
    assert torch.equal(generate(pipe), expected)


def test_sdxl_is_traced_at_its_finest_level_with_attention() -> None:
    found = trace(pipelines.sdxl(), [plain(2), method(SiTo(ratio=0.5), 2)], PROMPTS[:1], **SIZE)
    assert {level: share.shape for level, share in (found.variants[0].computed or {}).items()} == {
        2: (2, 1, 6, 8),
        4: (2, 1, 3, 4),
    }
    assert float((found.variants[0].computed or {})[2].mean()) == pytest.approx(0.5)


@pytest.mark.parametrize("kind", ["sd3", "flux", "pixart"])
def test_transformers_are_traced(kind: str) -> None:
    pipe = transformer_pipelines.KINDS[kind]()
    size = 16 * getattr(pipe, "vae_scale_factor", 2)
    variants = [variant("steps:4", 4), variant("steps:3", 4), variant("fora:2", 4)]
    block = "transformer_blocks.1"
    found = trace(pipe, variants, ["a penguin"], modules=[block], height=size, width=size)
    assert all(np.isfinite(one.deviation.x).all() for one in found.variants)
    cached = found.variants[1].deviation.x
    assert cached[0] == 0 < cached[1]
    assert [difference.name for difference in found.differences] == ["predicted noise", block]


@pytest.mark.parametrize(
    ("kind", "samples", "config", "leading"),
    [
        ("sd3", 2, regrow.CATPruning(alpha=0.25, t0=2), 0),
        ("flux", 1, regrow.CATPruning(alpha=0.25, t0=2), 0),
        ("sd3", 2, regrow.ATEDM.preset("reuse", ratio=0.75, early=0, block=1), 2),
        ("flux", 1, regrow.ATEDM.preset("reuse", ratio=0.75, early=0, block=2), 3),
    ],
)
def test_the_tokens_of_a_call_are_counted_exactly(
    kind: str, samples: int, config: Any, leading: int
) -> None:
    pipe = transformer_pipelines.KINDS[kind]()
    counter = ComputedCounter(layout_of(pipe.transformer))
    with regrow.apply(pipe, config) as run, run.observed(counter):
        transformer_pipelines.generate(pipe)
    ((level, count),) = counter.counts().items()
    assert count.shape == (samples, 8, 8)
    blocks = transformer_pipelines.LAYERS
    # Two full calls, three of a quarter of the 64 tokens but in the leading blocks.
    some = (blocks - leading) * 16 + leading * 64
    assert count.sum((1, 2)).tolist() == [blocks * 2 * 64 + 3 * some] * samples
    assert counter.shares()[level].max() <= 1


@pytest.mark.parametrize(("kind", "layers"), [("sd3", 2), ("pixart", 3), ("flux", 2)])
@pytest.mark.parametrize("self_attention", [0.0, 0.5])
def test_tokens_that_single_layers_compute_are_counted_by_their_share_of_the_block(
    kind: str, layers: int, self_attention: float
) -> None:
    pipe = transformer_pipelines.KINDS[kind]()
    layout = layout_of(pipe.transformer)
    config = regrow.ToCa(interval=2, ratio=0.75, self_attention=self_attention)
    computed: dict[str, int] = {}
    counter, calls = ComputedCounter(layout), []

    def note(observation: regrow.Observation) -> None:
        calls.append(observation.record.depth)
        for name, tokens in observation.refreshed.items():
            computed[name] = computed.get(name, 0) + tokens.numel()

    with regrow.apply(pipe, config) as run, run.observed(counter), run.observed(note):
        transformer_pipelines.generate(pipe)
    ((level, count),) = counter.counts().items()
    places = [site for site in layout.layer_sites if site.kind is not None]
    assert set(computed) <= {layer.name for layer in places}
    full = sum(depth == FULL for depth in calls) * layout.depths * count.numel()
    some = sum(
        number / sum(other.block == layer.block for other in places)
        for layer in places
        if (number := computed.get(layer.name, 0))
    )
    assert some > 0
    assert float(count.sum()) == pytest.approx(full + some)
    assert max(sum(other.block == layer.block for other in places) for layer in places) == layers
    assert counter.shares()[level].max() <= 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variants": [plain(2)]}, "methods: 1 is not allowed, it must be >= 2"),
        ({"prompts": []}, "prompts: 0 is not allowed"),
        ({"batch": 0}, "batch: 0 is not allowed"),
        ({"variants": [method(SiTo(ratio=0.5)), plain(2)]}, "methods: 'SiTo' can't come first"),
    ],
)
def test_wrong_input_is_named(pipe: Any, changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"variants": [plain(2), plain(1)], "prompts": PROMPTS, "batch": 1} | changes
    with pytest.raises(ValueError, match=message):
        trace(pipe, arguments["variants"], arguments["prompts"], batch=arguments["batch"])


def test_what_can_not_be_applied_is_refused_before_the_first_picture(pipe: Any) -> None:
    def never(name: str, done: float) -> None:
        raise AssertionError(name)

    bad = method(SiTo(ratio=0.5, max_downsample=1))
    with pytest.raises(ValueError, match="leaves no layer"):
        trace(pipelines.sdxl(), [plain(2), bad], PROMPTS, on_step=never)
    with pytest.raises(ValueError, match="prompt: 'lion' is not allowed, it must be the number of a class"):
        trace(transformer_pipelines.dit(), [plain(2), plain(1)], ["1", "lion"], batch=1, on_step=never)
    with (
        regrow.apply(pipe, SiTo(ratio=0.5)),
        pytest.raises(ValueError, match="pipeline: a method is applied"),
    ):
        trace(pipe, [plain(2), plain(1)], PROMPTS, on_step=never)


def command(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr("sys.argv", ["regrow", "trace", *words])
    try:
        cli.main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


@pytest.mark.usefixtures("small_emoji")
def test_the_command_writes_numbers_and_plots(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ("--methods", "steps:2,steps:1,dato:b1", "--steps", "2", "--prompts", "2", "--json")
    assert command(monkeypatch, *words, "--device", "cpu", "--out", str(tmp_path)) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "trace.json").read_text())
    assert [one["name"] for one in printed["variants"]] == ["steps:1", "dato:b1"]
    assert printed["baseline"] == "steps:2"
    assert {"machine", "prompts", "guidance", "differences", "timestep"} <= set(printed)
    assert printed["model_key"] == model_key("emoji")
    level = printed["variants"][1]["computed"][0]
    assert np.shape(level["mean"]) == (32, 32)
    assert np.shape(level["halves"]) == (2, 2, 32, 32)
    assert np.mean(level["mean"]) == pytest.approx(level["share"], abs=1e-3)
    for name in ("deviation", "differences", "computed"):
        assert Image.open(tmp_path / f"{name}.png").width > 500


def test_shares_of_blocks_are_those_of_the_predictors_table(tmp_path: Path) -> None:
    pipe, config = zoo.load("cifar10"), TokenCache(full_steps=2, last_blocks=1, ratio=0.6, beta=-1)
    found = trace(pipe, [plain(5), Variant("cached", config, 5)], ["1", "2"], guidance=1.0, batch=1)
    learned = bundled_for(pipe.transformer)
    assert learned is not None
    table = table_of(learned)
    full = full_calls(config, table, 5)
    assert len(full) == 2
    [cached] = found.variants
    assert list(cached.sites) == [f"transformer_blocks.{i}" for i in range(6)]
    for block, shares in enumerate(cached.sites.values()):
        planned = [table.shares(call / 5, 5, 0.6)[min(block, 4)] for call in range(5)]
        # Of 256 tokens, as many as are whole.
        expected = [
            1.0 if call in full or block == 5 else math.ceil(share * 256 - 1e-6) / 256
            for call, share in enumerate(planned)
        ]
        assert shares == pytest.approx(expected)
    assert found.to_dict()["variants"][0]["sites"]["transformer_blocks.5"] == [1.0] * 5
    files = draw(found, ("1", "2"), tmp_path)
    assert files[-1] == tmp_path / "blocks.png"
    assert Image.open(files[-1]).width > 500


def test_methods_that_decide_for_no_sites_have_no_shares_of_blocks(found: Trace, tmp_path: Path) -> None:
    assert all(not one.sites for one in found.variants)
    assert tmp_path / "blocks.png" not in draw(found, tuple(PROMPTS), tmp_path)


def test_shares_of_layers_are_the_rows_of_a_router() -> None:
    pipe = transformer_pipelines.dit(num_layers=2)
    [cached] = trace(pipe, [plain(4), Variant("l2c", L2C(router="untrained"), 4)], ["1"]).variants
    assert list(cached.sites) == [
        f"transformer_blocks.{i}.{name}" for i in range(2) for name in ("attn1", "ff")
    ]
    assert all(shares == (1.0, 0.0, 1.0, 0.0) for shares in cached.sites.values())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--prompt", "pear", "--prompts", "2"), "--prompt, --prompts: only one"),
        (("--model", "./nowhere"), "has no prompts of its own; give --prompt"),
        (("--dtype", "int8"), "dtype: 'int8' is not allowed"),
        (("--methods", "steps:2,magic"), "'magic' is not known"),
    ],
)
def test_mistakes_get_one_clear_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    message: str,
) -> None:
    assert command(monkeypatch, *words) == 2
    assert message in capsys.readouterr().err


def test_without_matplotlib_the_extra_is_named_before_any_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert command(monkeypatch, "--prompt", "pear") == 2
    assert "pip install 'regrow[plot]'" in capsys.readouterr().err
