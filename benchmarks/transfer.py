"""Do plans that were searched on one sampler and number of steps hold on others?

    python benchmarks/transfer.py --plans search/front/plan-02.yaml search/front/plan-07.yaml --work work \\
        --generations 3 --json benchmarks/results/transfer.json

Each setting changes one thing: the sampler, the number of steps, or text-to-image into image-to-image.
There the plans, resampled to its calls, stand beside DeepCache, fewer steps, and the plans that a short
search made there picks. Figures are the deviation from the setting's own unaccelerated run and MACs as a
share of it, on prompts and seeds that no plan was searched on; the hypervolume is up to the worst of all of
them. `benchmarks/transfer.sh` makes the table for the bundled presets.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionImg2ImgPipeline
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from regrow import DaTo, zoo
from regrow.lab.cli.engine import JobEngine
from regrow.lab.cli.models import load_pipeline
from regrow.lab.cli.search import PATIENCE, Again, run_search
from regrow.lab.measure.evaluate import Setting
from regrow.lab.measure.machine import machine, model_key
from regrow.lab.measure.macs import PlanCounter
from regrow.lab.measure.variants import variant
from regrow.lab.search.evaluation import Candidate, Evaluator, Facts, Job
from regrow.lab.search.objectives import Cost, Quality
from regrow.lab.search.proposals import hypervolume
from regrow.lab.search.search import Economy
from regrow.lab.search.settings import SearchSettings, doubled
from regrow.schedule import Schedule

STRENGTH = 0.6
# Prompts of a search, with the first seeds.
SEARCHED = 16
# Of the pictures that image-to-image begins with, the first one's seed.
SOURCES = 10**6
DTYPE = "bfloat16"
OBJECTIVES = (Quality.DEVIATION, Cost.MACS)


@dataclass(frozen=True)
class Place:
    """A setting to try plans in.

    Args:
        name: for the table.
        folder: of the search made there; None where the plans themselves were found.
        scheduler: of the sampler; None for the model's own, DDIM.
        steps: of the sampler.
        from_image: image-to-image, from pictures of the model's own by other seeds.
    """

    name: str
    folder: str | None
    scheduler: str | None
    steps: int
    from_image: bool = False


PLACES = (
    Place("DDIM, 50 steps", None, None, 50),
    Place("DDIM, 20 steps", "ddim-20", None, 20),
    Place("DDIM, 100 steps", "ddim-100", None, 100),
    Place("Euler, 50 steps", "euler-50", "EulerDiscrete", 50),
    Place("DPM-Solver++, 50 steps", "dpm-solver-50", "DPMSolverMultistep", 50),
    Place("DPM-Solver++, 20 steps", "dpm-solver-20", "DPMSolverMultistep", 20),
    # Without this it begins with Runge-Kutta steps, of four calls each.
    Place("PLMS, 50 steps", "plms-50", "PNDM:skip_prk_steps=true", 50),
    Place("image-to-image, DDIM, 50 steps", "image-to-image", None, 50, from_image=True),
)


class FromImage:
    """An image-to-image pipeline with the pictures it begins with.

    Args:
        pipeline: of text to image.
        prompts: of the pictures.
    """

    def __init__(self, pipeline: Any, prompts: tuple[str, ...]) -> None:
        self._images = pipeline(
            list(prompts),
            num_inference_steps=20,
            guidance_scale=zoo.GUIDANCE["emoji"],
            generator=[torch.Generator().manual_seed(SOURCES + i) for i in range(len(prompts))],
        ).images
        self._prompts = prompts
        # from_pipe() takes no AutoencoderTiny.
        self._pipeline = StableDiffusionImg2ImgPipeline(
            **pipeline.components, requires_safety_checker=False
        )
        self._pipeline.set_progress_bar_config(disable=True)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipeline, name)

    def __call__(self, prompt: list[str], **options: Any) -> Any:
        images = [self._images[self._prompts.index(text)] for text in prompt]
        return self._pipeline(prompt, image=images, strength=STRENGTH, **options)


def opened(place: Place, prompts: tuple[str, ...]) -> Any:
    """The bundled model in a setting."""
    pipeline = load_pipeline("emoji", "cpu", getattr(torch, DTYPE), place.scheduler)
    return FromImage(pipeline, prompts) if place.from_image else pipeline


def search_there(place: Place, generations: int, out: Path, asked: Again) -> None:
    """A short search in a setting, on the first prompts; gone on with if it exists."""
    prompts = zoo.captions("emoji")[:SEARCHED]
    settings = SearchSettings(
        model="emoji",
        method="dato",
        steps=(place.steps, place.steps),
        prompts=prompts,
        objectives=OBJECTIVES,
        economy=Economy(prompts=doubled(len(prompts)), patience=PATIENCE),
        choices={"ratio": (0, 0.3, 0.5, 0.7), "recovery": ("reuse",)},
        guidance=zoo.GUIDANCE["emoji"],
        scheduler=place.scheduler,
        dtype=DTYPE,
    )
    # Image-to-image is no model that a name opens.
    other = partial(opened, place, tuple(prompts)) if place.from_image else None
    outcome = run_search(settings, replace(asked, budget=str(generations)), out, other)
    if outcome.stopped:
        raise KeyboardInterrupt


def picked(folder: Path) -> list[Path]:
    """The schedule files of the plans that a search picked."""
    found = json.loads((folder / "search.json").read_text(encoding="utf-8"))
    return [folder / plan["file"] for plan in found["front"] if plan["picked"]]


def macs_share(counter: PlanCounter, facts: Facts, place: Place) -> Callable[[Candidate], float]:
    """MACs of a plan as a share of the setting's unaccelerated run."""
    full = counter.full().denoiser * facts.calls

    def share(candidate: Candidate) -> float:
        steps = candidate.steps
        calls = int(steps * STRENGTH) if place.from_image else facts.calls_at(steps)
        return sum(macs.denoiser for _, macs in counter.calls(candidate.config, calls)) / full

    return share


