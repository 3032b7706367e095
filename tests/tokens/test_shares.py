"""Which steps are full, and how many tokens each block computes, against the paper taken literally."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regrow.tokens.shares import Table, i_steps


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
