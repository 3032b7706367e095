"""CAT Pruning: cluster-aware token pruning for diffusion transformers (arXiv 2502.00433).

After ``t0`` full calls each call computes a share of the image's tokens only, through all blocks; the
others' keys and values, and their predicted noise, are those of the last call that computed them. Chosen
are tokens whose predicted noise moved most since the reference call, in the clusters where it moved most,
and those that were not computed for longest.

On Stable Diffusion 3, PixArt, DiT and Flux. Flux turns queries and keys by the positions of their tokens;
it needs its stock attention processors (no IP-Adapter), and calls with the tokens of several pictures
(Kontext) are computed in full, with a warning. With DeepCache's caching of blocks: `Combined`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from typing_extensions import Self

from regrow.core.decision import Decider, Decision, Sited, View
from regrow.core.recipe import Alignment, CallInfo, Recipe, recipe_of, some_of_stream, stream_of
from regrow.fields import MOST_CALLS, Seed, Share, Weight
from regrow.methods.base import BLOCKS, About, DenoiserKind, MethodConfig, Options, Role, register
from regrow.models.table import Layout, Site
from regrow.schedule import After, Schedule
from regrow.space import Space, Variable, free
from regrow.tokens.cluster import (
    k_means,
    neighbours,
    pool_clusters,
    pool_graph,
    positions,
    rank_within,
)
from regrow.tokens.grid import Grid
from regrow.tokens.scores import wide


class TokenChoice(str, Enum):
    """Which tokens a call computes."""

    CLUSTERS = "clusters"
    """The paper's: by relative noise in clusters, filled up with the stalest."""
    NOISE = "noise"
    """Ablation: the largest relative noise alone."""
    ROWS = "rows"
    """Ablation: rows of tokens in turn."""


class Algorithm(str, Enum):
    """How clusters are compared, and what each gives. In both, clusters are made once.

    On the bundled transformer neither is clearly better (docs/quality-transformer.md).
    """

    PRINTED = "printed"
    """Algorithm 2 of the paper. A cluster's value is pooled from relative noise plus position, over the
    cluster and its neighbours. The first choice is by clusters alone."""
    RELEASED = "released"
    """The released code's. Positions are left out of the pooling, and neighbours after the first choice.
    The stalest of a cluster come in addition to those that moved most, and not in the first cluster."""


