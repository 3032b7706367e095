"""Calibration on small pipelines: what it answers, and what it leaves behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pipelines import one_level_unet, sd
from transformer_pipelines import dit

from regrow import apply, calibrate
from regrow.core.install import is_hooked
from regrow.lab.calibration.calibrate import Calibration, Costs, Settings, Wish, plan_for
from regrow.lab.calibration.search import FewerSteps, Plan
from regrow.methods.calibrated import Calibrated
from regrow.methods.catalogue import load_plan

STEPS = 8
SIZE = {"height": 32, "width": 32}
PROMPTS = ("a b", "c", "d e f", "g")
COSTS = Costs(rest=0.0, output=0.0, deep=None)


class Still(Calibration):
    """A calibration in which all calls cost the same on any machine."""

    def timed(self) -> Costs:
        return COSTS

    def speedup(self, config: Calibrated) -> float:
        full = sum(step.full for step in config.schedule.resample(config.steps).steps())
        return self.settings.steps / full


class Judged(Still):
    """One in which plans are as near as a table says, by the first word of their names that it knows."""

    def __init__(self, near: dict[str, float], *args: Any) -> None:
        super().__init__(*args)
        self._near = near

    def measure(self, plan: Plan, prompts: int) -> np.ndarray:
        kind = "steps" if isinstance(plan, FewerSteps) else "forecast"
        return np.full(prompts, self._near[kind]) + np.arange(prompts) / 10


def small() -> Any:
    return sd(one_level_unet())


def calibration(pipe: Any = None, kind: Any = Still, *first: Any) -> Any:
    return kind(*first, pipe or small(), PROMPTS, Settings(steps=STEPS, guidance=3.0, **SIZE))


@pytest.fixture(scope="module")
def twice() -> Any:
    """A calibration, and its plan that is twice as fast."""
    found = calibration()
    return found, plan_for(found, Wish(speedup=2.0))


@pytest.mark.parametrize(("pruning", "pays"), [(0.8, True), (0.95, False)])
def test_it_tries_deep_features_and_pruning_where_they_pay(pruning: float, pays: bool) -> None:
    found = calibration(None, Judged, {"steps": 30.0, "forecast": 30.1})
    found.timed = lambda: Costs(rest=0.0, output=0.0, deep=0.1, pruning=pruning)
    plan = plan_for(found, Wish(speedup=2.0))
    names = [one.name for one in plan.tried]
    assert any("50% of tokens pruned" in name for name in names) == pays
    # Of a budget of four calls three are full, since the other five cost half a call.
    assert any("3 of 8 computed" in name and "deep features of the others fitted" in name for name in names)
    assert any("deep features of the others on the line" in name for name in names)
    depths = [getattr(one.plan, "depth", 0) for one in found.answer.outcomes]
    assert depths.count(1) == 5
    fewer = [one.mean for one in found.answer.outcomes if isinstance(one.plan, FewerSteps)]
    assert found.answer.best.mean >= max(fewer)
    assert len(found.answer.best.psnr) == len(found.compared)


@pytest.mark.parametrize("speedup", [2.0, 4.0])
def test_it_is_as_fast_as_wished_and_never_farther_than_fewer_steps(twice: Any, speedup: float) -> None:
    plan = twice[1] if speedup == 2.0 else plan_for(calibration(), Wish(speedup=speedup))
    assert plan.speedup >= speedup
    fewer = [one for one in plan.tried if one.name.startswith(f"{int(STEPS / speedup)} steps")]
    assert fewer
    assert all(plan.tried[0].psnr >= one.psnr for one in fewer)
    assert plan.instead_of == STEPS
    assert plan.origin.denoiser.startswith("UNet2DConditionModel")


def test_fewer_steps_are_the_answer_where_they_are_nearest() -> None:
    plan = plan_for(calibration(None, Judged, {"steps": 30.0, "forecast": 20.0}), Wish(speedup=2.0))
    assert not plan.leaves_out
    assert plan.steps == STEPS // 2
    plan = plan_for(calibration(None, Judged, {"steps": 30.0, "forecast": 40.0}), Wish(speedup=2.0))
    assert plan.leaves_out
    assert plan.steps == STEPS


def test_equally_near_is_fewer_steps() -> None:
    plan = plan_for(calibration(None, Judged, {"steps": 30.0, "forecast": 30.0}), Wish(speedup=2.0))
    assert not plan.leaves_out


def test_what_it_says_of_a_plan_is_what_the_plan_gives(twice: Any) -> None:
    """The pictures of the file, made anew, are as near as the table says."""
    found, plan = twice
    again = calibration()
    count = plan.tried[0].prompts
    made = found.pictures[found.answer.best.plan][:count]
    fresh: list[Any] = []
    again._make("the plan", plan, fresh, count)
    for one, other in zip(made, fresh, strict=True):
        assert np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int)).max() <= 1


def test_its_file_is_a_plan(twice: Any, tmp_path: Path) -> None:
    (_, plan), file = twice, tmp_path / "plan.json"
    file.write_text(plan.dump())
    assert load_plan(file) == plan
    with apply(small(), str(file)) as run:
        assert run.config == plan


def test_pipelines_of_classes() -> None:
    found = Still(dit(num_layers=3), ("1", "2", "0", "1"), Settings(steps=STEPS, guidance=2.0))
    assert plan_for(found, Wish(speedup=2.0)).speedup >= 2


@pytest.mark.parametrize("when", ["recording", "comparing"])
def test_nothing_stays_on_the_pipeline_when_it_is_stopped(when: str) -> None:
    def stop(progress: Any) -> None:
        if progress.what.startswith("recording") == (when == "recording") and progress.done:
            raise KeyboardInterrupt

    pipe = small()
    before = dict(vars(type(pipe.scheduler)))
    with pytest.raises(KeyboardInterrupt):
        calibrate(pipe, PROMPTS, fewer_macs=2.0, steps=STEPS, guidance=3.0, on_progress=stop, **SIZE)
    assert dict(vars(type(pipe.scheduler))) == before
    assert not is_hooked(pipe.unet)


def test_a_wish_out_of_reach() -> None:
    with pytest.raises(ValueError, match="5 can't be reached, it must be <= 4"):
        plan_for(calibration(), Wish(speedup=5.0))


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        ({}, "one of them must be given"),
        ({"speedup": 2.0, "psnr": 30.0}, "only one"),
        ({"speedup": 1.0}, "speedup: 1.0 is not allowed, it must be > 1"),
        ({"psnr": 0.0}, "psnr: 0.0 is not allowed, it must be > 0"),
    ],
)
def test_wishes_that_cannot_be(wish: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        calibrate(sd(), PROMPTS, steps=STEPS, **wish)


def test_too_few_prompts() -> None:
    with pytest.raises(ValueError, match="prompts: 3 is not allowed, it must be >= 4"):
        calibrate(sd(), PROMPTS[:3], speedup=2.0)
