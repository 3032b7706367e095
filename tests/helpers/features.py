"""Features of tokens with the structure that pictures have, and the ties that come with it."""

from __future__ import annotations

import torch
from torch import Tensor


def random(batch: int, height: int, width: int, channels: int = 12) -> Tensor:
    return torch.randn(batch, height * width, channels, generator=torch.Generator().manual_seed(0))


def gradients(batch: int, height: int, width: int, channels: int = 12) -> Tensor:
    """Waves of several lengths over the grid."""
    i = torch.arange(height)[:, None].expand(height, width).flatten()
    j = torch.arange(width).expand(height, width).flatten()
    samples = []
    for b in range(batch):
        waves = [torch.sin(0.13 * (c + 1) * i + 0.21 * (c + b) * j + c) for c in range(channels)]
        samples.append(torch.stack(waves, dim=-1))
    return torch.stack(samples)


def areas(batch: int, height: int, width: int, channels: int = 12, sigma: float = 0.2) -> Tensor:
    """Two constant halves with noise."""
    x = torch.ones(batch, height, width, channels)
    x[:, :, width // 2 :, ::2] = -2
    return x.flatten(1, 2) + sigma * random(batch, height, width, channels)


def flat_areas(batch: int, height: int, width: int, channels: int = 12) -> Tensor:
    """Two halves so nearly constant that similarities differ in their last digits only."""
    return areas(batch, height, width, channels, sigma=1e-2)


def zeros_among_random(batch: int, height: int, width: int, channels: int = 12) -> Tensor:
    x = random(batch, height, width, channels)
    x[:, ::5] = 0
    return x


def constant(batch: int, height: int, width: int, channels: int = 12) -> Tensor:
    """All tokens the same: everything is a tie."""
    return torch.ones(batch, height * width, channels)


WITHOUT_TIES = {"random": random, "gradients": gradients, "areas": areas}
ALL = WITHOUT_TIES | {"flat": flat_areas, "zeros": zeros_among_random, "constant": constant}
