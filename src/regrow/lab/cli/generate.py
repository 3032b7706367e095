"""``regrow generate``."""

from __future__ import annotations

import inspect
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import ceil, sqrt
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoPipelineForImage2Image
from PIL import Image, UnidentifiedImageError

from regrow import __version__, zoo
from regrow.apply import apply
from regrow.lab.cli.models import best_device, check_device, check_room, is_video, load_pipeline
from regrow.lab.cli.terminal import Bar, busy, output, remarks, table
from regrow.lab.measure import contact_sheet, mean_psnr
from regrow.lab.measure.atomic_files import check_writable
from regrow.lab.measure.images import on_white
from regrow.lab.measure.machine import machine, model_key
from regrow.lab.measure.sampling import Pictures, check_frames, check_prompts, make, makes_videos
from regrow.lab.measure.videos import Clip, check_format, clips_of, save_clip
from regrow.report import check_freezable
from regrow.schedule import Schedule

# Steps; some schedulers have no single one.
WARM_UP = 2
SIDE = 8
"""Pixels of which a picture's sides are multiples."""


@dataclass(frozen=True)
class Request:
    """What to generate; fields are the options of the command, the prompts as texts."""

    model: str
    prompts: tuple[str, ...]
    negative_prompt: str | None
    image: Path | None
    strength: float | None
    steps: int
    scheduler: str | None
    guidance: float | None
    seed: int
    height: int | None
    width: int | None
    frames: int | None
    fps: int
    batch: int
    out: Path
    device: str | None
    dtype: str
    compare: bool
    save_schedule: Path | None = None


@dataclass(frozen=True)
class Made:
    """What one method made of all prompts.

    Args:
        clips: one a prompt, of pictures of one frame each.
        seconds: for all of them.
        macs: of the denoiser in all calls, and what they would be without the method; None of the plain
            pipeline.
        recovered: by recovery, the calls in which it filled in what was not computed.
        schedule: what the last batch did, if it was asked for.
    """

    clips: list[Clip]
    seconds: float
    macs: tuple[int, int] | None
    recovered: Mapping[str, int] = field(default_factory=dict)
    schedule: Schedule | None = None


