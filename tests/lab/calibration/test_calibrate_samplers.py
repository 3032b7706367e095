"""Calibration with samplers and options of all kinds: each gives a plan, or a clear refusal."""

from __future__ import annotations

import threading
import warnings
from typing import Any

import numpy as np
import pipelines
import pytest
import torch
import transformer_pipelines
from any_pipelines import stable_audio
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
)
from rows import rows_of

import regrow
import regrow.lab.calibration.calibrate as calibrating
from regrow.fields import MOST_WEIGHT
from regrow.files import FileError
from regrow.lab.calibration.calibrate import Calibration, Costs, Settings, Wish, plan_for
from regrow.lab.calibration.influence import influence
from regrow.lab.calibration.proposals import Proposal
from regrow.lab.calibration.recording import record
from regrow.lab.calibration.search import FewerSteps
from regrow.recover.fit import fitted

PROMPTS = ("a", "b", "c", "d")
SIZE = {"height": 32, "width": 32}


def small() -> Any:
    return pipelines.sd(pipelines.one_level_unet())


def with_scheduler(kind: Any, **changes: Any) -> Any:
    pipe = small()
    pipe.scheduler = kind.from_config(pipe.scheduler.config, **changes)
    return pipe


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
        (DPMSolverMultistepScheduler, {}),
        (EulerAncestralDiscreteScheduler, {}),
        (PNDMScheduler, {"skip_prk_steps": True}),
        (HeunDiscreteScheduler, {}),
    ],
    ids=["karras", "dpm", "ancestral", "pndm", "heun"],
)
def test_a_plan_makes_as_few_calls_as_wished(kind: Any, changes: dict[str, Any]) -> None:
    pipe, calls = with_scheduler(kind, **changes), []
    plan = regrow.calibrate(pipe, PROMPTS, fewer_macs=2.0, steps=5, guidance=3.0, **SIZE)
    whole = len(pipe.scheduler.timesteps) if not plan.leaves_out else None
    with regrow.apply(pipe, plan) as run:
        pipe("e", num_inference_steps=plan.steps, guidance_scale=3.0, **SIZE, **plan.arguments())
        calls = rows_of(run)
    pipe.scheduler.set_timesteps(5)
    full = sum(call.depth == "full" for call in calls)
    assert full <= len(pipe.scheduler.timesteps) / 2 + 1, (plan.tried[0].name, whole)


def goes_through(monkeypatch: pytest.MonkeyPatch, pipe: Any, settings: Settings) -> Calibration:
    """A calibration by time whose forecasts are said to be near; one of them, and fewer steps, are run."""
    monkeypatch.setattr(calibrating, "ROUNDS", 1)
    monkeypatch.setattr(calibrating, "LONG", 4)
    found = Calibration(pipe, PROMPTS, settings)
    costs = found.timed()
    assert costs.rest >= 0
    assert 0 <= costs.output < 1
    with monkeypatch.context() as patched:
        near = lambda plan, prompts: np.full(prompts, 20.0 + 10 * isinstance(plan, Proposal))  # noqa: E731
        patched.setattr(found, "measure", near)
        answer = found.find(costs.rest + found.calls / 2, costs)
    fewer = [one.plan for one in answer.outcomes if isinstance(one.plan, FewerSteps)]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for plan in (answer.best.plan, fewer[-1]):
            assert np.isfinite(found.measure(plan, 1)).all()
    assert isinstance(answer.best.plan, Proposal)
    assert found.config(answer.best.plan).schedule.calls == found.recording.total
    return found


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("sdxl", {}),
        ("sdxl-img2img", {"steps": 8}),
        ("img2img", {"steps": 8, "batch": 3}),
        ("inpaint", {"guidance": 1.0, **SIZE}),
        ("sd1", {"height": 48, "width": 80}),
    ],
    ids=["sdxl", "sdxl-img2img", "img2img-batch", "inpaint-unguided", "not-square"],
)
def test_pipelines_of_all_kinds(
    monkeypatch: pytest.MonkeyPatch, kind: str, changes: dict[str, Any]
) -> None:
    more = dict(pipelines.KINDS[kind][1])
    for name in more.keys() & {"image", "mask_image"}:
        more[name] = more[name].resize((32, 32))
    size = {} if "image" in more else SIZE
    settings = Settings(**{"steps": 6, "guidance": 3.0, "more": more, **size, **changes})
    found = goes_through(monkeypatch, pipelines.make(kind), settings)
    assert found.recording.total == settings.steps
    assert found.recording.before == (3 if more.get("strength") == 0.7 else 0)


