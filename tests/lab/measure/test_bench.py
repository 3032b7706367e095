"""Variants by name, and that a measurement counts and times what it says."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pipelines
import pytest
import torch
from diffusers.hooks import HookRegistry, ModelHook
from PIL import Image

import regrow
from regrow import (
    ATEDM,
    FULL,
    Alignment,
    BaseChoice,
    CATPruning,
    Combined,
    DaTo,
    DeepCache,
    SiTo,
    ToCa,
    ToMeSD,
)
from regrow.core.compiling import compile_blocks
from regrow.core.inputs import without_data
from regrow.core.macs import CallCounter, PlainCounter
from regrow.lab import cli
from regrow.lab.cli.ablations import ABLATIONS, ablated, against
from regrow.lab.cli.bench import Written, draw_bars, print_rows
from regrow.lab.measure.bench import BenchRow, bench
from regrow.lab.measure.evaluate import check_against
from regrow.lab.measure.machine import model_key
from regrow.lab.measure.sampling import Moment, make, moment
from regrow.lab.measure.variants import Variant, variant
from regrow.methods.base import MethodConfig

PROMPTS = ["a penguin", "a pizza"]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("steps:25", Variant("steps:25", None, 25)),
        ("sito:d", Variant("sito:d", SiTo.preset("d"), 50)),
        ("sito:0.25", Variant("sito:0.25", SiTo(ratio=0.25), 50)),
        ("dato:b1", Variant("dato:b1", DaTo.preset("b1"), 50)),
        ("steps:25+sito:d", Variant("steps:25+sito:d", SiTo.preset("d"), 25)),
        (
            "dato:4+steps:8",
            Variant("dato:4+steps:8", DaTo(schedule=regrow.Schedule.every(4, 8, ratio=0.5)), 8),
        ),
        ("dato:4", Variant("dato:4", DaTo(schedule=regrow.Schedule.every(4, 50, ratio=0.5)), 50)),
        ("tome:0.75", Variant("tome:0.75", ToMeSD(ratio=0.75), 50)),
        ("deepcache:5", Variant("deepcache:5", DeepCache(interval=5), 50)),
        (
            "deepcache:5+tome:0.5",
            Variant(
                "deepcache:5+tome:0.5",
                Combined(caching=DeepCache(interval=5), tokens=ToMeSD(ratio=0.5)),
                50,
            ),
        ),
        (
            "cat:0.3+deepcache:2:branch=3",
            Variant(
                "cat:0.3+deepcache:2:branch=3",
                Combined(caching=DeepCache(interval=2, branch=3), tokens=CATPruning(alpha=0.3)),
                50,
            ),
        ),
        (
            "atedm:reuse+deepcache:3",
            Variant(
                "atedm:reuse+deepcache:3",
                Combined(caching=DeepCache(interval=3), tokens=ATEDM.preset("reuse")),
                50,
            ),
        ),
        (
            "dato:b1+sito:a",
            Variant(
                "dato:b1+sito:a",
                Combined(caching=DaTo.preset("b1").schedule, tokens=SiTo.preset("a")),
                50,
            ),
        ),
    ],
)
def test_a_variant_is_found_by_its_name(spec: str, expected: Variant) -> None:
    assert variant(spec, 50) == expected


@pytest.mark.parametrize("method", [ATEDM, CATPruning, DaTo, SiTo, ToCa])
def test_every_preset_is_a_variant(method: type[MethodConfig]) -> None:
    name = method.model_fields["method"].default
    assert method.presets()
    for preset in method.presets():
        assert variant(f"{name}:{preset}", 50).config == method.preset(preset)


def test_a_schedule_file_is_a_variant(tmp_path: Path) -> None:
    plan = regrow.Schedule(depth=(FULL, 1), ratio=(0.0, 0.5))
    plan.save(tmp_path / "plan.yaml")
    assert variant(f"dato:{tmp_path / 'plan.yaml'}", 8).config == DaTo(schedule=plan)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("magic:3", "'magic:3' is not known"),
        ("steps:0", "whole number"),
        ("steps:", "whole number"),
        ("deepcache:five", "whole number"),
        ("tome:much", "a ratio"),
        ("tome:0.9", "ratio: 0.9 is not allowed"),
        ("tome:0.5+sito:a", "one side of the '\\+' must be"),
        ("deepcache:5+fora:2", "the other sito, tome, cat or atedm"),
        ("cat:0.3+fora:2", "not allowed with cat"),
        ("deepcache:5+tome:0.5+sito:a", "at most two methods"),
        ("steps:5+steps:3", "steps: comes once"),
        ("steps:few+sito:d", "whole number"),
        ("tome:0.5:levels=1:levels=2", "levels is there twice"),
        ("dato:b1:alignment=off+tome:0.5", "of dato only its schedule goes with another method"),
    ],
)
def test_wrong_names_are_refused_with_what_is_allowed(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        variant(spec, 50)


def one_block() -> Any:
    """A pipeline around a U-Net with one transformer block, in the way down, which compiles soon."""
    ends = {"down_block_types": (pipelines.CROSS_DOWN,), "up_block_types": (pipelines.PLAIN_UP,)}
    return pipelines.sd(pipelines.unet(block_out_channels=(16,), mid_block_type="UNetMidBlock2D", **ends))


@pytest.fixture(scope="module")
def rows() -> Any:
    variants = [variant(s, 4) for s in ("steps:4", "steps:2", "deepcache:2+tome:0.5")]
    seen: list[str] = []
    pipe = pipelines.sd()
    found = bench(pipe, variants, PROMPTS, rounds=3, on_generation=seen.append)
    # One to warm up, three timed, and one in which memory is measured.
    assert seen == [v.name for v in variants] * 5
    assert "step" not in pipe.scheduler.__dict__
    assert not pipe.unet._forward_pre_hooks
    assert not pipe.unet._forward_hooks
    return found


def test_calls_and_macs_are_those_of_the_generation(rows: Any) -> None:
    full, half, both = rows
    assert [(c.depth, c.ratio, c.count) for c in full.calls] == [("full", 0.0, 4)]
    assert [(c.depth, c.ratio, c.count) for c in half.calls] == [("full", 0.0, 2)]
    assert [(c.depth, c.ratio, c.count) for c in both.calls] == [("full", 0.5, 2), ("1", 0.5, 2)]
    assert full.macs == 2 * half.macs
    assert half.macs_ratio == 2
    pipe = pipelines.sd()
    with regrow.apply(pipe, variant("deepcache:2+tome:0.5", 4).config) as run:
        make(pipe, PROMPTS, steps=4)
    assert both.macs == run.report().macs
    assert both.macs_ratio == run.report().full_macs / run.report().macs


def test_times_are_consistent(rows: Any) -> None:
    assert [len(row.rounds) for row in rows[1:]] == [3, 3]
    # At the beginning of each round and at the end, at least.
    assert len(rows[0].rounds) >= 4
    for row in rows:
        assert row.seconds == statistics.median(row.rounds)
        assert row.spread == max(row.rounds) / min(row.rounds)
        assert math.isclose(row.seconds_per_image * 2, row.seconds)
        assert math.isclose(row.images_per_second * row.seconds, 2)
        assert 0 < row.denoiser_seconds < row.seconds
        assert sum(c.count for c in row.calls) in (2, 4)
        assert all(0 < c.seconds < row.denoiser_seconds for c in row.calls)
    assert rows[0].speedup == 1
    assert rows[0].efficiency == 1
    for row in rows[1:]:
        assert row.speedup is not None
        assert min(rows[0].rounds) / max(row.rounds) <= row.speedup <= max(rows[0].rounds) / min(row.rounds)


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_a_machine_that_slows_down_slows_what_is_compared_alike(
    monkeypatch: pytest.MonkeyPatch, rounds: int
) -> None:
    clock, turns = 0.0, []

    def drifting(pipeline: Any, prompts: Any, *, steps: int, **options: Any) -> SimpleNamespace:
        nonlocal clock
        turns.append(steps)
        # Three in a thousand slower with each second: a round is 8% slower at its end.
        seconds = 0.1 * steps * math.exp(0.003 * clock)
        clock += seconds
        return SimpleNamespace(seconds=seconds)

    monkeypatch.setattr("regrow.lab.measure.bench.make", drifting)
    every = (50, 25, 40, 10, 10, 10, 10, 20, 5)
    rows = bench(pipelines.sd(), [variant(f"steps:{n}", n) for n in every], PROMPTS, rounds=rounds)
    # 25 + 40 and 10 + 10 + 10 + 10 + 20 have as many steps as the first or more.
    a_round = [50, 25, 40, 50, 10, 10, 10, 10, 20, 50, 5]
    assert turns == [*every, *a_round * rounds, 50, *every]
    assert len(rows[0].rounds) == 3 * rounds + 1
    assert rows[0].speedup == 1
    for row, steps in zip(rows, every, strict=True):
        assert row.speedup == pytest.approx(50 / steps, rel=0.015)


@dataclass(frozen=True)
class Failing(Variant):
    """Fails from its generation of that number on."""

    last: int = 0
    made: list[int] = field(default_factory=list)

    def applied(self, pipeline: Any) -> AbstractContextManager[Any]:
        self.made.append(0)
        if len(self.made) > self.last:
            raise RuntimeError("no more")
        return nullcontext()


@pytest.mark.parametrize("last", [0, 1, 2])
def test_a_baseline_that_fails_stops_nobody(last: int) -> None:
    others = [variant("steps:2", 2), variant("steps:1", 1)]
    failing, *rows = bench(pipelines.sd(), [Failing("a", None, 2, last), *others], PROMPTS, rounds=2)
    assert failing.error == "RuntimeError: no more"
    for row in rows:
        assert (row.error, row.speedup, row.efficiency, len(row.rounds)) == (None, None, None, 2)


def test_a_variant_that_fails_in_the_middle_stops_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    # Every call takes a second.
    clock = count()
    monkeypatch.setattr("regrow.lab.measure.bench.moment", lambda pipeline: Moment(next(clock), None))
    variants = [variant("steps:2", 2), Failing("a", None, 2, 2), variant("steps:1", 1)]
    first, failing, last = bench(pipelines.sd(), variants, PROMPTS, rounds=2)
    assert failing.error == "RuntimeError: no more"
    assert last.error is None
    assert (first.denoiser_seconds, last.denoiser_seconds) == (2, 1)
    assert (last.macs_ratio, last.efficiency) == (2, 1)


def test_one_variant_is_timed_once_a_round() -> None:
    (row,) = bench(pipelines.sd(), [variant("steps:2", 2)], PROMPTS[:1], rounds=2)
    assert (len(row.rounds), row.speedup, row.error) == (2, 1, None)


def test_a_variant_that_fails_is_shown_with_its_error_and_stops_nobody(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    bad = Variant("sito, level 8", SiTo(ratio=0.5, max_downsample=1), 2)
    pipe = pipelines.make("sdxl")
    rows = bench(pipe, [variant("steps:2", 2), bad], PROMPTS[:1], rounds=1)
    assert rows[0].error is None
    assert "leaves no layer" in (rows[1].error or "")
    print_rows(rows, "steps:2")
    printed = capsys.readouterr().out
    assert f"sito, level 8: {rows[1].error}" in printed
    assert f"{60 * rows[0].images_per_second:.1f}" in printed
    draw_bars(rows, tmp_path / "bars.png")
    draw_bars(rows[:1], tmp_path / "bar.png")
    both, one = (Image.open(tmp_path / f"{name}.png") for name in ("bars", "bar"))
    assert both.width > 400
    assert both.height > one.height


def test_what_changes_nothing_is_told_where_the_plain_pipeline_is_there_to_compare(
    capsys: pytest.CaptureFixture[str],
) -> None:
    specs = ("steps:2", "deepcache:1", "deepcache:2", "tome:0.5")
    variants = [variant(s, 2) for s in specs] + [variant("deepcache:1", 3)]
    with pytest.warns(UserWarning, match="prunes nothing and reuses nothing"):
        rows = bench(pipelines.sd(), variants, PROMPTS, rounds=1)
    assert [row.error for row in rows] == [None] * 5
    assert [row.changes_nothing for row in rows] == [None, True, False, False, None]
    print_rows(rows, "steps:2")
    assert capsys.readouterr().out.count("(changes nothing)") == 1


def test_plain_calls_are_counted_as_a_method_that_does_nothing_is() -> None:
    denoiser = pipelines.unet()
    calls = [((), without_data(pipelines.unet_inputs(denoiser, batch=b))) for b in (1, 2, 2)]
    expected = [CallCounter(denoiser, None).count(FULL, 0.0, call).denoiser for call in calls]
    assert expected[0] * 2 == expected[1]
    assert PlainCounter(denoiser).count(calls) == sum(expected)


@pytest.mark.slow
def test_nothing_is_compiled_while_it_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def backend(graph: Any, inputs: Any) -> Any:
        seen.append("compiled")
        return graph.forward

    def looked(device: torch.device) -> Moment:
        seen.append("looked")
        return moment(device)

    monkeypatch.setattr("regrow.lab.measure.bench.moment", looked)
    torch._dynamo.reset()
    pipe = one_block()
    compile_blocks(pipe.unet, backend=backend)
    variants = [variant(spec, 2) for spec in ("steps:2", "deepcache:2")]
    rows = bench(pipe, variants, PROMPTS[:1], rounds=1, guidance=3.0)
    assert [row.error for row in rows] == [None] * 2
    # The clock is looked at before and after each timed call.
    between = [seen[:i].count("looked") % 2 for i, what in enumerate(seen) if what == "compiled"]
    assert not any(between)
    first = seen.index("looked")
    assert "compiled" in seen[first:], "every turn compiles anew, outside of what is timed"
    torch._dynamo.reset()


class Counting(ModelHook):
    """A hook of diffusers with a state, such as those of its caches; remembers where generations began."""

    _is_stateful = True

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.ends = 0, list[int]()

    def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return args, kwargs

    def reset_state(self, module: Any) -> Any:
        self.ends.append(self.calls)
        self.calls = 0
        return module


@dataclass(frozen=True)
class Hooked(Variant):
    """A variant that is such a hook on the denoiser's last layer."""

    seen: list[Counting] = field(default_factory=list)

    @contextmanager
    def applied(self, pipeline: Any) -> Iterator[None]:
        registry = HookRegistry.check_if_exists_or_initialize(pipeline.unet.conv_out)
        self.seen.append(Counting())
        registry.register_hook(self.seen[-1], "counting")
        try:
            yield
        finally:
            registry.remove_hook("counting")


