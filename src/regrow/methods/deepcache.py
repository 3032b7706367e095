"""DeepCache: reuse of deep features (arXiv 2312.00858)."""

from __future__ import annotations

import math
from functools import partial
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from regrow.core.recipe import Recipe, recipe_of
from regrow.fields import Block, Calls
from regrow.methods.base import ALL, About, DenoiserKind, MethodConfig, Role, register
from regrow.recover.time import REUSE, RecoveryField
from regrow.schedule import Spaced
from regrow.space import INTERVALS, RECOVERIES, Searched


@register
class DeepCache(MethodConfig):
    """Compute one shallow branch of the U-Net in most calls, and reuse what lies deeper.

    1. Full calls: every N-th, or closer together around one step of the run (section 3.3).
    2. The others compute one shallow branch, and take the rest from the last full call.

    Args:
        interval: N, one call in so many is full (the paper: 2 to 20, 5 in its main table).
        branch: the skip branch that cached calls compute; 0 is the outermost, the cheapest. In a
            transformer, ``branch + 1`` blocks are computed, the first and the last ones.
        center: where full calls are closest together, as a share of the run; None spreads them evenly
            (the paper's non-uniform 1:N uses step 15 of 50, .3).
        power: p >= 1 of the non-uniform schedule; 1 is even (the paper: 1.2 to 1.4).
        recovery: how deep features follow from those computed (the paper: the last ones are reused).

    Raises:
        pydantic.ValidationError: naming the field, the value and what is allowed.
    """

    ABOUT: ClassVar[About] = About(
        title="DeepCache",
        what="reuse deep features every N calls",
        models=ALL,
        paper="arXiv 2312.00858",
        note="on transformers it caches blocks",
        value="interval",
        role=Role.CACHES,
        measured={DenoiserKind.UNET: ("5",), DenoiserKind.TRANSFORMER: ("3",), DenoiserKind.VIDEO: ("3",)},
        traced={DenoiserKind.UNET: ("5",), DenoiserKind.TRANSFORMER: ("3",), DenoiserKind.VIDEO: ("3",)},
        place=50,
    )

    method: Literal["deepcache"] = "deepcache"
    interval: Annotated[Calls, INTERVALS] = 5
    branch: Annotated[Block, Searched((0, 1, 2))] = 0
    center: Annotated[float | None, Searched((None, 0.1, 0.2, 0.3, 0.4, 0.5))] = Field(None, gt=0, lt=1)
    power: float = Field(1.4, ge=1, le=100)
    recovery: Annotated[RecoveryField, RECOVERIES] = REUSE

    @model_validator(mode="after")
    def _power_needs_center(self) -> Self:
        if self.center is None and self.power != type(self).model_fields["power"].default:
            raise ValueError(f"power: {self.power:g} is not allowed without center, it would do nothing")
        return self


def full_calls(config: DeepCache, calls: int) -> set[int]:
    """The indices of the full calls; the first is always one of them.

    Even: every N-th. Else, with T calls and k = ceil(T / N), section 3.3's
    ``unique(int(l^p + c)) for l in linspace((-c)^(1/p), (T - c)^(1/p), k + 1)``, roots and powers taken
    of the absolute value and given its sign; the last point, T, is the end of the run.
    """
    if config.center is None:
        return set(range(0, calls, config.interval))
    center, count = config.center * calls, math.ceil(calls / config.interval)
    first, last = _signed(-center, 1 / config.power), _signed(calls - center, 1 / config.power)
    points = (first + (last - first) * i / count for i in range(count))
    return {0, *(min(max(int(_signed(p, config.power) + center), 0), calls - 1) for p in points)}


def _signed(x: float, power: float) -> float:
    """``|x|^power`` with the sign of x."""
    return math.copysign(abs(x) ** power, x)


@recipe_of.register
def _(config: DeepCache) -> Recipe:
    full = partial(full_calls, config)
    return Recipe(Spaced(config.interval, config.branch + 1, full, config.recovery))
