"""``regrow eval``."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from regrow import zoo
from regrow.lab.cli.engine import Where
from regrow.lab.cli.models import (
    best_device,
    check_device,
    check_pictures,
    check_room,
    check_scheduler,
    load_pipeline,
)
from regrow.lab.cli.terminal import Bar, busy, output, remarks, table
from regrow.lab.measure import contact_sheet
from regrow.lab.measure.atomic_files import check_writable, write_text, write_whole
from regrow.lab.measure.clip import ClipScore
from regrow.lab.measure.evaluate import (
    Gain,
    Pictures,
    Quality,
    Setting,
    ShardMaker,
    check_against,
    compare,
)
from regrow.lab.measure.external_scores import Scores, check_export, export, read_scores
from regrow.lab.measure.extractors import Extractor, Labels, Network, extractor
from regrow.lab.measure.images import to_picture
from regrow.lab.measure.lock import locked
from regrow.lab.measure.machine import machine, model_key, text_key
from regrow.lab.measure.prompts import PromptSet, fetch, named, read_prompts
from regrow.lab.measure.reference import Reference, load, of_pictures, pictures_in
from regrow.lab.measure.sampling import check_prompts
from regrow.lab.measure.variants import Variant

FEW = 256
"""Pictures below which figures of sets say nothing."""
SHEET = 8
"""Prompts on the contact sheet."""
OTHERWISE = "*"
"""Marks rows whose pictures were made by other code or on another machine."""


@dataclass(frozen=True)
class Request:
    """What to evaluate; fields are the options of the command, the methods as variants.

    Args:
        against: by names of methods, an earlier one that each is compared with picture by picture.
    """

    variants: tuple[Variant, ...]
    against: Mapping[str, str]
    model: str
    prompts: str
    template: str | None
    each: int | None
    first: int | None
    features: Network
    reference: Path | None
    save_reference: Path | None
    clip: str | None
    scores: tuple[Path, ...]
    export: Path | None
    steps: int
    scheduler: str | None
    seed: int
    guidance: float | None
    height: int | None
    width: int | None
    device: str | None
    dtype: str
    batch: int
    where: Where
    out: Path


def run_eval(request: Request, as_json: bool) -> None:
    """Make what is missing, compare, save ``result.json`` and a contact sheet, and print a table.

    Raises:
        ValueError: if an option is not allowed, or another process is at work in the folder.
    """
    check_writable("--out", request.out, folder=True)
    with locked("--out", request.out):
        _evaluate(request, as_json)


def _evaluate(request: Request, as_json: bool) -> None:
    """`run_eval` in a folder that nobody else writes."""
    variants = request.variants
    if request.save_reference is not None and (request.reference is None or request.reference.is_file()):
        raise ValueError("--save-reference: it needs --reference with a folder of pictures")
    if request.save_reference is not None and request.save_reference.suffix != ".safetensors":
        raise ValueError(
            f"--save-reference: {request.save_reference} is not allowed, it must end in .safetensors"
        )
    if request.save_reference is not None:
        check_writable("--save-reference", request.save_reference)
    check_against(variants, request.against)
    if not (request.out / "setting.json").exists():
        # Pictures that are there need no model.
        check_pictures(request.model)
    scores = read_scores(request.scores, variants)
    device = check_device(request.device) if request.device else best_device()
    request.where.check(device)
    console = remarks()
    # What is missing is missing before the pictures are made, not after it.
    seer = extractor(request.features, device)
    if find_spec("skimage") is None:
        raise ImportError("SSIM needs scikit-image: pip install 'regrow[measure]'")
    guidance = zoo.guidance_of(request.model, request.guidance)
    setting = Setting(
        model=request.model,
        prompts=_prompts(request),
        seed=request.seed,
        scheduler=request.scheduler,
        guidance=guidance,
        height=request.height,
        width=request.width,
        dtype=request.dtype,
        model_key=model_key(request.model),
        shard=request.batch,
    )
    if request.scheduler is not None:
        check_scheduler(request.model, request.scheduler)
    if request.export is not None:
        check_export(request.export, setting)
    reference = _reference_file(request.reference, seer)
    true_pictures = pictures_in(request.reference) if request.reference and reference is None else []
    with busy(console, "loading the CLIP model") if request.clip is not None else nullcontext():
        clip = None if request.clip is None else ClipScore(request.clip, device)
    pictures = Pictures(request.out, setting, device)
    _make(request, pictures, variants, device, console)
    if true_pictures:
        # After the pictures, which are kept: what refuses to be made must not cost a look at all of these.
        reference = _reference(request, true_pictures, seer, console)
    shards = len(variants) * len(list(setting.shards()))
    with patient(console, "comparing", shards) as advance:
        rows = compare(pictures, variants, seer, reference, clip, request.against, on_shard=advance)
    if request.export is not None:
        with patient(console, "exporting", shards) as advance:
            export(request.export, pictures, variants, on_shard=advance)
    result: dict[str, Any] = {
        "what": "quality of generated pictures",
        "model": request.model,
        "model_key": pictures.setting.model_key,
        "prompts": len(setting.prompts),
        "prompts_key": text_key(setting.prompts),
        "seed": request.seed,
        "batch": request.batch,
        "steps": request.steps,
        "guidance": guidance,
        "scheduler_given": request.scheduler,
        "height": request.height,
        "width": request.width,
        "dtype": request.dtype,
        "features": seer.labels.network,
        "labels": {name: text for name, text in vars(seer.labels).items() if name != "network"},
        "reference": "the baseline's pictures" if reference is None else reference.name,
        "reference_pictures": None if reference is None else len(reference.pooled),
        "clip": request.clip,
        "engine": request.where.engine.value,
        "workers": request.where.workers,
        "machine": machine(device),
        "rows": [row.to_dict() | {"scores": scores[row.name]} for row in rows],
    }
    text = json.dumps(result, indent=1)
    write_text(request.out / "result.json", text + "\n")
    sheet = _sheet(pictures, variants)
    if as_json:
        print(text)
        return
    seconds = {one.name: pictures.seconds(one) for one in variants}
    print_rows(rows, seconds, result["reference"], seer.labels, scores, len(setting.prompts))
    for file in (request.out / "result.json", sheet):
        print(file)


def _prompts(request: Request) -> tuple[str, ...]:
    """The prompts of a file or a named set, or so many of the model's own, again from the first."""
    text = request.prompts
    if text.isdecimal():
        if any(option is not None for option in (request.template, request.each, request.first)):
            raise ValueError("--template, --each, --first: they go with a file or a named set of prompts")
        return zoo.prompts_of(request.model, int(text), "give a file")
    which = named(text)
    if which is None and not Path(text).exists():
        sets = ", ".join(PromptSet.__members__).lower()
        raise ValueError(f"prompts: {text!r} is neither a file nor a number nor one of {sets}")
    file = Path(text) if which is None else fetch(which)
    return tuple(read_prompts(file, request.template, request.each, request.first))