def test_sound(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = stable_audio()
    encoder, tokenizer = transformer_pipelines.t5()
    tokenizer.model_max_length = 5
    pipe.register_modules(text_encoder=encoder, tokenizer=tokenizer)
    goes_through(monkeypatch, pipe, Settings(steps=6, guidance=3.0, more={"audio_end_in_s": 4.0}))


def test_guidance_within_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(steps=6, guidance=3.0, height=32, width=48)
    found = goes_through(monkeypatch, transformer_pipelines.flux(), settings)
    assert found.answer is not None
    assert found.recording.deep


def test_a_single_call_is_refused() -> None:
    more = {**pipelines.KINDS["img2img"][1], "strength": 0.3}
    with pytest.raises(ValueError, match="steps: 4 is not allowed, it must be so many that"):
        regrow.calibrate(pipelines.make("img2img"), PROMPTS, fewer_macs=1.5, steps=4, more=more)


def test_noise_levels_on_another_device() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(4)
    scheduler.set_begin_index(0)
    found = influence(scheduler)
    assert found == pytest.approx((scheduler.sigmas[1:] - scheduler.sigmas[:-1]).numpy(), rel=1e-4)


def test_videos_by_time_and_by_macs() -> None:
    pipe = transformer_pipelines.wan_of_texts(layers=2)
    pipe.set_progress_bar_config(disable=True)
    found = Calibration(
        pipe, PROMPTS, Settings(steps=4, height=16, width=16, more={"num_frames": 5}, guidance=3.0)
    )
    plan = plan_for(found, Wish(fewer_macs=1.5))
    assert plan.instead_of == 4


@pytest.mark.parametrize("name", ["timesteps", "sigmas", "generator"])
def test_arguments_that_are_set_here_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"more: {name} is not allowed"):
        Settings(more={name: [1]})


def test_a_text_is_no_list_of_prompts() -> None:
    for run in (regrow.calibrate, record):
        with pytest.raises(ValueError, match="prompts: a text is not allowed"):
            run(pipelines.sd(), "a cat", steps=4, **({"speedup": 2.0} if run is regrow.calibrate else {}))


def test_a_speed_that_is_never_measured_is_refused() -> None:
    found = Calibration(small(), PROMPTS, Settings(steps=6, guidance=3.0, **SIZE))
    found.timed = lambda: Costs(0.0, 0.0, None)  # type: ignore[method-assign]
    found.speedup = lambda config: 1.0  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="speedup: 2 can't be reached, the fastest plan gave 1"):
        plan_for(found, Wish(speedup=2.0))


def test_recordings_in_two_threads_are_those_of_one() -> None:
    """Both schedulers are of one class, on which the watches are."""
    pipes = [small(), small()]
    alone = record(small(), PROMPTS[:2], steps=4, guidance=3.0, **SIZE)
    before, found = dict(vars(type(pipes[0].scheduler))), {}

    def run(i: int) -> None:
        found[i] = record(pipes[i], PROMPTS[:2], steps=4 + i, guidance=3.0, **SIZE)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert np.allclose(found[0].products, alone.products)
    assert len(found[1].influence) == 5
    assert dict(vars(type(pipes[0].scheduler))) == before


def test_a_recording_with_other_arguments_is_refused(tmp_path: Any) -> None:
    pipe, file = pipelines.sd(), tmp_path / "r.json"
    record(pipe, PROMPTS[:1], steps=4, file=file, more={"negative_prompt": ["x"]}, **SIZE)
    with pytest.raises(FileError, match="other prompts or arguments"):
        record(pipe, PROMPTS[:1], steps=4, file=file, more={"negative_prompt": ["y"]}, **SIZE)


def test_weights_stay_within_what_a_file_may_hold() -> None:
    t = np.linspace(0, 1, 50)
    values = np.stack([1 + 1e-2 * t, np.sin(t) * 1e-2, t**2])
    found = fitted(values.T @ values, [0, 1, 2])
    assert max(abs(w) for one in found.steps for w in one.weights) <= MOST_WEIGHT


def test_a_plan_of_fewer_steps_is_applied_without_a_word(recwarn: pytest.WarningsRecorder) -> None:
    pipe = with_scheduler(PNDMScheduler, skip_prk_steps=True)
    plan = regrow.methods.calibrated.Calibrated(steps=3, schedule=regrow.Schedule.constant(), instead_of=6)
    with regrow.apply(pipe, plan), torch.no_grad():
        pipelines.generate(pipe, num_inference_steps=plan.steps)
    assert not [w for w in recwarn if "regrow" in str(w.filename)]


def test_a_wish_of_quality_passes_over_speeds_that_are_out_of_reach(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of four calls no plan is 2x faster where only half of the calls' time is saved."""
    monkeypatch.setattr(calibrating, "LADDER", (5.0, 2.0, 1.25))
    found = Calibration(small(), PROMPTS, Settings(steps=4, guidance=3.0, **SIZE))
    found.timed = lambda: Costs(0.0, 0.0, None)  # type: ignore[method-assign]

    def speedup(config: Any) -> float:
        full = sum(step.full for step in config.schedule.resample(config.steps).steps())
        return 4 / (2 + full / 2)

    found.speedup = speedup  # type: ignore[method-assign]
    plan = plan_for(found, Wish(psnr=1.0))
    assert plan.speedup is not None
    assert 1.25 * 0.99 <= plan.speedup < 1.9
