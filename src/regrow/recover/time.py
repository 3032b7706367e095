"""Recoveries in time: a value that a call does not compute is made from values of earlier calls.

Every recovery is linear in the computed values: ``value(t) = sum_k w_k(t; t_1 .. t_n) value(t_k)``. The
weights depend on the steps alone, so one small function serves sites of any shape.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Annotated, Any, Literal, get_origin

import numpy as np
from pydantic import Field, PlainValidator, SerializeAsAny, model_validator
from typing_extensions import Self

from regrow.fields import MOST_CALLS, MOST_WEIGHT, Calls, Checked, Share, not_allowed
from regrow.words import offer, shown

MOST_ORDER = 8
"""Highest order or degree of a forecast; above it, rounding costs more than the order gains."""

Weights = tuple[float, ...]


class TimeRecovery(Checked):
    """A recovery in time."""

    @property
    def window(self) -> int:
        """Number of the last computed values that it needs."""
        return 1

    @property
    def label(self) -> str:
        """Name in tables, followed by the order or degree if that is not the default."""
        name: str = getattr(self, "kind", type(self).__name__)
        number = _number_of(type(self))
        if number is None or getattr(self, number) == type(self).model_fields[number].default:
            return name
        return f"{name}{getattr(self, number)}"

    def weights(self, times: Sequence[int], t: int, total: int) -> Weights:
        """Compute the weight of each computed value in the value of step ``t``.

        Args:
            times: the steps of the computed values, at least one, ascending, all below ``t``.
            t: the step to recover.
            total: number of steps of the run.
        """
        raise NotImplementedError

    def basis(self, t: int, total: int) -> Weights:
        """Compute the factor of a value of step ``t`` in each sum that is kept instead of all values."""
        return ()

    def split(self, times: Sequence[int], t: int, total: int) -> tuple[Weights, Weights]:
        """Split `weights` into factors of the kept sums and of the last `window` values."""
        return (), self.weights(times, t, total)[-self.window :]

    def knows(self, times: Sequence[int], t: int, total: int) -> bool:
        """Whether it has its own weights for this step; if not, those of ``Taylor(order=1)`` are used."""
        return True

    def used(self, times: Sequence[int], t: int, total: int) -> str:
        """Name what recovers this step from these values, for reports: with its order if it has one."""
        return str(getattr(self, "kind", type(self).__name__))

    def begins(self, times: Sequence[int], t: int, total: int) -> bool:
        """Whether a run that began late has enough values: two, for a line."""
        return len(times) > 1

    def moved(self, by: int, total: int) -> Self:
        """Shift all steps by ``by``, for a run of ``total`` steps."""
        return self


class Reuse(TimeRecovery):
    """Reuse the last computed value."""

    kind: Literal["reuse"] = "reuse"

    def weights(self, times: Sequence[int], t: int, total: int) -> Weights:
        """Give the last value the weight 1, the others 0."""
        return (0.0,) * (len(times) - 1) + (1.0,)

    def begins(self, times: Sequence[int], t: int, total: int) -> bool:
        """Whether there is a value: one is always enough."""
        return True


REUSE = Reuse()
"""The default recovery of methods."""


class Taylor(TimeRecovery):
    """Forecast by the polynomial through the last ``order + 1`` computed values, at any spacing.

    The forecast is exact for every polynomial of that degree. With fewer values the order is lower.

    Args:
        order: degree of the polynomial; 1 continues the line through the last two values.
    """

    kind: Literal["taylor"] = "taylor"
    order: int = Field(1, ge=1, le=MOST_ORDER)

    @property
    def window(self) -> int:
        """Number of values: the order + 1."""
        return self.order + 1

    def weights(self, times: Sequence[int], t: int, total: int) -> Weights:
        """Compute Lagrange's weights."""
        last = times[-self.window :]
        own = [_product((t - other) / (time - other) for other in last if other != time) for time in last]
        return (0.0,) * (len(times) - len(last)) + tuple(own)

    def used(self, times: Sequence[int], t: int, total: int) -> str:
        """Name the recovery with the order that the number of values allows."""
        return ordered("taylor", min(self.order, len(times) - 1))


