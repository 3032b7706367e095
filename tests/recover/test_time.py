"""Recoveries in time are exact where their mathematics is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pytest
import slow_forecasts
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from regrow.methods.taylorseer import Differences
from regrow.recover.time import (
    REUSE,
    Chebyshev,
    Fitted,
    FittedStep,
    Taylor,
    TimeRecovery,
    cached_split,
    recovery_from,
    register_recovery,
)

TOTAL = 50


@st.composite
def computed(draw: Any, least: int = 1, most: int = 12) -> tuple[list[int], int]:
    """Steps of computed values, unevenly spaced, and a later one that is wanted."""
    steps = draw(st.lists(st.integers(0, TOTAL - 1), min_size=least + 1, max_size=most + 1, unique=True))
    *times, t = sorted(steps)
    return times, t


orders = st.integers(1, 4)
chebyshevs = st.builds(
    Chebyshev,
    degree=st.integers(1, 6),
    ridge=st.floats(1e-3, 10),
    mix=st.floats(0, 1),
)
coefficients = st.lists(st.floats(-3, 3), min_size=1, max_size=5)


def polynomial(coefficients: Sequence[float], t: float) -> float:
    """Of the share of the run that is over."""
    return sum(c * (t / TOTAL) ** power for power, c in enumerate(coefficients))


def summed(weights: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """A weighted sum, and how far rounding may take it from the true one."""
    products = [w * v for w, v in zip(weights, values, strict=True)]
    return math.fsum(products), 1e-10 * (1 + sum(map(abs, products)))


@given(orders, coefficients, computed())
def test_taylor_continues_every_polynomial_of_its_degree(
    order: int, coefficients: list[float], given_steps: tuple[list[int], int]
) -> None:
    times, t = given_steps
    # With fewer values its order is as high as they allow.
    curve = coefficients[: min(order + 1, len(times))]
    weights = Taylor(order=order).weights(times, t, TOTAL)
    found, tolerance = summed(weights, [polynomial(curve, time) for time in times])
    assert abs(found - polynomial(curve, t)) <= tolerance


def test_taylor_of_order_m_does_not_continue_degree_m_plus_1() -> None:
    for order in range(1, 5):
        weights = Taylor(order=order).weights(range(8), 9, TOTAL)
        assert abs(summed(weights, [float(t ** (order + 1)) for t in range(8)])[0] - 9 ** (order + 1)) > 1


@pytest.mark.parametrize(
    ("order", "times", "t", "weights"),
    [
        (1, (0, 1), 2, (-1, 2)),
        (1, (0, 4), 5, (-0.25, 1.25)),
        (2, (0, 1, 2), 3, (1, -3, 3)),
        (2, (7, 0 + 8, 10), 11, (1, -2, 2)),
        (3, (5, 6, 7, 8), 9, (-1, 4, -6, 4)),
        (1, (0, 3, 4), 6, (0, -2, 3)),
    ],
)
def test_weights_of_taylor_by_hand(
    order: int, times: Sequence[int], t: int, weights: Sequence[float]
) -> None:
    assert Taylor(order=order).weights(times, t, TOTAL) == pytest.approx(weights, abs=1e-12)


@given(orders, computed(), st.integers(0, 2**31))
def test_differences_are_the_released_codes(
    order: int, given_steps: tuple[list[int], int], seed: int
) -> None:
    times, t = given_steps
    values = np.random.default_rng(seed).standard_normal((len(times), 3))
    factors = slow_forecasts.Factors(order)
    for time, value in zip(times, values, strict=True):
        factors.full(time, value)
    weights = np.array(Differences(order=order).weights(times, t, TOTAL))
    wanted = factors.forecast(t)
    assert np.allclose(weights @ values, wanted, rtol=1e-9, atol=1e-9 * np.abs(weights).sum())


@given(computed())
def test_differences_of_order_1_are_the_line(given_steps: tuple[list[int], int]) -> None:
    times, t = given_steps
    line = Taylor(order=1).weights(times, t, TOTAL)
    assert Differences(order=1).weights(times, t, TOTAL) == pytest.approx(line, abs=1e-12)


def test_differences_of_order_2_are_no_parabola() -> None:
    """The paper's series takes a backward difference for the derivative at the last value."""
    weights = Differences(order=2).weights((0, 1, 2), 3, TOTAL)
    assert weights == pytest.approx((0.5, -2, 2.5))