@pytest.mark.parametrize("compiled", [False, True])
def test_what_compiles_leaves_hooks_of_diffusers_as_they_began(compiled: bool) -> None:
    torch._dynamo.reset()
    pipe, one = one_block(), Hooked("hooked", 1, 3)
    if compiled:
        compile_blocks(pipe.unet, backend="eager")
    (row,) = bench(pipe, [one], PROMPTS, rounds=1)
    assert row.error is None
    # Warm up, time and measure memory; what is compiled is not counted.
    assert len(one.seen) == (3 if compiled else 4)
    for hook in one.seen:
        assert hook.calls == 3
        assert hook.ends == [3] * compiled
    torch._dynamo.reset()


def test_calls_that_a_report_leaves_out_have_no_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        regrow.Run,
        "report",
        lambda run: SimpleNamespace(calls=[SimpleNamespace(depth=1, ratio=0.0)], macs=1),
    )
    (row,) = bench(pipelines.sd(), [variant("deepcache:2", 3)], PROMPTS, rounds=1)
    assert row.error is None
    assert row.macs is None
    assert [(kind.depth, kind.ratio, kind.count) for kind in row.calls] == [(None, None, 3)]


def test_another_number_of_calls_in_a_later_generation_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = count(2)
    monkeypatch.setattr(
        "regrow.lab.measure.bench.make",
        lambda pipeline, prompts, **options: make(pipeline, prompts, **(options | {"steps": next(steps)})),
    )
    (row,) = bench(pipelines.sd(), [variant("steps:2", 2)], PROMPTS, rounds=1)
    assert row.error == "ValueError: 3 calls of the denoiser where an earlier run had 2"


