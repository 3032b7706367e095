"""Which plans come next, and what a front is."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regrow.lab.search.proposals import (
    Chance,
    Nsga2,
    Operators,
    first_generation,
    front,
    hypervolume,
    pick,
)

points = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 3)), max_size=25)


@given(points)
@settings(max_examples=200, deadline=None)
def test_front_is_what_nothing_dominates(values: list[tuple[int, ...]]) -> None:
    def dominated(one: tuple[int, ...]) -> bool:
        return any(all(a <= b for a, b in zip(o, one, strict=True)) and o != one for o in values)

    expected = [i for i, v in enumerate(values) if not dominated(v) and v not in values[:i]]
    found = front(values)
    assert sorted(found) == expected
    assert [values[i][-1] for i in found] == sorted((values[i][-1] for i in found), reverse=True)


def test_hypervolume_of_boxes() -> None:
    assert hypervolume([(0.25, 0.5)], (1, 1)) == pytest.approx(0.375)
    assert hypervolume([(0.25, 0.5), (0.5, 0.25)], (1, 1)) == pytest.approx(0.5)
    assert hypervolume([(2, 0)], (1, 1)) == 0
    assert hypervolume([], (1, 1)) == 0


def test_pick_is_quality_plus_weighted_cost() -> None:
    values = [(0.0, 10.0), (1.0, 5.0), (4.0, 1.0)]
    assert [pick(values, w) for w in (0.1, 0.5, 2.0)] == [0, 1, 2]


def test_first_generation_mixes_uniform_plans_with_chance() -> None:
    sizes, uniform = (3,) * 10, [(i,) * 10 for i in range(3)]
    plans = first_generation(sizes, uniform, Operators(population=10, uniform=0.2), 0)
    assert len(set(plans)) == 10
    assert sum(plan in uniform for plan in plans) == 2
    assert plans == first_generation(sizes, uniform, Operators(population=10, uniform=0.2), 0)
    assert plans != first_generation(sizes, uniform, Operators(population=10, uniform=0.2), 1)


def told(genes: tuple[int, ...]) -> tuple[float, float]:
    return float(sum(genes)), float(-sum(g * (i + 1) for i, g in enumerate(genes)))


def test_nsga_is_a_function_of_its_seed() -> None:
    def run(seed: int) -> list[list[tuple[int, ...]]]:
        operators = Operators(population=6)
        proposals = Nsga2((3, 4, 1, 5, 2), [(0, 0, 0, 0, 0), (2, 3, 0, 4, 1)], 2, operators, seed)
        out = []
        for _ in range(6):
            out.append(proposals.ask())
            proposals.tell([told(genes) for genes in out[-1]])
        return out

    one = run(0)
    assert one == run(0)
    assert one != run(1)
    every = [genes for plans in one for genes in plans]
    assert all(len(plans) == len(set(plans)) for plans in one)
    assert all(0 <= g < size for genes in every for g, size in zip(genes, (3, 4, 1, 5, 2), strict=True))
    assert all(len(plans) == 6 for plans in one[1:])


@pytest.mark.parametrize("kind", ["nsga", "chance"])
def test_variables_with_one_choice_change_no_proposal(kind: str) -> None:
    """A search of before recoveries could be chosen goes on with one of them."""
    operators = Operators(population=6)

    def run(sizes: tuple[int, ...], more: int) -> list[list[tuple[int, ...]]]:
        uniform = [(i % 3, i % 4, i, 0, *(0,) * more) for i in range(5)]
        first = first_generation(sizes, uniform, operators, 3)
        proposals = Nsga2(sizes, first, 2, operators, 3) if kind == "nsga" else Chance(sizes, 6, 3)
        out = []
        for _ in range(6):
            out.append(proposals.ask())
            proposals.tell([told(genes[:4]) for genes in out[-1]])
        return out

    before, now = run((3, 4, 5, 2), 0), run((3, 4, 5, 2, 1, 1), 2)
    assert now == [[(*genes, 0, 0) for genes in plans] for plans in before]


@pytest.mark.parametrize("kind", ["nsga", "chance"])
def test_small_space_is_used_up(kind: str) -> None:
    sizes = (2, 3, 2)
    first = [(0, 0, 0), (1, 2, 1)]
    operators = Operators(population=4)
    proposals = Nsga2(sizes, first, 2, operators, 0) if kind == "nsga" else Chance(sizes, 4, 0)
    seen: list[tuple[int, ...]] = []
    while asked := proposals.ask():
        seen += asked
        proposals.tell([told(genes) for genes in asked])
    assert set(seen) == set(np.ndindex(*sizes))