@given(chebyshevs, computed(least=2), st.integers(0, 2**31))
def test_chebyshev_is_the_papers_formula(
    recovery: Chebyshev, given_steps: tuple[list[int], int], seed: int
) -> None:
    times, t = given_steps
    values = np.random.default_rng(seed).standard_normal((len(times), 3))
    weights = np.array(recovery.weights(times, t, TOTAL))
    options = recovery.model_dump(include={"degree", "ridge", "mix"})
    wanted = slow_forecasts.chebyshev(times, values, t, total=TOTAL, **options)
    assert np.allclose(weights @ values, wanted, rtol=1e-7, atol=1e-7 * (1 + np.abs(weights).sum()))


@given(chebyshevs, computed(), st.integers(0, 2**31))
def test_sums_of_all_values_give_the_same_as_the_values(
    recovery: Chebyshev, given_steps: tuple[list[int], int], seed: int
) -> None:
    times, t = given_steps
    values = np.random.default_rng(seed).standard_normal((len(times), 3))
    sums = np.array([recovery.basis(time, TOTAL) for time in times]).T @ values
    of_sums, of_values = map(np.array, recovery.split(times, t, TOTAL))
    found = of_sums @ sums + of_values @ values[-len(of_values) :]
    weights = np.array(recovery.weights(times, t, TOTAL))
    assert np.allclose(found, weights @ values, rtol=1e-8, atol=1e-8 * (1 + np.abs(weights).sum()))


@given(st.integers(1, 5), coefficients, st.integers(31, TOTAL - 1), st.floats(0.1, 1))
def test_chebyshev_with_many_values_fits_polynomials_of_its_degree(
    degree: int, coefficients: list[float], t: int, mix: float
) -> None:
    curve, times = coefficients[: degree + 1], range(31)
    weights = Chebyshev(degree=degree, ridge=1e-10, mix=mix).weights(times, t, TOTAL)
    found = summed(weights, [polynomial(curve, time) for time in times])[0]
    line = polynomial(curve, 30) + (t - 30) * (polynomial(curve, 30) - polynomial(curve, 29))
    assert found == pytest.approx(mix * polynomial(curve, t) + (1 - mix) * line, rel=1e-4, abs=1e-4)


def test_a_large_ridge_pulls_the_forecast_to_zero() -> None:
    recovery = Chebyshev(ridge=1000.0)
    assert abs(sum(recovery.weights(range(10), 10, TOTAL))) < 0.1


def test_the_basis_is_of_the_runs_own_length() -> None:
    assert Chebyshev(degree=2).basis(0, 20) == pytest.approx((1, -1, 1))
    assert Chebyshev(degree=2).basis(10, 20) == pytest.approx((1, 0, -1))
    assert Chebyshev(degree=3).basis(15, 20) == pytest.approx((1, 0.5, -0.5, -1))
    # Behind the last step it stays as it is there.
    assert Chebyshev(degree=2).basis(21, 20) == Chebyshev(degree=2).basis(20, 20) == (1, 1, 1)


def fitted(total: int = 6) -> Fitted:
    return Fitted(
        total=total,
        steps=(
            FittedStep(step=2, sources=(0, 1), weights=(-0.5, 1.5)),
            FittedStep(step=4, sources=(0, 3), weights=(0.25, 0.75)),
            FittedStep(step=5, sources=(0, 1, 3), weights=(0.1, 0.2, 0.7)),
        ),
    )


def test_fitted_weights_are_those_of_their_steps() -> None:
    assert fitted().weights((0, 1), 2, 6) == (-0.5, 1.5)
    assert fitted().weights((0, 1, 3), 4, 6) == (0.25, 0.0, 0.75)
    assert fitted().weights((0, 1, 3), 5, 6) == (0.1, 0.2, 0.7)
    assert fitted().window == 3
    assert Fitted(total=6, steps=()).window == 2, "for the line"
    assert fitted().split((0, 1, 3), 4, 6) == ((), (0.25, 0.0, 0.75))


@pytest.mark.parametrize(
    ("times", "t", "total", "why"),
    [
        ((0, 1), 3, 6, "the step has no weights"),
        ((0, 3), 5, 6, "a source was not computed"),
        ((0, 1), 2, 7, "the run has other steps"),
        ((0, 1, 2, 3), 4, 6, "a source is too long ago to be kept"),
    ],
)
def test_where_nothing_was_fitted_it_is_the_line(
    times: tuple[int, ...], t: int, total: int, why: str
) -> None:
    assert not fitted().knows(times, t, total), why
    assert fitted().weights(times, t, total) == Taylor(order=1).weights(times, t, total), why


