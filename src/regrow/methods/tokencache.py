"""TokenCache: token caching for diffusion transformers (arXiv 2409.18523)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field
from torch import Tensor, nn

from regrow.core.decision import ALL, SKIP, Adapter, Decider, Decision, Entered, Some, View
from regrow.core.recipe import Attention, CallInfo, Recipe, recipe_of
from regrow.fields import MOST_BLOCKS, MOST_CALLS, Calls, Seed, Share, Weight
from regrow.methods.base import About, MethodConfig, register
from regrow.methods.sites import Ages, SitesOf
from regrow.models.errors import UnsupportedModelError
from regrow.models.layers import LayerKind
from regrow.models.table import Layout, Site, Spans, in_sequences
from regrow.predictors import CachePredictor, predictor_for, read_adapters
from regrow.recover.time import REUSE, RecoveryField
from regrow.schedule import SITES, Schedule, Spaced
from regrow.space import Searched
from regrow.tokens.grid import Grid
from regrow.tokens.scores import best_of_cell, influence_on_others, random_score
from regrow.tokens.select import unlike_destinations
from regrow.tokens.shares import Table, i_steps, shares_of_call

PATCH = 2
"""Side of the cells that ToCa and ToMe spread tokens over."""


class Spacing(str, Enum):
    """Where the I-steps are."""

    ADAPTIVE = "adaptive"
    """By Eq. 13."""
    UNIFORM = "uniform"
    """Evenly spread."""
    REVERSE = "reverse"
    """Those of Eq. 13, mirrored in time."""


class Choice(str, Enum):
    """What says which tokens a block computes (table VI)."""

    PREDICTOR = "predictor"
    """The cache predictor."""
    RANDOM = "random"
    """Chance."""
    TOCA = "toca"
    """ToCa's scores."""
    TOME = "tome"
    """Similarity, as tokens are merged: those that are least like the destination of their patch."""


class Counts(str, Enum):
    """Where the share of the tokens that a block computes comes from."""

    TABLE = "table"
    """From the means over many calls."""
    DATA = "data"
    """From the call itself, as in the paper: shapes depend on data, and the device is waited for."""


