"""Control of a run: errors that are measured in it decide which calls are full.

A full call tells the error of a forecast for it: ``|computed - forecast| / |computed|``. From that follows
how far ahead the next forecasts may reach. The rule is that of step-size control in solvers (Hairer,
Norsett, Wanner, "Solving Ordinary Differential Equations I", II.4).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

from regrow.fields import MOST_CALLS, check_within
from regrow.recover.time import MOST_ORDER, TimeRecovery
from regrow.schedule import FULL, Plan, Schedule, Step

SAFETY = 0.9
"""The part that is taken of the reach that would just meet the bound."""
GROWTH = 2.0
"""The most that a reach grows by from one measured forecast to the next."""
EXACT = 1e-9
"""Rounding of weights, relative."""


@runtime_checkable
class Control(Plan, Protocol):
    """A plan that decides what a step's calls do when the step comes.

    It is asked once a step, so that all branches and calls of guidance do the same. Its `resample` is the
    plan that it would follow if nothing were measured.
    """

    @property
    def measured(self) -> Step:
        """The step that gives the forecasts which full calls are compared with."""

    def start(self, total: int, begin: int = 0) -> Any:
        """The state of a run of ``total`` steps that begins at step ``begin``.

        Raises:
            ValueError: if it can't control such a run, naming the field.
        """

    def next(self, state: Any, index: int, errors: Mapping[int, float]) -> tuple[Step, Any]:
        """What the calls of step ``index`` do, and the state behind it.

        Args:
            state: behind the step before.
            index: of the step.
            errors: by full step, the relative deviation of its forecast, where it is known by now. One that
                is not finite may be infinite or no number.
        """


class Measured(NamedTuple):
    """A forecast that was compared.

    Args:
        distance: steps from the last computed value to the forecast one, >= 1.
        error: its relative deviation, >= 0, or no finite number.
        degree: of the polynomials that it continues exactly.
    """

    distance: int
    error: float
    degree: int

    @property
    def density(self) -> float:
        """Full calls a step that would give the error 1, where errors grow as distance^(degree + 1)."""
        return float(self.error ** (1 / (self.degree + 1)) / self.distance)


def degree_of(recovery: TimeRecovery, times: Sequence[int], t: int, total: int) -> int:
    """The degree up to which a forecast continues polynomials exactly; 0 if it does no line.

    That of ``Taylor(m)`` is m and of `Reuse` 0. What was fitted or smoothed is exact for none.

    Args:
        recovery: what forecasts.
        times: the steps of the computed values, ascending, all below ``t``.
        t: the step that is forecast.
        total: number of steps of the run.
    """
    weights, span = recovery.weights(times, t, total), t - times[0]
    for degree in range(1, MOST_ORDER + 1):
        terms = [w * ((time - t) / span) ** degree for w, time in zip(weights, times, strict=True)]
        if abs(sum(terms)) > EXACT * sum(map(abs, terms)):
            return degree - 1
    return MOST_ORDER


def reach(measured: Measured, bound: float, longest: int) -> int:
    """How many steps ahead forecasts deviate by no more than a bound, by a forecast that was compared.

    Over the distance g the error was e, so it is the bound at ``g (bound / e)^(1 / (m + 1))`` for forecasts
    of degree m. Of that the part `SAFETY` is taken, at most `GROWTH` times g.

    Returns:
        0 to ``longest``; 0 if the error is no finite number.
    """
    distance, error, degree = measured
    if not math.isfinite(error) or bound <= 0:
        return 0
    factor = SAFETY * (bound / error) ** (1 / (degree + 1)) if error > 0 else GROWTH
    return min(int(distance * min(factor, GROWTH)), longest)


def spread(measured: Sequence[Measured], rest: int, left: int) -> int:
    """The distance of the next full call from the last, for which the rest of a budget lasts.

    The bound is that under which as many full calls as are left make the rest of the run, if it needs them
    as densely as the run so far: distances are to ``rest / left`` as the mean density is to the newest.
    They grow at once as far as that: what short distances at the beginning take of a budget lacks later.

    Args:
        measured: the forecasts that were compared, the newest last.
        rest: steps behind the last full call.
        left: full calls among them, >= 1.

    Returns:
        >= 1; 1 if the newest error is no finite number.
    """
    even = rest / left
    if not measured:
        return max(round(even), 1)
    newest = measured[-1]
    if not math.isfinite(newest.error):
        return 1
    alike = [m for m in measured if m.degree == newest.degree and math.isfinite(m.error)]
    mean = sum(m.density * m.distance for m in alike) / sum(m.distance for m in alike)
    factor = mean / newest.density if newest.density else (math.inf if mean else 1.0)
    return max(round(min(even * factor, rest)), 1)


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Args:
        total: its steps.
        begin: the first of them that it makes.
        full: the steps decided to be full so far.
    """

    total: int
    begin: int
    full: tuple[int, ...] = ()


