"""A score per token: which tokens are worth computing. Every function returns ``(B, N)``."""

from __future__ import annotations

import math
from collections.abc import Iterator
from enum import Enum

import torch
from torch import Tensor
from torch.nn.functional import normalize

from regrow.tokens.grid import Grid, best_of_patch

# Attention weights held at once: 64 MiB of them.
WEIGHTS = 1 << 24
# A map kept from one iteration of PageRank to the next: 256 MiB, a head of up to 8,192 tokens.
MAP = 1 << 26


class Heads(str, Enum):
    """How the scores of an attention's heads become one."""

    ROOT_MEAN_SQUARE = "rms"
    """The root of the mean of their squares: a token that matters much to few heads counts for more."""
    MEAN = "mean"
    """Their mean."""


def wide(x: Tensor) -> torch.dtype:
    """The precision in which sums over ``x`` are taken: float32, or float64 if it is in that."""
    return torch.promote_types(x.dtype, torch.float32)


def inverse_norm(x: Tensor) -> Tensor:
    """``1 / ||x_i||`` of each token of ``x: (B, N, C)``, at least in float32; 0 for a token of zeros."""
    norm = torch.linalg.vector_norm(x, dim=-1, dtype=wide(x))
    return torch.where(norm > 0, 1 / norm, 0.0)


def sim_score(x: Tensor) -> Tensor:
    """SimScore of SiTo, ``sum_j cos(x_i, x_j)``, without the N x N matrix.

    ``sum_j cos(x_i, x_j) = x_i / ||x_i|| . sum_j x_j / ||x_j||``: two products of a matrix and a vector.
    They are of float32 at least: half precision would round sums of thousands by more than SiTo's noise.

    Args:
        x: features ``(B, N, C)``.
    """
    x, inverse = x.to(wide(x)), inverse_norm(x)
    total = inverse[:, None] @ x
    return (x @ total.transpose(1, 2)).squeeze(-1) * inverse


def diff_score(last: Tensor, before: Tensor, grid: Grid) -> Tensor:
    """Temporal noise difference of DaTo: ``mean over channels of |eps(t+2) - eps(t+1)|``.

    Args:
        last: the model's last output ``(B, C, H, W)``.
        before: the output before that, same shape.
        grid: the grid of the layer; a coarser one than H x W takes the mean of the area it covers.
    """
    difference = (last.to(wide(last)) - before.to(wide(before))).abs().mean(1, keepdim=True)
    if difference.shape[-2:] != (grid.height, grid.width):
        size = (grid.height, grid.width)
        difference = torch.nn.functional.adaptive_avg_pool2d(difference, size)
    return difference.flatten(1)


def random_score(tokens: int, generator: torch.Generator) -> Tensor:
    """Draw uniform scores ``(1, N)``, on the generator's device.

    All samples share them: chance drawn for each would depend on the batch that a picture is made in.
    """
    return torch.rand(1, tokens, generator=generator, device=generator.device)


def noise(tokens: int, sigma: float, generator: torch.Generator) -> Tensor:
    """Draw ``sigma * N(0, 1)`` for each token ``(1, N)``; as in `random_score`, all samples share it."""
    return sigma * torch.randn(1, tokens, generator=generator, device=generator.device)


def attention_influence(
    query: Tensor, key: Tensor, queries: int | None = None, bias: Tensor | None = None
) -> Tensor:
    """How much the others attend to each token: the column sums of the attention map, mean over heads.

    The map is formed a few queries at a time, so that it is never held whole.

    Args:
        query: ``(B, heads, n, D)``.
        key: ``(B, heads, m, D)``.
        queries: look at so many evenly spaced queries only, and scale to all; None looks at all.
        bias: added to the products; it broadcasts to ``(B, heads, n, m)``.

    Returns:
        ``(B, m)``, at least in float32; the sum over tokens is n.
    """
    count = query.shape[2]
    if queries is not None and queries < count:
        place = torch.arange(queries, device=query.device) * count // queries
        query = query.index_select(2, place)
        if bias is not None and bias.shape[-2] == count:
            bias = bias.index_select(-2, place)
    total = torch.zeros(key.shape[0], key.shape[2], device=key.device, dtype=wide(key))
    for weights in _attention_weights(query, key, bias):
        total += weights.mean(1).sum(1)
    return total * (count / query.shape[2])


