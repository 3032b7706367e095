"""``regrow eval``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from regrow import zoo
from regrow.cli.generate import best_device, check_device, load_pipeline
from regrow.measure.evaluate import Pictures, Quality, Setting, compare
from regrow.measure.features import EfficientNetFeatures
from regrow.measure.images import to_tensor
from regrow.measure.machine import machine
from regrow.measure.prompts import read_prompts
from regrow.measure.variants import Variant, variant

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class Request:
    """What to evaluate; fields are the options of the command."""

    methods: tuple[str, ...]
    model: str
    prompts: str
    template: str
    reference: Path | None
    steps: int
    seed: int
    guidance: float | None
    height: int | None
    width: int | None
    device: str | None
    dtype: str
    batch: int
    out: Path


def run_eval(request: Request, as_json: bool) -> None:
    """Make what is missing, compare, save ``result.json``, and print a table."""
    variants = [variant(spec.strip(), request.steps) for spec in request.methods]
    extractor = EfficientNetFeatures()
    # Missing before the pictures are made, not after it.
    extractor(torch.zeros(1, 3, 8, 8))
    if find_spec("skimage") is None:
        raise ImportError("SSIM needs scikit-image: pip install 'regrow[measure]'")
    guidance = zoo.GUIDANCE.get(request.model) if request.guidance is None else request.guidance
    setting = Setting(
        model=request.model,
        prompts=_prompts(request),
        seed=request.seed,
        guidance=guidance,
        height=request.height,
        width=request.width,
        dtype=request.dtype,
        shard=request.batch,
    )
    reference = None if request.reference is None else _reference(request.reference, extractor)
    pictures = Pictures(request.out, setting)
    console = Console(stderr=True)
    _make(request, pictures, variants, console)
    with console.status("comparing the pictures"):
        rows = compare(pictures, variants, extractor, reference)
    device = check_device(request.device) if request.device else best_device()
    result: dict[str, Any] = {
        "what": "quality of generated pictures",
        "model": request.model,
        "prompts": len(setting.prompts),
        "steps": request.steps,
        "guidance": guidance,
        "dtype": request.dtype,
        "features": "EfficientNet-Lite0",
        "reference": "the baseline's pictures" if request.reference is None else request.reference.name,
        "machine": machine(device),
        "rows": [row.to_dict() for row in rows],
    }
    text = json.dumps(result, indent=1)
    (request.out / "result.json").write_text(text + "\n", encoding="utf-8")
    if as_json:
        print(text)
        return
    print_rows(rows, {one.name: pictures.seconds(one) for one in variants}, result["reference"])


def _prompts(request: Request) -> tuple[str, ...]:
    """The prompts of a file, or so many of the model's own, again from the first if there are fewer."""
    if not request.prompts.isdecimal():
        return tuple(read_prompts(Path(request.prompts), request.template))
    if request.model not in zoo.MODELS:
        raise ValueError(f"prompts: {request.model} has no prompts of its own; give a file")
    return tuple(islice(cycle(zoo.captions(request.model)), int(request.prompts)))


def _reference(folder: Path, extractor: EfficientNetFeatures) -> Tensor:
    """Features of a folder's pictures, whatever their sizes."""
    from PIL import Image

    files = sorted(f for f in folder.iterdir() if f.suffix.lower() in PICTURES)
    if len(files) < 4:
        raise ValueError(f"reference: {folder} holds {len(files)} pictures, it must be >= 4")
    return torch.cat([extractor(to_tensor(Image.open(file))[None].float() / 255) for file in files])


def _make(request: Request, pictures: Pictures, variants: list[Variant], console: Console) -> None:
    """Make what is missing; the model is loaded only if something is."""
    missing = {one.name: len(pictures.missing(one)) for one in variants}
    if not any(missing.values()):
        return
    device = check_device(request.device) if request.device else best_device()
    with console.status(f"loading {request.model}"):
        pipeline = load_pipeline(request.model, device, getattr(torch, request.dtype))
    columns = (
        TextColumn("{task.description:24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("batches", total=sum(missing.values()))
        for one in variants:
            progress.update(task, description=one.name)
            pictures.make(pipeline, one, on_shard=lambda: progress.advance(task))


def print_rows(rows: list[Quality], seconds: dict[str, float], reference: str) -> None:
    """The table of an evaluation."""
    table = Table(caption=f"PSNR, SSIM, distance: to {rows[0].name}; FD-EffNet and after: to {reference}")
    table.add_column("method", no_wrap=True)
    distances = ("PSNR dB", "SSIM", "distance", "FD-EffNet", "KD-EffNet", "precision", "recall")
    for name in ("s an image", *distances):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row.name,
            f"{seconds[row.name]:.3f}",
            _shown(row.psnr, 1),
            _shown(row.ssim, 3),
            _shown(row.feature_distance, 4),
            _shown(row.fd, 2),
            _shown(row.kd, 4),
            _shown(row.precision, 3),
            _shown(row.recall, 3),
        )
    Console().print(table)


def _shown(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
