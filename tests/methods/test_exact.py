"""The option to choose the tokens of half-precision features as those of float32 are chosen."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from regrow import FULL, BaseChoice, DaTo, Schedule, SiTo, ToMeSD
from regrow.core.recipe import CallInfo, recipe_of
from regrow.tokens.grid import Grid

GRID = Grid(16, 16)
PLAN = Schedule(depth=(FULL,), ratio=(0.5,))


@pytest.mark.parametrize(
    "config",
    [
        SiTo(ratio=0.5, base=BaseChoice.TOP_LEFT, exact=True),
        SiTo(ratio=0.5, base=BaseChoice.TOP_LEFT, exact=True, nearby=True),
        DaTo(schedule=PLAN, exact=True),
        DaTo(schedule=PLAN, exact=True, from_all_kept=True),
        ToMeSD(exact=True),
    ],
    ids=lambda config: type(config).__name__,
)
def test_exact_choices_of_half_precision_are_those_of_float32(config: Any) -> None:
    g = torch.Generator().manual_seed(0)
    x = (4 * torch.randn(1, 1, 32, generator=g) + torch.randn(2, 256, 32, generator=g)).bfloat16()

    def choice(config: Any, x: torch.Tensor) -> Any:
        rule: Any = recipe_of(config).sites
        call = CallInfo(len(x), False, (), torch.Generator().manual_seed(0))
        return rule.select(x, GRID, GRID.pruned(0.5), rule.prepare([GRID], call).get(GRID), call)

    exact, expected = choice(config, x), choice(config, x.float())
    assert torch.equal(exact.kept, expected.kept)
    assert torch.equal(exact.source, expected.source)
    rounded = choice(config.model_copy(update={"exact": False}), x)
    assert not torch.equal(rounded.source, expected.source)