def run_generate(request: Request, config: Any, label: str, as_json: bool) -> None:
    """Generate, save pictures or videos and what made them, and say what it took."""
    source = _check(request, config)
    console = remarks()
    device = check_device(request.device) if request.device else best_device()
    dtype = getattr(torch, request.dtype)
    pictures = min(request.batch, len(request.prompts))
    sides = (request.height, request.width) if source is None or request.height else (None, None)
    check_room(request.model, *sides, pictures, device, dtype)
    with busy(console, f"loading {request.model}"):
        pipeline = load_pipeline(request.model, device, dtype, request.scheduler, videos=True)
    check_prompts(pipeline, request.prompts)
    check_frames(pipeline, request.frames)
    options = _options(request, pipeline)
    if source is not None:
        pipeline, options = _from_image(request, pipeline, source, options)
    if request.compare:
        # What is set up in the first calls, a GPU's libraries too, belongs to no method.
        with busy(console, "warming up"):
            _make(pipeline, request.prompts[:pictures], options | {"steps": _few(request)})
    variants = [("unaccelerated", None)] if request.compare or config is None else []
    variants += [] if config is None else [(label, config)]
    results: dict[str, Made] = {}
    with Bar(console) as bar:
        for name, method in variants:
            task = bar.add_task(name, total=None)

            def step(task: Any = task) -> None:
                batches = -(-len(request.prompts) // request.batch)
                bar.update(task, total=len(pipeline.scheduler.timesteps) * batches, advance=1)

            # Beside a plan that has fewer steps stands the run that it is for.
            steps = request.steps if method is not None or config is None else config.unaccelerated_steps
            asked = {"on_step": step, "steps": steps or request.steps}
            results[name] = _all(request, pipeline, method, options | asked)
    files = _save(request, results[variants[-1][0]].clips)
    rows = _rows(request, results)
    if request.compare:
        files.append(_sheet(request, results))
    schedule = results[variants[-1][0]].schedule
    if request.save_schedule is not None and schedule is not None:
        schedule.save(request.save_schedule)
        files.append(request.save_schedule)
    record = {
        "what": "generated videos" if makes_videos(type(pipeline)) else "generated pictures",
        "regrow": __version__,
        "files": [file.name for file in files],
        **_said(request),
        "model_key": model_key(request.model),
        "guidance": options["guidance"],
        "scheduler": type(pipeline.scheduler).__name__,
        "pipeline": type(pipeline).__name__,
        "method": label if config is not None else None,
        "config": None if config is None else config.model_dump(mode="json"),
        "machine": machine(device),
        "results": rows,
    }
    beside = request.out.with_suffix(".json")
    beside.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if as_json:
        print(
            json.dumps(
                {"files": [str(f) for f in files], "methods": rows, "made_by": str(beside)}, indent=1
            )
        )
        return
    _print(rows)
    for file in (*files, beside):
        print(file)


def _check(request: Request, config: Any) -> Image.Image | None:
    """Refuse before any work what is not allowed; returns the picture to begin with, if there is one."""
    known = Image.registered_extensions()
    if is_video(request.model):
        check_format(request.out)
    elif known.get(request.out.suffix.lower()) not in Image.SAVE:
        raise ValueError(
            f"--out: {request.out} is not allowed, it must end like a picture: .png, .jpg, .webp"
        )
    check_writable("--out", request.out)
    check_writable("--out", request.out.with_suffix(".json"))
    if request.compare and config is None:
        raise ValueError("--compare: it needs --method, which it compares with the unaccelerated run")
    if request.save_schedule is not None:
        _check_schedule(request, request.save_schedule, config)
    guidance = zoo.guidance_of(request.model, request.guidance)
    if request.negative_prompt is not None and guidance is not None and guidance <= 1:
        raise ValueError(
            f"--negative-prompt: it does nothing with --guidance {guidance:g}, which must be > 1"
        )
    if request.strength is not None:
        if request.image is None:
            raise ValueError("--strength: it goes with --image")
        if not 0 < request.strength <= 1 or int(request.steps * request.strength) < 1:
            raise ValueError(
                f"--strength: {request.strength:g} is not allowed, it must be from {1 / request.steps:.2g} "
                f"to 1: at least one of {request.steps} steps"
            )
    if request.image is None:
        return None
    try:
        return on_white(Image.open(request.image))
    except (UnidentifiedImageError, Image.DecompressionBombError, SyntaxError) as error:
        raise ValueError(f"--image: {request.image} can't be read as a picture") from error


def _check_schedule(request: Request, file: Path, config: Any) -> None:
    """Refuse to keep what no schedule can say, or is not one."""
    if file.suffix not in (".yaml", ".json"):
        raise ValueError(f"--save-schedule: {file} is not allowed, it must end in .yaml or .json")
    if config is None:
        raise ValueError("--save-schedule: it needs --method, whose calls it keeps")
    if len(request.prompts) > request.batch:
        raise ValueError(
            f"--save-schedule: it is not allowed for {len(request.prompts)} prompts in batches of "
            f"{request.batch}, each of which may have another; there must be one batch"
        )
    check_freezable(config)
    check_writable("--save-schedule", file)


def _options(request: Request, pipeline: Any) -> dict[str, Any]:
    """The arguments of `make` that all batches have.

    Raises:
        ValueError: if the pipeline takes no negative prompt.
    """
    takes = inspect.signature(pipeline.__call__).parameters
    # Pipelines with a true guidance scale listen to a negative prompt above 1 only, which is not their own.
    if request.negative_prompt is not None and (
        "negative_prompt" not in takes or "true_cfg_scale" in takes or "class_labels" in takes
    ):
        raise ValueError(f"--negative-prompt: {type(pipeline).__name__} takes none")
    return {
        "steps": request.steps,
        "guidance": zoo.guidance_of(request.model, request.guidance),
        "height": request.height,
        "width": request.width,
        "frames": request.frames,
        "more": {},
    }


def _from_image(
    request: Request, pipeline: Any, source: Image.Image, options: Mapping[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """The pipeline that begins with a picture, and what it takes.

    Raises:
        ValueError: if there is none of this model's kind.
    """
    own = _own_side(pipeline)
    try:
        changed: Any = AutoPipelineForImage2Image.from_pipe(pipeline)
    except ValueError as error:
        raise ValueError(f"--image: diffusers has no {type(pipeline).__name__} that takes one") from error
    changed.set_progress_bar_config(disable=True)
    size = (request.width, request.height) if request.width and request.height else _size(source, own)
    more: dict[str, Any] = {"image": source.resize(size, Image.Resampling.LANCZOS)}
    more |= {} if request.strength is None else {"strength": request.strength}
    takes = "height" in inspect.signature(changed.__call__).parameters
    width, height = size if takes else (None, None)
    return changed, {**options, "height": height, "width": width, "more": more}


def _own_side(pipeline: Any) -> int:
    """The side in pixels of the square pictures that a pipeline was made for."""
    denoiser = getattr(pipeline, "unet", None) or pipeline.transformer
    return int(getattr(denoiser.config, "sample_size", None) or 128) * int(
        getattr(pipeline, "vae_scale_factor", SIDE)
    )


def _size(source: Image.Image, own: int) -> tuple[int, int]:
    """Width and height of a picture's shape and about the model's own area, in multiples of `SIDE`."""
    scale = own / sqrt(source.width * source.height)
    width, height = (max(round(side * scale / SIDE), 1) * SIDE for side in source.size)
    return width, height


def _few(request: Request) -> int:
    """Steps of a warm-up, of which a run from a picture makes one at least."""
    return min(request.steps, max(WARM_UP, ceil(1 / (request.strength or 1))))


def _batches(request: Request) -> Iterator[tuple[int, Sequence[str]]]:
    """Number of the first prompt, and the prompts of a batch."""
    for start in range(0, len(request.prompts), request.batch):
        yield start, request.prompts[start : start + request.batch]


def _all(request: Request, pipeline: Any, method: Any, options: Mapping[str, Any]) -> Made:
    """The pictures of all prompts by one method."""
    made: list[Pictures] = []

    own = {} if method is None else {"more": {**options["more"], **method.arguments()}}

    def run(after: Callable[[], None] = lambda: None) -> None:
        for start, prompts in _batches(request):
            seeded = {**options, **own, "seed": request.seed + start}
            made.append(_make(pipeline, prompts, seeded, request.negative_prompt))
            after()

    macs, recovered, schedule = None, Counter[str](), None
    if method is None:
        run()
    else:
        sums: list[tuple[int, int]] = []
        with apply(pipeline, method) as applied:

            def count() -> None:
                report = applied.report()
                sums.append((report.macs, report.full_macs))
                recovered.update(report.recovered)

            run(count)
            schedule = None if request.save_schedule is None else applied.frozen()
        macs = (sum(own for own, _ in sums), sum(full for _, full in sums))
    clips = [clip for pictures in made for clip in clips_of(pictures.images)]
    return Made(clips, sum(pictures.seconds for pictures in made), macs, recovered, schedule)


def _make(
    pipeline: Any, prompts: Sequence[str], options: Mapping[str, Any], negative: str | None = None
) -> Pictures:
    """One batch."""
    more = dict(options["more"])
    if negative is not None:
        more["negative_prompt"] = [negative] * len(prompts)
    if "image" in more:
        more["image"] = [more["image"]] * len(prompts)
    return make(pipeline, prompts, **{**options, "more": more})


def _rows(request: Request, results: Mapping[str, Made]) -> list[dict[str, Any]]:
    """What each method took, and how far its pictures are from the first one's."""
    rows: list[dict[str, Any]] = [
        {"method": name, "seconds_per_image": made.seconds / len(made.clips)}
        for name, made in results.items()
    ]
    last = list(results.values())[-1]
    if last.macs is not None:
        own, full = last.macs
        rows[-1] |= {"macs": own, "full_macs": full, "macs_ratio": full / own}
        rows[-1]["recovered"] = dict(last.recovered)
    if request.compare:
        plain = next(iter(results.values()))
        rows[-1]["speedup"] = plain.seconds / last.seconds
        frames = ([frame for clip in made.clips for frame in clip] for made in (plain, last))
        rows[-1]["psnr"] = mean_psnr(zip(*frames, strict=True))
    return rows


def _sheet(request: Request, results: Mapping[str, Made]) -> Path:
    """Both methods' pictures side by side, of videos the frames in the middle, as a file."""
    images = [[clip[len(clip) // 2] for clip in made.clips] for made in results.values()]
    sheet = contact_sheet(
        list(zip(*images, strict=True)),
        columns=list(results),
        labels=list(request.prompts),
        side=min(images[0][0].width * 2, 512),
    )
    out = request.out.with_suffix(".png") if request.out.suffix.lower() == ".mp4" else request.out
    file = out.with_stem(out.stem + "-compare")
    sheet.save(file)
    return file


def _said(request: Request) -> dict[str, Any]:
    """The options as plain data, but for where the pictures are."""
    said = {
        name: str(value) if isinstance(value, Path) else value for name, value in asdict(request).items()
    }
    return {
        name: value
        for name, value in said.items()
        if name not in ("out", "device", "compare", "scheduler", "save_schedule")
    } | {"scheduler_given": request.scheduler}


def _print(rows: Sequence[Mapping[str, Any]]) -> None:
    shown = table("", "method", "s an image", "speed-up", "MACs", "PSNR dB")
    for row in rows:
        shown.add_row(
            row["method"],
            f"{row['seconds_per_image']:.2f}",
            f"{row['speedup']:.2f}x" if "speedup" in row else "-",
            f"{row['macs_ratio']:.2f}x fewer" if "macs_ratio" in row else "-",
            ("equal" if row["psnr"] is None else f"{row['psnr']:.1f}") if "psnr" in row else "-",
        )
    output().print(shown)


def _save(request: Request, clips: list[Clip]) -> list[Path]:
    request.out.parent.mkdir(parents=True, exist_ok=True)
    files = [request.out.with_stem(f"{request.out.stem}-{i}") for i in range(len(clips))]
    files = files if len(files) > 1 else [request.out]
    for file, clip in zip(files, clips, strict=True):
        save_clip(file, clip, request.fps)
    return files
