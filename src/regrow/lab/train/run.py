"""Make a training from beginning to end: data, the loop, the file that methods take."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regrow.fields import Calls, Checked, Count, Guidance
from regrow.lab.measure.atomic_files import kept
from regrow.lab.measure.sampling import takes_classes
from regrow.lab.train.examples import Examples, Told, bytes_of, encoded, of_folder, opened, own, size_of
from regrow.lab.train.frozen import Frozen
from regrow.lab.train.loop import CHECKPOINT, Curve, Training, Workplace, train
from regrow.lab.train.objective import Objective
from regrow.lab.train.pictures import draw_alpha, draw_loss
from regrow.lab.train.predictor import LEVELS, PLACES, PredictorObjective, table
from regrow.lab.train.refine import RefineObjective, adapter_state, add_adapter
from regrow.lab.train.router import Router, RouterObjective
from regrow.lab.train.steps import Steps
from regrow.models import denoiser_of, layout_of, other_denoisers
from regrow.models.table import Layout
from regrow.origin import denoiser_key
from regrow.predictors import (
    UNTRAINED,
    CachePredictor,
    Learned,
    LearnedFile,
    bundled_for,
    load_predictor,
    read_learned,
    table_of,
    write_learned,
)
from regrow.tokens.shares import Table

HELD_OUT = 8
"""One example in so many is held out."""
DATA_SEED = 1000
"""Seed of the first picture that the model makes itself; comparisons begin with 0."""
_MADE_BY = {"steps", "guidance", "height", "width", "frames"}


class Data(Checked):
    """What is trained on.

    Args:
        folder: of pictures, or of videos; None for those that the model makes itself.
        pictures: how many it makes.
        steps: of its sampler for them.
        height: in pixels; None for the model's own, or its pipeline's, as with the others.
        width: in pixels.
        frames: of a video.
        guidance: of the sampler; None for the pipeline's own.
        batch: that are made or encoded together.
    """

    folder: str | None = None
    pictures: Count = 256
    steps: Calls = 50
    height: Count | None = None
    width: Count | None = None
    frames: Count | None = None
    guidance: Guidance | None = None
    batch: Count = 16


@dataclass(frozen=True, eq=False)
class Trained:
    """What a training gave.

    Args:
        file: ``NAME.safetensors``.
        curve: how it went.
        facts: of what was learned, by name.
    """

    file: Path
    curve: Curve
    facts: Mapping[str, float]


def workplace(
    pipeline: Any,
    model: str,
    data: Data,
    prompts: tuple[str, ...],
    training: Training,
    folder: Path,
    *,
    cpu: bool = False,
    checkpointing: bool = False,
    told: Told = lambda what, done, total: None,
) -> Workplace:
    """Make the data, once, and freeze the model; its pipeline is for nothing else from then on.

    Args:
        pipeline: of pictures from texts or classes, or of videos from texts.
        model: its name, for files.
        data: what to train on.
        prompts: of what the model makes itself; again from the first if there are fewer.
        training: settings.
        folder: of what is written.
        cpu: compute on the processor, also where there is a GPU.
        checkpointing: compute blocks again in the backward pass, rather than keep what they made.
        told: is told how far everything is.

    Raises:
        ValueError: if the model can't be trained for, or there is too little data.
    """
    from accelerate import Accelerator

    denoiser: Any = denoiser_of(pipeline)
    layout = layout_of(denoiser)
    _check(pipeline, denoiser, layout)
    size = size_of(pipeline, layout, data.height, data.width, data.frames)
    steps = Steps.of(pipeline.scheduler, training.sampler_steps)
    listed, made, count = None, [], data.pictures
    if data.folder is not None:
        files = of_folder(Path(data.folder), takes_classes(pipeline), size.frames is not None)
        listed, count = [[str(f), bytes_of(f), caption] for f, caption in files], len(files)
        pictures = opened(files, size.frames)
    else:
        made = [prompts[i % len(prompts)] for i in range(count)]
        pictures = own(pipeline, made, DATA_SEED, data.batch, **data.model_dump(include=_MADE_BY))
    if count < 2:
        raise ValueError(f"--pictures: {count} is not allowed, it must be >= 2: one is held out")
    accelerator = Accelerator(mixed_precision=training.precision, cpu=cpu)
    pipeline.to(accelerator.device)
    key = {"data": data.model_dump(), "denoiser": denoiser_key(denoiser), "prompts": made, "files": listed}
    folder.mkdir(parents=True, exist_ok=True)
    file, whole = folder / "data.safetensors", json.dumps(key, sort_keys=True)
    compute = partial(encoded, pipeline, layout, size, pictures, count, data.batch, told)
    everything = Examples(kept(file, whole, compute)).to(accelerator.device)
    denoiser.requires_grad_(False).eval()
    least = max(count // HELD_OUT, 1)
    return Workplace(
        model=model,
        frozen=Frozen(denoiser, layout, steps, checkpointing),
        examples=everything.part(slice(0, count - least)),
        held_out=everything.part(slice(count - least, count)),
        training=training,
        folder=folder,
        key=key | {"training": training.model_dump(exclude={"steps"})},
        accelerator=accelerator,
        told=told,
    )


def _check(pipeline: Any, denoiser: Any, layout: Layout) -> None:
    """Refuse blocks that return more than tokens, and a pipeline that needs more than the data have."""
    if not layout.block_sites:
        raise ValueError(
            f"model: {type(denoiser).__name__} is not allowed in training, its blocks must take and return "
            "tokens alone, as those of DiT, PixArt, Latte and Wan do"
        )
    name = type(pipeline).__name__
    if "image" in inspect.signature(pipeline.__call__).parameters:
        raise ValueError(f"model: {name} is not allowed in training, it must need no picture to begin with")
    others = other_denoisers(pipeline, denoiser)
    if others:
        raise ValueError(
            f"model: {name} is not allowed in training, it must have one denoiser; this one has "
            f"{', '.join(others)} beside it"
        )
    if pipeline.vae is None:
        raise ValueError(f"model: {name} is not allowed in training, it must have a VAE")


def train_predictor(
    place: Workplace, last_blocks: int = 4, price: float = 1e-4, samples: int = 64, pictures: bool = True
) -> Trained:
    """Train TokenCache's predictor, make its table, and write ``predictor.safetensors``.

    Args:
        place: where.
        last_blocks: K, blocks at the end that are always computed.
        price: lambda, of the mean alpha (the paper: 1e-4).
        samples: that the table is made of.
        pictures: draw the loss and alpha while it runs.

    Raises:
        ValueError: if K leaves no block.
    """
    frozen = place.frozen
    blocks = _check_last(frozen, last_blocks)
    torch.manual_seed(place.training.seed)
    predictor = CachePredictor.of(frozen.denoiser, blocks).eval().requires_grad_(True)
    objective = PredictorObjective(frozen, predictor, last_blocks, price)

    def draw() -> None:
        draw_alpha(objective, place.held_out, place.training.seed, place.folder / "alpha.png")

    key = {"last_blocks": last_blocks, "price": price}
    curve = _train(place, objective, key, pictures, draw)
    with place.accelerator.autocast():
        made = table(objective, place, samples)
    # Halves the size; what it changes in alpha is far below what differs between tokens.
    weights = {f"predictor.{name}": value.half() for name, value in predictor.state_dict().items()}
    weights |= {name: value.float() for name, value in made.items()}
    file = _write(place, "predictor", blocks, weights, key | {"samples": samples})
    return Trained(file, curve, {"mean alpha": float(made["alpha"].mean())})


def train_refinement(
    place: Workplace,
    predictor: str | None = None,
    last_blocks: int = 4,
    ratio: float = 0.9,
    rank: int = 8,
    pictures: bool = True,
) -> Trained:
    """Train the last blocks' low-rank updates, and write ``lora.safetensors``.

    Args:
        place: where.
        predictor: file of the predictor, as `TokenCache` takes it.
        last_blocks: K.
        ratio: r, share of the updates that are not computed.
        rank: of the updates.
        pictures: draw the loss while it runs.

    Raises:
        ValueError: if there is no predictor, or K leaves no block or is 0.
        ImportError: if peft is not installed (extra ``train``).
    """
    frozen = place.frozen
    blocks = _check_last(frozen, last_blocks)
    if last_blocks == 0:
        raise ValueError(
            "last_blocks: 0 is not allowed, it must be >= 1: the last blocks are those that learn"
        )
    learner = CachePredictor.of(frozen.denoiser, blocks).eval().requires_grad_(False)
    alpha_table = Table(np.zeros((PLACES, blocks, LEVELS)), np.zeros(PLACES))
    key: dict[str, Any] = {"last_blocks": last_blocks, "ratio": ratio, "rank": rank, "predictor": predictor}
    if predictor != UNTRAINED:
        found = _predictor(predictor, frozen, blocks)
        load_predictor(learner, found)
        alpha_table = table_of(found)
        key["predictor"] = found.about.digest
    torch.manual_seed(place.training.seed)
    add_adapter(frozen.denoiser, frozen.layout.block_sites[blocks - last_blocks :], rank)
    objective = RefineObjective(frozen, learner, alpha_table, last_blocks, ratio)
    curve = _train(place, objective, key, pictures)
    file = _write(place, "lora", blocks, adapter_state(frozen.denoiser), key)
    return Trained(file, curve, {})


def train_router(
    place: Workplace, price: float = 1e-4, threshold: float = 0.5, pictures: bool = True
) -> Trained:
    """Train Learning-to-Cache's router for ``training.sampler_steps``, and write ``router.safetensors``.

    Args:
        place: where.
        price: lambda, of the sum of beta.
        threshold: a layer is computed where beta is above it.
        pictures: draw the loss while it runs.
    """
    frozen, steps = place.frozen, place.training.sampler_steps
    if steps < 2:
        raise ValueError(
            f"--sampler-steps: {steps} is not allowed, it must be >= 2: every other one is full"
        )
    layers = len(frozen.layout.layer_sites)
    router = Router(steps, layers).to(place.accelerator.device)
    curve = _train(place, RouterObjective(frozen, router, price), {"price": price}, pictures)
    beta = router.table(steps)
    computed = beta > threshold
    settings = {"price": price, "threshold": threshold}
    file = _write(place, "router", layers, {"beta": beta, "table": computed}, settings, steps)
    return Trained(file, curve, {"computed in cached steps": float(computed[1::2].double().mean())})


def _check_last(frozen: Frozen, last_blocks: int) -> int:
    """Count the blocks, and refuse to compute all of them in every call."""
    blocks = len(frozen.layout.block_sites)
    if not 0 <= last_blocks < blocks:
        raise ValueError(f"last_blocks: {last_blocks} is not allowed, it must be >= 0 and < {blocks}")
    return blocks


def _predictor(file: str | None, frozen: Frozen, blocks: int) -> LearnedFile:
    """The predictor of a file, or the one that is bundled with the model."""
    found = bundled_for(frozen.denoiser) if file is None else read_learned(Path(file), "predictor")
    if found is None:
        raise ValueError("predictor: none is bundled for this model; train one: regrow train predictor")
    found.check(frozen.denoiser, blocks)
    return found


def _train(
    place: Workplace,
    objective: Objective,
    key: Mapping[str, Any],
    pictures: bool,
    draw: Callable[[], None] = lambda: None,
) -> Curve:
    """The loop; at checkpoints its loss is drawn, and what else there is."""

    def checkpoint(curve: Curve) -> None:
        if pictures:
            draw_loss(curve, place.folder / "loss.png")
            draw()

    return train(place, objective, key, checkpoint)


def _write(
    place: Workplace,
    kind: Any,
    sites: int,
    tensors: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    steps: int | None = None,
) -> Path:
    """Write what was learned."""
    about = Learned(
        kind=kind,
        model=place.model,
        denoiser=denoiser_key(place.frozen.denoiser),
        sites=sites,
        steps=steps,
        trained=place.training.steps,
        settings={**place.training.model_dump(), **settings},
    )
    file = place.folder / f"{kind}.safetensors"
    write_learned(file, about, tensors)
    return file


def forget(folder: Path) -> None:
    """Remove the checkpoint of a folder, so that a training begins again."""
    (folder / CHECKPOINT).unlink(missing_ok=True)
