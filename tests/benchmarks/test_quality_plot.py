"""Curves of quality against speed say what was measured and nothing beyond it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pipelines
import pytest
import quality
import transformer_pipelines
from PIL import Image
from quality import (
    MACS,
    MARKERS,
    MEASURES,
    METHODS,
    SPEEDUP,
    Point,
    at,
    gains_table,
    of_curves,
    points,
    table,
    variants_table,
)

from regrow.lab.measure.variants import variant

REST: dict[str, Any] = {
    "sfd": 900.4,
    "kd": 0.0218,
    "precision": 0.151,
    "recall": 0.733,
    "inception_score": 3.376,
}
FOUND = {
    p.name: p
    for p in (
        Point("steps:50", 1.0, 1.1, 1.0, 10.0, None, 1.00, None, 21.4, **REST, disturbed=False),
        Point("steps:25", 2.0, 1.1, 2.0, 12.0, 30.0, 0.98, 0.04, 21.4, **REST, disturbed=False),
        Point("steps:10", 5.0, 1.1, 5.0, 20.0, 22.0, 0.90, 0.20, 21.4, **REST, disturbed=False),
        Point("deepcache:2", 1.8, 1.1, 1.9, 11.0, 33.0, 0.99, 0.02, 21.4, **REST, disturbed=False),
        Point("deepcache:5", 3.6, 1.1, 3.8, 13.0, 26.0, 0.97, 0.06, 21.4, **REST, disturbed=False),
        Point("dato:b1", 6.0, 1.1, 6.7, 15.0, 24.0, 0.95, 0.10, 21.4, **REST, disturbed=False),
    )
}


def test_a_curve_is_linear_in_the_logarithm_of_the_speed() -> None:
    curve = [FOUND["steps:50"], FOUND["steps:25"], FOUND["steps:10"]]
    assert at(curve, SPEEDUP, 2**0.5, "fd") == pytest.approx(11.0)
    assert at(curve, SPEEDUP, 10**0.5, "fd") == pytest.approx(16.0)
    assert at(curve, SPEEDUP, 1.0, "fd") == 10.0
    assert at(curve, SPEEDUP, 5.1, "fd") is None
    assert at(curve, SPEEDUP, 5.04, "fd") == 20.0
    for field in ("psnr", "feature_distance"):
        assert at(curve, SPEEDUP, 1.5, field) is None, "the baseline has no distance to itself"


def test_a_curve_begins_at_a_speed_that_it_all_but_has() -> None:
    slow = replace(FOUND["deepcache:2"], speedup=2.005)
    for curve in ([slow], [slow, FOUND["deepcache:5"]]):
        assert at(curve, SPEEDUP, 2.0, "psnr") == 33.0
        assert at(curve, SPEEDUP, 1.98, "psnr") is None


def test_only_fewer_steps_begin_at_the_baseline() -> None:
    curves = of_curves(FOUND)
    assert set(curves) == {"fewer steps", "DeepCache 2 to 10", "DaTo, the paper's b1 and fast"}
    assert [name for name, curve in curves.items() if FOUND["steps:50"] in curve] == ["fewer steps"]


def test_nothing_is_said_of_speeds_before_a_first_variant() -> None:
    for measure in MEASURES:
        (row,) = [r for r in table(FOUND, measure)[2:] if r.startswith("| DeepCache 2 to 10 |")]
        # 1.25x and 1.5x, where the first is at 1.8x; then 2x.
        assert [bool(cell.strip()) for cell in row.split("|")[2:5]] == [False, False, True]


def test_the_best_of_each_speed_is_bold() -> None:
    lines = table(FOUND, MEASURES[2])
    at_two = {line.split(" | ")[0].strip("| "): line.split(" | ")[3] for line in lines[2:]}
    assert at_two["fewer steps"] == "12.0"
    assert at_two["DeepCache 2 to 10"].startswith("**11.")
    assert sum("**" in value for value in at_two.values()) == 1


def test_one_that_stands_alone_is_not_bold() -> None:
    # Only fewer steps and the first DaTo are so much faster.
    for row in table(FOUND, MEASURES[2])[2:]:
        assert "**" not in row.split(" | ")[6]
    alone = {name: FOUND[name] for name in ("steps:50", "steps:25")}
    assert not any("**" in row for row in table(alone, MEASURES[2]))


def test_of_decibels_the_most_is_bold() -> None:
    rows = [line for line in table(FOUND, MEASURES[0])[2:] if "**" in line]
    assert MEASURES[0].field == "psnr"
    # At 3x, between 30 dB at 2x and 22 at 5x, and 33 at 1.8x and 26 at 3.6x.
    (at_three,) = [r for r in rows if r.split(" | ")[4].startswith("**")]
    assert at_three.startswith("| DeepCache 2 to 10 | ")
    assert at_three.split(" | ")[4] == "**27.8**"


def test_at_equal_macs_a_method_that_saves_more_of_them_stands_better() -> None:
    rows = {ratio: table(FOUND, MEASURES[0], ratio) for ratio in (SPEEDUP, MACS)}
    assert "at a measured speed-up of | 1.25x" in rows[SPEEDUP][0]
    assert "at MACs fewer by | 1.25x" in rows[MACS][0]
    at_three = [
        float(row.split(" | ")[4].strip("*")) for lines in rows.values() for row in lines if "Cache" in row
    ]
    assert at_three[0] < at_three[1]


@pytest.mark.parametrize("curves", METHODS.values(), ids=METHODS)
def test_every_variant_of_a_curve_is_known(curves: quality.Curves) -> None:
    for spec in (spec for curve in curves.values() for spec in curve):
        assert variant(spec, 50).name == spec


@pytest.mark.parametrize("spec", [specs[0] for specs in quality.TRANSFORMER.values()])
def test_every_curve_of_a_transformer_can_be_made(spec: str) -> None:
    one = variant(spec, 4)
    with one.applied(transformer_pipelines.dit()):
        pass


@pytest.mark.parametrize("spec", [specs[0] for specs in quality.UNET.values()])
def test_every_curve_of_a_unet_can_be_made(spec: str) -> None:
    with variant(spec, 4).applied(pipelines.sd()):
        pass


def test_every_variant_has_its_row() -> None:
    lines = variants_table(FOUND)[2:]
    rest = "900 | 0.0218 | 0.151 | 0.733 | 3.38 |"
    assert lines[0] == f"| `steps:50` | 1.00x | 1.10 | 1.00x | 21 |  | 1.000 |  | 10.00 | {rest}"
    assert lines[5] == f"| `dato:b1` | 6.00x | 1.10 | 6.70x | 21 | 24.0 | 0.950 | 0.1000 | 15.00 | {rest}"


def test_what_was_measured_on_a_busy_machine_is_marked() -> None:
    busy = replace(FOUND["dato:b1"], disturbed=True)
    assert variants_table(FOUND | {busy.name: busy})[7].startswith("| `dato:b1` (disturbed) | 6.00x |")


@pytest.mark.parametrize("pair", quality.AGAINST)
def test_methods_are_compared_with_earlier_ones_of_the_same_model(pair: tuple[str, str]) -> None:
    orders = [[spec for specs in curves.values() for spec in specs] for curves in METHODS.values()]
    both = [order for order in orders if set(pair) <= set(order)]
    assert both
    for order in both:
        assert order.index(pair[1]) < order.index(pair[0])


def test_gains_have_their_errors() -> None:
    rows: list[dict[str, Any]] = [
        {"name": "steps:50", "gain": None},
        {"name": "dato:5", "gain": {"over": "fora:5", "psnr": 0.125, "error": 0.25}},
        {"name": "dato:2", "gain": {"over": "fora:2", "psnr": None, "error": None}},
    ]
    assert gains_table({"rows": rows})[2:] == ["| `dato:5` | `fora:5` | +0.12 ± 0.25 |"]
    assert gains_table({"rows": rows[:1]}) == []


def result_of(processor: str, *rows: tuple[str, float], **changes: Any) -> dict[str, Any]:
    machine = {"gpu": None, "processor": processor, "date": "2026-11-23", "code": "abc"}
    found = [{"name": name, "fd": fd} for name, fd in rows]
    own = {"machine": machine, "made_otherwise": [], "rows": found}
    return dict.fromkeys(quality.ALIKE, 1) | own | changes


def test_figures_of_several_days_stand_in_one_table() -> None:
    first = result_of("A", ("steps:50", 1.0), ("dato:3", 1.0))
    second = result_of("B", ("dato:3", 2.0), ("steps:25", 2.0), made_otherwise=["steps:25"])
    both = quality.together(first, [second])
    assert [(row["name"], row["fd"]) for row in both["rows"]] == [
        ("steps:50", 1.0),
        ("steps:25", 2.0),
        ("dato:3", 1.0),
    ], "in the order of the curves; what both have is the first one's"
    origins = {
        "A, 2026-11-23, code abc": ["`steps:50`", "`dato:3`"],
        "B, 2026-11-23, code abc": ["`steps:25` (some made by other code or elsewhere)"],
    }
    assert quality.origins(both) == origins
    again = quality.together(result_of("C", ("sito:a", 3.0)), [both])
    assert origins.items() <= quality.origins(again).items(), "a row's own machine stays with it"


def test_figures_of_other_settings_do_not_stand_in_one_table() -> None:
    first = result_of("A", ("steps:50", 1.0))
    for name in quality.ALIKE:
        with pytest.raises(SystemExit, match=f"--also: {name} 2 is not allowed, it must be 1"):
            quality.together(first, [result_of("B", ("dato:3", 1.0), **{name: 2})])
    with pytest.raises(SystemExit, match="--also: dato:4 is not allowed, it must be one of steps:50,"):
        quality.together(first, [result_of("B", ("dato:4", 1.0))])


def test_times_of_other_settings_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    speed = {"model": "emoji", "dtype": "float32", "images": 4, "guidance": 3.0, "rows": []}
    monkeypatch.setattr("sys.argv", ["quality.py", "--times", str(file), "--work", str(tmp_path / "work")])
    file.write_text(json.dumps({"speed": speed}))
    args = quality.parse_arguments()
    assert quality.times_of(file, args, []) == speed
    with pytest.raises(SystemExit, match=r"--times: .*result\.json has no time of steps:50, only of"):
        quality.run(args)
    for name, other in (("model", "cifar10"), ("dtype", "bfloat16"), ("images", 2), ("guidance", 2.0)):
        file.write_text(json.dumps({"speed": speed | {name: other}}))
        with pytest.raises(SystemExit, match=f"--times: {name} {other} is not allowed, it must be"):
            quality.run(args)
    assert not args.work.exists(), "before any work"


@pytest.mark.parametrize("name", ["quality-emoji", "quality-emoji-32", "quality-cifar10"])
def test_committed_tables_are_those_of_their_results(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    committed = Path(quality.__file__).with_name("results") / f"{name}.json"
    copied = tmp_path / committed.name
    copied.write_bytes(committed.read_bytes())
    monkeypatch.setattr("sys.argv", ["quality.py", "--table", "--out", str(copied.with_suffix(""))])
    quality.main()
    assert copied.with_suffix(".md").read_text() == committed.with_suffix(".md").read_text()


def test_only_what_is_timed_has_more_pictures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for only, said in (
        ("steps:50,steps:49", "--only: steps:49 is not allowed, it must be one of steps:50,"),
        ("sito:d,dato:b1", "--only: steps:50 is missing, which all are compared with"),
    ):
        monkeypatch.setattr("sys.argv", ["quality.py", "--work", str(tmp_path), "--only", only])
        with pytest.raises(SystemExit, match=said):
            quality.run(quality.parse_arguments())
    assert not list(tmp_path.iterdir())


def test_failed_variants_have_no_point() -> None:
    rows = [{"name": "steps:50", "fd": 1.0, "psnr": None}, {"name": "sito:a", "fd": 2.0, "psnr": 30.0}]
    rows = [row | REST | {"ssim": 1.0, "feature_distance": 0.0} for row in rows]
    times = [
        {"name": "steps:50", "error": None, "speedup": 1.0, "spread": 1.1, "macs_ratio": 1.0},
        {"name": "sito:a", "error": "no", "speedup": 0.0, "spread": 0.0, "macs_ratio": 0.0},
    ]
    times = [row | {"peak_mib": None, "disturbed": [1]} for row in times]
    (found,) = points({"rows": rows, "prompts": 2}, {"rows": times}).values()
    assert (found.name, found.psnr, found.feature_distance) == ("steps:50", None, None)
    assert found.disturbed
    rows[0]["fd"] = None
    with pytest.raises(SystemExit, match="prompts: 2 are too few for the Fréchet distance of steps:50"):
        points({"rows": rows, "prompts": 2}, {"rows": times})


def test_no_two_curves_look_the_same() -> None:
    assert len(set(MARKERS)) >= max(len(curves) for curves in METHODS.values())


def test_the_plot_is_drawn(tmp_path: Path) -> None:
    quality.draw(FOUND, tmp_path / "curves.png", "a model")
    assert Image.open(tmp_path / "curves.png").width > 800


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--prompts", "none.txt"), "--prompts: none.txt is not allowed, it must exist"),
        (("--reference", "none"), "--reference: none is not allowed, it must exist"),
    ],
)
def test_what_is_missing_is_said_before_anything_is_timed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: tuple[str, str], said: str
) -> None:
    monkeypatch.setattr("subprocess.run", lambda *_, **__: pytest.fail("something ran"))
    monkeypatch.setattr("sys.argv", ["quality.py", "--work", str(tmp_path), *words])
    with pytest.raises(SystemExit, match=said):
        quality.run(quality.parse_arguments())


def test_kept_times_of_another_number_of_pictures_or_rounds_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    every = [spec for specs in METHODS["unet"].values() for spec in specs]
    rows = [{"name": name, "error": None} for name in every]
    (tmp_path / "speed.json").write_text(json.dumps({"images": 2, "rounds": 3, "rows": rows}))
    monkeypatch.setattr("subprocess.run", lambda *_, **__: pytest.fail("something ran"))
    for words, said in (
        (("--images", "3"), r"--images: 3 is not allowed, .*speed\.json has times of 2"),
        (("--images", "2", "--rounds", "5"), r"--rounds: 5 is not allowed, .*speed\.json has times of 3"),
    ):
        monkeypatch.setattr("sys.argv", ["quality.py", "--work", str(tmp_path), *words])
        with pytest.raises(SystemExit, match=said):
            quality.run(quality.parse_arguments())


def test_kept_times_say_where_they_are_from(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    machine = {"gpu": None, "processor": "A", "date": "2026-11-23", "code": "abc"}
    speed = {"images": 4, "rounds": 3, "machine": machine, "rows": [{"name": "steps:50", "error": None}]}
    file = tmp_path / "speed.json"
    file.write_text(json.dumps(speed))
    monkeypatch.setattr("subprocess.run", lambda *_, **__: pytest.fail("something ran"))
    monkeypatch.setattr("sys.argv", ["quality.py"])
    assert quality.measured("regrow", [], ["steps:50"], file, quality.parse_arguments()) == speed
    assert "speed.json: A, 2026-11-23, code abc" in capsys.readouterr().err


def test_the_table_names_what_could_not_be_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    committed = Path(quality.__file__).with_name("results") / "quality-cifar10.json"
    result = json.loads(committed.read_text())
    failed = next(row for row in result["speed"]["rows"] if row["name"] == "toca:5")
    failed["error"] = "too large"
    (tmp_path / "of.json").write_text(json.dumps(result))
    monkeypatch.setattr("sys.argv", ["quality.py", "--table", "--out", str(tmp_path / "of")])
    quality.main()
    shown = (tmp_path / "of.md").read_text()
    assert "Not timed: `toca:5`, too large." in shown
    assert "| `toca:5` | 2.40x" not in shown
