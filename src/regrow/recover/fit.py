"""Fit the weights of skipped steps and predict a plan's error, from recorded outputs' Gram matrix alone."""

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
"""Strength of the ridge that keeps the solution finite where outputs are almost equal."""


def fitted(
    gram: Array,
    full: Sequence[int],
    *,
    last: int | None = None,
    towards: TimeRecovery | None = None,
    ridge: float = RIDGE,
) -> Fitted:
    """Fit, by least squares, the weights that make each skipped step's output from the computed outputs.

    Args:
        gram: ``(T, T)``, the mean product of the outputs of two steps.
        full: the computed steps, ascending from 0.
        last: number of the last computed outputs that a step is made of; None for all.
        towards: recovery whose weights the ridge pulls towards; None for 0.
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
            # A recovery may use more values than are used here; the earlier ones are left out.
            before = [step for step in full if step <= sources[-1]]
            rows = [towards.weights(before, step, total)[-len(sources) :] for step in skipped]
            prior = np.array(rows).T
        weights, strength = least_squares(gram, sources, skipped, prior, ridge), max(ridge, RIDGE)
        while np.abs(weights).max() > MOST_WEIGHT:
            # Values that are almost equal differ from their mean by rounding only.
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
    """Fit the weights ``(sources, skipped)`` that make some steps' outputs from those of others.

    Args:
        gram: ``(T, T)``, the mean product of the outputs of two steps.
        sources: steps that are computed.
        skipped: steps that are skipped.
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
    """List the weights of all outputs in each step's output, ``(T, T)``: row i is for step i.

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
    """Predict a plan's mean square error in the final latent, if the network's outputs stay as recorded.

    In terms of the recorded outputs, a step's output has the error ``e_i - w_i``; the final latent moves by
    this error times the step's influence.

    Args:
        gram: ``(T, T)``.
        influence: ``(T,)``, of each step's output on the final latent.
        weights: ``(T, T)``, see `weight_matrix`.
    """
    missed = influence @ (np.eye(len(gram)) - weights)
    return max(float(missed @ gram @ missed), 0.0)


def decibels(mean_square: float) -> float:
    """Convert a mean square to decibels: ``-10 log10``."""
    return -10 * math.log10(mean_square) if mean_square > 0 else math.inf


def gaps(full: Sequence[int], total: int) -> list[tuple[list[int], list[int]]]:
    """List, for each computed step, the steps computed so far and the skipped steps that follow it."""
    ends = [*full[1:], total]
    return [(list(full[: k + 1]), list(range(full[k] + 1, end))) for k, end in enumerate(ends)]


def check_full(full: Sequence[int], total: int) -> None:
    """Refuse computed steps that do not ascend from 0, or that the run does not have.

    Raises:
        ValueError: naming them and what is allowed.
    """
    ascending = list(full) == sorted(set(full))
    if not full or not ascending or full[0] != 0 or full[-1] >= total:
        raise ValueError(
            f"full: {shown(tuple(full))} is not allowed, it must ascend from 0 and be below {total}"
        )
