"""Selections against the equations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import features
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from regrow.tokens import select
from regrow.tokens.grid import Grid, best_of_patch
from regrow.tokens.select import (
    Selection,
    Subset,
    complement,
    flat_rows,
    most_similar,
    most_similar_nearby,
    prune_similar,
    put_rows,
    rows_of,
    top_share,
    unlike_destinations,
)

SIZES = [(8, 8), (7, 5), (4, 9), (9, 7)]
OPTIONS = {"global": {}, "nearby": {"nearby": True}, "all-kept": {"from_all_kept": True}}


def base_of(x: Tensor, grid: Grid) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return best_of_patch(torch.rand(x.shape[:2], generator=generator), grid)


def sources(selection: Selection, sample: int) -> list[int]:
    """The token whose value each token takes."""
    kept = selection.kept[sample]
    return kept[selection.source[sample]].tolist()


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("side", [2, 3, 4])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("make", features.WITHOUT_TIES.values(), ids=features.WITHOUT_TIES)
def test_kept_tokens_and_sources_are_the_references(
    make: Callable[..., Tensor], size: tuple[int, int], side: int, batch: int, option: str
) -> None:
    x, grid = make(batch, *size), Grid(*size, side)
    base = base_of(x, grid)
    k = grid.pruned(0.5)
    chosen = prune_similar(x, base, grid, k, **OPTIONS[option])
    for b in range(batch):
        kept, source_of = reference.select(
            x[b],
            base[b].tolist(),
            k,
            grid=(*size, side) if option == "nearby" else None,
            from_all_kept=option == "all-kept",
        )
        assert sorted(chosen.kept[b].tolist()) == kept
        assert sources(chosen, b) == [source_of.get(n, n) for n in range(grid.tokens)]


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.7])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("make", features.ALL.values(), ids=features.ALL)
def test_selections_are_as_similar_as_the_references_where_there_are_ties(
    make: Callable[..., Tensor],
    size: tuple[int, int],
    ratio: float,
    dtype: torch.dtype,
    option: str,
) -> None:
    x, grid = make(2, *size).to(dtype), Grid(*size, 2)
    base = base_of(x, grid)
    k = grid.pruned(ratio)
    tolerance = 1e-6 if dtype is torch.float32 else 1e-2
    chosen = prune_similar(x, base, grid, k, **OPTIONS[option])
    for b in range(2):
        similar = reference.cosines(x[b]).tolist()
        _, source_of = reference.select(
            x[b],
            base[b].tolist(),
            k,
            grid=(*size, 2) if option == "nearby" else None,
            from_all_kept=option == "all-kept",
        )
        taken = sources(chosen, b)
        pruned = [n for n in range(grid.tokens) if taken[n] != n]
        assert len(pruned) == k == len(source_of)
        allowed = {
            n: base[b].tolist()
            if option != "nearby"
            else reference.nearby_base(n, base[b].tolist(), *size, 2)
            for n in range(grid.tokens)
        }

        closeness = {n: max(similar[n][c] for c in allowed[n]) for n in allowed}
        # The pruned are the most similar ones, and each has the most similar of its sources.
        got = sorted(closeness[n] for n in pruned)
        wanted = sorted(closeness[n] for n in source_of)
        assert got == pytest.approx(wanted, abs=tolerance)
        for n in pruned:
            candidates = chosen.kept[b].tolist() if option == "all-kept" else allowed[n]
            assert taken[n] in candidates
            best = max(similar[n][c] for c in candidates)
            assert similar[n][taken[n]] == pytest.approx(best, abs=tolerance)


@settings(max_examples=150)
@given(
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    side=st.integers(2, 4),
    batch=st.integers(1, 3),
    ratio=st.floats(0, 0.95),
    option=st.sampled_from(sorted(OPTIONS)),
    make=st.sampled_from(sorted(features.ALL)),
)
def test_every_selection_parts_the_tokens(
    height: int, width: int, side: int, batch: int, ratio: float, option: str, make: str
) -> None:
    grid = Grid(height, width, side)
    x = features.ALL[make](batch, height, width)
    base = base_of(x, grid)
    k = grid.pruned(ratio)
    chosen = prune_similar(x, base, grid, k, **OPTIONS[option])
    assert chosen.kept.shape == (batch, grid.tokens - k)
    assert chosen.source.shape == (batch, grid.tokens)
    for b in range(batch):
        kept = chosen.kept[b].tolist()
        assert len(set(kept)) == len(kept)
        assert set(kept) <= set(range(grid.tokens))
        assert set(base[b].tolist()) <= set(kept)
        taken = sources(chosen, b)
        assert [n for n in range(grid.tokens) if taken[n] == n] == sorted(kept)
        assert set(taken) <= set(kept)
        assert (chosen.keep_rows.view(batch, -1)[b] - b * grid.tokens).tolist() == kept
        rows = chosen.source_rows.view(batch, -1)[b] - b * len(kept)
        assert torch.equal(rows, chosen.source[b])


def test_blocks_of_queries_give_what_one_block_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    x = features.random(2, 9, 9)
    query, candidate = torch.arange(60).expand(2, -1), torch.arange(60, 81).expand(2, -1)
    whole = most_similar(x, query, candidate)
    monkeypatch.setattr(select, "ROWS", 7)
    parts = most_similar(x, query, candidate)
    torch.testing.assert_close(parts[0], whole[0])
    assert torch.equal(parts[1], whole[1])


def test_more_queries_than_a_block_holds_are_all_answered() -> None:
    x = features.random(1, 40, 40, 4)
    query, candidate = torch.arange(1500)[None], torch.arange(1500, 1600)[None]
    value, index = most_similar(x, query, candidate)
    expected = reference.cosines(x[0])[:1500, 1500:]
    torch.testing.assert_close(value[0].double(), expected.max(1).values, rtol=1e-5, atol=1e-5)
    assert torch.equal(index[0], expected.argmax(1))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("side", [2, 3])
def test_nearby_similarity_is_the_best_of_the_surrounding_patches(size: tuple[int, int], side: int) -> None:
    x, grid = features.random(2, *size), Grid(*size, side)
    base = base_of(x, grid)
    rest = complement(base, grid.tokens)
    value, index = most_similar_nearby(x, rest, base, grid)
    for b in range(2):
        similar = reference.cosines(x[b])
        for q, n in enumerate(rest[b].tolist()):
            candidates = reference.nearby_base(n, base[b].tolist(), *size, side)
            best = max(candidates, key=lambda c, n=n: float(similar[n, c]))
            assert int(base[b, index[b, q]]) == best
            assert float(value[b, q]) == pytest.approx(float(similar[n, best]), abs=1e-5)


@given(st.integers(1, 40), st.data())
def test_the_complement_is_every_other_token_in_order(tokens: int, data: st.DataObject) -> None:
    n = data.draw(st.integers(0, tokens))
    chosen = [data.draw(st.permutations(range(tokens)))[:n] for _ in range(2)]
    rest = complement(torch.tensor(chosen, dtype=torch.long).view(2, n), tokens)
    assert rest.tolist() == [[t for t in range(tokens) if t not in c] for c in chosen]


def test_rows_of_takes_each_samples_own_rows() -> None:
    x = features.random(3, 4, 4)
    index = torch.tensor([[0, 5], [15, 2], [7, 7]])
    rows = rows_of(x, index)
    for b in range(3):
        assert torch.equal(rows[b], x[b, index[b]])


@pytest.mark.parametrize("shape", [(2, 6, 3), (2, 6, 3, 4)])
def test_put_rows_writes_over_each_samples_own_rows(shape: tuple[int, ...]) -> None:
    index = torch.tensor([[0, 5, 2], [3, 1, 4]])
    x, new = torch.zeros(shape), torch.rand(2, 3, *shape[2:]) + 1
    expected = x.clone()
    for b in range(2):
        expected[b, index[b]] = new[b]
    put_rows(x, flat_rows(index, 6), new)
    assert torch.equal(x, expected)


def test_tokens_of_an_image_are_behind_all_of_its_text() -> None:
    subset = Subset(torch.tensor([[0, 3], [1, 2]]), image=4)
    assert subset.rows(4).tolist() == [0, 3, 4 + 1, 4 + 2]
    assert subset.rows(6).tolist() == [0, 1, 2 + 0, 2 + 3, 6 + 0, 6 + 1, 6 + 2 + 1, 6 + 2 + 2]
    assert subset.rows(6) is subset.rows(6)


def test_top_share_takes_the_highest_of_each_sample() -> None:
    score = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    for row, chosen in zip(score, top_share(score, 6), strict=True):
        assert set(chosen.tolist()) == set(row.argsort(descending=True)[:6].tolist())


def shared_and_own(dtype: torch.dtype) -> Tensor:
    """Tokens that differ little from what all have in common."""
    g = torch.Generator().manual_seed(0)
    return (4 * torch.randn(1, 1, 32, generator=g) + torch.randn(2, 64, 32, generator=g)).to(dtype)


@pytest.mark.parametrize("nearby", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_exact_similarities_of_half_precision_are_those_of_float32(
    dtype: torch.dtype, nearby: bool
) -> None:
    x, grid = shared_and_own(dtype), Grid(8, 8)
    base = base_of(x, grid)
    rest = complement(base, 64)
    similar: Callable[..., tuple[Tensor, Tensor]] = most_similar
    if nearby:
        similar = partial(most_similar_nearby, grid=grid)
    value, index = similar(x, rest, base, exact=True)
    expected, right = similar(x.float(), rest, base)
    assert torch.equal(index, right)
    assert torch.equal(value, expected)
    # Products of the features as they are would choose 77% of them in bfloat16.
    value, index = similar(x, rest, base)
    assert (index == right).float().mean() > 0.95
    torch.testing.assert_close(value, expected, rtol=0, atol=2e-3)
    assert not torch.equal(value, expected)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("size", SIZES)
def test_destinations_have_the_highest_scores_and_others_are_as_low_as_they_are_similar(
    size: tuple[int, int], seed: int
) -> None:
    x, grid = features.random(2, *size), Grid(*size)
    score = unlike_destinations(x, grid, torch.Generator().manual_seed(seed))
    chance = torch.rand(grid.tokens, generator=torch.Generator().manual_seed(seed))
    base = [max(cell, key=lambda n: float(chance[n])) for cell in reference.patches(*size, 2)]
    for b in range(2):
        expected = -reference.cosines(x[b])[:, base].max(1).values
        expected[base] = 2 + chance[base].double()
        torch.testing.assert_close(score[b].double(), expected, rtol=1e-5, atol=1e-5)


def test_pruning_compares_in_half_precision_unless_told_otherwise() -> None:
    x, grid = shared_and_own(torch.bfloat16), Grid(8, 8)
    base = base_of(x, grid)
    default, fast, exact = (
        prune_similar(x, base, grid, 24, **options).source
        for options in ({}, {"exact": False}, {"exact": True})
    )
    assert torch.equal(default, fast)
    assert not torch.equal(default, exact)
