"""MACs of Stable Diffusion 1.5 against figures counted from its configuration."""

from __future__ import annotations

import warnings
from typing import Any

import pipelines
import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

import regrow
from regrow import FULL, DaTo, Schedule
from regrow.core.macs import CallCounter
from regrow.core.recipe import recipe_of

RULE = recipe_of(DaTo(schedule=Schedule.constant(0.5))).sites


@pytest.fixture(scope="module")
def sd15() -> UNet2DConditionModel:
    """Stable Diffusion 1.5's U-Net without weights."""
    with torch.device("meta"):
        return UNet2DConditionModel(
            sample_size=64,
            block_out_channels=(320, 640, 1280, 1280),
            layers_per_block=2,
            cross_attention_dim=768,
            attention_head_dim=8,
        ).eval()


@pytest.fixture(scope="module")
def count(sd15: UNet2DConditionModel) -> Any:
    counter = CallCounter(sd15, RULE)

    def gmacs(depth: int, ratio: float, batch: int = 1) -> float:
        inputs = {
            "sample": torch.empty(batch, 4, 64, 64, device="meta"),
            "timestep": torch.empty((), device="meta"),
            "encoder_hidden_states": torch.empty(batch, 77, 768, device="meta"),
        }
        return counter.count(depth, ratio, ((), inputs)).denoiser / 1e9

    return gmacs


@pytest.mark.parametrize(
    ("depth", "ratio", "expected"),
    [
        (FULL, 0.0, 401.64),
        (1, 0.0, 31.63),
        (1, 0.3, 25.65),
        (1, 0.4, 24.08),
        (1, 0.5, 22.73),
        (1, 0.6, 21.60),
        (1, 0.7, 20.68),
        (FULL, 0.5, 357.2),
    ],
)
def test_calls_of_stable_diffusion_cost_what_the_papers_count(
    count: Any, depth: int, ratio: float, expected: float
) -> None:
    assert count(depth, ratio) == pytest.approx(expected, rel=1e-3)


def test_a_pair_of_guided_samples_costs_twice_as_much(count: Any) -> None:
    assert count(1, 0.5, batch=2) == pytest.approx(2 * count(1, 0.5), rel=1e-3)


def test_reusing_the_output_costs_next_to_nothing(count: Any) -> None:
    assert count(0, 0.5) < 0.01


def test_every_depth_costs_more_than_the_one_before(count: Any) -> None:
    costs = [count(depth, 0.0) for depth in (0, 1, 4, 11, 12)]
    assert costs == sorted(set(costs))
    assert costs[-1] == pytest.approx(401.64, rel=1e-3)


@pytest.mark.parametrize(("ratio", "expected"), [(0.0, 5.61), (0.5, 6.73)])
def test_b1_saves_what_its_plan_promises(count: Any, ratio: float, expected: float) -> None:
    plan = Schedule.bundled("dato-b1").with_ratio(ratio).resample(50)
    total = sum(count(step.depth, step.ratio) for step in plan.steps())
    assert 50 * count(FULL, 0.0) / total == pytest.approx(expected, rel=2e-3)


def test_selection_is_counted_apart_and_is_small(sd15: UNet2DConditionModel) -> None:
    inputs = {
        "sample": torch.empty(1, 4, 64, 64, device="meta"),
        "timestep": torch.empty((), device="meta"),
        "encoder_hidden_states": torch.empty(1, 77, 768, device="meta"),
    }
    macs = CallCounter(sd15, RULE).count(1, 0.5, ((), inputs))
    # 3,072 tokens against 1,024 base tokens of 320 channels.
    assert macs.selection == pytest.approx(3072 * 1024 * 320, rel=0.05)
    assert macs.selection < 0.05 * macs.denoiser


