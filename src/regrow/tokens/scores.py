"""A score per token: which tokens are worth computing. Every function returns ``(B, N)``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from regrow.tokens.grid import Grid


def inverse_norm(x: Tensor) -> Tensor:
    """``1 / ||x_i||`` of each token of ``x: (B, N, C)``, in float32; 0 for a token of zeros."""
    norm = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32)
    return torch.where(norm > 0, 1 / norm, 0.0)


def sim_score(x: Tensor) -> Tensor:
    """SimScore of SiTo, ``sum_j cos(x_i, x_j)``, without the N x N matrix.

    ``sum_j cos(x_i, x_j) = x_i / ||x_i|| . sum_j x_j / ||x_j||``: two products of a matrix and a vector.

    Args:
        x: features ``(B, N, C)``.
    """
    inverse = inverse_norm(x)
    # The mean instead of the sum: products with the sum overflow in float16.
    mean = (inverse[:, None].to(x.dtype) @ x).float() / x.shape[1]
    return (x @ mean.to(x.dtype).transpose(1, 2)).squeeze(-1).float() * inverse * x.shape[1]


def diff_score(last: Tensor, before: Tensor, grid: Grid) -> Tensor:
    """Temporal noise difference of DaTo: ``mean over channels of |eps(t+2) - eps(t+1)|``.

    Args:
        last: the model's last output ``(B, C, H, W)``.
        before: the output before that, same shape.
        grid: the grid of the layer; a coarser one than H x W takes the mean of the area it covers.
    """
    difference = (last.float() - before.float()).abs().mean(1, keepdim=True)
    if difference.shape[-2:] != (grid.height, grid.width):
        size = (grid.height, grid.width)
        difference = torch.nn.functional.adaptive_avg_pool2d(difference, size)
    return difference.flatten(1)


def random_score(batch: int, grid: Grid, generator: torch.Generator) -> Tensor:
    """Uniform random scores from a seeded generator, on its device."""
    return torch.rand(batch, grid.tokens, generator=generator, device=generator.device)


def noise(shape: Sequence[int], sigma: float, generator: torch.Generator) -> Tensor:
    """``sigma * N(0, 1)`` from a seeded generator, on its device."""
    return sigma * torch.randn(shape, generator=generator, device=generator.device)
