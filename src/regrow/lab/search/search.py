"""The search: it proposes plans, evaluates the promising ones on more prompts, and keeps the front."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from math import inf, isfinite
from typing import Any

from pydantic import Field, TypeAdapter, ValidationError, model_validator
from typing_extensions import NotRequired, TypedDict

from regrow.fields import Checked, Count
from regrow.lab.search.evaluation import QUARTERS, Candidate, Job, Outcome, outcome_from
from regrow.lab.search.log import Log
from regrow.lab.search.objectives import Cost, Objective, Quality, minimised
from regrow.lab.search.proposals import (
    Chance,
    Genes,
    Nsga2,
    Operators,
    Proposals,
    first_generation,
    front,
)
from regrow.lab.workers import Workers
from regrow.space import Space


class Algorithm(str, Enum):
    """The way in which plans are proposed."""

    NSGA2 = "nsga2"
    """All variables at once, as in DaTo's paper."""
    STAGED = "staged"
    """One kind of variable after the other, each with its share of the budget: first the depths, then the
    ratios for the best depths, as in DaTo's released code."""
    RANDOM = "random"
    """At random."""


class _Evaluated(TypedDict):
    """An evaluation in the log."""

    key: str
    start: int
    stop: int
    quality: dict[str, list[float]]
    cost: dict[str, float]
    curve: list[float]
    seconds: float
    error: NotRequired[str | None]


class _Ended(TypedDict):
    """The end of a generation in the log."""

    generation: int
    seconds: float


_LINE = TypeAdapter[_Evaluated | _Ended](_Evaluated | _Ended)


class AllFailedError(ValueError):
    """No plan could be run."""


class Economy(Checked):
    """The ways in which a search avoids evaluations.

    Args:
        prompts: numbers of prompts, ascending. Every plan is measured on the first number; plans that no
            known plan dominates are measured on the next ones too, up to the last (successive halving by
            fronts). With a single number, every plan is measured on all.
        patience: a plan is given up within a generation if, at the end of a quarter of the run, its
            deviation is ``patience`` times the final one of a plan that costs no more. None: all finish.
    """

    prompts: tuple[Count, ...] = Field(min_length=1, max_length=100)
    patience: float | None = Field(None, gt=1, le=1_000_000)

    @model_validator(mode="after")
    def _ascending(self) -> Economy:
        if list(self.prompts) != sorted(set(self.prompts)) or self.prompts[0] < 1:
            raise ValueError(f"prompts: {self.prompts} is not allowed, it must ascend from >= 1")
        return self


@dataclass
class Known:
    """The figures of a plan.

    Args:
        candidate: the plan.
        macs: MACs of the denoiser, as a share of the unaccelerated run.
        prompts: number of prompts that it was measured on.
        quality: by name, a figure for each of these prompts, or one for all together.
        cost: measured costs, by name.
        curve: deviation at the quarters, on the first prompts.
        given_up: it was given up, or failed.
        error: why it failed.
        generation: generation that first proposed it; None for plans that the front is compared with.
    """

    candidate: Candidate
    macs: float
    generation: int | None
    prompts: int = 0
    quality: dict[str, list[float]] = field(default_factory=dict)
    cost: dict[str, float] = field(default_factory=dict)
    curve: tuple[float, ...] = ()
    given_up: bool = False
    error: str | None = None

    def value(self, kind: Objective) -> float:
        """Compute the figure of an objective, the mean over pictures; the worst if unknown or given up."""
        if kind is Cost.MACS:
            return self.macs
        if isinstance(kind, Cost):
            return self.cost.get(kind.value, inf)
        values = self.quality.get(kind.value)
        return sum(values) / len(values) if values else -inf if kind.higher_is_better else inf

    def values(self, objectives: Sequence[Objective]) -> tuple[float, ...]:
        """Compute all objectives; less is better."""
        return tuple(minimised(kind, self.value(kind)) for kind in objectives)


@dataclass(frozen=True)
class Budget:
    """The limits of a search; without any, it ends when no new plan is left.

    Args:
        generations: most generations.
        seconds: longest time, with earlier runs; the generation in which it is reached is the last.
    """

    generations: int | None = None
    seconds: float | None = None

    def part(self, share: float) -> Budget:
        """Take a share of it, at least one generation."""
        return Budget(
            None if self.generations is None else max(1, round(self.generations * share)),
            None if self.seconds is None else self.seconds * share,
        )

    def spent(self, generations: float, seconds: float) -> float | None:
        """Compute the share that is spent; None if there is no limit."""
        shares = [generations / self.generations] if self.generations is not None else []
        shares += [seconds / self.seconds] if self.seconds is not None else []
        return max(shares, default=None)


