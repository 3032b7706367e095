"""Which steps are full, and how many tokens each block computes, against the paper taken literally."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regrow.tokens.shares import Table, i_steps, shares_of_call


@given(st.lists(st.floats(0, 1), min_size=1, max_size=60), st.integers(1, 70), st.floats(-500, 500))
@settings(max_examples=200, deadline=None)
def test_i_steps_pass_even_parts_of_the_sum(means: list[float], full: int, beta: float) -> None:
    """Against Eq. 13 taken literally, a step after the other."""
    chosen = i_steps(means, full, beta)
    assert 0 in chosen
    assert len(chosen) == min(full, len(means))
    weights = [np.exp(beta * m - max(beta * n for n in means)) for m in means]
    expected: set[int] = set()
    count = min(full, len(means))
    for part in range(count):
        v, step = 0.0, 0
        while step < len(means) - 1 and v < part / count * sum(weights) - 1e-9 * sum(weights):
            v, step = v + weights[step], step + 1
        while step in expected and step < len(means) - 1:
            step += 1
        while step in expected:
            step -= 1
        expected.add(step)
    assert chosen == expected


def test_i_steps_without_alpha_are_even() -> None:
    assert i_steps(np.zeros(50), 10, -8000) == set(range(0, 50, 5))
    # Where alpha is high, a negative beta has fewer of them.
    few = i_steps([0.9] * 25 + [0.1] * 25, 10, -3.0)
    assert len([step for step in few if step < 25]) == 1


@given(
    st.lists(st.lists(st.floats(0, 1), min_size=9, max_size=9), min_size=2, max_size=6),
    st.floats(0.05, 0.95),
)
@settings(max_examples=100, deadline=None)
def test_shares_are_those_of_one_threshold(rows: list[list[float]], ratio: float) -> None:
    quantiles = np.sort(np.array([rows]), axis=2)
    shares = Table(quantiles, np.array([0.5])).shares(0.0, len(rows), ratio)
    assert all(0 <= share <= 1 for share in shares)
    # A block whose quantiles are all higher never computes a smaller part.
    for i, one in enumerate(quantiles[0]):
        for j, other in enumerate(quantiles[0]):
            if (one >= other).all():
                assert shares[i] >= shares[j] - 1e-6
    if max(shares) < 1:
        assert np.mean(shares) == pytest.approx(1 - ratio, abs=1e-6)


# Alpha of one block even from 0 to 1, and of one from 0.5 to 1.
EVEN = np.linspace([0, 0.5], [1, 1], 9).T


@pytest.mark.parametrize(("ratio", "shares"), [(0.7, (0.2, 0.4)), (0.2, (0.6, 1.0)), (0.0, (1.0, 1.0))])
def test_shares_by_hand(ratio: float, shares: tuple[float, ...]) -> None:
    table = Table(EVEN[None], np.array([0.5]))
    assert table.shares(0.0, 2, ratio) == pytest.approx(shares, abs=1e-6)
    assert table.shares(0.0, 1, ratio) == pytest.approx((1 - ratio,), abs=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_blocks_that_are_alike_have_the_same_share(alpha: float) -> None:
    table = Table(np.full((1, 2, 9), alpha), np.array([alpha]))
    assert table.shares(0.0, 2, 0.7) == pytest.approx((0.3, 0.3), abs=1e-6)


def test_shares_are_of_the_place_in_the_run() -> None:
    table = Table(np.stack([EVEN, EVEN[::-1], np.stack([EVEN[0]] * 2)]), np.array([0.5] * 3))
    for place, shares in ((0.0, (0.2, 0.4)), (0.4, (0.4, 0.2)), (0.99, (0.3, 0.3))):
        assert table.shares(place, 2, 0.7) == pytest.approx(shares, abs=1e-6)


@pytest.mark.parametrize(
    ("calls", "means"),
    [(2, (0.3, 0.7)), (4, (0.2, 0.4, 0.8, 0.6)), (8, (0.2, 0.25, 0.35, 0.5, 0.7, 0.75, 0.65, 0.6))],
)
def test_means_lie_on_lines_between_the_middles_of_the_places(calls: int, means: tuple[float, ...]) -> None:
    table = Table(np.zeros((4, 1, 2)), np.array([0.2, 0.4, 0.8, 0.6]))
    assert table.means(calls) == pytest.approx(means)


@pytest.mark.parametrize("beta", [8000, -8000])
def test_i_steps_follow_alpha_however_strongly(beta: float) -> None:
    """The first two steps have no weight beside the others."""
    low, high = sorted((0.1, 0.9), key=lambda alpha: alpha * beta)
    assert i_steps([low] * 2 + [high] * 8, 4, beta) == {0, 4, 6, 8}


@pytest.mark.parametrize(
    ("ratio", "shares"),
    # Of 8 alphas in each sample, the 4 and the 1 that are highest, at least 1, and all.
    [(0.5, (0.75, 0.25)), (0.875, (0.125, 0.125)), (1.0, (0.125, 0.125)), (0.0, (1.0, 1.0))],
)
def test_shares_of_a_call_are_the_parts_of_its_highest_alphas(
    ratio: float, shares: tuple[float, ...]
) -> None:
    first = [[0.9, 0.1], [0.8, 0.7], [0.6, 0.2], [0.0, 0.3]]
    second = [[0.8, 0.1], [0.7, 0.9], [0.6, 0.2], [0.0, 0.3]]
    assert shares_of_call(torch.tensor([first, second]), ratio) == pytest.approx(shares)
