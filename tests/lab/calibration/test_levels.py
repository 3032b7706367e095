"""Timesteps of fewer steps: published ones, and those at noise levels of a form."""

from __future__ import annotations

from typing import Any

import numpy as np
import pipelines
import pytest
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from diffusers.schedulers import AysSchedules

from regrow.lab.calibration.levels import align_your_steps, log_even, other_timesteps

WHOLE = 50


def sampled(pipe: Any, kind: Any = EulerDiscreteScheduler, **changes: Any) -> Any:
    pipe.scheduler = kind.from_config(pipe.scheduler.config, **changes)
    return pipe


def levels(pipe: Any) -> np.ndarray:
    kept = pipe.scheduler.alphas_cumprod.double().numpy()
    return np.sqrt((1 - kept) / kept)


@pytest.mark.parametrize(
    ("make", "name"), [(pipelines.sd, "StableDiffusion"), (pipelines.sdxl, "StableDiffusionXL")]
)
def test_ten_steps_are_the_published_ones(make: Any, name: str) -> None:
    pipe = sampled(make())
    found = dict(other_timesteps(pipe, WHOLE, 10))["Align Your Steps"]
    assert list(found) == AysSchedules[f"{name}Timesteps"]
    # The published noise levels are those of the published timesteps.
    at = levels(pipe)[[int(timestep) for timestep in found]]
    np.testing.assert_allclose(at, AysSchedules[f"{name}Sigmas"][:-1], rtol=0.05)


@pytest.mark.parametrize("make", [pipelines.sd, pipelines.sdxl])
@pytest.mark.parametrize("steps", [4, 5, 7, 20])
def test_other_numbers_of_steps_are_between_them(make: Any, steps: int) -> None:
    pipe = sampled(make())
    known = levels(pipe)
    found = align_your_steps(pipe, known, steps)
    assert found is not None
    assert len(found) == steps
    assert list(found) == sorted(set(found), reverse=True)
    assert found[0] == 999
    if steps in (5, 20):
        # Every second of one is a place of the other.
        ten = align_your_steps(pipe, known, 10)
        assert ten is not None
        few, many = (ten[::2], found) if steps == 5 else (ten, found[::2])
        np.testing.assert_allclose(many, few, atol=5)


def test_noise_levels_even_in_their_logarithm() -> None:
    known = levels(pipelines.sd())
    found = log_even(known, 981, 6)
    ratios = np.diff(np.log(known[[*map(int, found), 0]]))
    np.testing.assert_allclose(ratios, ratios.mean(), atol=0.05)
    assert found[0] == 981


@pytest.mark.parametrize(
    "changes", [{"beta_end": 0.02}, {"beta_schedule": "linear"}, {"num_train_timesteps": 500}]
)
def test_they_are_for_models_trained_as_these(changes: dict[str, Any]) -> None:
    found = dict(other_timesteps(sampled(pipelines.sd(), **changes), WHOLE, 10))
    assert set(found) == {
        "denser at the start (1.5)",
        "denser at the start (2)",
        "noise levels even in logarithm",
    }


@pytest.mark.parametrize("kind", [EulerDiscreteScheduler, DPMSolverMultistepScheduler])
def test_pipelines_run_over_them(kind: Any) -> None:
    pipe = sampled(pipelines.sd(), kind)
    found = dict(other_timesteps(pipe, WHOLE, 3))
    assert len(found) == 4
    for timesteps in found.values():
        pipelines.generate(pipe, num_inference_steps=3, timesteps=list(timesteps))
        assert pipe.scheduler.timesteps.tolist() == list(timesteps)


def test_there_are_none_where_the_sampler_takes_none() -> None:
    assert not dict(other_timesteps(sampled(pipelines.sd(), DDIMScheduler), WHOLE, 10))
    assert not dict(other_timesteps(sampled(pipelines.sd(), use_karras_sigmas=True), WHOLE, 10))