@dataclass(frozen=True)
class ErrorControl(Control):
    """Full calls as the measured errors ask for them, under a bound or within a budget.

    Some things hold for all errors. The first ``first`` calls and the last are full. At most ``longest``
    calls in a row are not full. After an error that is no finite number the next call is full. A run with a
    budget makes so many full calls: no more and, if it has so many steps, no fewer. An error is known two
    steps behind its call; with a bound, all calls before the first known one are full.

    Args:
        skip: what calls do that are not full.
        bound: the largest relative deviation that forecasts are to have; 0 makes all calls full.
        budget: instead, the number of full calls, above ``first``.
        longest: most calls in a row that are not full.
        first: full calls at the beginning; in a run that begins late, as many as the recovery needs.
    """

    skip: Step
    bound: float | None = None
    budget: int | None = None
    longest: int = 6
    first: int = 2

    @property
    def measured(self) -> Step:
        """`skip`."""
        return self.skip

    @property
    def full(self) -> Step:
        """What full calls do."""
        return Step(FULL, 0.0, self.skip.recovery)

    def kinds(self) -> frozenset[Step]:
        """Full calls and, unless the bound is 0, the others."""
        return frozenset({self.full} if self.bound == 0 else {self.full, self.skip})

    def resample(self, calls: int) -> Schedule:
        """The plan if nothing is measured: all calls full under a bound, even distances within a budget.

        Raises:
            ValueError: if there can't be so many calls, or the budget can't last for them.
        """
        check_within("calls", calls, 1, MOST_CALLS)
        state, depth = self.start(calls), []
        for index in range(calls):
            step, state = self.next(state, index, {})
            depth.append(step.depth)
        recovery = (self.skip.recovery,)
        return Schedule(depth=tuple(depth), ratio=(0.0,) * calls, recovery=recovery, name="controlled")

    def start(self, total: int, begin: int = 0) -> Progress:
        """The state of a run.

        Raises:
            ValueError: if its budget can't last for so many steps, naming the least that can.
        """
        rest = total - begin - self._first(total, begin)
        least = total - begin - rest + math.ceil(max(rest, 0) / (self.longest + 1))
        if self.budget is not None and self.budget < min(least, total - begin):
            raise ValueError(
                f"budget: {self.budget} is not allowed for {total - begin} calls of which at most "
                f"{self.longest} in a row are not full (longest), it must be >= {least}"
            )
        return Progress(total, begin)

    def next(self, state: Progress, index: int, errors: Mapping[int, float]) -> tuple[Step, Progress]:
        """What a step does, and the state behind it."""
        if self._is_full(state, index, errors):
            return self.full, replace(state, full=(*state.full, index))
        return self.skip, state

    def _first(self, total: int, begin: int) -> int:
        """The full calls at the beginning."""
        late = begin > 0 and not self.skip.recovery.begins((begin,), begin + 1, total)
        return max(self.first, 2) if late else self.first

    def _is_full(self, state: Progress, index: int, errors: Mapping[int, float]) -> bool:
        """Whether a step is full."""
        if index - state.begin < self._first(state.total, state.begin) or index >= state.total - 1:
            return True
        distance = index - state.full[-1]
        if distance > self.longest or self.bound == 0:
            return True
        measured = [*self._measured(state, errors)]
        if self.budget is None:
            return not measured or distance > reach(measured[-1], self.bound or 0.0, self.longest)
        rest, left = state.total - 1 - index, self.budget - len(state.full)
        group = self.longest + 1
        if rest < left or rest > left * group - distance:
            return True
        if left <= 1 or rest > (left - 1) * group:
            return False
        return distance >= spread(measured, rest + distance, left)

    def _measured(self, state: Progress, errors: Mapping[int, float]) -> Iterator[Measured]:
        """The forecasts that were compared, the newest last."""
        for count, step in enumerate(state.full):
            if count and step in errors:
                before = state.full[:count]
                degree = degree_of(self.skip.recovery, before, step, state.total)
                yield Measured(step - before[-1], errors[step], degree)
