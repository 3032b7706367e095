"""Clusters of tokens: k-means, the graph of neighbouring clusters, pooling over it. All batch-wise."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from regrow.tokens.grid import Grid
from regrow.tokens.scores import random_score, wide


class ClusterAlgorithm(str, Enum):
    """How clusters are compared, and what each gives. In both, clusters are made once.

    On the bundled transformer neither is clearly better (docs/quality-transformer.md).
    """

    PRINTED = "printed"
    """Algorithm 2 of the paper. A cluster's value is pooled from relative noise plus position, over the
    cluster and its neighbours. The first choice is by clusters alone."""
    RELEASED = "released"
    """The released code's. Positions are left out of the pooling, and neighbours after the first choice.
    The stalest of a cluster come in addition to those that moved most, and not in the first cluster."""


class Clusters(NamedTuple):
    """Clusters of tokens.

    Args:
        labels: the cluster of each token ``(B, N)``.
        touching: which clusters are neighbours ``(B, n, n)``.
    """

    labels: Tensor
    touching: Tensor

    @classmethod
    def of(cls, features: Tensor, grid: Grid, count: int, generator: torch.Generator) -> Clusters:
        """The clusters of tokens' features ``(B, N, C)``, at most ``count``, by `k_means`."""
        count = min(count, grid.tokens)
        labels = k_means(features, count, generator)
        return cls(labels, neighbours(labels, grid, count).to(features.dtype))


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


def choose_by_clusters(
    difference: Tensor,
    staleness: Tensor,
    clusters: Clusters,
    grid: Grid,
    count: int,
    *,
    algorithm: ClusterAlgorithm = ClusterAlgorithm.PRINTED,
    scale: float = 1.0,
    share: float = 0.25,
    balance: float = 0.0,
    begins: bool = False,
) -> Tensor:
    """The tokens to compute, by Algorithm 2 of CAT Pruning.

    Clusters come in the order of their values, the tokens that a cluster gives in the order of how far they
    moved; others of the clusters follow if these are too few. The stalest of all the others fill up.

    Args:
        difference: relative noise ``n_t - n_t0``: ``(B, N, D)``.
        staleness: ``f_n`` of each token ``(B, N)``; small is stale.
        clusters: of the tokens.
        grid: of the N tokens.
        count: how many tokens are chosen.
        algorithm: as printed or as released.
        scale: weight of the noise beside the position, in a cluster's value.
        share: of the tokens that the clusters give, but for the first choice.
        balance: share of a cluster's tokens that are its stalest.
        begins: it is the first choice: no token is staler than another, and the clusters give all.

    Returns:
        ``(B, count)`` different tokens.
    """
    labels, moved = clusters.labels, difference.norm(dim=2)
    released, number = algorithm is ClusterAlgorithm.RELEASED, clusters.touching.shape[1]
    given_by_all = count if begins else int(count * share)
    features = difference
    if not released:
        features = difference * scale + positions(grid, difference.shape[2], difference.device)
    pooled = pool_clusters(features, labels, number)
    around = pooled if released and not begins else pool_graph(pooled, clusters.touching)
    value = around.norm(dim=2)
    cluster = rank_within(value, torch.zeros_like(value, dtype=torch.long)).gather(1, labels)
    by_moved = rank = rank_within(moved, labels)
    if begins:
        given = rank < max(given_by_all // 10, 1)
    else:
        # A fifth of the share to a cluster, and three and two times as much to the first two.
        quota = max(given_by_all // 5, 1) * (3 - cluster).clamp_min(1)
        by_stale = rank_within(-staleness, labels)
        if released:
            given = (by_moved < quota) | ((by_stale < (quota * balance).long()) & (cluster > 0))
        else:
            rank = _in_turn(by_moved, by_stale, balance, labels)
            given = rank < quota
    tokens = moved.shape[1]
    key = cluster * tokens + rank + torch.where(given, 0, number * tokens)
    first = key.topk(given_by_all, dim=1, largest=False).indices
    stale = staleness.scatter(1, first, torch.inf)
    # Of equally stale tokens those that moved most come first.
    order = moved.argsort(stable=True, dim=1, descending=True)
    rest = stale.gather(1, order).argsort(stable=True, dim=1)[:, : count - given_by_all]
    return torch.cat([first, order.gather(1, rest)], 1)


def _in_turn(by_moved: Tensor, by_stale: Tensor, balance: float, labels: Tensor) -> Tensor:
    """The place of each token in its cluster: by movement and by staleness in turn, by their shares."""
    if balance == 0:
        return by_moved
    if balance == 1:
        return by_stale
    turn = torch.minimum(by_moved / (1 - balance), (by_stale + 0.5) / balance)
    return rank_within(-turn, labels)


def _nearest(x: Tensor, centres: Tensor) -> Tensor:
    """Find the nearest centre of each token; |x|^2 is left out, as it does not change which is nearest."""
    return (centres.square().sum(2)[:, None] - 2 * x @ centres.transpose(1, 2)).argmin(2)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))
