"""The grid of tokens, and its division into patches.

A grid of ``height x width`` tokens is stored row by row, so token ``n`` sits at
``(n // width, n % width)``. Patches are ``side x side`` and do not overlap; where a side of the grid
is not a multiple of the patch, the last patch of the row or column is smaller.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """A grid of tokens and the side of its patches.

    Args:
        height: rows of tokens.
        width: columns of tokens.
        patch: side of a patch, in tokens.
    """

    height: int
    width: int
    patch: int = 2

    def __post_init__(self) -> None:
        for name in ("height", "width", "patch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} is not allowed, it must be >= 1")

    @property
    def tokens(self) -> int:
        """Number of tokens N."""
        return self.height * self.width

    @property
    def patch_rows(self) -> int:
        return ceil(self.height / self.patch)

    @property
    def patch_columns(self) -> int:
        return ceil(self.width / self.patch)

    @property
    def patches(self) -> int:
        """Number of patches: the number of base tokens if each patch gives one."""
        return self.patch_rows * self.patch_columns

    def pruned(self, ratio: float, base: int | None = None) -> int:
        """Count the tokens that a ratio prunes: ``floor(ratio * N)``, but never one of the ``base`` tokens.

        Args:
            ratio: share of the N tokens to prune, 0 <= ratio < 1.
            base: number of base tokens; default: the number of patches.
        """
        # Without the small term 0.3 * 10 == 2.9999... would prune a token too few.
        wanted = int(ratio * self.tokens + 1e-6)
        return min(wanted, self.tokens - (self.patches if base is None else base))


def grid_of_positions(positions: Tensor | None, tokens: int) -> Grid | None:
    """Find the grid of tokens from their positions.

    Args:
        positions: ``(N, 3)`` or ``(1, N, 3)``; rows and columns are the last two.
        tokens: number of tokens N.

    Returns:
        None if the tokens do not form one grid, row by row (several pictures in one sequence). On the
        meta device, where there is no data, one row of N tokens.
    """
    if positions is None:
        return None
    if positions.is_meta:
        return Grid(1, tokens)
    places = positions.reshape(-1, positions.shape[-1])[:, -2:].cpu().long()
    height, width = (places.amax(0) + 1).tolist()
    if height * width != tokens:
        return None
    in_order = torch.cartesian_prod(torch.arange(height), torch.arange(width))
    return Grid(height, width) if torch.equal(places, in_order.view(-1, 2)) else None


def best_of_patch(score: Tensor, grid: Grid) -> Tensor:
    """Find the token with the highest score in each patch.

    Args:
        score: ``(B, N)``, a score for each token; the first of equal scores wins.
        grid: the grid of the N tokens.

    Returns:
        ``(B, patches)`` token indices, patches row by row.
    """
    s, rows, columns = grid.patch, grid.patch_rows, grid.patch_columns
    field = score.reshape(-1, grid.height, grid.width)
    missing = (0, columns * s - grid.width, 0, rows * s - grid.height)
    if any(missing):
        field = torch.nn.functional.pad(field, missing, value=-torch.inf)
    cells = field.reshape(-1, rows, s, columns, s).transpose(2, 3).reshape(-1, rows, columns, s * s)
    slot = cells.argmax(-1)
    row = torch.arange(rows, device=score.device)[:, None] * s + slot // s
    column = torch.arange(columns, device=score.device) * s + slot % s
    return (row * grid.width + column).flatten(1)


def patch_of_token(grid: Grid, device: torch.device | None = None) -> Tensor:
    """List the patch of each token: ``(N,)``."""
    row = torch.arange(grid.height, device=device) // grid.patch
    column = torch.arange(grid.width, device=device) // grid.patch
    return (row[:, None] * grid.patch_columns + column).flatten()


def tokens_of_patch(grid: Grid, device: torch.device | None = None) -> Tensor:
    """List the tokens of each patch: ``(patches, patch * patch)``, -1 where a border patch has fewer."""
    s = grid.patch
    row = torch.arange(grid.patch_rows * s, device=device).reshape(grid.patch_rows, 1, s, 1)
    column = torch.arange(grid.patch_columns * s, device=device).reshape(1, grid.patch_columns, 1, s)
    index = row * grid.width + column
    inside = (row < grid.height) & (column < grid.width)
    return torch.where(inside, index, -1).reshape(grid.patches, s * s)


def surrounding_patches(grid: Grid, device: torch.device | None = None) -> Tensor:
    """List the 3 x 3 patches around each patch: ``(patches, 9)``, -1 outside the grid."""
    around = torch.arange(-1, 2, device=device)
    row = (torch.arange(grid.patch_rows, device=device)[:, None] + around).reshape(-1, 1, 3, 1)
    column = (torch.arange(grid.patch_columns, device=device)[:, None] + around).reshape(1, -1, 1, 3)
    inside = (row >= 0) & (row < grid.patch_rows) & (column >= 0) & (column < grid.patch_columns)
    index = row * grid.patch_columns + column
    return torch.where(inside, index, -1).reshape(grid.patches, 9)