class Chebyshev(TimeRecovery):
    """Forecast as Spectrum (arXiv 2603.01623): Chebyshev polynomials of the step, fitted to all values.

    With ``phi(t) = (T_0(tau) .. T_M(tau))`` and ``tau = 2 t / T - 1`` for the step t of T, the spectral
    forecast is ``phi(t) (X'X + lambda I)^-1 X'H``: X has a row phi and H a row of values for each computed
    step. It is mixed with the line through the last two values: ``w spectral + (1 - w) local``. Only the
    M + 1 rows of ``X'H`` and the last two values are kept, however many were computed.

    Args:
        degree: M (the paper: 4).
        ridge: lambda > 0 (the paper: 0.1).
        mix: w (the paper: 1).
    """

    kind: Literal["chebyshev"] = "chebyshev"
    degree: int = Field(4, ge=1, le=MOST_ORDER)
    ridge: float = Field(0.1, gt=0, le=MOST_WEIGHT)
    mix: Share = 1.0

    @property
    def window(self) -> int:
        """Number of values: two, for the line."""
        return 2

    def weights(self, times: Sequence[int], t: int, total: int) -> Weights:
        """Mix the weights of the spectral and the local forecast; a single value has the weight 1."""
        spectral, local = self.split(times, t, total)
        phi = [self.basis(time, total) for time in times]
        sums = [sum(a * b for a, b in zip(spectral, row, strict=False)) for row in phi]
        before = len(times) - len(local)
        return tuple(w + (local[k - before] if k >= before else 0.0) for k, w in enumerate(sums))

    def used(self, times: Sequence[int], t: int, total: int) -> str:
        """Name the recovery with its degree; a single value is reused."""
        return ordered("chebyshev", self.degree if len(times) > 1 else 0)

    def basis(self, t: int, total: int) -> Weights:
        """``phi(t)``."""
        angle = math.acos(min(max(2 * t / total - 1, -1.0), 1.0))
        return tuple(math.cos(m * angle) for m in range(self.degree + 1))

    def split(self, times: Sequence[int], t: int, total: int) -> tuple[Weights, Weights]:
        """Compute ``w phi(t) (X'X + lambda I)^-1`` for the rows of X'H, and the weights of the line."""
        if len(times) < 2:
            return (0.0,) * (self.degree + 1), (1.0,)
        x = np.array([self.basis(time, total) for time in times])
        gram = x.T @ x + self.ridge * np.eye(self.degree + 1)
        spectral = self.mix * np.linalg.solve(gram, np.array(self.basis(t, total)))
        line = Taylor(order=1).weights(times[-2:], t, total)
        return tuple(spectral.tolist()), tuple((1 - self.mix) * w for w in line)


class FittedStep(Checked):
    """The weights of one step, as `Fitted` holds them.

    Args:
        step: the step.
        sources: steps whose values it is made of, ascending, all below ``step``.
        weights: a weight for each source.
    """

    step: int = Field(ge=1, le=MOST_CALLS)
    sources: tuple[Annotated[int, Field(ge=0, le=MOST_CALLS)], ...] = Field(
        min_length=1, max_length=MOST_CALLS
    )
    weights: tuple[Annotated[float, Field(ge=-MOST_WEIGHT, le=MOST_WEIGHT)], ...]

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if len(self.sources) != len(self.weights):
            raise ValueError(f"weights: {len(self.weights)} entries for {len(self.sources)} sources")
        ascending = list(self.sources) == sorted(set(self.sources))
        if not ascending or self.sources[-1] >= self.step:
            raise ValueError(
                f"sources: {shown(self.sources)} is not allowed, they must ascend and be below {self.step}"
            )
        return self


