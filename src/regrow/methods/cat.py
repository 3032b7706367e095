"""CAT Pruning: cluster-aware token pruning for diffusion transformers (arXiv 2502.00433)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from typing_extensions import Self

from regrow.core.recipe import CallInfo, Recipe, recipe_of
from regrow.fields import MOST_CALLS, Seed, Share, Weight
from regrow.methods.base import BLOCKS, About, DenoiserKind, MethodConfig, Options, Role, register
from regrow.methods.sites import SitesOf, StreamChoice, stream_of
from regrow.models.table import Layout, Site
from regrow.schedule import After, Schedule
from regrow.space import Searched
from regrow.tokens.alignment import Alignment, deciding_half
from regrow.tokens.cluster import ClusterAlgorithm, Clusters, choose_by_clusters, positions
from regrow.tokens.scores import wide


class TokenChoice(str, Enum):
    """Which tokens a call computes."""

    CLUSTERS = "clusters"
    """The paper's: by relative noise in clusters, filled up with the stalest."""
    NOISE = "noise"
    """Ablation: the largest relative noise alone."""
    ROWS = "rows"
    """Ablation: rows of tokens in turn."""


@register
class CATPruning(MethodConfig):
    """Compute a share of the image's tokens, the same through all blocks; the others keep what they had.

    1. The first ``t0`` calls are full.
    2. Relative noise of a token: its predicted noise less that of the reference call, ``n_t - n_t0``.
    3. Clusters: once, by k-means of relative noise with position.
    4. Tokens (Algorithm 2): in the clusters where it is largest, those whose relative noise is largest, and
       the stalest of all others, by ``f_n = a f_(n-1) + I_n``.
    5. The others' keys and values, and their predicted noise, are those of the last call that computed
       them.

    It works on Stable Diffusion 3, PixArt, DiT and Flux. Flux needs its stock attention processors (no
    IP-Adapter), and calls with the tokens of several pictures (Kontext) are computed in full, with a
    warning. With DeepCache's caching of blocks: `Combined`.

    Defaults are the paper's, or the released code's where it is silent. The preset ``released`` is the
    code's choice, except that it always computes as many tokens as were asked for: in the code a token may
    be chosen twice, and then fewer are computed.

    Args:
        alpha: share of the image's tokens that a call computes (the paper: 0.3).
        t0: full calls at the beginning of a generation, at least 2 (the paper: 8).
        choice: which tokens are computed.
        algorithm: how the clusters choose them.
        clusters: number of clusters n (the paper: 20).
        decay: a of the staleness ``f_n = a f_(n-1) + I_n`` (the code: 0.5).
        cluster_share: share of the computed tokens that the clusters give after the first choice; the
            others are the stalest (the code: 0.25).
        balance: share of a cluster's tokens that are its stalest instead of its most moved. Section 3.4 of
            the paper chooses by both and gives no number; Algorithm 2 leaves that out for simplicity (0);
            the code has 0.5.
        noise_scale: weight of the noise beside the position in the clusters' features (the paper: 1; the
            code: 0.05).
        absolute_noise: make the clusters of the noise itself (the code), not of the relative noise.
        alignment: whose tokens both halves of a guided batch compute (the code: the conditional half's).
        seed: of the run's generator, which draws where k-means begins.

    Raises:
        pydantic.ValidationError: naming the field, the value and what is allowed.
    """

    ABOUT: ClassVar[About] = About(
        title="CAT Pruning",
        what="compute the tokens that change, in clusters",
        models=BLOCKS,
        paper="arXiv 2502.00433",
        note="also with block caching: cat:0.3+deepcache:2",
        default="paper",
        value="alpha",
        role=Role.CHOOSES,
        measured={DenoiserKind.TRANSFORMER: ("0.5",)},
        traced={DenoiserKind.TRANSFORMER: ("0.5",)},
        place=40,
    )

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {},
        "released": {
            "algorithm": ClusterAlgorithm.RELEASED,
            "balance": 0.5,
            "noise_scale": 0.05,
            "absolute_noise": True,
        },
    }

    method: Literal["cat"] = "cat"
    alpha: Annotated[float, Searched((0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8))] = Field(0.3, ge=1e-6, le=1)
    t0: Annotated[int, Searched((2, 4, 6, 8, 10, 12))] = Field(8, ge=2, le=MOST_CALLS)
    choice: TokenChoice = TokenChoice.CLUSTERS
    algorithm: ClusterAlgorithm = ClusterAlgorithm.PRINTED
    clusters: int = Field(20, ge=1, le=1024)
    decay: float = Field(0.5, ge=0, lt=1)
    cluster_share: Annotated[Share, Searched((0.0, 0.25, 0.5, 0.75, 1.0))] = 0.25
    balance: Annotated[Share, Searched((0.0, 0.25, 0.5, 0.75, 1.0))] = 0.0
    noise_scale: Weight = 1.0
    absolute_noise: bool = False
    alignment: Alignment = Alignment.CONDITIONAL
    seed: Seed = 0

    @classmethod
    def options(cls) -> tuple[str, ...]:
        """Presets and a ratio: the share of tokens that is not computed."""
        return "preset", "ratio"

    @classmethod
    def from_options(cls, options: Options, calls: int) -> Self:
        """The configuration of these options."""
        changes = {} if options.ratio is None else {"alpha": 1 - options.ratio}
        return cls(**changes) if options.preset is None else cls.preset(options.preset, **changes)