def attention_page_rank(
    query: Tensor,
    key: Tensor,
    iterations: int,
    *,
    heads: Heads = Heads.ROOT_MEAN_SQUARE,
    bias: Tensor | None = None,
) -> Tensor:
    """Weighted PageRank of the attention map A as a directed graph: ``s <- A^T s``, begun with ``1 / n``.

    A token matters if tokens that matter attend to it. Each head has its graph; their scores are put
    together at the end. Maps are held for a few heads at a time; one too large for that is formed anew in
    every iteration, a few queries at a time.

    Args:
        query: ``(B, heads, n, D)``.
        key: ``(B, heads, n, D)``.
        iterations: number of iterations; of 0, all tokens are alike.
        heads: how the scores of the heads become one.
        bias: added to the products; it broadcasts to ``(B, heads, n, n)``.

    Returns:
        ``(B, n)``, at least in float32; of each head the scores sum to 1.
    """
    batch, count, tokens = query.shape[:3]
    score = torch.full((batch, count, tokens), 1 / tokens, device=query.device, dtype=wide(query))
    together = max(WEIGHTS // tokens**2, 1)
    for b in range(batch):
        for first in range(0, count, together):
            some = slice(b, b + 1), slice(first, first + together)
            added = None if bias is None else bias.expand(batch, count, -1, -1)[some]
            score[some] = _page_rank(query[some], key[some], added, score[some], iterations)
    return score.mean(1) if heads is Heads.MEAN else score.square().mean(1).sqrt()


def _page_rank(query: Tensor, key: Tensor, bias: Tensor | None, score: Tensor, iterations: int) -> Tensor:
    """Iterations of PageRank from a score ``(B, heads, n)``."""
    held = None
    if score.shape[0] * score.shape[1] * score.shape[2] ** 2 <= MAP:
        held = list(_attention_weights(query, key, bias))
    for _ in range(iterations):
        new, start = torch.zeros_like(score), 0
        for weights in _attention_weights(query, key, bias) if held is None else held:
            end = start + weights.shape[2]
            new += (score[:, :, None, start:end] @ weights).squeeze(2)
            start = end
        # Rows of the map sum to 1, so that this only keeps rounding from adding up.
        score = new / new.sum(-1, keepdim=True)
    return score


def most_attended(
    query: Tensor, key: Tensor, asking: Tensor, candidate: Tensor, bias: Tensor | None = None
) -> Tensor:
    """For each asking token, the candidate that it attends to most, the mean over heads taken first.

    Args:
        query: ``(B, heads, n, D)``.
        key: ``(B, heads, m, D)``.
        asking: ``(B, a)`` indices of queries.
        candidate: ``(B, c)`` indices of keys.
        bias: added to the products; it broadcasts to ``(B, heads, n, m)``.

    Returns:
        The position in ``candidate``: ``(B, a)``.
    """
    batch, heads, count, channels = query.shape
    row = asking[:, None, :, None]
    asked = query.gather(2, row.expand(-1, heads, -1, channels))
    if bias is not None and bias.shape[-2] == count:
        own = bias.expand(batch, -1, -1, -1)
        bias = own.gather(2, row.expand(-1, own.shape[1], -1, own.shape[3]))
    found = []
    for weights in _attention_weights(asked, key, bias):
        each = weights.mean(1)
        found.append(each.gather(2, candidate[:, None].expand(-1, each.shape[1], -1)).argmax(-1))
    return torch.cat(found, dim=1)


def attention_entropy(query: Tensor, key: Tensor, bias: Tensor | None = None) -> Tensor:
    """Entropy of each query's attention weights, the mean over heads taken first.

    Args:
        query: ``(B, heads, n, D)``.
        key: ``(B, heads, m, D)``.
        bias: added to the products; it broadcasts to ``(B, heads, n, m)``.

    Returns:
        ``(B, n)``, at least in float32.
    """
    parts = [w.mean(1) for w in _attention_weights(query, key, bias)]
    return torch.cat([torch.special.entr(w).sum(-1) for w in parts], dim=1)


def influence_on_others(
    query: Tensor, key: Tensor, tokens: int, *, queries: int | None = None, bias: Tensor | None = None
) -> Tensor:
    """ToCa's s1, influence on other tokens: `attention_influence` of the first ``tokens`` keys, of norm 1.

    Returns:
        ``(B, N)`` with N = ``tokens``, the image's; keys behind them are of the text.
    """
    return normalize(attention_influence(query, key, queries, bias)[:, :tokens], dim=1)


def influence_of_text(query: Tensor, key: Tensor, bias: Tensor | None = None) -> Tensor:
    """ToCa's s2, control ability: 1 + the entropy of the cross-attention weights, of norm 1: ``(B, N)``.

    The 1 and the norm are the released code's.
    """
    return normalize(1 + attention_entropy(query, key, bias), dim=1)


def best_of_cell(score: Tensor, grid: Grid) -> Tensor:
    """ToCa's s4, uniform spatial distribution: the score of the best token of each k x k cell, else 0.

    That the bonus is in proportion to the score is the released code's.

    Args:
        score: ``(B, N)``.
        grid: of the tokens, with k as its patch.
    """
    best = best_of_patch(score, grid)
    return torch.zeros_like(score).scatter_(1, best, score.gather(1, best))


def _attention_weights(query: Tensor, key: Tensor, bias: Tensor | None) -> Iterator[Tensor]:
    """The attention map ``(B, heads, n, m)``, at least in float32, a block of queries at a time."""
    batch, heads, count, channels = query.shape
    rows = max(WEIGHTS // (batch * heads * key.shape[2]), 1)
    target = key.transpose(2, 3)
    for start in range(0, count, rows):
        product = (query[:, :, start : start + rows] / math.sqrt(channels)) @ target
        if bias is not None:
            whole = bias.shape[-2] == 1
            product = product + (bias if whole else bias[..., start : start + rows, :])
        yield product.softmax(-1, dtype=wide(query))
