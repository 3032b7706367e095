"""What is known of a call of the denoiser: while it is in progress, and what is told of it afterwards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from regrow.core.branches import Branches
from regrow.core.caller import Caller
from regrow.core.clock import Position
from regrow.core.controlled import Controlled, Reading
from regrow.core.decision import SKIP, Decision
from regrow.core.memory import BranchMemory
from regrow.core.recipe import CallInfo
from regrow.core.twin import Twin
from regrow.models.table import TOKENS, Site, SkipPlan
from regrow.recover.time import TimeRecovery
from regrow.schedule import Step
from regrow.tokens.grid import Grid
from regrow.tokens.select import Selection, Subset


@dataclass(frozen=True)
class CallRecord:
    """What a call of the denoiser did.

    Args:
        position: where in the generation it stood; None if that is not known.
        branch: of guidance, in the order in which they first came.
        depth: up-path layers computed; `FULL` for a full call.
        ratio: share of tokens pruned where the method prunes; 1 if layers in which tokens should have been
            computed again reused all they had.
        planned: what the schedule asked for; None if no plan holds for the call.
        inputs: its positional and keyword arguments on the meta device, enough to count its MACs.
        knew_text: whether what depends on the text alone was not computed again.
        age: how many steps old the features are that it reused; 0 if it reused none.
        reason: why it did something else than planned; empty if it did as planned.
        recovery: in time, of what it left out, such as ``"taylor(1)"``; empty if it left out no module.
        grounded: whether boxes were attended to (GLIGEN), which pipelines do in their first calls.
        plan: by the name of a site, what was decided for it, where sites are decided for.
        error: of a full call, the relative deviation of the forecast that a control compared with it.
    """

    position: Position | None
    branch: int
    depth: int
    ratio: float
    planned: Step | None
    inputs: tuple[Any, Any]
    knew_text: bool = False
    age: int = 0
    reason: str = ""
    recovery: str = ""
    grounded: bool = False
    plan: Mapping[str, Decision] = field(default_factory=dict)
    error: Reading | None = None


@dataclass(frozen=True)
class Observation:
    """What an observer is told after a call of the denoiser.

    Args:
        record: what the call did.
        blocks: the transformer blocks that ran, by name, each with the selection of tokens that its
            pruned layers computed; None where they computed all.
        tokens: the tokens ``(B, K)`` that the whole call computed; None where it computed all.
        refreshed: by the name of a site, the tokens ``(B, K)`` that it computed where it computed some.
        grid: of a transformer's image tokens, if a call of it can compute some of them only.
        leading: blocks at the beginning of the call that computed all tokens before ``tokens`` were chosen.
    """

    record: CallRecord
    blocks: Mapping[str, Selection | None]
    tokens: Tensor | None = None
    refreshed: Mapping[str, Tensor] = field(default_factory=dict)
    grid: Grid | None = None
    leading: int = 0


Observer = Callable[[Observation], None]


@dataclass
class Generation:
    """The state of one generation. It is dropped when the next one begins.

    Args:
        steps: what each call does, by the plan; empty if the calls belong to no generation that is known.
        cuts: what is skipped at each depth.
        generator: of the choice of tokens.
        twin: what the denoiser was when it began.
        whole: why all of its calls are computed in full; empty if they are not.
        late: it began behind the first step (image-to-image).
        branches: of guidance.
        slots: the memory of each branch, by its number.
        records: what the calls did.
        ended: whether its last step is done.
        caller: the call of a pipeline that it is part of.
        controlled: what decides the steps as they come; None if they are all planned.
    """

    steps: list[Step]
    cuts: Mapping[int, SkipPlan]
    generator: torch.Generator
    twin: Twin
    whole: str = ""
    late: bool = False
    branches: Branches = field(default_factory=Branches)
    slots: dict[int, BranchMemory] = field(default_factory=dict)
    records: list[CallRecord] = field(default_factory=list)
    ended: bool = False
    caller: Caller = field(default_factory=Caller)
    controlled: Controlled | None = None

    def due(self, cut: SkipPlan, index: int) -> int:
        """The last step before one whose call, by the plan, keeps what a cut restores; -1 if none does."""
        for step in range(index - 1, -1, -1):
            other = self.cuts.get(self.steps[step].depth)
            if other is None or (cut.final and not other.final):
                return step
        return -1


@dataclass
class Call:
    """What the call in progress does, decided before it begins.

    Hooks leave in it what others read later in the call: selections, chosen tokens and their rows, features
    on their way, and how often they acted.

    Args:
        slot: memory of the branch.
        step: of the sampler, in which it is.
        recovery: how what is skipped follows from earlier calls.
        forecasts: that is more than the last value.
        cut: what is skipped; None in a full call.
        store: the cuts whose features this call keeps.
        dense: skipped modules return zeros of the true shape.
        info: what the method may look at.
        selections: by group, which tokens its layers compute, and which of them the others copy.
        restored: how many modules returned what is cached.
        stood_in: modules that returned what nobody may read, for which no module has restored yet.
        entered: what the first module of a cut was given in this call.
        can_subset: whether some of the image's tokens can be computed, and attentions be looked at.
        positions: of the attention that runs, if its queries and keys are turned where they are made: the
            cosines and sines ``(T + N, D)`` of all tokens; and the tokens that it computes, None for all.
        turns: how often modules that may be skipped were called before in this call.
        knows_text: whether the text is that of the last call.
        pruned: how many layers left tokens out.
        unpruned: why a layer that should leave tokens out did not.
        chosen: by the group of a site, the tokens that it computes.
        caught: by name, what the projections of an observed attention gave, or the norms behind them.
        plan: by the name of a site, what the method decided; those that are not in it are computed.
        decisions: by the name of a site, what it does: by the plan, or as the cut leaves it out.
        spans: the cuts that recover what several modules added, of those that are skipped or kept.
        choosers: by the group of sites that compute the same tokens, the first of them.
        keeps_sites: sites that are computed whole keep what they give.
        seen: what the method saw at the first site, in a call that computes some tokens; empty before.
        given: by the name of a site, how many sequences it was given.
        partial: by the name of the site that runs, the tokens that it computes, if not all.
        compares: the cut and the recovery whose forecast a full call compares with what it computes.
        deviation: how far the first restored value's was from it.
    """

    slot: BranchMemory
    step: int
    recovery: TimeRecovery
    forecasts: bool
    cut: SkipPlan | None
    store: tuple[SkipPlan, ...]
    dense: bool
    info: CallInfo
    selections: dict[str, Selection] = field(default_factory=dict)
    restored: int = 0
    stood_in: set[str] = field(default_factory=set)
    pruned: int = 0
    unpruned: str = ""
    entered: dict[SkipPlan, list[Any]] = field(default_factory=dict)
    can_subset: bool = False
    positions: tuple[tuple[Tensor, ...], Subset | None] | None = None
    turns: dict[str, int] = field(default_factory=dict)
    knows_text: bool = False
    chosen: dict[str, Subset] = field(default_factory=dict)
    caught: dict[str, Tensor] = field(default_factory=dict)
    plan: Mapping[str, Decision] = field(default_factory=dict)
    decisions: Mapping[str, Decision] = field(default_factory=dict)
    spans: tuple[SkipPlan, ...] = ()
    choosers: Mapping[str, Site] = field(default_factory=dict)
    keeps_sites: bool = False
    seen: tuple[Any, ...] = ()
    given: dict[str, int] = field(default_factory=dict)
    partial: dict[str, Subset] = field(default_factory=dict)
    compares: tuple[SkipPlan, TimeRecovery] | None = None
    deviation: Tensor | None = None

    def compare(self, cut: SkipPlan, key: str, value: Any) -> None:
        """Measure how far the forecast of what a cut restores is from a value, before it is kept."""
        if self.compares is not None and self.compares[0] == cut and self.deviation is None:
            self.deviation = self.slot.store.deviation(key, self.step, self.compares[1], value)

    def recovered(self, key: str) -> Any:
        """What follows from the values of a site, by its key; the last one itself where it is reused."""
        store = self.slot.store
        return store.at(key, self.step, self.recovery) if self.forecasts else store.last(key)

    def reuses(self, layer: str) -> bool:
        """Whether a layer returns what follows from earlier calls, whatever it is given."""
        cut = self.cut
        if cut is None or cut.entry is not None or self.decisions.get(layer) is not SKIP:
            return False
        return cut.key(layer) in self.slot.store

    @property
    def tokens(self) -> Subset | None:
        """Those that go through the blocks from here on; None if all do."""
        return self.partial.get(TOKENS)
