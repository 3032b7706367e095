"""``regrow train``: what methods learn."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path

import torch
import typer

from regrow import zoo
from regrow.fields import MOST_BLOCKS, MOST_CALLS, MOST_COUNT, MOST_SEED
from regrow.lab.cli.models import find_device, load_pipeline
from regrow.lab.cli.requests import Request, command, option
from regrow.lab.cli.terminal import busy, output, progress, remarks, table
from regrow.lab.measure.atomic_files import check_writable
from regrow.lab.measure.lock import locked
from regrow.lab.measure.prompts import read_prompts
from regrow.lab.plots import check_matplotlib
from regrow.lab.train.loop import Training
from regrow.lab.train.run import (
    Data,
    Trained,
    Workplace,
    forget,
    train_predictor,
    train_refinement,
    train_router,
    workplace,
)

train_app = typer.Typer(
    help="Train what methods learn: TokenCache's predictor, its refinement, Learning-to-Cache's router.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)


class Precision(str, Enum):
    """What accelerate computes in; weights that learn are float32."""

    NO = "no"
    BF16 = "bf16"
    FP16 = "fp16"


@dataclass(frozen=True, kw_only=True)
class TrainRequest(Request):
    """How to train, whatever is trained."""

    model: str = option("cifar10", "Bundled name, folder, or hub id; DiT, PixArt, Latte or Wan.")
    data: Path | None = option(
        None,
        "Folder of pictures, or of videos (mp4, gif, webp, folders of frames), with captions "
        "(NAME.txt, or the name of the folder).",
    )
    pictures: int = option(
        256, "Instead of --data: pictures or videos that the model makes.", min=2, max=MOST_COUNT
    )
    picture_steps: int = option(50, "Sampler steps of these.", min=1, max=MOST_CALLS)
    height: int | None = option(None, "In pixels; the model's own if none.", min=8)
    width: int | None = option(None, "In pixels.", min=8)
    frames: int | None = option(None, "Of a video; the model's own if none.", min=1)
    prompts: str | None = option(None, "A file of their prompts; the model's own.")
    steps: int = option(10_000, "Steps of the optimiser.", min=1, max=MOST_COUNT)
    lr: float = option(1e-4, "Learning rate.")
    batch: int = option(8, "Examples a step.", min=1, max=MOST_COUNT)
    sampler_steps: int = option(50, "Steps of the sampler.", min=2, max=MOST_CALLS)
    seed: int = option(0, "Of everything that is drawn.", min=0, max=MOST_SEED)
    every: int = option(100, "Steps between checkpoints.", min=1, max=MOST_COUNT)
    precision: Precision = option(Precision.NO, "Of what is computed.")
    checkpointing: bool = option(False, "Less memory: compute blocks again.", "--checkpointing")
    device: str | None = option(None, "cpu, or what accelerate finds: cuda, mps.")
    out: Path = option(Path("trained"), "Folder of the file, checkpoint and pictures.")
    resume: bool = option(True, "Go on from the folder's checkpoint.", "--resume/--anew")


@dataclass(frozen=True, kw_only=True)
class PredictorRequest(TrainRequest):
    """How to train a predictor."""

    steps: int = 40_000
    lr: float = 1e-5
    price: float = option(1e-4, "Price of computing.", "--lambda", min=0, max=1e3)
    last_blocks: int = option(4, "Blocks that are always computed.", min=0, max=MOST_BLOCKS)
    samples: int = option(64, "That the table is made of.", min=1, max=4096)
    out: Path = Path("predictor")


@dataclass(frozen=True, kw_only=True)
class RefineRequest(TrainRequest):
    """How to train a refinement."""

    predictor: str | None = option(None, "Its file; the bundled one, if the model has one.")
    ratio: float = option(0.9, "Share of the updates not computed.", min=0, max=1)
    rank: int = option(8, "Of the updates of weights.", min=1, max=1024)
    last_blocks: int = option(4, "Blocks that are always computed.", min=0, max=MOST_BLOCKS)
    out: Path = Path("refined")


@dataclass(frozen=True, kw_only=True)
class RouterRequest(TrainRequest):
    """How to train a router."""

    lr: float = 1e-2
    price: float = option(1e-4, "Price of computing.", "--lambda", min=0, max=1e3)
    threshold: float = option(0.5, "Layers above it are computed.", min=0, max=1)
    out: Path = Path("router")


@train_app.command()
@command(PredictorRequest)
def predictor(request: PredictorRequest) -> None:
    """Train TokenCache's predictor of the tokens that each block computes.

    The defaults are the paper's, for DiT-XL/2. A small model learns faster: --lr 1e-3 --steps 1000.

    Example: [b]regrow train predictor --model cifar10 --last-blocks 1 --lr 1e-3 --steps 1000[/b], and then
    --method tokencache --predictor predictor/predictor.safetensors
    """
    work = partial(train_predictor, **request.values("last_blocks", "price", "samples"))
    _train(request, work, f"--method tokencache --last-blocks {request.last_blocks} --predictor")


@train_app.command()
@command(RefineRequest)
def refine(request: RefineRequest) -> None:
    """Train low-rank updates (LoRA) of the last blocks, which TokenCache computes in every call.

    Example: [b]regrow train refine --model cifar10 --last-blocks 1 --steps 500[/b], and then
    --method tokencache --lora refined/lora.safetensors
    """
    work = partial(train_refinement, **request.values("predictor", "last_blocks", "ratio", "rank"))
    _train(request, work, f"--method tokencache --last-blocks {request.last_blocks} --lora")


@train_app.command()
@command(RouterRequest)
def router(request: RouterRequest) -> None:
    """Train Learning-to-Cache's table of layers to reuse, for one number of sampler steps.

    Example: [b]regrow train router --model cifar10 --sampler-steps 20 --steps 500[/b], and then
    --method l2c --router router/router.safetensors --steps 20
    """
    work = partial(train_router, **request.values("price", "threshold"))
    _train(request, work, f"--steps {request.sampler_steps} --method l2c --router")


def _train(request: TrainRequest, work: Callable[[Workplace], Trained], use: str) -> None:
    """Train in a folder that nobody else writes, and say what came of it."""
    check_writable("--out", request.out, folder=True)
    check_matplotlib()
    with locked("--out", request.out):
        trained = _trained(request, work)
    first, last = trained.curve.held_out[0], trained.curve.held_out[-1]
    files = [trained.file, *(request.out / n for n in ("loss.json", "loss.png", "alpha.png"))]
    files = [file for file in files if file.exists()]
    if request.as_json:
        result = {
            "files": [str(file) for file in files],
            "steps": last.step,
            "held_out": [[p.step, p.error, p.cost] for p in trained.curve.held_out],
            **trained.facts,
        }
        print(json.dumps(result, indent=1))
        return
    shown = table("Of examples that nothing was learned from.", "held out", "loss", "error", "cost")
    for name, point in (("untrained", first), (f"{last.step} steps", last)):
        shown.add_row(name, f"{point.loss:.4g}", f"{point.error:.4g}", f"{point.cost:.4g}")
    said = output()
    said.print(shown)
    for name, value in trained.facts.items():
        said.print(f"{name}: {value:.3g}")
    for file in files:
        said.print(str(file), soft_wrap=True)
    said.print(f"next: regrow generate --model {request.model} {use} {trained.file} ...", soft_wrap=True)


def _trained(request: TrainRequest, work: Callable[[Workplace], Trained]) -> Trained:
    training = request.part(Training, precision=request.precision.value)
    device = find_device(request.device)
    prompts: tuple[str, ...] = ()
    if request.data is None and request.prompts:
        prompts = tuple(read_prompts(Path(request.prompts), "{}", 1))
    elif request.data is None:
        prompts = zoo.prompts_of(request.model, request.pictures, "give --prompts or --data")
    data = Data(
        folder=None if request.data is None else str(request.data),
        steps=request.picture_steps,
        **request.values("pictures", "height", "width", "frames"),
        guidance=zoo.guidance_of(request.model),
    )
    console = remarks()
    with busy(console, f"loading {request.model}"):
        pipeline = load_pipeline(request.model, device, torch.float32, videos=True)
    if not request.resume:
        forget(request.out)
    with progress(console) as update:

        def told(what: str, done: int, total: int) -> None:
            update(description=what, completed=done, total=total)

        place = workplace(
            pipeline,
            request.model,
            data,
            prompts,
            training,
            request.out,
            cpu=device == "cpu",
            checkpointing=request.checkpointing,
            told=told,
        )
        return work(place)
