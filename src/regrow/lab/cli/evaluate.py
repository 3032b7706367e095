"""``regrow eval``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from regrow import zoo
from regrow.lab.cli.ablations import ABLATIONS, ablated, against
from regrow.lab.cli.default_methods import Compared, usual
from regrow.lab.cli.engine import Jobs
from regrow.lab.cli.models import check_pictures, check_room, check_scheduler, find_device, load_pipeline
from regrow.lab.cli.requests import FromModel, command, option, prompts_of
from regrow.lab.cli.terminal import Column, amount, busy, output, progress, remarks, table_of
from regrow.lab.measure.atomic_files import check_writable, write_text, write_whole
from regrow.lab.measure.clip import ClipScore
from regrow.lab.measure.evaluate import (
    Gain,
    PictureFolder,
    QualityFigures,
    Setting,
    ShardMaker,
    check_against,
    compare,
)
from regrow.lab.measure.external_scores import Scores, check_export, export, read_scores
from regrow.lab.measure.extractors import Labels, Network, extractor
from regrow.lab.measure.images import contact_sheet, to_picture
from regrow.lab.measure.lock import locked
from regrow.lab.measure.machine import machine, model_key, text_key
from regrow.lab.measure.prompts import PromptSet, fetch, named, read_prompts
from regrow.lab.measure.reference import load, of_pictures, pictures_in
from regrow.lab.measure.sampling import check_prompts
from regrow.lab.measure.variants import Variant, variant

FEW = 256
"""Pictures below which figures of sets say nothing."""
SHEET = 8
"""Prompts on the contact sheet."""
OTHERWISE = "*"
"""Marks rows whose pictures were made by other code or on another machine."""


@dataclass(frozen=True, kw_only=True)
class EvalRequest(FromModel, Compared, Jobs):
    """What to evaluate."""

    ablation: str | None = option(None, "Instead: " + ", ".join(ABLATIONS) + ".")
    pairs: tuple[str, ...] = option(
        (), "Two of the methods, a comma between: the first's gain over the second.", "--against"
    )
    prompts: str = option(
        "64",
        "A file (.txt, COCO's captions .json, PartiPrompts' .tsv, DrawBench's .csv), "
        "coco, parti, drawbench or imagenet from the hub, or a number of the model's own.",
    )
    template: str | None = option(None, 'What each prompt is put into: "a photo of a {}".')
    each: int | None = option(None, "Pictures a prompt; 2 of ImageNet's classes, else 1.")
    first: int | None = option(None, "So many of a file's prompts.", min=1)
    features: Network = option(
        Network.EFFNET, "Network of FD and so on; inception is FID's, by torch-fidelity."
    )
    reference: Path | None = option(None, "Folder of true pictures, or what --save-reference wrote.")
    save_reference: Path | None = option(None, "Keep the reference's features here, .safetensors.")
    clip: str | None = option(None, "CLIP model for the CLIP score: folder or id.")
    scores: tuple[Path, ...] = option((), "JSON of other tools' scores; see benchmarks/external.")
    export: Path | None = option(None, "Write the pictures here as PNG, for other tools.")
    out: Path = option(Path("eval"), "Folder for pictures and results; gone on with.")

    @property
    def texts(self) -> tuple[str, ...]:
        """The prompts of a file or a named set, or so many of the model's own, again from the first."""
        if self.prompts.isdecimal():
            if any(value is not None for value in (self.template, self.each, self.first)):
                raise ValueError(
                    "--template, --each, --first: they go with a file or a named set of prompts"
                )
            return prompts_of(self.model, self.prompts)
        which = named(self.prompts)
        if which is None and not Path(self.prompts).exists():
            sets = ", ".join(PromptSet.__members__).lower()
            raise ValueError(f"prompts: {self.prompts!r} is neither a file nor a number nor one of {sets}")
        file = Path(self.prompts) if which is None else fetch(which)
        return tuple(read_prompts(file, self.template, self.each, self.first))


@command(EvalRequest)
def evaluate(request: EvalRequest) -> None:
    """Make pictures of many prompts by each method and compare them. Killed, it goes on where it was.

    Example: [b]regrow eval --model emoji --methods steps:50,steps:10,dato:b1 --prompts 64[/b]
    or [b]regrow eval --ablation alignment[/b]
    """
    name, steps = request.ablation, request.steps
    if name is not None and request.methods is not None:
        raise ValueError("--ablation, --methods: only one of them is allowed")
    if name is None:
        variants = request.variants(lambda: usual(request.model).measured)
    else:
        variants = tuple(variant(one, steps) for one in ablated(name, steps))
    run_eval(request, variants, against(name, steps, request.pairs))


