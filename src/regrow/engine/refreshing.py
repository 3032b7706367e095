"""Layers that hand on their last output but for some tokens: which layers, how many tokens, and which."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from regrow.engine.call import Call, Watched
from regrow.layers import Layer, LayerKind
from regrow.methods.parts import Attention, TokenRefresh
from regrow.models.errors import UnsupportedModelError
from regrow.models.table import Layout, TokenLayer
from regrow.reuse.depth import Slot
from regrow.tokens.select import Subset


class Refreshing:
    """A choice of tokens that layers compute anew, at work on a transformer.

    Args:
        rule: the choice.
        denoiser: the model.
        layout: its table.
        warn_once: takes what a warning is about, and the warning.

    Raises:
        UnsupportedModelError: if the model has no layers that can compute some of their tokens.
    """

    def __init__(
        self,
        rule: TokenRefresh,
        denoiser: nn.Module,
        layout: Layout,
        warn_once: Callable[[str, str], None],
    ) -> None:
        self.rule = rule
        self._layout, self._warn_once = layout, warn_once
        self.places = tuple(t for t in layout.token_layers if t.layer.kind in rule.kinds)
        """The layers that compute some of their tokens where they hand on their last output."""
        if not self.places:
            wanted = ", ".join(sorted(kind.value for kind in rule.kinds))
            raise UnsupportedModelError(
                f"model: {type(denoiser).__name__} has no layer that can compute some of its tokens by "
                f"themselves (asked for: {wanted}); methods that only reuse, such as FORA and DeepCache, "
                "work on it"
            )
        self.attending = self._attending()
        """By name, the self-attentions that compute some of their tokens, with the layer whose they are."""

    def _attending(self) -> dict[str, Layer]:
        if LayerKind.SELF_ATTENTION not in self.rule.kinds:
            return {}
        attentions = {t.attention.layer.name: t for t in self.places}
        return {name: t.layer for name, t in attentions.items() if t.attention.memory}

    @property
    def watched(self) -> Iterator[Watched]:
        """The attentions that tokens are chosen by."""
        for place in self._layout.first_layers().values():
            if place.layer.kind in self.rule.observes:
                tell = partial(self._observe, place.layer)
                yield Watched(place.layer.name, place.module, _is_seen_whole, tell)

    def _observe(self, layer: Layer, call: Call, x: Tensor, attention: Attention) -> None:
        self.rule.observe(call.slot.observed, layer, attention)

    def decide(self, call: Call, ratio: float, kwargs: Mapping[str, Any]) -> None:
        """Decide how many tokens each layer of a call computes that hands on its last output."""
        grid = call.slot.grid
        assert grid is not None
        able = [place for place in self.places if self._is_able(place, call.slot, kwargs)]
        counts = {t.layer.name: self.rule.count(t.layer, grid.tokens, ratio) for t in able}
        call.refresh = {name: count for name, count in counts.items() if count > 0}
        refreshing = [t for t in able if t.layer.name in call.refresh]
        call.parts = frozenset().union(*(t.parts for t in refreshing))
        call.whole = frozenset().union(*(t.text for t in refreshing))

    def _is_able(self, place: TokenLayer, slot: Slot, kwargs: Mapping[str, Any]) -> bool:
        """Whether a layer has what it needs to compute some of its tokens by themselves."""
        layer = place.layer
        if layer.name not in slot.store:
            # The last full call left it out (skip-layer guidance).
            return False
        block = self._layout.skippable[layer.block].module
        if layer.kind is LayerKind.FEED_FORWARD and getattr(block, "_chunk_size", None) is not None:
            self._warn_once(
                "chunks",
                "feed-forwards hand on their last output whole, because they are computed in chunks; call "
                "disable_forward_chunking() to have some of their tokens computed",
            )
            return False
        attention = place.attention
        if attention.layer.name not in self.attending:
            return place.beside is None or attention.layer.name in slot.store
        known = all(name in slot.store for name in attention.memory)
        if not known or kwargs.get("attention_mask") is not None:
            self._warn_once(
                "memory",
                "self-attentions, and what is computed with them, hand on their last output whole, because "
                "their projections were fused (call unfuse_qkv_projections()), so that keys can't be kept, "
                "or their processors project a part of the batch only (perturbed-attention guidance), or "
                "their tokens are masked",
            )
            return False
        return True

    def tokens(self, call: Call, layer: Layer) -> Subset:
        """The tokens that a layer computes in a call."""
        grid = call.slot.grid
        assert grid is not None
        key = self._key(layer)
        if key not in call.refreshed:
            count = call.refresh[layer.name]
            chosen = self.rule.select(call.slot.observed, layer, grid, count, call.info)
            call.refreshed[key] = Subset(chosen, grid.tokens)
        return call.refreshed[key]

    def _key(self, layer: Layer) -> str:
        """What a choice of tokens is made for."""
        return layer.block if self.rule.per_block else layer.name

    def done(self, call: Call) -> dict[str, Tensor]:
        """By the name of a layer, the tokens ``(B, K)`` that it computed in a call."""
        layers = (t.layer for t in self.places if t.layer.name in call.refresh)
        return {
            layer.name: call.refreshed[key].tokens
            for layer in layers
            if (key := self._key(layer)) in call.refreshed
        }


def _is_seen_whole(call: Call) -> bool:
    """Whether a call computes all tokens, which can be told apart."""
    return call.cut is None and call.tells_apart
