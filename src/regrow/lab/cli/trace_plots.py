"""The pictures of ``regrow trace``."""

from __future__ import annotations

import math
import re
import textwrap
from pathlib import Path

import numpy as np

from regrow.lab.measure.trace import PERCENTILES, Difference, Trace, Traced
from regrow.lab.plots import add_grid, legend_below, line_style, new_figure, save

PICTURES = 4
MOST_NAMES = 28


def draw(trace: Trace, prompts: tuple[str, ...], folder: Path) -> list[Path]:
    """Draw what a trace holds; returns the files.

    Args:
        trace: what was seen.
        prompts: of its pictures.
        folder: is there already.
    """
    files = [folder / "deviation.png"]
    draw_deviation(trace, files[0])
    if any(d.timestep for d in trace.differences):
        files.append(folder / "differences.png")
        draw_differences(trace.differences, files[-1])
    mapped = [v for v in trace.variants if v.computed]
    if mapped:
        files.append(folder / "computed.png")
        draw_computed(trace, mapped, prompts, files[-1])
    sited = [v for v in trace.variants if v.sites]
    if sited:
        files.append(folder / "blocks.png")
        draw_blocks(sited, files[-1])
    return files


def draw_deviation(trace: Trace, file: Path) -> None:
    """A line a method: how far x_t and the predicted x_0 are from the unaccelerated run's."""
    panels = ["x_t after each step"] + ([] if trace.x0_unknown else ["predicted x_0"])
    figure = new_figure(4.6 * len(panels), 4.2)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for i, one in enumerate(trace.variants):
        d = one.deviation
        for axis, at, values in ((axes[0], d.after, d.x), (axes[-1], d.timestep, d.x0)):
            if values is not None:
                # A logarithmic axis has no place for 0.
                seen = [value or math.nan for value in values]
                axis.plot(at, seen, marker=".", label=one.name, **line_style(i))
    for axis, title in zip(axes, panels, strict=True):
        axis.set_yscale("log")
        axis.invert_xaxis()
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("timestep")
    add_grid(*axes)
    axes[0].set_ylabel(f"mean absolute error to {trace.baseline}")
    legend_below(figure, 2 * len(panels))
    save(figure, file)


def draw_differences(differences: tuple[Difference, ...], file: Path) -> None:
    """A panel a feature: the spread over tokens of its change from step to step."""
    columns = min(len(differences), 3)
    rows = math.ceil(len(differences) / columns)
    figure = new_figure(3.6 * columns, 2.5 * rows + 0.7)
    axes = figure.subplots(rows, columns, squeeze=False)
    low, lower, middle, upper, high = (f"{p}" for p in PERCENTILES)
    for axis, d in zip(axes.flat, differences, strict=False):
        p5, p25, p50, p75, p95 = zip(*d.percentiles, strict=True)
        outer = axis.fill_between(d.timestep, p5, p95, color="#c6dcec", label=f"{low} to {high} %")
        inner = axis.fill_between(d.timestep, p25, p75, color="#6baed6", label=f"{lower} to {upper} %")
        (line,) = axis.plot(d.timestep, p50, color="#08306b", label=f"median, {middle} %")
        axis.set_title(_broken(d.name, r"\d\.", 32), fontsize=8)
        axis.set_xlabel("timestep")
        axis.invert_xaxis()
        axis.set_ylim(bottom=0)
        add_grid(axis)
    for axis in axes.flat[len(differences) :]:
        axis.set_visible(False)
    figure.supylabel("change of a token since the step before", fontsize=10)
    legend_below(figure, 3, [outer, inner, line])
    save(figure, file)


def draw_computed(trace: Trace, mapped: list[Traced], prompts: tuple[str, ...], file: Path) -> None:
    """Pictures, and beside each how often its tokens were computed at the finest level."""
    rows, columns = min(len(trace.images), PICTURES), 1 + 2 * len(mapped)
    first = trace.images[0]
    height = 1.35 * first.height / first.width
    figure = new_figure(1.35 * columns + 1.6, height * rows + 0.6)
    axes = figure.subplots(rows, columns, squeeze=False)
    for r in range(rows):
        axes[r, 0].imshow(trace.images[r])
        axes[r, 0].set_ylabel("\n".join(textwrap.wrap(prompts[r], 18)), fontsize=8)
        for c, one in enumerate(mapped):
            assert one.computed is not None
            share = one.computed[min(one.computed)]
            axes[r, 1 + 2 * c].imshow(one.images[r])
            shown = axes[r, 2 + 2 * c].imshow(share[:, r].mean(0).numpy(), vmin=0, vmax=1, cmap="viridis")
            if r == 0:
                axes[r, 1 + 2 * c].set_title(_broken(one.name, "[:+]", 16), fontsize=8)
                axes[r, 2 + 2 * c].set_title(f"{float(share.mean()):.0%} computed", fontsize=8)
    axes[0, 0].set_title(trace.baseline, fontsize=8)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    bar = figure.colorbar(shown, ax=axes, shrink=0.8 if rows > 1 else 1.0)
    bar.set_label("share of calls\nand layers", fontsize=8)
    save(figure, file)


def draw_blocks(sited: list[Traced], file: Path) -> None:
    """A panel a method: what share of its tokens each block computed in each call; full calls marked."""
    rows = max(len(one.sites) for one in sited)
    figure = new_figure(7.2, len(sited) * (min(0.24 * rows, 7.0) + 1.1))
    axes = figure.subplots(len(sited), 1, squeeze=False)
    for axis, one in zip(axes[:, 0], sited, strict=True):
        names, shares = list(one.sites), np.array(list(one.sites.values()))
        shown = axis.imshow(shares, vmin=0, vmax=1, cmap="viridis", aspect="auto", interpolation="nearest")
        full = np.flatnonzero((shares == 1).all(0))
        above = axis.get_xaxis_transform()
        axis.plot(full, np.full(len(full), 1.04), "v", color="black", transform=above, clip_on=False)
        every = math.ceil(len(names) / MOST_NAMES)
        axis.set_yticks(range(0, len(names), every), [name.partition(".")[2] for name in names[::every]])
        axis.tick_params(axis="y", labelsize=8)
        axis.set_title(_broken(one.name, "[:+]", 60), fontsize=9, pad=14)
        axis.set_ylabel("block")
    axes[-1, 0].set_xlabel("call; full ones marked")
    figure.colorbar(shown, ax=axes, label="share of tokens computed")
    save(figure, file)


def _broken(name: str, after: str, width: int) -> str:
    """A long name in lines that end after what a pattern finds."""
    parts = re.split(f"(?<={after})", name)
    lines = [""]
    for part in parts:
        if lines[-1] and len(lines[-1] + part) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)
