"""DaTo's and SiTo's token steps straight from their equations: loops and full matrices, no speed.

Nothing here is shared with the library: every function is written a second time, for one sample of
``N`` tokens, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def cosines(x: Tensor) -> Tensor:
    """``cos(x_i, x_j)`` of all tokens of ``x: (N, C)``; a token of zeros has 0 with every other."""
    rows = x.double()
    length = (rows**2).sum(1, keepdim=True).sqrt()
    unit = rows / length.where(length > 0, 1.0)
    return unit @ unit.T


def sim_score(x: Tensor) -> Tensor:
    """``SimScore_i = sum_j cos(x_i, x_j)``."""
    return cosines(x).sum(1)


def diff_score(last: Tensor, before: Tensor, height: int, width: int) -> Tensor:
    """``mean over channels of |eps(t+2) - eps(t+1)|`` of one sample ``(C, H, W)``, over token areas."""
    channels, rows, columns = last.shape
    differences = (last.double() - before.double()).abs().sum(0).tolist()
    score = torch.zeros(height * width, dtype=torch.float64)
    for i in range(height):
        for j in range(width):
            # The area of a token on a coarser grid, its borders rounded outwards.
            top, bottom = i * rows // height, math.ceil((i + 1) * rows / height)
            left, right = j * columns // width, math.ceil((j + 1) * columns / width)
            total = 0.0
            for a in range(top, bottom):
                for b in range(left, right):
                    total += differences[a][b] / channels
            score[i * width + j] = total / ((bottom - top) * (right - left))
    return score


def patches(height: int, width: int, side: int) -> list[list[int]]:
    """The tokens of each patch, patches row by row; those at the border may be smaller."""
    out = []
    for top in range(0, height, side):
        for left in range(0, width, side):
            out.append(
                [
                    i * width + j
                    for i in range(top, min(top + side, height))
                    for j in range(left, min(left + side, width))
                ]
            )
    return out


def base_tokens(score: Tensor, height: int, width: int, side: int) -> list[int]:
    """The token with the highest score of each patch, the first of equals."""
    of = score.tolist()
    return [max(patch, key=lambda n: (of[n], -n)) for patch in patches(height, width, side)]


def count(ratio: float, tokens: int, base: int) -> int:
    """``K = min(floor(r N), N - |base|)``."""
    return min(math.floor(round(ratio * tokens, 6)), tokens - base)


def nearby_base(token: int, base: list[int], height: int, width: int, side: int) -> list[int]:
    """The base tokens of the 3 x 3 patches around the one a token lies in."""
    columns = math.ceil(width / side)
    row, column = token // width // side, token % width // side
    found = []
    for p, b in enumerate(base):
        if abs(p // columns - row) <= 1 and abs(p % columns - column) <= 1:
            found.append(b)
    return found


def select(
    x: Tensor,
    base: list[int],
    k: int,
    *,
    grid: tuple[int, int, int] | None = None,
    from_all_kept: bool = False,
) -> tuple[list[int], dict[int, int]]:
    """The kept tokens of one sample in ascending order, and the source of every pruned token.

    Args:
        x: features ``(N, C)``.
        base: base tokens.
        k: number of tokens to prune.
        grid: height, width and patch side, to look for base tokens in the surrounding patches only.
        from_all_kept: sources are sought among all kept tokens.
    """
    similar = cosines(x).tolist()
    best: dict[int, tuple[float, int]] = {}
    for n in sorted({*range(x.shape[0])} - {*base}):
        candidates = base if grid is None else nearby_base(n, base, *grid)
        source = max(candidates, key=lambda b: similar[n][b])
        best[n] = (similar[n][source], source)
    pruned = sorted(best, key=lambda n: best[n][0], reverse=True)[:k]
    kept = sorted({*range(x.shape[0])} - {*pruned})
    source_of = {n: best[n][1] for n in pruned}
    if from_all_kept:
        source_of = {n: max(kept, key=lambda b: similar[n][b]) for n in pruned}
    return kept, source_of


def merge(x: Tensor, kept: list[int], source_of: dict[int, int]) -> Tensor:
    """Each kept token's mean with the pruned tokens it stands for: ``(len(kept), C)``."""
    rows = []
    for n in kept:
        group = [n] + [p for p, s in source_of.items() if s == n]
        rows.append(torch.stack([x[g].double() for g in group]).mean(0))
    return torch.stack(rows)


