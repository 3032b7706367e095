"""``regrow generate``."""

from __future__ import annotations

import inspect
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, sqrt
from pathlib import Path
from typing import Any

import typer
from PIL import Image, UnidentifiedImageError

from regrow import __version__
from regrow.fields import MOST_CALLS
from regrow.lab.cli.models import is_video
from regrow.lab.cli.options import Accelerated
from regrow.lab.cli.requests import SIDE, FromModel, command, option
from regrow.lab.cli.terminal import Bar, Column, amount, busy, output, remarks, table_of
from regrow.lab.measure.atomic_files import check_writable
from regrow.lab.measure.images import contact_sheet, mean_psnr, on_white
from regrow.lab.measure.machine import machine, model_key
from regrow.lab.measure.prompts import read_prompts
from regrow.lab.measure.sampling import Pictures, check_frames, check_prompts, make, makes_videos
from regrow.lab.measure.variants import Variant
from regrow.lab.measure.videos import Clip, check_format, clips_of, save_clip
from regrow.report import check_freezable
from regrow.schedule import Schedule

# Steps; some schedulers have no single one.
WARM_UP = 2


@dataclass(frozen=True, kw_only=True)
class GenerateRequest(FromModel, Accelerated):
    """What to generate."""

    prompt: tuple[str, ...] = option((), "Prompt, or class; give it again for more pictures.")
    prompts: Path | None = option(None, "Instead: a file of prompts, .txt with one a line; see eval.")
    negative_prompt: str | None = option(None, "What the pictures shall not show.")
    image: Path | None = option(None, "Picture to begin with, scaled to about the model's size.")
    strength: float | None = option(None, "How much of --image is made anew, up to 1; the pipeline's own.")
    steps: int | None = option(
        None, "Sampler steps; 50, or those of a calibrated plan.", min=1, max=MOST_CALLS
    )
    frames: int | None = option(None, "Of a video; its own if none.", min=1)
    fps: int = option(8, "Frames of a video a second.", min=1, max=240)
    out: Path = option(Path("out.png"), "Picture or video file (.mp4, .gif); more prompts get numbers.")
    compare: bool = option(False, "Also unaccelerated, side by side.")
    save_schedule: Path | None = option(
        None, "File (.yaml, .json) for what the calls did, to be had again by --schedule."
    )


@command(GenerateRequest)
def generate(request: GenerateRequest, context: typer.Context) -> None:
    """Make pictures or videos from texts or classes with a diffusers model, accelerated by a method.

    Beside the picture a JSON file of its name says what made it: versions, prompts, seed, method, settings.

    Example: [b]regrow generate --prompt "large owl on blue" --method dato --preset b1 --compare[/b]
    """
    config, label = request.configured(request.steps or 50, context.args, of_schedule="dato")
    steps = request.steps or (None if config is None else config.sampler_steps) or 50
    if bool(request.prompt) == (request.prompts is not None):
        raise ValueError("--prompt, --prompts: give one of them")
    prompts = request.prompt or tuple(read_prompts(request.prompts or Path()))
    run_generate(replace(request, prompt=prompts), Variant(label, config, steps))


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
    recovered: Mapping[str, int]
    schedule: Schedule | None


