"""ToMeSD: token merging for Stable Diffusion (arXiv 2303.17604).

Of each patch one token, by chance, is a destination. The other tokens most similar to a destination are
averaged into it before a layer, and take a copy of its output after it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import model_validator
from torch import Tensor

from regrow.core.recipe import CallInfo, Features, Level, Recipe, Recovery, Where, check_ratio, recipe_of
from regrow.fields import Ratio, Seed, Side
from regrow.methods.base import UNETS, About, DenoiserKind, MethodConfig, Role, register
from regrow.methods.pruning import TokenRule
from regrow.schedule import Schedule
from regrow.space import Space, Variable, free
from regrow.tokens.grid import Grid, best_of_patch, tokens_of_patch
from regrow.tokens.scores import random_score
from regrow.tokens.select import Selection, prune_similar


@register
class ToMeSD(MethodConfig):
    """ToMeSD's configuration; defaults are the paper's.

    Args:
        ratio: share r of the tokens that are merged away, in every call; r <= 1 - 1 / patch**2.
        patch: side of the patches that give one destination each (the paper: 2).
        random: draw the destinations anew in every call (the authors: in every layer; drawing inside a
            layer would break compiled blocks); else the top-left token of each patch.
        recovery: merge (the paper), or prune and copy.
        self_attention: merge in self-attention (the paper's default).
        cross_attention: merge the queries of the cross-attention.
        feed_forward: merge in the feed-forward.
        max_downsample: deepest level that is merged (the default: the finest with attention).
        exact: measure the similarity of half-precision features in float32, as for a float32 model; off,
            since it takes more than a hundredth of a call (docs/pruning.md).
        seed: seed of the run's generator.

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
    version: Literal[1] = 1
    ratio: Ratio = 0.5
    patch: Side = 2
    random: bool = True
    recovery: Recovery = Recovery.MEAN
    self_attention: bool = True
    cross_attention: bool = False
    feed_forward: bool = False
    max_downsample: Level = "top"
    exact: bool = False
    seed: Seed = 0

    @model_validator(mode="after")
    def _allowed(self) -> ToMeSD:
        check_ratio(self.ratio, self.patch)
        if not (self.self_attention or self.cross_attention or self.feed_forward):
            raise ValueError(
                "self_attention, cross_attention, feed_forward: all are off, so nothing is merged; "
                "switch one on"
            )
        return self

    @classmethod
    def space(cls, calls: int) -> Space:
        """A ratio of .1 to .7, for all calls."""
        return free((Variable("ratio", (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)),), cls)


@dataclass(frozen=True)
class _Rule(TokenRule):
    """ToMeSD's bipartite matching."""

    config: ToMeSD

    @property
    def where(self) -> Where:
        c = self.config
        return Where(
            c.self_attention,
            c.cross_attention,
            c.feed_forward,
            c.max_downsample,
            Features.BLOCK_INPUT,
            c.recovery,
        )

    @property
    def patch(self) -> int:
        return self.config.patch

    @property
    def seed(self) -> int:
        return self.config.seed

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
