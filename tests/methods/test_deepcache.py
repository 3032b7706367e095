"""DeepCache: which calls are full, and that cached ones are those of its branch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pipelines
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from rows import rows_of

import regrow
from regrow import ATEDM, FULL, Combined, DeepCache, SiTo, ToMeSD
from regrow.core.recipe import recipe_of
from regrow.methods.deepcache import full_calls


def depths(config: Any, calls: int) -> list[int]:
    return list(recipe_of(config).plan.resample(calls).depth)


@given(interval=st.integers(1, 12), calls=st.integers(1, 60), branch=st.integers(0, 3))
def test_every_nth_call_is_full_and_the_others_compute_the_branch(
    interval: int, calls: int, branch: int
) -> None:
    expected = [FULL if i % interval == 0 else branch + 1 for i in range(calls)]
    assert depths(DeepCache(interval=interval, branch=branch), calls) == expected


uneven = given(
    interval=st.integers(1, 10),
    calls=st.integers(1, 100),
    center=st.floats(0.05, 0.95),
    power=st.floats(1, 2),
)


def points(interval: int, calls: int, center: float, power: float) -> Any:
    """The points of the formula before they are rounded, without the end of the run."""
    c, count = center * calls, -(-calls // interval)
    ends = [np.sign(e) * np.abs(e) ** (1 / power) for e in (-c, calls - c)]
    line = np.linspace(*ends, count + 1)[:-1]
    return np.sign(line) * np.abs(line) ** power + c


@uneven
def test_the_full_calls_of_an_uneven_schedule_are_those_of_the_formula(
    interval: int, calls: int, center: float, power: float
) -> None:
    count, formula = -(-calls // interval), points(interval, calls, center, power)
    found = sorted(full_calls(DeepCache(interval=interval, center=center, power=power), calls))
    assert found[0] == 0
    assert found[-1] < calls
    assert len(found) <= count
    # Rounding may put a point on the other side of a whole number.
    assert all(np.abs(formula - i).min() < 1 + 1e-6 for i in found)
    even = {int(i * calls / count + 1e-9) for i in range(count)}
    straight = full_calls(DeepCache(interval=interval, center=center, power=1), calls)
    assert all(min(abs(i - j) for j in even) <= 1 for i in straight)


@uneven
def test_the_points_of_an_uneven_schedule_are_rounded_down(
    interval: int, calls: int, center: float, power: float
) -> None:
    formula = points(interval, calls, center, power)
    found = full_calls(DeepCache(interval=interval, center=center, power=power), calls)
    # Beside a whole number either side is right.
    below, above = (np.maximum(formula + e, 0).astype(int).tolist() for e in (-1e-6, 1e-6))
    assert found <= {*below, *above}
    assert all({a, b} & found for a, b in zip(below, above, strict=True))


def test_uneven_full_calls_are_closest_together_at_the_center() -> None:
    found = sorted(full_calls(DeepCache(interval=5, center=0.3, power=1.4), 50))
    gaps = np.diff([*found, 50])
    assert len(found) == 10
    assert gaps[np.abs(np.array(found) - 15).argmin()] < gaps[-1]
    assert gaps[np.abs(np.array(found) - 15).argmin()] < gaps[0]


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_it_is_the_schedule_of_the_same_depths(kind: str) -> None:
    pipe = pipelines.make(kind)
    schedule = regrow.Schedule(depth=(FULL, 2, 2, FULL), ratio=(0.0,) * 4)
    with regrow.apply(pipe, regrow.DaTo(schedule=schedule)):
        expected = pipelines.generate(pipe, kind=kind)
    with regrow.apply(pipe, DeepCache(interval=3, branch=1)) as run:
        assert torch.equal(pipelines.generate(pipe, kind=kind), expected)
    assert [c.depth for c in rows_of(run)] == ["full", "2", "2", "full"]


def test_interval_one_changes_nothing_and_says_so(pipe: Any) -> None:
    expected = pipelines.generate(pipe)
    with pytest.warns(UserWarning, match="prunes nothing and reuses nothing"):
        run = regrow.apply(pipe, DeepCache(interval=1))
    assert torch.equal(pipelines.generate(pipe), expected)
    run.remove()


@pytest.mark.parametrize("tokens", [SiTo(ratio=0.5), ToMeSD(ratio=0.5), ATEDM(ratio=0.5, early=0)])
@pytest.mark.parametrize(
    ("caching", "depth"),
    [
        (DeepCache(interval=2), "1"),
        (regrow.Schedule.every(2, 10), "1"),
        (regrow.FORA(interval=2), "layers"),
    ],
)
def test_any_token_method_goes_with_any_plan(pipe: Any, caching: Any, depth: str, tokens: Any) -> None:
    config = Combined(caching=caching, tokens=tokens)
    assert Combined.model_validate_json(config.model_dump_json()) == config
    with regrow.apply(pipe, tokens):
        only_tokens = pipelines.generate(pipe)
    with regrow.apply(pipe, config) as run:
        both = pipelines.generate(pipe)
    calls = run.report().calls
    assert [c.depth for c in calls] == ["full", depth, "full", depth]
    # Where all layers hand on their output, none chooses tokens.
    assert all((c.ratio == 0.5) == (c.depth != "layers") for c in calls)
    assert all((c.selection_macs > 0) == (c.ratio > 0) for c in calls)
    assert both.isfinite().all()
    assert not torch.equal(both, only_tokens)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"interval": 0}, "interval"),
        ({"branch": -1}, "branch"),
        ({"center": 0.0}, "center"),
        ({"center": 1.0}, "center"),
        ({"power": 0.5}, "power"),
        ({"power": float("nan")}, "power"),
        ({"power": 1.2}, "power: 1.2 is not allowed without center"),
        ({"every": 3}, "every"),
    ],
)
def test_wrong_fields_are_named(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        DeepCache(**fields)


def test_interval_1_makes_every_call_full_also_when_spread_unevenly() -> None:
    plan = recipe_of(DeepCache(interval=1, center=0.3)).plan.resample(50)
    assert set(plan.depth) == {FULL}
