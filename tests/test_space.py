"""What methods leave open, and how a plan becomes a configuration."""

import itertools
import random
import re
from collections.abc import Sequence
from typing import Any, Literal

import pipelines
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rows import rows_of

import regrow
from regrow import FORA, CATPruning, Combined, DaTo, SiTo
from regrow.core.recipe import recipe_of
from regrow.methods.base import MethodConfig
from regrow.methods.catalogue import config_from, space_of, systems
from regrow.recover.time import REUSE, Chebyshev, Taylor, TimeRecovery, recovery_from
from regrow.schedule import FULL, HEAD, LAYERS, Schedule, used_recoveries
from regrow.space import Space, Variable, free, product

LINE, PARABOLA = Taylor(order=1), Taylor(order=2)
# Every third call is full, the others compute the outermost layer and forecast the rest.
BY_LINES: dict[str, Any] = {
    "depth": tuple(1 if i % 3 else FULL for i in range(12)),
    "ratio": (0.5,) * 12,
    "recovery": (LINE,),
}


class Halved(TimeRecovery):
    """Half of the last value."""

    kind: Literal["halved"] = "halved"

    def weights(self, times: Sequence[int], t: int, total: int) -> tuple[float, ...]:
        return (*(0.0,) * (len(times) - 1), 0.5)


# A calibrated plan is what was found.
SEARCHED = [
    s.name for s in systems() if s.config is not None and s.name not in ("calibrated", "l2p", "l2c")
] + [
    "deepcache+tome",
    "cat+deepcache",
    "fora+sito",
    "deepcache+atedm",
]


@pytest.mark.parametrize("name", SEARCHED)
def test_every_method_has_plans_that_are_configurations(name: str) -> None:
    space = space_of(name, 10)
    rng = random.Random(0)
    plans = [tuple(rng.randrange(size) for size in space.sizes) for _ in range(20)]
    uniform = space.uniform
    plans += [space.genes(rng.choice(uniform)) for _ in range(20)]
    found = [space.config(genes) for genes in plans]
    assert len(set(found)) > 5
    for config in found:
        assert isinstance(config, MethodConfig)
        assert len(recipe_of(config).plan.resample(10)) == 10
        assert config_from(config.model_dump(mode="json")) == config


def test_plans_of_dato_are_the_papers_and_may_prune_nothing_or_forecast() -> None:
    space = DaTo.space(4)
    assert space.names == ("depth", "ratio", "recovery")
    ratios = {0.0, 0.3, 0.4, 0.5, 0.6, 0.7}
    kinds = {REUSE, LINE, PARABOLA}
    assert [set(v.choices) for v in space.variables] == [{0, 1, FULL}] * 3 + [ratios] * 4 + [kinds] * 3
    config = space.config(space.genes((0, 1, FULL, 0.3, 0.4, 0.5, 0.6, *[REUSE] * 3)))
    assert config.schedule == Schedule(depth=(FULL, 0, 1, FULL), ratio=(0.3, 0.0, 0.5, 0.6))


def test_uniform_plans_of_dato_have_one_ratio_one_recovery_and_one_depth_between_full_calls() -> None:
    space = DaTo.space(12)
    intervals = set()
    for plan in space.uniform:
        depth, ratio, recovery = (FULL, *plan[:11]), plan[11:23], plan[23:]
        assert len(set(ratio)) == len(set(recovery)) == 1
        places = [i for i, d in enumerate(depth) if d == FULL]
        interval = places[1] - places[0] if len(places) > 1 else 12
        assert places == list(range(0, 12, interval))
        assert len({d for d in depth if d != FULL}) <= 1
        intervals.add(interval)
    assert intervals == set(range(1, 11))
    assert len(set(space.uniform)) == len(space.uniform) == (1 + 9 * 2 * 3) * 6
    plans = [space.config(space.genes(plan)) for plan in space.uniform]
    assert DaTo(schedule=Schedule(**BY_LINES | {"ratio": (0.3,) * 12})) in plans


def test_the_papers_plans_of_dato_are_two_choices_away() -> None:
    paper = (
        DaTo.space(12).with_choices("ratio", (0.3, 0.4, 0.5, 0.6, 0.7)).with_choices("recovery", ["reuse"])
    )
    assert len(paper.uniform) == (1 + 9 * 2) * 5
    for plan in paper.uniform:
        schedule = paper.config(paper.genes(plan)).schedule
        assert schedule.recovery == (REUSE,)
        assert all(step.ratio >= 0.3 for step in schedule.steps() if step.depth)


