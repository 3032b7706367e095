"""Plots of a search: its front, the evolution of the front, and the plans on it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from math import nan
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from regrow.lab.plots import COLOURS, add_grid, legend_below, line_style, new_figure, save
from regrow.lab.search.objectives import objective
from regrow.lab.search.proposals import front, hypervolume

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Result = Mapping[str, Any]

WORDS = {
    "quality:deviation": "mean absolute error of the last latents to the unaccelerated run's",
    "quality:psnr": "PSNR to the unaccelerated picture, dB",
    "quality:features": "1 - cosine of EfficientNet features, to the unaccelerated picture",
    "quality:fd": "Fréchet distance of EfficientNet features, to the unaccelerated pictures",
    "quality:clip": "CLIP score",
    "quality:imagereward": "ImageReward",
    "cost:macs": "MACs of the denoiser, share of the unaccelerated run",
    "cost:latency": "time of a generation, share of the unaccelerated run",
    "cost:memory": "peak memory of a generation, MiB",
}
# Names for the inverse of a cost that is a share.
SPEEDS = {"cost:macs": "times fewer MACs", "cost:latency": "speed-up"}
# Qualities whose values span orders of magnitude.
LOGARITHMIC = ("quality:deviation", "quality:features")
# Settings that must be equal in all searches, so that their objectives are comparable.
COMPARABLE = (
    "model",
    "denoiser",
    "scheduler",
    "scheduler_settings",
    "calls",
    "objectives",
    "prompts",
    "seed",
    "guidance",
)
IDLE, MOST = "#e4e4e4", "#08306b"


def draw(result: Result, folder: Path) -> list[Path]:
    """Draw the results of a search; returns the files.

    Args:
        result: result of a search, as plain data.
        folder: an existing folder.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    figures = {"front": draw_front(result)}
    if result["history"]:
        figures |= {"evolution": draw_evolution(result), "hypervolume": draw_hypervolume(result)}
    if result["front"]:
        figures["plans"] = draw_plans(result)
    files = []
    for name, figure in figures.items():
        files.append(folder / f"{name}.png")
        save(figure, files[-1])
    return files


def draw_front(result: Result) -> Figure:
    """Draw quality against cost: tried plans, the front, and what it is compared with."""
    cost, quality = axes_of(result)
    figure = new_figure(7.4, 5.6)
    axis = figure.subplots()
    tried = _points([p for p in result["plans"] if not p["given_up"]], cost, quality)
    given_up = sum(plan["given_up"] for plan in result["plans"])
    label = f"plans tried, {len(tried)}" + (f" ({given_up} more given up)" if given_up else "")
    axis.scatter(*_columns(tried), s=9, color="0.78", linewidths=0, label=label)
    for i, (name, rows) in enumerate(_groups(result["beside"]).items()):
        colour = COLOURS[1 + i % (len(COLOURS) - 1)]
        known = [row for row in rows if _points([row], cost, quality)]
        known.sort(key=lambda row: row["values"][cost])
        xs, ys = _columns(_points(known, cost, quality))
        axis.plot(xs, ys, color=colour, linestyle=":", marker="s", markersize=4, label=name)
        for row, x, y in zip(known, xs, ys, strict=True):
            axis.annotate(
                _settings(row["name"]),
                (x, y),
                xytext=(5, 3),
                textcoords="offset points",
                fontsize=7,
                color=colour,
            )
    found = _points(result["front"], cost, quality)
    # With more than two objectives, not every plan of the front is on the front of these two.
    line = [found[i] for i in front([_less(point[::-1], quality) for point in found])]
    axis.plot(*_columns(line), color=COLOURS[0], linewidth=1.2)
    axis.scatter(*_columns(found), s=16, color=COLOURS[0], zorder=3, label=f"front, {len(found)}")
    _scale(axis, quality, [y for _, y in _points(result["beside"], cost, quality) + tried + found])
    _name_picked(axis, result, cost, quality)
    _name_axes(axis, cost, quality)
    legend_below(figure, 5)
    return figure


