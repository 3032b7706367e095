"""Find the plan that is nearest to the unaccelerated pictures: foretell, run the survivors, compare.

A few plans whose errors lie in different parts of the run are run on a few prompts. They tell how errors
grow. With that, positions are searched on the recording. What is found is run and tells more, and the
search is repeated. The nearest plans are run on all prompts, and so are fewer steps. None of these prompts
was recorded, so nothing was fitted on them. Fewer steps are the answer unless a plan is nearer to the
unaccelerated pictures by more than its error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from regrow.fields import check_within
from regrow.lab.calibration.drift import Growth, fitted_growth
from regrow.lab.calibration.proposals import Proposal, near_the_line, probes, proposals
from regrow.lab.calibration.recording import Recording
from regrow.recover.fit import Array

FEW = 4
"""Prompts that every plan is run on."""
ROUNDS = 2
"""Searches on the recording, each after the runs of what the one before found."""
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
class PlanOutcome:
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

    def gain(self, other: PlanOutcome) -> tuple[float, float]:
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
    """

    best: PlanOutcome
    outcomes: tuple[PlanOutcome, ...]


def search(
    recording: Recording,
    count: int,
    fewer: Sequence[FewerSteps],
    measure: Measure,
    prompts: int,
    others: Callable[[Growth], Iterable[Proposal]] = lambda growth: (),
) -> Answer:
    """The plan of so many computed calls that is nearest to the unaccelerated pictures.

    Args:
        recording: of unaccelerated runs on other prompts than those that are measured.
        count: calls that are computed, >= 2.
        fewer: samplers that cost as much, >= 1 of them.
        measure: runs a plan.
        prompts: how many there are to measure on.
        others: given how errors grow, makes plans of another kind that cost as much. The recorded outputs
            do not tell the errors of these.

    Raises:
        ValueError: naming the argument that is out of bounds.
    """
    check_within("count", count, 2, recording.origin.calls)
    check_within("prompts", prompts, 1, 10_000)
    if not fewer:
        raise ValueError("fewer: it is empty, there must be >= 1 plan of fewer steps")
    few = min(FEW, prompts)

    run: dict[Proposal, PlanOutcome] = {}

    def go(plans: Iterable[Proposal]) -> None:
        run.update({plan: PlanOutcome(plan, measure(plan, few)) for plan in plans})

    go(probes(recording, count))
    for _ in range(ROUNDS):
        known = {plan.full for plan in run}
        found = proposals(recording, count, _growth(recording, run))
        go(plan for plan in found if plan.full not in known)
    go([near_the_line(recording, max(run, key=lambda plan: run[plan].mean).full)])
    go(others(_growth(recording, run)))
    ranked = sorted(run.values(), key=lambda outcome: -outcome.mean)
    final, rest = ranked[:SURVIVORS], ranked[SURVIVORS:]
    if prompts > few:
        final = [PlanOutcome(one.plan, measure(one.plan, prompts)) for one in final]
    plain = [PlanOutcome(plan, measure(plan, prompts)) for plan in fewer]
    best, nearest = (max(some, key=lambda outcome: outcome.mean) for some in (plain, final))
    more, error = nearest.gain(best)
    ordered = sorted([*final, *plain], key=lambda outcome: -outcome.mean)
    return Answer(nearest if more > error else best, (*ordered, *rest))


def _growth(recording: Recording, run: Mapping[Proposal, PlanOutcome]) -> Growth:
    """What the runs tell of the growth of errors; pictures that are equal tell nothing."""
    ran = [(plan.weights, one.mean) for plan, one in run.items() if np.isfinite(one.mean)]
    return fitted_growth(recording.products, recording.moves, ran) if ran else Growth()


def _standard_error(values: Array) -> float:
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0
