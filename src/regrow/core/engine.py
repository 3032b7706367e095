"""A method on a denoiser: each call is decided here, once, before it begins."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from regrow.control import Control
from regrow.core import checks
from regrow.core.branches import Branches
from regrow.core.call import Call, CallRecord, Generation, Observation, Observer
from regrow.core.clock import Clock, ConcurrentGenerationError, ManualClock, OutsideError, Position
from regrow.core.controlled import Controlled, Reading
from regrow.core.decision import SKIP, UNREAD, Decision, Some, View, left_out, runs
from regrow.core.inputs import (
    adds_to_layers,
    arguments_of,
    is_of_no_class,
    may_be_guided,
    without_data,
)
from regrow.core.memory import BranchMemory
from regrow.core.others import (
    adapter_state,
    attentions_in,
    grounding_of,
    shape_of,
)
from regrow.core.recipe import CallInfo, Recipe
from regrow.core.sites import Sites
from regrow.core.store import Store, flatten
from regrow.core.twin import Twin
from regrow.core.watch import Watched
from regrow.models import layout_of
from regrow.models.table import TOKENS, SkipPlan, decided
from regrow.origin import Origin
from regrow.recover.time import REUSE, TimeRecovery
from regrow.schedule import FULL, SITES, Step

# Most calls that are recorded, so that a training loop with a method applied does not fill the memory.
MOST_RECORDS = 10_000


class Engine:
    """Decides at the root of the denoiser what the hooks in its leaves do.

    Args:
        denoiser: the module.
        recipe: the method.
        clock: finds each call's step; None until a generation is opened by hand.
        keep_text: compute what depends on the text alone once for each text.
        quiet: show no warnings.

    Raises:
        UnsupportedModelError: if the model lacks something that the method needs, with its name.
        ValueError: if tokens are chosen after a block that has no blocks after it.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        recipe: Recipe,
        clock: Clock | None = None,
        *,
        keep_text: bool = True,
        quiet: bool = False,
    ) -> None:
        self.denoiser, self.recipe, self.clock = denoiser, recipe, clock
        self._keep_text, self._quiet = keep_text, quiet
        self._shape, self._twin = shape_of(denoiser), Twin.none()
        self.kinds = recipe.plan.kinds()
        self.control = recipe.plan if isinstance(recipe.plan, Control) else None
        self.names = arguments_of(denoiser)
        self._warned: set[str] = set()
        self._said = ""
        self._read()
        self.call: Call | None = None
        self.generation: Generation | None = None
        self.observers: list[Observer] = []
        self.origin: Origin | None = None
        self._busy: int | None = None
        self._aside = False
        self._unfit = ""
        self._lock = threading.Lock()

    def _read(self) -> None:
        """Find the sites that the method uses."""
        layout = layout_of(self.denoiser)
        self.layout = layout if self._keep_text else replace(layout, text={})
        self.sites = self._sites()
        self.skip_plans = self._used_skip_plans()
        if self.sites is not None:
            self.sites.check(self.skip_plans)
        turning = set() if self.sites is None else self.sites.turning
        self.turning = {name: one for name, one in self.layout.rotary.items() if name in turning}
        self._left_out = {skip_plan: _decisions(skip_plan) for skip_plan in self.skip_plans.values()}
        self._attentions = attentions_in(self.denoiser, self._acts_in())
        self._grounding = grounding_of(self.denoiser)

    def _acts_in(self) -> Iterator[str]:
        """List the paths of modules in which calls leave something out; "" is the denoiser."""
        for skip_plan in self.skip_plans.values():
            yield from skip_plan.skip
        if self.sites is not None:
            pruned = self.sites.decider.space is not None
            yield from (site.name for site in self.sites.decider.sites) if pruned else ("",)

    def renew(self) -> bool:
        """Find the sites again after modules were replaced; False if the method no longer fits.

        Kept values are dropped: they are of the old modules.
        """
        before = self.layout, self.sites, self.skip_plans, self.turning
        try:
            self._read()
        except (ValueError, TypeError, AttributeError) as error:
            self.layout, self.sites, self.skip_plans, self.turning = before
            self._unfit = f"the denoiser's modules were replaced, and the method no longer fits: {error}"
            return False
        if self.generation is not None:
            self.generation.slots.clear()
            self.generation.skip_plans = self.skip_plans
        return True

    def _sites(self) -> Sites | None:
        sites = self.recipe.sites
        if sites is None or not any(map(sites.acts_in, self.kinds)):
            return None
        decider = sites.on(self.denoiser, self.layout)
        return Sites(decider, self.layout, sites.full_calls, self.warn_once)

    @property
    def sited(self) -> Sites:
        """The method's decisions for sites; only if it has some."""
        assert self.sites is not None
        return self.sites

    @property
    def watched(self) -> tuple[Watched, ...]:
        """The attentions that are observed."""
        return () if self.sites is None else tuple(self.sites.watched)

    def _used_skip_plans(self) -> dict[int, SkipPlan]:
        """List the skip plans of the depths that the plan uses on this model."""
        depths = sorted({step.depth for step in self.kinds})
        skip_plans = {d: skip_plan for d in depths if (skip_plan := self.layout.skip_plan(d)) is not None}
        if self.sites is not None and SITES in depths:
            skip_plans[SITES] = decided(self.sites.decider.sites)
        return skip_plans

    def prunes(self, step: Step) -> bool:
        """Whether a call of the plan leaves tokens out."""
        return self.sites is not None and self.sites.prunes(step, self.skip_plans.get(step.depth))

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "a denoiser can't be copied while a method is applied to it; call run.remove() first"
        )

    def warn_once(self, about: str, message: str) -> None:
        """Warn, only the first time in this run."""
        self._said = message
        if about not in self._warned and not self._quiet:
            self._warned.add(about)
            warnings.warn(message, stacklevel=2)

    def enter(self) -> None:
        """Note that a call of the denoiser begins.

        Raises:
            ConcurrentGenerationError: if another thread is in one.
        """
        me = threading.get_ident()
        with self._lock:
            if self._busy not in (None, me) and _is_inside(self._busy, self.denoiser):
                raise ConcurrentGenerationError(
                    "the denoiser is in use by another thread; an accelerated denoiser serves one "
                    "generation at a time. Give each thread a pipeline with a denoiser of its own."
                )
            self._busy = me
        self.call, self._unfit = None, ""

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Compute calls as if no method were applied, inside this context."""
        self._aside = True
        try:
            yield
        finally:
            self._aside = False

    def begin(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Decide what the call that begins now does."""
        if self._aside:
            return
        inputs = dict(zip(self.names, args, strict=False)) | dict(kwargs)
        latents, timestep = flatten(inputs.get(self.layout.sample))[0], inputs.get(self.layout.time)
        if not latents or timestep is None:
            return  # The denoiser itself names the missing argument.
        if torch.is_grad_enabled():
            reason = "regrow steps aside while gradients are recorded; use torch.no_grad()"
            self._leave_alone(reason, args, kwargs)
            return
        if self.clock is None:
            reason = "the denoiser is used without a pipeline and outside run.generation(num_steps)"
            self._leave_alone(reason, args, kwargs)
            return
        try:
            position = self.clock.read(timestep)
        except OutsideError as outside:
            self._leave_alone(str(outside), args, kwargs)
            return
        self._decide(position, latents[0], inputs, args, kwargs)

    def _leave_alone(self, reason: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Compute a call that belongs to no generation in full, warn, and record it."""
        self.warn_once("outside", f"a call of the denoiser is computed in full: {reason}")
        if self.generation is None or self.generation.ended:
            none = _generator(torch.device("cpu"), 0)
            self.generation = Generation([], {}, none, self._look())
        records = self.generation.records
        if len(records) < MOST_RECORDS:
            inputs = (without_data(args), without_data(dict(kwargs)))
            records.append(CallRecord(None, 0, FULL, 0.0, None, inputs, reason=reason))

    def _begin_generation(self, position: Position, device: torch.device) -> Generation:
        """Make the state of a generation whose first call begins now."""
        before = self.generation
        again = before is not None and before.caller.is_same()
        if not again:
            self.release()
        seed = 0 if self.recipe.sites is None else self.recipe.sites.seed
        controlled = None
        if self.control is None:
            steps = list(self.recipe.plan.resample(position.total).steps())
        else:
            # If it is refused, no generation remains that calls could belong to.
            self.generation = None
            controlled = Controlled(self.control, position.total, position.index)
            steps = [self.control.measured] * position.total
        checks.warn_of_run(self, position)
        # Hooks and wrappers of the denoiser itself are outside ours and run in every call.
        skipped = sorted(
            frozenset().union(*(skip_plan.skip for skip_plan in self.skip_plans.values())) - {""}
        )
        whole = checks.beside_others(self) or checks.listened(self.denoiser, skipped)
        if not whole:
            checks.warn_of_wrapped(self, skipped)
        generation = Generation(
            steps,
            self.skip_plans,
            _generator(device, seed),
            self._look(),
            whole,
            position.index > 0,
            controlled=controlled,
        )
        if before is not None and again:
            # The members of an ensemble share one report.
            generation.records = before.records
        if self.sites is not None and not whole:
            self.sites.warn_of_whole_calls(generation.steps[position.index :], self.skip_plans)
        return generation

    def _look(self) -> Twin:
        """Record the denoiser as it is now; if it was changed after `apply`, with a model to count by.

        Some pipelines set processors for one generation (perturbed-attention guidance).
        """
        shape = shape_of(self.denoiser)
        if shape == self._shape or self._is_bare:
            return Twin(shape)
        if shape != self._twin.shape:
            self._twin = Twin.of(self.denoiser, shape)
        return self._twin

    @property
    def _is_bare(self) -> bool:
        """Whether the denoiser has no weights, as models for counting have."""
        return next(self.denoiser.parameters()).is_meta

    def _decide(
        self,
        position: Position,
        sample: Tensor,
        inputs: Mapping[str, Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> None:
        generation = self.generation
        if position.begins or generation is None or not generation.steps:
            generation = self.generation = self._begin_generation(position, sample.device)
        # Adapters and processors may change within a generation.
        generation.whole = generation.whole or self._unfit or checks.keeps_maps(self._attentions)
        if generation.whole:
            reason = generation.whole
            self.warn_once(f"whole {reason}", f"calls of a generation are computed in full: {reason}")
        given = {k: v for k, v in inputs.items() if k not in (self.layout.sample, self.layout.time)}
        branch = generation.branches.find(given, position.index)
        slot = self._slot(generation, branch, sample, inputs, args, kwargs)
        slot.store.begin(position.index)
        if generation.controlled is not None:
            generation.steps[position.index] = generation.controlled.step(position.index)
        planned = generation.steps[position.index]
        skip_plan, reason = self._skip_plan(generation, slot, planned, position.index)
        height, width = sample.shape[-2:] if sample.ndim > 3 else (0, 0)
        view = View(position.index, position.total, planned, skip_plan, (height, width))
        asked = (
            self.sites is not None
            and not generation.whole
            and self.sites.decides(planned, skip_plan, slot.calls)
        )
        plan = self.sited.plan(view) if asked else {}
        if asked and not plan and self.sited.has_calls_of_its_own:
            # Every site is computed.
            skip_plan = None
        recovery = "" if skip_plan is None else self._recovery(slot, skip_plan, planned, position.index)
        age = 0 if skip_plan is None else position.index - slot.stored[skip_plan]
        if 0 <= slot.last < position.index - 1:
            # Differences to old outputs mean nothing.
            slot.outputs.clear()
        slot.last = position.index
        self._said = ""
        call = self.call = self._opened(generation, slot, view, skip_plan, sample, inputs)
        if self.sites is not None:
            call.plan = self.sites.settled(plan, call, inputs)
            call.choosers = self.sites.choosers(call.plan)
            call.keeps_sites = self.sites.keeps(call)
            if skip_plan is None and not call.plan:
                slot.observed = self.sites.decider.begin(slot.observed)
            self.sites.prepare(call, sample)
        call.decisions = {} if skip_plan is None else self._left_out[skip_plan]
        if asked:
            call.decisions = call.decisions | dict(self.sited.decisions(call.plan))
        if planned.ratio and not reason and not _computes_some(call.plan):
            reason = generation.whole or self._said
        generation.records.append(
            CallRecord(
                position,
                branch,
                FULL if skip_plan is None else planned.depth,
                0.0 if self.sites is None else _share(planned, call.plan),
                planned,
                slot.inputs,
                call.knows_text,
                age,
                reason,
                recovery,
                grounded=any(module.enabled for module in self._grounding),
                plan=call.plan,
            )
        )

    def _opened(
        self,
        generation: Generation,
        slot: BranchMemory,
        view: View,
        skip_plan: SkipPlan | None,
        sample: Tensor,
        inputs: Mapping[str, Any],
    ) -> Call:
        """What is known of a call before sites are decided for."""
        store = _stored(generation.skip_plans.values(), skip_plan)
        skip_plans = store if skip_plan is None else (*store, skip_plan)
        info = CallInfo(
            sample.shape[0],
            slot.guided and self._is_split(sample),
            tuple(slot.outputs),
            generation.generator,
            self.layout.conditional_first,
            cached=skip_plan is not None,
            grid=slot.grid or self.layout.frame(sample),
            view=view,
        )
        state = tuple(adapter_state(module) for module in self.layout.text.values())
        knows_text = bool(state) and slot.knows(inputs.get("encoder_hidden_states"), state)
        if not knows_text:
            # Modules that this call skips must not later reuse outputs of another text.
            slot.store.drop(*self.layout.text)
        return Call(
            slot=slot,
            step=view.index,
            recovery=view.step.recovery,
            forecasts=view.step.recovery != REUSE,
            skip_plan=skip_plan,
            store=store,
            spans=tuple(one for one in skip_plans if one.entry is not None),
            dense=adds_to_layers(inputs) or _freeu(self.denoiser),
            info=info,
            can_subset=not generation.whole and checks.can_subset(self, slot),
            compares=self._compared(skip_plan),
            knows_text=knows_text,
        )

    def _compared(self, skip_plan: SkipPlan | None) -> tuple[SkipPlan, TimeRecovery] | None:
        """Find the skip plan and recovery that a full call compares with its values; None if not full."""
        if self.control is None or skip_plan is not None:
            return None
        measured = self.control.measured
        own = self.skip_plans.get(measured.depth)
        return None if own is None else (own, measured.recovery)

    def _recovery(self, slot: BranchMemory, skip_plan: SkipPlan, planned: Step, index: int) -> str:
        """Name what recovers a call from the values that exist; warns if its weights are for others."""
        key = next(key for key in map(skip_plan.key, skip_plan.restore) if key in slot.store)
        if not slot.store.knows(key, index, planned.recovery):
            self.warn_once(
                "recovery",
                "the plan's fitted weights are for other steps than this generation has; where they don't "
                "fit, values are forecast from the line through the last two (taylor)",
            )
        return slot.store.used(key, index, planned.recovery)

    def _skip_plan(
        self, generation: Generation, slot: BranchMemory, planned: Step, index: int
    ) -> tuple[SkipPlan | None, str]:
        """Decide what a call leaves out, and say why if that is less than planned."""
        skip_plan = generation.skip_plans.get(planned.depth)
        slot.calls += 1
        first = self.sites is not None and slot.calls <= self.sites.full_calls
        if skip_plan is None:
            return None, ""
        if generation.whole:
            return None, generation.whole
        if first:
            return None, "the first calls of a generation are full"
        keys = [key for key in map(skip_plan.key, skip_plan.restore) if key in slot.store]
        if not keys:
            if slot.calls == 1 and generation.records:
                return None, "it is given another text, batch or picture than the calls before it"
            return None, "what it would reuse was not computed yet"
        begins = any(slot.store.begins(key, index, planned.recovery) for key in keys)
        if generation.late and not begins:
            return None, "a run that begins late computes two values before the first forecast"
        kept = slot.stored.get(skip_plan, -1)
        if kept < generation.due(skip_plan, index):
            return None, f"what it would reuse is of step {kept}, older than planned"
        return skip_plan, ""

    def _slot(
        self,
        generation: Generation,
        branch: int,
        sample: Tensor,
        inputs: Mapping[str, Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> BranchMemory:
        """Find the memory of a branch; it is new if the batch changed."""
        for gone in generation.slots.keys() - generation.branches.numbers:
            del generation.slots[gone]
        text = inputs.get("encoder_hidden_states")
        shapes = [tensor.shape for tensor in flatten((inputs[self.layout.sample], text))[0]]
        key = (shapes, sample.dtype, sample.device)
        slot = generation.slots.get(branch)
        if slot is None or slot.key != key:
            wanted = self.recipe.sites is not None and self.recipe.sites.aligns
            bare = (without_data(args), without_data(dict(kwargs)))
            guided = wanted and self._may_be_guided(sample, inputs)
            store = Store({step.recovery for step in self.kinds}, len(generation.steps))
            slot = BranchMemory(key, bare, guided, store)
            if self.layout.stream is not None:
                slot.grid = self.layout.stream.grid(sample, inputs)
            generation.slots[branch] = slot
        return slot

    def _may_be_guided(self, sample: Tensor, kwargs: Mapping[str, Any]) -> bool:
        """Whether a batch may be two halves of guidance, judged by its first call."""
        if not may_be_guided(sample):
            return False
        if not self.layout.conditional_first:
            return True
        denoiser: Any = self.denoiser
        return is_of_no_class(kwargs.get("class_labels"), denoiser.config.num_embeds_ada_norm)

    def _is_split(self, sample: Tensor) -> bool:
        """Whether the sampler steps half of the batch, as in guidance.

        In the first call, and without a sampler, this is not known; then equal halves count as guidance.
        """
        batch = self.clock.batch if self.clock is not None else None
        # Pipelines of classes step both halves; their labels show guidance.
        return batch is None or self.layout.conditional_first or 2 * batch == sample.shape[0]

    def end(self, output: Any) -> bool:
        """End the call; False if its output must not be used.

        Args:
            output: the denoiser's output; None if it raised.
        """
        call, self.call, self._busy = self.call, None, None
        if call is None or output is None or self.generation is None:
            return True
        records = self.generation.records
        if self.clock is not None:
            self.clock.called()
        if call.stood_in:
            reason = f"{min(call.stood_in)} was left out, but nothing was reused in its place"
            self.warn_once("restored", f"a call of the denoiser is computed again, in full: {reason}")
            records[-1] = replace(records[-1], depth=FULL, ratio=0.0, age=0, reason=reason, recovery="")
            return False
        call.slot.store.end()
        if call.skip_plan is not None and not call.restored:
            reason = call.unpruned or "the modules that would reuse were not called"
            if not call.unpruned:
                self.warn_once("hooks", f"a cached call was computed in full: {reason}")
            records[-1] = replace(records[-1], depth=FULL, age=0, reason=reason, recovery="")
        call.slot.stored |= dict.fromkeys(call.store, call.slot.last)
        controlled = self.generation.controlled
        if controlled is not None and call.deviation is not None and not call.deviation.is_meta:
            # After the call, so that a compiled denoiser has no graph break.
            reading = Reading(call.deviation)
            controlled.add(call.step, reading)
            records[-1] = replace(records[-1], error=reading)
        some = [name for name, d in call.plan.items() if isinstance(d, Some) and name != TOKENS]
        if some and not call.pruned:
            reason = call.unpruned or "they were not called"
            what = f"none of the {len(some)} layers that should leave tokens out did"
            self.warn_once("prune", f"{what}: {reason}")
            records[-1] = replace(records[-1], reason=reason)
        if self.sites is not None and call.plan:
            done = self.sites.carried_out(call)
            records[-1] = replace(records[-1], plan=done, ratio=_share(records[-1].planned, done))
        if self.sites is not None:
            self.sites.end(call)
        reads = self.sites is not None and self.sites.decider.reads_outputs
        if reads and (call.skip_plan is None or not call.skip_plan.final):
            call.slot.remember(output[0])
        self._tell(call, records[-1])
        return True

    def _tell(self, call: Call, record: CallRecord) -> None:
        """Report to the observers what a call computed."""
        if not self.observers:
            return
        selections = {} if self.sites is None else self.sites.selections(call)
        blocks = {
            b.name: selections.get(b.name) for b in self.layout.blocks if runs(b.name, call.skip_plan)
        }
        refreshed = {} if self.sites is None else self.sites.done(call)
        tokens = None if call.tokens is None else call.tokens.tokens
        stream = None if self.sites is None else self.sites.stream
        leading = 0 if stream is None else len(stream.leading)
        for observer in self.observers:
            observer(Observation(record, blocks, tokens, refreshed, call.slot.grid, leading))

    def release(self) -> None:
        """Drop cached values; the records of the last generation stay for the report."""
        self.call = None
        if self.generation is not None and not self.generation.ended:
            self.generation.slots.clear()
            self.generation.branches = Branches()
            if "whole" not in self._warned:
                checks.warn_of_nothing_saved(self, self.generation)
            self.generation.ended = True

    @contextmanager
    def manual(self, num_steps: int) -> Iterator[ManualClock]:
        """Open a generation that is stepped by hand."""
        clock, before = ManualClock(num_steps, self.release), self.clock
        self.clock = clock
        try:
            yield clock
        finally:
            self.release()
            self.clock = before


def _computes_some(plan: Mapping[str, Decision]) -> bool:
    """Whether a call computes some of the tokens of a site."""
    return any(isinstance(decision, Some) for decision in plan.values())


def _share(planned: Step | None, plan: Mapping[str, Decision]) -> float:
    """Find the share of tokens that a call leaves out: its step's, if it has one, else over all sites."""
    if planned is None or planned.depth == SITES:
        return left_out(plan)
    if _computes_some(plan):
        return planned.ratio
    return 1.0 if plan else 0.0


def _decisions(skip_plan: SkipPlan) -> dict[str, Decision]:
    """List the decision of a skip plan for each module, by name."""
    return {name: SKIP if name in skip_plan.restore else UNREAD for name in skip_plan.skip}


def _stored(skip_plans: Iterable[SkipPlan], skip_plan: SkipPlan | None) -> tuple[SkipPlan, ...]:
    """List the skip plans whose features a call computes: all of them in a full call, else the output's."""
    return tuple(
        c for c in dict.fromkeys(skip_plans) if skip_plan is None or (c.final and not skip_plan.final)
    )


def _is_inside(thread: int | None, module: nn.Module) -> bool:
    """Whether a thread is in a call of a module; an interrupted call does not report its end."""
    frame = sys._current_frames().get(thread or 0)
    while frame is not None:
        if frame.f_locals.get("self") is module:
            return True
        frame = frame.f_back
    return False


def _generator(device: torch.device, seed: int) -> torch.Generator:
    where = "cpu" if device.type == "meta" else device
    return torch.Generator(where).manual_seed(seed)


def _freeu(denoiser: nn.Module) -> bool:
    """Whether FreeU is on, which transforms the inputs of up blocks."""
    return any(getattr(b, "b1", None) is not None for b in getattr(denoiser, "up_blocks", ()))