@dataclass
class Memory:
    """What CAT Pruning remembers of a generation.

    Args:
        reference: ``n_t0``, the output one call before the last full one: ``(B, N, D)``.
        staleness: ``f_n`` of each token ``(B, N)``; small is stale.
        clusters: None if tokens are chosen without.
        calls: calls for which tokens were chosen so far.
        chosen: the tokens of the last one of all blocks ``(B, count)``; None before the first.
    """

    reference: Tensor
    staleness: Tensor
    clusters: Clusters | None
    calls: int = 0
    chosen: Tensor | None = None


@dataclass
class State:
    """What is remembered of a branch of guidance: nothing before tokens are first chosen."""

    memory: Memory | None = None


@dataclass(frozen=True)
class _Rule(SitesOf[CATPruning]):
    """CAT Pruning before a model is known."""

    @property
    def full_calls(self) -> int:
        """The first t0."""
        return self.config.t0

    def on(self, denoiser: nn.Module, layout: Layout) -> CATDecider:
        """The method at work on a transformer.

        Raises:
            UnsupportedModelError: if a call of it can't compute some of its tokens only.
        """
        return CATDecider(self.config, (stream_of(denoiser, layout),))


@dataclass(frozen=True)
class CATDecider(StreamChoice[CATPruning]):
    """CAT Pruning's choice of tokens."""

    def begin(self, memory: State | None = None) -> State:
        """A generation's calls go by what the first of them gave."""
        return memory or State()

    def choose(
        self, memory: State, seen: None, site: Site, x: Tensor, count: int | None, info: CallInfo
    ) -> Tensor:
        """The tokens of the clusters that moved most, and the stalest.

        A call that leaves out blocks computes the tokens of the last one that left out none, for which what
        the blocks last added is newest, and makes no token fresh. Before the first such call tokens are
        chosen for each.
        """
        c, known = self.config, memory.memory
        assert count is not None
        if info.cached and known is not None and known.chosen is not None:
            return known.chosen
        halves = info.guided and c.alignment is not Alignment.OFF
        # Half precision could not tell norms apart.
        both = (n.to(wide(n)) for n in info.outputs)
        before, now = (deciding_half(n, c.alignment, info.conditional_first) if halves else n for n in both)
        if known is None:
            known = memory.memory = self._begin(before, now, info)
        chosen = self._chosen(known, now, count, info)
        tokens = chosen.sort(1).values.repeat(2 if halves else 1, 1)
        known.calls += 1
        if not info.cached:
            fresh = torch.ones_like(chosen, dtype=known.staleness.dtype)
            known.staleness.mul_(c.decay).scatter_add_(1, chosen, fresh)
            known.chosen = tokens
        return tokens

    def _begin(self, before: Tensor, now: Tensor, info: CallInfo) -> Memory:
        """Clusters are made once, of the noise with its position; the reference is the call before."""
        c, grid = self.config, info.grid
        assert grid is not None
        staleness = torch.zeros(now.shape[:2], device=now.device, dtype=now.dtype)
        if c.choice is not TokenChoice.CLUSTERS:
            return Memory(before, staleness, None)
        noise = now if c.absolute_noise else now - before
        features = noise * c.noise_scale + positions(grid, now.shape[2], now.device)
        return Memory(before, staleness, Clusters.of(features, grid, c.clusters, info.generator))

    def _chosen(self, known: Memory, now: Tensor, count: int, info: CallInfo) -> Tensor:
        """``(B, count)`` different tokens."""
        c, grid = self.config, info.grid
        assert grid is not None
        if c.choice is TokenChoice.ROWS:
            every = (torch.arange(count, device=now.device) + known.calls * count) % grid.tokens
            return every.repeat(len(now), 1)
        difference = now - known.reference
        if known.clusters is None:
            moved: Tensor = difference.norm(dim=2)
            return moved.topk(count, dim=1).indices
        return choose_by_clusters(
            difference,
            known.staleness,
            known.clusters,
            grid,
            count,
            algorithm=c.algorithm,
            scale=c.noise_scale,
            share=c.cluster_share,
            balance=c.balance,
            begins=known.chosen is None,
        )


@recipe_of.register
def _(config: CATPruning) -> Recipe:
    return Recipe(After(config.t0, Schedule.constant(1 - config.alpha)), sites=_Rule(config))
