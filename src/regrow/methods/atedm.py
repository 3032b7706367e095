"""AT-EDM: attention-driven training-free pruning of tokens (CVPR 2024, arXiv 2405.05252).

The configuration, and the paper's way, on U-Nets. The way with a cache is in `regrow.methods.atedm_reuse`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator
from torch import Tensor
from typing_extensions import Self

from regrow.core.recipe import Attention, CallInfo
from regrow.fields import MOST_CALLS, Block, Ratio, check_within
from regrow.methods.base import BLOCKS, UNETS, About, MethodConfig, Role, Status, register
from regrow.methods.pruning import Features, Level, PruneAfter, TokenRule, Where
from regrow.methods.sites import SitesOf
from regrow.schedule import FULL, Schedule, Step
from regrow.space import Searched
from regrow.tokens.alignment import Alignment, align
from regrow.tokens.grid import Grid
from regrow.tokens.scores import Heads, attention_page_rank, most_attended
from regrow.tokens.select import Selection, most_similar

HINT = "recovery: AT-EDM's copy works on U-Nets, its reuse on SD3, PixArt, DiT and Flux"


class Restored(str, Enum):
    """Where what a pruned token lacks comes from."""

    COPY = "copy"
    """Another token of the same call: the paper's, on U-Nets."""
    REUSE = "reuse"
    """The same token in an earlier call: on transformers."""


class Similarity(str, Enum):
    """Which kept token a pruned one is most similar to."""

    ATTENTION = "attention"
    """The one that it attends to most, the mean over heads."""
    FEATURES = "features"
    """The one of the highest cosine similarity, of what the self-attention reads."""


@register
class ATEDM(MethodConfig):
    """Leave out the tokens that matter least in the graph of a self-attention, fewer in the first calls.

    1. Importance: the weighted PageRank of a token in the graph that the map of a self-attention is.
    2. Pruned tokens: the least important ones; in the first calls a smaller share of them, or none.
    3. With ``copy`` (the paper, on U-Nets) they are left out of the rest of the attention's stage, and take
       a copy of what a similar kept token got.
    4. With ``reuse`` (the comparison in the CAT Pruning paper, arXiv 2502.00433, on transformers) their
       keys, values and predicted noise are those of the last call that computed them.

    On U-Nets this differs from the paper in three points. There a pruned token's hidden state ends with the
    block that prunes it, and is a copy of a kept token's at the end of the stage; here it goes on, and to
    it is added what each later layer gives a kept token. There every attention of a stage prunes anew; here
    the first one decides for the stage. In the first steps the paper exempts some attention blocks; here
    all of them prune a smaller share, or none. Importance is taken from self-attentions, not from
    cross-attentions.

    On Flux the graph is of queries and keys turned by position, as its attention multiplies them; it needs
    its stock attention processors (no IP-Adapter), and calls with the tokens of several pictures (Kontext)
    are computed in full, with a warning.

    Args:
        ratio: share of the tokens that is pruned, after the first calls. 0.63 is ours: with
            ``after=feed_forward`` it takes 39.9% of its MACs from a call of SDXL's U-Net, for which the
            paper reports 38.8% fewer FLOPs. CAT Pruning's comparison has 0.7.
        early: share of a generation's calls in which ``early_ratio`` is pruned, from the first one on (the
            paper: 15 of 50), or from 1 on so many calls (8 in CAT Pruning's comparison). With ``reuse`` the
            first two calls are full in any case.
        early_ratio: share of the tokens that is pruned there, at most ``ratio`` (0 is ours).
        recovery: where what a pruned token lacks comes from.
        iterations: of PageRank. The paper iterates until scores change little; a fixed number needs no look
            at the scores, and 5 is ours.
        heads: how the scores of the heads become one. The root of the mean of the squares is that of
            Zero-TPrune (arXiv 2305.17328), by the same authors, from which the algorithm comes.
        after: with ``copy``, where in the block whose attention is read pruning begins. The paper's is
            ``feed_forward``, which asks for several blocks in a stage (SDXL); the default also prunes where
            there is one (SD 1 and 2).
        max_downsample: with ``copy``, the deepest level that is pruned, as latent positions a token spans
            along one side (8, every one of SD's and SDXL's levels, is ours).
        similarity: with ``copy``, which kept token a pruned one copies. The paper takes it from the
            attention map; that it is the largest weight is our reading.
        block: with ``reuse``, index of the block whose self-attention is read; Flux's single blocks come
            behind its double ones. It and those before it compute all tokens in every call. The published
            MACs of CAT Pruning's comparison are those of one such block, so the first.
        alignment: whose scores both halves of a guided batch take (off is ours: each sample has its own).

    Raises:
        pydantic.ValidationError: naming the field, the value and what is allowed.
    """

    ABOUT: ClassVar[About] = About(
        title="AT-EDM",
        what="prune the tokens that matter least in attention graphs",
        models=f"{UNETS}; {BLOCKS}",
        status=Status.PARTLY,
        paper="arXiv 2405.05252",
        note="on U-Nets three differences from the paper; on transformers with a cache, as the CAT Pruning "
        "paper ran it",
        value="ratio",
        role=Role.CHOOSES,
        place=80,
    )

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"after": PruneAfter.FEED_FORWARD},
        "reuse": {"ratio": 0.7, "early": 8, "recovery": Restored.REUSE},
    }
    _ONLY: ClassVar[Mapping[str, Restored]] = {
        "after": Restored.COPY,
        "max_downsample": Restored.COPY,
        "similarity": Restored.COPY,
        "block": Restored.REUSE,
    }

    method: Literal["atedm"] = "atedm"
    ratio: Annotated[Ratio, Searched((0.1, 0.2, 0.3, 0.4, 0.5, 0.63, 0.7, 0.8))] = 0.63
    early: Annotated[float, Searched((0.0, 0.1, 0.2, 0.3, 0.4, 0.5))] = Field(0.3, ge=0, le=MOST_CALLS)
    early_ratio: Ratio = 0.0
    recovery: Restored = Restored.COPY
    iterations: int = Field(5, ge=1, le=100)
    heads: Heads = Heads.ROOT_MEAN_SQUARE
    after: PruneAfter = PruneAfter.SELF_ATTENTION
    max_downsample: Level = 8
    similarity: Similarity = Similarity.ATTENTION
    block: Block = 0
    alignment: Alignment = Alignment.OFF

    @model_validator(mode="after")
    def _allowed(self) -> Self:
        if self.early > 1 and self.early % 1:
            raise ValueError(f"early: {self.early} is not allowed, it must be a share or a number of calls")
        if self.early_ratio > self.ratio:
            raise ValueError(
                f"early_ratio: {self.early_ratio} is not allowed, it must be <= ratio ({self.ratio})"
            )
        for name, recovery in self._ONLY.items():
            default = type(self).model_fields[name].default
            if self.recovery is not recovery and getattr(self, name) != default:
                raise ValueError(
                    f"{name}: {getattr(self, name)} is not allowed with recovery={self.recovery.value}, it "
                    f"must be {default}; it is of recovery={recovery.value} alone"
                )
        return self