@register
class TokenCache(MethodConfig):
    """Compute a block's update of some tokens; the others get the update that was computed last (Eq. 6).

    A block's update of a token is what it adds to it. Some calls, the I-steps, are full; in the others, the
    P-steps, a trained cache predictor (`regrow.predictors.CachePredictor`) says which tokens are computed,
    from those that enter the first block.

    1. Tokens: of all its values alpha ``(L, N)``, the highest ``1 - r`` stand for updates to compute
       (section III-B).
    2. Blocks: all samples of a batch compute the same share of a block's tokens, ``r_l``, and each sample
       those of the highest alpha in the block (III-C). Here the shares come from a table that is made after
       training, so that the shapes of a call depend on the plan alone; `Counts.DATA` takes them from the
       call, as the paper does.
    3. Steps: I-steps are where the accumulated ``exp(beta mean(alpha_t))`` passes even parts of its sum
       (III-D, Eq. 13). The first step always is one.

    The last K blocks are computed in every call. Keys and values of tokens that a block does not compute
    are those of its last computation, which gives the paper's MACs. The predictor's own MACs are counted as
    those of choosing tokens. To train a predictor: ``regrow train predictor``.

    Some video models have blocks for the tokens of a frame, and blocks for those of a place in all frames.
    The predictor sees the frames, which the first block is given. A block of the second kind computes an
    equal number of frames at every place.

    Defaults but beta are the paper's for DiT-XL/2 256 in 50 steps.

    Args:
        predictor: the file of a trained predictor, ``NAME.safetensors``; None for the one that is bundled
            with the model; ``"untrained"`` for one that has learned nothing, to measure time.
        full_steps: number of I-steps (the paper: 50 of 250, 12 of 50, 9 of 20, 6 of 10 at 256 pixels; 21 of
            50 and 10 of 20 at 512).
        ratio: r, share of all updates that are not computed in P-steps; 0 makes every call full.
        last_blocks: K, blocks at the end that are computed in every call (the paper: 4; 2 of 250 steps).
        beta: of Eq. 13; what suits depends on how far alpha goes apart, that is on the predictor (the
            paper's, in the presets: -8000 for 50 steps, -6000 for 250, -4000 for 20, -2000 for 10). 0 is
            ours: it spreads I-steps evenly.
        spacing: where the I-steps are.
        choice: what says which tokens a block computes.
        counts: where a block's share comes from; only a predictor's choice has other than even ones.
        recovery: how an update follows from those computed, where it is not (the paper: the last is
            reused).
        staleness: what is added to a token's score for each P-step since it was computed last, so that no
            token is left out for long (the paper: 0; ToCa's s3, for any choice). 1 takes turns.
        seed: of random choices.
        lora: the file of trained updates of the last K blocks, ``NAME.safetensors``, for P-steps.

    Raises:
        pydantic.ValidationError: naming the field, the value and what is allowed.
    """

    ABOUT: ClassVar[About] = About(
        title="TokenCache",
        what="a trained predictor says which tokens each block computes; the others get its last update",
        models="transformers: DiT, PixArt, Latte, Wan",
        paper="arXiv 2409.18523",
        note="needs a predictor trained for the model (regrow train predictor); on the bundled model of "
        "pictures its choice gains nothing over chance",
        default="even",
        value="full_steps",
        place=30,
    )

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "even": {},
        "dit-256-250": {"full_steps": 50, "beta": -6000, "last_blocks": 2},
        "dit-256-50": {"beta": -8000},
        "dit-256-20": {"full_steps": 9, "beta": -4000},
        "dit-256-10": {"full_steps": 6, "beta": -2000},
        "dit-512-50": {"full_steps": 21, "beta": -4000},
        "dit-512-20": {"full_steps": 10, "beta": -2000},
    }

    method: Literal["tokencache"] = "tokencache"
    predictor: str | None = None
    full_steps: Annotated[Calls, Searched(lambda calls: range(1, max(calls // 2, 1) + 1))] = 12
    ratio: Annotated[Share, Searched((0.5, 0.6, 0.7, 0.8, 0.9, 1.0))] = 0.9
    last_blocks: Annotated[int, Searched((0, 1, 2, 3, 4))] = Field(4, ge=0, lt=MOST_BLOCKS)
    beta: float = Field(0.0, ge=-1e6, le=1e6, allow_inf_nan=False)
    spacing: Spacing = Spacing.ADAPTIVE
    choice: Choice = Choice.PREDICTOR
    counts: Counts = Counts.TABLE
    recovery: RecoveryField = REUSE
    staleness: Weight = 0.0
    seed: Seed = 0
    lora: str | None = None


def full_calls(config: TokenCache, table: Table | None, calls: int) -> set[int]:
    """The I-steps of a generation of so many calls."""
    if table is None or config.spacing is Spacing.UNIFORM:
        return i_steps(np.zeros(calls), config.full_steps, 0.0)
    means = table.means(calls)
    if config.spacing is Spacing.REVERSE:
        means = means[::-1]
    return i_steps(means, config.full_steps, config.beta)


@dataclass(frozen=True)
class _Rule(SitesOf[TokenCache]):
    """TokenCache before a model is known."""

    def on(self, denoiser: nn.Module, layout: Layout) -> TokenCacheDecider:
        """The method at work on a transformer whose blocks take and return tokens.

        Raises:
            UnsupportedModelError: if its blocks don't.
            ValueError: if it has no more than K blocks, or there is no predictor for it.
        """
        c = self.config
        sites = layout.block_sites
        if not sites or not all(site.able for site in sites):
            raise UnsupportedModelError(
                f"model: {type(denoiser).__name__} has no blocks that can compute some of their tokens by "
                "themselves; TokenCache works on DiT, PixArt, Latte and Wan"
            )
        if c.last_blocks >= len(sites):
            raise ValueError(
                f"last_blocks: {c.last_blocks} is not allowed, it must be < {len(sites)}, the blocks that "
                f"this {type(denoiser).__name__} has"
            )
        predictor, table = None, None
        if c.choice is Choice.PREDICTOR:
            predictor, table = predictor_for(denoiser, len(sites), c.predictor, c.seed)
        adapters = (
            {} if c.lora is None else read_adapters(Path(c.lora), denoiser, len(sites), c.last_blocks)
        )
        return TokenCacheDecider(c, sites[: len(sites) - c.last_blocks], predictor, table, adapters)


@dataclass(frozen=True, eq=False)
class TokenCacheDecider(Decider):
    """TokenCache at work.

    Args:
        config: its configuration.
        sites: the blocks that it decides for.
        predictor: None if tokens are chosen otherwise.
        table: of the predictor; None if it has learned nothing.
        updates: of the last blocks.
    """

    config: TokenCache
    sites: tuple[Site, ...]
    predictor: CachePredictor | None
    table: Table | None
    updates: Mapping[str, Adapter]
    _plans: dict[View, Mapping[str, Decision]] = field(default_factory=dict, init=False)

    @property
    def adapters(self) -> Mapping[str, Adapter]:
        return self.updates

    @property
    def observes(self) -> frozenset[LayerKind]:
        toca = self.config.choice is Choice.TOCA
        return frozenset({LayerKind.SELF_ATTENTION} if toca else ())

    def plan(self, view: View) -> Mapping[str, Decision]:
        """In I-steps all; else of each block ``r_l`` of the tokens (section III-C)."""
        # Branches and generations of the run ask for the same.
        if view not in self._plans:
            self._plans[view] = self._planned(view)
        return self._plans[view]

    def _planned(self, view: View) -> Mapping[str, Decision]:
        if view.index in full_calls(self.config, self.table, view.total):
            return {site.name: ALL for site in self.sites}
        ratio = self.config.ratio
        shares: tuple[float | None, ...] = (1 - ratio,) * len(self.sites)
        if self._counts_data:
            shares = (None,) * len(self.sites)
        elif self.table is not None:
            shares = self.table.shares(view.index / view.total, len(self.sites), ratio)
        return {
            site.name: SKIP if share is not None and share <= 0 else Some(share, site.name)
            for site, share in zip(self.sites, shares, strict=True)
        }

    @property
    def _counts_data(self) -> bool:
        """Whether shares come from the call itself; without data there is nothing to take them from."""
        predictor, data = self.predictor, self.config.counts is Counts.DATA
        return data and predictor is not None and not next(predictor.parameters()).is_meta

    def begin(self, memory: Ages | None = None) -> Ages:
        """How often each token was reused, and what ToCa alone needs."""
        return Ages()

    def observe(self, memory: Ages, site: Site, attention: Attention) -> None:
        """ToCa's s1."""
        query, key, bias = attention.query, attention.key, attention.bias
        memory.attended[site.block] = influence_on_others(query, key, attention.tokens, bias=bias)

    def look(self, memory: Ages, entered: Entered, info: CallInfo) -> _Seen | None:
        """The predictor's alpha (section III-B)."""
        if self.predictor is None:
            return None
        alpha = self.predictor.of_samples(entered, info.batch)[..., : len(self.sites)]
        if self.config.counts is Counts.TABLE or alpha.is_meta:
            return _Seen(alpha, {})
        shares = shares_of_call(alpha, self.config.ratio)
        return _Seen(alpha, dict(zip((s.name for s in self.sites), shares, strict=True)))

    def choose(
        self, memory: Ages, seen: _Seen | None, site: Site, x: Tensor, count: int | None, info: CallInfo
    ) -> Tensor:
        """The tokens of the highest score in the block."""
        if count is None:
            assert seen is not None
            count = round(seen.shares[site.name] * x.shape[1])
        reused = memory.of(site.name, x.shape[0], x.shape[1], x.device)
        score = self._score(memory, seen, site, x, info) + self.config.staleness * reused
        return memory.choose(site.name, score, count)

    def _score(self, memory: Ages, seen: _Seen | None, site: Site, x: Tensor, info: CallInfo) -> Tensor:
        """``(B, N)``: high where a token should be computed."""
        sequences, tokens, channels = x.shape
        if seen is not None:
            return in_sequences(seen.alpha[..., site.index], site.spans, sequences)
        if self.config.choice is Choice.RANDOM:
            chance = random_score(sequences // info.batch * tokens, info.generator).expand(info.batch, -1)
            return chance.reshape(sequences, tokens)
        grid = _grid(site, tokens, info)
        if self.config.choice is Choice.TOME:
            frames = x.reshape(-1, grid.tokens, channels)
            return unlike_destinations(frames, grid, info.generator).view(sequences, tokens)
        score = 0.25 * (memory.reused[site.name] / self.config.full_steps)
        if site.block in memory.attended:
            score = score + memory.attended[site.block]
        return score + 0.6 * best_of_cell(score.view(-1, grid.tokens), grid).view(sequences, tokens)


@dataclass(frozen=True)
class _Seen:
    """What the predictor says in a call.

    Args:
        alpha: ``(B, N, L)``; of a video, N are the tokens of all frames.
        shares: by block, the share of the tokens that it computes, where that depends on data.
    """

    alpha: Tensor
    shares: Mapping[str, float]


def _grid(site: Site, tokens: int, info: CallInfo) -> Grid:
    """The grid of a site's tokens: of a frame, or the frames of one place in a row."""
    if site.spans is Spans.PLACE or info.grid is None:
        return Grid(1, tokens, PATCH)
    return replace(info.grid, patch=PATCH)


@recipe_of.register
def _(config: TokenCache) -> Recipe:
    if config.ratio == 0:
        return Recipe(Schedule.constant())
    # Which calls are I-steps is decided when the predictor is known; behind the first, any may be.
    return Recipe(Spaced(MOST_CALLS, SITES, recovery=config.recovery), sites=_Rule(config))