def run_eval(request: EvalRequest, variants: Sequence[Variant], against: Mapping[str, str]) -> None:
    """Make what is missing, compare, save ``result.json`` and a contact sheet, and print a table.

    Args:
        request: what to evaluate.
        variants: the methods; the first is the baseline.
        against: by names of methods, an earlier one that each is compared with picture by picture.

    Raises:
        ValueError: if an option is not allowed, or another process is at work in the folder.
    """
    check_writable("--out", request.out, folder=True)
    with locked("--out", request.out):
        _evaluate(request, variants, against)


def _evaluate(request: EvalRequest, variants: Sequence[Variant], against: Mapping[str, str]) -> None:
    """`run_eval` in a folder that nobody else writes."""
    if request.save_reference is not None:
        if request.reference is None or request.reference.is_file():
            raise ValueError("--save-reference: it needs --reference with a folder of pictures")
        if request.save_reference.suffix != ".safetensors":
            raise ValueError(
                f"--save-reference: {request.save_reference} is not allowed, it must end in .safetensors"
            )
        check_writable("--save-reference", request.save_reference)
    check_against(variants, against)
    if not (request.out / "setting.json").exists():
        # Pictures that are there need no model.
        check_pictures(request.model)
    scores = read_scores(request.scores, variants)
    device = find_device(request.device)
    request.check_engine(device)
    console = remarks()
    # What is missing is missing before the pictures are made, not after it.
    seer = extractor(request.features, device)
    if find_spec("skimage") is None:
        raise ImportError("SSIM needs scikit-image: pip install 'regrow[measure]'")
    setting = request.part(
        Setting,
        prompts=request.texts,
        guidance=request.scale,
        model_key=model_key(request.model),
        shard=request.batch,
    )
    if request.scheduler is not None:
        check_scheduler(request.model, request.scheduler)
    if request.export is not None:
        check_export(request.export, setting)
    source, reference, true_pictures = request.reference, None, []
    if source is not None and source.suffix == ".safetensors":
        reference = load(source, seer)
    elif source is not None:
        true_pictures = pictures_in(source)
    with busy(console, "loading the CLIP model") if request.clip is not None else nullcontext():
        clip = None if request.clip is None else ClipScore(request.clip, device)
    pictures = PictureFolder(request.out, setting, device)
    others = ", ".join(one.name for one in variants if pictures.made_otherwise(one))
    if others:
        console.print(
            "regrow: warning: made by other code or packages, or on another machine: pictures of "
            f"{others} in {pictures.folder}; they are used, and marked in the result.",
            style="yellow",
            soft_wrap=True,
        )
    _make(request, pictures, variants, device, console)
    if source is not None and reference is None:
        # After the pictures, which are kept: what refuses to be made must not cost a look at all of these.
        with progress(console, "reference", len(true_pictures), after=2) as advance:
            reference = of_pictures(source.resolve().name, true_pictures, seer, on_picture=advance)
        if request.save_reference is not None:
            reference.save(request.save_reference, seer)
    # Of what takes less than two seconds no bar is shown.
    shards = len(variants) * len(list(setting.shards()))
    with progress(console, "comparing", shards, after=2) as advance:
        rows = compare(pictures, variants, seer, reference, clip, against, on_shard=advance)
    if request.export is not None:
        with progress(console, "exporting", shards, after=2) as advance:
            export(request.export, pictures, variants, on_shard=advance)
    result: dict[str, Any] = {
        "what": "quality of generated pictures",
        **request.values("model", "seed", "batch", "steps", "height", "width", "dtype", "clip", "workers"),
        "model_key": pictures.setting.model_key,
        "prompts": len(setting.prompts),
        "prompts_key": text_key(setting.prompts),
        "guidance": request.scale,
        "scheduler_given": request.scheduler,
        "features": seer.labels.network,
        "labels": {name: text for name, text in vars(seer.labels).items() if name != "network"},
        "reference": "the baseline's pictures" if reference is None else reference.name,
        "reference_pictures": None if reference is None else len(reference.pooled),
        "engine": request.engine.value,
        "machine": machine(device),
        "rows": [row.to_dict() | {"scores": scores[row.name]} for row in rows],
    }
    text = json.dumps(result, indent=1)
    write_text(request.out / "result.json", text + "\n")
    sheet = _sheet(pictures, variants)
    if request.as_json:
        print(text)
        return
    seconds = {one.name: pictures.seconds(one) for one in variants}
    print_rows(rows, seconds, result["reference"], seer.labels, scores, len(setting.prompts))
    for file in (request.out / "result.json", sheet):
        print(file)


