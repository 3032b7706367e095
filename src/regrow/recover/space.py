"""Recovery in space: take the kept tokens out, and put every token back from others of the same call."""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor

from regrow.tokens.scores import wide
from regrow.tokens.select import Selection


class Recovery(str, Enum):
    """The source of a pruned token's value."""

    COPY = "copy"
    """The output of the most similar token (pruning)."""
    MEAN = "mean"
    """As copy, but that token enters the layer as the mean of itself and those that copy it (merging)."""


def keep(x: Tensor, selection: Selection) -> Tensor:
    """Take the kept rows of ``x: (B, N, C)``, as ``(B, N - K, C)``."""
    batch, _, channels = x.shape
    flat = x.reshape(-1, channels).index_select(0, selection.keep_rows)
    return flat.view(batch, -1, channels)


def keep_merged(x: Tensor, selection: Selection) -> Tensor:
    """Merge: as `keep`, but each kept row is the mean of itself and the pruned rows that copy from it."""
    batch, _, channels = x.shape
    rows = selection.kept.numel()
    total = x.new_zeros(rows, channels, dtype=wide(x))
    total.index_add_(0, selection.source_rows, x.reshape(-1, channels).to(wide(x)))
    count = x.new_zeros(rows, dtype=wide(x))
    count.index_add_(0, selection.source_rows, torch.ones_like(selection.source_rows, dtype=count.dtype))
    return (total / count[:, None]).to(x.dtype).view(batch, -1, channels)


def recover(y: Tensor, selection: Selection) -> Tensor:
    """Give every token its value from the kept rows ``y: (B, N - K, C)``, as ``(B, N, C)``.

    A kept token gets its own row, a pruned token a copy of its source's row.
    """
    batch, _, channels = y.shape
    flat = y.reshape(-1, channels).index_select(0, selection.source_rows)
    return flat.view(batch, selection.tokens, channels)
