"""Clusters against plain loops and scipy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.cluster.vq import kmeans2

from regrow.tokens.cluster import (
    ClusterAlgorithm,
    Clusters,
    choose_by_clusters,
    k_means,
    neighbours,
    pool_clusters,
    pool_graph,
    positions,
    rank_within,
)
from regrow.tokens.grid import Grid

GRIDS = [Grid(4, 6), Grid(5, 3), Grid(1, 7)]


def random_labels(grid: Grid, clusters: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(clusters, (2, grid.tokens), generator=g)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_positions_are_shares_of_the_sides(grid: Grid) -> None:
    code = positions(grid, 5, torch.device("cpu"))
    for n in range(grid.tokens):
        row, column = divmod(n, grid.width)
        expected = [row / grid.height] * 2 + [column / grid.width] * 3
        torch.testing.assert_close(code[n], torch.tensor(expected))


@pytest.mark.parametrize("rounds", [1, 4, 12])
def test_k_means_is_scipys_from_the_same_beginning(rounds: int) -> None:
    x = torch.randn(2, 60, 3, generator=torch.Generator().manual_seed(1))
    labels = k_means(x, 4, torch.Generator().manual_seed(2), rounds)
    draw = torch.rand(60, generator=torch.Generator().manual_seed(2))
    for b in range(2):
        begin = x[b, draw.topk(4).indices].double().numpy()
        _, expected = kmeans2(x[b].double().numpy(), begin, iter=rounds + 1, minit="matrix")
        np.testing.assert_array_equal(labels[b].numpy(), expected)


@pytest.mark.filterwarnings("ignore:One of the clusters is empty")
@pytest.mark.parametrize(("seed", "clusters", "each"), [(3, 6, 1), (31, 6, 1), (0, 12, 2), (0, 30, 2)])
def test_a_cluster_without_tokens_stays_and_one_of_a_single_token_moves_to_it(
    seed: int, clusters: int, each: int
) -> None:
    """Of 20 places, with two tokens each so that clusters begin at the same one."""
    places = torch.randn(1, 20, 2, generator=torch.Generator().manual_seed(seed))
    x = places.repeat_interleave(each, 1)
    labels = k_means(x, clusters, torch.Generator().manual_seed(2), 6)
    draw = torch.rand(x.shape[1], generator=torch.Generator().manual_seed(2))
    begin = x[0, draw.topk(clusters).indices].double().numpy()
    _, expected = kmeans2(x[0].double().numpy(), begin, iter=7, minit="matrix")
    np.testing.assert_array_equal(labels[0].numpy(), expected)


def test_k_means_makes_ten_rounds_unless_told_otherwise() -> None:
    x = torch.randn(1, 2000, 2, generator=torch.Generator().manual_seed(1))
    ten, eleven = (k_means(x, 20, torch.Generator().manual_seed(2), rounds) for rounds in (10, 11))
    assert torch.equal(k_means(x, 20, torch.Generator().manual_seed(2)), ten)
    assert not torch.equal(ten, eleven)


def test_a_choice_is_as_printed_by_a_quarter_unless_told_otherwise() -> None:
    grid, g = Grid(6, 8), torch.Generator().manual_seed(1)
    difference, staleness = 0.3 * torch.randn(2, 48, 4, generator=g), torch.rand(2, 48, generator=g)
    clusters = Clusters.of(difference, grid, 12, g)

    def choice(**options: Any) -> list[list[int]]:
        found = choose_by_clusters(difference, staleness, clusters, grid, 40, **options)
        return found.sort(1).values.tolist()

    printed, released = ClusterAlgorithm
    said = {"algorithm": printed, "scale": 1.0, "share": 0.25, "balance": 0.0, "begins": False}
    assert choice() == choice(**said)
    others = {"algorithm": released, "scale": 2.0, "share": 0.5, "balance": 1.0, "begins": True}
    for name, other in others.items():
        assert choice() != choice(**{name: other}), name


def test_algorithms_are_called_as_in_files() -> None:
    assert [kind.value for kind in ClusterAlgorithm] == ["printed", "released"]


def test_k_means_finds_what_is_plainly_apart_and_takes_empty_clusters() -> None:
    x = torch.cat([torch.zeros(1, 10, 2), torch.full((1, 10, 2), 9.0)], 1)
    labels = k_means(x, 5, torch.Generator().manual_seed(0))
    assert not set(labels[0, :10].tolist()) & set(labels[0, 10:].tolist())


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_neighbours_touch_in_a_row_or_column(grid: Grid) -> None:
    labels = random_labels(grid, 4)
    touching = neighbours(labels, grid, 4)
    for b in range(2):
        expected = torch.eye(4)
        for n in range(grid.tokens):
            row, column = divmod(n, grid.width)
            for r, c in ((row + 1, column), (row, column + 1)):
                if r < grid.height and c < grid.width:
                    i, j = labels[b, n], labels[b, r * grid.width + c]
                    expected[i, j] = expected[j, i] = 1
        assert torch.equal(touching[b], expected)


def test_pooling_takes_the_largest_of_a_cluster_then_averages_neighbours() -> None:
    grid = Grid(4, 6)
    labels = random_labels(grid, 3)
    x = torch.randn(2, grid.tokens, 5, generator=torch.Generator().manual_seed(3))
    pooled = pool_clusters(x, labels, 4)
    for b in range(2):
        for c in range(4):
            mine = x[b, labels[b] == c]
            expected = mine.max(0).values if len(mine) else torch.zeros(5)
            assert torch.equal(pooled[b, c], expected)
    touching = neighbours(labels, grid, 4)
    mean = pool_graph(pooled, touching)
    for b in range(2):
        for c in range(4):
            near = [k for k in range(4) if touching[b, c, k]]
            torch.testing.assert_close(mean[b, c], pooled[b, near].mean(0))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30), st.integers(1, 5), st.integers(0, 10**6))
def test_rank_within_counts_the_better_of_the_cluster(tokens: int, clusters: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(clusters, (2, tokens), generator=g)
    score = torch.randint(4, (2, tokens), generator=g).float()
    rank = rank_within(score, labels)
    for b in range(2):
        for n in range(tokens):
            mine = [m for m in range(tokens) if labels[b, m] == labels[b, n]]
            better = [m for m in mine if (-score[b, m], m) < (-score[b, n], n)]
            assert rank[b, n] == len(better)
