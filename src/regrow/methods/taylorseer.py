"""TaylorSeer: from reusing to forecasting (arXiv 2503.06923)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from functools import partial
from math import factorial
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from regrow.core.recipe import Recipe, recipe_of
from regrow.fields import Calls
from regrow.methods.base import ALL, About, MethodConfig, register
from regrow.recover.time import MOST_ORDER, TimeRecovery, Weights, ordered, register_recovery
from regrow.schedule import HEAD, LAYERS, Spaced
from regrow.space import INTERVALS, Searched


@register_recovery
class Differences(TimeRecovery):
    """The paper's series: ``F(t) = sum_i D_i (t - t_n)^i / i!`` with ``D_0 = F(t_n)``.

    ``D_(i+1) = (D_i at t_n - D_i at t_(n-1)) / (t_n - t_(n-1))``. Of order 1 that is the line through the
    last two values; above it the differences are taken for derivatives at t_n, so that unlike
    `regrow.recover.time.Taylor` it does not continue polynomials of its degree exactly. With fewer values
    the order is as high as they allow.

    Args:
        order: the highest i.
    """

    kind: Literal["differences"] = "differences"
    order: int = Field(1, ge=1, le=MOST_ORDER)

    @property
    def window(self) -> int:
        """One more than the order."""
        return self.order + 1

    def used(self, times: Sequence[int], t: int, total: int) -> str:
        """With the order that the values allow."""
        return ordered("differences", min(self.order, len(times) - 1))

    def weights(self, times: Sequence[int], t: int, total: int) -> Weights:
        """The series of the values, each of which is 1 at its own step and 0 at the others."""
        first = max(len(times) - self.window, 0)
        last = times[first:]
        weights = [0.0] * len(times)
        for k in range(len(last)):
            differences = [float(i == k) for i in range(len(last))]
            for order in range(len(last)):
                weights[first + k] += differences[-1] * (t - last[-1]) ** order / factorial(order)
                # The i-th entry is of the value of index i + order.
                steps = zip(last[order:], last[order + 1 :], strict=False)
                pairs = zip(differences, differences[1:], steps, strict=False)
                differences = [(b - a) / (until - since) for a, b, (since, until) in pairs]
        return tuple(weights)


class ForecastLevel(str, Enum):
    """What is forecast."""

    LAYERS = "layers"
    """The output of every attention and feed-forward (the paper)."""
    LAST_BLOCK = "last_block"
    """The output of the last block; what lies behind it is computed."""


@register
class TaylorSeer(MethodConfig):
    """Forecast features by a Taylor series.

    1. The first calls are full, and behind them every N-th.
    2. The others forecast the output of every attention and feed-forward, or of the last block alone, by a
       series whose derivatives are differences of the last computed ones (`Differences`).

    Args:
        interval: N, one call in so many is full (the paper: 3 to 5).
        order: of the series (the paper: 1 to 4).
        level: what is forecast.
        first: full calls at the beginning, the last of which begins the first interval (released code: 3).

    Raises:
        pydantic.ValidationError: naming the field, the value and what is allowed.
    """

    ABOUT: ClassVar[About] = About(
        title="TaylorSeer",
        what="forecast layers' outputs, or the last block's, by a Taylor series",
        models=ALL,
        paper="arXiv 2503.06923",
        note="with level=last_block any model",
        default="paper",
        value="interval",
        place=66,
    )
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"interval": 4, "order": 4},
        "last-block": {"interval": 4, "order": 1, "level": ForecastLevel.LAST_BLOCK},
    }

    method: Literal["taylorseer"] = "taylorseer"
    interval: Annotated[Calls, INTERVALS] = 4
    order: Annotated[int, Searched((1, 2, 3))] = Field(2, ge=1, le=MOST_ORDER)
    level: Annotated[ForecastLevel, Searched(tuple(ForecastLevel))] = ForecastLevel.LAYERS
    first: Calls = 3


def full_calls(config: TaylorSeer, calls: int) -> set[int]:
    """The indices of the full calls: the first ones, then every N-th behind the last of these."""
    first = min(config.first, calls)
    return {*range(first), *range(first - 1, calls, config.interval)}


@recipe_of.register
def _(config: TaylorSeer) -> Recipe:
    depth = LAYERS if config.level is ForecastLevel.LAYERS else HEAD
    forecast = Differences(order=config.order)
    return Recipe(Spaced(config.interval, depth, partial(full_calls, config), forecast))
