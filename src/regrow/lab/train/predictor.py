"""Train TokenCache's predictor (algorithm 1 of arXiv 2409.18523), and make a table of what it says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from regrow.lab.train.examples import Batch, Examples
from regrow.lab.train.frozen import Past, past, relaxed, truth
from regrow.lab.train.loop import Workplace, generator_of
from regrow.lab.train.objective import Losses, Objective, mean_square
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
class PredictorObjective(Objective):
    """Bring the cached call's last tokens to those of the full call, at little cost.

    Args:
        predictor: that learns.
        last_blocks: K, blocks at the end that are always computed.
        price: lambda, of the mean alpha.
    """

    predictor: CachePredictor
    last_blocks: int
    price: float

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
        cost = self.price * alpha[..., : len(self.decided)].float().mean()
        return Losses(mean_square(last, full.last), cost)


@torch.no_grad()
def alpha_at(
    objective: PredictorObjective, examples: Examples, which: Tensor, noise: Tensor, part: float
) -> Tensor:
    """What the predictor says of examples at a part of the run, ``(B, N, L)``.

    Args:
        objective: with the predictor.
        examples: all of them.
        which: numbers of those that are looked at, ``(B,)``.
        noise: of each.
        part: from 0, the noisiest, to 1.
    """
    frozen = objective.frozen
    index = torch.full(which.shape, int(part * len(frozen.steps)))
    batch = examples.at(frozen.steps, which, index, noise, torch.zeros(which.shape, dtype=torch.bool))
    full = truth(frozen, frozen.layout.block_sites, Past({}, batch.x, batch.index), batch.given)
    return objective.predictor.of_samples(full.entered, len(which))


def table(objective: PredictorObjective, place: Workplace, samples: int) -> dict[str, Tensor]:
    """What the predictor says along a run: see `regrow.tokens.shares.Table`.

    Args:
        objective: with the trained predictor.
        place: where it was trained.
        samples: how many examples are looked at: the first, again from the first if there are fewer.

    Returns:
        ``quantiles`` (T, L, Q) and ``alpha`` (T,), the mean over the blocks that are decided for.
    """
    examples, batch = place.examples, place.training.batch
    generator = generator_of(place.training.seed, 0)
    levels = torch.linspace(0, 1, LEVELS, dtype=torch.float64)
    quantiles, means = [], []
    for number in range(PLACES):
        parts = []
        for first in range(0, samples, batch):
            which = torch.arange(first, min(first + batch, samples)) % len(examples)
            noise = examples.noise(len(which), generator)
            found = alpha_at(objective, examples, which, noise, (number + 0.5) / PLACES)
            parts.append(found.double().cpu())
        alpha = torch.cat(parts).flatten(0, 1)
        # Not torch.quantile, which takes no more than 16 million numbers.
        ranked = alpha.sort(0).values
        quantiles.append(ranked[(levels * (len(ranked) - 1)).round().long()].T)
        means.append(alpha[:, : len(objective.decided)].mean())
        place.told("table", number + 1, PLACES)
    return {"quantiles": torch.stack(quantiles), "alpha": torch.stack(means)}
