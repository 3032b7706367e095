"""Calibrated plans beside fewer steps, other samplers and published caches, on a bundled model.

    python benchmarks/forecasts.py emoji
    python benchmarks/forecasts.py cifar10
    python benchmarks/forecasts.py cifar10 --sampler EulerDiscrete --steps 30 --calls 20 15 10
    python benchmarks/forecasts.py emoji --bundle

For each number of computed calls a plan is calibrated on some prompts (`regrow.calibrate`), and then
compared on others, of which nothing was fitted or chosen, with as many steps of the same sampler, of
DPM-Solver++ 2M and of UniPC. What is compared is the PSNR to the unaccelerated pictures of the same seeds,
picture by picture. Then all are timed in turns. Killed, or asked for more rows, it goes on after the last
row that was done; a table is written beside the result.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from regrow import zoo
from regrow.apply import apply
from regrow.lab.calibration.calibrate import EQUAL, Calibration, Costs, Settings, plan_of
from regrow.lab.cli.models import load_pipeline
from regrow.lab.measure.atomic_files import write_json
from regrow.lab.measure.bench import bench
from regrow.lab.measure.images import psnr
from regrow.lab.measure.machine import machine
from regrow.lab.measure.samplers import Sampler
from regrow.lab.measure.sampling import make
from regrow.lab.measure.variants import Variant, variant
from regrow.methods.calibrated import Calibrated

RESULTS = Path(__file__).parent / "results"
PRESETS = Path(__file__).parents[1] / "src/regrow/presets"
BUNDLED = {
    "emoji": {25: "emoji-2x", 12: "emoji-4x", 8: "emoji-6x"},
    "cifar10": {16: "cifar10-3x", 10: "cifar10-5x", 5: "cifar10-10x"},
}
BATCH = 4
OTHERS = {"DPM++ 2M": "DPMSolverMultistep", "UniPC": "UniPCMultistep"}
PUBLISHED = {
    "emoji": (
        "deepcache:3",
        "deepcache:3:recovery=taylor",
        "deepcache:5",
    ),
    "cifar10": (
        "spectrum:quality",
        "spectrum:fast",
        "taylorseer:4:order=1",
        "taylorseer:4:order=2",
        "taylorseer:4:order=1:level=last_block",
        "fora:3",
        "fora:3:recovery=taylor",
        "toca:3",
        "deepcache:3",
        "deepcache:3:recovery=taylor",
    ),
}
CALLS = {"emoji": (25, 16, 12, 10, 8, 6), "cifar10": (25, 16, 12, 10, 8, 6, 5, 4)}
TIMED = {"emoji": 1, "cifar10": 8}
"""Pictures in the batch that is timed; of one, the small model's call takes hardly longer than a step."""
SAME = ("model", "sampler", "steps", "pictures", "fit")
"""What rows depend on, of the options."""