@given(computed())
def test_a_fit_loses_no_source_to_the_window(given_steps: tuple[list[int], int]) -> None:
    """What is kept holds all that has a weight, in plans of any full steps."""
    times, t = given_steps
    for kept in (times[:1], times[-1:], times):
        steps = (FittedStep(step=t, sources=tuple(kept), weights=tuple(k + 1.0 for k in range(len(kept)))),)
        recovery = Fitted(total=TOTAL, steps=steps)
        weights = recovery.weights(times, t, TOTAL)
        assert recovery.split(times, t, TOTAL)[1] == weights[-recovery.window :]
        assert not any(weights[: -recovery.window])


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"step": 3, "sources": (0, 1), "weights": (1.0,)}, "weights: 1 entries for 2 sources"),
        ({"step": 3, "sources": (1, 0), "weights": (1.0, 1.0)}, "must ascend and be below 3"),
        ({"step": 3, "sources": (0, 3), "weights": (1.0, 1.0)}, "must ascend and be below 3"),
    ],
)
def test_steps_that_can_not_be_are_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        FittedStep(**fields)


# --- All of them ---

NEAREST = FittedStep(step=3, sources=(2,), weights=(1.0,))


@pytest.mark.parametrize(
    ("recovery", "times", "said"),
    [
        (REUSE, (0, 1), "reuse"),
        (Taylor(order=2), (0,), "reuse"),
        (Taylor(order=2), (0, 1), "taylor(1)"),
        (Taylor(order=2), (0, 1, 2), "taylor(2)"),
        (Taylor(order=1), (0, 1, 2), "taylor(1)"),
        (Chebyshev(degree=3), (0,), "reuse"),
        (Chebyshev(degree=3), (0, 1), "chebyshev(3)"),
        (Fitted(total=TOTAL, steps=(NEAREST,)), (1, 2), "fitted"),
        (Fitted(total=TOTAL, steps=(NEAREST,)), (0, 1), "taylor(1)"),
        (Fitted(total=TOTAL, steps=(NEAREST,)), (1,), "reuse"),
        (Fitted(total=TOTAL + 1, steps=(NEAREST,)), (0, 1, 2), "taylor(1)"),
    ],
)
def test_reports_name_what_a_value_was_made_with(
    recovery: TimeRecovery, times: tuple[int, ...], said: str
) -> None:
    assert recovery.used(times, 3, TOTAL) == said


@pytest.mark.parametrize(
    ("recovery", "one", "two"),
    [
        (REUSE, True, True),
        (Taylor(), False, True),
        (Chebyshev(), False, True),
        (Fitted(total=TOTAL, steps=(NEAREST,)), True, True),
        (Fitted(total=TOTAL + 1, steps=(NEAREST,)), False, True),
    ],
)
def test_a_run_that_began_late_needs_two_values_or_what_was_fitted(
    recovery: TimeRecovery, one: bool, two: bool
) -> None:
    assert recovery.begins((2,), 3, TOTAL) == one
    assert recovery.begins((1, 2), 3, TOTAL) == two


def test_a_fit_is_moved_with_all_its_steps() -> None:
    moved = fitted().moved(3, 9)
    assert moved.weights((3, 4, 6), 8, 9) == fitted().weights((0, 1, 3), 5, 6)
    assert [one.step for one in moved.steps] == [5, 7, 8]
    assert moved.total == 9
    assert REUSE.moved(3, 9) is REUSE


@pytest.mark.parametrize(
    ("kind", "field", "allowed", "refused"),
    [
        (Taylor, "order", (1, 8), (0, 9)),
        (Chebyshev, "degree", (1, 8), (0, 9)),
        (Chebyshev, "ridge", (1e-9, 1.0), (0, -1.0)),
        (Chebyshev, "mix", (0, 1), (-0.1, 1.1)),
    ],
)
def test_fields_have_bounds(
    kind: type[TimeRecovery], field: str, allowed: tuple[float, ...], refused: tuple[float, ...]
) -> None:
    for value in allowed:
        assert getattr(kind(**{field: value}), field) == value
    for value in refused:
        with pytest.raises(ValidationError, match=field):
            kind(**{field: value})


def test_defaults_are_the_papers() -> None:
    assert Chebyshev() == Chebyshev(degree=4, ridge=0.1, mix=1)
    assert Taylor() == Taylor(order=1)


def test_a_step_is_fitted_once_and_of_earlier_ones() -> None:
    with pytest.raises(ValidationError, match="a step is there twice"):
        Fitted(total=TOTAL, steps=(NEAREST, NEAREST))
    assert FittedStep(step=1, sources=(0,), weights=(1.0,)).step == 1
    for fields in ({"step": 0, "sources": (0,)}, {"step": 3, "sources": (-1,)}, {"step": 3, "sources": ()}):
        with pytest.raises(ValidationError):
            FittedStep(**{"weights": (1.0,)} | fields)