def recover(y: Tensor, kept: list[int], source_of: dict[int, int]) -> Tensor:
    """All N rows from those of the kept tokens: a pruned token copies its source."""
    place = {n: i for i, n in enumerate(kept)}
    tokens = len(kept) + len(source_of)
    return torch.stack([y[place[source_of.get(n, n)]] for n in range(tokens)])


def aligned(scores: list[Tensor], how: str) -> list[Tensor]:
    """CFG alignment over the samples of a batch, the unconditional half first."""
    half = len(scores) // 2
    first, second = scores[:half], scores[half:]
    if how == "off":
        return scores
    if how == "conditional":
        return [*second, *second]
    if how == "unconditional":
        return [*first, *first]
    both = [(a + b) / 2 for a, b in zip(first, second, strict=True)]
    return [*both, *both]


class Pruning:
    """A U-Net's transformer blocks with their layers wrapped to compute kept tokens only.

    Args:
        blocks: transformer blocks with the height and width of their grid.
        base: from the features ``(B, N, C)``, height and width, the base tokens of each sample.
        ratio: share of tokens to prune.
        side: patch side.
        layers: names of the layers that prune: attn1, attn2, ff.
        norm1: features are the input of attn1 instead of the block's.
        means: kept tokens enter a layer as the mean of those they stand for.
        nearby: look for base tokens in the surrounding patches only.
        from_all_kept: sources are sought among all kept tokens.
    """

    def __init__(
        self,
        blocks: list[tuple[Any, int, int]],
        base: Callable[[Tensor, int, int], list[list[int]]],
        ratio: float,
        *,
        side: int = 2,
        layers: tuple[str, ...] = ("attn1",),
        norm1: bool = False,
        means: bool = False,
        nearby: bool = False,
        from_all_kept: bool = False,
    ) -> None:
        self.base, self.ratio, self.side, self.means = base, ratio, side, means
        self.nearby, self.from_all_kept = nearby, from_all_kept
        for block, height, width in blocks:
            for name in layers:
                self.wrap(block, getattr(block, name))
            reads = block.attn1 if norm1 else block
            self.select_before(block, reads, height, width)

    def select_before(self, block: Any, reads: Any, height: int, width: int) -> None:
        forward = reads.forward

        def selecting(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            block.chosen = []
            for sample, base in zip(hidden_states, self.base(hidden_states, height, width), strict=True):
                k = count(self.ratio, height * width, len(base))
                block.chosen.append(
                    select(
                        sample,
                        base,
                        k,
                        grid=(height, width, self.side) if self.nearby else None,
                        from_all_kept=self.from_all_kept,
                    )
                )
            return forward(hidden_states, *args, **kwargs)

        reads.forward = selecting

    def wrap(self, block: Any, layer: Any) -> None:
        forward = layer.forward

        def pruned(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            mask = kwargs.get("attention_mask")
            if mask is not None and layer is block.attn1:
                pairs = zip(mask, block.chosen, strict=True)
                kwargs["attention_mask"] = torch.stack([own[..., kept] for own, (kept, _) in pairs])
            short = []
            for x, (kept, source_of) in zip(hidden_states, block.chosen, strict=True):
                short.append(merge(x, kept, source_of).to(x.dtype) if self.means else x[kept])
            y = forward(torch.stack(short), *args, **kwargs)
            return torch.stack([recover(row, *chosen) for row, chosen in zip(y, block.chosen, strict=True)])

        layer.forward = pruned


def attention_map(query: Tensor, key: Tensor, bias: Tensor | None = None) -> Tensor:
    """Weights ``(B, n, m)`` of queries ``(B, heads, n, D)`` on keys ``(B, heads, m, D)``, over heads."""
    products = torch.einsum("bhnd,bhmd->bhnm", query, key) / query.shape[-1] ** 0.5
    return (products if bias is None else products + bias).softmax(-1).mean(1)


def page_rank(query: Tensor, key: Tensor, iterations: int, bias: Tensor | None, *, rms: bool) -> Tensor:
    """Power iteration on each head's whole map in float64, sample after sample: ``(B, n)``."""
    batch, heads, tokens, channels = query.shape
    out = torch.zeros(batch, tokens, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            weights = (query[b, h].double() @ key[b, h].double().T) / channels**0.5
            if bias is not None:
                weights = weights + bias.expand(batch, heads, tokens, tokens)[b, h].double()
            transposed = weights.softmax(-1).T
            score = torch.ones(tokens, dtype=torch.float64) / tokens
            for _ in range(iterations):
                score = transposed @ score
            out[b] += (score**2 if rms else score) / heads
    return out.sqrt() if rms else out
