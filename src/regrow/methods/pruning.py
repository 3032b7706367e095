"""Methods that prune tokens in the layers of a U-Net: what each says of one layer, and where it acts.

What several of them have is here: fields, and what follows from fields (`LayerPruning`, `PatchRule`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from enum import Enum
from functools import cached_property
from typing import Annotated, Any, Literal, TypeVar

from pydantic import model_validator
from torch import Tensor, nn
from typing_extensions import Self

from regrow.core.decision import Decider, Decision, Entered, Sited, Some, View, runs
from regrow.core.recipe import CallInfo
from regrow.fields import Ratio, Seed, Side
from regrow.methods.base import MethodConfig
from regrow.methods.sites import SitesOf
from regrow.models.errors import UnsupportedModelError
from regrow.models.layers import LayerKind
from regrow.models.table import Keeps, Layout, Site, TokenBlock
from regrow.recover.space import Recovery
from regrow.space import RATIOS
from regrow.tokens.grid import Grid
from regrow.tokens.select import Selection


class Features(str, Enum):
    """The features that similarities and scores are computed from."""

    BLOCK_INPUT = "block_input"
    """The hidden states entering the transformer block, before norm1 (both released codes)."""
    NORM1 = "norm1"
    """The output of norm1, which the self-attention reads."""
    ATTENTION = "attention"
    """As norm1, with the queries and keys of the self-attention. It runs before its block's tokens are
    selected; the selection also serves the following blocks of the same stage."""


class PruneAfter(str, Enum):
    """The place where pruning begins, relative to the block whose attention is read."""

    SELF_ATTENTION = "self_attention"
    """Its own cross-attention and feed-forward leave tokens out, and all layers of the blocks after it."""
    FEED_FORWARD = "feed_forward"
    """Only the blocks after it."""


Level = Literal["top", 1, 2, 4, 8]


@dataclass(frozen=True)
class Where:
    """The layers in which tokens are pruned.

    Args:
        self_attention: prune in the attention among image tokens.
        cross_attention: prune the queries of the attention to the text.
        feed_forward: prune in the token-wise network.
        max_downsample: deepest level, as latent positions a token spans along one side; ``"top"`` is
            the model's finest level with attention (1 for SD 1.5 and 2, 2 for SDXL).
        features: features that the selection uses.
        recovery: where pruned tokens' values come from.
        after: with `Features.ATTENTION`, where pruning begins.
    """

    self_attention: bool = True
    cross_attention: bool = False
    feed_forward: bool = False
    max_downsample: Level = "top"
    features: Features = Features.BLOCK_INPUT
    recovery: Recovery = Recovery.COPY
    after: PruneAfter = PruneAfter.SELF_ATTENTION


class PatchPruning(MethodConfig):
    """Fields of the methods that keep a base token of each patch, and prune what is similar to one.

    Args:
        patch: side s of the patches that give one base token each (the papers: 2).
        recovery: copy (DaTo and SiTo prune), or mean (ToMeSD merges).
        max_downsample: deepest level that is pruned (the papers: the finest with attention).
        exact: measure the similarity of half-precision features in float32, as for a float32 model; off,
            since it takes more than a hundredth of a call (docs/pruning.md).
        seed: seed of the run's generator.
    """

    patch: Side = 2
    recovery: Recovery = Recovery.COPY
    max_downsample: Level = "top"
    exact: bool = False
    seed: Seed = 0


class LayerPruning(PatchPruning):
    """Fields of those that prune the same share in every call, in layers of which each has its switch.

    Args:
        ratio: share r of the tokens that are pruned or merged away, in every call; r <= 1 - 1 / patch**2.
        self_attention: prune in self-attention (the papers' default).
        cross_attention: prune the queries of the cross-attention.
        feed_forward: prune in the feed-forward.
    """

    ratio: Annotated[Ratio, RATIOS]
    self_attention: bool = True
    cross_attention: bool = False
    feed_forward: bool = False

    @model_validator(mode="after")
    def _prunes_somewhere(self) -> Self:
        check_ratio(self.ratio, self.patch)
        if not (self.self_attention or self.cross_attention or self.feed_forward):
            done = "merged" if self.recovery is Recovery.MEAN else "pruned"
            raise ValueError(
                f"self_attention, cross_attention, feed_forward: all are off, so nothing is {done}; "
                "switch one on"
            )
        return self


class TokenRule(Sited):
    """Selects the tokens of each layer; those that it leaves out follow from others of the same call."""

    @property
    def by_ratio(self) -> bool:
        """It acts where the plan's ratio is above 0."""
        return True

    @property
    def where(self) -> Where:
        """The layers, and what is looked at."""
        raise NotImplementedError

    @property
    def patch(self) -> int | None:
        """Side of the patches the grids are cut into, of each of which a token stays; None: one for all."""
        return None

    @property
    def reads_outputs(self) -> bool:
        """Whether `CallInfo.outputs` is used."""
        return False

    @property
    def hint(self) -> str:
        """What to say to somebody whose model it does not fit."""
        return "methods that only reuse, such as FORA and DeepCache, work on it"

    def prepare(self, grids: Sequence[Grid], call: CallInfo) -> Mapping[Grid, Tensor]:
        """What does not depend on the layer, once a call: for each grid a tensor `select` is given."""
        return {}

    def select(
        self, x: Tensor, grid: Grid, count: int, prepared: Tensor | None, call: CallInfo
    ) -> Selection:
        """The selection of a layer that prunes ``count`` tokens, from its features ``(B, N, C)``."""
        raise NotImplementedError

    def on(self, denoiser: nn.Module, layout: Layout) -> Pruning:
        """The rule at work on a denoiser.

        Raises:
            UnsupportedModelError: if the model has no blocks whose tokens can be left out.
            ValueError: if none of them has a layer that the rule prunes, or the rule is after the first
                block, and no block has another behind it.
        """
        name = type(denoiser).__name__
        if not layout.blocks:
            raise UnsupportedModelError(
                f"model: tokens can't be left out of the layers of {name} yet; {self.hint}"
            )
        return Pruning(self, _served(self.where, layout, name), layout)


Patched = TypeVar("Patched", bound=PatchPruning)


@dataclass(frozen=True)
class PatchRule(SitesOf[Patched], TokenRule):
    """The rule of a configuration whose fields are called as those of `Where`."""

    @cached_property
    def where(self) -> Where:
        """What the fields say; of those that the configuration lacks, the defaults."""
        named = (field.name for field in fields(Where) if hasattr(self.config, field.name))
        return Where(**{name: getattr(self.config, name) for name in named})

    @property
    def patch(self) -> int:
        """The field's."""
        return self.config.patch


class Pruning(Decider):
    """A token rule at work on a model.

    Args:
        rule: how tokens are selected.
        served: by the name of each block from which tokens are selected, the blocks that leave them out.
        layout: of the model.
    """

    def __init__(
        self, rule: TokenRule, served: Mapping[str, tuple[TokenBlock, ...]], layout: Layout
    ) -> None:
        self.rule = rule
        by_name = {block.name: block for block in layout.blocks}
        self._choosing = {group: by_name[group] for group in served}
        self._blocks = {block.name: block for blocks in served.values() for block in blocks}
        self._groups = {block.name: group for group, blocks in served.items() for block in blocks}
        self.sites = tuple(site for block in self._blocks.values() for site in _sites(block, rule.where))
        self._known: dict[Any, Mapping[str, Decision]] = {}

    @property
    def space(self) -> Recovery:
        """Copy or mean."""
        return self.rule.where.recovery

    @property
    def reads_outputs(self) -> bool:
        """The rule's."""
        return self.rule.reads_outputs

    @property
    def entries(self) -> Mapping[str, nn.Module]:
        """The blocks, or their self-attentions."""
        if self.rule.where.features is Features.BLOCK_INPUT:
            return {group: block.block for group, block in self._choosing.items()}
        if self.rule.where.features is Features.NORM1:
            found = {group: block.self_attention for group, block in self._choosing.items()}
            return {group: module for group, module in found.items() if module is not None}
        return {}

    @property
    def attentions(self) -> Mapping[str, tuple[str, nn.Module]]:
        """Those of the blocks from which tokens are selected."""
        if self.rule.where.features is not Features.ATTENTION:
            return {}
        found = {group: block.self_attention for group, block in self._choosing.items()}
        return {group: (f"{group}.attn1", module) for group, module in found.items() if module is not None}

    def plan(self, view: View) -> Mapping[str, Decision]:
        """In the layers that run, all tokens but the plan's share, as far as base tokens stay."""
        key = view.step.ratio, view.skip_plan, view.size
        if key not in self._known:
            self._known[key] = dict(self._planned(view))
        return self._known[key]

    def _planned(self, view: View) -> Any:
        for site in self.sites:
            grid = self._grid(site.block, view)
            pruned = grid.pruned(view.step.ratio)
            if pruned > 0 and runs(site.block, view.skip_plan):
                yield site.name, Some((grid.tokens - pruned) / grid.tokens, self._groups[site.block])

    def _grid(self, block: str, view: View) -> Grid:
        return self._blocks[block].grid(*view.size, self.rule.patch)

    def look(self, memory: None, entered: Entered, info: CallInfo) -> Mapping[Grid, Tensor]:
        """What the rule makes ready for each grid, the largest first."""
        assert info.view is not None
        if entered.x.is_meta:
            return {}
        blocks = {site.block for site in self.sites if site.name in self.plan(info.view)}
        grids = {self._grid(block, info.view) for block in blocks}
        return self.rule.prepare(sorted(grids, key=lambda grid: -grid.tokens), info)

    def choose(
        self,
        memory: None,
        seen: Mapping[Grid, Tensor],
        site: Site,
        x: Tensor,
        count: int | None,
        info: CallInfo,
    ) -> Selection:
        """The tokens that a block's layers compute, from the features ``(B, N, C)``."""
        assert info.view is not None
        assert count is not None
        grid = self._grid(site.block, info.view)
        # They may be a view of (B, C, H, W), in which a token's channels are far from each other.
        return self.rule.select(x.contiguous(), grid, grid.tokens - count, seen.get(grid), info)


def _sites(block: TokenBlock, where: Where) -> list[Site]:
    """The layers of a block that leave tokens out."""
    layers = (
        ("attn1", block.self_attention, where.self_attention, LayerKind.SELF_ATTENTION),
        ("attn2", block.cross_attention, where.cross_attention, LayerKind.CROSS_ATTENTION),
        ("ff", block.feed_forward, where.feed_forward, LayerKind.FEED_FORWARD),
    )
    return [
        Site(f"{block.name}.{child}", module, Keeps.NOTHING, block.name, 0, able=True, kind=kind)
        for child, module, wanted, kind in layers
        if module is not None and wanted
    ]


def _served(where: Where, layout: Layout, model: str) -> dict[str, tuple[TokenBlock, ...]]:
    """By the name of each block from which tokens are selected, the blocks that leave them out.

    Raises:
        ValueError: if no block has a layer to leave them out of, or none comes behind one that decides.
    """
    limit = where.max_downsample
    deepest = layout.top_level if limit == "top" else limit
    blocks = [b for b in layout.blocks if b.downsample <= deepest]
    served: dict[str, tuple[TokenBlock, ...]]
    if where.features is not Features.ATTENTION:
        served = {block.name: (block,) for block in blocks if _holds(block, where)}
        if not served:
            raise ValueError(_lack(where, layout, model))
        return served
    stages: dict[str, list[TokenBlock]] = {}
    for block in blocks:
        if block.stage in stages or block.self_attention is not None:
            stages.setdefault(block.stage, []).append(block)
    if not stages:
        raise ValueError(_lack(where, layout, model))
    first = 0 if where.after is PruneAfter.SELF_ATTENTION else 1
    served = {
        stage[0].name: holding
        for stage in stages.values()
        if (holding := tuple(block for block in stage[first:] if _holds(block, where)))
    }
    if not served:
        raise ValueError(
            f"after: {where.after.value} is not allowed on {model}, in which no block comes right behind "
            f"another; it must be {PruneAfter.SELF_ATTENTION.value}"
        )
    return served


def _holds(block: TokenBlock, where: Where) -> bool:
    """Whether a block has a layer to leave tokens out of, and what its tokens are selected from."""
    if where.features is Features.NORM1 and block.self_attention is None:
        return False
    return any(getattr(block, name) is not None for name in _layers(where))


def _layers(where: Where) -> list[str]:
    """Which layers of a block leave tokens out, by the names of their switches."""
    return [n for n in ("self_attention", "cross_attention", "feed_forward") if getattr(where, n)]


def _lack(where: Where, layout: Layout, model: str) -> str:
    """Why a model has no layer that can leave tokens out."""
    if where.features is Features.ATTENTION:
        levels = [block.downsample for block in layout.blocks if block.self_attention is not None]
    else:
        levels = [block.downsample for block in layout.blocks if _holds(block, where)]
    if levels:
        return (
            f"max_downsample: {where.max_downsample} leaves no layer of {model} to prune; the finest is at "
            f"{min(levels)}"
        )
    return (
        f"{', '.join(_layers(where))}: {model} has no such layer whose tokens could be pruned; its "
        "attentions are all to the text"
    )


def check_ratio(ratio: float, patch: int) -> None:
    """Refuse a ratio that would prune base tokens.

    Raises:
        ValueError: if ``ratio > 1 - 1 / patch**2``.
    """
    highest = 1 - 1 / patch**2
    if ratio > highest + 1e-9:
        raise ValueError(
            f"ratio: {ratio} is not allowed, it must be <= {highest:g}, since patch={patch} keeps one "
            f"token of every {patch**2}; use a lower ratio or a larger patch"
        )
