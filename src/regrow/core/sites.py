"""Sites at work: what is decided for them in a call, and the hooks that carry it out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol, cast

from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn

from regrow.core.call import Call, Watched
from regrow.core.decision import ALL, SKIP, Adapter, Decider, Decision, Entered, Some, View, runs
from regrow.core.inputs import adds_to_tokens
from regrow.core.recipe import Attention, Recovery
from regrow.core.store import copied
from regrow.fields import MOST_CALLS
from regrow.models.layers import LayerKind
from regrow.models.table import TOKENS, Cut, Keeps, Layout, Site
from regrow.recover.time import REUSE
from regrow.schedule import Step
from regrow.tokens.recover import keep, keep_merged, recover
from regrow.tokens.select import Selection, Subset, put_rows, rows_of, take_rows


class Sites:
    """A method's decisions for sites, at work on a denoiser.

    Args:
        decider: the method.
        layout: of the denoiser.
        full_calls: that a branch begins with.
        warn_once: takes what a warning is about, and the warning.

    Attributes:
        stream: the way of the tokens through the blocks, where those of whole calls are chosen.
        attending: by the name of a self-attention in which some tokens may be computed, the site whose they
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
        """Those that can compute some of their tokens."""
        return (site for site in self.decider.sites if site.able)

    @property
    def memory(self) -> Iterator[tuple[str, nn.Module, Site]]:
        """What gives keys and values in the sites of which some tokens may be computed, by name."""
        for site in self.able:
            yield from ((name, module, site) for name, module in _memory_of(site).items())

    @property
    def watched(self) -> Iterator[Watched]:
        """The attentions that tokens are chosen by."""
        for name, attention, site in self._looked_at():
            yield Watched(name, attention, _is_full, partial(self._observe, site), site.turns)
        for group, (name, attention) in self._deciding().items():
            yield Watched(name, attention, partial(self._waits, group), partial(self._choose_by, group))

    def _deciding(self) -> Mapping[str, tuple[str, nn.Module]]:
        """By group, the attention that has to run before its tokens are chosen, and its path."""
        if self.stream is None or not self.stream.leading:
            return self.decider.attentions
        last = self._layout.first_layers()[self.stream.leading[-1], LayerKind.SELF_ATTENTION]
        return {TOKENS: (last.name, last.module)}

    def choosers(self, plan: Mapping[str, Decision]) -> dict[str, Site]:
        """By group, the first of the sites that compute the same tokens of a call."""
        found: dict[str, Site] = {}
        for site in self.decider.sites:
            decision = plan.get(site.name)
            if isinstance(decision, Some):
                found.setdefault(decision.group, site)
        return found

    @staticmethod
    def _waits(group: str, call: Call) -> bool:
        """Whether tokens of a group are to be chosen."""
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
    def turning(self) -> Iterator[tuple[Site, nn.Module]]:
        """The attentions that turn queries and keys by a table."""
        for site in self.decider.sites:
            if site.turns:
                yield from ((site, attention) for attention in site.attentions.values())

    @property
    def can_subset(self) -> bool:
        """Whether the tokens of an image must be told apart: to look at attentions, or in single layers."""
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
        """Whether calls of single sites or layers are what the method makes of them."""
        return self.decider.space is None and self.stream is None

    def prunes(self, step: Step, cut: Cut | None) -> bool:
        """Whether a call of the plan leaves out tokens, of a layer or of all blocks."""
        if self.decider.space is not None:
            return step.ratio > 0 and any(runs(site.block, cut) for site in self.decider.sites)
        return self.decides(step, cut, MOST_CALLS)

    @property
    def shallowest(self) -> int | None:
        """The lowest depth of a cached call that computes a layer to prune; None if only full calls do."""
        for depth in range(1, self._layout.depths):
            cut = self._layout.cut(depth)
            if any(runs(site.block, cut) for site in self.decider.sites):
                return depth
        return None

    def check(self, cuts: Mapping[int, Cut]) -> None:
        """Refuse cached calls that leave out the block that tokens are chosen by, or one before it.

        Raises:
            ValueError: naming the block.
        """
        leading = () if self.stream is None else self.stream.leading
        for depth, cut in cuts.items():
            if cut.entry in leading:
                raise ValueError(
                    f"block: {len(leading) - 1} is not allowed with cached calls of depth {depth}, it must "
                    f"be < {leading.index(cut.entry)}: they leave it out"
                )

    def decides(self, step: Step, cut: Cut | None, calls: int) -> bool:
        """Whether it is asked in a call.

        Args:
            step: what the plan says of the call.
            cut: what the call leaves out.
            calls: of the branch so far, with this one.
        """
        if self.decider.space is not None:
            return step.ratio > 0
        if self.stream is None:
            return cut is not None and step.of_sites
        return step.ratio > 0 and streams(cut) and calls > self.full_calls

    def keeps(self, call: Call) -> bool:
        """Whether sites that are computed whole keep what they give."""
        if self.stream is not None:
            return call.can_subset and streams(call.cut)
        return self.has_calls_of_its_own

    def warn_of_whole_calls(self, steps: Sequence[Step], cuts: Mapping[int, Cut]) -> None:
        """Say if no call of a generation can leave tokens out of all blocks, though the method would."""
        if self.stream is None:
            return
        if not any(step.ratio and streams(cuts.get(step.depth)) for step in steps[self.full_calls :]):
            self._warn_once(
                "whole",
                f"no call of this generation leaves tokens out: of {len(steps)} calls the first "
                f"{self.full_calls} are computed in full, and none of those behind them, if any, leaves "
                "out some",
            )

    def plan(self, view: View) -> Mapping[str, Decision]:
        """What a call does at each site; empty if it computes all of them."""
        plan = self.decider.plan(view)
        if not plan and self.decider.space is not None and self.prunes(view.step, view.cut):
            height, width = view.size
            self._warn_once(
                "grid",
                f"a latent of {height} x {width} has no layer in which a ratio of {view.step.ratio:g} "
                "prunes a token; nothing is pruned",
            )
        return plan if any(decision is not ALL for decision in plan.values()) else {}

    def settled(
        self, plan: Mapping[str, Decision], call: Call, inputs: Mapping[str, Any]
    ) -> dict[str, Decision]:
        """What of a plan a call can do: which sites can compute some of their tokens by themselves."""
        sites = self._by_name
        found = {name: self._settled(sites[name], what, call, inputs) for name, what in plan.items()}
        for name, what in plan.items():
            if isinstance(what, Some) and isinstance(found[name], Some):
                found |= dict.fromkeys(sites[name].text, ALL)
        return found if any(decision is not ALL for decision in found.values()) else {}

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
                "all tokens are computed, because the attentions' projections were fused, so that keys "
                "can't be kept; call unfuse_qkv_projections()",
            )
            return False
        return True

    def _is_able(self, site: Site, decision: Some, call: Call, inputs: Mapping[str, Any]) -> bool:
        """Whether a site has what it needs to compute some of its tokens by themselves."""
        store = call.slot.store
        if not site.able or site.key not in store or (site.kind is not None and not call.can_subset):
            return False
        attention = site.attention
        known = all(name in store for name in _memory_of(site)) and (
            attention.able or attention.name in store
        )
        chunked = site.kind in (None, LayerKind.FEED_FORWARD) and self._is_chunked(site)
        masked = bool(_memory_of(site)) and inputs.get("attention_mask") is not None
        unlike = site.turns and not all(map(_has_own_processor, site.attentions.values()))
        if known and not chunked and not masked and not unlike:
            return True
        done = "computes all of its tokens" if decision.otherwise is ALL else "reuses its last output"
        call.unpruned = (
            f"{site.name}, for one, {done}: its projections were fused (call unfuse_qkv_projections()), or "
            "its processors project a part of the batch only (perturbed-attention guidance), or its "
            "feed-forward is computed in chunks (call disable_forward_chunking()), or its tokens are "
            "masked, or its attention processors were replaced where they turn queries, so that some can't "
            "be computed by themselves"
        )
        self._warn_once("memory", call.unpruned)
        return False

    def _is_chunked(self, site: Site) -> bool:
        block = self._layout.skippable[site.block].module
        return getattr(block, "_chunk_size", None) is not None

    def enter(
        self, call: Call, site: Site, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Subset | None:
        """The tokens that a site which is about to run computes; None if all.

        In a call that computes some tokens, the method looks at the first site that runs.
        """
        entered = Entered.of(args, kwargs)
        call.given[site.name] = len(entered.x)
        self._look(call, entered)
        decision = call.plan.get(site.name, ALL)
        if not isinstance(decision, Some) or site.key not in call.slot.store:
            return None
        # By an attention that was to run before they are chosen elsewhere.
        if decision.group not in call.chosen and not site.leading:
            self._choose(call, site, entered.x)
        return call.chosen.get(decision.group)

    def prepare(self, call: Call, sample: Tensor) -> None:
        """What layers that prune have in common, before any of them runs: chance can't be compiled."""
        if self.decider.space is not None:
            self._look(call, Entered(sample, (), {}))

    def _look(self, call: Call, entered: Entered) -> None:
        if call.choosers and not call.seen:
            call.seen = (self.decider.look(call.slot.observed, entered, call.info),)

    def _choose(self, call: Call, site: Site, x: Tensor) -> None:
        """Choose the tokens of a site that computes some, and of the others of its group."""
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
        """Keep nothing of the stream in a call: keys, values and outputs are of a part of its batch."""
        call.keeps_sites = False
        call.slot.outputs.clear()
        call.slot.store.drop(*site.memory, site.key)
        self._warn_once(
            "part",
            "all tokens are computed, because attention processors project a part of the batch only "
            "(perturbed-attention guidance)",
        )

    def end(self, call: Call) -> None:
        """Look at what a call that is over left."""
        if self.stream is None:
            return
        if TOKENS in call.chosen and call.tokens is None:
            self._warn_once(
                "narrow",
                "all tokens are computed, because the module behind which some should be left out was not "
                "called",
            )
        if call.keeps_sites and self.stream.key in call.slot.store:
            assert self._layout.stream is not None
            call.slot.remember(self._layout.stream.noise_of(call.slot.store.last(self.stream.key)))

    def done(self, call: Call) -> dict[str, Tensor]:
        """By the name of a site within blocks, the tokens ``(B, n)`` that it computed in a call."""
        some = {n: d.group for n, d in call.plan.items() if isinstance(d, Some) and n != TOKENS}
        return {n: call.chosen[group].tokens for n, group in some.items() if group in call.chosen}

    def selections(self, call: Call) -> dict[str, Selection]:
        """By the name of a block, which tokens its layers computed, and what the others copied."""
        some = {
            s.block: d.group for s in self.decider.sites if isinstance(d := call.plan.get(s.name), Some)
        }
        found = call.selections
        return {block: found[group] for block, group in some.items() if group in found}

    def carried_out(self, call: Call) -> Mapping[str, Decision]:
        """What a call did at each site, with the shares that its choice gave."""
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
    """The names of the self-attentions in which a site computes some tokens."""
    return dict.fromkeys(name.rpartition(".")[0] for name in _memory_of(site))


def _memory_of(site: Site) -> Mapping[str, nn.Module]:
    """What gives the keys and values of the tokens that a site computes."""
    return site.attention.memory if site.attention.able else {}


class _Engine(Protocol):
    """What hooks need of the engine."""

    call: Call | None


class SiteHook:
    """A site that does what was decided for it before the call."""

    def __init__(self, engine: _Engine, sites: Sites, site: Site) -> None:
        self.engine, self.sites, self.site = engine, sites, site

    def __call__(self, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call, site = self.engine.call, self.site
        if call is None:
            return forward(*args, **kwargs)
        if site.keeps is Keeps.NOTHING:
            return self._pruned(call, forward, args, kwargs)
        turn = call.turns[site.name] = call.turns.get(site.name, -1) + 1
        key = site.key if turn == 0 else f"{site.key}, turn {turn}"
        x = args[0] if args else kwargs["hidden_states"]
        if site.entry is None:
            tokens = self.sites.enter(call, site, args, kwargs)
        else:
            tokens = call.partial.get(site.name)
        if key in call.slot.store:
            none = tokens is not None and not tokens.tokens.shape[1]
            if call.plan.get(site.name, ALL) is SKIP or none:
                return self._recovered(call, key, x)
            if tokens is not None:
                return self._completed(
                    call, key, x, tokens, self._computed(call, tokens, forward, args, kwargs)
                )
        out = forward(*args, **kwargs)
        if call.keeps_sites and site.stream and len(out) != call.info.batch:
            self.sites.forget(call, site)
        if call.keeps_sites:
            call.slot.store.add(key, call.step, out if site.keeps is Keeps.OUTPUT else out - x)
        # Blocks only read what layers return, but the caller of the denoiser may write to its output.
        return out.clone() if site.stream and call.keeps_sites else out

    def _pruned(
        self, call: Call, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """What a layer returns that computes the kept tokens only: the others copy from them."""
        decision = call.plan.get(self.site.name)
        selection = call.selections.get(decision.group) if isinstance(decision, Some) else None
        if selection is None:
            return forward(*args, **kwargs)
        x = args[0] if args else kwargs["hidden_states"]
        # IP-Adapter masks, which every attention is handed, speak of all tokens to the cross-attention.
        crosses = self.site.kind is LayerKind.CROSS_ATTENTION
        if crosses and kwargs.get("ip_adapter_masks") is not None:
            call.unpruned = "they are given the masks of an IP-Adapter, which are of all tokens"
            return forward(*args, **kwargs)
        if x.shape[1] != selection.tokens:
            call.unpruned = (
                f"they are given {x.shape[1]} tokens where their grid has {selection.tokens} (another "
                "library, such as tomesd, merges tokens, or a feed-forward is computed in chunks)"
            )
            return forward(*args, **kwargs)
        call.pruned += 1
        merges = self.sites.decider.space is Recovery.MEAN
        short = keep_merged(x, selection) if merges else keep(x, selection)
        args, kwargs = ((short, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": short})
        mask = kwargs.get("attention_mask")
        if mask is not None and self.site.kind is LayerKind.SELF_ATTENTION:
            index = selection.kept.view(len(selection.kept), *[1] * (mask.ndim - 2), -1)
            kwargs["attention_mask"] = mask.gather(-1, index.expand(*mask.shape[:-1], -1))
        return recover(forward(*args, **kwargs), selection)

    def _computed(
        self, call: Call, tokens: Subset, forward: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]
    ) -> Any:
        """What a site gives for some of its tokens, in the form that is kept of it."""
        site = self.site
        if site.entry is not None:
            return forward(*args, **kwargs)
        short = _short(tokens, args, kwargs)
        call.partial[site.name] = tokens
        given = forward(*short[0], **short[1])
        del call.partial[site.name]
        if site.keeps is Keeps.OUTPUT:
            return given
        return given - (short[0][0] if short[0] else short[1]["hidden_states"])

    def _recovered(self, call: Call, key: str, x: Tensor) -> Any:
        """What the site returns where nothing of it is computed."""
        value = call.slot.store.at(key, call.step, call.recovery)
        call.restored += 1
        if call.cut is not None:
            call.stood_in = {o for o in call.stood_in if not call.cut.feeds(o, self.site.name)}
        return value if self.site.keeps is Keeps.OUTPUT else x + value

    def _completed(self, call: Call, key: str, x: Tensor, tokens: Subset, computed: Any) -> Any:
        """What the site returns where some of its tokens were computed: the others are recovered."""
        store = call.slot.store
        value = store.at(key, call.step, call.recovery)
        if call.recovery != REUSE:
            # Of a single value even a forecast is that value itself.
            value = copied(value)
        image, new = (value[0], computed[0]) if isinstance(computed, tuple) else (value, computed)
        put_rows(image, tokens.rows(image.shape[1]), new)
        value = (image, *computed[1:]) if isinstance(computed, tuple) else image
        if call.recovery == REUSE:
            # A forecast is of whole calls alone.
            store.amend(key, value)
        if self.site.stream:
            # The caller of the denoiser may write to its output.
            return image.clone()
        call.restored += 1
        call.pruned += 1
        return value if self.site.keeps is Keeps.OUTPUT else x + image


class ChooseHook:
    """The module from whose input the tokens of a group are chosen."""

    def __init__(self, engine: _Engine, sites: Sites, group: str) -> None:
        self.engine, self.sites, self.group = engine, sites, group

    def __call__(self, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.sites.choose_from(self.group, self.engine.call, args[0] if args else kwargs["hidden_states"])
        return forward(*args, **kwargs)


class EntryHook:
    """The module by which tokens enter a site that begins before its last one: it takes some of them."""

    def __init__(self, engine: _Engine, sites: Sites, site: Site) -> None:
        self.engine, self.sites, self.site = engine, sites, site

    def __call__(self, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = self.engine.call
        tokens = None if call is None else self.sites.enter(call, self.site, args, kwargs)
        if call is None or tokens is None:
            return forward(*args, **kwargs)
        call.partial[self.site.name] = tokens
        args, kwargs = _short(tokens, args, kwargs)
        return forward(*args, **kwargs)


class NarrowHook:
    """The module behind which some tokens go through the blocks."""

    def __init__(self, engine: _Engine, sites: Sites, site: Site) -> None:
        self.engine, self.sites, self.site = engine, sites, site

    def __call__(self, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        call = self.engine.call
        if call is None:
            return output
        # Blocks of joint attention return the text before the image.
        image = output[-1] if isinstance(output, tuple) else output
        tokens = self.sites.enter(call, self.site, (image,), {})
        if tokens is None:
            return output
        call.partial[self.site.name] = tokens
        short = rows_of(image, tokens.tokens)
        return (*output[:-1], short) if isinstance(output, tuple) else short


class BesideHook:
    """The attention beside a site: for the site's tokens it is computed, or hands on its last output."""

    def __init__(self, engine: _Engine, site: Site, attention: Site) -> None:
        self.engine, self.site, self.attention = engine, site, attention

    def __call__(self, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call, attention = self.engine.call, self.attention
        tokens = None if call is None else call.partial.get(self.site.name)
        if call is None or tokens is None:
            out = forward(*args, **kwargs)
            if call is not None and call.cut is None and not attention.able:
                call.slot.store.add(attention.key, call.step, out)
            return out
        if attention.able:
            args, kwargs = _short(tokens, args, kwargs)
            return forward(*args, **kwargs)
        last = call.slot.store.at(attention.key, call.step, call.recovery)
        return take_rows(last, tokens.rows(last.shape[1]))


class SiteKeysHook:
    """Completes the keys or values of the tokens that a site computes with its last ones of the others."""

    def __init__(self, engine: _Engine, sites: Sites, key: str, site: Site) -> None:
        self.engine, self.sites, self.key, self.site = engine, sites, key, site

    def __call__(self, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        call = self.engine.call
        if call is None:
            return output
        store, tokens = call.slot.store, call.partial.get(self.site.name)
        if self.site.stream and call.keeps_sites and len(output) != call.info.batch:
            self.sites.forget(call, self.site)
            return output
        if tokens is not None and (call.keeps_sites or not self.site.stream):
            if self.key not in store:
                raise RuntimeError(
                    f"{self.key} runs, but was left out of the last full call; layers to skip can't change "
                    "within a generation"
                )
            old = store.last(self.key)
            put_rows(old, tokens.rows(old.shape[1]), output)
            return old
        if call.keeps_sites:
            # Of a part of the batch (perturbed-attention guidance) it is of no use.
            store.drop(self.key)
            if len(output) == call.given.get(self.site.name):
                store.keep(self.key, output)
        return output


class AdapterHook:
    """A linear layer with a low-rank update, in calls that leave something out; no weight is changed."""

    def __init__(self, engine: _Engine, adapter: Adapter) -> None:
        self.engine, self.adapter = engine, adapter

    def __call__(self, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        call = self.engine.call
        if call is None or not call.plan:
            return output
        return output + self.adapter(args[0] if args else kwargs["input"])


class TableHook:
    """An attention that is handed queries and keys which are turned already: it gets no table."""

    def __init__(self, engine: _Engine, site: Site) -> None:
        self.engine, self.site = engine, site

    def __call__(self, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = self.engine.call
        given = dict(zip(_ATTENTION, args, strict=False)) | kwargs
        table = given.get("rotary_emb")
        if call is None or table is None or not _has_own_processor(module):
            return forward(*args, **kwargs)
        tokens = call.partial.get(self.site.name)
        index = slice(None) if tokens is None else tokens.tokens.flatten()
        call.positions = [side.reshape(-1, side.shape[-1])[index] for side in table]
        try:
            return forward(**given | {"rotary_emb": None})
        finally:
            call.positions = ()


class TurnHereHook:
    """Turns queries or keys ``(B, n, heads D)`` by the positions that `TableHook` found."""

    def __init__(self, engine: _Engine, attention: Any) -> None:
        self.engine, self.heads = engine, attention.heads

    def __call__(self, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        call = self.engine.call
        if call is None or not call.positions:
            return output
        # Samples that compute other tokens have other positions: then all are one sequence.
        sequences = output.reshape(-1, len(call.positions[0]), self.heads, output.shape[-1] // self.heads)
        turned: Any = apply_rotary_emb(sequences, cast(Any, call.positions), sequence_dim=1)
        return turned.view(output.shape)


# What attentions that turn queries and keys are given, in order.
_ATTENTION = ("hidden_states", "encoder_hidden_states", "attention_mask", "rotary_emb")


def _has_own_processor(attention: Any) -> bool:
    """Whether an attention has its class's processor, which does nothing between the norms but turn."""
    return type(attention.processor) is attention._default_processor_cls


def _short(tokens: Subset, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The arguments of a module for some of its tokens, which come first or as ``hidden_states``."""
    x = args[0] if args else kwargs["hidden_states"]
    named = {name: _of_tokens(value, tokens, x) for name, value in kwargs.items()}
    rows = take_rows(x, tokens.rows(x.shape[1]))
    if args:
        return (rows, *(_of_tokens(value, tokens, x) for value in args[1:])), named
    return (), named | {"hidden_states": rows}


def _of_tokens(given: Any, tokens: Subset, x: Tensor) -> Any:
    """Of what is given for each token ``(B, N, k, C)`` (timesteps of Wan 2.2), the rows of some."""
    if not isinstance(given, Tensor) or given.ndim != 4 or given.shape[:2] != x.shape[:2]:
        return given
    return take_rows(given.flatten(2), tokens.rows(x.shape[1])).unflatten(2, given.shape[2:])


def _is_full(call: Call) -> bool:
    """Whether a call computes all sites."""
    return call.cut is None and not call.plan and call.can_subset


def streams(cut: Cut | None) -> bool:
    """Whether tokens go through blocks in a call with that cut."""
    return cut is None or cut.entry is not None
