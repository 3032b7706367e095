"""What a published system is made of: a plan of its calls, and a rule that selects tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import singledispatch
from typing import Any, Literal

import torch
from torch import Tensor, nn

from regrow.core.decision import Decision, Sited, Some, View
from regrow.models.errors import UnsupportedModelError
from regrow.models.table import TOKENS, Layout, Site
from regrow.origin import Origin
from regrow.schedule import Plan, Schedule
from regrow.tokens.grid import Grid


class Features(str, Enum):
    """Which features similarities and scores are taken from."""

    BLOCK_INPUT = "block_input"
    """The hidden states entering the transformer block, before norm1 (both released codes)."""
    NORM1 = "norm1"
    """The output of norm1, which the self-attention reads."""
    ATTENTION = "attention"
    """As norm1, with the queries and keys of the self-attention: it has run when its block's tokens are
    selected, and what is selected holds for the blocks that follow in the same stage."""


class After(str, Enum):
    """Where in the block whose attention is read pruning begins."""

    SELF_ATTENTION = "self_attention"
    """Its own cross-attention and feed-forward leave tokens out, and all layers of the blocks behind it."""
    FEED_FORWARD = "feed_forward"
    """The blocks behind it alone."""


class Recovery(str, Enum):
    """Where a pruned token's value comes from."""

    COPY = "copy"
    """The output of the most similar token (pruning)."""
    MEAN = "mean"
    """As copy, but that token enters the layer as the mean of itself and those it stands for (merging)."""


class Alignment(str, Enum):
    """How the two halves of a guided batch come to the same base tokens."""

    CONDITIONAL = "conditional"
    UNCONDITIONAL = "unconditional"
    MEAN = "mean"
    OFF = "off"


Level = Literal["top", 1, 2, 4, 8]


@dataclass(frozen=True)
class Where:
    """The layers in which tokens are pruned.

    Args:
        self_attention: prune in the attention among image tokens.
        cross_attention: prune the queries of the attention to the text.
        feed_forward: prune in the token-wise network.
        max_downsample: deepest level, as latent positions a token spans along one side; ``"top"`` is
            the finest level at which the model has attention (1 for SD 1.5 and 2, 2 for SDXL).
        features: what the selection looks at.
        recovery: where pruned tokens' values come from.
        after: with `Features.ATTENTION`, where pruning begins.
    """

    self_attention: bool = True
    cross_attention: bool = False
    feed_forward: bool = False
    max_downsample: Level = "top"
    features: Features = Features.BLOCK_INPUT
    recovery: Recovery = Recovery.COPY
    after: After = After.SELF_ATTENTION


@dataclass(frozen=True)
class Attention:
    """What an attention multiplied.

    Args:
        query: ``(B, heads, n, D)``, those of the image's tokens first.
        key: ``(B, heads, m, D)``; in a self-attention, those of the image's tokens first.
        tokens: number N of the image's tokens.
        bias: added to the products, or None; it broadcasts to ``(B, heads, n, m)``.
    """

    query: Tensor
    key: Tensor
    tokens: int
    bias: Tensor | None


