"""The training of TokenCache's predictor (algorithm 1 of arXiv 2409.18523), and the table made after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from regrow.core.decision import Entered
from regrow.lab.train.examples import Batch, Examples, Told
from regrow.lab.train.frozen import Frozen, Past, past, relaxed, truth
from regrow.lab.train.objective import Losses
from regrow.models.table import Site, in_sequences
from regrow.predictors import CachePredictor

PLACES, LEVELS = 25, 17
"""Places in a run, and quantiles of alpha, that a table has."""


def on_sites(alpha: Tensor, sites: Sequence[Site], before: Past) -> dict[str, Tensor]:
    """By the name of a site, its column of alpha ``(B, N, L)`` as its sequences ``(S, n, 1)``."""
    return {
        site.name: in_sequences(alpha[..., site.index], site.spans, len(before.kept[site.key]))[..., None]
        for site in sites
    }


@dataclass(frozen=True, eq=False)
class PredictorObjective:
    """The cached call's last tokens shall be those of the full call, at little cost.

    Args:
        frozen: the model.
        predictor: that learns.
        last_blocks: K, blocks at the end that are always computed.
        price: lambda, of the mean alpha.
    """

    frozen: Frozen
    predictor: CachePredictor
    last_blocks: int
    price: float

    @property
    def earlier(self) -> range:
        return range(len(self.frozen.steps) - 1)

    @property
    def weights(self) -> Mapping[str, nn.Parameter]:
        return dict(self.predictor.named_parameters())

    @property
    def decided(self) -> tuple[Site, ...]:
        """The blocks that alpha is for."""
        sites = self.frozen.layout.block_sites
        return sites[: len(sites) - self.last_blocks]

    def losses(self, batch: Batch) -> Losses:
        """``|x^L relaxed - x^L|^2`` in the mean, and lambda times the mean alpha."""
        sites = self.frozen.layout.block_sites
        before = past(self.frozen, sites, batch)
        full = truth(self.frozen, sites, before, batch.given)
        alpha = self.predictor.of_samples(full.entered, len(batch.x))
        weights = on_sites(alpha, self.decided, before)
        _, last = relaxed(self.frozen, sites, before, batch.given, weights)
        error = (last.float() - full.last.float()).pow(2).mean()
        return Losses(error, self.price * alpha[..., : len(self.decided)].float().mean())


@torch.no_grad()
def alpha_at(objective: PredictorObjective, batch: Batch) -> Tensor:
    """What the predictor says of a batch, ``(B, N, L)``."""
    frozen = objective.frozen
    found: list[Tensor] = []

    def enter(module: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]) -> None:
        entered = Entered(args[0], args[1:], kwargs)
        found.append(objective.predictor.of_samples(entered, len(batch.x)))

    hook = frozen.layout.block_sites[0].module.register_forward_pre_hook(enter, with_kwargs=True)
    try:
        frozen.call(batch.x, batch.index, batch.given)
    finally:
        hook.remove()
    return found[0]


def table(
    objective: PredictorObjective,
    examples: Examples,
    samples: int,
    batch: int,
    generator: torch.Generator,
    told: Told,
) -> dict[str, Tensor]:
    """What the predictor says along a run: see `regrow.tokens.shares.Table`.

    Args:
        objective: with the trained predictor.
        examples: of which the first ``samples`` are taken, again from the first if there are fewer.
        samples: how many.
        batch: in one call.
        generator: of the noise.
        told: is told how far it is.

    Returns:
        ``quantiles`` (T, L, Q) and ``alpha`` (T,), the mean over the blocks that are decided for.
    """
    frozen, decided = objective.frozen, len(objective.decided)
    levels = torch.linspace(0, 1, LEVELS, dtype=torch.float64)
    quantiles, means = [], []
    for place in range(PLACES):
        number = int((place + 0.5) / PLACES * len(frozen.steps))
        parts = []
        for first in range(0, samples, batch):
            which = torch.arange(first, min(first + batch, samples)) % len(examples)
            size = len(which)
            noise = torch.randn((size, *examples.latents.shape[1:]), generator=generator)
            index = torch.full((size,), number)
            drawn = examples.at(frozen.steps, which, index, noise, torch.zeros(size, dtype=torch.bool))
            parts.append(alpha_at(objective, drawn).double().cpu())
        alpha = torch.cat(parts).flatten(0, 1)
        # Not torch.quantile, which takes no more than 16 million numbers.
        ranked = alpha.sort(0).values
        quantiles.append(ranked[(levels * (len(ranked) - 1)).round().long()].T)
        means.append(alpha[:, :decided].mean())
        told("table", place + 1, PLACES)
    return {"quantiles": torch.stack(quantiles), "alpha": torch.stack(means)}
