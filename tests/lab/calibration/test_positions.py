"""Positions of computed steps, beside all there are."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from regrow.lab.calibration.positions import (
    Positions,
    candidates,
    dense_at_end,
    dense_at_start,
    evenly,
    families,
    local_search,
    neighbours,
)
from regrow.recover.fit import fitted, offline_error, weight_matrix

TOTAL = 11


def error_of(seed: int, total: int = TOTAL) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(total, 200)).cumsum(0)
    return values @ values.T / 200, rng.uniform(0.1, 1, total)


def offline(seed: int, positions: Positions) -> float:
    gram, influence = error_of(seed)
    return offline_error(gram, influence, weight_matrix(positions, fitted(gram, positions), TOTAL))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("count", [2, 3, 4])
def test_the_best_of_all_is_among_the_candidates(seed: int, count: int) -> None:
    every = [(0, *rest) for rest in itertools.combinations(range(1, TOTAL), count - 1)]
    best = min(every, key=lambda positions: offline(seed, positions))
    assert candidates(TOTAL, count, lambda positions: offline(seed, positions))[0] == best


def test_a_local_search_ends_where_no_move_is_better() -> None:
    def error(positions: Positions) -> float:
        return offline(5, positions)

    begin = evenly(TOTAL, 5)
    end = local_search(begin, TOTAL, error)
    assert error(end) < error(begin)
    assert error(end) <= min(map(error, neighbours(end, TOTAL)))


def test_even_positions_are_always_there() -> None:
    """Also where they are worst."""
    even = evenly(TOTAL, 4)
    found = candidates(TOTAL, 4, lambda positions: float(positions == even), keep=3)
    assert even in found
    assert len(found) <= 4


def test_candidates_differ() -> None:
    found = candidates(50, 8, lambda positions: sum(abs(p - 6 * k) for k, p in enumerate(positions)))
    for one, other in itertools.combinations(found[:-1], 2):
        assert sum(abs(a - b) for a, b in zip(one, other, strict=True)) >= 4


@pytest.mark.parametrize(("count", "expected"), [(5, (0, 10, 20, 30, 40)), (6, (0, 8, 16, 25, 33, 41))])
def test_even(count: int, expected: Positions) -> None:
    assert evenly(50, count) == expected


def test_denser_ends() -> None:
    assert dense_at_start(50, 5, 2) == (0, 2, 8, 18, 32)
    assert dense_at_end(50, 5, 2) == (0, 18, 32, 42, 48)


@given(st.integers(1, 60), st.data())
def test_families_are_of_a_run(total: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, total))
    found = families(total, count)
    assert found[0] == evenly(total, count)
    assert len(set(found)) == len(found)
    for one in found:
        assert len(one) == count
        assert one[0] == 0
        assert list(one) == sorted(set(one))
        assert one[-1] < total


def test_as_many_as_there_are() -> None:
    with pytest.raises(ValueError, match="count: 7 is not allowed, it must be >= 1 and <= 6"):
        evenly(6, 7)
