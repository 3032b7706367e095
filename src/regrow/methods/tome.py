"""ToMeSD: token merging for Stable Diffusion (arXiv 2303.17604)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from regrow.core.recipe import CallInfo, Recipe, recipe_of
from regrow.fields import Ratio
from regrow.methods.base import UNETS, About, DenoiserKind, Role, register
from regrow.methods.pruning import LayerPruning, PatchRule
from regrow.recover.space import Recovery
from regrow.schedule import Schedule
from regrow.space import RATIOS
from regrow.tokens.grid import Grid, best_of_patch, tokens_of_patch
from regrow.tokens.scores import random_score
from regrow.tokens.select import Selection, prune_similar


@register
class ToMeSD(LayerPruning):
    """Merge in every call, and every layer by itself, tokens that are similar to a destination.

    1. Destinations: in each patch of s x s tokens one by chance.
    2. Merged tokens: of the others the ``r N`` of the largest cosine similarity to a destination.
    3. The layer computes a destination as the mean of itself and of those merged into it.
    4. Each of these takes a copy of what its destination got.

    Further fields are those of `LayerPruning`.

    Args:
        random: draw the destinations anew in every call (the authors: in every layer; drawing inside a
            layer would break compiled blocks); else the top-left token of each patch.

    Raises:
        pydantic.ValidationError: naming the field, the value and what is allowed.
    """

    ABOUT: ClassVar[About] = About(
        title="ToMeSD",
        what="merge similar tokens",
        models=UNETS,
        paper="arXiv 2303.17604",
        value="ratio",
        role=Role.CHOOSES,
        measured={DenoiserKind.UNET: ("0.5",)},
        place=30,
    )

    method: Literal["tome"] = "tome"
    ratio: Annotated[Ratio, RATIOS] = 0.5
    recovery: Recovery = Recovery.MEAN
    random: bool = True


@dataclass(frozen=True)
class _Rule(PatchRule[ToMeSD]):
    """ToMeSD's bipartite matching."""

    def prepare(self, grids: Sequence[Grid], call: CallInfo) -> Mapping[Grid, Tensor]:
        """The destinations ``(1, patches)`` of each grid: once a call, for all its layers."""
        return {grid: self.destinations(grid, call.generator) for grid in grids}

    def select(
        self, x: Tensor, grid: Grid, count: int, prepared: Tensor | None, call: CallInfo
    ) -> Selection:
        """Merge the tokens that are most similar to a destination into it."""
        assert prepared is not None
        base = prepared.to(x.device).expand(x.shape[0], -1)
        return prune_similar(x, base, grid, count, exact=self.config.exact)

    def destinations(self, grid: Grid, generator: torch.Generator) -> Tensor:
        """One token of each patch ``(1, patches)``, the same for the whole batch."""
        if self.config.random:
            return best_of_patch(random_score(grid.tokens, generator), grid)
        return tokens_of_patch(grid, generator.device)[None, :, 0]


@recipe_of.register
def _(config: ToMeSD) -> Recipe:
    return Recipe(Schedule.constant(config.ratio, name=f"constant {config.ratio:g}"), sites=_Rule(config))
