"""Error-controlled forecasts: which calls are full follows from errors that are measured in the run.

Each full call is compared with what would have been forecast for it, which costs no further call. Where
forecasts are good they reach further, where they are bad full calls are denser (`regrow.control`).
"""

from __future__ import annotations

from math import ceil
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator
from typing_extensions import Self

from regrow.control import ErrorControl
from regrow.core.recipe import Recipe, recipe_of
from regrow.fields import MOST_CALLS, Calls, not_allowed
from regrow.methods.base import About, MethodConfig, TextError, register, whole
from regrow.recover.time import RecoveryField, Taylor
from regrow.schedule import FULL, SITES, Depth, Step
from regrow.space import RECOVERIES, Searched

FIRST, LONGEST = 2, 6
"""Defaults of the fields ``first`` and ``longest``."""


def _budgets(calls: int) -> range:
    """Budgets that last for so many calls."""
    least = FIRST + max(ceil((calls - FIRST) / (LONGEST + 1)), 1)
    return range(least, max(calls, least) + 1)


def _left_out(depth: int) -> int:
    """A depth of calls that leave something out."""
    if depth in (FULL, SITES):
        raise not_allowed("it must be a number of layers, 'layers' or 'head'")
    return depth


@register
class Adaptive(MethodConfig):
    """The configuration: a bound or a budget, exactly one of them.

    Whatever is measured, the first calls and the last are full, never more than ``longest`` calls in a row
    are not, and a run makes as many full calls as its budget.

    Args:
        bound: the largest relative deviation of a forecast, ``|computed - forecast| / |computed|``; 0 makes
            all calls full.
        budget: instead, the number of full calls of a run.
        recovery: how what is not computed follows from earlier calls.
        depth: of the calls that are not full; 0 forecasts the output.
        longest: most calls in a row that are not full.
        first: full calls at the beginning.

    Raises:
        pydantic.ValidationError: naming the field, the value and what is allowed.
    """

    ABOUT: ClassVar[About] = About(
        title="Adaptive",
        what="forecast the output; errors measured while the run lasts say which calls are full",
        models="any model",
        note="adaptive:0.05 bounds the error, adaptive:budget=12 the full calls",
        value="bound",
        place=6,
    )

    method: Literal["adaptive"] = "adaptive"
    bound: float | None = Field(None, ge=0, le=1)
    budget: Annotated[Calls | None, Searched(_budgets)] = None
    recovery: Annotated[RecoveryField, RECOVERIES] = Taylor(order=1)
    depth: Annotated[Depth, AfterValidator(_left_out)] = 0
    longest: Annotated[int, Field(ge=1, le=MOST_CALLS)] = LONGEST
    first: Calls = FIRST

    @model_validator(mode="after")
    def _one_aim(self) -> Self:
        if (self.bound is None) == (self.budget is None):
            raise ValueError("bound, budget: exactly one of them must be given")
        if self.budget is not None and self.budget <= self.first:
            raise ValueError(
                f"budget: {self.budget} is not allowed, it must be > {self.first}: the first calls "
                "(first) and the last are full"
            )
        return self

    @classmethod
    def from_text(cls, text: str, calls: int) -> Self:
        """``adaptive:0.05`` is a bound, ``adaptive:budget=12`` a budget."""
        if text.startswith("budget="):
            return cls(budget=whole(text.removeprefix("budget=")))
        try:
            bound = float(text.removeprefix("bound="))
        except ValueError as error:
            raise TextError("a bound, such as 0.05, or budget=N") from error
        return cls(bound=bound)


@recipe_of.register
def _(config: Adaptive) -> Recipe:
    skip = Step(config.depth, 0.0, config.recovery)
    return Recipe(ErrorControl(skip, config.bound, config.budget, config.longest, config.first))