recoveries = st.one_of(
    st.just(REUSE),
    st.builds(Taylor, order=orders),
    st.builds(Differences, order=orders),
)


@given(recoveries, computed())
def test_what_never_changes_is_recovered_as_it_is(
    recovery: TimeRecovery, given_steps: tuple[list[int], int]
) -> None:
    times, t = given_steps
    weights = recovery.weights(times, t, TOTAL)
    assert len(weights) == len(times)
    total, tolerance = summed(weights, [1.0] * len(times))
    assert abs(total - 1) <= tolerance


@given(st.one_of(recoveries, chebyshevs), st.integers(0, 48))
def test_a_single_value_is_reused(recovery: TimeRecovery, time: int) -> None:
    assert recovery.weights((time,), time + 1, TOTAL) == (1.0,)
    sums, values = recovery.split((time,), time + 1, TOTAL)
    assert values == (1.0,)
    assert not any(sums)


@given(computed())
def test_reuse_is_the_last_value(given_steps: tuple[list[int], int]) -> None:
    times, t = given_steps
    assert REUSE.weights(times, t, TOTAL) == (0.0,) * (len(times) - 1) + (1.0,)


@given(recoveries, computed())
def test_older_values_than_the_window_have_no_weight(
    recovery: TimeRecovery, given_steps: tuple[list[int], int]
) -> None:
    times, t = given_steps
    weights = recovery.weights(times, t, TOTAL)
    assert not any(weights[: -recovery.window])
    assert recovery.split(times, t, TOTAL) == ((), weights[-recovery.window :])
    assert recovery.basis(t, TOTAL) == ()
    assert recovery.knows(times, t, TOTAL)
    assert cached_split(recovery, tuple(times), t, TOTAL) == recovery.split(times, t, TOTAL)


class Nameless(TimeRecovery):
    order: int = 1


class Unset(TimeRecovery):
    kind: Literal["unset"]


class Free(TimeRecovery):
    kind: str = "free"


class Spaced(TimeRecovery):
    kind: Literal["a b"] = "a b"


class Named(TimeRecovery):
    kind: Literal["named"] = "named"


class AlsoReuse(TimeRecovery):
    kind: Literal["reuse"] = "reuse"


@pytest.mark.parametrize("kind", [Nameless, Unset, Free])
def test_a_recovery_without_a_name_is_refused(kind: type[TimeRecovery]) -> None:
    said = f'kind: {kind.__name__} has no field of the form kind: Literal\\["name"\\] = "name"'
    with pytest.raises(TypeError, match=said):
        register_recovery(kind)
    with pytest.raises(ValueError, match="it must be a recovery"):
        recovery_from("free")


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("reuse", "reuse"),
        ("taylor", "taylor"),
        ("taylor1", "taylor"),
        ("taylor3", "taylor3"),
        ("chebyshev2", "chebyshev2"),
        ("differences2", "differences2"),
    ],
)
def test_a_recovery_is_labelled_by_what_makes_it(name: str, label: str) -> None:
    assert recovery_from(name).label == label
    assert recovery_from(label) == recovery_from(name)


def test_an_order_of_thousands_of_digits_is_refused_as_any_other() -> None:
    with pytest.raises(ValidationError, match="order"):
        recovery_from("taylor" + "9" * 5000)


def test_a_recovery_without_an_order_is_given_none() -> None:
    with pytest.raises(ValueError, match="it must be 'reuse', which has no order"):
        recovery_from("reuse2")


def test_a_recovery_is_known_by_its_kind() -> None:
    with pytest.raises(ValueError, match="kind: 'a b' is not allowed, it must be of letters from a to z"):
        register_recovery(Spaced)
    with pytest.raises(ValueError, match="kind: 'reuse' is not allowed, Reuse has that name"):
        register_recovery(AlsoReuse)
    assert type(recovery_from("reuse")) is type(REUSE)
    assert register_recovery(Named) is Named
    assert recovery_from("named") == Named()


def test_a_recovery_is_made_from_its_fields() -> None:
    assert recovery_from({"kind": "taylor", "order": 3}) == Taylor(order=3)
    for fields in ({"order": 3}, {"kind": "tailor", "order": 3}):
        with pytest.raises(ValueError, match="it must be a recovery"):
            recovery_from(fields)