def importance(config: ATEDM, call: CallInfo) -> tuple[Attention, Tensor]:
    """The attention that has just run, and how much each of the image's tokens matters in it ``(B, N)``.

    Where the text's tokens are in the attention (SD3, Flux), they are in its graph.
    """
    attention = call.attention
    assert attention is not None
    score = attention_page_rank(
        attention.query, attention.key, config.iterations, heads=config.heads, bias=attention.bias
    )
    score = score[:, : attention.tokens]
    halves = config.alignment, call.guided
    return attention, align(score, *halves, conditional_first=call.conditional_first)


@dataclass(frozen=True)
class Copying(SitesOf[ATEDM], TokenRule):
    """The tokens that the layers of a U-Net's stage leave out."""

    @property
    def where(self) -> Where:
        """All layers behind the attention that is read."""
        c = self.config
        return Where(True, True, True, c.max_downsample, Features.ATTENTION, after=c.after)

    @property
    def hint(self) -> str:
        """What works on which models."""
        return HINT

    def select(
        self, x: Tensor, grid: Grid, count: int, prepared: Tensor | None, call: CallInfo
    ) -> Selection:
        """Prune the least important tokens."""
        attention, score = importance(self.config, call)
        order = score.argsort(dim=1, descending=True)
        kept, pruned = order[:, : grid.tokens - count], order[:, grid.tokens - count :]
        if self.config.similarity is Similarity.FEATURES:
            match = most_similar(x, pruned, kept)[1]
        else:
            match = most_attended(attention.query, attention.key, pruned, kept, attention.bias)
        return Selection.matched(kept, pruned, match)


@dataclass(frozen=True)
class EarlyLess:
    """Full calls throughout, of which the first ones prune less.

    Args:
        early: share of the calls that prune less, or from 1 on their number.
        early_ratio: what they prune.
        ratio: what the others prune.
        whole: the first calls that prune nothing.
    """

    early: float
    early_ratio: float
    ratio: float
    whole: int

    @property
    def calls(self) -> None:
        """Any number."""
        return None

    def kinds(self) -> frozenset[Step]:
        """Calls with either ratio."""
        return frozenset(Step(FULL, ratio) for ratio in (0.0, self.early_ratio, self.ratio))

    def resample(self, calls: int) -> Schedule:
        """The schedule of a generation.

        Raises:
            ValueError: if ``calls < 1``.
        """
        check_within("calls", calls, 1, MOST_CALLS)
        early = round(self.early * calls) if self.early < 1 else min(int(self.early), calls)
        ratio = tuple(
            0.0 if i < self.whole else self.early_ratio if i < early else self.ratio for i in range(calls)
        )
        return Schedule(depth=(FULL,) * calls, ratio=ratio, name=f"from {max(early, self.whole)}")