def draw_evolution(result: Result) -> Figure:
    """Draw the fronts of five generations; later ones are darker."""
    import matplotlib

    cost, quality = axes_of(result)
    history = result["history"]
    last = len(history) - 1
    chosen = sorted({round(last * quarter / 4) for quarter in range(5)})
    figure = new_figure(7.4, 5.2)
    axis = figure.subplots()
    colours = matplotlib.colormaps["Blues"](np.linspace(0.35, 1, len(chosen)))
    fronts = [_front_of(row["front"], result) for row in (history[i] for i in chosen)]
    for i, points, colour in zip(chosen, fronts, colours, strict=True):
        label = f"generation {history[i]['generation']}, {history[i]['pictures']} pictures"
        style: dict[str, Any] = {"color": colour, "marker": "o", "markersize": 3.5, "linewidth": 1.2}
        axis.plot(*_columns(points), label=label if points else f"{label}: no front yet", **style)
    _scale(axis, quality, [y for points in fronts for _, y in points])
    _name_axes(axis, cost, quality)
    axis.legend(loc="best", frameon=False, fontsize=9)
    return figure


def draw_hypervolume(result: Result) -> Figure:
    """Draw the front's hypervolume against what was spent on it."""
    history = result["history"]
    found = [plan["generation"] for plan in result["plans"]]
    spent = {
        "pictures generated": [row["pictures"] for row in history],
        "plans tried": [sum(g <= row["generation"] for g in found) for row in history],
    }
    volumes = [row["hypervolume"] for row in history]
    figure = new_figure(8.4, 3.8)
    for axis, values in zip(figure.subplots(1, 2, sharey=True), spent.values(), strict=True):
        axis.plot(values, volumes, color=COLOURS[0], marker=".", label="front of the search")
        if result["beside"]:
            axis.axhline(
                result["hypervolume"]["beside"],
                color=COLOURS[1],
                linestyle="--",
                label=f"the {len(result['beside'])} plans it is compared with",
            )
        axis.set_ylim(bottom=0)
    _name_spent(figure, [*spent], result["hypervolume"]["reference"])
    return figure


def _name_spent(figure: Figure, spent: Sequence[str], reference: Sequence[float]) -> None:
    """Label the axes of hypervolumes, a panel for each horizontal axis."""
    for axis, label in zip(figure.axes, spent, strict=True):
        axis.set_xlabel(label)
        axis.set_xlim(left=0)
        add_grid(axis)
    point = ", ".join(f"{value:.3g}" for value in reference)
    figure.axes[0].set_ylabel(f"hypervolume up to ({point})")
    legend_below(figure, 4)


def draw_plans(result: Result) -> Figure:
    """Draw the depth and the pruned share of each call, for each plan of the front; and the recoveries, if
    some plan does not only reuse."""
    from matplotlib.patches import Patch

    plans = result["front"]
    depths = sorted({depth for plan in plans for depth in plan["depth"]}, key=_rank)
    recoveries = [_recoveries(plan) for plan in plans]
    kinds = sorted({name for row in recoveries for name in row if name}, key=lambda n: (n != "reuse", n))
    width = 2 if set(kinds) <= {"reuse"} else 3
    figure = new_figure(5.5 * width, 1.9 + 0.23 * len(plans))
    left, right, *more = figure.subplots(1, width, sharey=True)
    colours = _depth_colours(depths)
    _draw_kinds(left, [plan["depth"] for plan in plans], depths, colours)
    _draw_kinds(right, [plan["depth"] for plan in plans], [0], [IDLE])
    ratio = _filled([[r if d else nan for d, r in zip(p["depth"], p["ratio"], strict=True)] for p in plans])
    shown = right.imshow(ratio, "viridis_r", aspect="auto", vmin=0, vmax=max(0.1, np.nanmax(ratio)))
    left.set_title("depth of each call", fontsize=10)
    right.set_title("share of tokens pruned", fontsize=10)
    left.set_yticks(range(len(plans)), [", ".join([p["name"], *p["picked"]]) for p in plans], fontsize=8)
    for axis in more:
        shades = [line_style(i)["color"] for i in range(len(kinds))]
        _draw_kinds(axis, recoveries, kinds, shades)
        axis.set_title("recovery of what is not computed", fontsize=10)
        rows = [Patch(facecolor=c, label=name) for c, name in zip(shades, kinds, strict=True)]
        axis.legend(handles=rows, loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=9)
        axis.tick_params(axis="y", length=0)
    for axis in (left, right, *more):
        axis.set_xlabel("call")
        axis.set_yticks(np.arange(len(plans) + 1) - 0.5, minor=True)
        axis.grid(which="minor", axis="y", color="white", linewidth=2)
        axis.tick_params(which="minor", length=0)
        axis.spines[:].set_visible(False)
    right.tick_params(axis="y", length=0)
    height = figure.get_size_inches()[1]
    figure.colorbar(shown, ax=right, pad=0.02, shrink=min(1, 4 / height), anchor=(0, 1))
    rows = [Patch(facecolor=c, label=_depth_label(d)) for d, c in zip(depths, colours, strict=True)]
    legend_below(figure, 7, rows)
    return figure