def _make(
    request: EvalRequest,
    pictures: PictureFolder,
    variants: Sequence[Variant],
    device: str,
    console: Console,
) -> None:
    """Make what is missing; the model is loaded only if something is."""
    asked = [one for one in variants if pictures.missing(one)]
    if not asked:
        return
    s = pictures.setting
    check_room(s.model, s.height, s.width, min(s.shard, len(s.prompts)), device, request.torch_dtype)
    maker = partial(_maker, replace(s, model=zoo.from_anywhere(s.model)), device, asked)
    total = sum(len(pictures.missing(one)) for one in asked)
    with (
        request.open(maker, device) as workers,
        progress(console, f"loading {request.model}", total) as update,
    ):
        pictures.make_all(workers, variants, lambda one: update(description=one.name, advance=1))


def _maker(setting: Setting, device: str, variants: Sequence[Variant]) -> ShardMaker:
    """What makes pictures by these methods, wherever it is called; refused before any if one can't."""
    pipeline = load_pipeline(setting.model, device, getattr(torch, setting.dtype), setting.scheduler)
    for one in variants:
        one.check(pipeline)
    check_prompts(pipeline, setting.prompts)
    return ShardMaker(setting, pipeline)


def print_rows(
    rows: Sequence[QualityFigures],
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
    gains = [row.gain for row in rows if row.gain is not None]
    others = list(dict.fromkeys(gain.over for gain in gains))
    caption = f"PSNR, SSIM, distance: to {rows[0].name}"
    if gains:
        caption += f"\ngain: PSNR more than {' or '.join(others)}, mean and its standard error"
    single: list[Column[QualityFigures]] = [
        ("method", _named),
        ("s an\nimage", lambda row: f"{seconds[row.name]:.3f}"),
        ("PSNR\ndB", lambda row: amount(row.psnr, ".1f")),
        ("SSIM", lambda row: amount(row.ssim, ".3f")),
        ("distance", lambda row: amount(row.feature_distance, ".4f")),
    ]
    if gains:
        single.append(("gain dB", lambda row: _shown_gain(row.gain, named=len(others) > 1)))
    if any(row.clip_score is not None for row in rows):
        single.append(("CLIP\nscore", lambda row: amount(row.clip_score, ".2f")))
    for metric in dict.fromkeys(metric for own in scores.values() for metric in own):
        single.append((metric, partial(_shown_score, scores, metric)))
    console.print(table_of(rows, single, caption))
    if pictures >= FEW:
        beside = f"All pictures beside {reference}; {labels.inception_score} beside none"
        console.print(table_of(rows, _together(labels), beside))
    if any(row.made_otherwise for row in rows):
        console.print(f"{OTHERWISE} made by other code or packages, or on another machine", soft_wrap=True)


def _together(labels: Labels) -> list[Column[QualityFigures]]:
    """The columns of figures of all pictures as a set."""
    return [
        ("method", _named),
        (labels.fd, lambda row: amount(row.fd, ".2f")),
        (labels.sfd, lambda row: amount(row.sfd, ".2f")),
        (labels.kd, lambda row: amount(row.kd, ".4f")),
        ("precision", lambda row: amount(row.precision, ".3f")),
        ("recall", lambda row: amount(row.recall, ".3f")),
        (labels.inception_score, lambda row: amount(row.inception_score, ".2f")),
    ]


def _sheet(pictures: PictureFolder, variants: Sequence[Variant]) -> Path:
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


def _named(row: QualityFigures) -> str:
    """A row's name, with its mark."""
    return f"{row.name} {OTHERWISE}" if row.made_otherwise else row.name


def _shown_score(scores: Scores, metric: str, row: QualityFigures) -> str:
    return amount(scores[row.name].get(metric), ".4f")


def _shown_gain(gain: Gain | None, *, named: bool) -> str:
    if gain is None:
        return ""
    return f"{amount(gain.psnr, '.2f')} ± {amount(gain.error, '.2f')}" + (
        f" over {gain.over}" if named else ""
    )
