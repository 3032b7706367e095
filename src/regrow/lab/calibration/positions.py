"""Choose which steps of a run are computed: families of positions, and a local search among them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

from regrow.fields import check_within

Positions = tuple[int, ...]
"""The computed steps, ascending, the first is 0."""

POWERS = (1.25, 1.5, 2.0, 3.0)
"""How much denser a family is at one end."""
MOVES = (1, 2, 4)
"""By how many steps the local search moves a computed step."""


def evenly(total: int, count: int) -> Positions:
    """``floor(k T / K)``: of two equal shares of a run the first of each is computed."""
    return dense_at_start(total, count, 1.0)


def dense_at_start(total: int, count: int, power: float) -> Positions:
    """``floor(T (k / K)^power)``, later where two would be the same.

    Args:
        total: steps of the run, T.
        count: computed ones, K.
        power: 1 for even spacing; the higher, the denser at the start.

    Raises:
        ValueError: if there are more computed steps than steps, or none.
    """
    return _spaced(total, count, lambda share: share**power)


def dense_at_end(total: int, count: int, power: float) -> Positions:
    """``floor(T (1 - (1 - k / K)^power))``, else as `dense_at_start`."""
    return _spaced(total, count, lambda share: 1 - (1 - share) ** power)


def denser(total: int, count: int, powers: Sequence[float]) -> dict[str, Positions]:
    """Positions that are denser at the start, by what they are in words."""
    return {f"denser at the start ({power:g})": dense_at_start(total, count, power) for power in powers}


def _spaced(total: int, count: int, place: Callable[[float], float]) -> Positions:
    """Positions by the place in the run of each share of the computed steps."""
    check_within("count", count, 1, total)
    # The tiny share keeps T k / K whole where it is.
    return _distinct([int(total * place(k / count) + 1e-9) for k in range(count)], total)


def families(total: int, count: int) -> tuple[Positions, ...]:
    """Even positions first, then denser ones at the start, the end and both, each once."""
    found = [evenly(total, count)]
    for power in POWERS:
        start, end = dense_at_start(total, count, power), dense_at_end(total, count, power)
        found += [start, end, _distinct([(a + b) // 2 for a, b in zip(start, end, strict=True)], total)]
    return tuple(dict.fromkeys(found))


def neighbours(positions: Positions, total: int) -> Iterator[Positions]:
    """All positions with one computed step moved; the first stays."""
    taken = set(positions)
    for step in positions[1:]:
        for move in (sign * move for move in MOVES for sign in (-1, 1)):
            if 0 < step + move < total and step + move not in taken:
                yield tuple(sorted((taken - {step}) | {step + move}))


def local_search(begin: Positions, total: int, error: Callable[[Positions], float]) -> Positions:
    """Move one computed step at a time to where the error is least, until no move lessens it."""
    best, least = begin, error(begin)
    while True:
        found = min(((error(one), one) for one in neighbours(best, total)), default=(least, best))
        if found[0] >= least:
            return best
        least, best = found


def candidates(
    total: int, count: int, error: Callable[[Positions], float], keep: int = 4
) -> tuple[Positions, ...]:
    """Positions that are worth a run: the best few that differ, and always even ones.

    A local search begins at each of `families`. Of its ends and of the families the best are kept that
    differ from each better one by ``count / 2`` moves of a step in all.

    Args:
        total: steps of the run.
        count: computed ones.
        error: of positions, without a run.
        keep: how many, besides the even ones.
    """
    error, begins = functools.cache(error), families(total, count)
    ends = (local_search(begin, total, error) for begin in begins)
    chosen: list[Positions] = []
    for one in sorted({*begins, *ends}, key=lambda positions: (error(positions), positions)):
        if len(chosen) < keep and all(_distance(one, other) >= count / 2 for other in chosen):
            chosen.append(one)
    return tuple(dict.fromkeys([*chosen, begins[0]]))


def _distance(one: Positions, other: Positions) -> int:
    return sum(abs(a - b) for a, b in zip(one, other, strict=True))


def _distinct(steps: Sequence[int], total: int) -> Positions:
    """Ascending steps, the first is 0 and none is there twice, each moved as little as it must be."""
    found = [0]
    for step in steps[1:]:
        found.append(max(step, found[-1] + 1))
    for k in range(len(found)):
        # So many still follow.
        found[k] = min(found[k], total - len(found) + k)
    return tuple(found)
