"""Draw a training while it runs: its loss, and alpha over the tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from regrow.lab.plots import COLOURS, new_figure, save
from regrow.lab.train.examples import Examples
from regrow.lab.train.loop import Curve, generator_of
from regrow.lab.train.predictor import PredictorObjective, alpha_at
from regrow.models.table import Layout
from regrow.tokens.grid import Grid

BINS, SHOWN = 10, 2
"""Places in a run, and samples, in a picture of alpha."""
SMOOTH = 50
"""Steps that a point of the drawn loss is the mean of."""


def draw_loss(curve: Curve, file: Path) -> None:
    """The loss of each step, smoothed, and that of held-out examples."""
    figure = new_figure(6, 3.6)
    axes = figure.subplots()
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
    """alpha of a few samples: a row for a block, a column for a part of the run, white where it is 1.

    Of a video it is the mean over the frames.
    """
    maps = _maps(objective, examples, seed)
    samples, bins, rows, columns, blocks = maps.shape
    # One picture of all maps, with a line between them: an axis for each would take seconds.
    cells = pad(maps.permute(4, 0, 1, 2, 3).reshape(blocks, samples * bins, rows, columns), (0, 1, 0, 1))
    sheet = cells.transpose(1, 2).reshape(blocks * (rows + 1), -1).numpy()
    figure = new_figure(0.5 * samples * bins, 0.55 * blocks + 0.8)
    axes = figure.subplots()
    axes.imshow(sheet, vmin=0, vmax=1, cmap="gray", aspect="auto")
    axes.set_yticks([(rows + 1) * (i + 0.5) for i in range(blocks)], [str(i) for i in range(blocks)])
    axes.set_xticks(
        [(columns + 1) * (i + 0.5) for i in range(samples * bins)],
        [f"{part / bins:.0%}" for _ in range(samples) for part in range(bins)],
    )
    axes.set(xlabel=f"part of the run, {samples} samples", ylabel="block")
    save(figure, file)


def _grid(layout: Layout, latents: Tensor) -> Grid:
    """The tokens of a picture, or of a frame."""
    grid = layout.frame(latents)
    if grid is None and layout.stream is not None:
        grid = layout.stream.grid(latents, {})
    assert grid is not None
    return grid


def _maps(objective: PredictorObjective, examples: Examples, seed: int) -> Tensor:
    """alpha ``(samples, bins, rows, columns, L)``."""
    which = torch.arange(min(SHOWN, len(examples)))
    noise, found = examples.noise(len(which), generator_of(seed, 0)), []
    grid = _grid(objective.frozen.layout, examples.latents)
    for part in range(BINS):
        alpha = alpha_at(objective, examples, which, noise, (part + 0.5) / BINS).float().cpu()
        found.append(alpha.unflatten(1, (-1, grid.height, grid.width)).mean(1))
    return torch.stack(found, dim=1)
