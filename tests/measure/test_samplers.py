"""Schedulers by name."""

from __future__ import annotations

import pipelines
import pytest
import transformer_pipelines
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from regrow.measure.samplers import Sampler


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
    with pytest.raises(ValueError, match="a setting of DDIMScheduler: num_train_timesteps"):
        Sampler.parse(f"DDIM:{option},clip_sample=false")


def test_schedulers_of_another_kind_are_refused_and_nothing_changes() -> None:
    pipeline = transformer_pipelines.sd3()
    with pytest.raises(ValueError, match="it must be one of FlowMatchEulerDiscreteScheduler"):
        Sampler.parse("DDIM").put_into(pipeline)
    assert isinstance(pipeline.scheduler, FlowMatchEulerDiscreteScheduler)
