"""Taking tokens out and putting all of them back."""

from __future__ import annotations

from collections.abc import Callable

import features
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from regrow.recover.space import keep, keep_merged, recover
from regrow.tokens.grid import Grid, best_of_patch
from regrow.tokens.select import Selection, prune_similar


def selection_of(x: Tensor, grid: Grid, ratio: float) -> Selection:
    score = torch.rand(x.shape[:2], generator=torch.Generator().manual_seed(1))
    return prune_similar(x, best_of_patch(score, grid), grid, grid.pruned(ratio))


def as_reference(selection: Selection, sample: int) -> tuple[list[int], dict[int, int]]:
    kept = selection.kept[sample].tolist()
    taken = selection.kept[sample][selection.source[sample]].tolist()
    return kept, {n: s for n, s in enumerate(taken) if n not in kept}


@settings(max_examples=100)
@given(
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    side=st.integers(2, 4),
    batch=st.integers(1, 3),
    ratio=st.floats(0, 0.95),
    make=st.sampled_from(sorted(features.ALL)),
)
def test_kept_rows_are_untouched_and_pruned_rows_are_their_sources(
    height: int, width: int, side: int, batch: int, ratio: float, make: str
) -> None:
    x = features.ALL[make](batch, height, width)
    selection = selection_of(x, Grid(height, width, side), ratio)
    back = recover(keep(x, selection), selection)
    assert back.shape == x.shape
    for b in range(batch):
        kept, source_of = as_reference(selection, b)
        for n in range(height * width):
            assert torch.equal(back[b, n], x[b, source_of.get(n, n)])
        assert torch.equal(back[b], reference.recover(x[b, kept], kept, source_of))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("size", [(8, 8), (7, 5)])
@pytest.mark.parametrize("make", features.ALL.values(), ids=features.ALL)
def test_merging_takes_the_mean_of_a_token_and_those_it_stands_for(
    make: Callable[..., Tensor], size: tuple[int, int], dtype: torch.dtype
) -> None:
    x = make(3, *size).to(dtype)
    selection = selection_of(x, Grid(*size), 0.6)
    merged = keep_merged(x, selection)
    assert merged.dtype == dtype
    tolerance = 1e-6 if dtype is torch.float32 else 1e-2
    for b in range(3):
        expected = reference.merge(x[b], *as_reference(selection, b))
        torch.testing.assert_close(merged[b].double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("reduce", [keep, keep_merged])
def test_pruning_nothing_gives_everything_back_bit_for_bit(
    reduce: Callable[[Tensor, Selection], Tensor],
) -> None:
    x = features.random(2, 5, 6)
    selection = selection_of(x, Grid(5, 6), 0.0)
    assert torch.equal(recover(reduce(x, selection), selection), x)


def test_tokens_that_are_not_contiguous_in_memory_are_served() -> None:
    x = features.random(2, 6, 6)
    strided = x.transpose(1, 2).contiguous().transpose(1, 2)
    selection = selection_of(x, Grid(6, 6), 0.5)
    assert torch.equal(keep(strided, selection), keep(x, selection))
    assert torch.equal(keep_merged(strided, selection), keep_merged(x, selection))
