"""ToCa: token-wise feature caching for diffusion transformers (arXiv 2410.05317).

Every N-th call is full. In the others the attentions hand on their last output whole (as in FORA), and
each feed-forward computes the tokens of highest score again, among the last outputs of the others. The
score of a token is the paper's ``S = sum_j lambda_j s_j``: how much others attend to it (s1), how much of
the text it attends to (s2), how often it was reused since it was computed (s3), and a bonus for the best of
its neighbourhood (s4). Numbers called the released code's are those of github.com/Shenyi-Z/ToCa for DiT.

A single block of Flux makes one output of a token's attention and feed-forward, by one projection. It is
one layer here, a feed-forward, which computes that output of its tokens again. The attention in it is the
last one, as in the released code, or computed anew for the same tokens if ``self_attention`` is above 0.
There two points differ from the released code: where some of the image's tokens are computed, all of the
text's are as well, while it chooses among these too; and s1 is of norm 1 over the image's tokens in every
block. On every model its intervals between full calls also change a little along the run; here they are all
N, as in the paper. Flux needs its stock attention processors (no IP-Adapter) unless ``influence`` and
``self_attention`` are 0; calls with the tokens of several pictures (Kontext) hand on whole outputs, as FORA
does, with a warning.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import normalize
from typing_extensions import Self

from regrow.core.decision import SKIP, Decider, Decision, Sited, Some, View
from regrow.core.recipe import Alignment, Attention, CallInfo, Recipe, align, recipe_of
from regrow.fields import MOST_SIDE, Calls, Share, Weight
from regrow.methods.base import BLOCKS, About, DenoiserKind, MethodConfig, register
from regrow.models.errors import UnsupportedModelError
from regrow.models.layers import LayerKind
from regrow.models.table import Layout, Site
from regrow.recover.time import REUSE, RecoveryField, TimeRecovery
from regrow.schedule import FULL, LAYERS, Schedule, Spaced, Step
from regrow.space import Space, Variable, free, recovery_variable
from regrow.tokens.grid import Grid, best_of_patch
from regrow.tokens.scores import attention_entropy, attention_influence


@register
class ToCa(MethodConfig):
    """ToCa's configuration. The preset ``paper`` takes s1 from all queries, and each half of a guided batch
    chooses for itself; ``pixart`` has the released code's numbers for PixArt-alpha. Those for Flux have no
    preset: there double and single blocks compute different shares, which are one here.

    Args:
        interval: N, one call in so many is full (the released code: 3).
        ratio: R, share of the tokens that is cached, not computed again, in the calls that are not full;
            the mean over blocks and calls. The released code computes 0.07 times 2.5 of the tokens of a
            feed-forward; on PixArt 0.3 times 1.6; on Flux 0.1, times 0.4 in double blocks and 1.6 in single
            ones. 0 computes all of them, whatever the schedules say; 1 none, which is FORA.
        self_attention: self-attentions compute so many times the share ``1 - R``. The released code has 0.
            In a single block of Flux it says only whether: the tokens are those of ``feed_forward``.
        cross_attention: the same of attentions to the text. The released code for PixArt has 0.375 of what
            it computes in feed-forwards; 0 is ours.
        feed_forward: the same of feed-forwards.
        layer_weight: the share computed goes from ``1 + w`` times its mean in the first block to ``1 - w``
            times in the last (the released code: 0.8; 0.6 on PixArt, 0.5 on Flux).
        step_weight: it goes from ``1 - w`` times its mean in the first call to ``1 + w`` times in the last
            (the released code: 0.4; -0.9 on PixArt, 0 on Flux).
        influence: weight of s1 (the released code: 1; 0 on PixArt).
        control: weight of s2, where the model attends to the text in layers of their own (the code: 1).
        staleness: weight of s3 (the code: 0.25).
        spread: weight of s4 (the code: 0.6; 0.4 on PixArt, 0 on Flux).
        cell: side k of the neighbourhoods of s4, in tokens (the code: 2; 4 on PixArt).
        queries: s1 is taken from so many evenly spaced queries of the attention map, in full calls; None
            takes all, as the paper does. 64 is ours: little is computed beside the fused attention.
        alignment: whose scores both halves of a guided batch take. The mean is the released code's for
            PixArt; for DiT it has each half choose for itself (``OFF``).
        recovery: how a layer's output follows from those computed, where it is not computed again (the
            paper: the last one is reused).

    Raises:
        pydantic.ValidationError: naming the field, the value and what is allowed.
    """

    ABOUT: ClassVar[About] = About(
        title="ToCa",
        what="reuse attention and MLP outputs every N calls, but for the tokens of highest score in the "
        "MLPs",
        models=BLOCKS,
        paper="arXiv 2410.05317",
        note="the preset paper scores by all queries, toca:N by 64",
        default="paper",
        value="interval",
        measured={DenoiserKind.TRANSFORMER: ("3",)},
        traced={DenoiserKind.TRANSFORMER: ("3",)},
        place=70,
    )

    method: Literal["toca"] = "toca"
    version: Literal[1] = 1
    interval: Calls = 3
    recovery: RecoveryField = REUSE
    ratio: Share = 0.825
    self_attention: Weight = 0.0
    cross_attention: Weight = 0.0
    feed_forward: Weight = 1.0
    layer_weight: float = Field(0.8, ge=-1, le=1)
    step_weight: float = Field(0.4, gt=-1, lt=1)
    influence: Weight = 1.0
    control: Weight = 1.0
    staleness: Weight = 0.25
    spread: Weight = 0.6
    cell: int = Field(2, ge=1, le=MOST_SIDE)
    queries: int | None = Field(64, ge=1, le=2**20)
    alignment: Alignment = Alignment.MEAN

    @model_validator(mode="after")
    def _computes_somewhere(self) -> Self:
        if not any(self.share_of(kind) for kind in LayerKind):
            raise ValueError(
                "feed_forward: 0 is not allowed where self_attention and cross_attention are 0 as well, "
                "one of them must be > 0; use FORA to reuse all layers"
            )
        return self

    def share_of(self, kind: LayerKind) -> float:
        """What the share computed in layers of a kind is times that of the method."""
        shares = {
            LayerKind.SELF_ATTENTION: self.self_attention,
            LayerKind.CROSS_ATTENTION: self.cross_attention,
            LayerKind.FEED_FORWARD: self.feed_forward,
        }
        return shares[kind]

    @classmethod
    def space(cls, calls: int) -> Space:
        """Intervals, the share of tokens that is not computed again, and recoveries."""
        return free(
            (
                Variable("interval", tuple(range(2, 11))),
                Variable("ratio", (0.5, 0.6, 0.7, 0.825, 0.9, 1.0)),
                recovery_variable(),
            ),
            cls,
        )


ToCa.PRESETS = {
    "paper": lambda: ToCa(queries=None, alignment=Alignment.OFF),
    "pixart": lambda: ToCa(
        ratio=0.52,
        cross_attention=0.375,
        layer_weight=0.6,
        step_weight=-0.9,
        influence=0,
        spread=0.4,
        cell=4,
    ),
}


@dataclass
class Memory:
    """What is remembered of the last full call and since.

    Args:
        attended: by block, ``lambda_1 s1 + lambda_2 s2``: ``(B, N)``.
        reused: by layer, how often each token was reused since it was computed: ``(B, N)``.
    """

    attended: dict[str, Tensor] = field(default_factory=dict)
    reused: dict[str, Tensor] = field(default_factory=dict)


def influence(attention: Attention, queries: int | None) -> Tensor:
    """s1, influence on other tokens: the column sums of the self-attention map, of norm 1: ``(B, N)``."""
    sums = attention_influence(attention.query, attention.key, queries, attention.bias)
    return normalize(sums[:, : attention.tokens], dim=1)


def control(attention: Attention) -> Tensor:
    """s2, influence of the text: 1 + the entropy of the cross-attention weights, of norm 1: ``(B, N)``.

    The 1 and the norm are the released code's.
    """
    return normalize(1 + attention_entropy(attention.query, attention.key, attention.bias), dim=1)


def staleness(reused: Tensor, interval: int) -> Tensor:
    """s3, cache frequency: how often a token was reused since it was computed, over N: ``(B, N)``."""
    return reused / interval


def spread(score: Tensor, grid: Grid) -> Tensor:
    """s4, uniform spatial distribution: the score of the best token of each k x k cell, else 0: ``(B, N)``.

    That the bonus is in proportion to the score is the released code's.

    Args:
        score: ``(B, N)``.
        grid: of the tokens, with k as its patch.
    """
    best = best_of_patch(score, grid)
    return torch.zeros_like(score).scatter_(1, best, score.gather(1, best))


@dataclass(frozen=True)
class _Rule(Sited):
    """ToCa before a model is known."""

    config: ToCa

    @property
    def aligns(self) -> bool:
        return self.config.alignment is not Alignment.OFF

    def on(self, denoiser: nn.Module, layout: Layout) -> Choosing:
        """The method at work on a transformer.

        Raises:
            UnsupportedModelError: if none of its layers can compute some of its tokens.
        """
        kinds = frozenset(kind for kind in LayerKind if self.config.share_of(kind))
        sites = tuple(_restricted(site, kinds) for site in layout.layer_sites)
        name, found = type(denoiser).__name__, frozenset(site.kind for site in sites if site.able)
        if not found:
            wanted = ", ".join(sorted(kind.value for kind in kinds))
            raise UnsupportedModelError(
                f"model: {name} has no layer that can compute some of its tokens by themselves (asked for: "
                f"{wanted}); methods that only reuse, such as FORA and DeepCache, work on it"
            )
        lacking = sorted(kind.value for kind in kinds - found)
        said = f"{name} has no {' and no '.join(lacking)} that can compute some of its tokens by themselves"
        return Choosing(self.config, sites, (said,) if lacking else ())


def _restricted(site: Site, kinds: frozenset[LayerKind]) -> Site:
    """A site that computes some of its tokens if it is of one of some kinds."""
    fused = site.fused_attention
    if fused is not None and fused.kind not in kinds:
        fused = fused.whole
    return replace(site, able=site.able and site.kind in kinds, fused_attention=fused)


@dataclass(frozen=True)
class Choosing(Decider):
    """ToCa at work on a transformer.

    Args:
        config: its configuration.
        sites: the attentions and feed-forwards.
        remarks: what a user is told.
    """

    config: ToCa
    sites: tuple[Site, ...]
    remarks: tuple[str, ...] = ()

    @property
    def observes(self) -> frozenset[LayerKind]:
        weights = {
            LayerKind.SELF_ATTENTION: self.config.influence,
            LayerKind.CROSS_ATTENTION: self.config.control,
        }
        return frozenset(kind for kind, weight in weights.items() if weight)

    def plan(self, view: View) -> Mapping[str, Decision]:
        """Where the call is not full, some tokens of the layers that can; the others are reused whole."""
        return {site.name: self._decided(site, view.step.ratio) for site in self.sites}

    def _decided(self, site: Site, ratio: float) -> Decision:
        share = self.share(site, ratio) if site.able else 0.0
        return Some(share, site.name, otherwise=SKIP, down=True) if share > 0 else SKIP

    def share(self, site: Site, ratio: float) -> float:
        """The share of its tokens that a layer computes: by its kind and depth, and the call's ratio."""
        weight = self.config.layer_weight
        kind = 0.0 if site.kind is None else self.config.share_of(site.kind)
        if self.config.ratio == 0:
            return 1.0 if kind else 0.0
        depth = site.index / max(self.sites[-1].index, 1)
        return min((1 - ratio) * (1 + weight - 2 * weight * depth) * kind, 1.0)

    def begin(self, memory: Memory | None = None) -> Memory:
        """Nothing is known before the full call."""
        return Memory()

    def observe(self, memory: Memory, site: Site, attention: Attention) -> None:
        """Add ``lambda_1 s1`` or ``lambda_2 s2`` to the scores of a block's tokens."""
        c = self.config
        if site.kind is LayerKind.SELF_ATTENTION:
            score = c.influence * influence(attention, c.queries)
        else:
            score = c.control * control(attention)
        before = memory.attended.get(site.block)
        memory.attended[site.block] = score if before is None else before + score

    def choose(
        self, memory: Memory, seen: None, site: Site, x: Tensor, count: int | None, info: CallInfo
    ) -> Tensor:
        """The tokens of highest ``S = sum_j lambda_j s_j``."""
        c, grid = self.config, info.grid
        assert grid is not None
        assert count is not None
        attended, reused = memory.attended.get(site.block), memory.reused.get(site.name)
        if reused is None:
            reused = torch.zeros(len(x), grid.tokens, device=x.device)
        score = c.staleness * staleness(reused, c.interval)
        if attended is not None:
            score = score + attended
        score = align(score, c.alignment, info.guided, conditional_first=info.conditional_first)
        if c.spread:
            score = score + c.spread * spread(score, replace(grid, patch=c.cell))
        chosen = score.topk(count, dim=1).indices
        memory.reused[site.name] = (reused + 1).scatter_(1, chosen, 0)
        return chosen.sort(1).values


