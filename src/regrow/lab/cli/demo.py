"""``regrow demo``: the bundled model, unaccelerated, in fewer steps and accelerated, side by side."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from regrow import zoo
from regrow.fields import MOST_CALLS
from regrow.lab.cli.models import load_pipeline
from regrow.lab.cli.requests import Seeded, command, option
from regrow.lab.cli.terminal import Bar, Column, amount, busy, output, remarks, table_of
from regrow.lab.measure.atomic_files import check_writable
from regrow.lab.measure.features import MissingWeightsError
from regrow.lab.measure.images import contact_sheet, feature_distances, mean_psnr
from regrow.lab.measure.machine import machine
from regrow.lab.measure.sampling import Pictures, make
from regrow.lab.measure.variants import Variant, variant
from regrow.methods.calibrated import Calibrated

PROMPTS = (
    "large penguin on blue",
    "small cat left and cactus right",
    "owl on orange to yellow",
    "strawberry and doughnut on white",
    "octopus on green",
    "penguin and pizza on pink",
)
PLANS = ("emoji-2x", "emoji-4x", "emoji-6x")
PAPERS = ("sito:d", "dato:b1", "dato:emoji-fast", "deepcache:5", "spectrum:fast")


@dataclass(frozen=True, kw_only=True)
class DemoRequest(Seeded):
    """What to show."""

    out: Path = option(Path("demo-out"), "Folder for the picture and the table.")
    steps: int = option(50, "Sampler steps.", min=1, max=MOST_CALLS)


@command(DemoRequest)
def demo(request: DemoRequest) -> None:
    """Six prompts: unaccelerated, fewer steps, SiTo d, DaTo b1, three plans searched for this model.

    No download, under three minutes on two CPU cores.

    Example: [b]regrow demo --out demo-out[/b]
    """
    run_demo(request)


def run_demo(request: DemoRequest) -> None:
    """Generate the pictures, save them and ``demo.json`` in a folder, print the table.

    ``demo.png`` has fewer steps and calibrated plans, ``papers.png`` published methods as printed.
    """
    out, steps = request.out, request.steps
    check_writable("--out", out, folder=True)
    console = remarks()
    common: dict[str, Any] = {"guidance": zoo.GUIDANCE["emoji"], "seed": request.seed}
    with busy(console, "loading the bundled model"):
        pipeline = load_pipeline("emoji", "cpu", torch.float32)
        # Threads and memory are set up in the first calls; they belong to no method.
        make(pipeline, PROMPTS, steps=1, **common)
    fewer = [Variant(f"{n} steps", None, n) for n in dict.fromkeys((steps // 2, steps // 4)) if n]
    # For another number of steps plans are resampled, and their fitted weights are not theirs any more.
    plans = [Variant(f"plan {name[6:]}", Calibrated.preset(name), steps) for name in PLANS]
    plain = Variant("unaccelerated", None, steps)
    sheets = {
        "demo.png": [plain, *fewer, *plans],
        "papers.png": [plain, *(variant(name, steps) for name in PAPERS)],
    }
    pictures: dict[str, Pictures] = {}
    ratios: dict[str, float] = {}
    with Bar(console) as bar:
        every = dict.fromkeys(one for variants in sheets.values() for one in variants)
        tasks = {one: bar.add_task(one.name, total=one.steps) for one in every}
        for one, task in tasks.items():

            def step(task: Any = task) -> None:
                bar.advance(task)

            with one.applied(pipeline) as run:
                pictures[one.name] = make(pipeline, PROMPTS, steps=one.steps, on_step=step, **common)
            report = None if run is None else run.report()
            ratios[one.name] = steps / one.steps if report is None else report.full_macs / report.macs
    with busy(console, "comparing the pictures"):
        distances = _feature_distances(pictures)
        rows = [_row(name, pictures, ratio, distances.get(name)) for name, ratio in ratios.items()]
    out.mkdir(parents=True, exist_ok=True)
    said = {row["method"]: "{method}\n{seconds:.2f} s ({speedup:.1f}x)".format(**row) for row in rows}
    for file, variants in sheets.items():
        sheet = contact_sheet(
            list(zip(*(pictures[one.name].images for one in variants), strict=True)),
            columns=[said[one.name] for one in variants],
            labels=PROMPTS,
        )
        sheet.save(out / file)
    result = {"steps": steps, "seed": request.seed, "machine": machine(), "rows": rows}
    text = json.dumps(result, indent=1)
    (out / "demo.json").write_text(text + "\n", encoding="utf-8")
    if request.as_json:
        print(text)
        return
    columns: list[Column[dict[str, Any]]] = [
        ("method", lambda row: row["method"]),
        ("s an\nimage", lambda row: f"{row['seconds']:.2f}"),
        ("speed-up", lambda row: f"{row['speedup']:.2f}x"),
        ("MACs", lambda row: f"{row['macs_ratio']:.2f}x fewer"),
        ("PSNR\ndB", lambda row: amount(row["psnr"], ".1f")),
        ("feature\ndistance", lambda row: amount(row["feature_distance"], ".3f")),
    ]
    output().print(table_of(rows, columns))
    if rows[-1]["feature_distance"] is None:
        print("feature distance: needs the extractor, pip install 'regrow[measure]'")
    for file in sheets:
        print(out / file)


def _feature_distances(pictures: dict[str, Pictures]) -> dict[str, float]:
    """How far each method's pictures are from the first one's, by name; nothing without the extractor."""
    first, *names = pictures
    try:
        found = feature_distances(pictures[first].images, *(pictures[name].images for name in names))
    except MissingWeightsError:
        return {}
    return {name: sum(each) / len(each) for name, each in zip(names, found, strict=True)}


def _row(
    name: str, pictures: dict[str, Pictures], macs_ratio: float, distance: float | None
) -> dict[str, Any]:
    """A row of the demo's table.

    Seconds are per image; speed-up and MACs are those of the unaccelerated run over the method's.
    Differences are means over the prompts: ``psnr`` in dB to the unaccelerated picture of the same seed,
    and ``feature_distance``, 1 - cosine of EfficientNet-Lite0 features, None without the extractor.
    """
    plain, mine = pictures["unaccelerated"], pictures[name]
    row = {
        "method": name,
        "seconds": mine.seconds / len(mine.images),
        "speedup": plain.seconds / mine.seconds,
        "macs_ratio": macs_ratio,
        "psnr": None,
        "feature_distance": distance,
    }
    if mine is not plain:
        row["psnr"] = mean_psnr(zip(plain.images, mine.images, strict=True))
    return row
