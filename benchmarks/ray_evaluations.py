"""Plans of the bundled model evaluated by one and by two Ray workers of this machine, in turns.

Every worker has one thread, so that two have twice the machine of one. The workers are up, and the
unaccelerated runs made, before the clock starts; efficiency is the time of one worker over that of all, a
worker. Both must find the same figures, bit for bit.

    python benchmarks/ray_evaluations.py --json benchmarks/results/ray-evaluations.json
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from regrow import DaTo, zoo
from regrow.lab.cli.models import load_pipeline
from regrow.lab.measure.atomic_files import write_json
from regrow.lab.measure.evaluate import Setting
from regrow.lab.measure.machine import PACKAGES, machine
from regrow.lab.search.evaluation import Candidate, Evaluator, Job, Outcome
from regrow.lab.search.objectives import Cost, Quality
from regrow.lab.workers import RayWorkers
from regrow.schedule import Schedule

MODEL = "emoji"


def jobs_of(steps: int, prompts: int) -> list[Job]:
    """Plans that cost about the same, so that no worker is left with a long one at the end."""
    ratios = (0.3, 0.4, 0.5, 0.6, 0.7)
    plans = [Schedule.every(n, steps, ratio=ratio) for ratio in ratios for n in (4, 5)]
    return [Job(Candidate(steps, DaTo(schedule=plan)), 0, prompts) for plan in plans]


def evaluator(setting: Setting, steps: int, folder: Path) -> Evaluator:
    """What a worker holds."""
    opened = partial(load_pipeline, MODEL, "cpu", getattr(torch, setting.dtype))
    return Evaluator(opened, setting, steps, (Quality.DEVIATION, Cost.MACS), folder)


class Named:
    """An evaluator that says in which process it is."""

    def __init__(self, setting: Setting, steps: int, folder: Path) -> None:
        self._evaluate = evaluator(setting, steps, folder)

    def __call__(self, job: Job) -> tuple[int, Outcome]:
        return os.getpid(), self._evaluate(job)


def timed(workers: RayWorkers[Job, Any], count: int, jobs: Sequence[Job]) -> tuple[float, list[Any]]:
    """Seconds for all jobs once all workers are up, and their figures in order."""
    up: set[int] = set()
    while len(up) < count:
        up |= {process for _, (process, _) in workers.run(jobs[:1] * 2 * count)}
    begin = time.perf_counter()
    found = dict(workers.run(jobs))
    taken = time.perf_counter() - begin
    outcomes = [found[i][1] for i in range(len(jobs))]
    for outcome in outcomes:
        if outcome.error is not None:
            raise SystemExit(f"a plan could not be run: {outcome.error}")
    return taken, [outcome.quality for outcome in outcomes]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--prompts", type=int, default=2, help="for each plan")
    parser.add_argument("--json", type=Path, help="file for the result")
    args = parser.parse_args()
    setting = Setting(
        model=MODEL,
        prompts=tuple(zoo.captions(MODEL)[: args.prompts]),
        guidance=zoo.GUIDANCE[MODEL],
        dtype="bfloat16",
    )
    jobs = jobs_of(args.steps, args.prompts)
    seconds: dict[int, list[float]] = {count: [] for count in args.workers}
    figures = []
    with tempfile.TemporaryDirectory() as folder, Progress(console=Console(stderr=True)) as progress:
        make = partial(Named, setting, args.steps, Path(folder))
        turns = [count for _ in range(args.rounds) for count in args.workers]
        for count in progress.track(turns, description="turns"):
            with RayWorkers(make, count) as workers:
                taken, found = timed(workers, count, jobs)
            seconds[count].append(taken)
            figures.append(found)
    same = all(found == figures[0] for found in figures)
    medians = {count: statistics.median(taken) for count, taken in seconds.items()}
    first = args.workers[0]
    rows = [
        {
            "workers": count,
            "seconds": seconds[count],
            "median": taken,
            "efficiency": medians[first] * first / (taken * count),
        }
        for count, taken in medians.items()
    ]
    table = Table("workers", "s", "efficiency", caption=f"{len(jobs)} plans; same figures: {same}")
    for count, row in zip(medians, rows, strict=True):
        table.add_row(str(count), f"{medians[count]:.1f}", f"{row['efficiency']:.1%}")
    Console().print(table)
    if args.json is not None:
        result = {
            "what": "plans evaluated by Ray workers of one thread each",
            "model": MODEL,
            "plans": len(jobs),
            "steps": args.steps,
            "prompts": args.prompts,
            "same_figures": same,
            "machine": machine("cpu", packages=(*PACKAGES, "ray")),
            "rows": rows,
        }
        write_json(args.json, result)
        print(args.json)
    if not same:
        raise SystemExit("the figures differ between numbers of workers")


if __name__ == "__main__":
    main()
