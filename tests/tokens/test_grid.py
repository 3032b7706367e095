"""Grids, patches and counts."""

from __future__ import annotations

import math

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st

from regrow.tokens.grid import (
    Grid,
    best_of_patch,
    grid_of_positions,
    patch_of_token,
    surrounding_patches,
    tokens_of_patch,
)

grids = st.builds(Grid, st.integers(1, 11), st.integers(1, 11), st.integers(1, 5))


@given(grids)
def test_patches_are_those_of_the_reference(grid: Grid) -> None:
    expected = reference.patches(grid.height, grid.width, grid.patch)
    assert grid.patches == len(expected)
    members = [[n for n in row if n >= 0] for row in tokens_of_patch(grid).tolist()]
    assert members == expected
    place = patch_of_token(grid).tolist()
    assert [[n for n in range(grid.tokens) if place[n] == p] for p in range(len(expected))] == expected


@given(grids)
def test_surrounding_patches_are_the_neighbours_in_both_directions_row_by_row(grid: Grid) -> None:
    columns = math.ceil(grid.width / grid.patch)
    for p, around in enumerate(surrounding_patches(grid).tolist()):
        expected = {
            q
            for q in range(grid.patches)
            if abs(q // columns - p // columns) <= 1 and abs(q % columns - p % columns) <= 1
        }
        inside = [q for q in around if q >= 0]
        assert len(around) == 9
        assert inside == sorted(expected)


@given(grids, st.integers(1, 3), st.integers(0, 2**31), st.booleans())
def test_the_best_of_each_patch_is_the_references(grid: Grid, batch: int, seed: int, ties: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    score = torch.randn(batch, grid.tokens, generator=generator)
    score = score.round() if ties else score
    expected = [reference.base_tokens(s, grid.height, grid.width, grid.patch) for s in score]
    assert best_of_patch(score, grid).tolist() == expected


@pytest.mark.parametrize("value", [-torch.inf, torch.inf, 0.0])
def test_a_border_patch_gives_one_of_its_own_tokens_whatever_the_scores(value: float) -> None:
    grid = Grid(3, 5, 2)
    base = best_of_patch(torch.full((1, 15), value), grid)[0].tolist()
    for token, patch in zip(base, reference.patches(3, 5, 2), strict=True):
        assert token in patch


@given(grids, st.floats(0, 0.999))
def test_counts_are_the_share_of_all_tokens_but_never_a_base_token(grid: Grid, ratio: float) -> None:
    assert grid.pruned(ratio) == reference.count(ratio, grid.tokens, grid.patches)
    assert 0 <= grid.pruned(ratio) <= grid.tokens - grid.patches


@pytest.mark.parametrize(
    ("ratio", "tokens", "expected"),
    [(0.3, 10, 3), (0.7, 10, 7), (0.6, 5, 3), (0.75, 16, 12), (0.29, 100, 29), (0.0, 9, 0)],
)
def test_ratios_that_binary_fractions_miss_lose_no_token(ratio: float, tokens: int, expected: int) -> None:
    assert Grid(1, tokens).pruned(ratio, base=1) == expected


@pytest.mark.parametrize("field", ["height", "width", "patch"])
@pytest.mark.parametrize("value", [0, -3])
def test_sizes_below_one_are_refused_by_name_and_value(field: str, value: int) -> None:
    sizes = {"height": 4, "width": 4, "patch": 2, field: value}
    with pytest.raises(ValueError, match=f"{field}: {value} .*>= 1"):
        Grid(**sizes)


def test_a_grid_is_known_by_the_places_of_its_tokens() -> None:
    places = torch.zeros(3, 5, 3)
    places[..., 1], places[..., 2] = torch.arange(3)[:, None], torch.arange(5)
    rows = places.view(15, 3)
    assert grid_of_positions(rows, 15) == Grid(3, 5)
    assert grid_of_positions(rows[None].bfloat16(), 15) == Grid(3, 5)
    assert grid_of_positions(rows.to("meta"), 15) == Grid(1, 15)
    two_pictures = torch.cat([rows, rows])
    assert grid_of_positions(two_pictures, 30) is None
    assert grid_of_positions(rows.flip(0), 15) is None
    assert grid_of_positions(None, 15) is None
