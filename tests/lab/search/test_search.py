"""The search as a whole, on a formula."""

import json
import math
import multiprocessing
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from stub import CALLS, OBJECTIVES, Stub, deviation, front_of, killed, macs, search, space

from regrow import DaTo
from regrow.lab.search.evaluation import Candidate, Job, Outcome
from regrow.lab.search.objectives import Cost, Quality
from regrow.lab.search.proposals import hypervolume
from regrow.lab.search.result import to_dict
from regrow.lab.search.search import Algorithm, AllFailedError, Budget, Economy, Known, check_economy
from regrow.lab.workers import LocalWorkers
from regrow.schedule import FULL, Schedule


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
    forks = multiprocessing.get_context("fork")
    for number in (5, 9):
        process = forks.Process(target=killed, args=(tmp_path / "two", number))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    rest = Stub()
    assert front_of(search(tmp_path / "two", rest).run(Budget(generations=6))) == expected
    log = (tmp_path / "two" / "log.jsonl").read_text().splitlines()
    assert len(log) - 6 == 14 + len(rest.jobs)


def test_results_that_come_in_another_order_change_nothing(tmp_path: Path) -> None:
    class Backwards(LocalWorkers[Job, Outcome]):
        def run(self, jobs: Sequence[Job]) -> Iterator[tuple[int, Outcome]]:
            yield from reversed([*super().run(jobs)])

    expected = front_of(search(tmp_path / "one", Stub()).run(Budget(generations=6)))
    found = search(tmp_path / "two", Stub())
    found._workers = Backwards(Stub)
    assert front_of(found.run(Budget(generations=6))) == expected
    rest = Stub()
    assert front_of(search(tmp_path / "two", rest).run(Budget(generations=6))) == expected
    assert not rest.jobs


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
    first = [k for k in found.known.values() if k.generation is not None and k.generation < 3]
    assert all(_ratios(k) == {0.5} for k in first)
    depths = {k.candidate.config.schedule.depth for k in first if k.prompts == 8}
    second = [k for k in found.known.values() if k.generation in (3, 4, 5)]
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


def test_what_is_compared_with_changes_nothing(tmp_path: Path) -> None:
    expected = front_of(search(tmp_path / "one", Stub()).run(Budget(generations=4)))
    beside = search(tmp_path / "two", Stub())
    cheap = DaTo(schedule=Schedule.every(3, CALLS, depth=1, ratio=0.7))
    one = search(tmp_path / "one", Stub())
    one.run(Budget(generations=4))
    # Also one that the search proposes itself.
    candidates = [Candidate(CALLS, cheap), next(iter(one.known.values())).candidate]
    beside.compare_with(candidates)
    assert front_of(beside.run(Budget(generations=4))) == expected
    assert beside.history == one.history
    assert [k.prompts for k in beside.known.values()] == [k.prompts for k in one.known.values()]


def test_plan_that_was_given_up_is_measured_to_be_compared_with(tmp_path: Path) -> None:
    found = search(tmp_path, Stub(), patience=1.1)
    found.run(Budget(generations=6))
    given_up = next(k.candidate for k in found.known.values() if k.given_up)
    (measured,) = search(tmp_path, Stub(), patience=1.1).compare_with([given_up])
    assert measured.prompts == 8
    assert not measured.given_up


def test_what_an_interrupted_round_measured_counts(tmp_path: Path) -> None:
    found = search(tmp_path, Stub((5, stop)), prompts=(8,), patience=None)
    with pytest.raises(Stopped):
        found.run(Budget(generations=6))
    assert sum(k.prompts == 8 for k in found.known.values()) == 5
    assert found.front()
    assert found.pictures == 5 * 8
    result = to_dict(found, [], {}, {})
    assert (result["evaluated"], result["pictures"]) == (5, 40)
    assert len(result["plans"]) > 5


def test_figures_that_are_no_numbers_are_given_up(tmp_path: Path) -> None:
    class Overflowing(Stub):
        def __call__(self, job: Job) -> Outcome:
            out = super().__call__(job)
            bad = len(self.jobs) % 3 == 0
            return (
                Outcome({"deviation": (math.nan,) * (job.stop - job.start)}, {}, (math.nan,) * 4)
                if bad
                else out
            )

    found = search(tmp_path, Overflowing())
    plans = found.run(Budget(generations=4))
    assert plans
    assert all(math.isfinite(p.value(Quality.DEVIATION)) for p in plans)
    assert any(k.given_up for k in found.known.values())


class Failing(Stub):
    """Can't run a third of the plans, or none at all; in a generation with no more memory.

    Args:
        divisor: every plan whose key it divides fails.
    """

    def __init__(self, divisor: int) -> None:
        super().__init__()
        self._divisor = divisor

    def __call__(self, job: Job) -> Outcome:
        out = super().__call__(job)
        fails = int(job.candidate.key, 16) % self._divisor == 0
        return Outcome(error=f"no memory for {job.candidate.key}") if fails else out