@dataclass(frozen=True)
class SearchProgress:
    """The progress of a search.

    Args:
        generation: index of the generation, from 0.
        done: number of finished evaluations in this generation's present round.
        total: number of evaluations in this round.
        evaluated: number of evaluated plans.
        share: share of the budget that is spent, 0 to 1; None if there is no limit.
        front: plans that nothing dominates, measured on all prompts.
    """

    generation: int
    done: int
    total: int
    evaluated: int
    share: float | None
    front: Sequence[Known]


class Search:
    """A search that resumes where its log ends.

    Everything follows from the settings, the seed and the evaluations in the log: a killed search that is
    started again proposes the same plans, reads known results from the log, and evaluates the rest.

    Args:
        space: the plans; decodes to a `Candidate`.
        objectives: what is minimised.
        macs: MACs of a plan as a share of the unaccelerated run.
        workers: evaluate `Job`s, as an `Evaluator` does.
        log: the log of evaluations.
        economy: how the search avoids evaluations.
        algorithm: how plans are proposed.
        operators: settings of NSGA-II.
        seed: seed of all random choices.
        on_progress: called after every evaluation.

    Raises:
        ValueError: if quality is measured on all pictures together and more than one number of prompts is
            given.
    """

    def __init__(
        self,
        space: Space,
        objectives: Sequence[Objective],
        macs: Callable[[Candidate], float],
        workers: Workers,
        log: Log,
        economy: Economy,
        algorithm: Algorithm = Algorithm.NSGA2,
        operators: Operators = Operators(),  # noqa: B008
        seed: int = 0,
        on_progress: Callable[[SearchProgress], None] = lambda progress: None,
    ) -> None:
        check_economy(economy, objectives)
        self.space, self.objectives, self.economy = space, tuple(objectives), economy
        self.algorithm, self.operators, self.seed = algorithm, operators, seed
        self.known: dict[str, Known] = {}
        self.history: list[list[tuple[float, ...]]] = []
        """Objectives of the front after each generation."""
        self.spent: list[tuple[int, float]] = []
        """Pictures and seconds until the end of each generation."""
        self.pictures = 0
        """Number of pictures generated so far."""
        self._macs, self._workers, self._log, self._on_progress = macs, workers, log, on_progress
        records = log.records
        for number, record in enumerate(records, 1):
            try:
                _LINE.validate_python(record)
            except ValidationError as error:
                raise log.damaged(number) from error
        # Plans that failed are tried again: the reason may be gone.
        done = [r for r in records if "key" in r and r.get("error") is None]
        self._logged = {(r["key"], r["start"], r["stop"]): r for r in done}
        self._walls = {r["generation"]: r["seconds"] for r in records if "seconds" in r and "key" not in r}
        self._genes: dict[str, Genes] = {}
        self._shown: Sequence[Known] = ()
        self._budget, self._begin = Budget(), time.monotonic()

    def compare_with(self, candidates: Iterable[Candidate]) -> list[Known]:
        """Measure plans on all prompts, to compare the front with them; they are not part of it."""
        # Kept apart: the proposals must not depend on the plans that the front is compared with.
        found = [Known(candidate, self._macs(candidate), None) for candidate in candidates]
        while rows := [k for k in found if k.prompts < self.economy.prompts[-1] and not k.given_up]:
            self._measure(rows)
        return found

    def run(self, budget: Budget) -> list[Known]:
        """Search until the budget is spent. A plan that can't be run is given up.

        Returns:
            the front, by cost, highest first.

        Raises:
            AllFailedError: if none of the plans of a generation can be run.
        """
        self._budget = budget
        names = [
            n
            for n in self.space.names
            if any(v.name == n and len(v.choices) > 1 for v in self.space.variables)
        ]
        if self.algorithm is not Algorithm.STAGED or len(names) < 2:
            self._stage(_whole(self.space), budget)
            return self.front()
        for number, name in enumerate(names, 1):
            stage = _part(self.space, name, [self._genes[k.candidate.key] for k in self.front()])
            self._stage(stage, budget.part(number / len(names)))
        return self.front()

    def front(self) -> list[Known]:
        """List the plans that nothing dominates, measured on all prompts; by cost, highest first."""
        full = [k for k in self.known.values() if k.prompts == self.economy.prompts[-1]]
        return [full[i] for i in front([k.values(self.objectives) for k in full])]

    def _stage(self, stage: _Stage, budget: Budget) -> None:
        """Propose and evaluate until the budget is spent."""
        proposals = self._proposals(stage)
        while not self._over(budget):
            generation = len(self.history)
            self._begin = time.monotonic()
            asked = proposals.ask()
            if not asked:
                return
            known = []
            for genes in asked:
                whole = stage.expand(genes)
                candidate = self.space.config(whole)
                self._genes.setdefault(candidate.key, whole)
                known.append(self._of(candidate, generation))
            new = {k.candidate.key: k for k in known if not k.prompts and not k.given_up}
            self._measure([*new.values()])
            _check_some_work(known)
            while rows := self._promising():
                self._measure(rows)
            _check_some_work(known)
            worst = self._worst()
            proposals.tell([self._told(k, worst) for k in known])
            self._end(generation, time.monotonic() - self._begin)

    def _proposals(self, stage: _Stage) -> Proposals:
        seed = self.seed + len(self.history)
        if self.algorithm is Algorithm.RANDOM:
            return Chance(stage.sizes, self.operators.population, seed)
        first = first_generation(stage.sizes, stage.uniform, self.operators, seed)
        return Nsga2(stage.sizes, first, len(self.objectives), self.operators, seed)

    def _of(self, candidate: Candidate, generation: int) -> Known:
        """Look up the figures of a plan; new plans have only their MACs."""
        if candidate.key not in self.known:
            self.known[candidate.key] = Known(candidate, self._macs(candidate), generation)
        return self.known[candidate.key]

    def _promising(self) -> list[Known]:
        """List plans that nothing dominates so far, and that were measured on some prompts only."""
        rows = [k for k in self.known.values() if k.prompts]
        best = [rows[i] for i in front([k.values(self.objectives) for k in rows])]
        return [k for k in best if k.prompts < self.economy.prompts[-1]]

    def _measure(self, rows: Sequence[Known]) -> None:
        """Measure each plan on its next number of prompts; results in the log are read from there."""
        jobs = [self._job(known) for known in rows]
        outcomes: dict[int, Outcome] = {}
        missing = []
        for i, job in enumerate(jobs):
            record = self._logged.get((job.candidate.key, job.start, job.stop))
            # Plans that were given up are measured now if they must not be given up here.
            if record is None or (not record["quality"] and job.limits is None):
                missing.append(i)
            else:
                outcomes[i] = outcome_from(record)
        self._tell(0, len(missing))
        try:
            for done, (place, outcome) in enumerate(self._workers.run([jobs[i] for i in missing]), 1):
                outcomes[missing[place]] = outcome
                record = _record(jobs[missing[place]], outcome)
                self._log.append(record)
                self._logged[record["key"], record["start"], record["stop"]] = record
                self._tell(done, len(missing))
        finally:
            # In the order of the plans, not of completion; an interrupted round has only some of them.
            for i in sorted(outcomes):
                _add(rows[i], jobs[i], outcomes[i])
                if rows[i].generation is not None:
                    self.pictures += jobs[i].stop - jobs[i].start
            self._shown = self.front()

    def _job(self, known: Known) -> Job:
        stop = next(n for n in self.economy.prompts if n > known.prompts)
        limits = self._limits(known) if known.generation is not None and not known.prompts else None
        return Job(known.candidate, known.prompts, stop, limits)

    def _limits(self, known: Known) -> tuple[float, ...] | None:
        """Compute a plan's limits: patience times the last deviation of a plan that costs no more."""
        patience = self.economy.patience
        ends = [k.curve[-1] for k in self.known.values() if k.macs <= known.macs and k.prompts]
        return (patience * min(ends),) * QUARTERS if patience is not None and ends else None

    def _worst(self) -> tuple[float, ...]:
        """Find the worst figure of each objective so far."""
        rows = [k.values(self.objectives) for k in self.known.values()]
        return tuple(max((v for v in column if v < inf), default=1.0) for column in zip(*rows, strict=True))

    def _told(self, known: Known, worst: Sequence[float]) -> tuple[float, ...]:
        """Make the objectives for the proposals; a plan that was given up is worse than all others."""
        if known.error is not None:
            return tuple(bound + abs(bound) for bound in worst)
        values = known.values(self.objectives)
        far = known.curve[-1] if known.given_up and isfinite(known.curve[-1]) else 1.0
        return tuple(
            v if v < inf else bound + abs(bound) * far for v, bound in zip(values, worst, strict=True)
        )

    def _end(self, generation: int, seconds: float) -> None:
        """Log the duration of a generation, so that a resumed search ends at the same point."""
        before = self.spent[-1][1] if self.spent else 0.0
        if generation not in self._walls:
            self._walls[generation] = before + seconds
            self._log.append({"generation": generation, "seconds": before + seconds})
        self.spent.append((self.pictures, self._walls[generation]))
        self.history.append([k.values(self.objectives) for k in self.front()])

    def _over(self, budget: Budget) -> bool:
        share = budget.spent(len(self.history), self.spent[-1][1] if self.spent else 0.0)
        return share is not None and share >= 1

    def _tell(self, done: int, total: int) -> None:
        seconds = self.spent[-1][1] if self.spent else 0.0
        # The first round is most of a generation.
        within = 0.9 * done / total if total else 0.0
        share = self._budget.spent(len(self.history) + within, seconds + time.monotonic() - self._begin)
        self._on_progress(
            SearchProgress(len(self.history), done, total, len(self.known), share, self._shown)
        )