@pytest.mark.parametrize(
    ("depth", "first", "second"),
    [
        # A full call recovers nothing.
        ((FULL, FULL, FULL), "reuse taylor taylor2", "taylor taylor reuse"),
        ((FULL, 0, FULL, FULL), "reuse taylor taylor taylor2", "reuse taylor reuse reuse"),
        # Of one computed value all make the same, at every depth.
        ((0, 0, 1, FULL), "taylor reuse reuse reuse", "reuse reuse reuse reuse"),
        ((1, 1, FULL, 1), "taylor2 reuse reuse taylor", "taylor taylor taylor taylor"),
        (
            (1, FULL, 0, 1, FULL, 1),
            "taylor2 reuse reuse reuse reuse taylor",
            "reuse reuse reuse reuse taylor taylor",
        ),
    ],
)
def test_plans_that_do_the_same_are_one_configuration(
    depth: tuple[int, ...], first: str, second: str
) -> None:
    calls = len(depth) + 1
    space = DaTo.space(calls)

    def config(names: str) -> DaTo:
        values = (*depth, *(0.0,) * calls, *map(recovery_from, names.split()))
        found = space.config(space.genes(values))
        assert isinstance(found, DaTo)
        return found

    assert config(first) == config(second)
    other = second.rsplit(" ", 1)[0] + " taylor2"
    assert (config(other) == config(second)) == (depth[-1] == FULL or depth == (0, 0, 1, FULL))


def test_one_recovery_of_all_calls_that_recover_is_said_once() -> None:
    space = DaTo.space(12)
    depth = BY_LINES["depth"]
    names = [REUSE if d == FULL else LINE for d in depth[1:]]
    # Before the fourth call, which is the second full one, there is one value.
    names[:2] = [PARABOLA, REUSE]
    config = space.config(space.genes((*depth[1:], *BY_LINES["ratio"], *names)))
    assert config == DaTo(schedule=Schedule(**BY_LINES))
    assert config.schedule == Schedule.every(3, 12, depth=1, ratio=0.5).with_recovery(LINE).model_copy(
        update={"name": ""}
    )


def test_a_recovery_that_changes_a_single_value_is_kept() -> None:
    depth = (FULL, 0, 0, FULL, 0)
    assert used_recoveries(depth, (REUSE, REUSE, REUSE, REUSE, LINE)) == (LINE,)
    halved = Halved()
    assert used_recoveries(depth, (REUSE, REUSE, REUSE, REUSE, halved)) == (*(REUSE,) * 4, halved)
    assert used_recoveries(depth, (REUSE, halved, halved, REUSE, halved)) == (halved,)


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_what_is_left_of_a_plans_recoveries_gives_the_same_weights(data: st.DataObject) -> None:
    calls = data.draw(st.integers(1, 9))
    depth = (FULL, *data.draw(st.tuples(*[st.sampled_from((0, 1, 2, HEAD, LAYERS, FULL))] * (calls - 1))))
    kinds = st.sampled_from((REUSE, LINE, PARABOLA, Chebyshev(), Halved()))
    before = data.draw(st.tuples(*[kinds] * calls))
    used = used_recoveries(depth, before)
    after = used if len(used) == calls else used * calls
    assert used_recoveries(depth, after) == used
    for call, (one, other) in enumerate(zip(before, after, strict=True)):
        times = [i for i in range(call) if depth[i] > depth[call]]
        assert depth[call] == FULL or one.weights(times, call, calls) == other.weights(times, call, calls)


def test_depths_of_plans_of_one_call_are_full() -> None:
    assert DaTo.space(1).config((3,)).schedule == Schedule(depth=(FULL,), ratio=(0.5,))


def test_plans_that_choose_tokens_alike_are_counted_together() -> None:
    one, other = (DaTo(schedule=Schedule.every(n, 10, ratio=0.5)) for n in (2, 3))
    assert recipe_of(one).sites == recipe_of(other).sites
    assert recipe_of(one).sites != recipe_of(one.model_copy(update={"patch": 4})).sites


def test_configuration_for_another_number_of_calls_has_that_many() -> None:
    config = DaTo(schedule=Schedule.every(5, 50))
    assert config.at(20).schedule == config.schedule.resample(20)
    both = Combined(caching=Schedule.every(5, 50), tokens=SiTo(ratio=0.5))
    assert both.at(20).caching == both.caching.resample(20)
    assert FORA().at(20) == FORA()


@pytest.mark.parametrize("name", ["deepcache", "fora", "toca", "deepcache+tome", "fora+sito"])
def test_plans_of_methods_that_cache_reuse_or_forecast(name: str) -> None:
    space = space_of(name, 10)
    (one,) = (v for v in space.variables if v.name == "recovery")
    assert one.choices == (REUSE, LINE, PARABOLA)
    chosen = random.Random(0).sample(space.uniform, 20)
    plans = [space.config(space.genes(plan)) for plan in chosen]
    found = {
        next(s.recovery for s in recipe_of(plan).plan.resample(10).steps() if s.depth < FULL)
        for plan in plans
    }
    assert found == {REUSE, LINE, PARABOLA}


def test_beside_methods_that_choose_the_tokens_of_calls_nothing_is_forecast() -> None:
    space = space_of("cat+deepcache", 10)
    assert {v.choices for v in space.variables if v.name == "recovery"} == {(REUSE,)}