def test_plans_that_fail_are_given_up_and_tried_once_more_when_resumed(tmp_path: Path) -> None:
    whole = search(tmp_path, Failing(3))
    expected = front_of(whole.run(Budget(generations=4)))
    failed = {key: k for key, k in whole.known.items() if k.error is not None}
    assert failed
    assert all(k.given_up and k.error == f"no memory for {key}" for key, k in failed.items())
    assert not failed.keys() & {key for key, *_ in expected}
    rest = Failing(3)
    again = search(tmp_path, rest)
    assert front_of(again.run(Budget(generations=4))) == expected
    assert {job.candidate.key for job in rest.jobs} == failed.keys()
    (beside,) = again.compare_with([next(iter(failed.values())).candidate])
    assert beside.error is not None
    healthy = search(tmp_path, Stub())
    healthy.run(Budget(generations=4))
    assert not any(k.error for k in healthy.known.values())


def test_failed_plans_are_not_bred_from(tmp_path: Path) -> None:
    found = search(tmp_path, Failing(3))
    found.run(Budget(generations=2))
    failed = next(k for k in found.known.values() if k.error is not None)
    worst = found._worst()
    assert all(told > bound for told, bound in zip(found._told(failed, worst), worst, strict=True))


def test_log_without_errors_of_an_older_version_is_gone_on_with(tmp_path: Path) -> None:
    expected = front_of(search(tmp_path, Stub()).run(Budget(generations=3)))
    log = tmp_path / "log.jsonl"
    records = [json.loads(line) for line in log.read_text().splitlines()]
    for record in records:
        record.pop("error", None)
    log.write_text("".join(json.dumps(record) + "\n" for record in records))
    rest = Stub()
    assert front_of(search(tmp_path, rest).run(Budget(generations=3))) == expected
    assert not rest.jobs


def test_search_of_nothing_that_can_be_run_says_why(tmp_path: Path) -> None:
    stub = Failing(1)
    with pytest.raises(AllFailedError, match=r"all 8 plans failed; the last one: no memory for"):
        search(tmp_path, stub).run(Budget(generations=4))
    assert len(stub.jobs) == 8


def test_plans_that_all_fail_on_more_prompts_end_the_search(tmp_path: Path) -> None:
    class Narrow(Stub):
        def __call__(self, job: Job) -> Outcome:
            out = super().__call__(job)
            return Outcome(error="no memory") if job.stop > 2 else out

    with pytest.raises(AllFailedError, match="the last one: no memory"):
        search(tmp_path, Narrow(), patience=None).run(Budget(generations=4))


def test_space_of_one_plan_is_searched_once(tmp_path: Path) -> None:
    stub = Stub()
    found = search(tmp_path, stub)
    found.space = found.space.with_choices("depth", (FULL,)).with_choices("ratio", (0.5,))
    assert len(found.run(Budget(generations=6))) == 1
    assert len({job.candidate.key for job in stub.jobs}) == 1


@pytest.mark.parametrize(("budget", "stages"), [(1, (1, 0)), (6, (3, 3)), (7, (4, 3))])
def test_stages_divide_the_budget(tmp_path: Path, budget: int, stages: tuple[int, int]) -> None:
    found = search(tmp_path, Stub(), algorithm=Algorithm.STAGED)
    found.run(Budget(generations=budget))
    assert len(found.history) == budget
    first = {k.generation for k in found.known.values() if _ratios(k) == {0.5}}
    assert max(first) + 1 == stages[0]


def _ratios(known: Known) -> set[float]:
    return {step.ratio for step in known.candidate.config.schedule.steps() if step.depth}


def test_giving_up_needs_objectives_that_are_known_early() -> None:
    economy = Economy(prompts=(2, 8), patience=2)
    check_economy(economy, (Cost.MACS, Quality.DEVIATION))
    for objectives in (
        (Quality.PSNR, Cost.MACS),
        (Quality.DEVIATION, Cost.LATENCY),
        (*OBJECTIVES, Quality.PSNR),
    ):
        with pytest.raises(ValueError, match=r"patience: 2\.0"):
            check_economy(economy, objectives)


def test_figure_of_all_pictures_together_takes_one_number_of_prompts(tmp_path: Path) -> None:
    found = search(tmp_path, Stub())
    with pytest.raises(ValueError, match=r"prompts.*quality:fd"):
        type(found)(space(), (Quality.FD, *OBJECTIVES[1:]), macs, None, None, Economy(prompts=(2, 8)))


@pytest.mark.parametrize("prompts", [(), (0, 2), (4, 2), (2, 2)])
def test_numbers_of_prompts_ascend(prompts: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="prompts"):
        Economy(prompts=prompts)