def _recoveries(plan: Mapping[str, Any]) -> list[str]:
    """List the recovery of each call, "" if it has none; older results have no recoveries."""
    names = plan.get("recovery", ["reuse"] * len(plan["depth"]))
    return ["" if depth == "full" else name for depth, name in zip(plan["depth"], names, strict=True)]


def _draw_kinds(
    axis: Axes, rows: Sequence[Sequence[Any]], kinds: Sequence[Any], colours: list[str]
) -> None:
    """Draw a row of cells for each plan, with a colour for each kind; other cells are empty."""
    from matplotlib.colors import ListedColormap

    shown = _filled([[kinds.index(one) if one in kinds else nan for one in row] for row in rows])
    axis.imshow(shown, ListedColormap(colours), aspect="auto", vmin=-0.5, vmax=len(kinds) - 0.5)


def _filled(rows: Sequence[Sequence[float]]) -> np.ndarray:
    """Fill rows with empty cells to the length of the longest."""
    most = max(map(len, rows))
    return np.array([[*row, *(nan,) * (most - len(row))] for row in rows])


def compare(results: Mapping[str, Result], folder: Path) -> Path:
    """Draw how fast several searches find their fronts; returns the file.

    The reference point of the hypervolume is the worst of all their fronts.

    Args:
        results: results by the names of searches, which are the labels.
        folder: an existing folder.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if no search has a front, or they don't measure the same.
    """
    file = folder / "compare.png"
    save(draw_comparison(results), file)
    return file


def draw_comparison(results: Mapping[str, Result]) -> Figure:
    """Draw the hypervolumes of several searches up to one point, against pictures and time."""
    volumes, reference = common_hypervolumes(results)
    spent = {"pictures": "pictures generated", "seconds": "seconds"}
    figure = new_figure(8.4, 4)
    for axis, name in zip(figure.subplots(1, 2, sharey=True), spent, strict=True):
        for i, (search, values) in enumerate(volumes.items()):
            x = [row[name] for row in results[search]["history"]]
            axis.plot(x, values, marker=".", label=search, **line_style(i))
    _name_spent(figure, [*spent.values()], reference)
    return figure


def common_hypervolumes(
    results: Mapping[str, Result],
) -> tuple[dict[str, list[float]], tuple[float, ...]]:
    """Compute the hypervolume of each generation of each search, and their common reference point.

    Raises:
        ValueError: if no search has a front, or they don't measure the same.
    """
    for name in COMPARABLE:
        values = {search: result[name] for search, result in results.items()}
        if any(value != next(iter(values.values())) for value in values.values()):
            found = ", ".join(f"{value!r} ({search})" for search, value in values.items())
            raise ValueError(f"{name}: {found} is not allowed, it must be the same in all searches")
    rows = [row for result in results.values() for h in result["history"] for row in h["front"]]
    if not rows:
        raise ValueError(f"results: {list(results)} is not allowed, at least one search must have a front")
    reference = tuple(max(column) for column in zip(*rows, strict=True))
    volumes = {
        search: [hypervolume(h["front"], reference) for h in result["history"]]
        for search, result in results.items()
    }
    return volumes, reference


def axes_of(result: Result) -> tuple[str, str]:
    """Find the first cost and the first quality of a search."""
    names = result["objectives"]
    return (
        next(name for name in names if name.startswith("cost:")),
        next(name for name in names if name.startswith("quality:")),
    )


Points = list[tuple[float, float]]


def _points(rows: Sequence[Mapping[str, Any]], cost: str, quality: str) -> Points:
    """List cost and quality of the rows that have both."""
    pairs = [(row["values"][cost], row["values"][quality]) for row in rows]
    return [(x, y) for x, y in pairs if x is not None and y is not None]


