"""Train Learning-to-Cache's router (arXiv 2406.01733)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from regrow.lab.train.examples import Batch
from regrow.lab.train.frozen import of_sequences, past, relaxed, truth
from regrow.lab.train.objective import Losses, Objective, mean_square

START = 2.0
"""Logit of beta before training: nearly everything is computed."""


class Router(nn.Module):
    """beta in (0, 1) for each layer in each step that is not full: how much of it is computed.

    Args:
        steps: S; steps 0, 2, 4 and so on are full.
        layers: how many.
    """

    def __init__(self, steps: int, layers: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.full((steps // 2, layers), START))

    def forward(self, index: Tensor) -> Tensor:
        """beta ``(B, layers)`` at the odd steps number ``index`` ``(B,)``."""
        return torch.sigmoid(self.logits[index // 2])

    @torch.no_grad()
    def table(self, steps: int) -> Tensor:
        """beta ``(S, layers)`` of all steps; in full ones it is 1."""
        beta = torch.ones(steps, self.logits.shape[1])
        beta[1::2] = torch.sigmoid(self.logits).cpu()
        return beta


@dataclass(frozen=True, eq=False)
class RouterObjective(Objective):
    """Bring the output of a call with mixed layers to that of the full call, with few layers computed.

    Args:
        router: that learns.
        price: lambda, of the sum of beta.
    """

    router: Router
    price: float

    @property
    def earlier(self) -> range:
        """The full steps that another one follows."""
        return range(0, len(self.frozen.steps) - 1, 2)

    @property
    def weights(self) -> Mapping[str, nn.Parameter]:
        return dict(self.router.named_parameters())

    def losses(self, batch: Batch) -> Losses:
        """The mean square between both outputs, and lambda times the sum of beta."""
        sites = self.frozen.layout.layer_sites
        before = past(self.frozen, sites, batch)
        full = truth(self.frozen, self.frozen.layout.block_sites, before, batch.given)
        beta = self.router(before.index)
        weights = {
            site.name: of_sequences(beta[:, i], len(before.kept[site.key]))[:, None, None]
            for i, site in enumerate(sites)
        }
        output, _ = relaxed(self.frozen, sites, before, batch.given, weights)
        return Losses(mean_square(output, full.output), self.price * beta.sum(1).mean())