@register
class CATPruning(MethodConfig):
    """CAT Pruning's configuration; defaults are the paper's, or the released code's where it is silent.

    The preset ``released`` is the code's choice, except that it always computes as many tokens as were
    asked for: in the code a token may be chosen twice, and then fewer are computed.

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

    method: Literal["cat"] = "cat"
    version: Literal[1] = 1
    alpha: float = Field(0.3, ge=1e-6, le=1)
    t0: int = Field(8, ge=2, le=MOST_CALLS)
    choice: TokenChoice = TokenChoice.CLUSTERS
    algorithm: Algorithm = Algorithm.PRINTED
    clusters: int = Field(20, ge=1, le=1024)
    decay: float = Field(0.5, ge=0, lt=1)
    cluster_share: Share = 0.25
    balance: Share = 0.0
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

    @classmethod
    def space(cls, calls: int) -> Space:
        """Share computed, first full calls, and what clusters and staleness have of the tokens."""
        return free(
            (
                Variable("alpha", (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)),
                Variable("t0", (2, 4, 6, 8, 10, 12)),
                Variable("cluster_share", (0.0, 0.25, 0.5, 0.75, 1.0)),
                Variable("balance", (0.0, 0.25, 0.5, 0.75, 1.0)),
            ),
            cls,
        )


CATPruning.PRESETS = {
    "paper": CATPruning,
    "released": lambda: CATPruning(
        algorithm=Algorithm.RELEASED, balance=0.5, noise_scale=0.05, absolute_noise=True
    ),
}


@dataclass
class Memory:
    """What CAT Pruning remembers of a generation.

    Args:
        reference: ``n_t0``, the output one call before the last full one: ``(B, N, D)``.
        staleness: ``f_n`` of each token ``(B, N)``; small is stale.
        clusters: the cluster of each token ``(B, N)``, and which clusters are neighbours ``(B, n, n)``;
            None if tokens are chosen without.
        calls: calls for which tokens were chosen so far.
        chosen: the tokens of the last one of all blocks ``(B, count)``; None before the first.
    """

    reference: Tensor
    staleness: Tensor
    clusters: tuple[Tensor, Tensor] | None
    calls: int = 0
    chosen: Tensor | None = None


@dataclass
class State:
    """What is remembered of a branch of guidance: nothing before tokens are first chosen."""

    memory: Memory | None = None


@dataclass(frozen=True)
class _Rule(Sited):
    """CAT Pruning before a model is known."""

    config: CATPruning

    @property
    def seed(self) -> int:
        return self.config.seed

    @property
    def aligns(self) -> bool:
        return self.config.alignment is not Alignment.OFF

    @property
    def full_calls(self) -> int:
        return self.config.t0

    def on(self, denoiser: nn.Module, layout: Layout) -> Choosing:
        """The method at work on a transformer.

        Raises:
            UnsupportedModelError: if a call of it can't compute some of its tokens only.
        """
        return Choosing(self.config, (stream_of(denoiser, layout),))


@dataclass(frozen=True)
class Choosing(Decider):
    """CAT Pruning's choice of tokens.

    Args:
        config: its configuration.
        sites: the way of the tokens through the blocks.
    """

    config: CATPruning
    sites: tuple[Site, ...]

    def plan(self, view: View) -> Mapping[str, Decision]:
        """The share alpha of the tokens; the first t0 calls are full in any case."""
        return some_of_stream(view.step.ratio)

    def begin(self, memory: State | None = None) -> State:
        """A generation's calls go by what the first of them gave."""
        return memory or State()

    def choose(
        self, memory: State, seen: None, site: Site, x: Tensor, count: int | None, info: CallInfo
    ) -> Tensor:
        """The tokens of the clusters that moved most, and the stalest; see `select`."""
        assert info.grid is not None
        assert count is not None
        tokens, memory.memory = self.select(memory.memory, info.grid, count, info)
        return tokens

    def select(
        self, memory: Memory | None, grid: Grid, count: int, call: CallInfo
    ) -> tuple[Tensor, Memory]:
        """The tokens to compute ``(B, count)``, ascending, and what to remember.

        A call that leaves out blocks computes the tokens of the last one that left out none, for which what
        the blocks last added is newest, and makes no token fresh. Before the first such call tokens are
        chosen for each.
        """
        c = self.config
        if call.cached and memory is not None and memory.chosen is not None:
            return memory.chosen, memory
        halves = call.guided and c.alignment is not Alignment.OFF
        # Half precision could not tell norms apart.
        both = (n.to(wide(n)) for n in call.outputs)
        before, now = (one_half(n, c.alignment, call) if halves else n for n in both)
        if memory is None:
            memory = self._begin(before, now, grid, call.generator)
        moved = (now - memory.reference).norm(dim=2)
        if c.choice is TokenChoice.ROWS:
            first = memory.calls * count
            every = (torch.arange(count, device=now.device) + first) % grid.tokens
            chosen = every.repeat(len(now), 1)
        elif c.choice is TokenChoice.NOISE:
            chosen = moved.topk(count, dim=1).indices
        else:
            assert memory.clusters is not None
            chosen = self._of_clusters(memory, *memory.clusters, now, moved, grid, count)
        tokens = chosen.sort(1).values.repeat(2 if halves else 1, 1)
        memory.calls += 1
        if not call.cached:
            memory.staleness.mul_(c.decay).scatter_add_(1, chosen, torch.ones_like(moved))
            memory.chosen = tokens
        return tokens, memory

    def _begin(self, before: Tensor, now: Tensor, grid: Grid, generator: torch.Generator) -> Memory:
        """Clusters are made once, of the noise with its position; the reference is the call before."""
        c = self.config
        staleness = torch.zeros(now.shape[:2], device=now.device, dtype=now.dtype)
        if c.choice is not TokenChoice.CLUSTERS:
            return Memory(before, staleness, None)
        clusters = min(c.clusters, grid.tokens)
        noise = now if c.absolute_noise else now - before
        features = noise * c.noise_scale + positions(grid, now.shape[2], now.device)
        labels = k_means(features, clusters, generator)
        return Memory(before, staleness, (labels, neighbours(labels, grid, clusters).to(now.dtype)))

    def _of_clusters(
        self,
        memory: Memory,
        labels: Tensor,
        touching: Tensor,
        now: Tensor,
        moved: Tensor,
        grid: Grid,
        count: int,
    ) -> Tensor:
        """Tokens of the clusters that moved most, then the stalest of the others: ``(B, count)``."""
        c, clusters = self.config, touching.shape[1]
        begins = memory.chosen is None
        share = count if begins else int(count * c.cluster_share)
        value = self._value(memory, labels, touching, now, grid, begins)
        cluster = rank_within(value, torch.zeros_like(value, dtype=torch.long)).gather(1, labels)
        rank, given = self._given(memory, labels, cluster, moved, share, begins)
        key = cluster * grid.tokens + rank + torch.where(given, 0, clusters * grid.tokens)
        first = key.topk(share, dim=1, largest=False).indices
        stale = memory.staleness.scatter(1, first, torch.inf)
        # Of equally stale tokens those that moved most come first.
        by_moved = moved.argsort(stable=True, dim=1, descending=True)
        rest = stale.gather(1, by_moved).argsort(stable=True, dim=1)[:, : count - share]
        return torch.cat([first, by_moved.gather(1, rest)], 1)

    def _value(
        self, memory: Memory, labels: Tensor, touching: Tensor, now: Tensor, grid: Grid, begins: bool
    ) -> Tensor:
        """How much each cluster moved ``(B, n)``."""
        algorithm = self.config.algorithm
        features = now - memory.reference
        if algorithm is Algorithm.PRINTED:
            place = positions(grid, now.shape[2], now.device)
            features = features * self.config.noise_scale + place
        pooled = pool_clusters(features, labels, touching.shape[1])
        alone = algorithm is Algorithm.RELEASED and not begins
        return (pooled if alone else pool_graph(pooled, touching)).norm(dim=2)

    def _given(
        self, memory: Memory, labels: Tensor, cluster: Tensor, moved: Tensor, share: int, begins: bool
    ) -> tuple[Tensor, Tensor]:
        """The place of each token in its cluster, and whether it is one that the cluster gives: ``(B, N)``.

        Args:
            memory: what is remembered.
            labels: the cluster of each token.
            cluster: the place of that cluster among all, 0 for the one that moved most.
            moved: how much each token moved.
            share: how many tokens all clusters give.
            begins: whether no token is staler than another yet.
        """
        by_moved = rank_within(moved, labels)
        if begins:
            return by_moved, by_moved < max(share // 10, 1)
        # A fifth of the share to a cluster, and three and two times as much to the first two.
        quota = max(share // 5, 1) * (3 - cluster).clamp_min(1)
        by_stale, balance = rank_within(-memory.staleness, labels), self.config.balance
        if self.config.algorithm is Algorithm.RELEASED:
            stalest = (by_stale < (quota * balance).long()) & (cluster > 0)
            return by_moved, (by_moved < quota) | stalest
        rank = _in_turn(by_moved, by_stale, balance, labels)
        return rank, rank < quota


def _in_turn(by_moved: Tensor, by_stale: Tensor, balance: float, labels: Tensor) -> Tensor:
    """The place of each token in its cluster: by movement and by staleness in turn, by their shares."""
    if balance == 0:
        return by_moved
    if balance == 1:
        return by_stale
    turn = torch.minimum(by_moved / (1 - balance), (by_stale + 0.5) / balance)
    return rank_within(-turn, labels)


def one_half(noise: Tensor, alignment: Alignment, call: CallInfo) -> Tensor:
    """Of a guided batch ``(2 B, N, D)`` the half, or the mean of both, that decides for both."""
    unconditional, conditional = noise.chunk(2)
    if call.conditional_first:
        unconditional, conditional = conditional, unconditional
    if alignment is Alignment.MEAN:
        return (unconditional + conditional) / 2
    return conditional if alignment is Alignment.CONDITIONAL else unconditional


@recipe_of.register
def _(config: CATPruning) -> Recipe:
    return Recipe(After(config.t0, Schedule.constant(1 - config.alpha)), sites=_Rule(config))
