"""From scores to a selection: which tokens are kept, and whose value each pruned token takes."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from regrow.tokens.grid import Grid, patch_of_token, surrounding_patches, tokens_of_patch
from regrow.tokens.scores import inverse_norm, random_score

# Queries whose similarities are held at once: 1,024 x 1,024 floats stay in a processor's cache.
ROWS = 1024


@dataclass(frozen=True)
class Selection:
    """Which tokens are computed, and where every token's value comes from afterwards.

    Args:
        kept: ``(B, N - K)`` indices of the tokens that are computed.
        source: ``(B, N)``, for each token the position in ``kept`` of the token whose value it takes;
            a kept token's own position, a pruned token's most similar one.
        keep_rows: ``kept`` as rows of a ``(B * N, C)`` matrix.
        source_rows: ``source`` as rows of a ``(B * (N - K), C)`` matrix.
    """

    kept: Tensor
    source: Tensor
    keep_rows: Tensor
    source_rows: Tensor

    @classmethod
    def of(cls, kept: Tensor, source: Tensor) -> Selection:
        """Build a selection from ``kept`` and ``source``."""
        batch, tokens = source.shape
        sample = torch.arange(batch, device=kept.device)[:, None]
        return cls(
            kept,
            source,
            (kept + sample * tokens).flatten(),
            (source + sample * kept.shape[1]).flatten(),
        )

    @classmethod
    def matched(cls, kept: Tensor, pruned: Tensor, match: Tensor) -> Selection:
        """Build a selection from tokens and, for each pruned one, the position of its source in ``kept``.

        Args:
            kept: ``(B, N - K)`` token indices.
            pruned: ``(B, K)``, all the others.
            match: ``(B, K)``.
        """
        tokens = kept.shape[1] + pruned.shape[1]
        place = torch.arange(kept.shape[1], device=kept.device).expand_as(kept)
        source = torch.empty(len(kept), tokens, dtype=torch.long, device=kept.device)
        return cls.of(kept, source.scatter_(1, kept, place).scatter_(1, pruned, match))

    @property
    def tokens(self) -> int:
        """Number of tokens N before pruning."""
        return self.source.shape[1]


def complement(index: Tensor, tokens: int) -> Tensor:
    """The tokens not in ``index``, in ascending order, without a data-dependent shape.

    Args:
        index: ``(B, n)`` different token indices.
        tokens: number of tokens N.

    Returns:
        ``(B, N - n)``.
    """
    batch, chosen = index.shape
    rest = tokens - chosen
    free = torch.ones(batch, tokens, dtype=torch.bool, device=index.device)
    free.scatter_(1, index, False)
    # Chosen tokens all write to one spare place behind the end.
    place = torch.where(free, free.cumsum(1) - 1, rest)
    every = torch.arange(tokens, device=index.device).expand(batch, tokens)
    return every.new_empty(batch, rest + 1).scatter_(1, place, every)[:, :rest]


def top_share(score: Tensor, count: int) -> Tensor:
    """The ``count`` tokens of highest score of all: ``(B, count)``."""
    return score.topk(count, dim=1, sorted=False).indices


def flat_rows(index: Tensor, tokens: int) -> Tensor:
    """Token indices ``(B, n)`` as rows of a ``(B * N, C)`` matrix: ``(B * n,)``."""
    return (index + torch.arange(len(index), device=index.device)[:, None] * tokens).flatten()


def rows_of(x: Tensor, index: Tensor) -> Tensor:
    """The rows ``index: (B, n)`` of ``x: (B, N, C)`` as ``(B, n, C)``."""
    return take_rows(x, flat_rows(index, x.shape[1]))


def take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """The rows ``(B * n,)`` of ``x: (B, N, C)``, taken as a ``(B * N, C)`` matrix, as ``(B, n, C)``."""
    batch, _, channels = x.shape
    return x.reshape(-1, channels).index_select(0, rows).view(batch, -1, channels)


def put_rows(x: Tensor, rows: Tensor, new: Tensor) -> None:
    """Write ``new: (B, n, ...)`` over the rows ``(B * n,)`` of ``x: (B, N, ...)``, in place."""
    x.view(x.shape[0] * x.shape[1], -1).index_copy_(0, rows, new.reshape(len(rows), -1))


def behind(tokens: Tensor, text: int) -> Tensor:
    """Of sequences of text tokens and then the image's, all of the text and these of the image.

    Args:
        tokens: ``(B, n)`` indices of image tokens.
        text: number of text tokens T.

    Returns:
        ``(B, T + n)`` indices in the sequences.
    """
    words = torch.arange(text, device=tokens.device).expand(len(tokens), -1)
    return torch.cat([words, tokens + text], 1)


@dataclass(frozen=True, eq=False)
class Subset:
    """Some of an image's tokens, the same number in each sample.

    Args:
        tokens: ``(B, n)`` indices, ascending.
        image: number N of the image's tokens.
    """

    tokens: Tensor
    image: int
    _rows: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)

    def rows(self, length: int) -> Tensor:
        """These tokens and all of the text before them, as rows of a ``(B * length, C)`` matrix.

        Args:
            length: of a sequence of T text tokens and the image's: T + N, or N without text.

        Returns:
            ``(B * (T + n),)``.
        """
        if length not in self._rows:
            self._rows[length] = flat_rows(behind(self.tokens, length - self.image), length)
        return self._rows[length]


def most_similar(
    x: Tensor, query: Tensor, candidate: Tensor, *, exact: bool = False
) -> tuple[Tensor, Tensor]:
    """For each query token, the candidate token of highest cosine similarity.

    Similarities are formed a block of ``ROWS`` queries at a time and reduced at once; nothing of size
    N x N is ever held.

    Args:
        x: features ``(B, N, C)``.
        query: ``(B, n)`` token indices.
        candidate: ``(B, m)`` token indices.
        exact: multiply half-precision features in float32.

    Returns:
        The similarity ``(B, n)``, at least in float32, and the position in ``candidate`` ``(B, n)``.
    """
    inverse = inverse_norm(x)
    # Scaling the query by its norm changes its similarities but not their order, so it waits.
    target, mean = _targets(x, candidate, inverse, exact)
    asked = rows_of(x, query)
    value, index = inverse.new_empty(query.shape), torch.empty_like(query)
    for start in range(0, query.shape[1], ROWS):
        part = slice(start, start + ROWS)
        rows = asked[:, part].to(target.dtype)
        best, index[:, part] = (rows @ target.transpose(1, 2)).max(-1)
        value[:, part] = best + _shared(rows, mean)
    return value * inverse.gather(1, query), index


def _targets(x: Tensor, candidate: Tensor, inverse: Tensor, exact: bool) -> tuple[Tensor, Tensor | None]:
    """The candidates at length 1, in the precision of the products, and the mean taken from them.

    What they have in common adds the same to all similarities of a query. Without it the products are
    smaller, and half precision rounds them less. In other precisions nothing is taken.
    """
    target = rows_of(x, candidate) * inverse.gather(1, candidate)[..., None]
    if exact or x.dtype is target.dtype:
        return target, None
    mean = target.mean(1, keepdim=True)
    return (target - mean).to(x.dtype), mean


def _shared(query: Tensor, mean: Tensor | None) -> Tensor | float:
    """The products ``(B, n)`` of queries and the mean that `_targets` took."""
    return 0.0 if mean is None else (query.to(mean.dtype) @ mean.transpose(1, 2)).squeeze(2)


def most_similar_nearby(
    x: Tensor, query: Tensor, base: Tensor, grid: Grid, *, exact: bool = False
) -> tuple[Tensor, Tensor]:
    """As `most_similar` with one base token a patch, but only those of the 3 x 3 patches around.

    Args:
        x: features ``(B, N, C)``.
        query: ``(B, n)`` token indices.
        base: ``(B, patches)``, the base token of each patch.
        grid: the grid of the N tokens.
        exact: multiply half-precision features in float32.
    """
    batch, _, channels = x.shape
    inverse = inverse_norm(x)
    members, around = tokens_of_patch(grid, x.device), surrounding_patches(grid, x.device)
    target, mean = _targets(x, base, inverse, exact)
    near = target[:, around.clamp(min=0).flatten()].view(batch * grid.patches, 9, channels)
    asked = x[:, members.clamp(min=0).flatten()].view(batch * grid.patches, -1, channels).to(near.dtype)
    similarity = (asked @ near.transpose(1, 2)).view(batch, grid.patches, -1, 9)
    similarity = similarity.masked_fill((around < 0)[:, None], -torch.inf)
    best, which = similarity.max(-1)
    # Back from (patch, slot) to tokens; the slots a border patch lacks have no token to go to.
    patch = patch_of_token(grid, x.device)
    token = torch.arange(grid.tokens, device=x.device)
    row, column = token // grid.width % grid.patch, token % grid.width % grid.patch
    slot = patch * grid.patch**2 + row * grid.patch + column
    value = (best.flatten(1)[:, slot] + _shared(x, mean)) * inverse
    index = around.flatten()[(patch * 9) + which.flatten(1)[:, slot]]
    return value.gather(1, query), index.gather(1, query)


def prune_similar(
    x: Tensor,
    base: Tensor,
    grid: Grid,
    count: int,
    *,
    nearby: bool = False,
    from_all_kept: bool = False,
    exact: bool = False,
) -> Selection:
    """Prune the ``count`` tokens that are most similar to a base token.

    DaTo steps 4 and 5 and SiTo's step 2: of the tokens that are not base tokens, those with the
    highest similarity to a base token are pruned and take the value of that base token.

    Args:
        x: features ``(B, N, C)``.
        base: ``(B, m)`` base tokens, never pruned.
        grid: the grid of the N tokens.
        count: number K of tokens to prune, the same for every sample; 0 <= K <= N - m.
        nearby: look for base tokens in the surrounding 3 x 3 patches only; needs one base token a
            patch, in the order of the patches.
        from_all_kept: a pruned token takes the value of the most similar of ALL kept tokens, as the
            released code does, instead of the most similar base token.
        exact: measure similarity of half-precision features in float32.
    """
    rest = complement(base, x.shape[1])
    if nearby:
        similarity, match = most_similar_nearby(x, rest, base, grid, exact=exact)
    else:
        similarity, match = most_similar(x, rest, base, exact=exact)
    order = similarity.argsort(dim=1, descending=True)
    gone, stay = order[:, :count], order[:, count:]
    pruned = rest.gather(1, gone)
    kept = torch.cat([base, rest.gather(1, stay)], dim=1)
    match = most_similar(x, pruned, kept, exact=exact)[1] if from_all_kept else match.gather(1, gone)
    return Selection.matched(kept, pruned, match)


def unlike_destinations(x: Tensor, grid: Grid, generator: torch.Generator) -> Tensor:
    """How little each token is like the destinations of ToMe, one a patch by chance: ``(B, N)``.

    Destinations have the highest scores.

    Args:
        x: features ``(B, N, C)``.
        grid: of the N tokens.
        generator: draws the destinations, the same in all samples.
    """
    members = tokens_of_patch(grid, x.device)
    chance = random_score(grid.tokens, generator)[0].to(x.device)
    score = torch.where(members >= 0, chance[members.clamp(min=0)], -1.0)
    base = members.gather(1, score.argmax(1, keepdim=True)).T.expand(len(x), -1)
    rest = complement(base, grid.tokens)
    similarity, _ = most_similar(x, rest, base)
    first = 2 + chance.expand(len(x), -1).to(similarity.dtype)
    return first.clone().scatter_(1, rest, -similarity)