def test_the_report_counts_what_the_calls_compute(pipe: Any) -> None:
    """The report's MACs of a run without pruning are those counted while the same calls run."""
    counted = []
    config = DaTo(schedule=Schedule(depth=(FULL, 1, 2, FULL), ratio=(0.0,) * 4))
    inputs = [pipelines.unet_inputs(pipe.unet, seed=s) for s in range(4)]
    model = pipe.unet.to("meta")
    with regrow.apply(model, config) as run, run.generation(4) as clock, torch.no_grad():
        for one in inputs:
            one = {k: v.to("meta") for k, v in one.items()}
            with FlopCounterMode(display=False) as counter:
                model(**one)
            counted.append(counter.get_total_flops() // 2)
            clock.step()
        report = run.report()
    assert [c.macs for c in report.calls] == counted
    assert [c.full_macs for c in report.calls] == [counted[0]] * 4


def test_counting_leaves_the_model_alone(pipe: Any) -> None:
    expected = pipelines.generate(pipe)
    with regrow.apply(pipe, DaTo.preset("b1")) as run:
        first = pipelines.generate(pipe)
        report = run.report()
        assert report.full_macs > report.macs > 0
        assert torch.equal(pipelines.generate(pipe), first)
    assert torch.equal(pipelines.generate(pipe), expected)


@pytest.mark.parametrize("kind", ["sd2", "sdxl", "img2img", "inpaint-nine-channels"])
def test_every_pipelines_generation_can_be_reported(kind: str) -> None:
    pipe = pipelines.make(kind)
    config = DaTo(schedule=Schedule.every(2, 4, ratio=0.5))
    with regrow.apply(pipe, config) as run:
        pipelines.generate(pipe, kind=kind)
        report = run.report()
    assert 0 < report.macs < report.full_macs
    assert report.selection_macs > 0
    assert "fewer" in str(report)


@pytest.mark.parametrize(("kind", "dtype"), [("sd1", torch.float16), ("sdxl", torch.bfloat16)])
def test_half_precision_is_reported_as_full_precision_is(kind: str, dtype: torch.dtype) -> None:
    config = regrow.DaTo(schedule=regrow.Schedule.every(2, 4, ratio=0.5))
    reports = []
    for kept in (torch.float32, dtype):
        pipe = pipelines.make(kind).to(kept)
        with regrow.apply(pipe, config) as run:
            assert pipelines.generate(pipe, kind=kind).dtype == kept
        reports.append(run.report())
    assert reports[0].calls == reports[1].calls


def test_calls_that_compute_no_layer_to_prune_say_so() -> None:
    """SDXL has no attention in its last up block, which is all that depth 1 computes."""
    pipe = pipelines.make("sdxl")
    schedule = regrow.Schedule(depth=(FULL, 1, FULL, 1), ratio=(0.0, 0.5, 0.5, 0.5))
    said = r"pruned in 1 of 4 calls: those of depth 1 compute no layer .*; use a deeper branch \(depth 3 in"
    with (
        pytest.warns(UserWarning, match=said),
        regrow.apply(pipe, regrow.DaTo(schedule=schedule)) as run,
    ):
        pipelines.generate(pipe, kind="sdxl")
    assert [c.ratio for c in run.report().calls] == [0.0, 0.0, 0.5, 0.0]
    never = regrow.Schedule(depth=(FULL, 1), ratio=(0.0, 0.5))
    with pytest.warns(UserWarning, match="pruned in 0 of 2 calls"):
        regrow.apply(pipe, regrow.DaTo(schedule=never)).remove()
    both = regrow.Combined(caching=regrow.DeepCache(), tokens=regrow.SiTo(ratio=0.5))
    with pytest.warns(UserWarning, match="pruned in calls of depth 3 or more only"):
        regrow.apply(pipe, both).remove()


@pytest.mark.parametrize(
    ("make", "config"),
    [
        ("sdxl", regrow.DaTo(schedule=regrow.Schedule(depth=(FULL, 3), ratio=(0.5, 0.5)))),
        ("sdxl", regrow.Combined(caching=regrow.DeepCache(branch=2), tokens=regrow.SiTo(ratio=0.5))),
        ("sdxl", regrow.Combined(caching=regrow.FORA(), tokens=regrow.SiTo(ratio=0.5))),
        ("sd1", regrow.DaTo.preset("b1")),
    ],
)
def test_plans_whose_calls_all_prune_where_they_should_are_not_warned_of(make: str, config: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        regrow.apply(pipelines.make(make), config).remove()
