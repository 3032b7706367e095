"""``regrow demo``: the bundled model, unaccelerated, in fewer steps and accelerated, side by side."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from regrow import zoo
from regrow.apply import apply
from regrow.lab.cli.models import load_pipeline
from regrow.lab.cli.terminal import Bar, busy, output, remarks, table
from regrow.lab.measure import contact_sheet, feature_distances, mean_psnr
from regrow.lab.measure.atomic_files import check_writable
from regrow.lab.measure.features import MissingWeightsError
from regrow.lab.measure.machine import machine
from regrow.lab.measure.sampling import Pictures, make
from regrow.methods.calibrated import Calibrated
from regrow.methods.names import method_of

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


@dataclass(frozen=True)
class Row:
    """A row of the demo's table; differences are means over the prompts.

    Args:
        method: what ran.
        seconds: per image.
        speedup: over the unaccelerated run.
        macs_ratio: MACs of the unaccelerated denoiser over those of the method.
        psnr: in dB to the unaccelerated picture of the same seed.
        feature_distance: 1 - cosine of EfficientNet-Lite0 features; None without the extractor.
    """

    method: str
    seconds: float
    speedup: float
    macs_ratio: float
    psnr: float | None
    feature_distance: float | None


def run_demo(out: Path, steps: int, seed: int, as_json: bool) -> None:
    """Generate the pictures, save them and ``demo.json`` in ``out``, print the table.

    ``demo.png`` has fewer steps and calibrated plans, ``papers.png`` published methods as printed.
    """
    check_writable("--out", out, folder=True)
    console = remarks()
    with busy(console, "loading the bundled model"):
        pipeline = load_pipeline("emoji", "cpu", torch.float32)
        # Threads and memory are set up in the first calls; they belong to no method.
        make(pipeline, PROMPTS, steps=1, guidance=zoo.GUIDANCE["emoji"])
    fewer = [n for n in dict.fromkeys((steps // 2, steps // 4)) if n]
    # For another number of steps plans are resampled, and their fitted weights are not theirs any more.
    plans = {f"plan {name[6:]}": Calibrated.preset(name) for name in PLANS}
    sheets: dict[str, list[tuple[str, Any, int]]] = {
        "demo.png": [
            ("unaccelerated", None, steps),
            *((f"{n} steps", None, n) for n in fewer),
            *((name, plan, steps) for name, plan in plans.items()),
        ],
        "papers.png": [(name, method_of(name, steps), steps) for name in PAPERS],
    }
    variants = [variant for sheet in sheets.values() for variant in sheet]
    pictures: dict[str, Pictures] = {}
    ratios: dict[str, float] = {}
    with Bar(console) as bar:
        tasks = {name: bar.add_task(name, total=own) for name, _, own in variants}
        for name, config, own in variants:

            def step(task: Any = tasks[name]) -> None:
                bar.advance(task)

            options: dict[str, Any] = {
                "steps": own,
                "guidance": zoo.GUIDANCE["emoji"],
                "seed": seed,
                "on_step": step,
            }
            if config is None:
                pictures[name], ratios[name] = make(pipeline, PROMPTS, **options), steps / own
                continue
            with apply(pipeline, config) as run:
                pictures[name] = make(pipeline, PROMPTS, **options)
            report = run.report()
            ratios[name] = report.full_macs / report.macs
    with busy(console, "comparing the pictures"):
        rows = [_row(name, pictures, ratio) for name, ratio in ratios.items()]
    out.mkdir(parents=True, exist_ok=True)
    said = {r.method: f"{r.method}\n{r.seconds:.2f} s ({r.speedup:.1f}x)" for r in rows}
    for file, shown_there in sheets.items():
        names = list(dict.fromkeys(["unaccelerated", *(name for name, *_ in shown_there)]))
        sheet = contact_sheet(
            list(zip(*(pictures[name].images for name in names), strict=True)),
            columns=[said[name] for name in names],
            labels=PROMPTS,
        )
        sheet.save(out / file)
    result = {"steps": steps, "seed": seed, "machine": machine(), "rows": [asdict(r) for r in rows]}
    text = json.dumps(result, indent=1)
    (out / "demo.json").write_text(text + "\n", encoding="utf-8")
    if as_json:
        print(text)
        return
    shown = table("", "method", "s an\nimage", "speed-up", "MACs", "PSNR\ndB", "feature\ndistance")
    for r in rows:
        shown.add_row(
            r.method,
            f"{r.seconds:.2f}",
            f"{r.speedup:.2f}x",
            f"{r.macs_ratio:.2f}x fewer",
            "-" if r.psnr is None else f"{r.psnr:.1f}",
            "-" if r.feature_distance is None else f"{r.feature_distance:.3f}",
        )
    output().print(shown)
    if rows[-1].feature_distance is None:
        print("feature distance: needs the extractor, pip install 'regrow[measure]'")
    for file in sheets:
        print(out / file)


def _row(name: str, pictures: dict[str, Pictures], macs_ratio: float) -> Row:
    plain, mine = pictures["unaccelerated"], pictures[name]
    seconds = mine.seconds / len(mine.images)
    speedup = plain.seconds / mine.seconds
    if mine is plain:
        return Row(name, seconds, 1.0, 1.0, None, None)
    try:
        features = feature_distances(plain.images, mine.images)
    except MissingWeightsError:
        features = []
    return Row(
        name,
        seconds,
        speedup,
        macs_ratio,
        mean_psnr(zip(plain.images, mine.images, strict=True)),
        sum(features) / len(features) if features else None,
    )