@dataclass(frozen=True)
class _Stage:
    """The part of a space that is searched now.

    Args:
        sizes: number of choices of each variable.
        uniform: plans with the same choice at every step.
        expand: makes the variables of the whole space from these.
    """

    sizes: tuple[int, ...]
    uniform: tuple[Genes, ...]
    expand: Callable[[Genes], Genes]


def _whole(space: Space) -> _Stage:
    """Take the whole space."""
    return _Stage(space.sizes, tuple(space.genes(plan) for plan in space.uniform), lambda genes: genes)


def _part(space: Space, name: str, found: Sequence[Genes]) -> _Stage:
    """Take the variables of one kind, and one more that chooses the plan for the other variables.

    Args:
        space: the space.
        name: name of the kind.
        found: plans found before; if there are none, every other variable has its middle choice.
    """
    bases = [*found] or [tuple(size // 2 for size in space.sizes)]
    places = [i for i, variable in enumerate(space.variables) if variable.name == name]

    def expand(genes: Genes) -> Genes:
        out = list(bases[genes[0]])
        for place, gene in zip(places, genes[1:], strict=True):
            out[place] = gene
        return tuple(out)

    parts = {tuple(space.genes(plan)[i] for i in places) for plan in space.uniform}
    uniform = tuple((base, *part) for part in sorted(parts) for base in range(len(bases)))
    return _Stage((len(bases), *(space.sizes[i] for i in places)), uniform, expand)


def _check_some_work(plans: Sequence[Known]) -> None:
    """Stop the search if no plan of a generation could be run."""
    errors = [known.error for known in plans if known.error is not None]
    if len(errors) == len(plans):
        raise AllFailedError(f"all {len(errors)} plans failed; the last one: {errors[-1]}")


def check_economy(economy: Economy, objectives: Sequence[Objective]) -> None:
    """Refuse an economy that is not possible with the objectives.

    Raises:
        ValueError: naming the field, the value and what is allowed.
    """
    together = [o for o in objectives if isinstance(o, Quality) and not o.by_picture]
    if together and len(economy.prompts) > 1:
        raise ValueError(
            f"prompts: {economy.prompts} is not allowed with quality:{together[0].value}, which is one "
            "figure for all pictures; it must be one number"
        )
    if economy.patience is not None and not may_give_up(objectives):
        raise ValueError(
            f"patience: {economy.patience} is allowed with quality:deviation and cost:macs only, which are "
            "known within a generation; it must be None"
        )


def may_give_up(objectives: Sequence[Objective]) -> bool:
    """Whether a plan can be given up within a generation."""
    return set(objectives) == {Quality.DEVIATION, Cost.MACS}


def _record(job: Job, outcome: Outcome) -> dict[str, Any]:
    """Convert an evaluation to a record of the log."""
    what = {"key": job.candidate.key, "start": job.start, "stop": job.stop}
    plan = {"steps": job.candidate.steps, "config": job.candidate.settings()}
    return {**what, **plan, **asdict(outcome)}


def _add(known: Known, job: Job, outcome: Outcome) -> None:
    """Add an outcome to the figures of a plan."""
    figures = [value for values in outcome.quality.values() for value in values]
    if not figures or not all(isfinite(value) for value in figures):
        known.given_up, known.curve, known.prompts = True, outcome.curve, 0
        known.error = outcome.error
        known.quality.clear()
        return
    if not job.start:
        known.curve, known.cost = outcome.curve, dict(outcome.cost)
    for name, values in outcome.quality.items():
        known.quality.setdefault(name, []).extend(values)
    known.prompts = job.stop