def _reference_file(where: Path | None, seer: Extractor) -> Reference | None:
    """The reference if it is a file of features."""
    return load(where, seer) if where is not None and where.suffix == ".safetensors" else None


def _reference(request: Request, files: list[Path], seer: Extractor, console: Console) -> Reference:
    """The features of the reference's pictures, kept if that was asked for."""
    name = "" if request.reference is None else request.reference.resolve().name
    with patient(console, "reference", len(files)) as advance:
        found = of_pictures(name, files, seer, on_picture=advance)
    if request.save_reference is not None:
        found.save(request.save_reference, seer)
    return found


@contextmanager
def patient(console: Console, what: str, total: int, after: float = 2.0) -> Iterator[Callable[[], None]]:
    """A progress bar that shows itself only once the work has taken some seconds.

    Args:
        console: where it shows.
        what: is done.
        total: how often what it yields will be called.
        after: seconds.

    Yields:
        What advances it by one.
    """
    with Bar(console, after=after) as bar:
        task = bar.add_task(what, total=total)
        yield lambda: bar.advance(task)


def _make(
    request: Request, pictures: Pictures, variants: Sequence[Variant], device: str, console: Console
) -> None:
    """Make what is missing; the model is loaded only if something is."""
    missing = [(one, len(shards)) for one in variants if (shards := pictures.missing(one))]
    others = ", ".join(one.name for one in variants if pictures.made_otherwise(one))
    if others:
        console.print(
            "regrow: warning: made by other code or packages, or on another machine: pictures of "
            f"{others} in {pictures.folder}; they are used, and marked in the result.",
            style="yellow",
            soft_wrap=True,
        )
    if not missing:
        return
    s = pictures.setting
    check_room(s.model, s.height, s.width, min(s.shard, len(s.prompts)), device, getattr(torch, s.dtype))
    setting = replace(pictures.setting, model=zoo.from_anywhere(pictures.setting.model))
    maker = partial(_maker, setting, device, [one for one, _ in missing])
    with request.where.open(maker, device) as workers, Bar(console) as progress:
        task = progress.add_task(f"loading {request.model}", total=sum(count for _, count in missing))

        def advance(one: Variant) -> None:
            progress.update(task, description=one.name, advance=1)

        pictures.make_all(workers, variants, advance)


