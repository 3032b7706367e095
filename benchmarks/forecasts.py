"""Calibrated plans beside fewer steps, better samplers and published forecasts, on the bundled models.

    python benchmarks/forecasts.py --model emoji --work work/forecasts-emoji
    python benchmarks/forecasts.py --model cifar10 --work work/forecasts-cifar10

A case is a sampler and its number of steps, and the speed-ups that are wished for. For each wish a plan is
calibrated on 16 prompts; then it, and its rivals of as many computed calls, make the pictures of other
prompts. How near these are to the case's own unaccelerated pictures is compared picture by picture. Times
are of one batch, unaccelerated and row in turn. All that is done is kept in `--work`, and not done again.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import numpy as np
import torch

from regrow import zoo
from regrow.calibration.calibrate import Calibration, Settings, Wish, plan_for
from regrow.measure.machine import machine
from regrow.measure.samplers import Sampler
from regrow.measure.sampling import make
from regrow.measure.variants import Variant, variant
from regrow.methods.calibrated import Calibrated
from regrow.methods.catalogue import load_plan
from regrow.schedule import FULL

FITTED = 16
"""Prompts of a calibration; those compared come behind them."""
FIRST_SEED = 1000
"""Of the calibrations; the pictures that are compared have the seeds from 0."""
UNIPC, DPM, EULER = "UniPCMultistep", "DPMSolverMultistep", "EulerDiscrete"
PUBLISHED = {
    "emoji": ("spectrum:quality", "spectrum:fast", "taylorseer", "deepcache:3", "deepcache:5"),
    "cifar10": ("spectrum:quality", "spectrum:fast", "taylorseer", "fora:3"),
}
EQUAL = 99.0
"""PSNR in dB that stands for the infinite one of equal pictures."""


@dataclass(frozen=True)
class Case:
    """An unaccelerated sampler, and how much faster it is to be.

    Args:
        sampler: as `Sampler.parse` takes it; None for the model's own.
        steps: of it.
        wishes: speed-ups.
    """

    sampler: str | None
    steps: int
    wishes: tuple[float, ...]

    @property
    def name(self) -> str:
        """For files and tables."""
        return f"{self.sampler or 'own'}-{self.steps}"


CASES = {
    "emoji": (
        Case(None, 50, (2, 3, 4, 5, 6, 8)),
        Case(EULER, 30, (1.5, 2, 3)),
        Case(DPM, 25, (1.5, 2, 3)),
    ),
    "cifar10": (
        Case(None, 50, (2, 3, 4, 5, 6, 8, 10)),
        Case(EULER, 30, (1.5, 2, 3)),
        Case(DPM, 25, (1.5, 2, 3)),
    ),
}


@dataclass(frozen=True)
class Row:
    """What makes pictures in a case.

    Args:
        name: in tables.
        variant: steps, and the method.
        sampler: instead of the case's.
        wish: the speed-up for which it is compared; None for one at a cost of its own.
    """

    name: str
    variant: Variant
    sampler: str | None = None
    wish: float | None = None


def computed_calls(plan: Calibrated) -> int:
    """How many calls of a plan are computed in full."""
    return sum(step.depth == FULL for step in plan.schedule.resample(plan.steps).steps())


def rows_of(model: str, case: Case, plans: Mapping[float, Calibrated]) -> Iterator[Row]:
    """The rows of a case: each plan, its rivals of as many calls, and published methods."""
    for wish, plan in plans.items():
        # A plan whose other calls compute some layers costs more than its full calls.
        calls = max(computed_calls(plan), math.floor(case.steps / wish))
        yield Row(f"calibrated {wish:g}x", Variant("calibrated", plan, plan.steps), None, wish)
        yield Row(f"{calls} steps", Variant("steps", None, calls), None, wish)
        for name, sampler in (("DPM++ 2M", DPM), ("UniPC", UNIPC)):
            if sampler != case.sampler:
                yield Row(f"{name}, {calls} steps", Variant("steps", None, calls), sampler, wish)
    if case.sampler is None:
        for spec in PUBLISHED[model]:
            yield Row(spec, variant(spec, case.steps))


class Bench:
    """The runs of a case.

    Args:
        model: bundled, by name.
        case: the case.
        pictures: that are compared.
        batch: made at once.
        folder: where all that is done is kept.
    """

    def __init__(self, model: str, case: Case, pictures: int, batch: int, folder: Path) -> None:
        self.model, self.case, self.batch, self.folder = model, case, batch, folder
        folder.mkdir(parents=True, exist_ok=True)
        prompts = zoo.prompts_of(model, FITTED + pictures, "give others")
        self.fitted, self.prompts = prompts[:FITTED], prompts[FITTED:]
        self.guidance = zoo.GUIDANCE[model]
        self.base = Row("unaccelerated", Variant("steps", None, case.steps))

    def pipeline(self, sampler: str | None) -> Any:
        """A pipeline with the sampler of a row, or of the case."""
        pipe = zoo.load(self.model)
        chosen = sampler or self.case.sampler
        if chosen is not None:
            Sampler.parse(chosen).put_into(pipe)
        return pipe

    def plans(self) -> dict[float, Calibrated]:
        """The calibrated plan of each wish; one that is out of reach is missing."""
        found, calibration = {}, None
        for wish in self.case.wishes:
            file = self.folder / f"plan-{wish:g}x.json"
            if not file.exists():
                calibration = calibration or Calibration(
                    self.pipeline(None),
                    self.fitted,
                    Settings(
                        steps=self.case.steps,
                        guidance=self.guidance,
                        seed=FIRST_SEED,
                        batch=self.batch,
                        model=self.model,
                    ),
                )
                try:
                    found_plan = plan_for(calibration, Wish(speedup=wish))
                except ValueError as error:
                    print(f"{self.case.name}, {wish:g}x: {error}", file=sys.stderr)
                    continue
                file.write_text(found_plan.dump())
            plan = load_plan(file)
            assert isinstance(plan, Calibrated)
            found[wish] = plan
        return found

    def run(self, row: Row, pipe: Any, begin: int) -> tuple[np.ndarray, float]:
        """One batch of a row's pictures, uint8 ``(B, H, W, 3)``, and seconds."""
        options = row.variant.arguments({"guidance": self.guidance, "seed": begin})
        with row.variant.applied(pipe):
            prompts = self.prompts[begin : begin + self.batch]
            made = make(pipe, prompts, steps=row.variant.steps, **options)
        return np.stack([np.asarray(image) for image in made.images]), made.seconds

    def base_pictures(self) -> np.ndarray:
        """The unaccelerated pictures."""
        file = self.folder / "unaccelerated.npy"
        if not file.exists():
            pipe = self.pipeline(None)
            begins = range(0, len(self.prompts), self.batch)
            np.save(file, np.concatenate([self.run(self.base, pipe, begin)[0] for begin in begins]))
        return np.load(file, allow_pickle=False)

    def measured(self, row: Row) -> dict[str, Any]:
        """PSNR of each picture and speed-up of a row."""
        file = self.folder / f"{row.name.replace(' ', '-').replace(':', '-').replace(',', '')}.json"
        if file.exists():
            return json.loads(file.read_text())
        base, pipe, plain = self.base_pictures(), self.pipeline(row.sampler), self.pipeline(None)
        psnr: list[float] = []
        for begin in range(0, len(self.prompts), self.batch):
            made = self.run(row, pipe, begin)[0]
            squares = (base[begin : begin + self.batch] / 255.0 - made / 255.0) ** 2
            psnr += [_decibels(float(one.mean())) for one in squares]
        times = [self.run(self.base, plain, 0)[1] / self.run(row, pipe, 0)[1] for _ in range(3)]
        found = {
            "name": row.name,
            "wish": row.wish,
            "steps": row.variant.steps,
            "speedup": median(times),
            "psnr": psnr,
        }
        file.write_text(json.dumps(found))
        return found


