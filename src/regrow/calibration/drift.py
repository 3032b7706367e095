"""The error of a plan that runs: the network answers to a latent that has left its path.

With the network frozen, the errors of all gaps between computed steps add up, and may cancel
(`offline_error`). In a run the network amplifies each, the more the earlier it is, and turns it elsewhere,
so they do not cancel. What is added here is the square of each gap's error, grown by
``exp(2 drift (1 - i / T))`` from step i on; ``drift`` is one number a model, found from a few runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from regrow.calibration.fit import decibels
from regrow.calibration.influence import Array

DRIFTS = tuple(float(drift) for drift in np.arange(0, 8.25, 0.25))
"""Values of the drift that are looked at; 0 is a network that amplifies nothing."""


@dataclass(frozen=True)
class Ran:
    """A plan that was run.

    Args:
        weights: ``(T, T)``, see `weight_matrix`.
        decibels: how near it came to the unaccelerated pictures, the mean PSNR.
    """

    weights: Array
    decibels: float


def drifting_error(gram: Array, influence: Array, weights: Array, drift: float) -> float:
    """The sum over gaps of the mean square of each gap's error, as much as it grows until the end.

    Args:
        gram: ``(T, T)``, the mean product of the outputs of two steps.
        influence: ``(T,)``, see `influence`.
        weights: ``(T, T)``, see `weight_matrix`.
        drift: the logarithm of how much an error of the first step grows, >= 0.
    """
    total = len(gram)
    grown = influence * np.exp(drift * (1 - np.arange(total) / total))
    missed = grown[:, None] * (np.eye(total) - weights)
    begins = np.flatnonzero(np.diag(weights) == 1)
    # A computed step has no error, so each sum is that of the skipped steps behind it.
    of_gaps = np.add.reduceat(missed, begins, axis=0)
    return max(float(np.einsum("gi,ij,gj->", of_gaps, gram, of_gaps)), 0.0)


def fitted_drift(
    gram: Array, influence: Array, ran: Sequence[Ran], drifts: Sequence[float] = DRIFTS
) -> float:
    """The drift with which `drifting_error` tells best how far apart plans are that ran.

    Errors are compared in decibels, up to a constant: the one is of latents, the other of pictures.

    Args:
        gram: of the recorded runs.
        influence: likewise.
        ran: plans of as many computed steps, whose errors differ.
        drifts: to choose from.

    Raises:
        ValueError: if there are fewer than two plans.
    """
    if len(ran) < 2:
        raise ValueError(f"ran: {len(ran)} plans are not allowed, there must be >= 2")
    measured = np.array([one.decibels for one in ran])

    def spread(drift: float) -> float:
        told = [decibels(drifting_error(gram, influence, one.weights, drift)) for one in ran]
        return float(np.var(measured - np.array(told)))

    return min(drifts, key=spread)