class Fitted(TimeRecovery):
    """Forecast by weights of each step, fitted to runs (`regrow.calibrate`; L2P, arXiv 2604.26365).

    A run with another number of steps, or without the values that a step is made of, uses the weights of
    ``Taylor(order=1)``.

    Args:
        total: number of steps of the runs.
        steps: the weights of each step that is not computed.
    """

    kind: Literal["fitted"] = "fitted"
    total: Calls
    steps: tuple[FittedStep, ...] = Field(max_length=MOST_CALLS)

    @model_validator(mode="after")
    def _one_of_each(self) -> Self:
        places = [one.step for one in self.steps]
        if len(set(places)) != len(places):
            raise ValueError("steps: a step is there twice")
        return self

    @cached_property
    def window(self) -> int:
        """Number of values: the most that any step needs from its first source on, but at least two."""
        computed = sorted({source for one in self.steps for source in one.sources})
        spans = [sum(one.sources[0] <= k < one.step for k in computed) for one in self.steps]
        return max([2, *spans])

    def weights(self, times: Sequence[int], t: int, total: int) -> Weights:
        """Look up the weights of the step; if there are none, use the line through the last two values."""
        own = self._of(times, t, total)
        if own is None:
            return Taylor(order=1).weights(times, t, total)
        found = dict(zip(own.sources, own.weights, strict=True))
        return tuple(found.get(time, 0.0) for time in times)

    def knows(self, times: Sequence[int], t: int, total: int) -> bool:
        """Whether the step has weights and their values were computed."""
        return self._of(times, t, total) is not None

    def used(self, times: Sequence[int], t: int, total: int) -> str:
        """Name what recovers the step: this, or the line if the weights do not fit."""
        return "fitted" if self.knows(times, t, total) else Taylor(order=1).used(times, t, total)

    def begins(self, times: Sequence[int], t: int, total: int) -> bool:
        """Whether the values are enough; with weights for the step, they are."""
        return self.knows(times, t, total) or super().begins(times, t, total)

    def moved(self, by: int, total: int) -> Self:
        """Shift the steps and their sources."""
        steps = tuple(
            FittedStep(step=one.step + by, sources=tuple(s + by for s in one.sources), weights=one.weights)
            for one in self.steps
        )
        return self.model_copy(update={"total": total, "steps": steps})

    def _of(self, times: Sequence[int], t: int, total: int) -> FittedStep | None:
        own = next((one for one in self.steps if one.step == t), None)
        # With a plan of other full steps, the values may be too old to be kept.
        kept = set(times[-self.window :])
        return own if own and total == self.total and set(own.sources) <= kept else None


_KINDS: dict[str, type[TimeRecovery]] = {}


def register_recovery(kind: type[TimeRecovery]) -> type[TimeRecovery]:
    """Register a class of recoveries under its field ``kind``, for configurations and files (a decorator).

    Raises:
        TypeError: if the class has no such field.
        ValueError: if another class has that name, or it can't be a name.
    """
    field = kind.model_fields.get("kind")
    if field is None or get_origin(field.annotation) is not Literal or not isinstance(field.default, str):
        raise TypeError(f'kind: {kind.__name__} has no field of the form kind: Literal["name"] = "name"')
    name = field.default
    if not re.fullmatch("[a-z]+", name):
        raise ValueError(f"kind: {shown(name)} is not allowed, it must be of letters from a to z")
    if _KINDS.get(name, kind).__qualname__ != kind.__qualname__:
        raise ValueError(f"kind: {name!r} is not allowed, {_KINDS[name].__name__} has that name")
    _KINDS[name] = kind
    return kind


for _kind in (Reuse, Taylor, Chebyshev, Fitted):
    register_recovery(_kind)


def recovery_from(value: Any) -> TimeRecovery:
    """Make a recovery from a recovery, its fields, or its name with an order or degree: ``taylor2``.

    Raises:
        ValueError: if it is none of these.
    """
    if isinstance(value, TimeRecovery):
        return value
    if isinstance(value, Mapping):
        return _kind_of(value.get("kind")).model_validate(dict(value))
    found = re.fullmatch(r"([a-z]+)(\d*)", value if isinstance(value, str) else "")
    name, digits = (found[1], found[2]) if found else (value, "")
    kind = _kind_of(name)
    number = _number_of(kind)
    if digits and number is None:
        raise not_allowed(f"it must be {name!r}, which has no order")
    # Python does not parse numbers of thousands of digits.
    return kind.model_validate({number: int(digits[:5])} if digits and number else {})


def _number_of(kind: type[TimeRecovery]) -> str | None:
    """Find the field whose number may follow the name."""
    return next((field for field in ("order", "degree") if field in kind.model_fields), None)


def _kind_of(name: Any) -> type[TimeRecovery]:
    if not isinstance(name, str) or name not in _KINDS:
        raise not_allowed(f"it must be a recovery: {', '.join(_KINDS)}{offer(name, _KINDS)}")
    return _KINDS[name]


RecoveryField = Annotated[SerializeAsAny[TimeRecovery], PlainValidator(recovery_from)]
"""A field for a recovery in time; takes the recovery, its name or its fields."""


def ordered(kind: str, order: int) -> str:
    """Name a recovery with its order; order 0 is ``"reuse"``."""
    return f"{kind}({order})" if order else "reuse"


def _product(factors: Any) -> float:
    product = 1.0
    for factor in factors:
        product *= factor
    return product


@lru_cache(maxsize=4096)
def cached_split(
    recovery: TimeRecovery, times: tuple[int, ...], t: int, total: int
) -> tuple[Weights, Weights]:
    """Compute `split` once for all sites and branches with the same values."""
    return recovery.split(times, t, total)
