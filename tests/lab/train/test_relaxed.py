"""The relaxed path of TokenCache's training: its ends, its gradients, and the step before it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformer_pipelines
from diffusers import (
    DDIMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from regrow.lab.train.examples import Batch
from regrow.lab.train.frozen import Frozen, past, relaxed, truth
from regrow.lab.train.predictor import PredictorObjective, on_sites
from regrow.lab.train.router import Router, RouterObjective
from regrow.lab.train.steps import Steps
from regrow.models import layout_of
from regrow.predictors import CachePredictor

BLOCKS, TOKENS = 3, 64


def frozen_dit(dtype: torch.dtype = torch.float32) -> Frozen:
    pipe = transformer_pipelines.dit(num_layers=BLOCKS)
    denoiser = pipe.transformer.to(dtype).requires_grad_(False)
    return Frozen(denoiser, layout_of(denoiser), Steps.of(pipe.scheduler, 10))


def batch_of(dtype: torch.dtype = torch.float32) -> Batch:
    torch.manual_seed(5)
    x = torch.randn(2, 4, 16, 16, dtype=dtype)
    return Batch(x, torch.tensor([3, 6]), {"class_labels": torch.tensor([1, 1000])})


def test_alpha_1_is_the_full_call_and_0_the_reuse_of_all_updates_bit_for_bit() -> None:
    frozen, batch = frozen_dit(), batch_of()
    sites = frozen.layout.block_sites
    before = past(frozen, sites, batch)
    full = truth(frozen, sites, before, batch.given)
    ones = on_sites(torch.ones(2, TOKENS, BLOCKS), sites, before)
    output, last = relaxed(frozen, sites, before, batch.given, ones)
    assert torch.equal(output, full.output)
    assert torch.equal(last, full.last)
    zeros = on_sites(torch.zeros(2, TOKENS, BLOCKS), sites, before)
    _, last = relaxed(frozen, sites, before, batch.given, zeros)
    expected = full.entered.x
    for site in sites:
        expected = expected + before.kept[site.key]
    assert torch.equal(last, expected)
    assert not torch.allclose(last, full.last)


def test_the_last_blocks_are_always_computed() -> None:
    frozen, batch = frozen_dit(), batch_of()
    sites = frozen.layout.block_sites
    before = past(frozen, sites, batch)
    zeros = on_sites(torch.zeros(2, TOKENS, BLOCKS), sites[:-1], before)
    _, last = relaxed(frozen, sites, before, batch.given, zeros)
    entered = truth(frozen, sites, before, batch.given).entered
    x = entered.x + before.kept[sites[0].key] + before.kept[sites[1].key]
    torch.testing.assert_close(last, sites[2].module(x, *entered.args, **entered.kwargs))


def test_gradients_of_the_relaxed_path_are_those_of_finite_differences() -> None:
    frozen, batch = frozen_dit(torch.float64), batch_of(torch.float64)
    sites = frozen.layout.block_sites
    before = past(frozen, sites, batch)
    full = truth(frozen, sites, before, batch.given)

    def error(alpha: Tensor) -> Tensor:
        _, last = relaxed(frozen, sites, before, batch.given, on_sites(alpha, sites, before))
        return (last - full.last).pow(2).mean()

    alpha = torch.rand(2, TOKENS, BLOCKS, dtype=torch.float64, requires_grad=True)
    error(alpha).backward()
    assert alpha.grad is not None
    for place in ((0, 0, 0), (1, 7, 1), (0, 63, 2), (1, 20, 0)):
        nudge = torch.zeros_like(alpha)
        nudge[place] = 1e-5
        with torch.no_grad():
            expected = (error(alpha + nudge) - error(alpha - nudge)) / 2e-5
        assert expected.abs() > 1e-9
        torch.testing.assert_close(alpha.grad[place], expected, rtol=1e-5, atol=1e-12)


def test_gradients_reach_the_predictor_alone() -> None:
    frozen, batch = frozen_dit(), batch_of()
    plain = head_gradient(frozen, batch)
    assert all(p.grad is None for p in frozen.denoiser.parameters())
    # The last block is always computed, so that nothing is learned of it.
    assert (plain.abs().sum(1) > 0).tolist() == [True, True, False]
    again = replace(frozen, recompute=True)
    torch.testing.assert_close(head_gradient(again, batch), plain)
    assert all("forward" not in site.module.__dict__ for site in frozen.layout.block_sites)


def head_gradient(frozen: Frozen, batch: Batch) -> Tensor:
    torch.manual_seed(2)
    predictor = CachePredictor.of(frozen.denoiser, BLOCKS).requires_grad_(True)
    found = PredictorObjective(frozen, predictor, 1, 0.0).losses(batch)
    found.error.backward()
    gradient = predictor.head.weight.grad
    assert gradient is not None
    return gradient


def test_a_router_of_ones_is_the_full_call() -> None:
    frozen, batch = frozen_dit(), batch_of()
    router = Router(10, len(frozen.layout.layer_sites))
    with torch.no_grad():
        router.logits.fill_(100.0)
        assert RouterObjective(frozen, router, 0.0).losses(batch).error == 0
        router.logits.fill_(0.0)
        found = RouterObjective(frozen, router, 0.1).losses(batch)
    assert found.error > 0
    assert float(found.cost) == pytest.approx(0.1 * 0.5 * 2 * BLOCKS)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_a_step_is_the_samplers(prediction: str) -> None:
    scheduler: Any = DDIMScheduler(clip_sample=False, prediction_type=prediction)
    steps = Steps.of(scheduler, 10)
    scheduler.set_timesteps(10)
    x, output, noise = torch.randn(3, 2, 4, 4, 4).double()
    index = torch.tensor([2, 7])
    ours = steps.next(x, output, index)
    for i, one in enumerate(index.tolist()):
        t = scheduler.timesteps[one]
        theirs = scheduler.step(output[i : i + 1], t, x[i : i + 1]).prev_sample
        torch.testing.assert_close(ours[i : i + 1], theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        steps.noised(x, noise, index),
        scheduler.add_noise(x, noise, steps.times[index]),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_a_step_of_flow_matching_is_eulers(scheduler: Any) -> None:
    steps = Steps.of(scheduler, 10)
    euler: Any = FlowMatchEulerDiscreteScheduler()
    euler.set_timesteps(sigmas=steps.sigma.tolist())
    scheduler.set_timesteps(10)
    torch.testing.assert_close(steps.times, scheduler.timesteps)
    torch.testing.assert_close(steps.sigma.float(), scheduler.sigmas[:-1])
    x, output, noise = torch.randn(3, 1, 4, 4, 4).double()
    for index in (0, 7):
        now, after = steps.sigma[index], steps.sigma[index + 1]
        at = torch.tensor([index])
        torch.testing.assert_close(steps.noised(x, noise, at), (1 - now) * x + now * noise)
        torch.testing.assert_close(steps.next(x, output, at), x + (after - now) * output)
        euler._step_index = index
        theirs = euler.step(output, euler.timesteps[index], x).prev_sample
        torch.testing.assert_close(steps.next(x, output, at), theirs.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        FlowMatchHeunDiscreteScheduler(),
        EDMEulerScheduler(),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_other_noise_levels_are_refused(scheduler: Any) -> None:
    with pytest.raises(ValueError, match=r"the scheduler .* is not allowed in training"):
        Steps.of(scheduler, 10)