def _decibels(mean_square: float) -> float:
    return min(-10 * math.log10(mean_square), EQUAL) if mean_square > 0 else EQUAL


def gain(one: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """How much nearer one row is than another, in dB, the mean of the pictures, and its standard error."""
    more = [a - b for a, b in zip(one, other, strict=True)]
    return fmean(more), stdev(more) / math.sqrt(len(more)) if len(more) > 1 else 0.0


def table(case: Mapping[str, Any]) -> list[str]:
    """Markdown: a row a wish and rival, and how much nearer the calibrated plan is."""
    plans = {row["wish"]: row for row in case["rows"] if row["name"].startswith("calibrated")}
    lines = [
        f"### {case['name']}",
        "",
        "| wish | row | speed-up | PSNR dB | calibrated is nearer by dB |",
        "|---|---|---|---|---|",
    ]
    for row in case["rows"]:
        wish = "" if row["wish"] is None else f"{row['wish']:g}x"
        more = ""
        if row["wish"] in plans and row is not plans[row["wish"]]:
            more = "{:+.2f} ± {:.2f}".format(*gain(plans[row["wish"]]["psnr"], row["psnr"]))
        mean = f"{fmean(row['psnr']):.2f}"
        lines.append(f"| {wish} | {row['name']} | {row['speedup']:.2f}x | {mean} | {more} |")
    return [*lines, ""]


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=CASES, default="emoji")
    parser.add_argument("--pictures", type=int, default=32, help="that are compared")
    parser.add_argument("--batch", type=int, default=8, help="pictures made at once")
    parser.add_argument("--threads", type=int, help="of the processor")
    parser.add_argument("--only", help="names of cases, comma-separated, such as own-50")
    parser.add_argument("--work", type=Path, default=Path("work/forecasts"), help="resumed if it exists")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--table", action="store_true", help="only the table, of the result in --out")
    return parser.parse_args()


def main() -> None:
    """Calibrate, run and compare; then write result and table."""
    args = parse_arguments()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    result = args.out / f"forecasts-{args.model}.json"
    if not args.table:
        only = None if args.only is None else args.only.split(",")
        cases = []
        for case in CASES[args.model]:
            if only is None or case.name in only:
                bench = Bench(args.model, case, args.pictures, args.batch, args.work / case.name)
                rows = [bench.measured(row) for row in rows_of(args.model, case, bench.plans())]
                cases.append({"name": case.name, "steps": case.steps, "rows": rows})
        args.out.mkdir(parents=True, exist_ok=True)
        told = {"model": args.model, "pictures": args.pictures, "batch": args.batch, "cases": cases}
        result.write_text(json.dumps({**told, "machine": machine(torch.device("cpu"))}, indent=1) + "\n")
    found = json.loads(result.read_text())
    lines = [f"Model {found['model']}, {found['pictures']} pictures that nothing was fitted on.", ""]
    for case in found["cases"]:
        lines += table(case)
    result.with_suffix(".md").write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