@pytest.mark.parametrize("error", [KeyError("added"), TypeError("no data"), NotImplementedError("meta")])
def test_what_can_not_be_counted_is_timed(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def refuse(counter: PlainCounter, inputs: Any) -> int:
        raise error

    monkeypatch.setattr(PlainCounter, "count", refuse)
    (row,) = bench(pipelines.sd(), [variant("steps:2", 2)], PROMPTS, rounds=1)
    assert (row.error, row.macs) == (None, None)
    assert row.seconds > 0


def test_a_pipeline_without_a_denoiser_is_refused_in_each_row() -> None:
    (row,) = bench(SimpleNamespace(), [variant("steps:2", 2)], PROMPTS, rounds=1)
    assert "UnsupportedModelError: model: SimpleNamespace has no denoiser" in (row.error or "")


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"variants": []}, "methods"), ({"prompts": []}, "images"), ({"rounds": 0}, "rounds")],
)
def test_nothing_to_measure_is_refused(changes: dict[str, Any], named: str) -> None:
    arguments: dict[str, Any] = {
        "variants": [variant("steps:1", 1)],
        "prompts": PROMPTS,
        "rounds": 1,
    } | changes
    with pytest.raises(ValueError, match=f"{named}: 0 is not allowed"):
        bench(None, arguments["variants"], arguments["prompts"], rounds=arguments["rounds"])


