"""Clusters of tokens: k-means, the graph of neighbouring clusters, pooling over it. All batch-wise."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from regrow.tokens.grid import Grid
from regrow.tokens.scores import random_score, wide


def positions(grid: Grid, channels: int, device: torch.device) -> Tensor:
    """Make CAT Pruning's positional encoding ``(N, C)``: row / height in the first half of the channels,
    column / width in the second."""
    index = torch.arange(grid.tokens, device=device)
    row = (index // grid.width / grid.height)[:, None]
    column = (index % grid.width / grid.width)[:, None]
    return torch.cat([row.expand(-1, channels // 2), column.expand(-1, channels - channels // 2)], 1)


def k_means(x: Tensor, clusters: int, generator: torch.Generator, rounds: int = 10) -> Tensor:
    """Cluster tokens by Lloyd's k-means: squared distances, a fixed number of rounds.

    Args:
        x: ``(B, N, C)``.
        clusters: number of clusters, <= N.
        generator: draws the clusters' first centres, the same tokens in all samples.
        rounds: number of rounds of assignment and averaging.

    Returns:
        ``(B, N)``, the cluster of each token. A cluster may be empty.
    """
    x = x.to(wide(x))
    first = random_score(x.shape[1], generator).to(x.device).topk(clusters, dim=1).indices
    centres = _rows(x, first.expand(len(x), -1))
    labels = _nearest(x, centres)
    every = torch.arange(clusters, device=x.device)
    for _ in range(rounds):
        member = (labels[..., None] == every).to(x.dtype)
        count = member.sum(1)[..., None]
        # An empty cluster stays where it is.
        centres = torch.where(count > 0, member.transpose(1, 2) @ x / count.clamp_min(1), centres)
        labels = _nearest(x, centres)
    return labels


def neighbours(labels: Tensor, grid: Grid, clusters: int) -> Tensor:
    """Find which clusters touch: ``(B, n, n)``, 1 on the diagonal and where a token of one cluster is next
    to a token of the other in its row or column."""
    field = labels.view(-1, grid.height, grid.width)
    touching = torch.eye(clusters, device=labels.device).repeat(len(labels), 1, 1)
    for a, b in ((field[:, 1:], field[:, :-1]), (field[:, :, 1:], field[:, :, :-1])):
        pair = (a * clusters + b).flatten(1)
        flat = touching.view(len(labels), -1)
        flat.scatter_(1, pair, 1.0)
    return torch.maximum(touching, touching.transpose(1, 2))


def pool_clusters(x: Tensor, labels: Tensor, clusters: int) -> Tensor:
    """Take each channel's maximum over the tokens of a cluster: ``(B, n, C)``; 0 for an empty cluster."""
    index = labels[..., None].expand_as(x)
    lowest = x.new_full((x.shape[0], clusters, x.shape[2]), -torch.inf)
    pooled = lowest.scatter_reduce(1, index, x, "amax")
    return torch.where(pooled.isinf(), 0.0, pooled)


def pool_graph(x: Tensor, touching: Tensor) -> Tensor:
    """Average each cluster's features ``(B, n, C)`` with those of the clusters it touches."""
    return touching @ x / touching.sum(2, keepdim=True)


def rank_within(score: Tensor, labels: Tensor) -> Tensor:
    """Rank tokens in their clusters by score: ``(B, N)``, 0 is the highest; equal scores: in order."""
    order = score.argsort(stable=True, dim=1, descending=True)
    by_cluster = labels.gather(1, order).argsort(stable=True, dim=1)
    # Tokens are sorted by cluster, then by score: the rank is the distance from the cluster's first token.
    sorted_tokens = order.gather(1, by_cluster)
    sorted_labels = labels.gather(1, sorted_tokens)
    place = torch.arange(score.shape[1], device=score.device).expand_as(labels)
    new = F.pad(sorted_labels[:, 1:] != sorted_labels[:, :-1], (1, 0), value=True)
    start = torch.where(new, place, 0).cummax(1).values
    return torch.empty_like(labels).scatter_(1, sorted_tokens, place - start)


def _nearest(x: Tensor, centres: Tensor) -> Tensor:
    """Find the nearest centre of each token; |x|^2 is left out, as it does not change which is nearest."""
    return (centres.square().sum(2)[:, None] - 2 * x @ centres.transpose(1, 2)).argmin(2)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))
