"""What a call does at each site: compute all tokens, none, or some."""

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
    from regrow.core.recipe import Attention, CallInfo, Recovery
    from regrow.models.table import Layout, Site, SkipPlan
    from regrow.schedule import Step
    from regrow.tokens.select import Selection


class Whole(Enum):
    """All tokens of a site, or none."""

    ALL = "all"
    """The site is computed, and what it gives is kept."""
    SKIP = "skip"
    """What it would give follows from what it gave in earlier calls."""
    UNREAD = "unread"
    """It is left out, and what it would give is read by nobody: what reads it is left out as well."""


ALL, SKIP, UNREAD = Whole


@dataclass(frozen=True)
class Some:
    """Some tokens of a site are computed; the others follow from earlier calls.

    Args:
        share: of the tokens that are computed; None if the choice itself says how many, which makes shapes
            depend on data.
        group: sites of one group compute the same tokens.
        otherwise: what is done where some can't be computed by themselves.
        down: the number of tokens is rounded down, not up.
    """

    share: float | None
    group: str
    otherwise: Whole = ALL
    down: bool = False

    def count(self, tokens: int) -> int | None:
        """How many of so many tokens are computed."""
        if self.share is None:
            return None
        # The small term keeps 0.3 * 10 == 3.0000...4 from gaining a token, and 2.9999... from losing one.
        exact = self.share * tokens
        return min(int(exact + 1e-6) if self.down else ceil(exact - 1e-6), tokens)


Decision = Whole | Some


def left_out(plan: Mapping[str, Decision]) -> float:
    """The share of the tokens of all sites that a call does not compute; 0 where there are no sites."""
    shares = [
        1 - (what.share or 0.0) if isinstance(what, Some) else float(what is SKIP) for what in plan.values()
    ]
    return sum(shares) / len(shares) if shares else 0.0


@dataclass(frozen=True)
class View:
    """What decisions may depend on, known before a call begins.

    Args:
        index: of the call in the generation, from 0.
        total: calls of the generation.
        step: what the method's plan says of the call.
        cut: what the call leaves out whole; None if nothing.
        size: height and width of the latent.
    """

    index: int
    total: int
    step: Step
    cut: SkipPlan | None = None
    size: tuple[int, int] = (0, 0)


def runs(block: str, cut: SkipPlan | None) -> bool:
    """Whether a block runs, with its layers, in a call with a cut."""
    own = f"{block}."
    if cut is None or cut.final:
        return cut is None
    return not any(own.startswith(f"{name}.") or name.startswith(own) for name in cut.skip)


@dataclass(frozen=True)
class Entered:
    """What the first site of a call is given.

    Args:
        x: tokens ``(B, N, C)``.
        args: what else it is given, in order.
        kwargs: the same by name.
    """

    x: Tensor
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Entered:
        """What a module is given that takes tokens first, or as ``hidden_states``."""
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
        """What is added, ``(..., out)``."""
        return linear(linear(x, self.down.to(x.device, x.dtype)), self.up.to(x.device, x.dtype))


class Decider:
    """A method at work on a denoiser: it decides for sites, and chooses tokens where some are computed.

    Attributes:
        sites: those that it decides for, in the order they run; all others are always computed.
    """

    sites: Sequence[Site]

    @property
    def observes(self) -> frozenset[LayerKind]:
        """The attentions that `observe` is told of in full calls."""
        return frozenset()

    @property
    def adapters(self) -> Mapping[str, Adapter]:
        """By path, the updates of linear layers in calls that leave something out."""
        return {}

    @property
    def remarks(self) -> Sequence[str]:
        """What a user is warned of when the method is applied."""
        return ()

    @property
    def space(self) -> Recovery | None:
        """How tokens that a site leaves out follow from others of the same call; None if they do not."""
        return None

    @property
    def reads_outputs(self) -> bool:
        """Whether `CallInfo.outputs` is used, of other methods than those of whole calls."""
        return False

    @property
    def entries(self) -> Mapping[str, nn.Module]:
        """By group, the module from whose input tokens are chosen; without one, the group's first site."""
        return {}

    @property
    def attentions(self) -> Mapping[str, tuple[str, nn.Module]]:
        """By group, the self-attention that has to run before its tokens are chosen, and its path."""
        return {}

    def plan(self, view: View) -> Mapping[str, Decision]:
        """By the name of a site, what a call does there."""
        raise NotImplementedError

    def begin(self, memory: Any = None) -> Any:
        """What is remembered until the next full call, before a full call.

        Args:
            memory: what was remembered so far; None in the first call of a branch.
        """

    def observe(self, memory: Any, site: Site, attention: Attention) -> None:
        """Look at an attention in a full call: that of a site, or the first of its kind in a block."""

    def look(self, memory: Any, entered: Entered, info: CallInfo) -> Any:
        """What `choose` is given as ``seen``: asked once a call that computes some tokens.

        Args:
            memory: of the last full call.
            entered: what the first site that runs is given.
            info: what is known before the call.
        """

    def choose(
        self, memory: Any, seen: Any, site: Site, x: Tensor, count: int | None, info: CallInfo
    ) -> Tensor | Selection:
        """The tokens ``(B, n)`` that a site computes, ascending; with `space`, a selection.

        Args:
            memory: of the last full call; it may be changed.
            seen: what `look` gave.
            site: the first of its group.
            x: what it is given, ``(B, N, C)``.
            count: n; None where the choice says how many, the same in every sample.
            info: what is known before the call.
        """
        raise NotImplementedError


class Sited:
    """What a method of sites is before a denoiser is known; it equals and hashes."""

    @property
    def seed(self) -> int:
        """Seed of the generator of a generation."""
        return 0

    @property
    def aligns(self) -> bool:
        """Whether `CallInfo.guided` is used."""
        return False

    @property
    def by_ratio(self) -> bool:
        """Whether it is asked where the plan's ratio is above 0, not in calls of single sites or layers."""
        return self.full_calls > 0

    def acts_in(self, step: Step) -> bool:
        """Whether it is asked in a call of a plan."""
        return step.ratio > 0 if self.by_ratio else step.of_sites

    @property
    def full_calls(self) -> int:
        """Of a method that chooses the tokens of whole calls, those of all tokens that a generation begins
        with, wherever it begins; 0 of others."""
        return 0

    def on(self, denoiser: nn.Module, layout: Layout) -> Decider:
        """The method at work on a denoiser.

        Raises:
            UnsupportedModelError: if the model has no sites that it could decide for.
            ValueError: if what the method has learned was learned of another model.
        """
        raise NotImplementedError
