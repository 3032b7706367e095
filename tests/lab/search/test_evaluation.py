"""Plans measured on a real pipeline."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pipelines
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
)

import regrow
from regrow import DaTo, DeepCache
from regrow.core.install import is_hooked
from regrow.lab.measure.evaluate import Setting
from regrow.lab.measure.images import psnr
from regrow.lab.measure.macs import PlanCounter
from regrow.lab.measure.sampling import make
from regrow.lab.search.evaluation import Candidate, Evaluator, Job
from regrow.lab.search.objectives import Cost, Objective, Quality
from regrow.schedule import FULL, Schedule

PROMPTS = ("a penguin", "a pizza", "an owl")
CACHED = Candidate(6, DeepCache(interval=3))


def small() -> Any:
    return pipelines.sd(pipelines.one_level_unet())


def evaluator(folder: Path, *objectives: Objective, shard: int = 16) -> Evaluator:
    setting = Setting(model="small", prompts=PROMPTS, guidance=5.0, shard=shard)
    return Evaluator(small, setting, 6, objectives or (Quality.DEVIATION, Cost.MACS), folder)


def latents(candidate: Candidate, start: int, stop: int) -> torch.Tensor:
    """The last latents by the pipeline itself."""
    pipe = small()
    options = {
        "prompt": list(PROMPTS[start:stop]),
        "num_inference_steps": candidate.steps,
        "guidance_scale": 5.0,
        "output_type": "latent",
        "generator": [torch.Generator().manual_seed(i) for i in range(start, stop)],
    }
    if candidate.config is None:
        return pipe(**options).images
    with regrow.apply(pipe, candidate.config):
        return pipe(**options).images


def test_unaccelerated_run_deviates_by_nothing(tmp_path: Path) -> None:
    outcome = evaluator(tmp_path)(Job(Candidate(6, None), 0, 3))
    assert outcome.quality == {"deviation": (0.0, 0.0, 0.0)}
    assert outcome.curve == (0.0,) * 4


@pytest.mark.parametrize("candidate", [CACHED, Candidate(4, None), Candidate(3, DeepCache(interval=2))])
def test_deviation_is_that_of_the_last_latents(tmp_path: Path, candidate: Candidate) -> None:
    found = evaluator(tmp_path)(Job(candidate, 1, 3))
    difference = latents(candidate, 1, 3) - latents(Candidate(6, None), 1, 3)
    expected = difference.abs().mean((1, 2, 3)).tolist()
    assert found.quality["deviation"] == pytest.approx(expected, rel=1e-5)
    assert found.curve[-1] == pytest.approx(sum(expected) / 2, rel=1e-5)
    assert len(found.curve) == 4


def test_prompts_have_their_own_seeds_however_they_are_batched(tmp_path: Path) -> None:
    whole = evaluator(tmp_path / "one")(Job(CACHED, 0, 3)).quality["deviation"]
    parts = [evaluator(tmp_path / "two")(Job(CACHED, i, i + 1)).quality["deviation"][0] for i in range(3)]
    chunked = evaluator(tmp_path / "three", shard=2)(Job(CACHED, 0, 3)).quality["deviation"]
    assert parts == pytest.approx(whole, rel=1e-3)
    assert chunked == pytest.approx(whole, rel=1e-3)
    assert len(set(whole)) == 3


def test_unaccelerated_runs_are_made_once(tmp_path: Path) -> None:
    one = evaluator(tmp_path)
    first = one(Job(CACHED, 0, 2))
    files = {f: f.stat().st_mtime_ns for f in tmp_path.iterdir()}
    again = evaluator(tmp_path)(Job(CACHED, 0, 2))
    assert {f: f.stat().st_mtime_ns for f in tmp_path.iterdir()} == files
    assert again.quality == first.quality
    # Neither those of a model that was trained further,
    later = evaluator(tmp_path)
    later.setting = replace(later.setting, model_key="later")
    later(Job(CACHED, 0, 2))
    assert {f: f.stat().st_mtime_ns for f in tmp_path.iterdir()} != files
    # or of other settings, are taken for them.
    other = evaluator(tmp_path)
    other.setting = Setting(model="small", prompts=PROMPTS, guidance=1.0)
    assert other(Job(Candidate(6, None), 0, 2)).quality["deviation"] == (0.0, 0.0)


def test_hopeless_plan_is_given_up_and_leaves_nothing_behind(tmp_path: Path) -> None:
    one = evaluator(tmp_path)
    curve = one(Job(CACHED, 0, 2)).curve
    assert one(Job(CACHED, 0, 2, tuple(2 * c for c in curve))).curve == curve
    limits = (curve[0] * 2, curve[1] / 2, curve[2], curve[3])
    given_up = one(Job(CACHED, 0, 2, limits))
    assert given_up.quality == {}
    assert given_up.curve == curve[:2]
    assert not is_hooked(one.pipeline.unet)
    assert "step" not in vars(one.pipeline.scheduler)
    assert one(Job(CACHED, 0, 2)).curve == curve


def fail_always() -> None:
    raise RuntimeError("the device is gone")


def test_what_a_plan_raises_is_its_outcome_and_leaves_nothing_behind(tmp_path: Path) -> None:
    one = evaluator(tmp_path)
    whole = one(Job(CACHED, 0, 2))

    def fail(module: Any, args: Any, output: Any) -> None:
        if is_hooked(module):
            raise torch.OutOfMemoryError("no memory for it")

    hook = one.pipeline.unet.register_forward_hook(fail)
    failed = one(Job(CACHED, 0, 2))
    assert failed.error == "OutOfMemoryError: no memory for it"
    assert failed.quality == {}
    assert not is_hooked(one.pipeline.unet)
    hook.remove()
    assert one(Job(CACHED, 0, 2)).quality == whole.quality
    # What fails without the plan as well is no fault of the plan.
    hook = one.pipeline.unet.register_forward_hook(lambda *_: fail_always())
    with pytest.raises(RuntimeError, match="device is gone"):
        one(Job(CACHED, 0, 2))


def test_figures_of_pictures(tmp_path: Path) -> None:
    one = evaluator(tmp_path, Quality.PSNR, Quality.FEATURES, Quality.DEVIATION, Cost.MACS)
    found = one(Job(CACHED, 0, 2)).quality
    plain = make(one.pipeline, PROMPTS[:2], steps=6, guidance=5.0).images
    with regrow.apply(one.pipeline, CACHED.config):
        own = make(one.pipeline, PROMPTS[:2], steps=6, guidance=5.0).images
    expected = [psnr(a, b) for a, b in zip(own, plain, strict=True)]
    assert found["psnr"] == pytest.approx(expected, rel=1e-6)
    assert all(0 < d < 1 for d in found["features"])
    same = one(Job(Candidate(6, None), 0, 2)).quality
    assert same["psnr"] == (100.0, 100.0)
    assert same["features"] == pytest.approx((0, 0), abs=1e-6)


def test_distance_of_all_pictures_together_is_one_figure(tmp_path: Path) -> None:
    one = evaluator(tmp_path, Quality.FD, Cost.MACS)
    assert len(one(Job(CACHED, 0, 3)).quality["fd"]) == 1
    assert one(Job(Candidate(6, None), 0, 3)).quality["fd"][0] == pytest.approx(0, abs=1e-3)


def test_measured_costs_come_with_the_first_prompts(tmp_path: Path) -> None:
    one = evaluator(tmp_path, Quality.DEVIATION, Cost.LATENCY, Cost.MEMORY)
    cost = one(Job(CACHED, 0, 2)).cost
    assert set(cost) == {"latency", "memory"}
    assert cost["latency"] > 0
    assert one(Job(CACHED, 2, 3)).cost == {}


def test_facts_are_those_of_the_pipeline(tmp_path: Path) -> None:
    facts = evaluator(tmp_path).facts()
    assert facts.scheduler == "DDIMScheduler"
    assert facts.calls == 6
    ((args, _kwargs),) = facts.inputs
    assert args[0].shape == (2, 4, pipelines.LATENT, pipelines.LATENT)
    assert args[0].device.type == "meta"


def test_macs_of_plans_are_those_of_their_reports(tmp_path: Path) -> None:
    one = evaluator(tmp_path)
    counter = PlanCounter(one.pipeline.unet, one.facts().inputs[0])
    schedule = Schedule(depth=(FULL, 1, 0, FULL, 1, 0), ratio=(0.5, 0.3, 0.0, 0.0, 0.7, 0.0))
    for config in (DaTo(schedule=schedule), DeepCache(interval=2)):
        with regrow.apply(one.pipeline, config) as run:
            make(one.pipeline, PROMPTS[:1], steps=6, guidance=5.0)
        calls = [macs.denoiser for _, macs in counter.calls(config, 6)]
        assert calls == [row.macs for row in run.report().calls]
        assert [counter.full().denoiser] * 6 == [row.full_macs for row in run.report().calls]


class FromImage:
    """An image-to-image pipeline with its pictures, as one of text."""

    def __init__(self) -> None:
        self._pipeline = pipelines.sd(kind=StableDiffusionImg2ImgPipeline)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipeline, name)

    def __call__(self, prompt: list[str], **options: Any) -> Any:
        images = [pipelines.picture()] * len(prompt)
        return self._pipeline(prompt, image=images, strength=0.5, **options)


def test_image_to_image_begins_in_the_middle(tmp_path: Path) -> None:
    setting = Setting(model="small", prompts=PROMPTS, guidance=5.0)
    one = Evaluator(FromImage, setting, 8, (Quality.DEVIATION, Cost.MACS), tmp_path)
    assert one.facts().calls == 4
    assert one(Job(Candidate(8, None), 0, 2)).quality["deviation"] == (0.0, 0.0)
    for candidate in (Candidate(8, DeepCache(interval=2)), Candidate(4, None)):
        found = one(Job(candidate, 0, 2))
        assert found.quality["deviation"][0] > 0
        assert len(found.curve) == 4


@pytest.mark.parametrize(
    ("sampler", "changes", "expected"),
    [
        (DDIMScheduler, {}, {6: 6, 3: 3, 10: 10}),
        (PNDMScheduler, {"skip_prk_steps": True}, {6: 7, 3: 4, 10: 11}),
        (HeunDiscreteScheduler, {}, {6: 11, 3: 5, 10: 19}),
    ],
)
def test_calls_of_another_number_of_steps(
    tmp_path: Path, sampler: type, changes: dict[str, Any], expected: dict[int, int]
) -> None:
    opened = partial(pipelines.sd, sampler=pipelines.scheduler(sampler, **changes))
    setting = Setting(model="small", prompts=PROMPTS, guidance=5.0)
    facts = [
        Evaluator(opened, setting, n, (Quality.DEVIATION, Cost.MACS), tmp_path).facts() for n in expected
    ]
    assert [f.calls for f in facts] == [*expected.values()]
    assert {n: facts[0].calls_at(n) for n in expected} == expected


def test_runs_of_another_sampler_are_not_taken_for_the_own(tmp_path: Path) -> None:
    evaluator(tmp_path)(Job(CACHED, 0, 2))
    opened = partial(pipelines.sd, sampler=pipelines.scheduler(EulerDiscreteScheduler))
    setting = Setting(model="small", prompts=PROMPTS, guidance=5.0)
    other = Evaluator(opened, setting, 6, (Quality.DEVIATION, Cost.MACS), tmp_path)
    assert other(Job(Candidate(6, None), 0, 2)).quality["deviation"] == (0.0, 0.0)


def test_equal_plans_have_one_key_and_others_another() -> None:
    one, same = (Candidate(6, DaTo(schedule=Schedule.every(2, 6))) for _ in range(2))
    assert one.key == same.key
    others = [
        Candidate(5, one.config),
        Candidate(6, None),
        Candidate(6, DaTo(schedule=Schedule.every(3, 6))),
    ]
    assert len({one.key, *(o.key for o in others)}) == 4
