"""The error of plans that run, beside sums written out and networks whose growth is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import least_squares
from slow_forecasts import drifting_error, foretold

from regrow.lab.calibration.drift import KNOTS, FittedGaps, Growth, fitted_growth, gap_errors
from regrow.lab.calibration.positions import Positions, families, neighbours
from regrow.recover.fit import decibels, fitted, offline_error, weight_matrix
from regrow.recover.time import Taylor

TOTAL, ELEMENTS = 20, 400
AMPLIFIES = Growth(logarithms=(6.0, 5.5, 5.0, 4.0, 3.0, 1.5, 0.0))
MENDS = Growth(logarithms=(3.0, 3.0, 2.0, -0.5, -2.0, -1.0, 0.0))


def outputs(seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(TOTAL, ELEMENTS)).cumsum(0)


def known(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    values = outputs(seed)
    return values @ values.T / ELEMENTS, np.linspace(-0.05, -0.3, TOTAL)


@pytest.mark.parametrize("growth", [Growth(), AMPLIFIES, MENDS])
def test_it_is_the_sum_of_each_gaps_square(growth: Growth) -> None:
    values, full = outputs(), (0, 1, 4, 9, 10, 17)
    gram, influence = known()
    weights = weight_matrix(full, Taylor(order=1), TOTAL)
    slow = 0.0
    for begin, end in zip(full, (*full[1:], TOTAL), strict=True):
        gap = np.zeros(ELEMENTS)
        for step in range(begin, end):
            gap += influence[step] * (values[step] - weights[step] @ values)
        place = (begin + end) / 2 / TOTAL
        after = next(k for k, knot in enumerate(KNOTS) if knot >= place)
        share = (place - KNOTS[after - 1]) / (KNOTS[after] - KNOTS[after - 1])
        logarithm = (1 - share) * growth.logarithms[after - 1] + share * growth.logarithms[after]
        slow += float((gap**2).mean() * np.exp(logarithm))
    found = drifting_error(gram, influence, weights, growth)
    assert found == pytest.approx(slow, rel=1e-9)
    assert foretold(gram, influence, weights, growth) == pytest.approx(-10 * np.log10(slow))


def test_one_gap_that_does_not_grow_is_the_frozen_network() -> None:
    gram, influence = known(1)
    weights = weight_matrix((0,), Taylor(order=1), TOTAL)
    expected = offline_error(gram, influence, weights)
    assert drifting_error(gram, influence, weights, Growth()) == pytest.approx(expected, rel=1e-9)


def test_all_computed_is_no_error() -> None:
    gram, influence = known()
    assert drifting_error(gram, influence, np.eye(TOTAL), AMPLIFIES) == 0


def ran(gram: np.ndarray, influence: np.ndarray, growth: Growth, noise: float) -> list[Any]:
    rng, found = np.random.default_rng(0), []
    for count in (4, 7):
        for full in families(TOTAL, count):
            weights = weight_matrix(full, fitted(gram, full, last=3), TOTAL)
            told = decibels(drifting_error(gram, influence, weights, growth))
            found.append((weights, told + 17 + noise * rng.normal()))
    return found


@pytest.mark.parametrize("growth", [Growth(), AMPLIFIES, MENDS])
def test_it_foretells_plans_that_did_not_run(growth: Growth) -> None:
    """From those of a known network, on another scale and with some noise."""
    gram, influence = known(2)
    found = fitted_growth(gram, influence, ran(gram, influence, growth, 0.1))

    def miss(full: Positions) -> float:
        weights = weight_matrix(full, fitted(gram, full, last=3), TOTAL)
        return foretold(gram, influence, weights, found) - 17 - foretold(gram, influence, weights, growth)

    misses = [miss(full) for full in neighbours((0, 4, 8, 12, 16), TOTAL)]
    assert np.abs(misses).max() < 1


def test_it_is_the_optimum_that_scipy_finds() -> None:
    gram, influence = known(3)
    plans = ran(gram, influence, MENDS, 2.0)

    def misses(logarithms: np.ndarray) -> np.ndarray:
        growth = Growth(logarithms=tuple(logarithms))
        told = [drifting_error(gram, influence, weights, Growth()) for weights, _ in plans]
        assert min(told) > 0
        wanted = [-near * np.log(10) / 10 for _, near in plans]
        parts = []
        for weights, _ in plans:
            squares, places = gap_errors(gram, influence, weights)
            hats = [np.interp(places, KNOTS, row) @ squares for row in np.eye(len(KNOTS))]
            parts.append(np.log(np.dot(hats, np.exp(growth.logarithms))))
        return np.append(np.array(parts) - wanted, np.sqrt(0.02) * np.diff(logarithms))

    slow = least_squares(misses, np.full(len(KNOTS), -4.0))
    found = fitted_growth(gram, influence, plans)
    assert np.sum(misses(np.array(found.logarithms)) ** 2) <= 2 * slow.cost * (1 + 1e-6)


def test_one_plan_tells_the_scale() -> None:
    gram, influence = known()
    weights = weight_matrix((0, 5, 11), Taylor(order=1), TOTAL)
    growth = fitted_growth(gram, influence, [(weights, 23.0)])
    assert foretold(gram, influence, weights, growth) == pytest.approx(23.0, abs=0.1)
    assert np.ptp(growth.logarithms) < 0.5


def test_plans_are_needed() -> None:
    with pytest.raises(ValueError, match="ran: it is empty, there must be >= 1 plan"):
        fitted_growth(*known(), [])


@given(st.integers(0, 100), st.sets(st.integers(1, 19), min_size=2, max_size=10))
def test_gaps_one_by_one_are_the_plans_error(seed: int, chosen: set[int]) -> None:
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(20, 60)).cumsum(0)
    gram, influence, full = values @ values.T / 60, rng.normal(size=20), (0, *sorted(chosen))
    growth = Growth(logarithms=tuple(rng.normal(size=len(KNOTS)).tolist()))
    weights = weight_matrix(full, fitted(gram, full, last=3), 20)
    expected = drifting_error(gram, influence, weights, growth)
    gaps = FittedGaps(gram, influence, 3)
    assert gaps.error(full, growth) == pytest.approx(expected, rel=1e-6)
    assert gaps.error(full, growth) == gaps.error(full, growth)
