"""The plots of a search show its numbers, all of them and nothing else."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import found
import numpy as np
import pytest
from PIL import Image

from regrow.lab import plots as shared
from regrow.lab.search import plots


def texts(axis: Any) -> list[str]:
    return [text.get_text() for text in axis.texts]


def legend(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def area(rows: list[list[float]], reference: tuple[float, ...]) -> float:
    """What two objectives dominate, strip by strip between neighbouring costs."""
    edges = sorted({c for _, c in rows} | {reference[1]})
    out = 0.0
    for low, high in itertools.pairwise(edges):
        best = min(q for q, c in rows if c <= low)
        out += (high - low) * max(reference[0] - best, 0)
    return out


def test_the_front_is_drawn_among_all_plans_that_were_not_given_up() -> None:
    result = found.result()
    figure = plots.draw_front(result)
    axis = figure.axes[0]
    tried, front = (np.asarray(c.get_offsets()) for c in axis.collections)
    finished = [p["values"] for p in result["plans"] if not p["given_up"]]
    assert 0 < len(finished) < len(result["plans"])
    assert tried.tolist() == [[v["cost:macs"], v["quality:deviation"]] for v in finished]
    values = [p["values"] for p in result["front"]]
    assert front.tolist() == [[v["cost:macs"], v["quality:deviation"]] for v in values]
    assert axis.lines[-1].get_xydata().tolist() == front.tolist()
    assert legend(figure)[0] == f"plans tried, {len(finished)} (2 more given up)"
    assert legend(figure)[-1] == f"front, {len(values)}"


def test_axes_say_what_they_are_and_which_way_is_better() -> None:
    axis = plots.draw_front(found.result()).axes[0]
    assert axis.get_xlabel() == "MACs of the denoiser, share of the unaccelerated run"
    assert "mean absolute error" in axis.get_ylabel()
    assert "(less is better)" in axis.get_ylabel()
    top = axis.child_axes[0]
    assert top.get_xlabel() == "times fewer MACs"
    ticks = {label.get_text(): x for x, label in zip(top.get_xticks(), top.get_xticklabels(), strict=True)}
    assert {"1x", "2x", "4x"} <= set(ticks)
    assert all(x == pytest.approx(1 / float(text[:-1])) for text, x in ticks.items())


def test_picked_plans_are_named_and_methods_are_one_curve_each() -> None:
    result = found.result()
    result["beside"].append(
        {"name": "deepcache:5+tome:0.5", "values": {"quality:deviation": 0.2, "cost:macs": 0.3}}
    )
    figure = plots.draw_front(result)
    axis = figure.axes[0]
    picked = [f"{p['name']}\n{', '.join(p['picked'])}" for p in result["front"] if p["picked"]]
    assert texts(axis) == ["12", "5", "2", "b1", "5+0.5", *picked]
    assert legend(figure)[1:-1] == ["steps", "deepcache", "dato", "deepcache+tome"]
    curves = {line.get_label(): line.get_xydata().tolist() for line in axis.lines}
    assert curves["deepcache"] == [[0.33, 0.09], [0.6, 0.04]]


def test_a_plan_that_changes_nothing_has_a_place_on_the_logarithmic_axis() -> None:
    result = found.result()
    assert result["front"][0]["values"]["quality:deviation"] == 0
    assert plots.draw_front(result).axes[0].get_yscale() == "symlog"
    for rows in (result["plans"], result["front"], result["beside"]):
        rows[0]["values"]["quality:deviation"] = 0.001
    assert plots.draw_front(result).axes[0].get_yscale() == "log"


def test_a_quality_of_which_more_is_better_is_shown_as_it_is() -> None:
    result = found.result()
    result["objectives"] = ["quality:psnr", "cost:memory"]
    values = [(30.0, 300.0), (20.0, 100.0), (19.0, 200.0)]
    for rows in (result["plans"], result["front"], result["beside"]):
        rows[3:] = []
        for row, (q, c) in zip(rows, values, strict=True):
            row["values"], row["given_up"] = {"quality:psnr": q, "cost:memory": c}, False
    for row in result["history"]:
        row["front"] = [[-q, c] for q, c in values]
    axis = plots.draw_front(result).axes[0]
    assert axis.get_yscale() == "linear"
    assert axis.get_ylabel() == "PSNR to the unaccelerated picture, dB\n(more is better)"
    assert not axis.child_axes, "MiB have no inverse"
    assert axis.lines[-1].get_xydata().tolist() == [[300, 30], [100, 20]], "the third is dominated"
    evolution = plots.draw_evolution(result).axes[0]
    assert evolution.lines[0].get_xydata().tolist() == [[300, 30], [100, 20]]


def test_evolution_shows_five_generations_and_the_last_is_the_front() -> None:
    result = found.result(generations=9, population=3)
    result["history"][0]["front"] = []
    axis = plots.draw_evolution(result).axes[0]
    labels = [line.get_label() for line in axis.lines]
    pictures = [12 * (g + 1) for g in (0, 2, 4, 6, 8)]
    assert labels[0] == "generation 0, 12 pictures: no front yet"
    assert labels[1:] == [f"generation {g}, {pictures[g // 2]} pictures" for g in (2, 4, 6, 8)]
    values = [p["values"] for p in result["front"]]
    last = [[v["cost:macs"], v["quality:deviation"]] for v in values]
    assert axis.lines[-1].get_xydata().tolist() == last
    darkness = [sum(line.get_color()[:3]) for line in axis.lines]
    assert darkness == sorted(darkness, reverse=True)
    assert len(plots.draw_evolution(found.result(generations=2)).axes[0].lines) == 2


def test_hypervolume_is_drawn_against_pictures_and_plans() -> None:
    result = found.result(generations=4, population=6)
    figure = plots.draw_hypervolume(result)
    volumes = [row["hypervolume"] for row in result["history"]]
    for axis, label, spent in zip(
        figure.axes, ("pictures generated", "plans tried"), ([24, 48, 72, 96], [6, 12, 18, 24]), strict=True
    ):
        assert axis.get_xlabel() == label
        assert axis.lines[0].get_xydata().tolist() == [list(p) for p in zip(spent, volumes, strict=True)]
        assert axis.lines[1].get_ydata() == [0.2, 0.2]
    assert figure.axes[0].get_ylabel() == "hypervolume up to (0.4, 1)"
    assert legend(figure)[1] == "the 4 plans it is compared with"
    result["beside"] = []
    assert [len(axis.lines) for axis in plots.draw_hypervolume(result).axes] == [1, 1]


def test_calls_of_sites_have_a_colour_of_their_own() -> None:
    result = found.result()
    result["front"][0]["depth"][1] = "sites"
    assert "some sites" in legend(plots.draw_plans(result))


def test_plans_are_rows_of_depths_and_ratios() -> None:
    result = found.result()
    result["front"] = [
        {
            "name": "plan-00",
            "picked": ["quality"],
            "depth": ["full", 2, "layers", 0],
            "ratio": [0.1, 0.5, 0, 0.3],
        },
        {"name": "plan-01", "picked": [], "depth": ["full", 10, 0], "ratio": [0.2, 0.4, 0.7]},
    ]
    figure = plots.draw_plans(result)
    left, right = figure.axes[:2]
    labels = ["full", "layers reused", "10", "2", "0, nothing computed"]
    assert legend(figure) == labels
    depth = left.images[0].get_array().filled(np.nan)
    np.testing.assert_array_equal(depth, [[0, 3, 1, 4], [0, 2, 4, np.nan]])
    colours = [patch.get_facecolor() for patch in figure.legends[0].get_patches()]
    assert len(set(colours)) == 5
    painted = left.images[0].to_rgba(depth, norm=True)
    np.testing.assert_allclose(painted[0, 1], colours[3], atol=1e-6)
    idle, ratio = (image.get_array().filled(np.nan) for image in right.images)
    np.testing.assert_array_equal(ratio, [[0.1, 0.5, 0, np.nan], [0.2, 0.4, np.nan, np.nan]])
    np.testing.assert_array_equal(np.isfinite(idle), [[0, 0, 0, 1], [0, 0, 1, 0]])
    assert [label.get_text() for label in left.get_yticklabels()] == ["plan-00, quality", "plan-01"]


def test_recoveries_are_shown_where_some_call_forecasts() -> None:
    result = found.result()
    names = ["reuse", "taylor", "taylor", "taylor2"]
    result["front"] = [
        {"name": "a", "picked": [], "depth": ["full", 0, "head", 1], "ratio": [0] * 4, "recovery": names},
        {"name": "b", "picked": [], "depth": ["full", 0], "ratio": [0, 0], "recovery": ["reuse"] * 2},
    ]
    figure = plots.draw_plans(result)
    assert legend(figure) == ["full", "1", "head", "0, nothing computed"]
    axis = figure.axes[2]
    shown = axis.images[0].get_array().filled(np.nan)
    np.testing.assert_array_equal(shown, [[np.nan, 1, 1, 2], [np.nan, 0, np.nan, np.nan]])
    patches = axis.get_legend().get_patches()
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["reuse", "taylor", "taylor2"]
    painted = axis.images[0].to_rgba(shown, norm=True)
    np.testing.assert_allclose(painted[0, 3], patches[2].get_facecolor(), atol=1e-6)
    # With reuse alone, or in results of before, there is nothing to show.
    figures = [plots.draw_plans(result | {"front": result["front"][1:]}), plots.draw_plans(found.result())]
    assert all(len([axis for axis in figure.axes if axis.get_title()]) == 2 for figure in figures)


def test_searches_are_compared_up_to_one_point() -> None:
    results = {"NSGA-II": found.result(3), "by chance": found.result(5, seed=1)}
    volumes, reference = plots.common_hypervolumes(results)
    rows = [row for r in results.values() for h in r["history"] for row in h["front"]]
    assert reference == (max(q for q, _ in rows), max(c for _, c in rows))
    for name, result in results.items():
        expected = [area(h["front"], reference) for h in result["history"]]
        assert volumes[name] == pytest.approx(expected)
        assert volumes[name][-1] > 0
    figure = plots.draw_comparison(results)
    assert [axis.get_xlabel() for axis in figure.axes] == ["pictures generated", "seconds"]
    assert figure.axes[1].lines[0].get_xdata().tolist() == [30, 60, 90]
    assert figure.axes[0].lines[1].get_ydata().tolist() == volumes["by chance"]
    assert legend(figure) == list(results)


def test_searches_of_different_figures_are_not_compared(tmp_path: Path) -> None:
    other = found.result(seed=1) | {"prompts": 8}
    with pytest.raises(ValueError, match=r"prompts: 4 \(a\), 8 \(b\) is not allowed, it must be the same"):
        plots.compare({"a": found.result(), "b": other}, tmp_path)
    with pytest.raises(ValueError, match="at least one search must have a front"):
        plots.compare({"a": found.result() | {"history": []}}, tmp_path)
    assert not list(tmp_path.iterdir())


def test_draw_writes_what_there_is_to_show(tmp_path: Path) -> None:
    files = plots.draw(found.result(), tmp_path)
    assert [file.name for file in files] == ["front.png", "evolution.png", "hypervolume.png", "plans.png"]
    assert all(Image.open(file).width > 800 for file in files)
    nothing = found.result() | {"history": [], "front": [], "plans": [], "beside": []}
    assert [file.name for file in plots.draw(nothing, tmp_path)] == ["front.png"]


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'regrow\[plot\]'"):
        plots.draw(found.result(), tmp_path)


def test_curves_and_legends_of_all_plots_are_told_apart() -> None:
    styles = [tuple(shared.line_style(i).values()) for i in range(28)]
    assert len(set(styles)) == 28
    figure = shared.new_figure(4, 3)
    axis = figure.subplots()
    for i in range(3):
        axis.plot([0, 1], label=f"curve {i}", **shared.line_style(i))
    shared.legend_below(figure, 2)
    assert legend(figure) == ["curve 0", "curve 1", "curve 2"]
    assert [line.get_color() for line in axis.lines] == [*shared.COLOURS[:3]]


def test_a_figure_is_written_into_a_folder_that_is_made_for_it(tmp_path: Path) -> None:
    figure = shared.new_figure(4, 3)
    shared.save(figure, tmp_path / "new" / "figure.png", dpi=50)
    assert Image.open(tmp_path / "new" / "figure.png").size == (200, 150)


def test_what_a_file_of_a_plot_needs_is_said_before_any_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shared.check_ending("--plot", tmp_path / "bars.svg")
    with pytest.raises(ValueError, match=r"--plot: .*bars\.docx is not allowed, it must end in .* \.png"):
        shared.check_ending("--plot", tmp_path / "bars.docx")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'regrow\[plot\]', or leave out --plot"):
        shared.check_ending("--plot", tmp_path / "bars.svg")
