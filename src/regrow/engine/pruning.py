"""Layers that leave tokens out: in which blocks, how many, and which."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial

from torch import Tensor, nn

from regrow.engine.call import Call, Watched
from regrow.methods.parts import After, Attention, CallInfo, Features, TokenRule, Where
from regrow.models.errors import UnsupportedModelError
from regrow.models.table import Cut, Layout, TokenBlock
from regrow.tokens.grid import Grid
from regrow.tokens.select import Selection


class Pruning:
    """A token rule at work on a model.

    Args:
        rule: how the tokens are selected.
        denoiser: the model.
        layout: its table.
        cuts: those that the plan uses.
        asked: whether the plan has a ratio above 0.
        instead: what to say to somebody whose model the rule doesn't fit.
        warn_once: takes what a warning is about, and the warning.

    Raises:
        UnsupportedModelError: if the model has no blocks whose tokens can be left out.
        ValueError: if none of them has a layer that the rule prunes, or the rule is after the first block,
            and no block has another behind it.
    """

    def __init__(
        self,
        rule: TokenRule,
        denoiser: nn.Module,
        layout: Layout,
        cuts: Iterable[Cut],
        asked: bool,
        instead: str,
        warn_once: Callable[[str, str], None],
    ) -> None:
        name = type(denoiser).__name__
        if asked and not layout.blocks:
            instead = instead or "methods that only reuse, such as FORA and DeepCache, work on it"
            raise UnsupportedModelError(
                f"model: tokens can't be left out of the layers of {name} yet; {instead}"
            )
        self.rule = rule
        self._layout, self._warn_once = layout, warn_once
        self._served = _served(rule, layout, name) if asked else {}
        self.blocks = tuple(block for served in self._served.values() for block in served)
        self._running = {cut: tuple(b for b in self.blocks if runs(b, cut)) for cut in (None, *cuts)}
        self.select = self._select

    def in_call(self, cut: Cut | None) -> tuple[TokenBlock, ...]:
        """The blocks that prune in a call with that cut."""
        return self._running[cut]

    @property
    def shallowest(self) -> int | None:
        """The lowest depth of a cached call that computes a layer to prune; None if only full calls do."""
        for depth in range(1, self._layout.depths):
            cut = self._layout.cut(depth)
            if any(runs(block, cut) for block in self.blocks):
                return depth
        return None

    def counts(self, sample: Tensor, ratio: float, cut: Cut | None) -> dict[str, tuple[Grid, int]]:
        """For each block that prunes in a call, its grid and how many tokens go."""
        blocks = self.in_call(cut)
        if ratio == 0 or not blocks:
            return {}
        height, width = sample.shape[-2:]
        counts = {}
        for block in blocks:
            grid = block.grid(height, width, self.rule.patch)
            if grid.pruned(ratio) > 0:
                counts[block.name] = (grid, grid.pruned(ratio))
        if not counts:
            self._warn_once(
                "grid",
                f"a latent of {height} x {width} has no layer in which a ratio of {ratio:g} prunes a "
                "token; nothing is pruned",
            )
        return counts

    def prepared(self, counts: Mapping[str, tuple[Grid, int]], info: CallInfo) -> Mapping[Grid, Tensor]:
        """What the rule makes ready for each grid, the largest first."""
        grids = sorted({grid for grid, _ in counts.values()}, key=lambda g: -g.tokens)
        return self.rule.prepare(grids, info) if grids else {}

    def select_from(self, call: Call | None, name: str, x: Tensor) -> None:
        """Select the tokens of the blocks that the features ``(B, N, C)`` of a block decide for."""
        if call is None or not self._selects(name, call):
            return
        served = self._served[name]
        selection = self.select(call, served[0].name, x)
        call.selections |= {block.name: selection for block in served}

    @property
    def watched(self) -> Iterator[Watched]:
        """The attentions that tokens are selected by."""
        if self.rule.where.features is not Features.ATTENTION:
            return
        by_name = {block.name: block for block in self._layout.blocks}
        for name in self._served:
            module = by_name[name].self_attention
            assert module is not None
            wanted = partial(self._selects, name)
            yield Watched(f"{name}.attn1", module, wanted, partial(self._select_after, name))

    def _selects(self, name: str, call: Call) -> bool:
        return self._served[name][0].name in call.counts

    def _select_after(self, name: str, call: Call, x: Tensor, attention: Attention) -> None:
        call.info = replace(call.info, attention=attention)
        self.select_from(call, name, x)

    def _select(self, call: Call, name: str, x: Tensor) -> Selection:
        """The selection of a block from the features ``(B, N, C)``."""
        grid, count = call.counts[name]
        # They may be a view of (B, C, H, W), in which a token's channels are far from each other.
        return self.rule.select(x.contiguous(), grid, count, call.prepared.get(grid), call.info)


def _served(rule: TokenRule, layout: Layout, model: str) -> dict[str, tuple[TokenBlock, ...]]:
    """By the name of each block from which tokens are selected, the blocks that leave them out.

    Raises:
        ValueError: if no block has a layer to leave them out of, or none comes behind one that decides.
    """
    where = rule.where
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
    first = 0 if where.after is After.SELF_ATTENTION else 1
    served = {
        stage[0].name: holding
        for stage in stages.values()
        if (holding := tuple(block for block in stage[first:] if _holds(block, where)))
    }
    if not served:
        raise ValueError(
            f"after: {where.after.value} is not allowed on {model}, in which no block comes right behind "
            f"another; it must be {After.SELF_ATTENTION.value}"
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


def runs(block: TokenBlock, cut: Cut | None) -> bool:
    """Whether a block runs, with its layers, in a call with that cut."""
    own = f"{block.name}."
    if cut is None or cut.final:
        return cut is None
    return not any(own.startswith(f"{n}.") or n.startswith(own) for n in cut.skip)
