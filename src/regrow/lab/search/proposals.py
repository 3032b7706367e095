"""Propose the next plans to try: by NSGA-II, or at random."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from pydantic import Field

from regrow.fields import Checked, Share

Genes = tuple[int, ...]


class Proposals(Protocol):
    """Proposes plans, and learns from their objectives."""

    def ask(self) -> list[Genes]:
        """Propose the next generation; empty if no new plan is left."""

    def tell(self, values: Sequence[Sequence[float]]) -> None:
        """Take the objectives of the last proposed plans, in the same order; less is better."""


class Operators(Checked):
    """Settings of NSGA-II; defaults are those of DaTo's paper.

    Args:
        population: plans in a generation.
        crossover: probability of simulated binary crossover.
        crossover_eta: its distribution index.
        mutation: probability of polynomial mutation.
        mutation_eta: its distribution index.
        uniform: share of the first generation with the same choice at every step (half is our choice; the
            paper does not give the share).
    """

    population: int = Field(20, ge=2, le=10_000)
    crossover: Share = 0.7
    crossover_eta: float = Field(7.0, gt=0, le=1000)
    mutation: Share = 0.4
    mutation_eta: float = Field(15.0, gt=0, le=1000)
    uniform: Share = 0.5


class Nsga2:
    """Proposes plans by pymoo's NSGA-II over whole numbers, seeded.

    The same seed and objectives give the same plans, so a search is resumed by giving it the known
    objectives again.

    Args:
        sizes: number of choices of each variable.
        first: the first generation.
        objectives: number of objectives.
        operators: settings.
        seed: seed of all random choices.
    """

    def __init__(
        self, sizes: Sequence[int], first: Sequence[Genes], objectives: int, operators: Operators, seed: int
    ) -> None:
        try:
            from pymoo.algorithms.moo.nsga2 import NSGA2
            from pymoo.core.problem import Problem
            from pymoo.core.termination import NoTermination
            from pymoo.operators.crossover.sbx import SBX
            from pymoo.operators.mutation.pm import PM
            from pymoo.operators.repair.rounding import RoundingRepair
        except ImportError as error:
            raise ImportError("the search needs pymoo: run pip install 'regrow[search]'") from error
        # Operators divide by a variable's range, so it must not be 0.
        self._open = [i for i, size in enumerate(sizes) if size > 1]
        most = np.array([sizes[i] - 1 for i in self._open])
        self._sizes, self._population = sizes, operators.population
        self._rng = np.random.default_rng(seed)
        self._seen: set[Genes] = set()
        self._problem: Any = Problem(n_var=max(len(most), 1), n_obj=objectives, xl=0, xu=most, vtype=int)
        self._algorithm: Any = NSGA2(
            pop_size=operators.population,
            sampling=np.array(first, dtype=int)[:, self._open],
            crossover=SBX(
                prob=operators.crossover, eta=operators.crossover_eta, vtype=float, repair=RoundingRepair()
            ),
            mutation=PM(
                prob=operators.mutation, eta=operators.mutation_eta, vtype=float, repair=RoundingRepair()
            ),
            eliminate_duplicates=True,
        )
        self._algorithm.setup(self._problem, termination=NoTermination(), seed=seed, verbose=False)
        self._asked: Any = None
        # pymoo asks for at least one variable.
        self._used_up = not self._open

    def ask(self) -> list[Genes]:
        """Propose the next generation; at random when the operators find nothing new, in a small space."""
        asked: list[Genes] = []
        if not self._used_up:
            self._asked = self._algorithm.ask()
            rows = [] if self._asked is None else self._asked.get("X")
            whole = np.zeros((len(rows), len(self._sizes)), dtype=int)
            whole[:, self._open] = np.reshape(rows, (len(rows), len(self._open)))
            asked = [tuple(row) for row in whole.tolist()]
        # No new plan in this generation: too few are left for the operators.
        self._used_up = self._seen.issuperset(asked)
        self._seen.update(asked)
        return drawn(self._sizes, self._population, self._rng, self._seen) if self._used_up else asked

    def tell(self, values: Sequence[Sequence[float]]) -> None:
        """Take the objectives of the last proposed plans."""
        if self._used_up:
            return
        from pymoo.core.evaluator import Evaluator
        from pymoo.problems.static import StaticProblem

        Evaluator().eval(StaticProblem(self._problem, F=np.array(values, dtype=float)), self._asked)
        self._algorithm.tell(infills=self._asked)


class Chance:
    """Proposes random plans, none twice: the baseline for a search.

    Args:
        sizes: number of choices of each variable.
        population: plans in a generation.
        seed: seed of all random choices.
    """

    def __init__(self, sizes: Sequence[int], population: int, seed: int) -> None:
        self._sizes, self._population = sizes, population
        self._rng = np.random.default_rng(seed)
        self._seen: set[Genes] = set()

    def ask(self) -> list[Genes]:
        """Propose the next generation."""
        return drawn(self._sizes, self._population, self._rng, self._seen)

    def tell(self, values: Sequence[Sequence[float]]) -> None:
        """Do nothing: random plans do not learn."""


def drawn(sizes: Sequence[int], count: int, rng: np.random.Generator, seen: set[Genes]) -> list[Genes]:
    """Draw ``count`` random plans that were not seen; fewer if a small space has no more."""
    out: list[Genes] = []
    for _ in range(100 * count):
        if len(out) == count:
            break
        genes = tuple(int(g) for g in rng.integers(0, np.array(sizes)))
        if genes not in seen:
            seen.add(genes)
            out.append(genes)
    return out


def first_generation(
    sizes: Sequence[int], uniform: Sequence[Genes], operators: Operators, seed: int
) -> list[Genes]:
    """Mix plans with the same choice at every step and random plans.

    Args:
        sizes: number of choices of each variable.
        uniform: plans with the same choice at every step, of which some are chosen at random.
        operators: number of plans, and the share of uniform ones.
        seed: seed of all random choices.
    """
    rng = np.random.default_rng(seed)
    count = min(round(operators.uniform * operators.population), len(uniform))
    chosen = [tuple(uniform[i]) for i in rng.permutation(len(uniform))[:count]]
    seen = set(chosen)
    return [*chosen, *drawn(sizes, operators.population - len(chosen), rng, seen)]


def front(values: Sequence[Sequence[float]]) -> list[int]:
    """List the plans that nothing dominates, the first of equals; by the last objective, highest first."""
    rows = np.array(values, dtype=float)
    kept: list[int] = []
    # A row that dominates another comes before it; if any does, a kept row does.
    for i in sorted(range(len(rows)), key=lambda i: (*rows[i], i)):
        if not kept or not (rows[kept] <= rows[i]).all(1).any():
            kept.append(i)
    return sorted(kept, key=lambda i: tuple(-v for v in reversed(values[i])))


def pick(values: Sequence[Sequence[float]], weight: float) -> int:
    """Choose one plan of a front as DaTo does: the least ``quality + w_ps cost``.

    Args:
        values: first and last objective of each plan, less is better.
        weight: w_ps, in the scale of the objectives.
    """
    return min(range(len(values)), key=lambda i: values[i][0] + weight * values[i][-1])


def hypervolume(values: Sequence[Sequence[float]], reference: Sequence[float]) -> float:
    """Compute the volume that a front dominates, up to a reference point.

    Args:
        values: objectives of plans, less is better.
        reference: the worst values that are counted.
    """
    from pymoo.indicators.hv import HV

    inside = [v for v in values if all(a < b for a, b in zip(v, reference, strict=True))]
    return float(HV(ref_point=np.array(reference, float))(np.array(inside, float))) if inside else 0.0
