"""The influence of each output, beside samplers written out and run with other numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from pipelines import scheduler

from regrow.lab.calibration.influence import influence


def slow_ddim(kind: str, steps: int) -> np.ndarray:
    """DDIM (Song et al., equation 12) in closed form, its factors multiplied from the end."""
    sampler = scheduler(prediction_type=kind)
    sampler.set_timesteps(steps)
    alphas = sampler.alphas_cumprod.double().numpy()
    times = sampler.timesteps.tolist()
    found, rest = np.zeros(steps), 1.0
    for i in reversed(range(steps)):
        after = times[i + 1] if i + 1 < steps else times[i] - 1000 // steps
        now, then = alphas[times[i]], alphas[after] if after >= 0 else sampler.final_alpha_cumprod.item()
        if kind == "epsilon":
            own = np.sqrt(1 - then) - np.sqrt(then) * np.sqrt(1 - now) / np.sqrt(now)
            sample = np.sqrt(then / now)
        else:
            own = np.sqrt(1 - then) * np.sqrt(now) - np.sqrt(then) * np.sqrt(1 - now)
            sample = np.sqrt(then * now) + np.sqrt((1 - then) * (1 - now))
        found[i], rest = own * rest, rest * sample
    return found


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_ddim_in_closed_form(kind: str, steps: int) -> None:
    sampler = scheduler(prediction_type=kind)
    sampler.set_timesteps(steps)
    np.testing.assert_allclose(influence(sampler), slow_ddim(kind, steps), rtol=1e-4)


def sampled(sampler: Any, begin: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    sampler.set_timesteps(STEPS)
    noise = {"generator": torch.Generator().manual_seed(3)} if "Ancestral" in type(sampler).__name__ else {}
    for output, time in zip(outputs, sampler.timesteps, strict=True):
        sampler.scale_model_input(begin, time) if hasattr(sampler, "scale_model_input") else None
        begin = sampler.step(output, time, begin, **noise, return_dict=False)[0]
    return begin


STEPS = 8
KINDS = (
    DDIMScheduler,
    EulerDiscreteScheduler,
    EulerAncestralDiscreteScheduler,
    DPMSolverMultistepScheduler,
    UniPCMultistepScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
)


def made(kind: Any) -> Any:
    return FlowMatchEulerDiscreteScheduler(shift=3.0) if kind is None else scheduler(kind)


@pytest.mark.parametrize("kind", [*KINDS, None])
def test_it_tells_what_other_outputs_come_to(kind: Any) -> None:
    """From some latent, with outputs changed at every call: the final latent changes by the sum of all."""
    known = made(kind)
    known.set_timesteps(STEPS)
    moves = torch.from_numpy(influence(known))
    generator = torch.Generator().manual_seed(0)
    begin = torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64)
    outputs, changes = torch.randn(2, len(moves), 2, 3, 4, 4, generator=generator, dtype=torch.float64)
    change = sampled(made(kind), begin, outputs + changes) - sampled(made(kind), begin, outputs)
    expected = torch.einsum("t,t...->...", moves, changes)
    torch.testing.assert_close(change.double(), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("kind", [DDIMScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler, None])
def test_of_a_part_of_the_run(kind: Any) -> None:
    """From the fourth timestep on, as in image-to-image, and not to the end."""

    def run(outputs: torch.Tensor) -> torch.Tensor:
        sampler = made(kind)
        sampler.set_timesteps(STEPS)
        sample = torch.ones(1, 1, 1, 1, dtype=torch.float64)
        for output, time in zip(outputs, sampler.timesteps[3:7], strict=True):
            sampler.scale_model_input(sample, time) if hasattr(sampler, "scale_model_input") else None
            sample = sampler.step(output.view_as(sample), time, sample, return_dict=False)[0]
        return sample.flatten()

    known = made(kind)
    known.set_timesteps(STEPS)
    moves = influence(known, 3, 7)
    alone = torch.cat([run(row) - run(0 * row) for row in torch.eye(4, dtype=torch.float64)])
    np.testing.assert_allclose(moves, alone, rtol=2e-3, atol=2e-3)


def test_it_leaves_the_scheduler_as_it_is() -> None:
    sampler = scheduler(UniPCMultistepScheduler)
    sampler.set_timesteps(5)
    influence(sampler)
    assert sampler.step_index is None
    assert sampler.model_outputs == [None, None]


def test_it_needs_timesteps() -> None:
    with pytest.raises(ValueError, match="timesteps of DDIMScheduler are not set"):
        influence(scheduler())


def test_it_refuses_a_sampler_that_is_not_linear() -> None:
    """Dynamic thresholding clips whatever its size is, at a quantile of the sample."""

    class Squares(DDIMScheduler):
        def step(self, model_output: Any, *args: Any, **kwargs: Any) -> Any:
            return super().step(model_output.abs().sqrt(), *args, **kwargs)

    sampler = scheduler(Squares)
    sampler.set_timesteps(5)
    with pytest.raises(ValueError, match="Squares with these settings is not linear"):
        influence(sampler)
