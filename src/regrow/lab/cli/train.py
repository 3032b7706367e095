"""``regrow train``: what methods learn."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from regrow.fields import MOST_BLOCKS, MOST_CALLS, MOST_COUNT, MOST_SEED
from regrow.lab.cli.terminal import Bar, busy, output, remarks, table

if TYPE_CHECKING:
    from regrow.lab.train.run import Trained, Workplace

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


Model = Annotated[str, typer.Option(help="Bundled name, folder, or hub id; DiT, PixArt, Latte or Wan.")]
DataFolder = Annotated[
    Path | None,
    typer.Option(
        "--data",
        help="Folder of pictures, or of videos (mp4, gif, webp, folders of frames), with captions "
        "(NAME.txt, or the name of the folder).",
    ),
]
Pictures = Annotated[
    int,
    typer.Option(help="Instead of --data: pictures or videos that the model makes.", min=2, max=MOST_COUNT),
]
PictureSteps = Annotated[int, typer.Option(help="Sampler steps of these.", min=1, max=MOST_CALLS)]
Height = Annotated[int | None, typer.Option(help="In pixels; the model's own if none.", min=8)]
Width = Annotated[int | None, typer.Option(help="In pixels.", min=8)]
Frames = Annotated[int | None, typer.Option(help="Of a video; the model's own if none.", min=1)]
Prompts = Annotated[str | None, typer.Option(help="A file of their prompts; the model's own.")]
OptimiserSteps = Annotated[int, typer.Option(help="Steps of the optimiser.", min=1, max=MOST_COUNT)]
Lr = Annotated[float, typer.Option(help="Learning rate.")]
BatchSize = Annotated[int, typer.Option(help="Examples a step.", min=1, max=MOST_COUNT)]
SamplerSteps = Annotated[int, typer.Option(help="Steps of the sampler.", min=2, max=MOST_CALLS)]
LastBlocks = Annotated[int, typer.Option(help="Blocks that are always computed.", min=0, max=MOST_BLOCKS)]
Seed = Annotated[int, typer.Option(help="Of everything that is drawn.", min=0, max=MOST_SEED)]
Every = Annotated[int, typer.Option(help="Steps between checkpoints.", min=1, max=MOST_COUNT)]
Half = Annotated[Precision, typer.Option(help="Of what is computed.")]
Again = Annotated[bool, typer.Option("--checkpointing", help="Less memory: compute blocks again.")]
Device = Annotated[str | None, typer.Option(help="cpu, or what accelerate finds: cuda, mps.")]
Resume = Annotated[bool, typer.Option("--resume/--anew", help="Go on from the folder's checkpoint.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@dataclass(frozen=True)
class Request:
    """What all three commands take; fields are their options."""

    model: str
    data: Path | None
    pictures: int
    picture_steps: int
    size: Mapping[str, int | None]
    prompts: str | None
    training: Mapping[str, Any]
    checkpointing: bool
    device: str | None
    out: Path
    resume: bool
    as_json: bool


@train_app.command()
def predictor(
    model: Model = "cifar10",
    data: DataFolder = None,
    pictures: Pictures = 256,
    picture_steps: PictureSteps = 50,
    height: Height = None,
    width: Width = None,
    frames: Frames = None,
    prompts: Prompts = None,
    steps: OptimiserSteps = 40_000,
    lr: Lr = 1e-5,
    price: Annotated[float, typer.Option("--lambda", help="Price of computing.", min=0, max=1e3)] = 1e-4,
    batch: BatchSize = 8,
    sampler_steps: SamplerSteps = 50,
    last_blocks: LastBlocks = 4,
    samples: Annotated[int, typer.Option(help="That the table is made of.", min=1, max=4096)] = 64,
    seed: Seed = 0,
    every: Every = 100,
    precision: Half = Precision.NO,
    checkpointing: Again = False,
    device: Device = None,
    out: Annotated[Path, typer.Option(help="Folder of the file, checkpoint and pictures.")] = Path(
        "predictor"
    ),
    resume: Resume = True,
    as_json: AsJson = False,
) -> None:
    """Train TokenCache's predictor of the tokens that each block computes.

    The defaults are the paper's, for DiT-XL/2. A small model learns faster: --lr 1e-3 --steps 1000.

    Example: [b]regrow train predictor --model cifar10 --last-blocks 1 --lr 1e-3 --steps 1000[/b], and then
    --method tokencache --predictor predictor/predictor.safetensors
    """
    training = _training(steps, lr, batch, seed, precision, every, sampler_steps)
    size = {"height": height, "width": width, "frames": frames}
    request = Request(
        model,
        data,
        pictures,
        picture_steps,
        size,
        prompts,
        training,
        checkpointing,
        device,
        out,
        resume,
        as_json,
    )

    def work(place: Workplace) -> Trained:
        from regrow.lab.train.run import train_predictor

        return train_predictor(place, last_blocks, price, samples)

    _run(request, work, f"--method tokencache --last-blocks {last_blocks} --predictor")


@train_app.command()
def refine(
    model: Model = "cifar10",
    data: DataFolder = None,
    pictures: Pictures = 256,
    picture_steps: PictureSteps = 50,
    height: Height = None,
    width: Width = None,
    frames: Frames = None,
    prompts: Prompts = None,
    trained: Annotated[
        str | None, typer.Option("--predictor", help="Its file; the bundled one, if the model has one.")
    ] = None,
    steps: OptimiserSteps = 10_000,
    lr: Lr = 1e-4,
    ratio: Annotated[float, typer.Option(help="Share of the updates not computed.", min=0, max=1)] = 0.9,
    rank: Annotated[int, typer.Option(help="Of the updates of weights.", min=1, max=1024)] = 8,
    batch: BatchSize = 8,
    sampler_steps: SamplerSteps = 50,
    last_blocks: LastBlocks = 4,
    seed: Seed = 0,
    every: Every = 100,
    precision: Half = Precision.NO,
    checkpointing: Again = False,
    device: Device = None,
    out: Annotated[Path, typer.Option(help="Folder of the file, checkpoint and pictures.")] = Path(
        "refined"
    ),
    resume: Resume = True,
    as_json: AsJson = False,
) -> None:
    """Train low-rank updates (LoRA) of the last blocks, which TokenCache computes in every call.

    Example: [b]regrow train refine --model cifar10 --last-blocks 1 --steps 500[/b], and then
    --method tokencache --lora refined/lora.safetensors
    """
    training = _training(steps, lr, batch, seed, precision, every, sampler_steps)
    size = {"height": height, "width": width, "frames": frames}
    request = Request(
        model,
        data,
        pictures,
        picture_steps,
        size,
        prompts,
        training,
        checkpointing,
        device,
        out,
        resume,
        as_json,
    )

    def work(place: Workplace) -> Trained:
        from regrow.lab.train.run import train_refinement

        return train_refinement(place, trained, last_blocks, ratio, rank)

    _run(request, work, f"--method tokencache --last-blocks {last_blocks} --lora")


@train_app.command()
def router(
    model: Model = "cifar10",
    data: DataFolder = None,
    pictures: Pictures = 256,
    picture_steps: PictureSteps = 50,
    height: Height = None,
    width: Width = None,
    frames: Frames = None,
    prompts: Prompts = None,
    steps: OptimiserSteps = 10_000,
    lr: Lr = 1e-2,
    price: Annotated[float, typer.Option("--lambda", help="Price of computing.", min=0, max=1e3)] = 1e-4,
    threshold: Annotated[float, typer.Option(help="Layers above it are computed.", min=0, max=1)] = 0.5,
    batch: BatchSize = 8,
    sampler_steps: SamplerSteps = 50,
    seed: Seed = 0,
    every: Every = 100,
    precision: Half = Precision.NO,
    checkpointing: Again = False,
    device: Device = None,
    out: Annotated[Path, typer.Option(help="Folder of the file, checkpoint and pictures.")] = Path(
        "router"
    ),
    resume: Resume = True,
    as_json: AsJson = False,
) -> None:
    """Train Learning-to-Cache's table of layers to reuse, for one number of sampler steps.

    Example: [b]regrow train router --model cifar10 --sampler-steps 20 --steps 500[/b], and then
    --method l2c --router router/router.safetensors --steps 20
    """
    training = _training(steps, lr, batch, seed, precision, every, sampler_steps)
    size = {"height": height, "width": width, "frames": frames}
    request = Request(
        model,
        data,
        pictures,
        picture_steps,
        size,
        prompts,
        training,
        checkpointing,
        device,
        out,
        resume,
        as_json,
    )

    def work(place: Workplace) -> Trained:
        from regrow.lab.train.run import train_router

        return train_router(place, price, threshold)

    _run(request, work, f"--steps {sampler_steps} --method l2c --router")


def _training(
    steps: int, lr: float, batch: int, seed: int, precision: Precision, every: int, sampler_steps: int
) -> dict[str, Any]:
    return {
        "steps": steps,
        "lr": lr,
        "batch": batch,
        "seed": seed,
        "precision": precision.value,
        "every": every,
        "sampler_steps": sampler_steps,
    }


def _run(request: Request, work: Callable[[Workplace], Trained], use: str) -> None:
    """Train in a folder that nobody else writes, and say what came of it."""
    from regrow.lab.measure.atomic_files import check_writable
    from regrow.lab.measure.lock import locked
    from regrow.lab.plots import check_matplotlib

    check_writable("--out", request.out, folder=True)
    check_matplotlib()
    with locked("--out", request.out):
        trained = _trained(request, work)
    _say(request, trained, use)


def _trained(request: Request, work: Callable[[Workplace], Trained]) -> Trained:
    import torch
    from pydantic import ValidationError

    from regrow import zoo
    from regrow.fields import explain
    from regrow.lab.cli.models import best_device, check_device, load_pipeline
    from regrow.lab.measure.prompts import read_prompts
    from regrow.lab.train.loop import Training
    from regrow.lab.train.run import Data, forget, workplace

    try:
        training = Training.model_validate(request.training)
    except ValidationError as error:
        raise ValueError(explain(error)) from error
    device = check_device(request.device) if request.device else best_device()
    prompts: tuple[str, ...] = ()
    if request.data is None:
        prompts = (
            tuple(read_prompts(Path(request.prompts), "{}", 1))
            if request.prompts
            else zoo.prompts_of(request.model, request.pictures, "give --prompts or --data")
        )
    data = Data(
        folder=None if request.data is None else str(request.data),
        pictures=request.pictures,
        steps=request.picture_steps,
        **request.size,
        guidance=zoo.guidance_of(request.model),
    )
    console = remarks()
    with busy(console, f"loading {request.model}"):
        pipeline = load_pipeline(request.model, device, torch.float32, videos=True)
    if not request.resume:
        forget(request.out)
    with Bar(console) as bar:
        task = bar.add_task("", total=None)

        def told(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

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


def _say(request: Request, trained: Trained, use: str) -> None:
    """The table or JSON at the end."""
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
