"""Fitted weights and offline errors, beside stacked tensors and sums written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regrow.fields import MOST_WEIGHT
from regrow.recover.fit import decibels, fitted, least_squares, offline_error, weight_matrix
from regrow.recover.time import Chebyshev, Reuse, Taylor

TOTAL, ELEMENTS = 12, 300
FULL = (0, 1, 4, 8)


def outputs(seed: int = 0, total: int = TOTAL) -> torch.Tensor:
    """Smooth in time with something of their own, ``(T, elements)``."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(total, ELEMENTS, generator=generator, dtype=torch.float64)
    return noise.cumsum(0) + 0.1 * torch.randn(total, ELEMENTS, generator=generator, dtype=torch.float64)


def gram_of(values: torch.Tensor) -> np.ndarray:
    return (values @ values.T / values.shape[1]).numpy()


@pytest.mark.parametrize("last", [None, 1, 2, 3])
def test_it_is_the_least_squares_optimum_of_its_own_outputs(last: int | None) -> None:
    values = outputs()
    weights = weight_matrix(FULL, fitted(gram_of(values), FULL, last=last, ridge=0), TOTAL)
    for step in set(range(TOTAL)) - set(FULL):
        sources = [k for k in FULL if k < step][-(last or TOTAL) :]
        slow = torch.linalg.lstsq(values[sources].T, values[step].unsqueeze(1)).solution[:, 0]
        expected = np.zeros(TOTAL)
        expected[sources] = slow.numpy()
        np.testing.assert_allclose(weights[step], expected, atol=1e-9)


@pytest.mark.parametrize("towards", [None, Taylor(order=1), Chebyshev(degree=2), Reuse()])
def test_ridge_pulls_towards_a_recovery(towards: Taylor | None) -> None:
    """Beside least squares with rows for the ridge: ``sqrt(strength) (w - w0) = 0``."""
    values, ridge = outputs(1), 0.3
    gram = gram_of(values)
    weights = weight_matrix(FULL, fitted(gram, FULL, towards=towards, ridge=ridge), TOTAL)
    strength = math.sqrt(ridge * np.trace(gram) / TOTAL * ELEMENTS)
    for step in set(range(TOTAL)) - set(FULL):
        sources = [k for k in FULL if k < step]
        prior = torch.zeros(len(sources), dtype=torch.float64)
        if towards is not None:
            prior = torch.tensor(towards.weights(sources, step, TOTAL), dtype=torch.float64)
        rows = torch.cat([values[sources].T, strength * torch.eye(len(sources), dtype=torch.float64)])
        wanted = torch.cat([values[step], strength * prior])
        slow = torch.linalg.lstsq(rows, wanted.unsqueeze(1)).solution[:, 0]
        np.testing.assert_allclose(weights[step][sources], slow.numpy(), atol=1e-9)
        if towards is None:
            alone = least_squares(gram, sources, [step], ridge=ridge)
            np.testing.assert_allclose(alone[:, 0], slow.numpy(), atol=1e-9)


@pytest.mark.parametrize(("order", "last"), [(2, None), (2, 3), (1, 2)])
def test_a_strong_ridge_is_the_recovery_itself(order: int, last: int | None) -> None:
    strong = fitted(gram_of(outputs()), FULL, last=last, towards=Taylor(order=order), ridge=1e9)
    expected = weight_matrix(FULL, Taylor(order=order), TOTAL)
    np.testing.assert_allclose(weight_matrix(FULL, strong, TOTAL), expected, atol=1e-6)


@pytest.mark.parametrize(("apart", "later"), [(1e-7, 0), (5e-5, 10)])
def test_values_that_are_alike_share_the_weight_of_one(apart: float, later: float) -> None:
    """Their difference would have weights of 100,000 and more, also if later outputs have much of it."""
    values, difference = outputs(4), outputs(5)[0]
    values[1] = values[0] + apart * difference
    values[5:] += later * difference
    weights = weight_matrix((0, 1, 4), fitted(gram_of(values), (0, 1, 4), ridge=0), TOTAL)[5:]
    one = weight_matrix((0, 4), fitted(gram_of(values), (0, 4), ridge=0), TOTAL)[5:]
    assert np.abs(weights).max() <= MOST_WEIGHT
    np.testing.assert_allclose(weights[:, 0] + weights[:, 1], one[:, 0], atol=1e-3)
    np.testing.assert_allclose(weights[:, 4], one[:, 4], atol=1e-3)


def test_outputs_that_lie_in_those_computed_are_met_exactly() -> None:
    """Cubics of the step: with four computed steps behind it each later one is theirs, as Taylor's."""
    steps = torch.arange(TOTAL, dtype=torch.float64) / TOTAL
    values = torch.stack([steps**power for power in range(4)], 1) @ outputs(2, 4)
    full = (0, 2, 5, 7)
    weights = weight_matrix(full, fitted(gram_of(values), full, ridge=0), TOTAL)
    np.testing.assert_allclose((weights @ values.numpy())[8:], values.numpy()[8:], atol=1e-6)
    np.testing.assert_allclose(weights[8:], weight_matrix(full, Taylor(order=3), TOTAL)[8:], atol=1e-6)


@settings(deadline=None, max_examples=30)
@given(
    st.sets(st.integers(1, TOTAL - 1), max_size=6),
    st.sampled_from([Reuse(), Taylor(order=1), Taylor(order=2), Chebyshev()]),
)
def test_offline_error_is_that_of_the_sums_written_out(rest: set[int], recovery: Taylor) -> None:
    full, values = (0, *sorted(rest)), outputs(3)
    influence = np.linspace(-0.5, 0.7, TOTAL)
    missed = torch.zeros(ELEMENTS, dtype=torch.float64)
    for step in range(TOTAL):
        computed = [k for k in full if k <= step]
        if step not in full:
            weights = recovery.weights(computed, step, TOTAL)
            made = sum(w * values[k] for w, k in zip(weights, computed, strict=True))
            missed += float(influence[step]) * (values[step] - made)
    found = offline_error(gram_of(values), influence, weight_matrix(full, recovery, TOTAL))
    assert found == pytest.approx(float((missed**2).mean()), rel=1e-9, abs=1e-12)


def test_all_computed_is_no_error() -> None:
    full = tuple(range(TOTAL))
    fit = fitted(gram_of(outputs()), full)
    assert fit.steps == ()
    assert offline_error(gram_of(outputs()), np.ones(TOTAL), weight_matrix(full, fit, TOTAL)) == 0


def test_decibels() -> None:
    assert decibels(0.001) == pytest.approx(30)
    assert decibels(0) == math.inf


@pytest.mark.parametrize("full", [(), (1, 4), (0, 4, 4), (0, 5, 3), (0, TOTAL)])
def test_computed_steps_that_cannot_be(full: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"full: .* must ascend from 0 and be below 12"):
        fitted(np.eye(TOTAL), full)
    with pytest.raises(ValueError, match=r"full: .* must ascend from 0 and be below 12"):
        weight_matrix(full, Reuse(), TOTAL)


def test_at_least_one_value() -> None:
    with pytest.raises(ValueError, match="last: 0 is not allowed, it must be >= 1"):
        fitted(np.eye(TOTAL), FULL, last=0)
