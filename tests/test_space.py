"""What methods leave open, and how a plan becomes a configuration."""

import random

import pytest

from regrow.methods import FORA, CATPruning, Combined, DaTo, SiTo
from regrow.methods.base import MethodConfig
from regrow.methods.catalogue import config_from, space_of, systems
from regrow.methods.parts import parts_of
from regrow.schedule import FULL, Schedule
from regrow.space import Space, Variable, free, product

# A calibrated plan is what was found.
SEARCHED = [s.name for s in systems() if s.config is not None and s.name not in ("calibrated", "l2p")] + [
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
    plans += [space.genes(rng.choice(space.uniform)) for _ in range(20)]
    found = [space.config(genes) for genes in plans]
    assert len(set(found)) > 5
    for config in found:
        assert isinstance(config, MethodConfig)
        assert len(parts_of(config).plan.resample(10)) == 10
        assert config_from(config.model_dump(mode="json")) == config


def test_plans_of_dato_are_the_papers_and_may_prune_nothing() -> None:
    space = DaTo.space(4)
    assert space.names == ("depth", "ratio")
    ratios = {0.0, 0.3, 0.4, 0.5, 0.6, 0.7}
    assert [set(v.choices) for v in space.variables] == [{0, 1, FULL}] * 3 + [ratios] * 4
    config = space.config(space.genes((0, 1, FULL, 0.3, 0.4, 0.5, 0.6)))
    assert config.schedule == Schedule(depth=(FULL, 0, 1, FULL), ratio=(0.3, 0.0, 0.5, 0.6))


def test_uniform_plans_of_dato_have_one_ratio_and_one_depth_between_full_calls() -> None:
    space = DaTo.space(12)
    intervals = set()
    for plan in space.uniform:
        depth, ratio = (FULL, *plan[:11]), plan[11:]
        assert len(set(ratio)) == 1
        places = [i for i, d in enumerate(depth) if d == FULL]
        interval = places[1] - places[0] if len(places) > 1 else 12
        assert places == list(range(0, 12, interval))
        assert len({d for d in depth if d != FULL}) <= 1
        intervals.add(interval)
    assert intervals == set(range(1, 11))
    assert len(set(space.uniform)) == len(space.uniform) == (1 + 9 * 2) * 6


def test_depths_of_plans_of_one_call_are_full() -> None:
    assert DaTo.space(1).config((3,)).schedule == Schedule(depth=(FULL,), ratio=(0.5,))


def test_plans_that_choose_tokens_alike_are_counted_together() -> None:
    one, other = (DaTo(schedule=Schedule.every(n, 10, ratio=0.5)) for n in (2, 3))
    assert parts_of(one).tokens == parts_of(other).tokens
    assert parts_of(one).tokens != parts_of(one.model_copy(update={"patch": 4})).tokens


def test_configuration_for_another_number_of_calls_has_that_many() -> None:
    config = DaTo(schedule=Schedule.every(5, 50))
    assert config.at(20).schedule == config.schedule.resample(20)
    both = Combined(caching=Schedule.every(5, 50), tokens=SiTo(ratio=0.5))
    assert both.at(20).caching == both.caching.resample(20)
    assert FORA().at(20) == FORA()


def test_other_choices_replace_those_of_their_kind() -> None:
    space = DaTo.space(6).with_choices("depth", (FULL, 1))
    assert [v.choices for v in space.variables[:5]] == [(FULL, 1)] * 5
    assert space.variables[5:] == DaTo.space(6).variables[5:]
    assert space.uniform
    assert all(0 not in plan[:5] for plan in space.uniform)


@pytest.mark.parametrize(
    ("name", "choices", "said"), [("width", (1,), "depth, ratio"), ("depth", (), "at least one")]
)
def test_choices_that_are_none_are_refused(name: str, choices: tuple[int, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        DaTo.space(6).with_choices(name, choices)


@pytest.mark.parametrize("name", ["tome+sito", "dato+sito", "deepcache+tome+cat", "nothing", "tokencache"])
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
    assert not any(0.0 in plan[5:] for plan in narrow.uniform)
    assert {plan[-1] for plan in wide.uniform} == {0.0, 0.5}
    plan = wide.config(wide.genes(next(p for p in wide.uniform if p[-1] == 0.0 and 1 in p[:5])))
    assert plan.schedule.max_ratio == 0
    assert wide.with_choices("ratio", (0.3,)).uniform == narrow.with_choices("ratio", (0.3,)).uniform
