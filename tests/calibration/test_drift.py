"""The error of plans that run, beside sums written out and a network whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from regrow.calibration.drift import Ran, drifting_error, fitted_drift
from regrow.calibration.fit import decibels, fitted, offline_error, weight_matrix
from regrow.calibration.positions import evenly, families
from regrow.recover.time import Taylor

TOTAL, ELEMENTS = 20, 400


def outputs(seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(TOTAL, ELEMENTS)).cumsum(0)


@pytest.mark.parametrize("drift", [0.0, 1.5, 4.0])
def test_it_is_the_sum_of_each_gaps_square(drift: float) -> None:
    values, full = outputs(), (0, 1, 4, 9, 10, 17)
    gram, influence = values @ values.T / ELEMENTS, np.linspace(-0.3, 0.4, TOTAL)
    weights = weight_matrix(full, Taylor(order=1), TOTAL)
    slow = 0.0
    for begin, end in zip(full, (*full[1:], TOTAL), strict=True):
        gap = np.zeros(ELEMENTS)
        for step in range(begin, end):
            grown = influence[step] * np.exp(drift * (1 - step / TOTAL))
            gap += grown * (values[step] - weights[step] @ values)
        slow += float((gap**2).mean())
    assert drifting_error(gram, influence, weights, drift) == pytest.approx(slow, rel=1e-9)


def test_one_gap_without_drift_is_the_frozen_network() -> None:
    values = outputs(1)
    gram, influence = values @ values.T / ELEMENTS, np.linspace(-0.3, 0.4, TOTAL)
    weights = weight_matrix((0,), Taylor(order=1), TOTAL)
    expected = offline_error(gram, influence, weights)
    assert drifting_error(gram, influence, weights, 0.0) == pytest.approx(expected, rel=1e-9)


def test_all_computed_is_no_error() -> None:
    values = outputs()
    gram = values @ values.T / ELEMENTS
    assert drifting_error(gram, np.ones(TOTAL), np.eye(TOTAL), 3.0) == 0


@pytest.mark.parametrize("drift", [0.0, 1.0, 3.0])
def test_the_drift_of_a_network_is_found(drift: float) -> None:
    """Errors that a known network makes of plans, on other scale and with some noise."""
    values, rng = outputs(2), np.random.default_rng(0)
    gram, influence = values @ values.T / ELEMENTS, np.full(TOTAL, -0.1)
    ran = []
    for full in families(TOTAL, 6):
        weights = weight_matrix(full, fitted(gram, full, last=3), TOTAL)
        told = decibels(drifting_error(gram, influence, weights, drift))
        ran.append(Ran(weights, told + 17 + 0.05 * rng.normal()))
    assert fitted_drift(gram, influence, ran) == pytest.approx(drift, abs=0.26)


def test_two_plans_at_least() -> None:
    values = outputs()
    gram = values @ values.T
    one = Ran(weight_matrix(evenly(TOTAL, 4), Taylor(order=1), TOTAL), 20.0)
    with pytest.raises(ValueError, match="ran: 1 plans are not allowed, there must be >= 2"):
        fitted_drift(gram, np.ones(TOTAL), [one])
