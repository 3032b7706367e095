"""Two methods at once: one that leaves tokens out, under any plan of cached calls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from regrow.methods.atedm import ATEDM
from regrow.methods.cat import CATPruning
from regrow.methods.deepcache import DeepCache
from regrow.methods.fora import FORA
from regrow.methods.parts import MethodConfig, Parts, parts_of
from regrow.methods.sito import SiTo
from regrow.methods.tome import ToMeSD
from regrow.schedule import LAYERS, After, Both, Plan, Schedule


def _kind(caching: Any) -> Any:
    """The method of a caching method or its data; ``"schedule"`` where there is none."""
    if isinstance(caching, Mapping):
        return caching.get("method", "schedule")
    return getattr(caching, "method", "schedule")


class Combined(MethodConfig):
    """Two methods at once: tokens are pruned in the layers that the plan leaves to compute.

    CAT Pruning, and AT-EDM with ``recovery=reuse``, choose the tokens of whole calls. With them the first
    calls are full (``t0``, or two). After them a call at full depth computes the chosen tokens through all
    blocks, and a cached one those of the last such call through the blocks that DeepCache leaves, adding
    what the blocks between last added to each of them.

    Args:
        caching: which calls are full and how deep the others go: a method, or a schedule, whose
            ratios do not count. Where the tokens of whole calls are chosen not `FORA`, and no schedule with
            ``"layers"``.
        tokens: how tokens are pruned, and how many in each call.

    Raises:
        pydantic.ValidationError: naming the field, the value and what is allowed.
    """

    method: Literal["combined"] = "combined"
    version: Literal[1] = 1
    caching: Annotated[
        Annotated[DeepCache, Tag("deepcache")]
        | Annotated[FORA, Tag("fora")]
        | Annotated[Schedule, Tag("schedule")],
        Discriminator(_kind),
    ]
    tokens: Annotated[SiTo | ToMeSD | CATPruning | ATEDM, Field(discriminator="method")]

    @model_validator(mode="after")
    def _whole_blocks(self) -> Combined:
        whole = parts_of(self.tokens).token_set is not None
        if whole and any(s.depth == LAYERS for s in self.plan.kinds()):
            raise ValueError(
                "caching: calls in which every layer hands on its last output (fora, depth 'layers') are "
                f"not allowed with {self.tokens.method} where it chooses the tokens of whole calls; it "
                "must be deepcache or a schedule of other depths"
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
    plan = Both(config.plan, tokens.plan)
    if tokens.token_set is None:
        return replace(tokens, plan=plan)
    return replace(tokens, plan=After(tokens.token_set.full_calls, plan))
