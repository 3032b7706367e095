"""Find the plan that is nearest to the unaccelerated pictures: foretell, run the survivors, compare.

The order: a few plans whose errors lie far apart are run on a few prompts and tell the drift; with it a
search proposes plans from the recording; these are run on the same few prompts; the nearest are run on all
prompts, beside fewer steps. No prompt of these was recorded, so nothing was fitted on them. Fewer steps are
the answer unless a plan is nearer to the unaccelerated pictures by more than its error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from regrow.calibration.drift import Ran, fitted_drift
from regrow.calibration.influence import Array
from regrow.calibration.proposals import Proposal, probes, proposals
from regrow.calibration.recording import Recording
from regrow.fields import check_within

FEW = 8
"""Prompts that every plan is run on."""
SURVIVORS = 3
"""Plans that are run on all prompts."""


@dataclass(frozen=True)
class FewerSteps:
    """The sampler with fewer steps.

    Args:
        name: what it does, in words.
        steps: of the sampler.
        timesteps: to give to the pipeline instead; None for the sampler's own.
    """

    name: str
    steps: int
    timesteps: tuple[float, ...] | None = None


Plan = Proposal | FewerSteps
Measure = Callable[[Plan, int], Array]
"""Runs a plan on the first so many prompts: the PSNR of each picture to the unaccelerated one, in dB."""


@dataclass(frozen=True)
class Outcome:
    """A plan that was run.

    Args:
        plan: the plan.
        psnr: in dB, of each picture.
    """

    plan: Plan
    psnr: Array

    @property
    def mean(self) -> float:
        """Mean PSNR, in dB."""
        return float(self.psnr.mean())

    @property
    def error(self) -> float:
        """Its standard error; 0 of a single picture."""
        return _standard_error(self.psnr)

    def gain(self, other: Outcome) -> tuple[float, float]:
        """How much nearer it is than another, in dB, the mean over the pictures of both, and its error."""
        shared = min(len(self.psnr), len(other.psnr))
        more = self.psnr[:shared] - other.psnr[:shared]
        return float(more.mean()), _standard_error(more)


@dataclass(frozen=True)
class Answer:
    """What a search found.

    Args:
        best: the plan to use.
        outcomes: all that were run: those on all prompts first, the nearest first.
        drift: of the network, see `fitted_drift`.
    """

    best: Outcome
    outcomes: tuple[Outcome, ...]
    drift: float


def search(
    recording: Recording,
    count: int,
    fewer: Sequence[FewerSteps],
    measure: Measure,
    prompts: int,
    others: Sequence[Proposal] = (),
) -> Answer:
    """The plan of so many computed calls that is nearest to the unaccelerated pictures.

    Args:
        recording: of unaccelerated runs on other prompts than those that are measured.
        count: calls that are computed, >= 2.
        fewer: samplers that cost as much, >= 1 of them.
        measure: runs a plan.
        prompts: how many there are to measure on.
        others: plans of another kind that cost as much, from which the drift can't be told.

    Raises:
        ValueError: naming what is not allowed.
    """
    check_within("count", count, 2, recording.origin.calls)
    check_within("prompts", prompts, 1, 10_000)
    if not fewer:
        raise ValueError("fewer: it is empty, there must be >= 1 plan of fewer steps")
    few = min(FEW, prompts)
    probed = [Outcome(plan, measure(plan, few)) for plan in probes(recording, count)]
    drift = _drift(recording, probed)
    proposed = proposals(recording, count, drift)
    run = [*probed, *(Outcome(plan, measure(plan, few)) for plan in (*proposed, *others))]
    run.sort(key=lambda outcome: -outcome.mean)
    final = run[:SURVIVORS]
    if prompts > few:
        final = [Outcome(one.plan, measure(one.plan, prompts)) for one in final]
    plain = [Outcome(plan, measure(plan, prompts)) for plan in fewer]
    best = max(plain, key=lambda outcome: outcome.mean)
    nearest = max(final, key=lambda outcome: outcome.mean)
    more, error = nearest.gain(best)
    ordered = sorted([*final, *plain], key=lambda outcome: -outcome.mean)
    return Answer(nearest if more > error else best, (*ordered, *run[SURVIVORS:]), drift)


def _drift(recording: Recording, probed: Sequence[Outcome]) -> float:
    """The drift that the probes tell; pictures that are equal tell nothing."""
    ran = [
        Ran(outcome.plan.weights, outcome.mean)
        for outcome in probed
        if isinstance(outcome.plan, Proposal) and np.isfinite(outcome.mean)
    ]
    return fitted_drift(recording.products, recording.moves, ran) if len(ran) > 1 else 0.0


def _standard_error(values: Array) -> float:
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0
