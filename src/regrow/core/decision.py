"""Decisions: a call computes all tokens of a site, none, or some."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from math import ceil
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.functional import linear

from regrow.models.layers import LayerKind

if TYPE_CHECKING:
    from regrow.core.recipe import Attention, CallInfo
    from regrow.models.table import Layout, Site, SkipPlan
    from regrow.recover.space import Recovery
    from regrow.schedule import Step
    from regrow.tokens.select import Selection


class Whole(Enum):
    """A decision for all tokens of a site."""

    ALL = "all"
    """The site is computed, and its value is kept."""
    SKIP = "skip"
    """The site is skipped; its value is recovered from earlier calls."""
    UNREAD = "unread"
    """The site is skipped, and so is everything that reads it; it returns a placeholder."""


ALL, SKIP, UNREAD = Whole


@dataclass(frozen=True)
class Some:
    """Some tokens of a site are computed; the others are recovered from earlier calls.

    Args:
        share: share of the tokens that is computed; None if the choice sets the number, then shapes
            depend on data.
        group: sites of one group compute the same tokens.
        otherwise: the decision if the site can't compute some tokens only.
        down: the number of tokens is rounded down, not up.
    """

    share: float | None
    group: str
    otherwise: Whole = ALL
    down: bool = False

    def count(self, tokens: int) -> int | None:
        """Count the computed tokens among ``tokens`` tokens; None if the choice sets the number."""
        if self.share is None:
            return None
        # Without the small term, rounding of 0.3 * 10 to 3.0000...4 or 2.9999... would add or lose a token.
        exact = self.share * tokens
        return min(int(exact + 1e-6) if self.down else ceil(exact - 1e-6), tokens)


Decision = Whole | Some


def left_out(plan: Mapping[str, Decision]) -> float:
    """Compute the share of all sites' tokens that a call does not compute; 0 if there are no sites."""
    shares = [
        1 - (what.share or 0.0) if isinstance(what, Some) else float(what is SKIP) for what in plan.values()
    ]
    return sum(shares) / len(shares) if shares else 0.0


@dataclass(frozen=True)
class View:
    """The facts that decisions may depend on, known before a call begins.

    Args:
        index: index of the call in the generation, from 0.
        total: number of calls of the generation.
        step: the call's step in the method's plan.
        skip_plan: what the call skips; None if nothing.
        size: height and width of the latent.
    """

    index: int
    total: int
    step: Step
    skip_plan: SkipPlan | None = None
    size: tuple[int, int] = (0, 0)


def runs(block: str, skip_plan: SkipPlan | None) -> bool:
    """Whether a block runs with its layers in a call with a skip plan."""
    own = f"{block}."
    if skip_plan is None or skip_plan.final:
        return skip_plan is None
    return not any(own.startswith(f"{name}.") or name.startswith(own) for name in skip_plan.skip)


@dataclass(frozen=True)
class Entered:
    """The arguments of the first site of a call.

    Args:
        x: tokens ``(B, N, C)``.
        args: the other positional arguments.
        kwargs: the other named arguments.
    """

    x: Tensor
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Entered:
        """Sort the arguments of a module that takes tokens first, or as ``hidden_states``."""
        if args:
            return cls(args[0], args[1:], kwargs)
        return cls(kwargs["hidden_states"], (), {k: v for k, v in kwargs.items() if k != "hidden_states"})


@dataclass(frozen=True, eq=False)
class Adapter:
    """A low-rank update of a linear layer: ``up down x`` is added to what it returns.

    Args:
        down: ``(rank, in)``.
        up: ``(out, rank)``.
    """

    down: Tensor
    up: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Compute the update ``(..., out)``."""
        return linear(linear(x, self.down.to(x.device, x.dtype)), self.up.to(x.device, x.dtype))


class Decider:
    """A method on a denoiser: it decides for sites, and chooses tokens where some are computed.

    Attributes:
        sites: the sites that it decides for, in the order they run; all others are always computed.
    """

    sites: Sequence[Site]

    @property
    def observes(self) -> frozenset[LayerKind]:
        """The kinds of attentions that `observe` gets in full calls."""
        return frozenset()

    @property
    def adapters(self) -> Mapping[str, Adapter]:
        """Updates of linear layers, by path, in calls that leave something out."""
        return {}

    @property
    def remarks(self) -> Sequence[str]:
        """Warnings for the user when the method is applied."""
        return ()

    @property
    def space(self) -> Recovery | None:
        """Recovery in space, from other tokens of the same call; None if tokens are recovered in time."""
        return None

    @property
    def reads_outputs(self) -> bool:
        """Whether `CallInfo.outputs` is used; methods that choose tokens of whole calls always get it."""
        return False

    @property
    def entries(self) -> Mapping[str, nn.Module]:
        """By group, the module whose input tokens are chosen from; default: the group's first site."""
        return {}

    @property
    def attentions(self) -> Mapping[str, tuple[str, nn.Module]]:
        """By group, the path and module of the self-attention that must run before tokens are chosen."""
        return {}

    def plan(self, view: View) -> Mapping[str, Decision]:
        """Decide what a call does at each site, by name."""
        raise NotImplementedError

    def begin(self, memory: Any = None) -> Any:
        """Make the memory that lasts until the next full call; called before a full call.

        Args:
            memory: the memory until now; None in the first call of a branch.
        """

    def observe(self, memory: Any, site: Site, attention: Attention) -> None:
        """Observe an attention in a full call: that of a site, or the first of its kind in a block."""

    def look(self, memory: Any, entered: Entered, info: CallInfo) -> Any:
        """Compute what `choose` gets as ``seen``; called once in each call that computes some tokens.

        Args:
            memory: memory of the last full call.
            entered: arguments of the first site that runs.
            info: what is known before the call.
        """

    def choose(
        self, memory: Any, seen: Any, site: Site, x: Tensor, count: int | None, info: CallInfo
    ) -> Tensor | Selection:
        """Choose the tokens ``(B, n)`` that a site computes, ascending; with `space`, a selection.

        Args:
            memory: memory of the last full call; it may be changed.
            seen: what `look` returned.
            site: the first of its group.
            x: input of the site, ``(B, N, C)``.
            count: n; None if the choice sets the number, the same in every sample.
            info: what is known before the call.
        """
        raise NotImplementedError


class Sited:
    """A method that decides for sites, before it has a denoiser; comparable and hashable."""

    @property
    def seed(self) -> int:
        """Seed of each generation's random generator."""
        return 0

    @property
    def aligns(self) -> bool:
        """Whether `CallInfo.guided` is used."""
        return False

    @property
    def by_ratio(self) -> bool:
        """Whether it decides in calls with a ratio above 0, not in calls of single sites or layers."""
        return self.full_calls > 0

    def acts_in(self, step: Step) -> bool:
        """Whether it decides in a call of a plan."""
        return step.ratio > 0 if self.by_ratio else step.of_sites

    @property
    def full_calls(self) -> int:
        """Number of first calls of a generation with all tokens, wherever it begins; 0 if the method does
        not choose the tokens of whole calls."""
        return 0

    def on(self, denoiser: nn.Module, layout: Layout) -> Decider:
        """Make the method's decider for a denoiser.

        Raises:
            UnsupportedModelError: if the model has no sites for it.
            ValueError: if the method was trained on another model.
        """
        raise NotImplementedError
