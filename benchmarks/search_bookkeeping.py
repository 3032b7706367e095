"""What a search costs besides its evaluations: 2,000 plans whose quality is a formula, MACs counted.

python benchmarks/search_bookkeeping.py --json benchmarks/results/search-bookkeeping.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from regrow import DaTo
from regrow.lab.measure.architectures import architecture
from regrow.lab.measure.machine import machine
from regrow.lab.measure.macs import PlanCounter
from regrow.lab.search.evaluation import Candidate, Job, Outcome
from regrow.lab.search.log import Log
from regrow.lab.search.objectives import Cost, Quality
from regrow.lab.search.proposals import Operators
from regrow.lab.search.search import Budget, Economy, Search
from regrow.lab.workers import LocalWorkers
from regrow.schedule import FULL
from regrow.space import Variable

CALLS = 50


def formula(job: Job) -> Outcome:
    """What is not computed, more where it comes late."""
    assert job.candidate is not None
    steps = [*job.candidate.config.schedule.steps()]
    lost = sum((i + 1) * ((s.depth != FULL) + (s.depth == 0) + s.ratio) for i, s in enumerate(steps))
    value = lost / CALLS**2
    return Outcome({"deviation": (value,) * (job.stop - job.start)}, {}, (value,) * 4)


def main() -> None:
    """Time one search."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--generations", type=int, default=100, help="of 20 plans")
    parser.add_argument("--arch", default="emoji", help="whose MACs are counted")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    arch = architecture(args.arch)
    counter = PlanCounter(arch.denoiser, arch.inputs())
    full = counter.full().denoiser * CALLS

    def share(candidate: Candidate) -> float:
        return sum(macs.denoiser for _, macs in counter.calls(candidate.config, CALLS)) / full

    plans = DaTo.space(CALLS).with_choices("recovery", ("reuse",))
    space = plans.extended(Variable("steps", (CALLS,)), lambda config, steps: Candidate(steps, config))
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        search = Search(
            space,
            (Quality.DEVIATION, Cost.MACS),
            share,
            LocalWorkers(lambda: formula),
            Log(Path(folder) / "evaluations.jsonl"),
            Economy(prompts=(2, 4, 8, 16)),
            operators=Operators(),
        )
        front = search.run(Budget(generations=args.generations))
        seconds = time.perf_counter() - begin
    result = {
        "what": "bookkeeping of a search, quality by a formula",
        "arch": args.arch,
        "proposed": args.generations * 20,
        "plans": len(search.known),
        "front": len(front),
        "seconds": round(seconds, 2),
        "machine": machine("cpu"),
    }
    print(f"{result['plans']} plans, {seconds:.1f} s")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
