"""Full calls chosen by measured errors, beside even ones, calibrated plans and fewer steps.

    python benchmarks/adaptive.py emoji --pictures 8 --budgets 16 10
    python benchmarks/adaptive.py cifar10

On a bundled model, with its own guidance. Rows of one number of full calls forecast the output by the
line through the last two, but for fewer steps and the calibrated plans, which are fitted and chosen on
other prompts (with DDIM they are those of benchmarks/forecasts.py). A bound is chosen on other prompts too,
so that it gives about as many calls. Pictures are made one by one and compared with the unaccelerated ones
of the same seeds; the noise that an ancestral sampler adds begins from the picture's seed in every row.
Nothing is timed. Killed, or asked for more pictures, it goes on after the last one; a table is written
beside the result.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from regrow import zoo
from regrow.apply import apply
from regrow.lab.calibration.calibrate import EQUAL, Calibration, Settings, Wish, plan_for
from regrow.lab.cli.models import load_pipeline
from regrow.lab.measure.atomic_files import write_json
from regrow.lab.measure.images import psnr
from regrow.lab.measure.machine import machine
from regrow.lab.measure.sampling import make
from regrow.methods.adaptive import Adaptive
from regrow.methods.calibrated import Calibrated
from regrow.methods.dato import DaTo
from regrow.recover.time import Taylor
from regrow.schedule import FULL, Schedule

RESULTS = Path(__file__).parent / "results"
# DiTPipeline begins with noise that Euler's samplers would need scaled; DDPM is ancestral too.
ANCESTRAL = {"emoji": "EulerAncestralDiscrete", "cifar10": "DDPM"}
FIT = 16
"""Prompts that belong to the calibrated plans."""
SEED = 30_000
TRIED, ROUNDS = 2, 4
"""Prompts on which a bound is chosen, and halvings of its range."""
EVEN, FEWER, PLANNED = "even full calls", "fewer steps", "calibrated plan"
RECOVERY = Taylor(order=1)
LONGEST = 12
"""Most calls in a row that are not full under a bound; with fewer it is this that decides on 10 calls."""


@dataclass(frozen=True)
class Setting:
    """One table.

    Args:
        model: bundled.
        sampler: its name.
        steps: of the unaccelerated pictures.
        budgets: numbers of full calls.
        pictures: how many.
    """

    model: str
    sampler: str
    steps: int
    budgets: tuple[int, ...]
    pictures: int

    @property
    def name(self) -> str:
        """As a key, and the title of its table."""
        return f"{self.sampler}, {self.steps} steps"


class Pictures:
    """Makes the pictures of a setting, one by one."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.pipe = load_pipeline(setting.model, "cpu", torch.float32, setting.sampler)
        self.prompts = zoo.prompts_of(setting.model, FIT + setting.pictures, "")
        self._plain: dict[int, Image.Image] = {}

    def one(self, number: int, config: Any, steps: int) -> tuple[Image.Image, int]:
        """A picture and its full calls; those of negative numbers belong to the calibrated plans."""
        if config is None:
            return self._make(number, steps, {}), steps
        with apply(self.pipe, config) as run:
            image = self._make(number, steps, dict(config.arguments()))
            return image, sum(call.depth == "full" for call in run.report().calls)

    def _make(self, number: int, steps: int, more: dict[str, Any]) -> Image.Image:
        seed = SEED + number
        guidance = zoo.guidance_of(self.setting.model)
        prompt = self.prompts[FIT + number]
        made = make(self.pipe, (prompt,), steps=steps, guidance=guidance, seed=seed, more=more)
        image: Image.Image = made.images[0]
        return image

    def plain(self, number: int) -> Image.Image:
        """An unaccelerated picture."""
        if number not in self._plain:
            self._plain[number] = self.one(number, None, self.setting.steps)[0]
        return self._plain[number]

    @cached_property
    def calibration(self) -> Calibration:
        """Made once, on the prompts of negative numbers."""
        guidance = zoo.guidance_of(self.setting.model)
        settings = Settings(self.setting.steps, guidance, SEED - FIT, model=self.setting.model)
        return Calibration(self.pipe, self.prompts[:FIT], settings)

    def bound(self, calls: int) -> float:
        """The bound that gives about so many calls, on prompts of the calibrated plans."""
        low, high = 0.01, 1.0
        for _ in range(ROUNDS):
            middle = float(np.sqrt(low * high))
            config = bounded(middle)
            made = [self.one(number, config, self.setting.steps)[1] for number in range(-TRIED, 0)]
            low, high = (middle, high) if np.mean(made) > calls else (low, middle)
        return float(f"{np.sqrt(low * high):.2g}")


def bounded(bound: float) -> Adaptive:
    """The method with a bound."""
    return Adaptive(bound=bound, recovery=RECOVERY, longest=LONGEST)