@dataclass(frozen=True)
class Asked:
    """What is compared; fields are the options."""

    model: str
    sampler: str
    steps: int
    calls: tuple[int, ...]
    pictures: int
    fit: int
    samplers: bool
    published: bool
    timed: int

    @property
    def guidance(self) -> float | None:
        """The model's own."""
        return zoo.guidance_of(self.model, None)

    @property
    def prompts(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Those that plans are calibrated on, and those that they are compared on."""
        all_of_them = zoo.prompts_of(self.model, self.fit + self.pictures, "")
        return all_of_them[: self.fit], all_of_them[self.fit :]


class Result:
    """The rows that are done, kept in a file.

    Args:
        file: JSON. Its rows are kept if they are of the same pictures; its times if nothing else is asked.
        asked: what the rows are of.
    """

    def __init__(self, file: Path, asked: Asked) -> None:
        self.file = file
        own = {**vars(asked), "calls": list(asked.calls)}
        self.data: dict[str, Any] = {"asked": own, "machine": machine(), "rows": {}, "times": []}
        if file.exists():
            kept = json.loads(file.read_text(encoding="utf-8"))
            if any(kept["asked"][name] != own[name] for name in SAME):
                raise SystemExit(f"{file}: it is of other options; use another --out")
            self.data["rows"] = kept["rows"]
            if kept["asked"] == own:
                self.data = kept

    def row(self, name: str, make_row: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A row, made if it is not there."""
        if name not in self.data["rows"]:
            print(name, flush=True)
            self.data["rows"][name] = make_row()
            self.save()
        row: dict[str, Any] = self.data["rows"][name]
        return row

    def save(self) -> None:
        """Write the file."""
        write_json(self.file, self.data)


class Pictures:
    """Makes the pictures that are compared."""

    def __init__(self, asked: Asked) -> None:
        self.asked = asked
        self.pipe = load_pipeline(asked.model, "cpu", torch.float32, asked.sampler)
        self._plain: list[Image.Image] = []

    def by(self, config: Any, steps: int, sampler: str | None = None) -> list[Image.Image]:
        """The pictures of a method, or of a sampler, in so many steps."""
        own = self.pipe.scheduler
        if sampler is not None:
            Sampler.parse(sampler).put_into(self.pipe)
        try:
            if config is None:
                return list(self._all(None, steps))
            with apply(self.pipe, config):
                return list(self._all(config, steps))
        finally:
            self.pipe.scheduler = own

    def _all(self, config: Any, steps: int) -> Iterator[Image.Image]:
        a = self.asked
        prompts = a.prompts[1]
        for begin in range(0, len(prompts), BATCH):
            yield from make(
                self.pipe,
                prompts[begin : begin + BATCH],
                steps=steps,
                guidance=a.guidance,
                seed=10_000 + begin,
                more={} if config is None else config.arguments(),
            ).images

    def psnr(self, config: Any, steps: int, sampler: str | None = None) -> list[float]:
        """Of each picture, in dB, to the unaccelerated one."""
        self._plain = self._plain or self.by(None, self.asked.steps)
        made = self.by(config, steps, sampler)
        return [round(min(psnr(a, b), EQUAL), 3) for a, b in zip(self._plain, made, strict=True)]


def run(asked: Asked, file: Path, *, timed: bool = True) -> None:
    """Make all rows, then time them if wanted."""
    result, pictures = Result(file, asked), Pictures(asked)
    settings = Settings(asked.steps, asked.guidance, batch=BATCH, model=asked.model)
    calibration = Calibration(pictures.pipe, asked.prompts[0], settings)
    plans: dict[int, Calibrated] = {}
    for calls in asked.calls:
        result.row(f"{calls} steps", lambda n=calls: {"psnr": pictures.psnr(None, n)})
        for name, sampler in OTHERS.items() if asked.samplers else ():
            result.row(
                f"{calls} steps of {name}", lambda n=calls, s=sampler: {"psnr": pictures.psnr(None, n, s)}
            )

        def calibrated(n: int = calls) -> dict[str, Any]:
            plan = plan_of(calibration, calibration.find(n, Costs(0.0, 0.0, None)))
            return {"plan": json.loads(plan.dump()), "psnr": pictures.psnr(plan, plan.steps)}

        row = result.row(f"{calls} calls, calibrated", calibrated)
        plans[calls] = Calibrated.model_validate(row["plan"])
    published = PUBLISHED[asked.model] if asked.published else ()
    for name in published:
        result.row(
            name, lambda n=name: {"psnr": pictures.psnr(variant(n, asked.steps).config, asked.steps)}
        )
    if not timed:
        return
    if not result.data["times"]:
        variants = [Variant(f"{asked.steps} steps", None, asked.steps)]
        variants += [Variant(f"{n} steps", None, n) for n in asked.calls]
        variants += [Variant(f"{n} calls, calibrated", plan, plan.steps) for n, plan in plans.items()]
        variants += [Variant(name, variant(name, asked.steps).config, asked.steps) for name in published]
        rows = bench(pictures.pipe, variants, asked.prompts[1][: asked.timed], guidance=asked.guidance)
        result.data["times"] = [row.to_dict() for row in rows]
        result.save()
    file.with_suffix(".md").write_text(table(result.data), encoding="utf-8")


def bundle(data: dict[str, Any]) -> None:
    """Put some of the plans into the package, as presets."""
    for calls, name in BUNDLED[data["asked"]["model"]].items():
        plan = Calibrated.model_validate(data["rows"][f"{calls} calls, calibrated"]["plan"])
        (PRESETS / f"{name}.json").write_text(plan.dump(), encoding="utf-8")


def table(data: dict[str, Any]) -> str:
    """The result as tables of Markdown."""
    asked, rows = data["asked"], data["rows"]
    times = {row["name"]: row["speedup"] for row in data["times"]}
    memory = {row["name"]: row["peak_mib"] for row in data["times"]}
    lines = [
        f"Model {asked['model']}, {asked['sampler']}, {asked['steps']} steps; {asked['pictures']} "
        f"pictures, plans calibrated on {asked['fit']} others; {data['machine']['processor']}. PSNR in dB "
        "to the unaccelerated pictures; +- standard errors of paired differences; time of "
        f"{asked['timed']} {'picture' if asked['timed'] == 1 else 'pictures'} in a batch.",
        "",
        "| calls | speed-up, steps | speed-up, plan | steps | DPM++ 2M | UniPC | calibrated | nearer than "
        "steps by | than the best sampler by |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for calls in sorted(asked["calls"], reverse=True):
        plan, names = rows[f"{calls} calls, calibrated"]["psnr"], [f"{calls} steps"]
        names += [f"{calls} steps of {name}" for name in OTHERS]
        means = {name: np.mean(rows[name]["psnr"]) for name in names if name in rows}
        best = max(means, key=lambda name: means[name])
        shown = " | ".join(f"{means[name]:.1f}" if name in means else "" for name in names)
        shown = f"{shown} | {np.mean(plan):.1f}"
        lines.append(
            f"| {calls} | {times[f'{calls} steps']:.2f}x | {times[f'{calls} calls, calibrated']:.2f}x "
            f"| {shown} | {_difference(plan, rows[names[0]]['psnr'])} "
            f"| {_difference(plan, rows[best]['psnr'])} |"
        )
    others = [name for name in rows if "steps" not in name and "calibrated" not in name]
    if others:
        lines += [
            "",
            "| published | speed-up | PSNR | calibrated, at least as fast | its PSNR | nearer by |",
            "|---|---|---|---|---|---|",
        ]
    for name in others:
        fast = [n for n in asked["calls"] if times[f"{n} calls, calibrated"] >= times[name]]
        own = f"| {name} | {times[name]:.2f}x | {np.mean(rows[name]['psnr']):.1f} |"
        if fast:
            plan = rows[f"{max(fast)} calls, calibrated"]["psnr"]
            speed = times[f"{max(fast)} calls, calibrated"]
            own += f" {max(fast)} calls, {speed:.2f}x | {np.mean(plan):.1f} |"
            own += f" {_difference(plan, rows[name]['psnr'])} |"
        lines.append(own)
    peaks = [memory[f"{n} calls, calibrated"] for n in asked["calls"]]
    plain = memory[f"{asked['steps']} steps"]
    if None not in (plain, *peaks):
        lines += [
            "",
            f"Peak memory above the weights: {plain:.0f} MiB of {asked['steps']} steps, "
            f"{min(peaks):.0f} to {max(peaks):.0f} MiB of the plans.",
        ]
    return "\n".join(lines) + "\n"


def _difference(one: Sequence[float], other: Sequence[float]) -> str:
    more = np.array(one) - np.array(other)
    return f"{more.mean():+.1f} +- {more.std(ddof=1) / np.sqrt(len(more)):.1f}"


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", choices=tuple(CALLS))
    parser.add_argument("--sampler", default="DDIM")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--calls", type=int, nargs="+")
    parser.add_argument("--pictures", type=int, default=16)
    parser.add_argument("--fit", type=int, default=16, help="prompts of the calibrations")
    parser.add_argument("--timed", type=int, help="pictures in the batch that is timed")
    parser.add_argument("--untimed", action="store_true", help="make the rows, and time them another day")
    parser.add_argument("--no-samplers", action="store_true", help="leave out DPM++ 2M and UniPC")
    parser.add_argument("--no-published", action="store_true", help="leave out published caches")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--bundle", action="store_true", help="make presets of some plans of the result")
    options = parser.parse_args()
    asked = Asked(
        options.model,
        options.sampler,
        options.steps,
        tuple(options.calls or CALLS[options.model]),
        options.pictures,
        options.fit,
        not options.no_samplers,
        not options.no_published,
        options.timed or TIMED[options.model],
    )
    name = "" if (asked.sampler, asked.steps) == ("DDIM", 50) else f"-{asked.sampler}-{asked.steps}".lower()
    file = options.out or RESULTS / f"forecasts-{asked.model}{name}.json"
    if options.bundle:
        bundle(json.loads(file.read_text(encoding="utf-8")))
        return
    run(asked, file, timed=not options.untimed)


if __name__ == "__main__":
    main()