@dataclass(frozen=True)
class _Plan:
    """Full calls, and between them calls in which the share computed grows from call to call.

    Args:
        interval: one call in so many is full.
        ratio: share of tokens that the others do not compute, the mean.
        weight: of the growth.
        recovery: of what they do not compute.
    """

    interval: int
    ratio: float
    weight: float
    recovery: TimeRecovery

    @property
    def calls(self) -> None:
        """Any number."""
        return None

    def kinds(self) -> frozenset[Step]:
        """Full calls and the others, all with the mean ratio."""
        full = {Step(FULL, 0.0)}
        return frozenset(full if self.interval == 1 else full | {Step(LAYERS, self.ratio, self.recovery)})

    def resample(self, calls: int) -> Schedule:
        """The schedule of a generation.

        Raises:
            ValueError: if ``calls < 1``.
        """
        spaced = Spaced(self.interval, LAYERS, recovery=self.recovery).resample(calls)
        ratio = tuple(
            0.0 if depth == FULL else self._ratio(i, calls) for i, depth in enumerate(spaced.depth)
        )
        return spaced.model_copy(update={"ratio": ratio})

    def _ratio(self, index: int, calls: int) -> float:
        """Of a call; the factor is the released code's, which counts its steps down."""
        if self.ratio == 0:
            return 0.0
        growth = 1 + self.weight - 2 * self.weight * (calls - 1 - index) / calls
        return max(1 - (1 - self.ratio) * growth, 0.0)


@recipe_of.register
def _(config: ToCa) -> Recipe:
    if config.ratio == 1:
        return Recipe(Spaced(config.interval, LAYERS, recovery=config.recovery))
    plan = _Plan(config.interval, config.ratio, config.step_weight, config.recovery)
    return Recipe(plan, sites=_Rule(config))