@pytest.mark.parametrize("side", ["height", "width"])
def test_one_side_alone_is_refused(side: str) -> None:
    with pytest.raises(ValueError, match=f"give it together with {side}"):
        make(None, PROMPTS, steps=1, **{side: 64})


@pytest.mark.usefixtures("small_emoji")
def test_the_command_prints_what_it_writes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "results" / "bench.json"
    words = ("bench", "--methods", "steps:2,dato:b1", "--steps", "2", "--rounds", "1", "--json")
    monkeypatch.setattr("sys.argv", ["regrow", *words, "--device", "cpu", "--out", str(out)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(out.read_text())
    assert (printed["model"], printed["model_key"]) == ("emoji", model_key("emoji"))
    assert (printed["height"], printed["width"], printed["rounds"]) == (None, None, 1)
    assert [row["name"] for row in printed["rows"]] == ["steps:2", "dato:b1"]
    assert printed["rows"][1]["macs_ratio"] > 1.5
    assert [(one["round"], one["method"]) for one in printed["timed"]] == [(1, "steps:2"), (1, "dato:b1")]
    assert [one["seconds"] for one in printed["timed"]] == [row["rounds"][0] for row in printed["rows"]]
    assert printed["complete"]


def test_fields_may_follow_a_method() -> None:
    assert variant("sito:d:base=V:patch=4", 50).config == SiTo(
        ratio=0.6, base=BaseChoice.BEST_IN_PATCH, patch=4
    )
    assert variant("sito:d:max_downsample=2", 50).config == SiTo(ratio=0.6, max_downsample=2)
    b1 = DaTo.preset("b1")
    expected = DaTo(schedule=b1.schedule.with_ratio(0.5), alignment=Alignment.OFF)
    assert variant("dato:b1:ratio=0.5:alignment=off", 50).config == expected
    combined = variant("deepcache:3:branch=1+tome:0.5:random=false", 50).config
    assert combined == Combined(caching=DeepCache(interval=3, branch=1), tokens=ToMeSD(random=False))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("sito:d:speed=3", "speed"),
        ("sito:d:base", "field=value"),
        ("sito:d:patch=1", "patch"),
        ("dato:b1:ratio=0.9", "ratio: 0.9 is not allowed"),
    ],
)
def test_wrong_fields_are_named(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        variant(spec, 50)


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_ablation_is_a_list_of_different_methods(name: str) -> None:
    variants = [variant(spec, 50) for spec in ablated(name, 50)]
    assert variants[0] == Variant("steps:50", None, 50)
    assert len({(v.config, v.steps) for v in variants}) == len(variants) > 3


@pytest.mark.parametrize("name", ABLATIONS)
def test_alternatives_differ_in_one_choice_from_what_they_are_compared_with(name: str) -> None:
    others = against(name, 50)
    assert {*others, *others.values()} == set(ablated(name, 50)) - {"steps:50"}
    for one, other in others.items():
        if name == "choice":
            # Another method's tokens in the same calls.
            assert other == f"deepcache:{one.removeprefix('dato:')}+tome:0.5"
        elif one.startswith("cat:released:"):
            # All of the released code's choice, at the same share computed.
            assert other == f"cat:{one.rpartition('=')[2]}:choice=clusters"
        elif name not in {"where", "steps"}:
            assert one.rpartition(":")[0] == other.rpartition(":")[0]


def test_an_unknown_ablation_is_refused() -> None:
    with pytest.raises(ValueError, match="ablation: 'everything' is not known; allowed are base"):
        ablated("everything", 50)


def test_an_ablation_of_fewer_steps_begins_with_as_many() -> None:
    assert ablated("noise", 20)[0] == "steps:20"
    # Once, also where it is one of the alternatives.
    for steps in (25, 16, 10, 8, 5):
        names = ablated("steps", steps)
        assert names.count(f"steps:{steps}") == 1
        check_against([variant(name, steps) for name in names], against("steps", steps))


def test_a_measurement_is_written_as_it_goes_and_whole_when_it_is_stopped(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "bench.json"
    head = {"what": "time"}
    seen = []

    def stop_in_the_second_round(number: int, row: BenchRow) -> None:
        written.timed(number, row)
        kept = json.loads(out.read_text())
        seen.append((number, row.name, [r["name"] for r in kept["rows"]], kept["complete"]))
        if number == 1:
            raise KeyboardInterrupt

    variants = [variant("steps:2", 2), variant("cat:0.3", 2), variant("steps:1", 1)]
    with pytest.raises(KeyboardInterrupt), Written(head, out, as_json=True) as written:
        bench(pipelines.sd(), variants, PROMPTS[:1], rounds=2, on_timed=stop_in_the_second_round)
    names = [one.name for one in variants]
    assert seen == [
        *((0, names[i], names[: i + 1], False) for i in range(3)),
        (1, names[0], names, False),
    ]
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(out.read_text())
    assert [row["name"] for row in printed["rows"]] == names
    assert len(printed["rows"][0]["rounds"]) >= 2
    assert "can't compute some of its tokens" in printed["rows"][1]["error"]
    assert not printed["complete"]


def test_tables_fit_into_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        BenchRow(
            name, 100.0, 100.0, 123.4, 1.23, speedup=12.34, macs_ratio=12.34, efficiency=1.0, peak_mib=1e5
        )
        for name in ("steps:50", "dato:b1:ratio=0.5:alignment=conditional+sito:d", "[/red]:cat:")
    ]
    print_rows(rows, "dato:b1:ratio=0.5:alignment=conditional")
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    assert printed.count("12.34x") == 6
    assert "[/red]:cat:" in printed
