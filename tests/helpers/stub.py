"""A search whose quality is a formula: fast, and known exactly."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from regrow import DaTo
from regrow.lab.search.evaluation import Candidate, Job, Outcome
from regrow.lab.search.log import Log
from regrow.lab.search.objectives import Cost, Quality
from regrow.lab.search.proposals import Operators
from regrow.lab.search.search import Algorithm, Budget, Economy, Known, Search
from regrow.lab.workers import LocalWorkers, RayWorkers, Workers
from regrow.schedule import FULL
from regrow.space import Space, Variable

CALLS = 24
OBJECTIVES = (Quality.DEVIATION, Cost.MACS)


def space() -> Space:
    """DaTo's plans of 24 calls that reuse: the formula knows no recoveries."""
    return (
        DaTo.space(CALLS)
        .with_choices("recovery", ("reuse",))
        .extended(Variable("steps", (CALLS,)), lambda config, steps: Candidate(steps, config))
    )


def macs(candidate: Candidate) -> float:
    """A full call costs 1, a shallow one .1; pruning saves some of both."""
    steps = candidate.config.schedule.steps()
    cost = sum({FULL: 1.0, 1: 0.1, 0: 0.0}[s.depth] * (1 - 0.2 * s.ratio) for s in steps)
    return cost / CALLS


def deviation(candidate: Candidate, prompt: int) -> float:
    """What is not computed, more where it comes late; on each picture otherwise by up to a tenth."""
    steps = [*candidate.config.schedule.steps()]
    weights = [((i + 1) / CALLS) ** 3 for i in range(CALLS)]
    losses = [{FULL: 0.0, 1: 1.0, 0: 2.0}[step.depth] + step.ratio for step in steps]
    lost = sum(w * loss for w, loss in zip(weights, losses, strict=True)) / CALLS
    return lost * (1 + 0.05 * ((int(candidate.key, 16) >> 3 * prompt) % 5 - 2))


class Stub:
    """Evaluates by the formula, and counts.

    Args:
        die: what happens at the evaluation of this number, from 0.
    """

    def __init__(self, die: tuple[int, Callable[[], Any]] | None = None) -> None:
        self.jobs: list[Job] = []
        self._die = die

    def __call__(self, job: Job) -> Outcome:
        if self._die is not None and len(self.jobs) == self._die[0]:
            self._die[1]()
        self.jobs.append(job)
        assert job.candidate is not None
        values = [deviation(job.candidate, i) for i in range(job.start, job.stop)]
        end = sum(values) / len(values)
        curve = tuple(end * (q / 4) ** 0.1 for q in (1, 2, 3, 4))
        for q, limit in enumerate(job.limits or ()):
            if q < 3 and curve[q] > limit:
                return Outcome(curve=curve[: q + 1], seconds=0.1)
        return Outcome({"deviation": tuple(values)}, {}, curve, 0.1)


def search(
    folder: Path,
    stub: Stub,
    *,
    algorithm: Algorithm = Algorithm.NSGA2,
    prompts: tuple[int, ...] = (2, 4, 8),
    patience: float | None = 2.0,
    population: int = 8,
    seed: int = 0,
) -> Search:
    """A search with its log in a folder."""
    return Search(
        space(),
        OBJECTIVES,
        macs,
        LocalWorkers(lambda: stub),
        Log(folder / "log.jsonl"),
        Economy(prompts=prompts, patience=patience),
        algorithm,
        Operators(population=population),
        seed,
    )


def front_of(plans: list[Known]) -> list[tuple[Any, ...]]:
    """Plans and figures of a front, to compare."""
    return [(p.candidate.key, p.macs, p.value(Quality.DEVIATION), p.prompts, p.generation) for p in plans]


def killed(folder: Path, number: int, workers: Workers[Job, Outcome] | None = None) -> None:
    """A search that kills its process at an evaluation, as kill -9 does; with workers, behind it."""

    def kill() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    found = search(folder, Stub((number, kill)))
    if workers is not None:
        found._workers = workers
        found._on_progress = lambda progress: progress.done == number and kill()
    found.run(Budget(generations=6))


if __name__ == "__main__":
    killed(Path(sys.argv[1]), int(sys.argv[2]), RayWorkers(Stub, 1, sys.argv[3]))
