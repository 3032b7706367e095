"""Sites at work: what is decided for them in a call, and the hooks that carry it out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Protocol, cast

from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn

from regrow.core.decision import ALL, SKIP, Adapter, Decider, Decision, Entered, Some, View
from regrow.core.store import copied
from regrow.engine.call import Call, Watched
from regrow.layers import LayerKind
from regrow.methods.parts import Attention
from regrow.models.table import Keeps, Layout, Site
from regrow.recover.time import REUSE
from regrow.tokens.select import Subset, put_rows, take_rows


class Sites:
    """A method's decisions for sites, at work on a denoiser.

    Args:
        decider: the method.
        layout: of the denoiser.
        warn_once: takes what a warning is about, and the warning.
    """

    def __init__(self, decider: Decider, layout: Layout, warn_once: Callable[[str, str], None]) -> None:
        self.decider, self._layout, self._warn_once = decider, layout, warn_once

    @property
    def memory(self) -> Iterator[tuple[str, nn.Module, Site]]:
        """What gives keys and values in the sites of which some tokens may be computed, by name."""
        for site in self.decider.sites:
            yield from ((name, module, site) for name, module in site.memory.items())

    @property
    def watched(self) -> Iterator[Watched]:
        """The attentions that tokens are chosen by."""
        if LayerKind.SELF_ATTENTION not in self.decider.observes:
            return
        for site in self.decider.sites:
            for name, attention in site.attentions.items():
                yield Watched(name, attention, _is_full, partial(self._observe, site.block), site.turns)

    @property
    def turning(self) -> Iterator[tuple[Site, nn.Module]]:
        """The attentions that turn queries and keys by a table."""
        for site in self.decider.sites:
            if site.turns:
                yield from ((site, attention) for attention in site.attentions.values())

    def _observe(self, block: str, call: Call, x: Tensor, attention: Attention) -> None:
        self.decider.observe(call.slot.observed, block, attention)

    def plan(self, view: View) -> Mapping[str, Decision]:
        """What a call does at each site; empty if it computes all of them."""
        plan = self.decider.plan(view)
        return plan if any(decision is not ALL for decision in plan.values()) else {}

    def enter(self, call: Call, site: Site, entered: Entered) -> None:
        """A site is about to run; the method looks at the first one in a call that computes some tokens."""
        call.given[site.name] = len(entered.x)
        is_first = site.name == self.decider.sites[0].name
        if is_first and not call.seen and any(isinstance(what, Some) for what in call.plan.values()):
            call.seen = (self.decider.look(call.slot.observed, entered, call.info),)

    def subset(self, call: Call, site: Site, decision: Some, entered: Entered) -> Subset | None:
        """The tokens that a site computes; None if it can't compute some by themselves."""
        if not call.seen or not self._is_able(call, site, entered):
            return None
        if decision.group not in call.refreshed:
            memory, x = call.slot.observed, entered.x
            count = decision.count(x.shape[1])
            chosen = self.decider.choose(memory, call.seen[0], site, x, count, call.info)
            call.refreshed[decision.group] = Subset(chosen, x.shape[1])
        return call.refreshed[decision.group]

    def _is_able(self, call: Call, site: Site, entered: Entered) -> bool:
        """Whether a site has what it needs to compute some of its tokens by themselves."""
        known = all(name in call.slot.store for name in site.memory)
        chunked = getattr(site.module, "_chunk_size", None) is not None
        masked = entered.kwargs.get("attention_mask") is not None
        unlike = site.turns and not all(map(_has_own_processor, site.attentions.values()))
        if site.able and known and not chunked and not masked and not unlike:
            return True
        call.unpruned = (
            f"{site.name}, for one, computes all of its tokens: its projections were fused (call "
            "unfuse_qkv_projections()), or its processors project a part of the batch only "
            "(perturbed-attention guidance), or its feed-forward is computed in chunks (call "
            "disable_forward_chunking()), or its tokens are masked, or its attention processors were "
            "replaced where they turn queries, so that some can't be computed by themselves"
        )
        self._warn_once("memory", call.unpruned)
        return False

    def done(self, call: Call) -> dict[str, Tensor]:
        """By the name of a site, the tokens ``(B, n)`` that it computed in a call."""
        some = {name: d.group for name, d in call.plan.items() if isinstance(d, Some)}
        return {n: call.refreshed[group].tokens for n, group in some.items() if group in call.refreshed}

    def carried_out(self, call: Call) -> dict[str, Decision]:
        """What a call did at each site, with the shares that its choice gave."""
        return {name: self._carried_out(call, decision) for name, decision in call.plan.items()}

    @staticmethod
    def _carried_out(call: Call, decision: Decision) -> Decision:
        if not isinstance(decision, Some):
            return decision
        chosen = call.refreshed.get(decision.group)
        if chosen is None:
            # It could not compute some.
            return ALL
        return replace(decision, share=chosen.tokens.shape[1] / chosen.image)


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
        turn = call.turns[site.name] = call.turns.get(site.name, -1) + 1
        key = site.key if turn == 0 else f"{site.key}, turn {turn}"
        x = args[0] if args else kwargs["hidden_states"]
        entered = Entered(x, args[1:], {k: v for k, v in kwargs.items() if k != "hidden_states"})
        self.sites.enter(call, site, entered)
        decision = call.plan.get(site.name, ALL)
        if decision is SKIP and key in call.slot.store:
            call.restored += 1
            return self._recovered(call, key, x)
        if isinstance(decision, Some) and key in call.slot.store:
            tokens = self.sites.subset(call, site, decision, entered)
            if tokens is not None and not tokens.tokens.shape[1]:
                call.restored += 1
                return self._recovered(call, key, x)
            if tokens is not None:
                short = take_rows(x, tokens.rows(x.shape[1]))
                behind = (_of_tokens(argument, tokens, x) for argument in args[1:])
                named = {name: _of_tokens(value, tokens, x) for name, value in entered.kwargs.items()}
                call.partial[site.name] = tokens
                given = forward(short, *behind, **named)
                del call.partial[site.name]
                return self._completed(call, key, x, tokens, given - short)
        out = forward(*args, **kwargs)
        if call.keeps_sites:
            # Blocks only read what layers return, so that it is nobody else's.
            call.slot.store.add(key, call.step, out if site.keeps is Keeps.OUTPUT else out - x)
        return out

    def _recovered(self, call: Call, key: str, x: Tensor) -> Any:
        """What the site returns where nothing of it is computed."""
        value = call.slot.store.at(key, call.step, call.recovery)
        return value if self.site.keeps is Keeps.OUTPUT else x + value

    def _completed(self, call: Call, key: str, x: Tensor, tokens: Subset, update: Tensor) -> Tensor:
        """The tokens behind a site that computed the update of some of them."""
        store = call.slot.store
        value = store.at(key, call.step, call.recovery)
        if call.recovery != REUSE:
            # Of a single value even a forecast is that value itself.
            value = copied(value)
        put_rows(value, tokens.rows(value.shape[1]), update)
        if call.recovery == REUSE:
            # A forecast is of whole calls alone.
            store.amend(key, value)
        call.restored += 1
        call.pruned += 1
        return x + value


class SiteKeysHook:
    """Completes the keys or values of the tokens that a site computes with its last ones of the others."""

    def __init__(self, engine: _Engine, key: str, site: Site) -> None:
        self.engine, self.key, self.site = engine, key, site

    def __call__(self, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        call = self.engine.call
        if call is None:
            return output
        store, tokens = call.slot.store, call.partial.get(self.site.name)
        if tokens is not None:
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


def _of_tokens(given: Any, tokens: Subset, x: Tensor) -> Any:
    """Of what is given for each token ``(B, N, k, C)`` (timesteps of Wan 2.2), the rows of some."""
    if not isinstance(given, Tensor) or given.ndim != 4 or given.shape[:2] != x.shape[:2]:
        return given
    return take_rows(given.flatten(2), tokens.rows(x.shape[1])).unflatten(2, given.shape[2:])


def _is_full(call: Call) -> bool:
    """Whether a call computes all sites."""
    return call.cut is None and call.tells_apart
