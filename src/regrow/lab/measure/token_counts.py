"""Count how often tokens were computed (SiTo, figure 4), and how many in a block (TokenCache, figure 8)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from regrow.core.call import Observation
from regrow.core.decision import ALL, Decision, left_out
from regrow.models import Layout
from regrow.models.table import Stream
from regrow.schedule import HEAD, LAYERS, SITES


class ComputedCounter:
    """Counts, as an observer of a run, the calls and blocks in which each token was computed.

    A transformer block computes a token if it runs and its pruned layers keep the token; skipped blocks
    compute none. If single layers or sites recompute tokens (ToCa), each counts as its share of the block's
    layers that can. Blocks of one level have the same grid of tokens and are counted together.

    Args:
        layout: the table of the denoiser.

    Raises:
        ValueError: when called, if the size of the batch or the picture changed.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._counts: dict[int, Tensor] = {}
        self._calls = 0
        # Layers of the text compute no image tokens.
        layers = [site for site in layout.layer_sites if site.kind is not None]
        parts = Counter(site.block for site in layers)
        self._weights = {site.name: 0.0 for site in layout.layer_sites}
        self._weights |= {site.name: 1 / parts[site.block] for site in layers}
        self._weights |= {site.name: 1.0 for site in layout.block_sites}

    def __call__(self, seen: Observation) -> None:
        args, kwargs = seen.record.inputs
        sample: Tensor = args[0] if args else kwargs[self._layout.sample]
        self._calls += 1
        if self._layout.stream is not None:
            self._count_stream(seen, sample, self._layout.stream)
        if not self._layout.blocks:
            return
        batch, _, height, width = sample.shape
        for block in self._layout.blocks:
            grid = block.grid(height, width, patch=1)
            shape = (batch, grid.height, grid.width)
            count = self._counts.setdefault(block.downsample, torch.zeros(shape, dtype=torch.float64))
            if count.shape != shape:
                raise ValueError(
                    "the calls counted together must be of one batch size and one picture size"
                )
            if block.name in seen.blocks:
                selection = seen.blocks[block.name]
                if selection is None:
                    count += 1
                else:
                    _add(count, selection.kept, 1.0)

    def _count_stream(self, seen: Observation, sample: Tensor, stream: Stream) -> None:
        """Count the blocks in which a transformer's tokens were computed."""
        grid = seen.grid
        if grid is None:
            return
        shape = (len(sample), grid.height, grid.width)
        count = self._counts.setdefault(stream.patch, torch.zeros(shape, dtype=torch.float64))
        if count.shape != shape:
            raise ValueError("the calls counted together must be of one batch size and one picture size")
        depth = seen.record.depth
        blocks: float = 0 if depth in (LAYERS, HEAD) else min(depth, self._layout.depths)
        if depth == SITES:
            blocks -= sum(self._weights[name] for name, what in seen.record.plan.items() if what is not ALL)
        if seen.tokens is None:
            count += blocks
        else:
            count += seen.leading
            _add(count, seen.tokens, blocks - seen.leading)
        for name, tokens in seen.refreshed.items():
            _add(count, tokens, self._weights[name])

    def counts(self) -> Mapping[int, Tensor]:
        """Counts ``(B, h, w)`` by level, which is the latent positions a token spans along one side."""
        return self._counts

    def possible(self, level: int) -> int:
        """Compute the highest possible count at a level: calls times blocks."""
        stream = self._layout.stream
        if stream is not None and level == stream.patch:
            return self._calls * self._layout.depths
        return self._calls * sum(b.downsample == level for b in self._layout.blocks)

    def shares(self) -> dict[int, Tensor]:
        """Compute, by level, the share of calls and blocks that computed each token ``(B, h, w)``."""
        return {level: count / self.possible(level) for level, count in self._counts.items()}


class SiteShares:
    """Records, as an observer of a run, the share of its tokens that each site computed in each call.

    Args:
        layout: the table of the denoiser.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._plans: list[Mapping[str, Decision]] = []

    def __call__(self, seen: Observation) -> None:
        self._plans.append(seen.record.plan)

    def shares(self) -> dict[str, tuple[float, ...]]:
        """List the share of each call by site, in the order they run; empty if no site was decided for.

        Sites are the blocks or the layers that the method decides for.
        """
        decided = {name for plan in self._plans for name in plan}
        return {
            site.name: tuple(1 - left_out({site.name: plan.get(site.name, ALL)}) for plan in self._plans)
            for sites in (self._layout.block_sites, self._layout.layer_sites)
            if any(site.name in decided for site in sites)
            for site in sites
        }


def _add(count: Tensor, tokens: Tensor, weight: float) -> None:
    """Add ``weight`` to the counts ``(B, h, w)`` of some tokens ``(B, K)``."""
    kept = tokens.cpu()
    count.view(len(count), -1).scatter_add_(1, kept, torch.full(kept.shape, weight, dtype=count.dtype))
