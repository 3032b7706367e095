"""The error of a plan that runs, in which the network answers to a latent that has left its path.

With the network frozen, the errors of all gaps between computed steps add up, and may cancel
(`offline_error`). In a run the network makes each error larger or smaller, and turns it, so that they do
not cancel. So here the squares of the gaps' errors are added, each times a factor that depends on the place
of its gap in the run. The factors are few numbers a model, found from a few plans that ran.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from pydantic import Field

from regrow.fields import Checked
from regrow.recover.fit import Array, least_squares

KNOTS = (0.0, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)
"""Places in a run, as shares of its calls, at which the growth is known; closer where it changes most."""
# How much neighbouring knots are held together, beside an error of 1 in the logarithm of one plan.
_STIFFNESS = 0.02
_ROUNDS = 50
# No error is below this share of the largest, so that logarithms exist.
_LEAST = 1e-12


class Growth(Checked):
    """How much an error grows from its place in a run until the end.

    Args:
        logarithms: of the growth of its square at each of `KNOTS`; between them linear.
    """

    logarithms: tuple[float, ...] = Field((0.0,) * len(KNOTS), min_length=len(KNOTS), max_length=len(KNOTS))

    def at(self, places: Array) -> Array:
        """The factor on the square of an error at places in a run, 0 to 1."""
        return np.exp(np.interp(places, KNOTS, self.logarithms))


def gap_errors(gram: Array, influence: Array, weights: Array) -> tuple[Array, Array]:
    """The mean square by which each gap's outputs miss the final latent, and the gaps' places.

    Args:
        gram: ``(T, T)``, the mean product of the outputs of two steps.
        influence: ``(T,)``, see `influence`.
        weights: ``(T, T)``, see `weight_matrix`.

    Returns:
        mean squares with the network frozen, ``(K,)``; the gaps' middles as shares of the run, ``(K,)``.
    """
    total = len(gram)
    begins = np.flatnonzero(np.diag(weights) == 1)
    # A computed step has no error, so each sum is that of the skipped steps behind it.
    missed = np.add.reduceat(influence[:, None] * (np.eye(total) - weights), begins, axis=0)
    squares = np.einsum("gi,ij,gj->g", missed, gram, missed)
    return np.maximum(squares, 0.0), (begins + np.append(begins[1:], total)) / (2 * total)


class FittedGaps:
    """The errors of fitted plans, from a Gram matrix alone.

    An error is the sum over gaps of the mean square by which each gap misses the final latent
    (`gap_errors`), as much as it grows until the end. A gap's depends on its own ends and sources alone, so
    it is computed once, however many plans have that gap.

    Args:
        gram: ``(T, T)``, the mean product of the outputs of two steps.
        influence: ``(T,)``, see `influence`.
        last: how many of the last computed outputs a forecast is made of.
    """

    def __init__(self, gram: Array, influence: Array, last: int) -> None:
        self._gram, self._influence, self._last = gram, influence, last
        self._square = functools.cache(self._missed)

    def error(self, full: Sequence[int], growth: Growth) -> float:
        """The error of the plan that computes these steps."""
        total, last = len(self._gram), self._last
        ends = [*full[1:], total]
        sources = (tuple(full[max(k - last, 0) : k]) for k in range(1, len(full) + 1))
        squares = [self._square(some, end) for some, end in zip(sources, ends, strict=True)]
        places = (np.array(full) + np.array(ends)) / (2 * total)
        return float(np.array(squares) @ growth.at(places))

    def _missed(self, sources: tuple[int, ...], end: int) -> float:
        """The mean square by which the gap from its last source to its end misses the final latent."""
        skipped = list(range(sources[-1] + 1, end))
        if not skipped:
            return 0.0
        weights = least_squares(self._gram, sources, skipped)
        moved = self._influence[skipped]
        factors = np.concatenate([-(weights @ moved), moved])
        steps = [*sources, *skipped]
        return max(float(factors @ self._gram[np.ix_(steps, steps)] @ factors), 0.0)


def fitted_growth(gram: Array, influence: Array, ran: Sequence[tuple[Array, float]]) -> Growth:
    """Fit the growth, so that the sum of gaps' errors tells best how near plans came that ran.

    Errors are compared in decibels, by least squares (Gauss and Newton's steps, damped). That the one is
    of latents and the other of pictures is a factor, which the growth takes in.

    Args:
        gram: of the recorded runs.
        influence: of these runs.
        ran: plans whose errors lie in different parts of the run: the weights of each, ``(T, T)``, see
            `weight_matrix`, and its mean PSNR to the unaccelerated pictures, in dB.

    Raises:
        ValueError: if there is no plan.
    """
    if not ran:
        raise ValueError("ran: it is empty, there must be >= 1 plan")
    known = [gap_errors(gram, influence, weights) for weights, _ in ran]
    # The square of an error counts for the knots on both sides of its place.
    hats = np.array(
        [np.interp(places, KNOTS, row) @ squares for row in np.eye(len(KNOTS)) for squares, places in known]
    )
    parts = hats.reshape(len(KNOTS), len(ran)).T
    parts = np.maximum(parts, _LEAST * max(float(parts.max()), _LEAST))
    wanted = -np.log(10) / 10 * np.array([near for _, near in ran])
    stiff = np.sqrt(_STIFFNESS) * np.diff(np.eye(len(KNOTS)), axis=0)

    def misses(logarithms: Array) -> Array:
        return np.append(np.log(parts @ np.exp(logarithms)) - wanted, stiff @ logarithms)

    found = np.full(len(KNOTS), float(np.mean(wanted - np.log(parts.sum(1)))))
    damping = 1.0
    for _ in range(_ROUNDS):
        shares = parts * np.exp(found)
        slope = np.concatenate([shares / shares.sum(1, keepdims=True), stiff])
        missed = misses(found)
        step = np.linalg.solve(slope.T @ slope + damping * np.eye(len(KNOTS)), -slope.T @ missed)
        better = np.sum(misses(found + step) ** 2) < np.sum(missed**2)
        found = found + step if better else found
        damping = damping / 4 if better else damping * 4
    return Growth(logarithms=tuple(found.tolist()))
