"""Weights of skipped steps, and the error of a plan, from the Gram matrix of recorded outputs alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from regrow.fields import MOST_WEIGHT
from regrow.recover.time import Fitted, FittedStep, TimeRecovery
from regrow.words import shown

Array = npt.NDArray[np.float64]

RIDGE = 1e-9
"""Keeps the solution finite where outputs are alike."""


def fitted(
    gram: Array,
    full: Sequence[int],
    *,
    last: int | None = None,
    towards: TimeRecovery | None = None,
    ridge: float = RIDGE,
) -> Fitted:
    """The weights with which the computed outputs are nearest to each skipped step's, in least squares.

    Args:
        gram: ``(T, T)``, the mean product of the outputs of two steps.
        full: the computed steps, ascending, the first is 0.
        last: how many of the last computed outputs a step is made of; all if None.
        towards: the ridge pulls towards its weights instead of towards 0.
        ridge: strength of the pull, as a share of the mean square of the outputs.

    Raises:
        ValueError: naming what is not allowed.
    """
    total = len(gram)
    check_full(full, total)
    if last is not None and last < 1:
        raise ValueError(f"last: {last} is not allowed, it must be >= 1")
    steps: list[FittedStep] = []
    for sources, skipped in gaps(full, total):
        sources = sources if last is None else sources[-last:]
        if not skipped:
            continue
        prior = np.zeros((len(sources), len(skipped)))
        if towards is not None:
            # A recovery may look at more values than are used here; those before them are left out.
            before = [step for step in full if step <= sources[-1]]
            rows = [towards.weights(before, step, total)[-len(sources) :] for step in skipped]
            prior = np.array(rows).T
        weights, strength = least_squares(gram, sources, skipped, prior, ridge), max(ridge, RIDGE)
        while np.abs(weights).max() > MOST_WEIGHT:
            # Values so alike hold no more than rounding beside their mean.
            strength *= 10
            weights = least_squares(gram, sources, skipped, prior, strength)
        steps += [
            FittedStep(step=step, sources=tuple(sources), weights=tuple(column))
            for step, column in zip(skipped, weights.T.tolist(), strict=True)
        ]
    return Fitted(total=total, steps=tuple(steps))


def least_squares(
    gram: Array,
    sources: Sequence[int],
    skipped: Sequence[int],
    prior: Array | None = None,
    ridge: float = RIDGE,
) -> Array:
    """The weights ``(sources, skipped)`` of some steps' outputs that are nearest to those of others.

    Args:
        gram: ``(T, T)``, the mean product of the outputs of two steps.
        sources: steps that are computed.
        skipped: steps that are not.
        prior: ``(sources, skipped)``, weights that the ridge pulls towards; None for 0.
        ridge: strength of the pull, as a share of the mean square of the outputs.
    """
    own = gram[np.ix_(sources, sources)]
    prior = np.zeros((len(sources), len(skipped))) if prior is None else prior
    rest = gram[np.ix_(sources, skipped)] - own @ prior
    strength = ridge * float(np.trace(gram)) / len(gram)
    weights: Array = prior + np.linalg.solve(own + strength * np.eye(len(sources)), rest)
    return weights


def weight_matrix(full: Sequence[int], recovery: TimeRecovery, total: int) -> Array:
    """Which outputs each step's output is made of, ``(T, T)``: row i has the weights of step i.

    Raises:
        ValueError: naming what is not allowed.
    """
    check_full(full, total)
    matrix = np.zeros((total, total))
    for sources, skipped in gaps(full, total):
        matrix[sources[-1], sources[-1]] = 1
        for step in skipped:
            matrix[step, list(sources)] = recovery.weights(sources, step, total)
    return matrix


def offline_error(gram: Array, influence: Array, weights: Array) -> float:
    """The mean square by which a plan misses the final latent, if the network's answers stay as recorded.

    A step's output is off by ``e_i - w_i`` in terms of the recorded outputs, and moves the final latent by
    its influence times as much.

    Args:
        gram: ``(T, T)``.
        influence: ``(T,)``.
        weights: ``(T, T)``, see `weight_matrix`.
    """
    missed = influence @ (np.eye(len(gram)) - weights)
    return max(float(missed @ gram @ missed), 0.0)


def decibels(mean_square: float) -> float:
    """``-10 log10`` of a mean square."""
    return -10 * math.log10(mean_square) if mean_square > 0 else math.inf


def gaps(full: Sequence[int], total: int) -> list[tuple[list[int], list[int]]]:
    """For each computed step, the steps computed so far and the skipped ones that follow it."""
    ends = [*full[1:], total]
    return [(list(full[: k + 1]), list(range(full[k] + 1, end))) for k, end in enumerate(ends)]


def check_full(full: Sequence[int], total: int) -> None:
    """Refuse computed steps that are not of a run, not ascending, or without the first.

    Raises:
        ValueError: naming them and what is allowed.
    """
    ascending = list(full) == sorted(set(full))
    if not full or not ascending or full[0] != 0 or full[-1] >= total:
        raise ValueError(
            f"full: {shown(tuple(full))} is not allowed, it must ascend from 0 and be below {total}"
        )