def even(steps: int, calls: int) -> Schedule:
    """The plan of so many evenly spaced full calls."""
    full = {i * steps // calls for i in range(calls)}
    depth = tuple(FULL if i in full else 0 for i in range(steps))
    return Schedule(depth=depth, ratio=(0.0,) * steps, recovery=(RECOVERY,), name="even")


def planned(pictures: Pictures, calls: int) -> Calibrated:
    """The plan of so many full calls: that of benchmarks/forecasts.py if it is there, or else a new one."""
    setting = pictures.setting
    file = RESULTS / f"forecasts-{setting.model}.json"
    row = json.loads(file.read_text(encoding="utf-8"))["rows"].get(f"{calls} calls, calibrated")
    if (setting.sampler, setting.steps) == ("DDIM", 50) and row is not None:
        return Calibrated.model_validate(row["plan"])
    return plan_for(pictures.calibration, Wish(None, setting.steps / calls, None))


def rows_of(setting: Setting, pictures: Pictures) -> Iterator[tuple[int, str, Callable[[], Any], int]]:
    """Calls, name, what makes the configuration, and steps of each row."""
    for calls in setting.budgets:
        yield calls, FEWER, lambda: None, calls
        yield calls, EVEN, partial(DaTo, schedule=even(setting.steps, calls)), setting.steps
        budget = partial(Adaptive, budget=calls, recovery=RECOVERY)
        yield calls, f"`adaptive:budget={calls}`", budget, setting.steps
        yield calls, PLANNED, partial(planned, pictures, calls), setting.steps
        yield calls, "bound", lambda n=calls: bounded(pictures.bound(n)), setting.steps


def run(settings: list[Setting], file: Path) -> None:
    """Make all rows, picture by picture."""
    data: dict[str, Any] = {"machine": machine(), "pictures": settings[0].pictures, "settings": {}}
    if file.exists():
        data = json.loads(file.read_text(encoding="utf-8"))
    data["pictures"] = max(data["pictures"], settings[0].pictures)

    def save() -> None:
        write_json(file, data)

    for setting in settings:
        pictures = Pictures(setting)
        asked = {f"{c}: {name}": (config, steps) for c, name, config, steps in rows_of(setting, pictures)}
        known = data["settings"].get(setting.name, {})
        # A row that an earlier run lacks has its place among the others.
        rows = {key: known.get(key, {"psnr": [], "calls": []}) for key in asked} | known
        data["settings"][setting.name] = rows
        for key, (make_config, steps) in asked.items():
            row = rows[key]
            if len(row["psnr"]) >= setting.pictures:
                continue
            config = bounded(row["bound"]) if "bound" in row else make_config()
            if isinstance(config, Adaptive) and config.bound is not None:
                row["bound"] = config.bound
            if isinstance(config, Calibrated):
                row["plan"], steps = json.loads(config.dump()), config.steps
            print(setting.name, key, flush=True)
            for number in range(len(row["psnr"]), setting.pictures):
                image, made = pictures.one(number, config, steps)
                row["psnr"].append(round(min(psnr(pictures.plain(number), image), EQUAL), 3))
                row["calls"].append(made)
                save()
        file.with_suffix(".md").write_text(tables(data), encoding="utf-8")


def tables(data: dict[str, Any]) -> str:
    """The result as tables of Markdown."""
    parts = [
        f"{data['pictures']} pictures; {data['machine']['processor']}. PSNR in dB to the unaccelerated "
        "pictures of the same seeds; +- standard errors of paired differences."
    ]
    for title, rows in data["settings"].items():
        lines = [
            f"| {title} | full calls | PSNR | nearer than even by | than the calibrated plan by "
            "| than fewer steps by |",
            "|---|---|---|---|---|---|",
        ]
        for key, row in rows.items():
            calls, name = key.split(": ", 1)
            bound = f"`adaptive:{row.get('bound', 0):g}:longest={LONGEST}`"
            shown = bound if name == "bound" else name
            others = (rows.get(f"{calls}: {other}") for other in (EVEN, PLANNED, FEWER))
            gains = " | ".join(_nearer(row, other) for other in others)
            lines.append(
                f"| {shown} | {np.mean(row['calls']):.1f} | {np.mean(row['psnr']):.1f} | {gains} |"
            )
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _nearer(row: dict[str, Any], other: dict[str, Any] | None) -> str:
    """How much nearer a row is than another; empty beside itself and where there is none."""
    if other is None or other is row or len(other["psnr"]) != len(row["psnr"]):
        return ""
    more = np.array(row["psnr"]) - np.array(other["psnr"])
    return f"{more.mean():+.1f} +- {more.std(ddof=1) / np.sqrt(len(more)):.1f}"


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", choices=tuple(ANCESTRAL))
    parser.add_argument("--pictures", type=int, default=24)
    parser.add_argument("--budgets", type=int, nargs="+", default=[25, 16, 10])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    budgets = tuple(options.budgets)
    settings = [
        Setting(options.model, sampler, steps, tuple(n for n in budgets if n < steps), options.pictures)
        for sampler, steps in (("DDIM", 50), (ANCESTRAL[options.model], 30))
    ]
    run(settings, options.out or RESULTS / f"adaptive-{options.model}.json")


if __name__ == "__main__":
    main()