@dataclass(frozen=True)
class Trial:
    """A plan in a setting."""

    place: Place
    name: str
    candidate: Candidate


class Trials:
    """Does trials.

    Args:
        prompts: of the pictures.
        seed: of the first one; the others follow.
        folder: where unaccelerated runs are kept.
    """

    def __init__(self, prompts: tuple[str, ...], seed: int, folder: Path) -> None:
        self.setting = Setting(
            model="emoji",
            prompts=prompts,
            seed=seed,
            guidance=zoo.GUIDANCE["emoji"],
            dtype=DTYPE,
            model_key=model_key("emoji"),
        )
        self.folder = folder
        self._place: Place | None = None
        self._evaluator: Evaluator | None = None
        self._share: Callable[[Candidate], float] | None = None

    def _at(self, place: Place) -> tuple[Evaluator, Callable[[Candidate], float]]:
        """What measures plans in a setting; that of one setting at a time is held."""
        if self._place != place or self._evaluator is None or self._share is None:
            pipeline = partial(opened, place, self.setting.prompts)
            folder = self.folder / place.name
            self._evaluator = Evaluator(pipeline, self.setting, place.steps, OBJECTIVES, folder)
            facts = self._evaluator.facts()
            counter = PlanCounter(self._evaluator.pipeline.unet, facts.inputs[0])
            self._place, self._share = place, macs_share(counter, facts, place)
        return self._evaluator, self._share

    def __call__(self, trial: Trial) -> dict[str, Any]:
        """Deviation of each picture, their mean, and MACs as a share of the unaccelerated run."""
        evaluator, share = self._at(trial.place)
        outcome = evaluator(Job(trial.candidate, 0, len(self.setting.prompts)))
        if outcome.error is not None:
            raise ValueError(f"{trial.place.name}, {trial.name}: {outcome.error}")
        each = [round(value, 5) for value in outcome.quality["deviation"]]
        mean = sum(each) / len(each)
        return {"deviation": mean, "macs": share(trial.candidate), "each": each}


