"""Any token method under any plan of cached calls, as DeepCache with ToMeSD."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from regrow.methods.deepcache import DeepCache
from regrow.methods.fora import FORA
from regrow.methods.parts import MethodConfig, Parts, parts_of
from regrow.methods.sito import SiTo
from regrow.methods.tome import ToMeSD
from regrow.schedule import Schedule


class Combined(MethodConfig):
    """Two methods at once: tokens are pruned in the layers that the plan leaves to compute.

    Args:
        caching: which calls are full and how deep the others go: a method, or a schedule, whose
            ratios do not count.
        tokens: how tokens are pruned in all calls.

    Raises:
        pydantic.ValidationError: naming the field, the value and what is allowed.
    """

    method: Literal["combined"] = "combined"
    version: Literal[1] = 1
    caching: Annotated[DeepCache | FORA, Field(discriminator="method")] | Schedule
    tokens: Annotated[SiTo | ToMeSD, Field(discriminator="method")]


@parts_of.register
def _(config: Combined) -> Parts:
    plan = config.caching if isinstance(config.caching, Schedule) else parts_of(config.caching).plan
    return Parts(plan.with_ratio(config.tokens.ratio), parts_of(config.tokens).tokens)