def _maker(setting: Setting, device: str, variants: Sequence[Variant]) -> ShardMaker:
    """What makes pictures by these methods, wherever it is called; refused before any if one can't."""
    pipeline = load_pipeline(setting.model, device, getattr(torch, setting.dtype), setting.scheduler)
    for one in variants:
        one.check(pipeline)
    check_prompts(pipeline, setting.prompts)
    return ShardMaker(setting, pipeline)


def print_rows(
    rows: Sequence[Quality],
    seconds: dict[str, float],
    reference: str,
    labels: Labels,
    scores: Scores,
    pictures: int,
) -> None:
    """Two tables: each picture by itself, and all of them as a set, if they are enough for that."""
    console = output()
    if pictures < FEW:
        console.print(
            f"Only {pictures} pictures: small differences are chance, and figures of sets "
            f"({labels.fd} and so on) are left out below {FEW}.",
            soft_wrap=True,
        )
    console.print(_single(rows, seconds, scores))
    if pictures >= FEW:
        console.print(_together(rows, reference, labels))
    if any(row.made_otherwise for row in rows):
        console.print(f"{OTHERWISE} made by other code or packages, or on another machine", soft_wrap=True)


def _single(rows: Sequence[Quality], seconds: dict[str, float], scores: Scores) -> Table:
    """What each picture is by itself, the mean or median over all."""
    metrics = list(dict.fromkeys(metric for own in scores.values() for metric in own))
    clip = any(row.clip_score is not None for row in rows)
    gains = any(row.gain is not None for row in rows)
    others = list(dict.fromkeys(row.gain.over for row in rows if row.gain is not None))
    made = table(
        f"PSNR, SSIM, distance: to {rows[0].name}"
        + (f"\ngain: PSNR more than {' or '.join(others)}, mean and its standard error" if gains else ""),
        "method",
        *("s an\nimage", "PSNR\ndB", "SSIM", "distance"),
        *(["gain dB"] if gains else []),
        *(["CLIP\nscore"] if clip else []),
        *metrics,
    )
    for row in rows:
        made.add_row(
            _named(row),
            f"{seconds[row.name]:.3f}",
            _shown(row.psnr, 1),
            _shown(row.ssim, 3),
            _shown(row.feature_distance, 4),
            *([_shown_gain(row.gain, named=len(others) > 1)] if gains else []),
            *([_shown(row.clip_score, 2)] if clip else []),
            *(_shown(scores[row.name].get(metric), 4) for metric in metrics),
        )
    return made


def _together(rows: Sequence[Quality], reference: str, labels: Labels) -> Table:
    """What all pictures are as a set."""
    names = (labels.fd, labels.sfd, labels.kd, "precision", "recall", labels.inception_score)
    made = table(
        f"All pictures beside {reference}; {labels.inception_score} beside none",
        "method",
        *names,
    )
    for row in rows:
        made.add_row(
            _named(row),
            _shown(row.fd, 2),
            _shown(row.sfd, 2),
            _shown(row.kd, 4),
            _shown(row.precision, 3),
            _shown(row.recall, 3),
            _shown(row.inception_score, 2),
        )
    return made


def _sheet(pictures: Pictures, variants: Sequence[Variant]) -> Path:
    """The first pictures of all variants side by side, as a file."""
    prompts = pictures.setting.prompts[: min(SHEET, pictures.setting.shard)]
    columns = [
        [to_picture(p.float() / 255) for p in pictures.shard(one, 0)[: len(prompts)]] for one in variants
    ]
    sheet = contact_sheet(
        list(zip(*columns, strict=True)),
        columns=[one.name.replace("+", "\n+").replace(":", ":\n", 1) for one in variants],
        labels=[text if len(text) <= 40 else f"{text[:38]} ..." for text in prompts],
    )
    file = pictures.folder / "contact-sheet.png"
    write_whole(file, lambda to: sheet.save(to, "PNG"))
    return file


def _named(row: Quality) -> str:
    """A row's name, with its mark."""
    return f"{row.name} {OTHERWISE}" if row.made_otherwise else row.name


def _shown(value: float | None, digits: int) -> str:
    # Adding zero takes the sign off a zero.
    return "-" if value is None else f"{round(value, digits) + 0.0:.{digits}f}"


def _shown_gain(gain: Gain | None, *, named: bool) -> str:
    if gain is None:
        return ""
    return f"{_shown(gain.psnr, 2)} ± {_shown(gain.error, 2)}" + (f" over {gain.over}" if named else "")
