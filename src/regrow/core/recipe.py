"""The recipe of a published system: a plan of its calls, and a rule that selects tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor

from regrow.core.decision import Sited, View
from regrow.origin import Origin
from regrow.schedule import Plan, Schedule
from regrow.tokens.grid import Grid


@dataclass(frozen=True)
class Attention:
    """The queries and keys of an attention.

    Args:
        query: ``(B, heads, n, D)``, the image's tokens first.
        key: ``(B, heads, m, D)``; in a self-attention, the image's tokens first.
        tokens: number N of the image's tokens.
        bias: added to the products, or None; it broadcasts to ``(B, heads, n, m)``.
    """

    query: Tensor
    key: Tensor
    tokens: int
    bias: Tensor | None


@dataclass(frozen=True)
class CallInfo:
    """The facts that a rule may use.

    Args:
        batch: number of samples in the batch, with both halves of guidance.
        guided: whether the batch is an unconditional half followed by a conditional half.
        outputs: the model's last computed outputs ``(B, C, H, W)``, newest last, at most two; tokens
            ``(B, N, D)`` if the tokens of whole calls are chosen.
        generator: the run's seeded generator, on the model's device.
        conditional_first: in a guided batch the conditional half comes first (DiT).
        attention: the self-attention that has just run, for a rule with `Features.ATTENTION` or if a
            block's attention chooses the tokens of whole calls.
        cached: the call skips layers or blocks that an earlier call computed.
        grid: grid of the image's tokens, if the method decides for sites; for a video, of a frame.
        view: what decisions depend on.
    """

    batch: int
    guided: bool
    outputs: Sequence[Tensor]
    generator: torch.Generator
    conditional_first: bool = False
    attention: Attention | None = None
    cached: bool = False
    grid: Grid | None = None
    view: View | None = None


@dataclass(frozen=True)
class MadeFor:
    """The run of a sampler that a plan was made for.

    Args:
        steps: number of the sampler's steps.
        calls: number of timesteps that it runs over; None if all are computed, whatever their number.
        before: number of these timesteps before the first call (image-to-image).
        timesteps: their values; None for the sampler's own.
    """

    steps: int
    calls: int | None = None
    before: int = 0
    timesteps: tuple[float, ...] | None = None

    def unlike(self, steps: int, calls: int, begin: int, timesteps: Sequence[float]) -> str:
        """Describe how a run differs from it; empty if it does not.

        Args:
            steps: number of steps of its sampler.
            calls: number of timesteps that it runs over.
            begin: index of its first timestep.
            timesteps: their values, twice if the sampler makes two calls a step; empty if not known.
        """
        own = tuple(dict.fromkeys(timesteps))
        if self.timesteps is not None and own not in ((), self.timesteps):
            return (
                f"the plan was made for the timesteps {_listed(self.timesteps)}; this run has "
                f"{_listed(own)}; call pipe(..., **plan.arguments()) to use those of the plan"
            )
        same = steps == self.steps if self.calls is None else calls == self.calls
        if not same:
            made = "" if self.calls is None else f", {self.calls} calls"
            hint = "" if steps == self.steps else f"; call pipe(..., num_inference_steps={self.steps})"
            return (
                f"the plan was made for {self.steps} steps{made}; this run has {steps} steps, {calls} calls"
                f"{hint}"
            )
        if self.calls is not None and begin != self.before:
            return (
                f"the plan was made for runs of the last {self.calls - self.before} of {self.calls} calls; "
                f"this run makes the last {calls - begin}"
            )
        return ""


def _listed(timesteps: Sequence[float]) -> str:
    """List the first timesteps, the last, and their number."""
    first = ", ".join(f"{t:g}" for t in timesteps[:3])
    return f"{first} ... {timesteps[-1]:g} ({len(timesteps)} of them)" if len(timesteps) > 3 else first


@dataclass(frozen=True)
class Recipe:
    """The parts of a system.

    Args:
        plan: what each call does, for any number of calls.
        sites: decides what each site does: in calls of depth `SITES` and `LAYERS`, or where the plan's
            ratio is above 0 (`Sited.by_ratio`). Without it no tokens are left out.
        whole: every call is computed in full on purpose, as in a plan of fewer steps.
        made_for: the only run that the plan is for; None if it is for any.
    """

    plan: Plan
    sites: Sited | None = None
    whole: bool = False
    made_for: MadeFor | None = None


@singledispatch
def recipe_of(config: Any) -> Recipe:
    """Make the recipe of a configured system; each system registers its own configuration type.

    Raises:
        TypeError: if ``config`` is not a configuration of a system.
    """
    known = sorted(kind.__name__ for kind in recipe_of.registry if kind is not object)
    raise TypeError(f"config: {type(config).__name__} is not a method; methods are {', '.join(known)}")


def origin_of(config: Any) -> Origin | None:
    """Find the origin of a configuration, or of its schedule: what it was searched on."""
    plan = recipe_of(config).plan
    of_plan = plan.origin if isinstance(plan, Schedule) else None
    return of_plan or getattr(config, "origin", None)
