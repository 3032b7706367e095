"""The sites of a method on a denoiser, and the decisions for them in a call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from regrow.core.call import Call
from regrow.core.decision import ALL, SKIP, UNREAD, Decider, Decision, Entered, Some, View, runs
from regrow.core.inputs import adds_to_tokens
from regrow.core.recipe import Attention
from regrow.core.watch import Watched
from regrow.fields import MOST_CALLS
from regrow.models.layers import LayerKind
from regrow.models.table import TOKENS, Keeps, Layout, Site, SkipPlan
from regrow.schedule import Step
from regrow.tokens.select import Selection, Subset


class Sites:
    """A method's decisions for sites of a denoiser.

    Args:
        decider: the method.
        layout: table of the denoiser.
        full_calls: number of first calls of a branch that are full.
        warn_once: takes the subject of a warning, and its text.

    Attributes:
        stream: the site of all blocks, if the tokens of whole calls are chosen.
        attending: by the name of a self-attention that may compute some tokens, the site whose tokens these
            are.
    """

    def __init__(
        self, decider: Decider, layout: Layout, full_calls: int, warn_once: Callable[[str, str], None]
    ) -> None:
        self.decider, self._layout, self._warn_once = decider, layout, warn_once
        self.full_calls = full_calls
        self.stream = next((site for site in decider.sites if site.stream), None)
        self.attending = {name: site.name for site in self.able for name in _attentions_of(site)}
        self._by_name = {site.name: site for site in decider.sites}
        for remark in decider.remarks:
            warn_once(f"remark {remark}", remark)

    @property
    def able(self) -> Iterator[Site]:
        """The sites that can compute some of their tokens."""
        return (site for site in self.decider.sites if site.able)

    @property
    def memory(self) -> Iterator[tuple[str, nn.Module, Site]]:
        """The modules that give keys and values, by name, in the sites that may compute some tokens."""
        for site in self.able:
            yield from ((name, module, site) for name, module in _memory_of(site).items())

    @property
    def watched(self) -> Iterator[Watched]:
        """The attentions that tokens are chosen by."""
        for name, attention, site in self._looked_at():
            yield Watched(name, attention, _is_full, partial(self._observe, site))
        for group, (name, attention) in self._deciding().items():
            yield Watched(name, attention, partial(self._waits, group), partial(self._choose_by, group))

    def _deciding(self) -> Mapping[str, tuple[str, nn.Module]]:
        """By group, the path and module of the attention that must run before tokens are chosen."""
        if self.stream is None or not self.stream.leading:
            return self.decider.attentions
        last = self._layout.first_layers()[self.stream.leading[-1], LayerKind.SELF_ATTENTION]
        return {TOKENS: (last.name, last.module)}

    def choosers(self, plan: Mapping[str, Decision]) -> dict[str, Site]:
        """Find the first site of each group that computes some tokens in a call."""
        found: dict[str, Site] = {}
        for site in self.decider.sites:
            decision = plan.get(site.name)
            if isinstance(decision, Some):
                found.setdefault(decision.group, site)
        return found

    @staticmethod
    def _waits(group: str, call: Call) -> bool:
        """Whether tokens of a group are still to be chosen."""
        return group in call.choosers and group not in call.chosen and group not in call.selections

    def _looked_at(self) -> Iterator[tuple[str, nn.Module, Site]]:
        kinds = self.decider.observes
        for site in self.decider.sites:
            if LayerKind.SELF_ATTENTION in kinds:
                yield from ((name, attention, site) for name, attention in site.attentions.items())
        own = {site.attention.name for site in self.decider.sites}
        for layer in self._layout.first_layers().values():
            if layer.kind in kinds and layer.name in own:
                yield layer.name, layer.module, layer

    @property
    def turning(self) -> set[str]:
        """The attentions whose queries and keys must be turned by position where they are made."""
        watched = {one.name for one in self.watched}
        if not self.attending and not watched:
            return set()
        return watched | {*self.attending} | {name for s in self.decider.sites for name in s.attentions}

    @property
    def can_subset(self) -> bool:
        """Whether the image's tokens must be known: to observe attentions, or to compute some tokens."""
        own = (site for site in self.able if site.keeps is not Keeps.NOTHING)
        parts = any(site.kind is not None or site.stream for site in own)
        return parts or bool(self.decider.observes)

    def _observe(self, site: Site, call: Call, x: Tensor, attention: Attention) -> None:
        self.decider.observe(call.slot.observed, site, attention)

    def _choose_by(self, group: str, call: Call, x: Tensor, attention: Attention) -> None:
        """Choose the tokens of a group by an attention that has just run."""
        call.info = replace(call.info, attention=attention)
        self.choose_from(group, call, x)

    def choose_from(self, group: str, call: Call | None, x: Tensor) -> None:
        """Choose the tokens of a group from features ``(B, N, C)``."""
        if call is not None and self._waits(group, call):
            self._choose(call, call.choosers[group], x)

    @property
    def has_calls_of_its_own(self) -> bool:
        """Whether the method decides what calls of single sites or layers do."""
        return self.decider.space is None and self.stream is None

    def prunes(self, step: Step, skip_plan: SkipPlan | None) -> bool:
        """Whether a call of the plan leaves out tokens of a layer or of all blocks."""
        if self.decider.space is not None:
            return step.ratio > 0 and any(runs(site.block, skip_plan) for site in self.decider.sites)
        return self.decides(step, skip_plan, MOST_CALLS)

    @property
    def shallowest(self) -> int | None:
        """Find the lowest depth of a cached call with a layer to prune; None if there is none."""
        for depth in range(1, self._layout.depths):
            skip_plan = self._layout.skip_plan(depth)
            if any(runs(site.block, skip_plan) for site in self.decider.sites):
                return depth
        return None

    def check(self, skip_plans: Mapping[int, SkipPlan]) -> None:
        """Refuse cached calls that skip the block whose attention chooses the tokens, or one before it.

        Raises:
            ValueError: naming the block.
        """
        leading = () if self.stream is None else self.stream.leading
        for depth, skip_plan in skip_plans.items():
            if skip_plan.entry in leading:
                raise ValueError(
                    f"block: {len(leading) - 1} is not allowed with cached calls of depth {depth}, it must "
                    f"be < {leading.index(skip_plan.entry)}: these calls skip it"
                )

    def decides(self, step: Step, skip_plan: SkipPlan | None, calls: int) -> bool:
        """Whether the method decides in a call.

        Args:
            step: the call's step in the plan.
            skip_plan: what the call skips.
            calls: number of calls of the branch, with this one.
        """
        if self.decider.space is not None:
            return step.ratio > 0
        if self.stream is None:
            return skip_plan is not None and step.of_sites
        return step.ratio > 0 and streams(skip_plan) and calls > self.full_calls

    def keeps(self, call: Call) -> bool:
        """Whether sites that are computed whole keep their values."""
        if self.stream is not None:
            return call.can_subset and streams(call.skip_plan)
        return self.has_calls_of_its_own

    def warn_of_whole_calls(self, steps: Sequence[Step], skip_plans: Mapping[int, SkipPlan]) -> None:
        """Warn if no call of a generation can leave tokens out of all blocks, though the method should."""
        if self.stream is None:
            return
        if not any(step.ratio and streams(skip_plans.get(step.depth)) for step in steps[self.full_calls :]):
            self._warn_once(
                "whole",
                f"no call of this generation leaves tokens out: of {len(steps)} calls the first "
                f"{self.full_calls} are computed in full, and no later call leaves tokens out; use more "
                "steps or another plan",
            )

    def plan(self, view: View) -> Mapping[str, Decision]:
        """Plan what a call does at each site; empty if it computes all of them."""
        plan = self.decider.plan(view)
        if not plan and self.decider.space is not None and self.prunes(view.step, view.skip_plan):
            height, width = view.size
            self._warn_once(
                "grid",
                f"a latent of {height} x {width} has no layer in which a ratio of {view.step.ratio:g} "
                "prunes a token, so nothing is pruned; use a higher ratio or a larger picture",
            )
        return plan if any(decision is not ALL for decision in plan.values()) else {}

    def settled(
        self, plan: Mapping[str, Decision], call: Call, inputs: Mapping[str, Any]
    ) -> dict[str, Decision]:
        """Reduce a plan to what a call can do: not all sites can compute some tokens only."""
        sites = self._by_name
        found = {name: self._settled(sites[name], what, call, inputs) for name, what in plan.items()}
        for name, what in plan.items():
            if isinstance(what, Some) and isinstance(found[name], Some):
                found |= dict.fromkeys(sites[name].text, ALL)
        return found if any(decision is not ALL for decision in found.values()) else {}

    def decisions(self, plan: Mapping[str, Decision]) -> Iterator[tuple[str, Decision]]:
        """List the decisions of a plan for each site, and for the other modules that it is made of."""
        # Layers that prune read their own decision: cached calls may leave the same layers out.
        for site in (site for site in self.decider.sites if site.keeps is not Keeps.NOTHING):
            decision = plan.get(site.name, ALL)
            yield site.name, decision
            yield from ((part, UNREAD if decision is SKIP else ALL) for part in site.parts)

    def _settled(self, site: Site, decision: Decision, call: Call, inputs: Mapping[str, Any]) -> Decision:
        if not isinstance(decision, Some) or site.keeps is Keeps.NOTHING:
            return decision
        able = self._is_able_stream if site.stream else self._is_able
        if not able(site, decision, call, inputs):
            return decision.otherwise
        grid = call.slot.grid if site.kind is not None else None
        return SKIP if grid is not None and decision.count(grid.tokens) == 0 else decision

    def _is_able_stream(self, site: Site, decision: Some, call: Call, inputs: Mapping[str, Any]) -> bool:
        """Whether some tokens can go through all blocks."""
        if not call.can_subset:
            return False
        if adds_to_tokens(inputs):
            self._warn_once("residuals", "a ControlNet adds to all tokens; its calls are computed in full")
            return False
        store = call.slot.store
        if len(call.slot.outputs) < 2 or site.key not in store:
            return False
        if not any(name in store for name in site.memory if name.endswith("to_v")):
            self._warn_once(
                "memory",
                "all tokens are computed, because the attentions' projections were fused, so keys can't be "
                "kept; call unfuse_qkv_projections()",
            )
            return False
        return True

    def _is_able(self, site: Site, decision: Some, call: Call, inputs: Mapping[str, Any]) -> bool:
        """Whether a site can compute some of its tokens only."""
        store = call.slot.store
        if not site.able or site.key not in store or (site.kind is not None and not call.can_subset):
            return False
        attention = site.attention
        known = all(name in store for name in _memory_of(site)) and (
            attention.able or attention.name in store
        )
        chunked = site.kind in (None, LayerKind.FEED_FORWARD) and self._is_chunked(site)
        masked = bool(_memory_of(site)) and inputs.get("attention_mask") is not None
        rotary = self._layout.rotary
        unlike = any(not rotary[name].is_plain for name in site.attentions if name in rotary)
        if known and not chunked and not masked and not unlike:
            return True
        done = "computes all of its tokens" if decision.otherwise is ALL else "reuses its last output"
        call.unpruned = (
            f"{site.name}, for example, {done}, as it can't compute some only. Its projections were fused "
            "(call unfuse_qkv_projections()), or its feed-forward is computed in chunks (call "
            "disable_forward_chunking()), or its processors project a part of the batch only "
            "(perturbed-attention guidance) or were replaced, or its tokens are masked"
        )
        self._warn_once("memory", call.unpruned)
        return False

    def _is_chunked(self, site: Site) -> bool:
        block = self._layout.skippable[site.block].module
        return getattr(block, "_chunk_size", None) is not None

    def enter(
        self, call: Call, site: Site, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Subset | None:
        """Find the tokens that a site computes, just before it runs; None for all.

        In a call that computes some tokens, the method looks at the first site that runs.
        """
        entered = Entered.of(args, kwargs)
        call.given[site.name] = len(entered.x)
        self._look(call, entered)
        decision = call.plan.get(site.name, ALL)
        if not isinstance(decision, Some) or site.key not in call.slot.store:
            return None
        # The attention that chooses these tokens runs before this site.
        if decision.group not in call.chosen and not site.leading:
            self._choose(call, site, entered.x)
        return call.chosen.get(decision.group)

    def prepare(self, call: Call, sample: Tensor) -> None:
        """Prepare what pruning layers share, before any of them runs: random numbers can't be compiled."""
        if self.decider.space is not None:
            self._look(call, Entered(sample, (), {}))

    def _look(self, call: Call, entered: Entered) -> None:
        if call.choosers and not call.seen:
            call.seen = (self.decider.look(call.slot.observed, entered, call.info),)

    def _choose(self, call: Call, site: Site, x: Tensor) -> None:
        """Choose the tokens of a site that computes some; its whole group computes the same."""
        decision, seen = call.plan[site.name], call.seen[0] if call.seen else None
        assert isinstance(decision, Some)
        grid = call.slot.grid
        tokens = grid.tokens if grid is not None and (site.joint or site.stream) else x.shape[1]
        count = decision.count(tokens)
        if count is not None and site.stream:
            count = max(count, 1)
        chosen = self.decider.choose(call.slot.observed, seen, site, x, count, call.info)
        if isinstance(chosen, Selection):
            call.selections[decision.group] = chosen
        else:
            call.chosen[decision.group] = Subset(chosen, tokens)

    def forget(self, call: Call, site: Site) -> None:
        """Drop the stream's values of a call, as its keys and outputs are of a part of the batch."""
        call.keeps_sites = False
        call.slot.outputs.clear()
        call.slot.store.drop(*site.memory, site.key)
        self._warn_once(
            "part",
            "all tokens are computed, because attention processors project a part of the batch only "
            "(perturbed-attention guidance)",
        )

    def end(self, call: Call) -> None:
        """Check a call that is over."""
        if self.stream is None:
            return
        if TOKENS in call.chosen and call.tokens is None:
            self._warn_once(
                "narrow",
                "all tokens are computed, because the module after which some should be left out was not "
                "called",
            )
        if call.keeps_sites and self.stream.key in call.slot.store:
            assert self._layout.stream is not None
            call.slot.remember(self._layout.stream.noise_of(call.slot.store.last(self.stream.key)))

    def done(self, call: Call) -> dict[str, Tensor]:
        """List the tokens ``(B, n)`` that sites inside blocks computed in a call, by name."""
        some = {n: d.group for n, d in call.plan.items() if isinstance(d, Some) and n != TOKENS}
        return {n: call.chosen[group].tokens for n, group in some.items() if group in call.chosen}

    def selections(self, call: Call) -> dict[str, Selection]:
        """List the selections of tokens that blocks' layers computed, by the names of blocks."""
        some = {
            s.block: d.group for s in self.decider.sites if isinstance(d := call.plan.get(s.name), Some)
        }
        found = call.selections
        return {block: found[group] for block, group in some.items() if group in found}

    def carried_out(self, call: Call) -> Mapping[str, Decision]:
        """List what a call did at each site, with the shares of tokens that were chosen."""
        missed = self.decider.space is not None and not call.pruned
        if missed or (TOKENS in call.plan and call.tokens is None):
            return {}
        return {name: self._carried_out(call, decision) for name, decision in call.plan.items()}

    @staticmethod
    def _carried_out(call: Call, decision: Decision) -> Decision:
        if not isinstance(decision, Some):
            return decision
        if decision.group in call.selections:
            return decision
        chosen = call.chosen.get(decision.group)
        if chosen is None:
            # It was not called.
            return decision.otherwise
        return replace(decision, share=chosen.tokens.shape[1] / chosen.image)


def _attentions_of(site: Site) -> Iterable[str]:
    """List the names of the self-attentions in which a site computes some tokens."""
    return dict.fromkeys(name.rpartition(".")[0] for name in _memory_of(site))


def _memory_of(site: Site) -> Mapping[str, nn.Module]:
    """Find the modules that give the keys and values of a site's tokens, by name."""
    return site.attention.memory if site.attention.able else {}


def _is_full(call: Call) -> bool:
    """Whether a call computes all sites."""
    return call.skip_plan is None and not call.plan and call.can_subset


def streams(skip_plan: SkipPlan | None) -> bool:
    """Whether tokens pass through blocks in a call with that skip plan."""
    return skip_plan is None or skip_plan.entry is not None
