"""Pictures of a training while it runs: its loss, and alpha over the tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from regrow.measure.plotting import COLOURS, check_matplotlib, save
from regrow.train.examples import Examples
from regrow.train.loop import Curve, generator_of
from regrow.train.predictor import PredictorObjective, alpha_at

BINS, SHOWN = 10, 2
"""Places in a run, and samples, in a picture of alpha."""
SMOOTH = 50
"""Steps that a point of the drawn loss is the mean of."""


def draw_loss(curve: Curve, file: Path) -> None:
    """The loss of each step, smoothed, and that of held-out examples."""
    check_matplotlib()
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    losses = np.array([point.loss for point in curve.train])
    width = min(SMOOTH, len(losses))
    smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
    axes.plot(np.arange(len(smooth)) + width, smooth, color=COLOURS[5], label=f"training, mean of {width}")
    held = curve.held_out
    axes.plot(
        [p.step for p in held], [p.loss for p in held], color=COLOURS[1], marker="o", label="held out"
    )
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.legend()
    save(figure, file)


def draw_alpha(objective: PredictorObjective, examples: Examples, seed: int, file: Path) -> None:
    """alpha of a few samples: a row for a block, a column for a part of the run, white where it is 1."""
    check_matplotlib()
    import matplotlib.pyplot as plt

    maps = _maps(objective, examples, seed)
    samples, bins, tokens, blocks = maps.shape
    side = round(tokens**0.5)
    form = (side, side) if side * side == tokens else (1, tokens)
    figure, axes = plt.subplots(
        blocks, samples * bins, figsize=(0.7 * samples * bins, 0.75 * blocks + 0.4), squeeze=False
    )
    for row, block in enumerate(axes):
        for column, one in enumerate(block):
            sample, part = divmod(column, bins)
            one.imshow(maps[sample, part, :, row].reshape(form), vmin=0, vmax=1, cmap="gray")
            one.set(xticks=[], yticks=[])
            if row == 0:
                one.set_title(f"{part / bins:.0%}", fontsize=7)
        block[0].set_ylabel(f"block {row}", fontsize=7)
    save(figure, file)


@torch.no_grad()
def _maps(objective: PredictorObjective, examples: Examples, seed: int) -> Tensor:
    """alpha ``(samples, bins, N, L)``."""
    size = min(SHOWN, len(examples))
    generator = generator_of(seed, 0)
    noise = torch.randn((size, *examples.latents.shape[1:]), generator=generator)
    steps, found = objective.frozen.steps, []
    for part in range(BINS):
        index = torch.full((size,), int((part + 0.5) / BINS * len(steps)))
        batch = examples.at(steps, torch.arange(size), index, noise, torch.zeros(size, dtype=torch.bool))
        found.append(alpha_at(objective, batch).float().cpu())
    return torch.stack(found, dim=1)
