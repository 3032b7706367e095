"""The training loop: AdamW on what is learned, checkpoints that it goes on from, and its curve.

What step number i draws follows from the seed and i alone. So a run that was killed goes on with the very
numbers that it would have had.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor

from regrow.fields import Calls, Checked, Count, Seed, Share
from regrow.files import damaged, parse_json, said
from regrow.lab.measure.atomic_files import opened_kept, write_whole
from regrow.lab.train.examples import Examples
from regrow.lab.train.objective import Objective
from regrow.lab.train.steps import Steps

CHECKPOINT = "checkpoint.safetensors"
HELD_OUT_SEED = 1 << 40
"""Seed of what held-out batches draw, which no step of training has."""

Positive = Annotated[float, Field(gt=0, le=1e3, allow_inf_nan=False)]


class Training(Checked):
    """Settings of a training.

    Args:
        steps: of the optimiser (the paper: 40,000).
        lr: its learning rate (the paper: 1e-5).
        batch: examples a step.
        seed: of everything that is drawn.
        drop: share of the examples that lose their condition.
        precision: of what is computed; weights that learn are kept in float32.
        every: steps between checkpoints, and between looks at the held-out examples.
        sampler_steps: S; the two steps that are compared are neighbours among so many.
        held_out: batches that nothing is learned from.
    """

    steps: Count = 40_000
    lr: Positive = 1e-5
    batch: Count = 8
    seed: Seed = 0
    drop: Share = 0.1
    precision: Literal["no", "bf16", "fp16"] = "no"
    every: Count = 100
    sampler_steps: Calls = 50
    held_out: Count = 4


@dataclass(frozen=True)
class Point:
    """What a step of training gave.

    Args:
        step: its number, from 1.
        error: see `regrow.lab.train.objective.Losses`.
        cost: likewise.
    """

    step: int
    error: float
    cost: float

    @property
    def loss(self) -> float:
        return self.error + self.cost


@dataclass
class Curve:
    """How a training went.

    Args:
        train: each step.
        held_out: the mean of the held-out batches at checkpoints, that of the beginning first.
    """

    train: list[Point] = field(default_factory=list)
    held_out: list[Point] = field(default_factory=list)

    def rows(self) -> dict[str, list[list[float]]]:
        """As plain data."""
        return {
            name: [[p.step, p.error, p.cost] for p in points]
            for name, points in (("train", self.train), ("held_out", self.held_out))
        }

    @classmethod
    def of(cls, rows: Mapping[str, Sequence[Sequence[float]]]) -> Curve:
        """From `rows`."""
        return cls(
            *([Point(int(step), e, c) for step, e, c in rows[name]] for name in ("train", "held_out"))
        )


def generator_of(seed: int, step: int) -> torch.Generator:
    """What a step draws from."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % (1 << 63))


def train(
    objective: Objective,
    examples: Examples,
    held_out: Examples,
    steps: Steps,
    training: Training,
    folder: Path,
    key: Mapping[str, Any],
    accelerator: Any,
    on_step: Callable[[Curve], None] = lambda curve: None,
    on_checkpoint: Callable[[Curve], None] = lambda curve: None,
) -> Curve:
    """Train, from the last checkpoint of the folder if there is one.

    Args:
        objective: what is learned.
        examples: to learn from.
        held_out: that nothing is learned from.
        steps: of the sampler.
        training: settings.
        folder: of the checkpoint.
        key: all that the numbers depend on, but for the number of steps.
        accelerator: of the accelerate library: device and precision.
        on_step: is told each step.
        on_checkpoint: is told each checkpoint.

    Raises:
        ValueError: if the folder's checkpoint is of another training.
    """
    names, parameters = zip(*objective.weights.items(), strict=True)
    optimizer: Any = accelerator.prepare(torch.optim.AdamW(parameters, lr=training.lr, betas=(0.9, 0.999)))
    file = folder / CHECKPOINT
    curve = Curve()
    if file.exists():
        curve = _restore(file, key, names, parameters, optimizer, accelerator)

    def losses(data: Examples, seed: int, drop: float) -> Any:
        generator = generator_of(training.seed, seed)
        batch = data.batch(steps, objective.earlier, training.batch, drop, generator)
        with accelerator.autocast():
            return objective.losses(batch)

    def look(step: int) -> None:
        with torch.no_grad():
            found = [losses(held_out, HELD_OUT_SEED + i, 0.0) for i in range(training.held_out)]
        mean = [sum(float(getattr(one, part)) for one in found) / len(found) for part in ("error", "cost")]
        curve.held_out.append(Point(step, *mean))

    if not curve.held_out:
        look(0)
    for step in range(len(curve.train) + 1, training.steps + 1):
        found = losses(examples, step, training.drop)
        optimizer.zero_grad()
        accelerator.backward(found.error + found.cost)
        optimizer.step()
        point = Point(step, float(found.error.detach()), float(found.cost.detach()))
        if not torch.isfinite(torch.tensor(point.loss)):
            raise ValueError(f"--lr: {training.lr:g} is too large, the loss is no number in step {step}")
        curve.train.append(point)
        if step % training.every == 0 or step == training.steps:
            look(step)
            _keep(file, key, names, parameters, optimizer, accelerator, curve)
            on_checkpoint(curve)
        on_step(curve)
    return curve


def _keep(
    file: Path,
    key: Mapping[str, Any],
    names: Sequence[str],
    parameters: Sequence[Tensor],
    optimizer: Any,
    accelerator: Any,
    curve: Curve,
) -> None:
    """Write a checkpoint, whole or not at all: tensors, and the rest as JSON in its header."""
    tensors = {
        f"weights.{n}": p.detach().cpu().contiguous() for n, p in zip(names, parameters, strict=True)
    }
    for number, state in optimizer.state_dict()["state"].items():
        tensors |= {f"adam.{number}.{k}": v.detach().cpu().contiguous() for k, v in state.items()}
    scaler = None if accelerator.scaler is None else accelerator.scaler.state_dict()
    about = json.dumps({"key": dict(key), "curve": curve.rows(), "scaler": scaler})
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, partial(save_file, tensors, metadata={"about": about}))


def _restore(
    file: Path,
    key: Mapping[str, Any],
    names: Sequence[str],
    parameters: Sequence[Tensor],
    optimizer: Any,
    accelerator: Any,
) -> Curve:
    """Go back to a checkpoint."""
    instead = "give another --out, or --anew to begin again"
    with opened_kept(file, instead) as opened:
        about = parse_json((opened.metadata() or {}).get("about", "{}"), said(file))
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    if not {"key", "curve", "scaler"} <= set(about):
        raise damaged(file, instead)
    if about["key"] != json.loads(json.dumps(dict(key))):
        others = [name for name in key if about["key"].get(name) != json.loads(json.dumps(key[name]))]
        raise ValueError(f"--out: {said(file)} is of a training with other {', '.join(others)}; {instead}")
    with torch.no_grad():
        for name, parameter in zip(names, parameters, strict=True):
            parameter.copy_(tensors[f"weights.{name}"])
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("adam."):
            _, number, part = name.split(".")
            state.setdefault(int(number), {})[part] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    if accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(about["scaler"])
    return Curve.of(about["curve"])
