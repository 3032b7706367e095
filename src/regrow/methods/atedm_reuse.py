"""AT-EDM on transformers, with a cache, as the CAT Pruning paper ran it (arXiv 2502.00433)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from regrow.core.recipe import CallInfo, Recipe, recipe_of
from regrow.methods.atedm import ATEDM, HINT, Copying, EarlyLess, Restored, importance
from regrow.methods.sites import SitesOf, StreamChoice, stream_of
from regrow.models.table import Layout, Site

# A cache has to be filled, and the engine asks for two outputs before a call leaves tokens out.
FULL_CALLS = 2


@dataclass(frozen=True)
class Reusing(SitesOf[ATEDM]):
    """The tokens that a call of a transformer computes, before one is known."""

    @property
    def full_calls(self) -> int:
        """Two."""
        return FULL_CALLS

    def on(self, denoiser: nn.Module, layout: Layout) -> _Choosing:
        """The method at work on a transformer.

        Raises:
            UnsupportedModelError: if a call of it can't compute some of its tokens only.
            ValueError: if no block comes behind the one whose attention is read.
        """
        return _Choosing(self.config, (stream_of(denoiser, layout, self.config.block, HINT),))


@dataclass
class _Scores:
    """How important the tokens were in the last call that left out no block ``(B, N)``."""

    last: Tensor | None = None


@dataclass(frozen=True)
class _Choosing(StreamChoice[ATEDM]):
    """The tokens that a call computes in the blocks behind the one whose attention is read."""

    def begin(self, memory: _Scores | None = None) -> _Scores:
        """What is known stays."""
        return memory or _Scores()

    def choose(
        self, memory: _Scores, seen: None, site: Site, x: Tensor, count: int | None, info: CallInfo
    ) -> Tensor:
        """The most important tokens; their importance is remembered.

        A call that leaves out blocks goes by that of the last one that left out none: for its tokens what
        the blocks last added is newest.
        """
        assert count is not None
        known = memory.last if info.cached else None
        score = importance(self.config, info)[1] if known is None else known
        memory.last = memory.last if info.cached else score
        return score.topk(count, dim=1).indices.sort(1).values


@recipe_of.register
def _(config: ATEDM) -> Recipe:
    reuses = config.recovery is Restored.REUSE
    plan = EarlyLess(config.early, config.early_ratio, config.ratio, FULL_CALLS if reuses else 0)
    return Recipe(plan, sites=Reusing(config) if reuses else Copying(config))