def run_generate(request: GenerateRequest, asked: Variant) -> None:
    """Generate, save pictures or videos and what made them, and say what it took.

    Args:
        request: what to generate, with all prompts as ``prompt``.
        asked: the method, if any, and the steps.
    """
    config = asked.config
    source = _check(request, asked)
    console, count = remarks(), len(request.prompt)
    own_size = source is not None and not request.height
    pipeline = request.load(console, count, own_size=own_size, videos=True)
    check_prompts(pipeline, request.prompt)
    check_frames(pipeline, request.frames)
    pipeline, options, each = _prepared(request, pipeline, source)
    if request.compare:
        # What is set up in the first calls, a GPU's libraries too, belongs to no method. Of a run from a
        # picture one step at least is made.
        few = min(asked.steps, max(WARM_UP, ceil(1 / (request.strength or 1))))
        with busy(console, "warming up"):
            _make(pipeline, request.prompt[: request.batch], {**options, "steps": few}, each)
    variants = [asked]
    if request.compare:
        # Beside a plan that has fewer steps stands the run that it is for.
        variants.insert(0, Variant("unaccelerated", None, config.unaccelerated_steps or asked.steps))
    results: dict[str, Made] = {}
    with Bar(console) as bar:
        for one in variants:
            task = bar.add_task(one.name, total=None)

            def step(task: Any = task) -> None:
                batches = -(-count // request.batch)
                bar.update(task, total=len(pipeline.scheduler.timesteps) * batches, advance=1)

            results[one.name] = _all(request, pipeline, one, {**options, "on_step": step}, each)
    last = results[asked.name]
    files = _save(request, last.clips)
    rows = _rows(request, results)
    if request.compare:
        files.append(_sheet(request, results))
    if request.save_schedule is not None and last.schedule is not None:
        last.schedule.save(request.save_schedule)
        files.append(request.save_schedule)
    sampled = ("model", "negative_prompt", "strength", "seed", "height", "width", "frames", "fps", "batch")
    record = {
        "what": "generated videos" if makes_videos(type(pipeline)) else "generated pictures",
        "regrow": __version__,
        "files": [file.name for file in files],
        "prompts": list(request.prompt),
        "image": None if request.image is None else str(request.image),
        "steps": asked.steps,
        **request.values(*sampled, "dtype"),
        "scheduler_given": request.scheduler,
        "model_key": model_key(request.model),
        "guidance": request.scale,
        "scheduler": type(pipeline.scheduler).__name__,
        "pipeline": type(pipeline).__name__,
        "method": None if config is None else asked.name,
        "config": asked.settings(),
        "machine": machine(pipeline.device),
        "results": rows,
    }
    beside = request.out.with_suffix(".json")
    beside.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if request.as_json:
        told = {"files": [str(f) for f in files], "methods": rows, "made_by": str(beside)}
        print(json.dumps(told, indent=1))
        return
    _print(rows)
    for file in (*files, beside):
        print(file)


def _check(request: GenerateRequest, asked: Variant) -> Image.Image | None:
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
    if request.compare and asked.config is None:
        raise ValueError("--compare: it needs --method, which it compares with the unaccelerated run")
    if request.save_schedule is not None:
        _check_schedule(request, request.save_schedule, asked.config)
    guidance = request.scale
    if request.negative_prompt is not None and guidance is not None and guidance <= 1:
        raise ValueError(
            f"--negative-prompt: it does nothing with --guidance {guidance:g}, which must be > 1"
        )
    if request.strength is not None:
        if request.image is None:
            raise ValueError("--strength: it goes with --image")
        if not 0 < request.strength <= 1 or int(asked.steps * request.strength) < 1:
            raise ValueError(
                f"--strength: {request.strength:g} is not allowed, it must be from {1 / asked.steps:.2g} "
                f"to 1: at least one of {asked.steps} steps"
            )
    if request.image is None:
        return None
    try:
        return on_white(Image.open(request.image))
    except (UnidentifiedImageError, Image.DecompressionBombError, SyntaxError) as error:
        raise ValueError(f"--image: {request.image} can't be read as a picture") from error


def _check_schedule(request: GenerateRequest, file: Path, config: Any) -> None:
    """Refuse to keep what no schedule can say, or is not one."""
    if file.suffix not in (".yaml", ".json"):
        raise ValueError(f"--save-schedule: {file} is not allowed, it must end in .yaml or .json")
    if config is None:
        raise ValueError("--save-schedule: it needs --method, whose calls it keeps")
    if len(request.prompt) > request.batch:
        raise ValueError(
            f"--save-schedule: it is not allowed for {len(request.prompt)} prompts in batches of "
            f"{request.batch}, each of which may have another; there must be one batch"
        )
    check_freezable(config)
    check_writable("--save-schedule", file)


def _prepared(
    request: GenerateRequest, pipeline: Any, source: Image.Image | None
) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """The pipeline, which may have to begin with a picture, and how it is asked for all batches.

    Returns:
        the pipeline, the arguments of `make`, and the pipeline's arguments that each prompt has one of.

    Raises:
        ValueError: if the pipeline takes no negative prompt, or none of this model's kind takes a picture.
    """
    takes = inspect.signature(pipeline.__call__).parameters
    # Pipelines with a true guidance scale listen to a negative prompt above 1 only, which is not their own.
    if request.negative_prompt is not None and (
        "negative_prompt" not in takes or "true_cfg_scale" in takes or "class_labels" in takes
    ):
        raise ValueError(f"--negative-prompt: {type(pipeline).__name__} takes none")
    each: dict[str, Any] = {}
    if request.negative_prompt is not None:
        each["negative_prompt"] = request.negative_prompt
    width, height = request.width, request.height
    if source is not None:
        from diffusers import AutoPipelineForImage2Image

        kind, own = type(pipeline).__name__, _own_side(pipeline)
        try:
            pipeline = AutoPipelineForImage2Image.from_pipe(pipeline)
        except ValueError as error:
            raise ValueError(f"--image: diffusers has no {kind} that takes one") from error
        pipeline.set_progress_bar_config(disable=True)
        size = (width, height) if width and height else _size(source, own)
        each["image"] = source.resize(size, Image.Resampling.LANCZOS)
        sized = "height" in inspect.signature(pipeline.__call__).parameters
        width, height = size if sized else (None, None)
    options = {
        "guidance": request.scale,
        "height": height,
        "width": width,
        "frames": request.frames,
        "more": {} if request.strength is None else {"strength": request.strength},
    }
    return pipeline, options, each


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


def _all(
    request: GenerateRequest,
    pipeline: Any,
    one: Variant,
    options: Mapping[str, Any],
    each: Mapping[str, Any],
) -> Made:
    """The pictures of all prompts by one method; see `_prepared`."""
    made: list[Pictures] = []
    macs, full, recovered = 0, 0, Counter[str]()
    with one.applied(pipeline) as applied:
        for start in range(0, len(request.prompt), request.batch):
            prompts = request.prompt[start : start + request.batch]
            seeded = {**one.arguments(options), "steps": one.steps, "seed": request.seed + start}
            made.append(_make(pipeline, prompts, seeded, each))
            if applied is not None:
                report = applied.report()
                macs, full = macs + report.macs, full + report.full_macs
                recovered.update(report.recovered)
        schedule = applied.frozen() if applied is not None and request.save_schedule is not None else None
    clips = [clip for pictures in made for clip in clips_of(pictures.images)]
    seconds = sum(pictures.seconds for pictures in made)
    return Made(clips, seconds, (macs, full) if applied is not None else None, recovered, schedule)


def _make(
    pipeline: Any, prompts: Sequence[str], options: Mapping[str, Any], each: Mapping[str, Any]
) -> Pictures:
    """One batch; see `_prepared`."""
    more = options["more"] | {name: [value] * len(prompts) for name, value in each.items()}
    return make(pipeline, prompts, **{**options, "more": more})


def _rows(request: GenerateRequest, results: Mapping[str, Made]) -> list[dict[str, Any]]:
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


def _sheet(request: GenerateRequest, results: Mapping[str, Made]) -> Path:
    """Both methods' pictures side by side, of videos the frames in the middle, as a file."""
    images = [[clip[len(clip) // 2] for clip in made.clips] for made in results.values()]
    sheet = contact_sheet(
        list(zip(*images, strict=True)),
        columns=list(results),
        labels=list(request.prompt),
        side=min(images[0][0].width * 2, 512),
    )
    out = request.out.with_suffix(".png") if request.out.suffix.lower() == ".mp4" else request.out
    file = out.with_stem(out.stem + "-compare")
    sheet.save(file)
    return file


def _print(rows: Sequence[Mapping[str, Any]]) -> None:
    columns: list[Column[Mapping[str, Any]]] = [
        ("method", lambda row: row["method"]),
        ("s an image", lambda row: f"{row['seconds_per_image']:.2f}"),
        ("speed-up", lambda row: amount(row.get("speedup"), ".2f", "x")),
        ("MACs", lambda row: amount(row.get("macs_ratio"), ".2f", "x fewer")),
        ("PSNR dB", lambda row: "equal" if row.get("psnr", 0) is None else amount(row.get("psnr"), ".1f")),
    ]
    output().print(table_of(rows, columns))


def _save(request: GenerateRequest, clips: list[Clip]) -> list[Path]:
    request.out.parent.mkdir(parents=True, exist_ok=True)
    files = [request.out.with_stem(f"{request.out.stem}-{i}") for i in range(len(clips))]
    files = files if len(files) > 1 else [request.out]
    for file, clip in zip(files, clips, strict=True):
        save_clip(file, clip, request.fps)
    return files
