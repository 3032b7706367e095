"""SiTo and ToMeSD under any plan of cached calls, and CAT Pruning with block caching."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field, model_validator

from regrow.methods.cat import CATPruning, plan_of
from regrow.methods.deepcache import DeepCache
from regrow.methods.fora import FORA
from regrow.methods.parts import MethodConfig, Parts, parts_of
from regrow.methods.sito import SiTo
from regrow.methods.tome import ToMeSD
from regrow.schedule import LAYERS, Plan, Schedule


class Combined(MethodConfig):
    """Two methods at once: tokens are pruned in the layers that the plan leaves to compute.

    With CAT Pruning the first ``t0`` calls are full. After them every call computes the chosen tokens only:
    one at full depth through all blocks, a cached one those of the last such call through the blocks that
    DeepCache leaves, adding what the blocks between last added to each of them.

    Args:
        caching: which calls are full and how deep the others go: a method, or a schedule, whose
            ratios do not count. With CAT Pruning not `FORA`, and no schedule with ``"layers"``.
        tokens: how tokens are pruned in all calls.

    Raises:
        pydantic.ValidationError: naming the field, the value and what is allowed.
    """

    method: Literal["combined"] = "combined"
    version: Literal[1] = 1
    caching: Annotated[DeepCache | FORA, Field(discriminator="method")] | Schedule
    tokens: Annotated[SiTo | ToMeSD | CATPruning, Field(discriminator="method")]

    @model_validator(mode="after")
    def _whole_blocks(self) -> Combined:
        if isinstance(self.tokens, CATPruning) and any(s.depth == LAYERS for s in self.plan.kinds()):
            raise ValueError(
                "caching: calls in which every layer hands on its last output (fora, depth 'layers') are "
                "not allowed with cat, it must be deepcache or a schedule of other depths"
            )
        return self

    @property
    def plan(self) -> Plan:
        """The plan of `caching`."""
        return self.caching if isinstance(self.caching, Schedule) else parts_of(self.caching).plan

    def at(self, calls: int) -> Combined:
        """The same with a schedule of so many calls; a caching method is itself."""
        if not isinstance(self.caching, Schedule):
            return self
        return self.model_copy(update={"caching": self.caching.resample(calls)})


@parts_of.register
def _(config: Combined) -> Parts:
    tokens = parts_of(config.tokens)
    if isinstance(config.tokens, CATPruning):
        return replace(tokens, plan=plan_of(config.tokens, config.plan))
    return replace(tokens, plan=config.plan.with_ratio(config.tokens.ratio))
