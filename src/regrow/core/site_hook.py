"""The one hook that carries out the decisions for a site."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from regrow.core.call import Call
from regrow.core.decision import ALL, SKIP, UNREAD, Some
from regrow.core.inputs import some_rows, taken
from regrow.core.memory import placeholders
from regrow.core.store import copied
from regrow.models.layers import LayerKind
from regrow.models.table import Keeps, Returns, Site, SkipPlan
from regrow.recover.space import Recovery, keep, keep_merged, recover
from regrow.tokens.select import Subset, put_rows, take_rows

if TYPE_CHECKING:
    from torch import nn

    from regrow.core.engine import Engine

Forward = Callable[..., Any]


class SiteHook:
    """Makes a site do what was decided for it before the call.

    Args:
        engine: engine of the denoiser.
        site: the site.
        decided: whether the method decides for it; if not, only cached calls skip it.
    """

    def __init__(self, engine: Engine, site: Site, *, decided: bool) -> None:
        self.engine, self.site, self.decided = engine, site, decided

    def __call__(self, module: nn.Module, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        call, site = self.engine.call, self.site
        if call is None:
            return forward(*args, **kwargs)
        if site.keeps is Keeps.NOTHING:
            return self._pruned(call, forward, args, kwargs)
        for skip_plan in call.spans:
            if site.name == skip_plan.entry:
                call.entered[skip_plan] = taken(args, kwargs)
        turn = call.turns[site.name] = call.turns.get(site.name, -1) + 1
        decision = call.decisions.get(site.name, ALL)
        if decision is UNREAD:
            call.stood_in.add(site.name)
            return self._stand_in(call, args, kwargs)
        tokens = self._tokens(call, args, kwargs)
        restoring = (
            call.skip_plan if call.skip_plan is not None and site.name in call.skip_plan.restore else None
        )
        key = _turn(site.key if restoring is None else restoring.key(site.name), turn)
        # A layer that the last full call skipped (skip-layer guidance) has no value to reuse.
        if (decision is SKIP or tokens is not None) and key in call.slot.store:
            if tokens is None or not tokens.tokens.shape[1]:
                return self._recovered(call, key, args, kwargs)
            computed = self._computed(call, tokens, forward, args, kwargs)
            return self._completed(call, key, args, kwargs, tokens, computed)
        out = forward(*args, **kwargs)
        if call.skip_plan is None and site.returns not in (Returns.TOKENS, Returns.JOINT):
            call.slot.shapes[site.name] = [t.shape for t in site.tensors(out) if isinstance(t, Tensor)]
        for skip_plan in call.store:
            # What the method decides for is kept once, below.
            if site.name in skip_plan.restore and not (
                self.decided and skip_plan.key(site.name) == site.key
            ):
                self._keep(call, skip_plan, turn, out)
        return self._kept(call, turn, out, args, kwargs) if self.decided else out

    def _tokens(self, call: Call, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Subset | None:
        """Find the tokens that it computes; None for all."""
        if not self.decided:
            return None
        if self.site.entry is not None:
            return call.partial.get(self.site.name)
        return self.engine.sited.enter(call, self.site, args, kwargs)

    def _pruned(self, call: Call, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute the kept tokens of a layer; the others copy from them."""
        decision = call.plan.get(self.site.name)
        selection = call.selections.get(decision.group) if isinstance(decision, Some) else None
        if selection is None:
            return forward(*args, **kwargs)
        x = args[0] if args else kwargs["hidden_states"]
        # Every attention gets the masks of an IP-Adapter; in the cross-attention they are for all tokens.
        crosses = self.site.kind is LayerKind.CROSS_ATTENTION
        if crosses and kwargs.get("ip_adapter_masks") is not None:
            call.unpruned = "they are given the masks of an IP-Adapter, which are for all tokens"
            return forward(*args, **kwargs)
        if x.shape[1] != selection.tokens:
            call.unpruned = (
                f"they are given {x.shape[1]} tokens where their grid has {selection.tokens} (another "
                "library, such as tomesd, merges tokens, or a feed-forward is computed in chunks)"
            )
            return forward(*args, **kwargs)
        call.pruned += 1
        merges = self.engine.sited.decider.space is Recovery.MEAN
        short = keep_merged(x, selection) if merges else keep(x, selection)
        args, kwargs = ((short, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": short})
        mask = kwargs.get("attention_mask")
        if mask is not None and self.site.kind is LayerKind.SELF_ATTENTION:
            index = selection.kept.view(len(selection.kept), *[1] * (mask.ndim - 2), -1)
            kwargs["attention_mask"] = mask.gather(-1, index.expand(*mask.shape[:-1], -1))
        return recover(forward(*args, **kwargs), selection)

    def _stand_in(self, call: Call, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Make the placeholder of a skipped site that nobody reads."""
        site = self.site
        if site.returns in (Returns.TOKENS, Returns.JOINT):
            return site.packed(taken(args, kwargs))
        like = args[0] if args else kwargs["hidden_states"]
        shapes = call.slot.shapes.get(site.name)
        if site.returns is Returns.OWN:
            assert shapes is not None
            return like.new_empty(1).expand(shapes[0])
        return site.packed(placeholders(like, shapes, max(site.count, 1), dense=call.dense))

    def _recovered(self, call: Call, key: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Recover the output of a skipped site."""
        skip_plan, store = call.skip_plan, call.slot.store
        call.restored += 1
        if skip_plan is not None:
            call.stood_in = {other for other in call.stood_in if not skip_plan.feeds(other, self.site.name)}
        value = call.recovered(key)
        if skip_plan is not None and skip_plan.entry is not None:
            # Added to the entry's input, as others may change the tokens between (ControlNet).
            before = call.entered.pop(skip_plan)
            if call.tokens is not None:
                value = [value[0], take_rows(value[1], call.tokens.rows(value[1].shape[1]))]
            return self.site.packed([x if d is None else x + d for x, d in zip(before, value, strict=True)])
        if self.decided and self.site.keeps is Keeps.UPDATE:
            return (args[0] if args else kwargs["hidden_states"]) + value
        # The receiver of this value, such as the caller of the denoiser, may write to it.
        ours = skip_plan is not None and (call.dense or skip_plan.final) and value is store.last(key)
        return copied(value) if ours else value

    def _computed(
        self,
        call: Call,
        tokens: Subset,
        forward: Forward,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """Compute some of its tokens, in the form in which its values are kept."""
        site = self.site
        if site.entry is not None:
            return forward(*args, **kwargs)
        short = some_rows(tokens, args, kwargs)
        call.partial[site.name] = tokens
        given = forward(*short[0], **short[1])
        del call.partial[site.name]
        if site.keeps is Keeps.OUTPUT:
            return given
        return given - (short[0][0] if short[0] else short[1]["hidden_states"])

    def _completed(
        self,
        call: Call,
        key: str,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        tokens: Subset,
        computed: Any,
    ) -> Any:
        """Complete an output of which some tokens were computed: the others are recovered."""
        store = call.slot.store
        value = call.recovered(key)
        if call.forecasts:
            # From a single value, a forecast returns that value itself.
            value = copied(value)
        image, new = (value[0], computed[0]) if isinstance(computed, tuple) else (value, computed)
        put_rows(image, tokens.rows(image.shape[1]), new)
        value = (image, *computed[1:]) if isinstance(computed, tuple) else image
        if not call.forecasts:
            # Only values of whole calls are used for forecasts.
            store.amend(key, value)
        if self.site.stream:
            # The caller of the denoiser may write to its output.
            return image.clone()
        call.restored += 1
        call.pruned += 1
        if self.site.keeps is Keeps.OUTPUT:
            return value
        return (args[0] if args else kwargs["hidden_states"]) + image

    def _keep(self, call: Call, skip_plan: SkipPlan, turn: int, out: Any) -> None:
        """Keep what a skip plan recovers later: the output, or what was added to the entry's input."""
        store, key = call.slot.store, skip_plan.key(self.site.name)
        if skip_plan.entry is None:
            key = _turn(key, turn)
            call.compare(skip_plan, key, out)
            # The receiver of this output, such as the caller of the denoiser, may write to it.
            store.add(key, copied(out) if call.dense or skip_plan.final else out)
        elif skip_plan in call.entered:
            before, after = call.entered.pop(skip_plan), self.site.tensors(out)
            added = [None if y is None else y - x for x, y in zip(before, after, strict=True)]
            text, image = added
            if call.tokens is None:
                call.compare(skip_plan, key, added)
                store.add(key, added)
            elif key in store and image is not None:
                # The other tokens keep their last update.
                old = store.last(key)[1]
                put_rows(old, call.tokens.rows(old.shape[1]), image)
                store.amend(key, [text, old])

    def _kept(
        self, call: Call, turn: int, out: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """Keep the output of a site that the method decides for, and return it."""
        site = self.site
        if call.keeps_sites and site.stream and len(out) != call.info.batch:
            self.engine.sited.forget(call, site)
        if not call.keeps_sites:
            return out
        x = args[0] if args else kwargs["hidden_states"]
        value = out if site.keeps is Keeps.OUTPUT else out - x
        call.slot.store.add(_turn(site.key, turn), value)
        # Blocks only read what layers return, but the caller of the denoiser may write to its output.
        return out.clone() if site.stream else out


def _turn(key: str, turn: int) -> str:
    """Make the key of a value whose module runs several times in a call (chunked feed-forwards)."""
    return key if turn == 0 else f"{key}, turn {turn}"
