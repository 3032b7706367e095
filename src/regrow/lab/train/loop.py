"""The training loop: AdamW on what is learned, checkpoints to continue from, and its curve.

What step number i draws follows from the seed and i alone. So a run that was killed and is continued has
the same numbers as one that was not.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor

from regrow.fields import Calls, Checked, Count, Seed, Share
from regrow.files import damaged, parse_json, said
from regrow.lab.measure.atomic_files import opened_kept, write_whole
from regrow.lab.train.examples import Examples, Told
from regrow.lab.train.frozen import Frozen
from regrow.lab.train.objective import Losses, Objective

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


class Point(NamedTuple):
    """What a step of training gave.

    Args:
        step: its number, from 1.
        error: see `regrow.lab.train.objective.Losses`.
        cost: as error.
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
        return {name: [list(point) for point in points] for name, points in vars(self).items()}

    @classmethod
    def of(cls, rows: Mapping[str, Sequence[Any]]) -> Curve:
        """From `rows`."""
        return cls(**{name: [Point(*row) for row in points] for name, points in rows.items()})


def generator_of(seed: int, step: int) -> torch.Generator:
    """What a step draws from."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % (1 << 63))


@dataclass(frozen=True, eq=False)
class Workplace:
    """A frozen model with what it is trained on.

    Args:
        model: its name, for files.
        frozen: the model.
        examples: to learn from.
        held_out: that nothing is learned from.
        training: settings.
        folder: of what is written.
        key: all that numbers depend on so far, but for the number of steps.
        accelerator: of the accelerate library: device and precision.
        told: is told how far everything is.
    """

    model: str
    frozen: Frozen
    examples: Examples
    held_out: Examples
    training: Training
    folder: Path
    key: Mapping[str, Any]
    accelerator: Any
    told: Told


def train(
    place: Workplace, objective: Objective, key: Mapping[str, Any], on_checkpoint: Callable[[Curve], None]
) -> Curve:
    """Train, from the last checkpoint of the folder if there is one; the curve is kept in ``loss.json``.

    Args:
        place: where.
        objective: what is learned.
        key: all that the numbers depend on beside the place's.
        on_checkpoint: is told each checkpoint.

    Raises:
        ValueError: if the folder's checkpoint is of another training.
    """
    training, accelerator = place.training, place.accelerator
    adam: Any = torch.optim.AdamW(objective.weights.values(), lr=training.lr, betas=(0.9, 0.999))
    optimizer = accelerator.prepare(adam)
    kept = _Checkpoint(
        place.folder / CHECKPOINT, {**place.key, **key}, objective.weights, optimizer, accelerator.scaler
    )
    curve = kept.restore() if kept.file.exists() else Curve()

    def losses(data: Examples, seed: int, drop: float) -> Losses:
        generator = generator_of(training.seed, seed)
        batch = data.batch(place.frozen.steps, objective.earlier, training.batch, drop, generator)
        with accelerator.autocast():
            return objective.losses(batch)

    def look(step: int) -> None:
        with torch.no_grad():
            found = [losses(place.held_out, HELD_OUT_SEED + i, 0.0) for i in range(training.held_out)]
        mean = [sum(float(getattr(one, part)) for one in found) / len(found) for part in ("error", "cost")]
        curve.held_out.append(Point(step, *mean))

    if not curve.held_out:
        look(0)
    for step in range(len(curve.train) + 1, training.steps + 1):
        found = losses(place.examples, step, training.drop)
        optimizer.zero_grad()
        accelerator.backward(found.error + found.cost)
        optimizer.step()
        point = Point(step, float(found.error.detach()), float(found.cost.detach()))
        if not isfinite(point.loss):
            raise ValueError(f"--lr: {training.lr:g} is too large, the loss is no number in step {step}")
        curve.train.append(point)
        if step % training.every == 0 or step == training.steps:
            look(step)
            kept.write(curve)
            text = json.dumps(curve.rows()) + "\n"
            write_whole(place.folder / "loss.json", partial(Path.write_text, data=text, encoding="utf-8"))
            on_checkpoint(curve)
        state = f"loss {point.loss:.3g}, held out {curve.held_out[-1].loss:.3g}"
        place.told(state, step, training.steps)
    return curve


@dataclass(frozen=True, eq=False)
class _Checkpoint:
    """A state of training in a file: tensors, and the rest as JSON in its header.

    Args:
        file: ``.safetensors``.
        key: all that the numbers depend on.
        weights: what is learned, by name.
        optimizer: of them, in their order.
        scaler: of gradients in half precision; None where there is none.
    """

    file: Path
    key: Mapping[str, Any]
    weights: Mapping[str, Tensor]
    optimizer: Any
    scaler: Any

    def write(self, curve: Curve) -> None:
        """Write it, whole or not at all."""
        tensors = {f"weights.{name}": weight for name, weight in self.weights.items()}
        for number, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{number}.{name}": value for name, value in state.items()}
        tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        scaler = None if self.scaler is None else self.scaler.state_dict()
        about = json.dumps({"key": dict(self.key), "curve": curve.rows(), "scaler": scaler})
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.file, partial(save_file, tensors, metadata={"about": about}))

    @torch.no_grad()
    def restore(self) -> Curve:
        """Go back to it.

        Raises:
            ValueError: if it is of another training.
            FileError: if it is damaged.
        """
        hint = "give another --out, or --anew to begin again"
        with opened_kept(self.file, hint) as opened:
            about = parse_json((opened.metadata() or {}).get("about", "{}"), said(self.file))
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        if not {"key", "curve", "scaler"} <= set(about):
            raise damaged(self.file, hint)
        key = json.loads(json.dumps(dict(self.key)))
        if about["key"] != key:
            others = ", ".join(name for name in key if about["key"].get(name) != key[name])
            raise ValueError(f"--out: {said(self.file)} is of a training with other {others}; {hint}")
        for name, weight in self.weights.items():
            weight.copy_(tensors[f"weights.{name}"])
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("adam."):
                _, number, part = name.split(".")
                state.setdefault(int(number), {})[part] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        if self.scaler is not None:
            self.scaler.load_state_dict(about["scaler"])
        return Curve.of(about["curve"])
