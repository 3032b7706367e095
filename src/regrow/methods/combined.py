"""Two methods at once: one that leaves tokens out, under any plan of cached calls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache, reduce
from operator import or_
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    Discriminator,
    PlainValidator,
    SerializeAsAny,
    Tag,
    TypeAdapter,
    model_validator,
)

from regrow.control import Control
from regrow.core.recipe import Recipe, recipe_of
from regrow.methods.base import About, MethodConfig, Role, methods_of, name_of
from regrow.schedule import HEAD, LAYERS, After, Both, Plan, Schedule


def _of_role(role: Role) -> PlainValidator:
    """Read a method of a role from itself or its fields; where plans are looked for, also a schedule."""

    def read(value: Any) -> Any:
        return _reader(tuple(methods_of(role).values()), role is Role.CACHES).validate_python(value)

    return PlainValidator(read)


@lru_cache
def _reader(kinds: tuple[type[MethodConfig], ...], schedules: bool) -> TypeAdapter[Any]:
    """What reads one of some kinds of methods, or a schedule."""
    tagged: list[Any] = [Annotated[kind, Tag(name_of(kind))] for kind in kinds]
    tagged += [Annotated[Schedule, Tag("schedule")]] if schedules else []

    def kind_of(value: Any) -> Any:
        lacking = "schedule" if schedules else None
        if isinstance(value, Mapping):
            return value.get("method", lacking)
        return getattr(value, "method", lacking)

    either: Any = Annotated[reduce(or_, tagged), Discriminator(kind_of)]
    return TypeAdapter(either)


def full_calls_of(config: Any) -> int:
    """Of a method that chooses the tokens of whole calls, how many full ones come first; 0 of others."""
    sites = recipe_of(config).sites
    return 0 if sites is None else sites.full_calls


class Combined(MethodConfig):
    """Two methods at once: tokens are pruned in the layers that the plan leaves to compute.

    CAT Pruning, and AT-EDM with ``recovery=reuse``, choose the tokens of whole calls. With them the first
    calls are full (``t0``, or two). After them a call at full depth computes the chosen tokens through all
    blocks, and a cached one those of the last such call through the blocks that DeepCache leaves, adding
    what the blocks between last added to each of them.

    Args:
        caching: which calls are full and how deep the others go: a method of `Role.CACHES`, or a schedule,
            whose ratios do not count. Where the tokens of whole calls are chosen not `FORA`, and no
            schedule with ``"layers"``.
        tokens: how tokens are pruned, and how many in each call: a method of `Role.CHOOSES`.

    Raises:
        pydantic.ValidationError: naming the field, the value and what is allowed.
    """

    ABOUT: ClassVar[About] = About("Two methods", "cached calls by one, fewer tokens by the other")

    method: Literal["combined"] = "combined"
    caching: Annotated[SerializeAsAny[MethodConfig | Schedule], _of_role(Role.CACHES)]
    tokens: Annotated[SerializeAsAny[MethodConfig], _of_role(Role.CHOOSES)]

    @model_validator(mode="after")
    def _whole_blocks(self) -> Combined:
        whole = full_calls_of(self.tokens) > 0
        if whole and any(s.depth in (LAYERS, HEAD) for s in self.plan.kinds()):
            raise ValueError(
                "caching: calls in which every layer reuses its last output (fora, depth 'layers') or that "
                "recover what the last block returns (spectrum, depth 'head') are not allowed with "
                f"{name_of(type(self.tokens))} where it chooses the tokens of whole calls; it must be "
                "deepcache or a schedule of other depths"
            )
        if isinstance(self.plan, Control):
            raise ValueError(
                "caching: a method that decides by measured errors is not allowed in a pair; keep what it "
                "did (run.frozen()), and pair that schedule"
            )
        return self

    @property
    def plan(self) -> Plan:
        """The plan of `caching`."""
        return self.caching if isinstance(self.caching, Schedule) else recipe_of(self.caching).plan

    def at(self, calls: int) -> Combined:
        """The same with a schedule of so many calls; a caching method is itself."""
        if not isinstance(self.caching, Schedule):
            return self
        return self.model_copy(update={"caching": self.caching.resample(calls)})


@recipe_of.register
def _(config: Combined) -> Recipe:
    tokens, first = recipe_of(config.tokens), full_calls_of(config.tokens)
    plan = Both(config.plan, tokens.plan)
    return replace(tokens, plan=After(first, plan) if first else plan)