def _columns(points: Points) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _groups(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Group rows by method without settings: ``deepcache`` of ``deepcache:3``, or ``deepcache+tome``."""
    out: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        out.setdefault(re.sub(r":[^+]*", "", row["name"]), []).append(row)
    return out


def _settings(name: str) -> str:
    """Read the settings in a name, which `_groups` leaves out."""
    return "+".join(part.partition(":")[2] for part in name.split("+"))


def _less(values: Sequence[float], quality: str) -> tuple[float, float]:
    """Change the sign of quality if higher is better; applied twice, it changes nothing."""
    value, cost = values
    return (-value if objective(quality).higher_is_better else value), cost


def _front_of(rows: Sequence[Sequence[float]], result: Result) -> Points:
    """List cost and quality of the front of these two objectives, from minimised values."""
    cost, quality = axes_of(result)
    names = result["objectives"]
    pairs = [(row[names.index(quality)], row[names.index(cost)]) for row in rows]
    return [_less(pairs[i], quality)[::-1] for i in front(pairs)]


def _scale(axis: Axes, quality: str, values: Sequence[float]) -> None:
    """Make the quality axis logarithmic where that suits; it also shows 0, for a run that changes
    nothing."""
    above = [value for value in values if value > 0]
    if quality not in LOGARITHMIC or not above:
        return
    if len(above) == len(values):
        axis.set_yscale("log")
    else:
        least = 10 ** math.floor(math.log10(min(above)))
        axis.set_yscale("symlog", linthresh=least, linscale=0.4)
        axis.set_ylim(bottom=-least / 5)


def _name_picked(axis: Axes, result: Result, cost: str, quality: str) -> None:
    """Write the names of the picked plans on the empty side of the front."""
    up = objective(quality).higher_is_better
    for plan in result["front"]:
        if plan["picked"]:
            axis.annotate(
                "\n".join([plan["name"], ", ".join(plan["picked"])]),
                (plan["values"][cost], plan["values"][quality]),
                xytext=(-5, 5 if up else -5),
                textcoords="offset points",
                ha="right",
                va="bottom" if up else "top",
                fontsize=8,
            )


def _name_axes(axis: Axes, cost: str, quality: str) -> None:
    """Label the axes; a cost that is a share has its inverse on top."""
    better = "more" if objective(quality).higher_is_better else "less"
    axis.set_xlabel(WORDS[cost])
    axis.set_ylabel(f"{WORDS[quality]}\n({better} is better)", fontsize=9)
    add_grid(axis)
    if cost not in SPEEDS:
        return
    axis.set_xlim(left=0)
    width = axis.get_xlim()[1]
    speeds = [1.0]
    for speed in (1.25, 1.5, 2, 3, 4, 5, 7, 10, 15, 20, 50):
        if min(1 / speeds[-1] - 1 / speed, 1 / speed) > 0.045 * width:
            speeds.append(speed)
    top = axis.secondary_xaxis("top")
    top.set_xticks([1 / s for s in speeds], [f"{s:g}x" for s in speeds])
    top.set_xlabel(SPEEDS[cost])


def _rank(depth: int | str) -> tuple[int, int]:
    """Sort depths, deepest first: ``full``, ``sites``, ``layers``, numbers, ``head``, 0."""
    if isinstance(depth, str):
        return {"full": 0, "sites": 1, "layers": 2, "head": 4}[depth], 0
    return (3, -depth) if depth else (5, 0)


def _depth_colours(depths: Sequence[int | str]) -> list[str]:
    """Choose colours: deeper is darker; layers are orange, sites green, heads pink, nothing grey."""
    import matplotlib
    from matplotlib.colors import to_hex

    fixed: dict[int | str, str] = {0: IDLE, "full": MOST}
    fixed |= {"sites": "#009e73", "layers": "#e69f00", "head": "#cc79a7"}
    numbers = [depth for depth in depths if depth not in fixed]
    shades = matplotlib.colormaps["Blues"]
    between = {d: to_hex(shades(0.7 - 0.45 * i / len(numbers))) for i, d in enumerate(numbers)}
    return [(fixed | between)[depth] for depth in depths]


def _depth_label(depth: int | str) -> str:
    words = {"sites": "some sites", "layers": "layers reused", 0: "0, nothing computed"}
    return words.get(depth, str(depth))