@dataclass(frozen=True)
class CallInfo:
    """What a rule may look at.

    Args:
        batch: samples in the batch, both halves of guidance counted.
        guided: whether the batch is an unconditional half followed by a conditional half.
        outputs: the model's last computed outputs ``(B, C, H, W)`` (as tokens ``(B, N, D)`` where
            those of whole calls are chosen), newest last, at most two.
        generator: the run's seeded generator, on the model's device.
        conditional_first: in a guided batch the conditional half comes first (DiT).
        attention: the self-attention that has just run, for a rule with `Features.ATTENTION` and
            where the tokens of whole calls are chosen by that of a block.
        cached: the call leaves out layers or blocks that an earlier one computed.
        grid: of the image's tokens, where sites are decided for; of a video, that of a frame.
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


def stream_of(denoiser: nn.Module, layout: Layout, reads: int | None = None, hint: str = "") -> Site:
    """The way of a transformer's tokens through its blocks, or through those behind one.

    Args:
        denoiser: the model.
        layout: its table.
        reads: index of the block, by whose self-attention tokens are chosen.
        hint: what to say to somebody whose model has none.

    Raises:
        UnsupportedModelError: if a call of the model can't compute some of its tokens only.
        ValueError: if no block comes behind that one.
    """
    site = layout.token_stream(reads)
    if site is None:
        raise UnsupportedModelError(
            f"model: a call of {type(denoiser).__name__} can't compute some of its tokens only"
            + (f"; {hint}" if hint else "")
        )
    return site


def some_of_stream(ratio: float) -> Mapping[str, Decision]:
    """The plan of a call that computes all but a share of the tokens.

    The number is rounded down, as CAT Pruning's released code does: 1228 of 4096 tokens for 0.3.
    """
    return {TOKENS: Some(1 - ratio, TOKENS, down=True)} if ratio else {}


@dataclass(frozen=True)
class MadeFor:
    """The run of a sampler that a plan was made for.

    Args:
        steps: of the sampler.
        calls: timesteps that it runs over; None if all are computed, however many there are.
        before: of these, how many come before the first call (image-to-image).
        timesteps: what they are; None for the sampler's own.
    """

    steps: int
    calls: int | None = None
    before: int = 0
    timesteps: tuple[float, ...] | None = None

    def unlike(self, steps: int, calls: int, begin: int, timesteps: Sequence[float]) -> str:
        """How a run differs from it, in words; empty if it does not.

        Args:
            steps: of its sampler.
            calls: timesteps that it runs over.
            begin: index of the one that it begins with.
            timesteps: what they are, those of samplers that call twice a step twice; empty if not known.
        """
        own = tuple(dict.fromkeys(timesteps))
        if self.timesteps is not None and own not in ((), self.timesteps):
            return (
                f"the plan was made for the timesteps {_listed(self.timesteps)}; this run has "
                f"{_listed(own)}: give the pipeline those of the plan, pipe(..., **plan.arguments())"
            )
        same = steps == self.steps if self.calls is None else calls == self.calls
        if not same:
            made = "" if self.calls is None else f", {self.calls} calls"
            hint = "" if steps == self.steps else f": give the pipeline num_inference_steps={self.steps}"
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
    """The first of them, how many, and the last."""
    first = ", ".join(f"{t:g}" for t in timesteps[:3])
    return f"{first} ... {timesteps[-1]:g} ({len(timesteps)} of them)" if len(timesteps) > 3 else first


@dataclass(frozen=True)
class Recipe:
    """What a system is made of.

    Args:
        plan: what each call does, for any number of calls.
        sites: how it is decided what each site does: in calls of depth `SITES` and `LAYERS`, or where the
            plan's ratio is above 0 (`Sited.by_ratio`). Without it no tokens are left out.
        whole: every call is meant to be computed in full, as in a plan of fewer steps.
        made_for: the only run that the plan is for; None if it is for any.
    """

    plan: Plan
    sites: Sited | None = None
    whole: bool = False
    made_for: MadeFor | None = None


@singledispatch
def recipe_of(config: Any) -> Recipe:
    """The recipe of a configured system; each system registers its own configuration type.

    Raises:
        TypeError: if ``config`` is no configuration of a system.
    """
    known = sorted(kind.__name__ for kind in recipe_of.registry if kind is not object)
    raise TypeError(f"config: {type(config).__name__} is no method; methods are {', '.join(known)}")


def origin_of(config: Any) -> Origin | None:
    """What a configuration, or the schedule that is its plan, was searched on."""
    plan = recipe_of(config).plan
    of_plan = plan.found if isinstance(plan, Schedule) else None
    return of_plan or getattr(config, "found", None)


def check_ratio(ratio: float, patch: int) -> None:
    """Refuse a ratio that would prune base tokens.

    Raises:
        ValueError: if ``ratio > 1 - 1 / patch**2``.
    """
    highest = 1 - 1 / patch**2
    if ratio > highest + 1e-9:
        raise ValueError(
            f"ratio: {ratio} is not allowed, it must be <= {highest:g}: with patch={patch} one token "
            f"in {patch**2} is a base token and stays"
        )


def align(score: Tensor, alignment: Alignment, guided: bool, *, conditional_first: bool = False) -> Tensor:
    """CFG alignment of DaTo (step 3): both halves of a guided batch get the same scores.

    Equal scores give equal base tokens, so this is the same as copying the positions of one half over
    the other, and it serves the mean as well.

    Args:
        score: ``(B, N)``; of a guided batch the unconditional half comes first, as in diffusers.
        alignment: whose scores count.
        guided: whether the batch has two halves; if not, nothing is aligned.
        conditional_first: the conditional half comes first instead.
    """
    if not guided or alignment is Alignment.OFF:
        return score
    return deciding_half(score, alignment, conditional_first).repeat(2, 1)


def deciding_half(values: Tensor, alignment: Alignment, conditional_first: bool) -> Tensor:
    """Of a guided batch ``(2 B, ...)`` the half, or the mean of both, that decides for both: ``(B, ...)``.

    Args:
        values: of both halves.
        alignment: which; not off.
        conditional_first: the conditional half comes first, not second.
    """
    unconditional, conditional = values.chunk(2)
    if conditional_first:
        unconditional, conditional = conditional, unconditional
    if alignment is Alignment.MEAN:
        return (unconditional + conditional) / 2
    return conditional if alignment is Alignment.CONDITIONAL else unconditional
