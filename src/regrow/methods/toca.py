"""ToCa: token-wise feature caching for diffusion transformers (arXiv 2410.05317)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator
from torch import Tensor, nn
from typing_extensions import Self

from regrow.core.decision import SKIP, Decider, Decision, Some, View
from regrow.core.recipe import Attention, CallInfo, Recipe, recipe_of
from regrow.fields import MOST_SIDE, Calls, Share, Weight
from regrow.methods.base import BLOCKS, About, DenoiserKind, MethodConfig, register
from regrow.methods.sites import Ages, SitesOf
from regrow.models.errors import UnsupportedModelError
from regrow.models.layers import LayerKind
from regrow.models.table import Layout, Site
from regrow.recover.time import REUSE, RecoveryField
from regrow.schedule import LAYERS, Schedule, Spaced, Step
from regrow.space import INTERVALS, RECOVERIES, Searched
from regrow.tokens.alignment import Alignment, align
from regrow.tokens.scores import best_of_cell, influence_of_text, influence_on_others


@register
class ToCa(MethodConfig):
    """Reuse the outputs of attentions and feed-forwards, but compute the tokens of highest score again.

    1. Every N-th call is full. In the others the attentions give their last output whole (as in FORA).
    2. Score of a token: ``S = sum_j lambda_j s_j``, of how much others attend to it (s1), how much of the
       text it attends to (s2), how often it was reused since it was computed (s3), and a bonus for the best
       of its neighbourhood (s4).
    3. Each feed-forward computes its tokens of highest score, among the last outputs of the others.
    4. The share that it computes depends on its depth, its kind, and the call's place in the run.

    Numbers called the released code's are those of github.com/Shenyi-Z/ToCa for DiT. Its intervals between
    full calls also change a little along the run; here they are all N, as in the paper. The preset
    ``paper`` takes s1 from all queries, and each half of a guided batch chooses for itself; ``pixart`` has
    the released code's numbers for PixArt-alpha. Those for Flux have no preset: there double and single
    blocks compute different shares, which are one here.

    A single block of Flux makes one output of a token's attention and feed-forward, by one projection. It
    is one layer here, a feed-forward, which computes that output of its tokens again. The attention in it
    is the last one, as in the released code, or computed anew for the same tokens if ``self_attention`` is
    above 0. There two points differ from the released code: where some of the image's tokens are computed,
    all of the text's are as well, while it chooses among these too; and s1 is of norm 1 over the image's
    tokens in every block. Flux needs its stock attention processors (no IP-Adapter) unless ``influence``
    and ``self_attention`` are 0; calls with the tokens of several pictures (Kontext) reuse whole outputs,
    as FORA does, with a warning.

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

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"queries": None, "alignment": Alignment.OFF},
        "pixart": {
            "ratio": 0.52,
            "cross_attention": 0.375,
            "layer_weight": 0.6,
            "step_weight": -0.9,
            "influence": 0,
            "spread": 0.4,
            "cell": 4,
        },
    }

    method: Literal["toca"] = "toca"
    interval: Annotated[Calls, INTERVALS] = 3
    ratio: Annotated[Share, Searched((0.5, 0.6, 0.7, 0.825, 0.9, 1.0))] = 0.825
    recovery: Annotated[RecoveryField, RECOVERIES] = REUSE
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
        return float(getattr(self, kind.value))


@dataclass(frozen=True)
class _Rule(SitesOf[ToCa]):
    """ToCa before a model is known."""

    def on(self, denoiser: nn.Module, layout: Layout) -> ToCaDecider:
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
        return ToCaDecider(self.config, sites, (said,) if lacking else ())


def _restricted(site: Site, kinds: frozenset[LayerKind]) -> Site:
    """A site that computes some of its tokens if it is of one of some kinds."""
    fused = site.fused_attention
    if fused is not None and fused.kind not in kinds:
        fused = fused.whole
    return replace(site, able=site.able and site.kind in kinds, fused_attention=fused)


@dataclass(frozen=True)
class ToCaDecider(Decider):
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

    def begin(self, memory: Ages | None = None) -> Ages:
        """Nothing is known before the full call."""
        return Ages()

    def observe(self, memory: Ages, site: Site, attention: Attention) -> None:
        """Add ``lambda_1 s1`` or ``lambda_2 s2`` to the scores of a block's tokens."""
        c, (query, key, bias) = self.config, (attention.query, attention.key, attention.bias)
        if site.kind is LayerKind.SELF_ATTENTION:
            own = influence_on_others(query, key, attention.tokens, queries=c.queries, bias=bias)
            score = c.influence * own
        else:
            score = c.control * influence_of_text(query, key, bias)
        before = memory.attended.get(site.block)
        memory.attended[site.block] = score if before is None else before + score

    def choose(
        self, memory: Ages, seen: None, site: Site, x: Tensor, count: int | None, info: CallInfo
    ) -> Tensor:
        """The tokens of highest ``S = sum_j lambda_j s_j``."""
        c, grid = self.config, info.grid
        assert grid is not None
        assert count is not None
        reused, attended = (
            memory.of(site.name, len(x), grid.tokens, x.device),
            memory.attended.get(site.block),
        )
        score = c.staleness * (reused / c.interval)
        if attended is not None:
            score = score + attended
        score = align(score, c.alignment, info.guided, conditional_first=info.conditional_first)
        if c.spread:
            score = score + c.spread * best_of_cell(score, replace(grid, patch=c.cell))
        return memory.choose(site.name, score, count)


@dataclass(frozen=True)
class _Growing(Spaced):
    """Full calls, and between them calls in which the share computed grows from call to call.

    Args:
        ratio: share of tokens that the others do not compute, the mean.
        weight: of the growth.
    """

    ratio: float = 0.0
    weight: float = 0.0

    def kinds(self) -> frozenset[Step]:
        """Full calls and the others, all with the mean ratio."""
        return frozenset(step if step.full else replace(step, ratio=self.ratio) for step in super().kinds())

    def resample(self, calls: int) -> Schedule:
        """The schedule of a generation; the factor is the released code's, which counts its steps down."""
        plan = super().resample(calls)
        growth = (1 + self.weight - 2 * self.weight * (calls - 1 - i) / calls for i in range(calls))
        ratio = (max(1 - (1 - self.ratio) * g, 0.0) if self.ratio else 0.0 for g in growth)
        steps = zip(plan.steps(), ratio, strict=True)
        return plan.model_copy(update={"ratio": tuple(0.0 if s.full else r for s, r in steps)})


@recipe_of.register
def _(config: ToCa) -> Recipe:
    if config.ratio == 1:
        return Recipe(Spaced(config.interval, LAYERS, recovery=config.recovery))
    plan = _Growing(
        config.interval,
        LAYERS,
        recovery=config.recovery,
        ratio=config.ratio,
        weight=config.step_weight,
    )
    return Recipe(plan, sites=_Rule(config))
