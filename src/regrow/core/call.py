"""A call of the denoiser: its state while it runs, and its record afterwards."""

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
    """The record of a call of the denoiser.

    Args:
        position: its step in the generation; None if that is not known.
        branch: number of its branch of guidance, in the order of first calls.
        depth: up-path layers computed; `FULL` for a full call.
        ratio: share of tokens pruned where the method prunes; 1 if layers that should recompute tokens
            reused all of them.
        planned: the step of the schedule; None if the call has no plan.
        inputs: its positional and keyword arguments on the meta device, enough to count its MACs.
        knew_text: whether values that depend on the text alone were reused.
        age: age in steps of the features that it reused; 0 if it reused none.
        reason: why it did not do what was planned; empty if it did.
        recovery: recovery in time of what it left out, such as ``"taylor(1)"``; empty if nothing.
        grounded: whether boxes were attended to (GLIGEN), which pipelines do in their first calls.
        plan: decisions by the names of sites, if the method decides for sites.
        error: in a full call, the relative deviation of the forecast that a control compared with it.
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
    """The information for an observer after a call of the denoiser.

    Args:
        record: record of the call.
        blocks: by name, the transformer blocks that ran, with the selection of tokens that their pruned
            layers computed; None if they computed all tokens.
        tokens: the tokens ``(B, K)`` that the whole call computed; None if it computed all.
        refreshed: by name, the sites that computed some tokens only, with these tokens ``(B, K)``.
        grid: grid of a transformer's image tokens, if whole calls can compute some of them only.
        leading: number of first blocks that computed all tokens, before ``tokens`` were chosen.
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
    """The state of one generation, dropped when the next one begins.

    Args:
        steps: the planned step of each call; empty if the calls belong to no known generation.
        skip_plans: what is skipped at each depth.
        generator: random generator for the choice of tokens.
        twin: the denoiser as it was when the generation began.
        whole: why all calls are computed in full; empty if they are not.
        late: it began after the first step (image-to-image).
        branches: branches of guidance.
        slots: memory of each branch, by its number.
        records: records of the calls.
        ended: whether its last step is done.
        caller: the pipeline's call that it is part of.
        controlled: decides the steps as they come; None if all are planned.
    """

    steps: list[Step]
    skip_plans: Mapping[int, SkipPlan]
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

    def due(self, skip_plan: SkipPlan, index: int) -> int:
        """Find the last earlier step that is planned to keep what a skip plan restores; -1 if none is."""
        for step in range(index - 1, -1, -1):
            other = self.skip_plans.get(self.steps[step].depth)
            if other is None or (skip_plan.final and not other.final):
                return step
        return -1


@dataclass
class Call:
    """The call in progress: what it does is decided before it begins.

    Hooks write to it what other hooks read later in the call: selections, chosen tokens, features, and
    how often they acted.

    Args:
        slot: memory of the branch.
        step: index of the sampler's step.
        recovery: recovery in time of what is skipped.
        forecasts: the recovery uses more than the last value.
        skip_plan: what is skipped; None in a full call.
        store: the skip plans whose features this call keeps.
        dense: skipped modules return zeros of the true shape.
        info: what the method may look at.
        selections: by group, the selection of tokens that its layers compute.
        restored: number of modules that returned cached values.
        stood_in: modules that returned placeholders, and for which no module has restored yet.
        entered: input of a skip plan's first module in this call.
        can_subset: whether some of the image's tokens can be computed, and attentions observed.
        positions: for the attention that runs, if its queries and keys are turned where they are made: the
            cosines and sines ``(T + N, D)`` of all tokens, the site that it is in, and the tokens that it
            computes, None for all.
        turned: by site and rows, the cosines and sines of the tokens that its attentions compute.
        turns: number of earlier calls, in this call, of each module that may be skipped.
        knows_text: whether the text is that of the last call.
        pruned: number of layers that left tokens out.
        unpruned: why a layer that should leave tokens out did not.
        chosen: by group, the tokens that its sites compute.
        caught: by name, outputs of an observed attention's projections, or of the norms after them.
        plan: the method's decisions by the names of sites; sites without one are computed.
        decisions: what each site does, by name: by the plan, or skipped by the skip plan.
        spans: the skipped or kept skip plans that recover what several modules added.
        choosers: by group of sites that compute the same tokens, the first site.
        keeps_sites: sites that are computed whole keep their values.
        seen: what the method saw at the first site, in a call that computes some tokens; empty before.
        given: by the name of a site, the number of sequences that it was given.
        partial: by the name of the site that runs, the tokens that it computes, if not all.
        compares: the skip plan and the recovery whose forecast a full call compares with its values.
        deviation: relative deviation of the first value that was compared.
    """

    slot: BranchMemory
    step: int
    recovery: TimeRecovery
    forecasts: bool
    skip_plan: SkipPlan | None
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
    positions: tuple[tuple[Tensor, ...], str, Subset | None] | None = None
    turned: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)
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

    def compare(self, skip_plan: SkipPlan, key: str, value: Any) -> None:
        """Measure how far a skip plan's forecast is from a computed value, before the value is kept."""
        if self.compares is not None and self.compares[0] == skip_plan and self.deviation is None:
            self.deviation = self.slot.store.deviation(key, self.step, self.compares[1], value)

    def recovered(self, key: str) -> Any:
        """Recover a site's value, by its key; if it is reused, the last value itself."""
        store = self.slot.store
        return store.at(key, self.step, self.recovery) if self.forecasts else store.last(key)

    def reuses(self, layer: str) -> bool:
        """Whether a layer returns a value recovered from earlier calls, whatever its input."""
        skip_plan = self.skip_plan
        if skip_plan is None or skip_plan.entry is not None or self.decisions.get(layer) is not SKIP:
            return False
        return skip_plan.key(layer) in self.slot.store

    @property
    def tokens(self) -> Subset | None:
        """The tokens that the following blocks compute; None for all."""
        return self.partial.get(TOKENS)
