"""ToMeSD against plain loops over its equations, and against the package of its authors."""

from __future__ import annotations

from typing import Any

import pipelines
import pytest
import tomesd
import torch
from pydantic import ValidationError
from torch import Tensor

import regrow
from regrow import Recovery, ToMeSD
from regrow.core.recipe import CallInfo, recipe_of
from regrow.recover.space import keep_merged, recover
from regrow.tokens.grid import Grid

SHAPES = [(8, 8), (6, 10), (7, 5), (2, 2)]


def selected(config: ToMeSD, x: Tensor, grid: Grid, ratio: float) -> Any:
    rule = recipe_of(config).sites
    assert rule is not None
    call = CallInfo(x.shape[0], False, (), torch.Generator().manual_seed(config.seed))
    prepared = rule.prepare([grid], call)[grid]
    return rule.select(x, grid, grid.pruned(ratio), prepared, call)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
def test_merging_is_that_of_plain_loops(shape: tuple[int, int], ratio: float) -> None:
    grid = Grid(*shape)
    x = torch.randn(2, grid.tokens, 12, generator=torch.Generator().manual_seed(1))
    selection = selected(ToMeSD(ratio=ratio, random=False), x, grid, ratio)
    merged, back = keep_merged(x, selection), recover(keep_merged(x, selection), selection)
    for b in range(2):
        unit = torch.nn.functional.normalize(x[b].double(), dim=-1)
        into = [r * grid.width + c for r in range(0, grid.height, 2) for c in range(0, grid.width, 2)]
        others = [n for n in range(grid.tokens) if n not in into]
        best = {n: max(into, key=lambda d, n=n: float(unit[n] @ unit[d])) for n in others}
        gone = sorted(others, key=lambda n: -float(unit[n] @ unit[best[n]]))[: grid.pruned(ratio)]
        mean = {d: x[b, [d, *(n for n in gone if best[n] == d)]].mean(0) for d in into}
        for n in range(grid.tokens):
            expected = mean[best[n]] if n in gone else mean.get(n, x[b, n])
            torch.testing.assert_close(back[b, n], expected)
    assert merged.shape[1] == grid.tokens - grid.pruned(ratio)


@pytest.mark.parametrize("shape", SHAPES)
def test_destinations_are_one_of_each_patch_by_chance_and_the_same_for_the_batch(
    shape: tuple[int, int],
) -> None:
    grid = Grid(*shape)
    rule: Any = recipe_of(ToMeSD()).sites
    generator = torch.Generator().manual_seed(0)
    drawn = [rule.destinations(grid, generator) for _ in range(30)]
    for d in drawn:
        assert d.shape[0] == 1
        cells = [(int(n) // grid.width // 2, int(n) % grid.width // 2) for n in d[0]]
        assert len(set(cells)) == grid.patches == len(cells)
    if grid.tokens > grid.patches:
        assert len({tuple(d[0].tolist()) for d in drawn}) > 1
    again = torch.Generator().manual_seed(0)
    assert torch.equal(rule.destinations(grid, again), drawn[0])


def test_without_chance_it_is_the_authors_package(pipe: Any) -> None:
    """Both take the top-left token of each patch then; the levels merged are the same."""
    expected = pipelines.generate(pipe)
    tomesd.apply_patch(pipe, ratio=0.5, max_downsample=1, use_rand=False)
    theirs = pipelines.generate(pipe)
    tomesd.remove_patch(pipe)
    assert torch.equal(pipelines.generate(pipe), expected)
    with regrow.apply(pipe, ToMeSD(ratio=0.5, random=False)):
        ours = pipelines.generate(pipe)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(ours, expected, rtol=1e-3, atol=1e-3)


def test_pruning_instead_of_merging_gives_another_picture(pipe: Any) -> None:
    out = []
    for recovery in Recovery:
        with regrow.apply(pipe, ToMeSD(recovery=recovery)):
            out.append(pipelines.generate(pipe))
    assert not torch.equal(*out)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"ratio": 0.8}, "ratio: 0.8 is not allowed"),
        ({"ratio": -0.1}, "ratio"),
        ({"ratio": float("nan")}, "ratio"),
        ({"patch": 1}, "patch"),
        ({"self_attention": False}, "switch one on"),
        ({"max_downsample": 3}, "max_downsample"),
    ],
)
def test_wrong_fields_are_named(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        ToMeSD(**fields)
