"""A calibrated plan in a run that it was not made for is warned of, once."""

from __future__ import annotations

import warnings
from typing import Any

import pipelines
import pytest
from diffusers import EulerDiscreteScheduler, HeunDiscreteScheduler

import regrow
from regrow import Schedule, Taylor
from regrow.methods.calibrated import Calibrated
from regrow.schedule import FULL

TIMES = (999.0, 700.0, 400.0, 100.0)
FEWER = Calibrated(steps=4, timesteps=TIMES, schedule=Schedule.constant(), instead_of=8)
FORECAST = Calibrated(
    steps=6,
    schedule=Schedule(depth=(FULL, FULL, 0, FULL, 0, 0), ratio=(0.0,) * 6, recovery=(Taylor(order=1),)),
    instead_of=6,
)


def heard(plan: Any, pipe: Any, runs: int = 2, **arguments: Any) -> list[str]:
    """What is warned of in some runs of a plan."""
    with warnings.catch_warnings(record=True) as seen, regrow.apply(pipe, plan):
        warnings.simplefilter("always")
        for _ in range(runs):
            pipelines.generate(pipe, **arguments)
    return [str(w.message) for w in seen if w.category is UserWarning]


def euler(kind: Any = EulerDiscreteScheduler) -> Any:
    return pipelines.sd(sampler=pipelines.scheduler(kind))


@pytest.mark.parametrize("kind", [EulerDiscreteScheduler, HeunDiscreteScheduler])
def test_its_own_timesteps_that_are_not_given_are_missed(kind: Any) -> None:
    (message,) = heard(FEWER, euler(kind), num_inference_steps=4)
    assert "timesteps 999, 700, 400 ... 100 (4 of them); this run has 999, 666, 333 ... 0 (4" in message
    assert "plan.arguments()" in message
    assert not heard(FEWER, euler(kind), num_inference_steps=4, **FEWER.arguments())


def test_another_number_of_steps() -> None:
    (message,) = heard(FORECAST, pipelines.sd(), num_inference_steps=4)
    said = "made for 6 steps, 6 calls; this run has 4 steps, 4 calls; call pipe(..., num_inference_steps=6)"
    assert said in message
    assert not heard(FORECAST, pipelines.sd(), num_inference_steps=6)
    fewer = FEWER.model_copy(update={"timesteps": None})
    (message,) = heard(fewer, pipelines.sd(), num_inference_steps=5)
    assert "made for 4 steps; this run has 5 steps, 5 calls" in message
    assert not heard(fewer, pipelines.sd(), num_inference_steps=4)


def test_another_number_of_calls() -> None:
    (message,) = heard(FORECAST, euler(HeunDiscreteScheduler), num_inference_steps=6)
    assert "made for 6 steps, 6 calls; this run has 6 steps, 11 calls" in message
    assert "num_inference_steps" not in message


def test_a_run_that_begins_elsewhere() -> None:
    pipe, more = pipelines.make("img2img"), {"kind": "img2img", "num_inference_steps": 6}
    (message,) = heard(FORECAST, pipe, **more)
    assert "made for runs of the last 6 of 6 calls; this run makes the last 4" in message
    assert not heard(FORECAST.model_copy(update={"before": 2}), pipelines.make("img2img"), **more)
