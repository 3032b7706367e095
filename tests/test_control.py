"""Control by measured errors: its rules on numbers, and runs of it on series and on made-up errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regrow.control import GROWTH, SAFETY, ErrorControl, Measured, degree_of, reach, spread
from regrow.core.controlled import LAG, Controlled, Reading, largest
from regrow.core.store import Store
from regrow.methods.taylorseer import Differences
from regrow.recover.time import MOST_ORDER, Chebyshev, Fitted, FittedStep, Reuse, Taylor, TimeRecovery
from regrow.schedule import FULL, Step

ERRORS = st.one_of(st.floats(0, 1e6), st.sampled_from([0.0, 1e-320, 1e300, math.inf, math.nan]))


def skip(recovery: TimeRecovery) -> Step:
    return Step(0, 0.0, recovery)


def steps_of(
    control: ErrorControl, total: int, begin: int = 0, error: Callable[[int, int], float] | None = None
) -> list[bool]:
    """Whether each step of a run is full; ``error(step, distance)`` is measured at them, but the first."""
    controlled, full = Controlled(control, total, begin), list[int]()
    for index in range(begin, total):
        if controlled.step(index).depth == FULL:
            if full and error is not None:
                controlled.add(index, Reading(torch.tensor(error(index, index - full[-1]))))
            full.append(index)
    return [index in full for index in range(begin, total)]


def skipped_in_a_row(full: Sequence[bool]) -> int:
    runs = "".join("f" if one else "s" for one in full).split("f")
    return max(map(len, runs))


# Rules.


@given(
    distance=st.integers(1, 40),
    error=st.floats(1e-6, 1e3),
    bound=st.floats(1e-4, 1),
    degree=st.integers(0, 4),
    longest=st.integers(1, 60),
)
def test_a_reach_is_the_farthest_whose_error_is_below_the_bound(
    distance: int, error: float, bound: float, degree: int, longest: int
) -> None:
    found = reach(Measured(distance, error, degree), bound, longest)

    def within(steps: float) -> bool:
        far = steps / SAFETY / distance
        return steps <= longest and steps <= GROWTH * distance and error * far ** (degree + 1) <= bound

    assert found == 0 or within(found * (1 - 1e-9))
    assert not within((found + 1) * (1 + 1e-9))


@given(
    distance=st.integers(1, 40),
    errors=st.tuples(ERRORS, ERRORS),
    degree=st.integers(0, 4),
    longest=st.integers(1, 60),
    before=st.lists(st.tuples(st.integers(1, 9), st.floats(0, 10)), max_size=4),
    rest=st.integers(1, 60),
    left=st.integers(1, 60),
)
def test_a_larger_error_never_reaches_farther(
    distance: int,
    errors: tuple[float, float],
    degree: int,
    longest: int,
    before: list[tuple[int, float]],
    rest: int,
    left: int,
) -> None:
    small, large = sorted(math.inf if math.isnan(e) else e for e in errors)
    one, other = (Measured(distance, e, degree) for e in (small, large))
    assert reach(one, 0.05, longest) >= reach(other, 0.05, longest)
    known = [Measured(d, e, degree) for d, e in before]
    # Rounding of the mean may differ by a hair, which rounds a half up or down.
    assert spread([*known, one], rest, left) >= spread([*known, other], rest, left) - 1


def test_distances_within_a_budget_are_as_the_mean_density_to_the_newest() -> None:
    # Degree 1 and distance 4: an error of a quarter needs half as many full calls.
    even = [Measured(4, 0.16, 1), Measured(4, 0.16, 1)]
    assert spread(even, 30, 6) == 5
    assert spread([*even, Measured(4, 0.04, 1)], 30, 6) == round(5 * (2 + 0.5 * 1) / 3 / 0.5)
    assert spread([*even, Measured(4, 0.64, 1)], 30, 6) == round(5 * (2 + 2 * 1) / 3 / 2)
    # An error of nothing reaches to the end; what is no number reaches nowhere.
    assert spread([*even, Measured(1, 1e-9, 1)], 30, 6) == 30
    assert spread([*even, Measured(4, math.nan, 1)], 30, 6) == 1
    assert spread([], 30, 6) == 5
    # Errors of another degree do not count.
    assert spread([Measured(4, 100.0, 0), Measured(4, 0.16, 1)], 30, 6) == 5
    # Half the distance and half the root of the error: the same density.
    assert spread([*even, Measured(2, 0.04, 1)], 30, 6) == 5
    # Without any error the mean is as dense as the newest; beside some, no error is as thin as can be.
    assert spread([Measured(4, 0.0, 1)] * 2, 30, 6) == 5
    assert spread([*even, Measured(4, 0.0, 1)], 30, 6) == 30
    # The least distance is 1.
    assert spread([*even, Measured(4, 1e9, 1)], 6, 6) == 1
    assert spread([], 5, 20) == 1


def test_nothing_is_reached_under_no_bound_or_after_no_number() -> None:
    assert reach(Measured(3, 0.0, 1), 0.0, 9) == 0
    assert reach(Measured(3, math.nan, 1), 0.1, 9) == 0
    assert reach(Measured(3, math.inf, 1), 0.1, 9) == 0
    # Without an error it grows as far as it may.
    assert reach(Measured(3, 0.0, 1), 0.1, 9) == GROWTH * 3


@given(data=st.data(), order=st.integers(1, 4))
def test_the_degree_is_that_of_the_polynomials_that_are_continued(data: st.DataObject, order: int) -> None:
    times = sorted(data.draw(st.sets(st.integers(0, 60), min_size=1, max_size=7)))
    t = times[-1] + data.draw(st.integers(1, 12))
    fewer = min(order, len(times) - 1)
    assert degree_of(Taylor(order=order), times, t, 80) == fewer
    assert degree_of(Differences(order=order), times, t, 80) >= min(fewer, 1)
    assert degree_of(Differences(order=order), [0, 1, 2, 3, 4], 6, 80) == 1
    assert degree_of(Reuse(), times, t, 80) == 0
    assert len(times) == 1 or degree_of(Chebyshev(), times, t, 80) == 0


@pytest.mark.parametrize(
    ("order", "values", "t"),
    [(MOST_ORDER - 1, 9, 9), (MOST_ORDER, 10, 10), (4, 5, 60), (MOST_ORDER, 9, 20)],
)
def test_the_degree_of_high_orders_and_far_forecasts_is_their_own(order: int, values: int, t: int) -> None:
    """Weights of thousands, whose rounding is no error."""
    assert degree_of(Taylor(order=order), range(values), t, 80) == order


def test_a_step_has_the_largest_error_of_its_branches() -> None:
    assert largest([0.1, 0.3, 0.2]) == 0.3
    assert largest([0.1, math.nan]) == math.inf
    assert largest([math.nan, 0.1]) == math.inf


# Runs.


@given(
    total=st.integers(1, 60),
    begin=st.integers(0, 20),
    first=st.integers(1, 4),
    longest=st.integers(1, 9),
    bound=st.sampled_from([0.0, 1e-3, 0.1, 1.0]),
    recovery=st.sampled_from([Reuse(), Taylor(order=1), Taylor(order=2), Chebyshev()]),
    errors=st.lists(ERRORS, min_size=80, max_size=80),
)
def test_the_worst_case_under_a_bound_is_kept(
    total: int,
    begin: int,
    first: int,
    longest: int,
    bound: float,
    recovery: TimeRecovery,
    errors: list[float],
) -> None:
    control = ErrorControl(skip(recovery), bound=bound, longest=longest, first=first)
    full = steps_of(control, begin + total, begin, lambda step, distance: errors[step])
    assert all(full[:first])
    assert full[-1]
    assert skipped_in_a_row(full) <= longest
    assert bound > 0 or all(full)


@given(
    total=st.integers(2, 60),
    begin=st.integers(0, 20),
    first=st.integers(1, 4),
    longest=st.integers(1, 60),
    recovery=st.sampled_from([Reuse(), Taylor(order=1), Taylor(order=2)]),
    errors=st.lists(ERRORS, min_size=80, max_size=80),
    data=st.data(),
)
def test_a_budget_is_spent_exactly(
    total: int,
    begin: int,
    first: int,
    longest: int,
    recovery: TimeRecovery,
    errors: list[float],
    data: st.DataObject,
) -> None:
    budget = data.draw(st.integers(first + 1, max(total, first + 1)))
    control = ErrorControl(skip(recovery), budget=budget, longest=longest, first=first)
    late = max(first, 2) if begin and recovery != Reuse() else first
    if budget < min(late + math.ceil(max(total - late, 0) / (longest + 1)), total):
        with pytest.raises(ValueError, match=f"budget: {budget} is not allowed"):
            control.start(begin + total, begin)
        return
    full = steps_of(control, begin + total, begin, lambda step, distance: errors[step])
    assert sum(full) == min(budget, total)
    assert all(full[:first])
    assert full[-1]
    assert skipped_in_a_row(full) <= longest


@given(total=st.integers(4, 60), bad=st.integers(2, 58), bound=st.booleans(), nan=st.booleans())
def test_an_error_that_is_no_number_makes_the_next_call_full(
    total: int, bad: int, bound: bool, nan: bool
) -> None:
    control = ErrorControl(
        skip(Taylor()), bound=0.5 if bound else None, budget=None if bound else total // 2 + 2
    )
    value = math.nan if nan else math.inf
    full = steps_of(control, total, 0, lambda step, distance: value if step >= bad else 1e-3)
    known = next((step for step in range(bad, total) if full[step]), total)
    # Under a bound all further ones are; a budget has the last call in reserve.
    assert all(full[known + LAG :]) or not bound
    assert bound or known + LAG >= total or full[known + LAG] or sum(full[: known + LAG]) >= total // 2 + 1


def full_steps(control: ErrorControl, total: int, error: float) -> list[int]:
    return [index for index, one in enumerate(steps_of(control, total, 0, lambda *_: error)) if one]


def test_a_reach_grows_from_the_distance_that_was_measured() -> None:
    """Without errors each is twice the newest distance known; a reach of 2 is full again after 3."""
    control = ErrorControl(skip(Taylor()), bound=0.1, longest=60)
    assert full_steps(control, 40, 0.0) == [0, 1, 2, 5, 12, 27, 39]


def test_a_bound_of_1_may_be_kept() -> None:
    """Half of it reaches ``0.9 sqrt(2)`` times as far."""
    assert full_steps(ErrorControl(skip(Taylor()), bound=1.0), 12, 0.5) == [0, 1, 2, 4, 7, 11]


@pytest.mark.parametrize(
    ("total", "longest", "least"),
    # Of 2 and 10 others, and of 2 and 9.
    [(12, 3, 5), (12, 4, 4), (12, 9, 3), (11, 3, 5), (11, 2, 5)],
)
def test_the_least_budget_is_that_of_the_longest_distances(total: int, longest: int, least: int) -> None:
    control = ErrorControl(skip(Taylor()), budget=least, longest=longest)
    assert len(full_steps(control, total, 0.1)) == least
    with pytest.raises(ValueError, match=f"it must be >= {least}$"):
        replace(control, budget=least - 1).start(total)


def test_what_is_left_of_a_budget_just_lasts() -> None:
    plan = ErrorControl(skip(Taylor()), budget=3, longest=2, first=1).resample(6)
    assert [i for i, depth in enumerate(plan.depth) if depth == FULL] == [0, 2, 5]


def test_the_steps_of_a_control_are_full_ones_and_those_that_it_was_given() -> None:
    given_step, full = skip(Taylor()), Step(FULL, 0.0, Taylor())
    assert ErrorControl(given_step, bound=0.1).kinds() == {full, given_step}
    assert ErrorControl(given_step, bound=1.0).kinds() == {full, given_step}
    assert ErrorControl(given_step, budget=4).kinds() == {full, given_step}
    assert ErrorControl(given_step, bound=0.0).kinds() == {full}
    assert ErrorControl(given_step, bound=0.1).measured == given_step


def test_unless_told_otherwise_2_calls_are_full_and_at_most_6_in_a_row_are_not() -> None:
    control = ErrorControl(skip(Taylor()), budget=4)
    assert full_steps(control, 16, 0.0) == [0, 1, 8, 15]
    with pytest.raises(ValueError, match="must be >= 5"):
        control.start(17)


def test_errors_are_read_two_steps_behind_their_call() -> None:
    seen = list[tuple[int, ...]]()

    class Listening(ErrorControl):
        def next(self, state, index, errors):  # type: ignore[no-untyped-def]
            seen.append(tuple(errors))
            return super().next(state, index, errors)

    steps_of(Listening(skip(Taylor()), bound=1e-6), 6, 0, lambda step, distance: 1.0)
    # The first call has nothing to compare.
    assert seen == [(), (), (), (1,), (1, 2), (1, 2, 3)]


@pytest.mark.parametrize("order", [0, 1, 2])
def test_a_series_that_is_continued_exactly_is_skipped_up_to_the_longest(order: int) -> None:
    recovery: TimeRecovery = Taylor(order=order) if order else Reuse()
    control = ErrorControl(skip(recovery), bound=1e-4, longest=6, first=order + 1)
    total, store = 60, Store([recovery], 60)
    controlled, full = Controlled(control, total, 0), list[int]()
    for index in range(total):
        if controlled.step(index).depth == FULL:
            value = torch.tensor([1.0 + (order > 0) * 0.1 * index + (order > 1) * 0.01 * index**2] * 3)
            deviation = store.deviation("x", index, recovery, value.double())
            if deviation is not None:
                controlled.add(index, Reading(deviation))
            store.begin(index)
            store.add("x", value.double())
            store.end()
            full.append(index)
    gaps = [b - a for a, b in pairwise(full)]
    assert max(gaps) == 7
    # Behind the first calls it takes three doublings; the end cuts the last one.
    assert all(gap == 7 for gap in gaps[order + 5 : -1])
    # A series of the next degree is not.
    assert len(full) < 16


def test_the_deviation_is_that_of_the_weighted_sum_from_what_was_computed() -> None:
    g = torch.Generator().manual_seed(0)
    values = [[torch.randn(2, 3, generator=g), torch.randn(4, generator=g)] for _ in range(4)]
    store, times = Store([Taylor(order=2)], 20), (1, 4, 5)
    assert store.deviation("x", 0, Taylor(order=2), values[0]) is None
    for time, value in zip(times, values, strict=False):
        store.begin(time)
        store.add("x", value)
        store.end()
    weights = Taylor(order=2).weights(times, 9, 20)
    rows = torch.stack([torch.cat([t.flatten() for t in value]) for value in values])
    wanted = (rows[3] - torch.tensor(weights) @ rows[:3]).norm() / rows[3].norm()
    found = store.deviation("x", 9, Taylor(order=2), values[3])
    torch.testing.assert_close(found, wanted)
    half = [[t.to(torch.bfloat16) for t in value] for value in values]
    low = store.deviation("x", 9, Taylor(order=2), values[3])
    assert low is not None
    assert low.dtype == torch.float32
    assert store.deviation("x", 9, Taylor(order=2), [half[3][1], half[3][0]]) is None
    assert store.deviation("x", 5, Taylor(order=2), values[3]) is None
    assert len(store) == 1


@given(calls=st.integers(3, 60), budget=st.integers(3, 60))
def test_with_nothing_measured_a_budget_is_spread_evenly(calls: int, budget: int) -> None:
    plan = ErrorControl(skip(Taylor()), budget=budget, longest=60).resample(calls)
    full = [i for i, depth in enumerate(plan.depth) if depth == FULL]
    assert len(full) == min(budget, calls)
    gaps = [b - a for a, b in pairwise(full[1:])]
    assert max(gaps) - min(gaps) <= 1


OF_ONE_VALUE = FittedStep(step=2, sources=(1,), weights=(1.0,))


@pytest.mark.parametrize(
    ("recovery", "begin", "first"),
    [(Taylor(), 0, 1), (Taylor(), 1, 2), (Reuse(), 1, 1), (Fitted(total=13, steps=(OF_ONE_VALUE,)), 1, 1)],
)
def test_only_a_late_run_of_a_forecast_needs_a_second_value(
    recovery: TimeRecovery, begin: int, first: int
) -> None:
    control = ErrorControl(skip(recovery), budget=4, first=1, longest=20)
    assert steps_of(control, begin + 12, begin)[:3] == [True] * first + [False] * (3 - first)


def test_a_bound_with_nothing_measured_is_full() -> None:
    plan = ErrorControl(skip(Taylor()), bound=0.1)
    assert set(plan.resample(20).depth) == {FULL}
    assert plan.resample(20).name == "controlled"
    assert plan.resample(1).depth == (FULL,)
    with pytest.raises(ValueError, match="calls: 0 is not allowed"):
        plan.resample(0)
