"""The search as a whole, on a formula."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from search.stub import CALLS, OBJECTIVES, Stub, deviation, front_of, macs, search, space

from regrow.methods import DaTo
from regrow.schedule import FULL, Schedule
from regrow.search.evaluation import Candidate
from regrow.search.objectives import Quality
from regrow.search.proposals import hypervolume
from regrow.search.search import Algorithm, Budget, Economy


class Stopped(BaseException):
    """Stands for whatever ends a process."""


def stop() -> None:
    raise Stopped


def test_front_is_measured_on_all_prompts_and_dominated_by_nothing_that_is(tmp_path: Path) -> None:
    found = search(tmp_path, Stub())
    plans = found.run(Budget(generations=6))
    assert len(plans) > 3
    assert all(plan.prompts == 8 for plan in plans)
    for plan in plans:
        exact = sum(deviation(plan.candidate, i) for i in range(8)) / 8
        assert plan.value(Quality.DEVIATION) == pytest.approx(exact)
        assert plan.macs == macs(plan.candidate)
    full = [k.values(OBJECTIVES) for k in found.known.values() if k.prompts == 8]
    for plan in plans:
        one = plan.values(OBJECTIVES)
        assert not any(a <= one[0] and b <= one[1] and (a, b) != one for a, b in full)
    assert [p.macs for p in plans] == sorted((p.macs for p in plans), reverse=True)


def test_no_plan_is_evaluated_twice_on_a_prompt(tmp_path: Path) -> None:
    stub = Stub()
    search(tmp_path, stub).run(Budget(generations=6))
    done = [
        (job.candidate.key, i) for job in stub.jobs if job.candidate for i in range(job.start, job.stop)
    ]
    assert len(done) == len(set(done))


def test_only_the_promising_are_measured_on_more(tmp_path: Path) -> None:
    stub, plain = Stub(), Stub()
    few = search(tmp_path / "few", stub)
    few.run(Budget(generations=6))
    search(tmp_path / "all", plain, prompts=(8,), patience=None).run(Budget(generations=6))
    pictures = [sum(job.stop - job.start for job in s.jobs) for s in (stub, plain)]
    assert pictures[0] < 0.9 * pictures[1]
    assert {k.prompts for k in few.known.values()} > {2, 8}
    assert few.spent[-1][0] == pictures[0]


def test_hopeless_plans_are_given_up_and_stay_off_the_front(tmp_path: Path) -> None:
    found = search(tmp_path, Stub(), patience=1.1)
    plans = found.run(Budget(generations=6))
    given_up = [k for k in found.known.values() if k.given_up]
    assert given_up
    assert all(not k.quality and 0 < len(k.curve) < 4 for k in given_up)
    assert not {k.candidate.key for k in given_up} & {p.candidate.key for p in plans}
    without = search(tmp_path / "without", Stub(), patience=None)
    without.run(Budget(generations=6))
    assert not any(k.given_up for k in without.known.values())


@pytest.mark.parametrize("number", [0, 7, 23])
@pytest.mark.parametrize("algorithm", [Algorithm.NSGA2, Algorithm.STAGED, Algorithm.RANDOM])
def test_stopped_search_goes_on_as_if_it_had_not_been(
    tmp_path: Path, number: int, algorithm: Algorithm
) -> None:
    whole = Stub()
    undisturbed = search(tmp_path / "one", whole, algorithm=algorithm)
    expected = front_of(undisturbed.run(Budget(generations=6)))
    with pytest.raises(Stopped):
        search(tmp_path / "two", Stub((number, stop)), algorithm=algorithm).run(Budget(generations=6))
    rest = Stub()
    again = search(tmp_path / "two", rest, algorithm=algorithm)
    assert front_of(again.run(Budget(generations=6))) == expected
    assert again.history == undisturbed.history
    assert len(rest.jobs) == len(whole.jobs) - number


def test_search_killed_by_the_system_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    expected = front_of(search(tmp_path / "one", Stub()).run(Budget(generations=6)))
    here = Path(__file__).with_name("stub.py")
    for number in (5, 9):
        words = [sys.executable, str(here), str(tmp_path / "two"), str(number)]
        assert subprocess.run(words, check=False).returncode == -signal.SIGKILL
    rest = Stub()
    assert front_of(search(tmp_path / "two", rest).run(Budget(generations=6))) == expected
    log = (tmp_path / "two" / "log.jsonl").read_text().splitlines()
    assert len(log) - 6 == 14 + len(rest.jobs)


def test_more_budget_goes_on_where_less_ended(tmp_path: Path) -> None:
    search(tmp_path / "two", Stub()).run(Budget(generations=3))
    more = front_of(search(tmp_path / "two", Stub()).run(Budget(generations=6)))
    assert more == front_of(search(tmp_path / "one", Stub()).run(Budget(generations=6)))


def test_seconds_of_earlier_runs_count(tmp_path: Path) -> None:
    search(tmp_path, Stub()).run(Budget(generations=3))
    rest = Stub()
    again = search(tmp_path, rest)
    again.run(Budget(seconds=1e-9))
    assert len(again.history) == 1
    assert not rest.jobs


def test_another_seed_proposes_other_plans(tmp_path: Path) -> None:
    one, two = (search(tmp_path / str(seed), Stub(), seed=seed) for seed in (0, 1))
    for found in (one, two):
        found.run(Budget(generations=2))
    assert one.known.keys() != two.known.keys()


def test_nsga_finds_more_than_chance_with_as_many_plans(tmp_path: Path) -> None:
    volumes = {}
    for algorithm in (Algorithm.NSGA2, Algorithm.RANDOM):
        options = {"algorithm": algorithm, "prompts": (2,), "patience": None, "population": 20}
        plans = search(tmp_path / algorithm.value, Stub(), **options).run(Budget(generations=20))
        volumes[algorithm] = hypervolume([p.values(OBJECTIVES) for p in plans], (1.0, 1.0))
    assert volumes[Algorithm.NSGA2] > 1.05 * volumes[Algorithm.RANDOM]


def test_stages_search_the_depths_first_and_the_ratios_after(tmp_path: Path) -> None:
    found = search(tmp_path, Stub(), algorithm=Algorithm.STAGED)
    found.run(Budget(generations=6))
    first = [k for k in found.known.values() if k.generation is not None and k.generation < 2]
    steps = [step for k in first for step in k.candidate.config.schedule.steps()]
    ratios = {step.ratio for step in steps if step.depth}
    assert ratios == {0.5}
    depths = {k.candidate.config.schedule.depth for k in first if k.prompts == 8}
    second = [k for k in found.known.values() if k.generation in (2, 3)]
    assert second
    assert {k.candidate.config.schedule.depth for k in second} <= depths


def test_what_is_compared_with_is_measured_on_all_prompts_and_not_on_the_front(tmp_path: Path) -> None:
    found = search(tmp_path, Stub())
    config = DaTo(schedule=Schedule(depth=(FULL,) * CALLS, ratio=(0.0,) * CALLS))
    (best,) = found.compare_with([Candidate(CALLS, config)])
    assert best.prompts == 8
    assert best.value(Quality.DEVIATION) == 0
    plans = found.run(Budget(generations=3))
    assert best.candidate.key not in {p.candidate.key for p in plans}
    assert found.spent[-1][0] == sum(k.prompts or 2 for k in found.known.values() if k is not best)


def test_figure_of_all_pictures_together_takes_one_number_of_prompts(tmp_path: Path) -> None:
    found = search(tmp_path, Stub())
    with pytest.raises(ValueError, match=r"prompts.*quality:fd"):
        type(found)(space(), (Quality.FD, *OBJECTIVES[1:]), macs, None, None, Economy(prompts=(2, 8)))


@pytest.mark.parametrize("prompts", [(), (0, 2), (4, 2), (2, 2)])
def test_numbers_of_prompts_ascend(prompts: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="prompts"):
        Economy(prompts=prompts)
