"""``regrow generate``."""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from regrow import zoo
from regrow.apply import apply
from regrow.measure import contact_sheet, mean_psnr
from regrow.measure.keep import check_writable
from regrow.measure.samplers import Sampler
from regrow.measure.sampling import Pictures, make, makes_videos
from regrow.memory import keep_freed_memory

# Steps; some schedulers have no single one.
WARM_UP = 2


@dataclass(frozen=True)
class Request:
    """What to generate; fields are the options of the command."""

    model: str
    prompts: tuple[str, ...]
    steps: int
    scheduler: str | None
    guidance: float | None
    seed: int
    height: int | None
    width: int | None
    out: Path
    device: str | None
    dtype: str
    compare: bool


def best_device() -> str:
    """The fastest device of this machine."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def check_device(name: str) -> str:
    """The name of a device that is there.

    Raises:
        ValueError: if torch does not know the device, or it is not there.
    """
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"--device: {name!r} can't be used; best here is {best_device()} ({reason})"
        ) from error
    return name


def load_pipeline(
    model: str, device: str, dtype: torch.dtype, scheduler: str | None = None, *, videos: bool = False
) -> Any:
    """A pipeline of pictures from text or classes: bundled by name, from a folder, or from the hub.

    Args:
        model: name, folder or hub id.
        device: to run on; on a CPU, with `keep_freed_memory`.
        dtype: of the weights.
        scheduler: another one than the model's own, as `Sampler.parse` takes it.
        videos: also a pipeline of videos from text.

    Raises:
        ValueError: if there is no such scheduler, or the model can't be sampled by it, or it makes videos.
    """
    sampler = Sampler.parse(scheduler) if scheduler is not None else None
    pipeline = _load(model, device, dtype, videos)
    if sampler is not None:
        sampler.put_into(pipeline)
    if torch.device(device).type == "cpu":
        keep_freed_memory()
    return pipeline


def check_scheduler(model: str, scheduler: str) -> None:
    """Look whether a model can be sampled by a scheduler, without its weights.

    Raises:
        ValueError: if there is no such scheduler, or the model can't be sampled by it.
    """
    where: Any = zoo.path(model) if zoo.bundles(model) else model
    sampler = Sampler.parse(scheduler)
    _, name = diffusers.DiffusionPipeline.load_config(where).get("scheduler", (None, None))
    kind = getattr(diffusers, name or "", None)
    if kind is None:
        raise ValueError(f"scheduler: {model} has none of diffusers that could be replaced")
    sampler.instead_of(kind.from_pretrained(where, subfolder="scheduler"))


def _load(model: str, device: str, dtype: torch.dtype, videos: bool) -> Any:
    if zoo.bundles(model):
        return zoo.load(model, dtype=dtype, device=device)
    pipeline: Any = _kind(model, videos).from_pretrained(model, dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def check_pictures(model: str) -> None:
    """Look whether a model makes pictures, without its weights.

    Raises:
        ValueError: if it makes videos.
        OSError: if there is no such model.
    """
    if not zoo.bundles(model):
        _kind(model, videos=False)


def _kind(model: str, videos: bool) -> Any:
    """The class by which a model's pipeline is opened."""
    config: Any = diffusers.DiffusionPipeline.load_config(model)
    name = config["_class_name"]
    own = getattr(diffusers, name, None)
    if own is diffusers.DiTPipeline:
        return own
    if own is None or not makes_videos(own):
        # The automatic choice knows pipelines of pictures from text only.
        return diffusers.AutoPipelineForText2Image
    if not videos:
        raise ValueError(f"model: {model} makes videos ({name}); only regrow bench takes them")
    given = {"image", "video"} & set(inspect.signature(own.__call__).parameters)
    if given:
        raise ValueError(f"model: {model} ({name}) needs {' and '.join(sorted(given))}, not a text alone")
    return own


def run_generate(request: Request, config: Any, label: str, as_json: bool) -> None:
    """Generate, save, and say what it took."""
    known = Image.registered_extensions()
    if known.get(request.out.suffix.lower()) not in Image.SAVE:
        raise ValueError(
            f"--out: {request.out} is not allowed, it must end like a picture: .png, .jpg, .webp"
        )
    check_writable("--out", request.out)
    if request.compare and config is None:
        raise ValueError("--compare: it needs --method, which it compares with the unaccelerated run")
    console = Console(stderr=True)
    device = check_device(request.device) if request.device else best_device()
    with console.status(f"loading {request.model}"):
        pipeline = load_pipeline(request.model, device, getattr(torch, request.dtype), request.scheduler)
    guidance = zoo.guidance_of(request.model, request.guidance)
    size: dict[str, Any] = {"guidance": guidance, "height": request.height, "width": request.width}
    if request.compare:
        # What is set up in the first calls, a GPU's libraries too, belongs to no method.
        with console.status("warming up"):
            make(pipeline, request.prompts, steps=min(request.steps, WARM_UP), **size)
    variants = [("unaccelerated", None)] if request.compare or config is None else []
    variants += [] if config is None else [(label, config)]
    results: dict[str, Pictures] = {}
    ran = None
    with Progress(console=console) as progress:
        for name, method in variants:
            task = progress.add_task(name, total=None)

            def step(task: Any = task) -> None:
                progress.update(task, total=len(pipeline.scheduler.timesteps), advance=1)

            options: dict[str, Any] = {
                "steps": request.steps,
                "seed": request.seed,
                "on_step": step,
                **size,
            }
            if method is None:
                results[name] = make(pipeline, request.prompts, **options)
            else:
                with apply(pipeline, method) as ran:
                    results[name] = make(pipeline, request.prompts, **options)
    files = _save(request, results[variants[-1][0]].images)
    rows: list[dict[str, Any]] = [
        {"method": name, "seconds_per_image": r.seconds / len(r.images)} for name, r in results.items()
    ]
    if ran is not None:
        report = ran.report()
        rows[-1]["macs_ratio"] = report.full_macs / report.macs
    if request.compare:
        plain, fast = (results[name] for name, _ in variants)
        rows[-1]["speedup"] = plain.seconds / fast.seconds
        rows[-1]["psnr"] = mean_psnr(zip(plain.images, fast.images, strict=True))
        sheet = contact_sheet(
            list(zip(plain.images, fast.images, strict=True)),
            columns=["unaccelerated", label],
            labels=list(request.prompts),
            side=min(plain.images[0].width * 2, 512),
        )
        file = request.out.with_stem(request.out.stem + "-compare")
        sheet.save(file)
        files.append(file)
    if as_json:
        print(json.dumps({"files": [str(f) for f in files], "methods": rows}, indent=1))
        return
    table = Table("method", "s an image", "speed-up", "MACs", "PSNR dB")
    for row in rows:
        table.add_row(
            row["method"],
            f"{row['seconds_per_image']:.2f}",
            f"{row['speedup']:.2f}x" if "speedup" in row else "-",
            f"{row['macs_ratio']:.2f}x fewer" if "macs_ratio" in row else "-",
            ("equal" if row["psnr"] is None else f"{row['psnr']:.1f}") if "psnr" in row else "-",
        )
    Console().print(table)
    for file in files:
        print(file)


def _save(request: Request, images: list[Image.Image]) -> list[Path]:
    request.out.parent.mkdir(parents=True, exist_ok=True)
    if len(images) == 1:
        images[0].save(request.out)
        return [request.out]
    files = [request.out.with_stem(f"{request.out.stem}-{i}") for i in range(len(images))]
    for file, image in zip(files, images, strict=True):
        image.save(file)
    return files
