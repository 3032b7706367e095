"""Schedules say where they were found, and warn elsewhere."""

import json
import warnings
from pathlib import Path

import pipelines
import pytest
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler

import regrow
from regrow.methods.catalogue import load_plan
from regrow.origin import Origin, denoiser_key, scheduler_key, scheduler_settings
from regrow.schedule import FULL, Schedule, ScheduleError


def found(**changes: object) -> Schedule:
    """A schedule found on the small pipeline, for four calls."""
    fields = {
        "model": "small",
        "denoiser": denoiser_key(pipelines.unet()),
        "scheduler": "DDIMScheduler",
        "steps": 4,
        "calls": 4,
        "guidance": 5.0,
        "prompts": 8,
        "quality": {"deviation": 0.01},
        "cost": {"macs": 0.5},
    }
    return Schedule(depth=(FULL, 1, FULL, 1), ratio=(0.5,) * 4, origin=Origin(**(fields | changes)))


def said(plan: Schedule | regrow.SiTo, pipe: object, steps: int = 4) -> list[str]:
    """The warnings of a generation."""
    config = regrow.DaTo(schedule=plan) if isinstance(plan, Schedule) else plan
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with regrow.apply(pipe, config):
            pipelines.generate(pipe, num_inference_steps=steps)
    return [str(w.message) for w in caught if "found" in str(w.message)]


@pytest.mark.parametrize("name", ["plan.yaml", "plan.json"])
def test_origin_survives_the_file(tmp_path: Path, name: str) -> None:
    schedule = found()
    schedule.save(tmp_path / name)
    again = Schedule.load(tmp_path / name)
    assert again == schedule
    assert hash(again) == hash(schedule)


def test_schedules_that_were_not_found_do_not_speak_of_it() -> None:
    assert "origin" not in Schedule.constant().dump()


def test_origin_is_checked_like_all_else() -> None:
    text = found().dump(as_json=True).replace('"calls": 4', '"calls": 0')
    with pytest.raises(ScheduleError, match=r"origin\.calls"):
        Schedule.parse(text)


def test_at_home_nothing_is_said() -> None:
    assert said(found(), pipelines.sd()) == []


def test_another_denoiser_is_warned_of() -> None:
    (message,) = said(found(denoiser="UNet2DConditionModel:0", model="big"), pipelines.sd())
    assert "another denoiser, that of big" in message


def test_another_scheduler_is_warned_of() -> None:
    pipe = pipelines.sd(sampler=pipelines.scheduler(EulerDiscreteScheduler))
    (message,) = said(found(), pipe)
    assert "DDIMScheduler, not EulerDiscreteScheduler" in message


def test_another_number_of_calls_is_warned_of_once() -> None:
    pipe = pipelines.sd()
    (message,) = said(found(), pipe, steps=6)
    assert "found for 4 calls; this generation has 6" in message


def config_found(**changes: object) -> regrow.SiTo:
    """A configuration found on the small pipeline, for four calls."""
    return regrow.SiTo(ratio=0.5, origin=found(**changes).origin)


def test_a_configuration_says_where_it_was_found_in_its_file_and_nowhere_else(tmp_path: Path) -> None:
    config = config_found()
    assert "origin" not in config.model_dump()
    file = tmp_path / "plan.json"
    file.write_text(config.dump())
    assert load_plan(file) == config
    assert "origin" not in regrow.SiTo(ratio=0.5).dump()
    wrong = config.dump().replace('"calls": 4', '"calls": 0')
    file.write_text(wrong)
    with pytest.raises(ValueError, match=r"origin\.calls"):
        load_plan(file)


@pytest.mark.parametrize(
    ("changes", "steps", "warned"),
    [
        ({}, 4, []),
        ({"denoiser": "UNet2DConditionModel:0", "model": "big"}, 4, ["another denoiser, that of big"]),
        ({"scheduler": "EulerDiscreteScheduler"}, 4, ["EulerDiscreteScheduler, not DDIMScheduler"]),
        ({}, 6, ["found for 4 calls; this generation has 6"]),
    ],
)
def test_a_configuration_is_warned_of_elsewhere(
    changes: dict[str, object], steps: int, warned: list[str]
) -> None:
    heard = said(config_found(**changes), pipelines.sd(), steps)
    assert len(heard) == len(warned)
    assert all(words in message for words, message in zip(warned, heard, strict=True))


def test_other_settings_of_the_scheduler_are_warned_of() -> None:
    pipe = pipelines.sd(sampler=pipelines.scheduler(EulerDiscreteScheduler))
    there = {"scheduler": "EulerDiscreteScheduler", "scheduler_key": scheduler_key(pipe.scheduler)}
    assert said(found(**there), pipe) == []
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, use_karras_sigmas=True)
    (message,) = said(found(**there), pipe)
    assert "other settings of EulerDiscreteScheduler" in message


def test_settings_of_a_scheduler_are_plain_data_the_same_in_every_process() -> None:
    config = pipelines.sd().scheduler.config
    scheduler, other = (DPMSolverMultistepScheduler.from_config(config) for _ in range(2))
    # diffusers makes this list from a set.
    usual = scheduler.config["_use_default_values"]
    assert len(usual) > 1
    other.register_to_config(_use_default_values=usual[::-1])
    assert scheduler_key(other) == scheduler_key(scheduler)
    assert scheduler_settings(other) == scheduler_settings(scheduler)
    assert json.loads(json.dumps(scheduler_settings(scheduler), allow_nan=False)) == scheduler_settings(
        scheduler
    )
    changed = DPMSolverMultistepScheduler.from_config(config, use_karras_sigmas=True)
    assert scheduler_key(changed) != scheduler_key(scheduler)


def test_other_ratios_are_another_plan() -> None:
    assert found().with_ratio(0.3).origin is None


def test_weights_do_not_count_and_settings_do() -> None:
    assert denoiser_key(pipelines.unet(0)) == denoiser_key(pipelines.unet(1))
    assert denoiser_key(pipelines.unet()) != denoiser_key(pipelines.sd1_unet())
