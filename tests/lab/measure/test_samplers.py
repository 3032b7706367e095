"""Schedulers by name."""

from __future__ import annotations

from importlib.util import find_spec

import pipelines
import pytest
import transformer_pipelines
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from regrow.lab.measure.samplers import Sampler


def test_settings_are_those_of_the_pipeline_but_for_the_ones_given() -> None:
    pipeline = pipelines.sd()
    before = pipeline.scheduler.config
    Sampler.parse("DPMSolverMultistep:use_karras_sigmas=true,solver_order=3").put_into(pipeline)
    after = pipeline.scheduler
    assert isinstance(after, DPMSolverMultistepScheduler)
    assert after.config.use_karras_sigmas is True
    assert after.config.solver_order == 3
    assert after.config.beta_end == before.beta_end
    assert after.config.prediction_type == before.prediction_type


def test_the_whole_name_is_allowed() -> None:
    assert Sampler.parse("DDIMScheduler").kind is DDIMScheduler
    assert Sampler.parse("DDIM").kind is DDIMScheduler


@pytest.mark.parametrize("text", ["", "Nothing", "UNet2DConditionModel", "DDIMPipeline", "Scheduler:a=1"])
def test_what_is_no_scheduler_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"scheduler: .* it must be a class of diffusers"):
        Sampler.parse(text)


@pytest.mark.parametrize("option", ["eta=1", "clip_sample", "=1", "self=1", ""])
def test_settings_that_would_do_nothing_are_refused(option: str) -> None:
    with pytest.raises(ValueError, match="a setting of DDIMScheduler, each once: num_train_timesteps"):
        Sampler.parse(f"DDIM:{option},clip_sample=false")


@pytest.mark.parametrize(
    ("option", "allowed"),
    [
        ("beta_start=much", "beta_start must be a number"),
        ("beta_start=NaN", "beta_start must be a number"),
        ("num_train_timesteps=true", "num_train_timesteps must be a whole number"),
        ("steps_offset=0.5", "steps_offset must be a whole number"),
        ("clip_sample=maybe", "clip_sample must be true or false"),
        ("clip_sample=1", "clip_sample must be true or false"),
        ("clip_sample=", "clip_sample must be true or false"),
        ("clip_sample=true,clip_sample=true", "each once"),
    ],
)
def test_values_of_another_kind_are_refused(option: str, allowed: str) -> None:
    with pytest.raises(ValueError, match=allowed):
        Sampler.parse(f"DDIM:{option}")


def test_numbers_are_numbers() -> None:
    assert Sampler.parse("DDIM:beta_start=1e-4,num_train_timesteps=10").options == {
        "beta_start": 1e-4,
        "num_train_timesteps": 10,
    }


@pytest.mark.parametrize(
    "option", ["beta_schedule=nonsense", "timestep_spacing=nonsense", "num_train_timesteps=-1"]
)
def test_what_the_scheduler_itself_refuses_is_said(option: str) -> None:
    pipe = pipelines.sd()
    before = pipe.scheduler
    with pytest.raises(ValueError, match=r"scheduler: DDIMScheduler with \{"):
        Sampler.parse(f"DDIM:{option}").put_into(pipe)
    assert pipe.scheduler is before


def test_a_missing_package_is_named() -> None:
    if find_spec("torchsde") is not None:
        pytest.skip("torchsde is installed")
    with pytest.raises(ImportError, match="torchsde"):
        Sampler.parse("DPMSolverSDE")
    with pytest.raises(ValueError, match="must be one of") as refused:
        Sampler.parse("FlowMatchEulerDiscrete").put_into(pipelines.sd())
    assert "DPMSolverSDE" not in str(refused.value)


def test_schedulers_of_another_kind_are_refused_and_nothing_changes() -> None:
    pipeline = transformer_pipelines.sd3()
    with pytest.raises(ValueError, match="it must be one of FlowMatchEulerDiscreteScheduler"):
        Sampler.parse("DDIM").put_into(pipeline)
    assert isinstance(pipeline.scheduler, FlowMatchEulerDiscreteScheduler)
