"""Schedules: their files, their errors, and plans for other numbers of calls."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from regrow import ATEDM, FULL, Schedule, ScheduleError, ToCa
from regrow.core.recipe import recipe_of
from regrow.fields import explain
from regrow.recover.time import REUSE, Chebyshev, Taylor, TimeRecovery
from regrow.schedule import HEAD, LAYERS, SITES, After, Both, Spaced, Step, used_recoveries

depths = st.one_of(st.just(FULL), st.integers(0, 4))
ratios = st.floats(0, 0.99)


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    n = draw(st.integers(1, 60))
    return Schedule(
        depth=tuple(draw(st.lists(depths, min_size=n, max_size=n))),
        ratio=tuple(draw(st.lists(ratios, min_size=n, max_size=n))),
    )


texts = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=30)


@settings(max_examples=30)
@given(schedules(), texts, texts, st.booleans())
def test_files_give_back_what_was_written(schedule: Schedule, name: str, note: str, as_json: bool) -> None:
    schedule = Schedule(depth=schedule.depth, ratio=schedule.ratio, name=name, note=note)
    text = schedule.dump(as_json=as_json)
    assert Schedule.parse(text) == schedule
    if as_json:
        assert json.loads(text)["version"] == 2


AS_YAML = """\
format: regrow-schedule
version: 2
name: three
note: ''
depth: [full, 1, 0]
ratio: [0.0, 0.5, 0.25]
"""
AS_JSON = """\
{
 "format": "regrow-schedule",
 "version": 2,
 "name": "three",
 "note": "",
 "depth": [
  "full",
  1,
  0
 ],
 "ratio": [
  0.0,
  0.5,
  0.25
 ]
}
"""


def test_a_file_is_short_and_in_the_order_of_the_fields() -> None:
    schedule = Schedule(depth=(FULL, 1, 0), ratio=(0.0, 0.5, 0.25), name="three")
    assert schedule.dump() == AS_YAML
    assert schedule.dump(as_json=True) == AS_JSON
    line = schedule.with_recovery(Taylor(order=2))
    assert line.dump() == AS_YAML + "recovery: {kind: taylor, order: 2}\n"
    assert Schedule.parse(line.dump()) == line
    each = Schedule(depth=(FULL, 1), ratio=(0.0, 0.5), recovery=(REUSE, Taylor(order=2)))
    assert each.dump().endswith("recovery:\n- {kind: reuse}\n- {kind: taylor, order: 2}\n")
    assert Schedule.parse(each.dump()) == each


def test_characters_that_json_writes_as_two_are_joined_and_halves_are_replaced() -> None:
    schedule = Schedule.constant(name="\N{GRINNING FACE}")
    assert schedule.name == "\N{GRINNING FACE}"
    assert Schedule.parse(schedule.dump(as_json=True)) == schedule
    half = Schedule.parse('{"depth": ["full"], "ratio": [0], "name": "half \\ud83d"}')
    assert half.name == "half \N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("name", ["plan.yaml", "plan.json"])
def test_saving_and_loading_go_by_the_name(tmp_path: Path, name: str) -> None:
    schedule = Schedule(depth=(FULL, 1, 0), ratio=(0.0, 0.5, 0.25), name="three", note="ümlaut")
    schedule.save(str(tmp_path / name))
    schedule.save(tmp_path / name)
    assert Schedule.load(tmp_path / name) == schedule
    assert Schedule.load(str(tmp_path / name)) == schedule
    assert (tmp_path / name).read_text(encoding="utf-8") == schedule.dump(as_json=name == "plan.json")


def test_a_file_that_is_not_there_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"nothing\.yaml"):
        Schedule.load(tmp_path / "nothing.yaml")


def test_a_file_that_can_not_be_read_as_text_is_a_schedule_error(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_bytes(b"depth: \xff")
    with pytest.raises(ScheduleError, match=r"plan\.yaml"):
        Schedule.load(tmp_path / "plan.yaml")


def test_depths_may_be_given_as_words() -> None:
    assert Schedule(depth=("full", 1), ratio=(0, 0)).depth == (FULL, 1)
    named = Schedule(depth=("full", "layers", "head", "sites", 1000), ratio=(0,) * 5)
    assert named.depth == (FULL, LAYERS, HEAD, SITES, 1000)
    assert "depth: [full, layers, head, sites, 1000]" in named.dump()
    assert [step.of_sites for step in named.steps()] == [False, True, False, True, False]
    assert [step.full for step in named.steps()] == [True, False, False, False, False]


GOOD = {
    "format": "format: regrow-schedule",
    "version": "version: 1",
    "name": "name: mine",
    "depth": "depth: [full, 1, 0]",
    "ratio": "ratio: [0.0, 0.5, 0.5]",
}


@pytest.mark.parametrize(
    ("field", "line", "where", "what"),
    [
        ("format", "format: other", "2: format", "'other' is not allowed, it must be 'regrow-schedule'"),
        ("version", "version: 3", "3: version", "3 is not allowed, it must be 2"),
        ("version", "version: one", "3: version", "'one' is not allowed, it must be 2"),
        ("version", "version: true", "3: version", "True is not allowed, it must be 2"),
        ("name", "name: [1]", "4: name", "it must be text"),
        ("name", "nmae: mine", "4: nmae", "fields are .*depth, ratio"),
        (
            "depth",
            "depth: [full, -1, 0]",
            "5: depth.1",
            "-1 is not allowed, it must be a whole number >= 0 and <= 1000, 'full'",
        ),
        ("depth", "depth: [full, 1.5, 0]", "5: depth.1", "1.5 is not allowed, it must be a whole number"),
        ("depth", "depth: [full, ful, 0]", "5: depth.1", "'ful' is not allowed, .* did you mean 'full'"),
        ("depth", "depth: [full, true, 0]", "5: depth.1", "True is not allowed, it must be a whole number"),
        ("depth", "depth: 3", "5: depth", "3 is not allowed, it must be a list"),
        ("depth", "depth: [full, 999996, 0]", "5: depth.1", "999996 is not allowed, .* <= 1000"),
        ("depth", "depth: []", "5: depth", "it must have >= 1 entries"),
        ("depth", "", "1: depth", "is required"),
        ("ratio", "ratio: [0.0, 1, 0.5]", "6: ratio.1", "1 is not allowed, it must be >= 0 and < 1"),
        ("ratio", "ratio: [0.0, 0.5, -0.1]", "6: ratio.2", "-0.1 is not allowed, it must be >= 0 and < 1"),
        (
            "ratio",
            "ratio: [0.0, .nan, 0.5]",
            "6: ratio.1",
            "nan is not allowed, it must be a finite number",
        ),
        (
            "ratio",
            "ratio: [0.0, .inf, 0.5]",
            "6: ratio.1",
            "inf is not allowed, it must be a finite number",
        ),
        (
            "ratio",
            "ratio: [0.0, much, 0.5]",
            "6: ratio.1",
            "'much' is not allowed, it must be a number >= 0",
        ),
        ("ratio", "", "1: ratio", "is required"),
    ],
)
def test_errors_name_file_line_field_and_what_is_wrong(
    tmp_path: Path, field: str, line: str, where: str, what: str
) -> None:
    path = tmp_path / "plan.yaml"
    # A comment first, so that line numbers are not those of the fields.
    path.write_text("# mine\n" + "\n".join((GOOD | {field: line}).values()) + "\n")
    with pytest.raises(ScheduleError) as error:
        Schedule.load(path)
    place, reason = str(error.value).split(": ", 1)[0], str(error.value)
    line_number, name = where.split(": ")
    assert reason.startswith(f"{path}:{line_number}: {name}: "), reason
    assert place == f"{path}:{line_number}"
    assert re.search(what, reason), reason


def test_entries_on_lines_of_their_own_are_named_by_their_line() -> None:
    text = "depth:\n- full\n- 1\n- -3\nratio:\n- 0\n- 2\n- 0\n"
    with pytest.raises(ScheduleError) as error:
        Schedule.parse(text, "plan.yaml")
    lines = str(error.value).splitlines()
    assert [line.split(": ")[:2] for line in lines] == [
        ["plan.yaml:4", "depth.2"],
        ["plan.yaml:7", "ratio.1"],
    ]
    text = "depth: [full]\nratio: [0]\nrecovery:\n- kind: taylor\n  order: 99\n"
    with pytest.raises(ScheduleError, match=r"^plan.yaml:5: recovery.0.order: 99 is not allowed"):
        Schedule.parse(text, "plan.yaml")


def test_of_many_errors_the_first_are_shown_and_the_others_counted() -> None:
    with pytest.raises(ScheduleError) as error:
        Schedule.parse("depth: [-1, -2, -3, -4, -5, -6]\nratio: [0, 0, 0, 0, 0, 0]\n", "plan.yaml")
    lines = str(error.value).splitlines()
    assert [line.split(": ")[1] for line in lines[:-1]] == [f"depth.{i}" for i in range(4)]
    assert lines[-1] == "plan.yaml: and 2 more"
    with pytest.raises(ScheduleError) as error:
        Schedule.parse("depth: [-1, -2, -3, -4]\nratio: [0, 0, 0, 0]\n", "plan.yaml")
    assert str(error.value).count("\n") == 3


def test_lists_of_other_lengths_are_refused_with_both() -> None:
    with pytest.raises(ScheduleError, match=r"^plan.yaml:\d+: .*ratio.*2 entries.*depth has 3"):
        Schedule.parse("depth: [full, 1, 0]\nratio: [0, 0]\n", "plan.yaml")
    with pytest.raises(ScheduleError, match=r"^plan.yaml:\d+: recovery: 2 entries.*depth has 3"):
        Schedule.parse("depth: [full, 1, 0]\nratio: [0, 0, 0]\nrecovery: [reuse, taylor]\n", "plan.yaml")


def test_version_1_has_no_recovery() -> None:
    text = "version: 1\ndepth: [full, 1]\nratio: [0, 0]\n"
    assert Schedule.parse(text) == Schedule(depth=(FULL, 1), ratio=(0, 0))
    with pytest.raises(ScheduleError, match="recovery: it is not allowed in version 1"):
        Schedule.parse(text + "recovery: taylor\n")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("depth: [full, 1\nratio: [0]\n", r"[12]"),
        ("name: x\ndepth: ]\n", "2"),
        ("name: x\n  depth: [1]\n", "2"),
        ("name: x\nname: y\ndepth: [1]\nratio: [0]\n", "2"),
        ('{"depth": [1,\n "ratio"', "2"),
    ],
)
def test_broken_yaml_and_json_name_file_and_line(text: str, line: str) -> None:
    with pytest.raises(ScheduleError, match=rf"^plan\.yaml:{line}: \S"):
        Schedule.parse(text, "plan.yaml")


@pytest.mark.parametrize("text", ["", "3", "- 1\n- 2\n", "just words", "null"])
def test_documents_that_are_no_mapping_are_refused(text: str) -> None:
    with pytest.raises(ScheduleError, match=r"^plan\.yaml:1: expected fields"):
        Schedule.parse(text, "plan.yaml")


@given(st.text(max_size=60))
def test_any_text_is_a_schedule_or_a_schedule_error(text: str) -> None:
    message = "schedule:"
    try:
        Schedule.parse(text)
    except ScheduleError as error:
        message = str(error)
    assert message.startswith("schedule:")


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"depth": (FULL,), "ratio": (float("nan"),)}, "ratio"),
        ({"depth": (FULL,), "ratio": (1.0,)}, "ratio"),
        ({"depth": (-1,), "ratio": (0.0,)}, "depth"),
        ({"depth": (), "ratio": ()}, "depth"),
        ({"depth": (FULL, 1), "ratio": (0.0,)}, "ratio"),
        ({"depth": (FULL,), "ratio": (0.0,), "version": 3}, "version"),
        ({"depth": (FULL,), "ratio": (0.0,), "speed": 3}, "speed"),
    ],
)
def test_schedules_made_in_python_are_checked_too(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        Schedule(**fields)


def test_what_is_no_mapping_is_no_schedule() -> None:
    with pytest.raises(ValidationError):
        Schedule.model_validate(3)


def test_entries_that_are_refused_do_not_make_the_list_too_short() -> None:
    with pytest.raises(ValidationError) as refused:
        Schedule(depth=(depth for depth in (-1,)), ratio=[0.0])
    assert [issue["loc"] for issue in refused.value.errors()] == [("depth", 0)]


def test_changing_the_ratio_checks_it() -> None:
    assert Schedule.every(2, 4).with_ratio(0.5).ratio == (0.5,) * 4
    assert Schedule.every(2, 4).with_ratio(0.5).depth == Schedule.every(2, 4).depth
    for ratio in (1.5, 1, -0.1, float("nan"), "nan"):
        with pytest.raises(ValidationError) as refused:
            Schedule.every(2, 4).with_ratio(ratio)  # type: ignore[arg-type]
        assert re.fullmatch(
            r"ratio: .* is not allowed, it must be (a finite number )?>= 0 and < 1", explain(refused.value)
        ), ratio


@given(schedules(), st.integers(1, 200))
def test_resampled_plans_have_the_length_asked_for_and_begin_full(schedule: Schedule, calls: int) -> None:
    other = schedule.resample(calls)
    assert len(other) == len(other.ratio) == calls
    assert other.depth[0] == FULL
    assert set(zip(other.depth[1:], other.ratio[1:], strict=True)) <= set(
        zip((FULL, *schedule.depth[1:]), schedule.ratio, strict=True)
    )
    assert (other.name, other.note) == (schedule.name, schedule.note)


@given(schedules())
def test_a_plan_resampled_to_its_own_length_is_itself_but_begins_full(schedule: Schedule) -> None:
    other = schedule.resample(len(schedule))
    assert other.depth == (FULL, *schedule.depth[1:])
    assert other.ratio == schedule.ratio
    assert other.resample(len(schedule)) == other


@given(schedules(), st.integers(1, 200))
def test_every_depth_keeps_its_share_to_within_a_call(schedule: Schedule, calls: int) -> None:
    planned = (FULL, *schedule.depth[1:])
    other = schedule.resample(calls).depth
    for depth in set(planned):
        share = planned.count(depth) * calls / len(planned)
        # The first call is full even where the share of full calls rounds to none.
        slack = 1 if share >= 1 or depth != FULL else 1 - share
        if FULL in other and planned.count(FULL) * calls / len(planned) < 1:
            slack += 1
        assert abs(other.count(depth) - share) <= slack + 1e-9


@st.composite
def numbered(draw: st.DrawFn) -> Schedule:
    """A plan whose ratios tell the place each call came from."""
    n = draw(st.integers(1, 60))
    return Schedule(
        depth=tuple(draw(st.lists(depths, min_size=n, max_size=n))),
        ratio=tuple(i / 100 for i in range(n)),
    )


@settings(max_examples=200)
@given(numbered(), st.integers(1, 200))
def test_calls_keep_their_order_in_the_run(schedule: Schedule, calls: int) -> None:
    other = schedule.resample(calls)
    places = [round(r * 100) for r in other.ratio]
    depth = (FULL, *schedule.depth[1:])
    assert places[1:] == sorted(places[1:])
    assert [depth[p] for p in places] == list(other.depth)


@given(numbered(), st.integers(1, 200))
def test_a_depths_calls_are_spread_over_all_its_places(schedule: Schedule, calls: int) -> None:
    """With at least as many calls as a depth has places every place is used; with fewer, none twice."""
    depth = (FULL, *schedule.depth[1:])
    other = schedule.resample(calls)
    for d in set(depth):
        have = [i for i, x in enumerate(depth) if x == d]
        used = [round(r * 100) for x, r in zip(other.depth, other.ratio, strict=True) if x == d]
        if len(used) >= len(have):
            assert set(used) == set(have)
        else:
            assert len(set(used)) == len(used)


@given(numbered(), st.integers(1, 200))
def test_calls_of_a_depth_take_its_places_in_the_middle_of_their_shares(
    schedule: Schedule, calls: int
) -> None:
    """The j-th of m calls has the place at quantile (j + 1/2) / m, in whole numbers."""
    depth = (FULL, *schedule.depth[1:])
    other = schedule.resample(calls)
    for d in set(depth):
        have = [i for i, x in enumerate(depth) if x == d]
        used = sorted(round(r * 100) for x, r in zip(other.depth, other.ratio, strict=True) if x == d)
        m = len(used)
        assert used == [have[(2 * j + 1) * len(have) // (2 * m)] for j in range(m)]


def test_doubling_a_plan_makes_every_call_two() -> None:
    schedule = Schedule(depth=(FULL, 1, 0, FULL, 1, 0), ratio=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6))
    doubled = schedule.resample(12)
    assert sorted(doubled.depth) == sorted(schedule.depth * 2)
    assert doubled.ratio == tuple(sorted(schedule.ratio * 2))


@pytest.mark.parametrize(
    ("depth", "calls", "wanted"),
    [
        # The share of full calls rounds to none: one of the others makes room for the first.
        ((FULL, *(1,) * 9), 2, (FULL, 1)),
        ((FULL, *(1,) * 3, *(0,) * 6), 3, (FULL, 1, 0)),
        # 3.5, 2.1 and 1.4 calls: the largest remainder gets the one that is left.
        ((FULL,) * 5 + (1,) * 3 + (0,) * 2, 7, (FULL,) * 4 + (1,) * 2 + (0,)),
    ],
)
def test_shares_are_rounded_to_whole_calls(
    depth: tuple[int, ...], calls: int, wanted: tuple[int, ...]
) -> None:
    assert Schedule(depth=depth, ratio=(0.0,) * len(depth)).resample(calls).depth == wanted


def test_the_first_full_call_comes_first_from_wherever_it_is() -> None:
    schedule = Schedule(depth=(FULL, 1, 1, FULL), ratio=(0.0, 0.1, 0.2, 0.3)).resample(2)
    assert (schedule.depth, schedule.ratio) == ((FULL, 1), (0.3, 0.2))


def test_a_call_keeps_its_recovery_in_a_run_of_another_length() -> None:
    two = Schedule(depth=(FULL, 1), ratio=(0.0, 0.1), recovery=(REUSE, Taylor()))
    assert two.resample(4).recovery == (REUSE, REUSE, Taylor(), Taylor())
    recoveries = (REUSE, Taylor(order=1), Taylor(order=2), Chebyshev())
    schedule = Schedule(depth=(FULL, 1, 0, 1), ratio=(0.0, 0.1, 0.2, 0.3), recovery=recoveries)
    of_ratio = dict(zip(schedule.ratio, recoveries, strict=True))
    for calls in (2, 3, 7):
        other = schedule.resample(calls)
        assert other.recovery == tuple(of_ratio[ratio] for ratio in other.ratio)
    assert schedule.with_recovery(Chebyshev()).resample(7).recovery == (Chebyshev(),)


T1, T2, T3 = (Taylor(order=order) for order in (1, 2, 3))


@pytest.mark.parametrize(
    ("depth", "planned", "used"),
    [
        ((FULL, FULL, 1, 1), (T1, T1, T2, T3), (REUSE, REUSE, T2, T3)),
        ((FULL, FULL, 1, FULL), (T1, T1, T2, T3), (T2,)),
        # Of a single value all make the same.
        ((FULL, 1, 1), (T1, T2, T3), (REUSE,)),
        # A call of depth 1 computed what one of depth 0 lacks, and a second one of depth 1 does not.
        ((FULL, 1, 0), (T1, T1, T2), (T2,)),
        ((FULL, 1, 1, 0), (T1, T1, T3, T2), (T2,)),
    ],
)
def test_recoveries_that_change_nothing_are_left_out(
    depth: tuple[int, ...], planned: tuple[TimeRecovery, ...], used: tuple[TimeRecovery, ...]
) -> None:
    assert used_recoveries(depth, planned) == used


@pytest.mark.parametrize("calls", [0, -1])
def test_plans_for_no_calls_are_refused(calls: int) -> None:
    with pytest.raises(ValueError, match=f"calls: {calls} .*>= 1"):
        Schedule.every(2, 4).resample(calls)


def test_a_full_call_every_few_calls() -> None:
    schedule = Schedule.every(3, 7, depth=2, ratio=0.5)
    assert schedule.depth == (FULL, 2, 2, FULL, 2, 2, FULL)
    assert schedule.ratio == (0.5,) * 7
    assert schedule.name == "every 3"
    assert Schedule.every(1, 4).depth == (FULL,) * 4
    assert Schedule.every(5, 3).depth == (FULL, 1, 1)
    with pytest.raises(ValueError, match=r"interval: 0 .*>= 1"):
        Schedule.every(0, 4)


def test_a_constant_plan_is_full_at_any_length() -> None:
    schedule = Schedule.constant(0.3)
    assert schedule.resample(51).depth == (FULL,) * 51
    assert schedule.resample(51).ratio == (0.3,) * 51
    assert schedule.max_ratio == 0.3
    assert Schedule(depth=(FULL,) * 3, ratio=(0.1, 0.7, 0.2)).max_ratio == 0.7
    assert Schedule.constant() == Schedule(depth=(FULL,), ratio=(0.0,))


@pytest.mark.parametrize("name", ["dato-b1", "dato-b1-released", "dato-fast"])
def test_bundled_plans_load_and_say_where_they_come_from(name: str) -> None:
    schedule = Schedule.bundled(name)
    assert len(schedule) == 50
    assert "2501.00375" in schedule.note


def test_steps_are_pairs_in_order() -> None:
    steps = list(Schedule(depth=(FULL, 1), ratio=(0.0, 0.5)).steps())
    assert [(s.depth, s.ratio, s.full) for s in steps] == [(FULL, 0.0, True), (1, 0.5, False)]


def test_full_calls_are_spaced_evenly_or_where_a_method_puts_them() -> None:
    assert Spaced(3, 1).resample(5).depth == (FULL, 1, 1, FULL, 1)
    ends = Spaced(3, 1, full=lambda calls: {0, calls - 1})
    assert ends.resample(5).depth == (FULL, 1, 1, 1, FULL)
    assert ends.kinds() == {Step(FULL, 0.0), Step(1, 0.0)}
    assert Spaced(2, 1, full=lambda calls: {0, 1}).resample(4).depth == (FULL, FULL, 1, 1)
    assert Spaced(3, 1).resample(5).name == "1:3"
    assert Spaced(3, 1).resample(1).depth == (FULL,)
    with pytest.raises(ValueError, match=r"calls: 0 .*>= 1"):
        Spaced(3, 1).resample(0)
    every = Spaced(1, 1, full=lambda calls: {0})
    assert every.resample(3).depth == (FULL,) * 3
    assert every.kinds() == {Step(FULL, 0.0)}


def test_the_first_call_of_a_schedule_is_full_and_the_others_are_its_own() -> None:
    schedule = Schedule(depth=(1, 2, FULL), ratio=(0.1, 0.2, 0.3))
    assert schedule.kinds() == {Step(FULL, 0.1), Step(2, 0.2), Step(FULL, 0.3)}


def test_depths_of_one_plan_with_ratios_of_another() -> None:
    depths = Schedule(depth=(FULL, 2, 0), ratio=(0.9,) * 3)
    plan = Both(depths, After(2, Schedule.constant(0.5)))
    steps = list(plan.resample(6).steps())
    assert [s.depth for s in steps] == list(depths.resample(6).depth)
    assert [s.ratio for s in steps] == [0, 0, 0.5, 0.5, 0.5, 0.5]
    assert set(steps) <= plan.kinds()
    assert plan.kinds() == {Step(depth, ratio) for depth in (FULL, 2, 0) for ratio in (0, 0.5)}


def test_a_plan_after_full_calls_keeps_its_own_places() -> None:
    plan = After(3, Both(Spaced(2, 1), Schedule.constant(0.5)))
    resampled = plan.resample(6)
    assert resampled.depth == (FULL, FULL, FULL, 1, FULL, 1)
    assert resampled.ratio == (0.0, 0.0, 0.0, 0.5, 0.5, 0.5)
    assert resampled.name == "1:2 from 3"
    assert After(3, Schedule.constant(0.5)).resample(6).name == "from 3"
    assert plan.resample(2).depth == (FULL, FULL)
    assert plan.kinds() == {Step(FULL, 0.0), Step(FULL, 0.5), Step(1, 0.5)}
    with pytest.raises(ValueError, match="calls: 0"):
        plan.resample(0)


def test_plans_tell_for_how_many_calls_they_are() -> None:
    uneven = Schedule(depth=(FULL, 1, 1), ratio=(0.0, 0.5, 0.5))
    assert uneven.calls == 3
    assert Schedule.constant(0.5).calls is None
    assert Schedule(depth=(FULL,) * 4, ratio=(0.5,) * 4).calls is None
    assert Spaced(5, 1).calls is None
    assert After(2, uneven).calls == 3
    assert Both(Spaced(5, 1), uneven).calls == 3
    assert Both(Schedule.every(2, 5), uneven).calls == Both(uneven, Schedule.every(2, 5)).calls == 5
    assert Both(Spaced(5, 1), Schedule.constant()).calls is None
    assert recipe_of(ATEDM()).plan.calls is None
    assert recipe_of(ToCa()).plan.calls is None