def done_before(log: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """The rows of a run that was killed, by setting and what the plan is; a line may be half written."""
    rows = {}
    for line in log.read_text(encoding="utf-8").splitlines() if log.exists() else []:
        with suppress(json.JSONDecodeError):
            row = json.loads(line)
            rows[row["setting"], row.get("key", "")] = row
    return rows


def summary(place: Place, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The rows of a setting and the share of the hypervolume of each group of plans."""
    groups: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        groups.setdefault(row["plan"].partition(" ")[0], []).append((row["deviation"], row["macs"]))
    worst = [max(column) for column in zip(*(p for ps in groups.values() for p in ps), strict=True)]
    volumes = {name: hypervolume(points, worst) / (worst[0] * worst[1]) for name, points in groups.items()}
    return {"setting": place.name, "rows": rows, "hypervolume": volumes}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plans", type=Path, nargs="+", required=True, help="schedule files")
    parser.add_argument(
        "--generations", type=int, default=0, help="of the search in each setting; none: no search"
    )
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--first", type=int, default=16, help="prompt and seed to begin with")
    parser.add_argument("--work", type=Path, required=True, help="gone on with if it exists")
    parser.add_argument("--workers", type=int, default=2, help="of Ray, one thread each")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    asked = Again(engine=JobEngine.RAY, workers=args.workers, device="cpu", plots=False)
    prompts = tuple(zoo.captions("emoji")[args.first : args.first + args.prompts])
    found = {f"searched {f.stem}": DaTo(schedule=Schedule.load(f)) for f in args.plans}
    trials = []
    for place in PLACES:
        s = place.steps
        plans = {name: Candidate(s, config) for name, config in found.items()}
        plans |= {f"deepcache {n}": Candidate(s, variant(f"deepcache:{n}", s).config) for n in (2, 3, 5, 8)}
        plans |= {f"steps {s // n}": Candidate(s // n, None) for n in (2, 3, 5)}
        if args.generations and place.folder is not None:
            out = args.work / place.folder
            search_there(place, args.generations, out, asked)
            for file in picked(out):
                plans[f"there {file.stem}"] = Candidate(s, DaTo(schedule=Schedule.load(file)))
        trials += [Trial(place, name, candidate) for name, candidate in plans.items()]
    folder = args.work.resolve() / f"{args.first}-{args.prompts}"
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"rows-{model_key('emoji')}.jsonl"
    rows = done_before(log)
    missing = [t for t in trials if (t.place.name, t.candidate.key) not in rows]
    make = partial(Trials, prompts, args.first, folder)
    with Progress(console=Console(stderr=True)) as progress, log.open("a", encoding="utf-8") as lines:
        task = progress.add_task("plans", total=len(missing))
        if missing:
            with asked.open(make, "cpu") as workers:
                for index, figures in workers.run(missing):
                    trial = missing[index]
                    key = trial.candidate.key
                    row = {"setting": trial.place.name, "plan": trial.name, "key": key} | figures
                    rows[trial.place.name, key] = row
                    lines.write(f"\n{json.dumps(row)}")
                    lines.flush()
                    progress.update(task, advance=1, description=trial.place.name)
    result = [
        summary(place, [rows[t.place.name, t.candidate.key] for t in trials if t.place == place])
        for place in PLACES
    ]
    table = Table(caption="share of the hypervolume up to the worst figures; more is better")
    table.add_column("setting")
    names = ("searched", "there", "deepcache", "steps")
    for name in names:
        table.add_column(name, justify="right")
    for one in result:
        volumes = one["hypervolume"]
        table.add_row(one["setting"], *(f"{volumes[n]:.3f}" if n in volumes else "-" for n in names))
    Console().print(table)
    if args.json:
        whole = {
            "what": "plans in other settings",
            "prompts": args.prompts,
            "first": args.first,
            "dtype": DTYPE,
            "machine": machine("cpu"),
        }
        text = json.dumps(whole | {"settings": result}, indent=1)
        args.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