def test_recoveries_are_chosen_by_name_or_as_they_are() -> None:
    names = DaTo.space(6).with_choices("recovery", ("reuse", "taylor1", "taylor", "chebyshev"))
    same = DaTo.space(6).with_choices("recovery", (REUSE, LINE, {"kind": "chebyshev"}))
    assert [v.choices for v in names.variables[-5:]] == [(REUSE, LINE, Chebyshev())] * 5
    assert names.variables == same.variables
    assert {plan[-1] for plan in names.uniform} == {REUSE, LINE, Chebyshev()}
    depths = DaTo.space(6).with_choices("depth", ("head", 0, "full"))
    assert depths.variables[0].choices == (HEAD, 0, FULL)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        (
            "recovery",
            "tailor",
            "choices: recovery='tailor' is not allowed, it must be a recovery: reuse, taylor",
        ),
        ("recovery", "taylor99", "choices: recovery='taylor99' is not allowed, order: 99 is not allowed"),
        ("recovery", 0.5, "choices: recovery=0.5 is not allowed, it must be a recovery"),
        ("depth", "deep", "choices: depth='deep' is not allowed, it must be a whole number"),
        ("depth", 0.5, "choices: depth=0.5 is not allowed, it must be a whole number"),
    ],
)
def test_choices_that_cannot_be_are_refused(name: str, value: Any, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        DaTo.space(6).with_choices(name, (value,))


def test_a_plan_that_forecasts_some_calls_runs_and_differs_from_reuse() -> None:
    pipe, space = pipelines.sd(), DaTo.space(6)
    depths, ratios = (FULL, 1, 0, FULL, 1), (0.0,) * 6

    def run(*recoveries: TimeRecovery) -> tuple[Any, torch.Tensor]:
        config = space.config(space.genes((*depths, *ratios, *recoveries)))
        with regrow.apply(pipe, config) as applied:
            picture = pipelines.generate(pipe, num_inference_steps=6)
        return [row.depth for row in rows_of(applied)], picture

    done, reused = run(*[REUSE] * 5)
    assert done == ["full", "full", "1", "0", "full", "1"]
    deep, output, both = (
        run(REUSE, LINE, REUSE, REUSE, LINE),
        run(REUSE, REUSE, LINE, REUSE, REUSE),
        run(*[LINE] * 5),
    )
    assert deep[0] == output[0] == both[0] == done
    pictures = [reused, deep[1], output[1], both[1]]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(pictures, 2))
    assert torch.equal(run(LINE, REUSE, REUSE, PARABOLA, REUSE)[1], reused)


def test_other_choices_replace_those_of_their_kind() -> None:
    space = DaTo.space(6).with_choices("depth", (FULL, 1))
    assert [v.choices for v in space.variables[:5]] == [(FULL, 1)] * 5
    assert space.variables[5:] == DaTo.space(6).variables[5:]
    assert space.uniform
    assert all(0 not in plan[:5] for plan in space.uniform)


@pytest.mark.parametrize(
    ("name", "choices", "said"), [("width", (1,), "depth, ratio, recovery"), ("depth", (), "at least one")]
)
def test_choices_that_are_none_are_refused(name: str, choices: tuple[int, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        DaTo.space(6).with_choices(name, choices)


@pytest.mark.parametrize("name", ["tome+sito", "dato+sito", "deepcache+tome+cat", "nothing"])
def test_methods_that_do_not_combine_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="method: '"):
        space_of(name, 10)


def test_one_more_variable_comes_last() -> None:
    space = free((Variable("ratio", (0.1, 0.2)),), SiTo).extended(
        Variable("steps", (5, 6)), lambda config, steps: (config, steps)
    )
    assert space.config((1, 0)) == (SiTo(ratio=0.2), 5)
    assert set(space.uniform) == {(r, s) for r in (0.1, 0.2) for s in (5, 6)}


def test_product_has_the_plans_of_both() -> None:
    one, other = (Space((Variable(n, (1, 2)),), lambda v: v[0], ((1,), (2,))) for n in "ab")
    both = product(one, other, lambda a, b: (a, b))
    assert both.config((0, 1)) == (1, 2)
    assert set(both.uniform) == {(1, 1), (1, 2), (2, 1), (2, 2)}


def test_method_without_plans_says_so() -> None:
    with pytest.raises(ValueError, match="no plans"):
        MethodConfig.space(10)


def test_data_of_no_method_are_refused() -> None:
    with pytest.raises(ValueError, match="method: 'x' is not known"):
        config_from({"method": "x"})
    with pytest.raises(ValueError, match="alpha"):
        config_from(CATPruning().model_dump() | {"alpha": 2})


def test_wider_choices_bring_in_regular_plans_that_were_not_allowed() -> None:
    narrow = DaTo.space(6).with_choices("ratio", (0.3, 0.5))
    wide = narrow.with_choices("ratio", (0.0, 0.5))
    assert not any(0.0 in plan[5:11] for plan in narrow.uniform)
    assert {plan[10] for plan in wide.uniform} == {0.0, 0.5}
    plan = wide.config(wide.genes(next(p for p in wide.uniform if p[10] == 0.0 and 1 in p[:5])))
    assert plan.schedule.max_ratio == 0
    assert wide.with_choices("ratio", (0.3,)).uniform == narrow.with_choices("ratio", (0.3,)).uniform
