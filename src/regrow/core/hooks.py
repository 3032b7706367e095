"""What the layers of a denoiser do in a call that was decided at its root.

Each hook is called in place of a module's forward method, with the module and the forward method that it
lies around. `regrow.core.install` puts hooks on modules for as long as a call of the denoiser lasts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, cast

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn

from regrow.core.call import Call, Watched
from regrow.core.decision import SKIP
from regrow.core.engine import Engine
from regrow.core.memory import placeholders
from regrow.core.recipe import Attention
from regrow.core.store import copied
from regrow.models.norms import Norm
from regrow.models.table import Cut, Returns, Skippable, Turned
from regrow.tokens.select import put_rows, take_rows

Forward = Callable[..., Any]


class Hook(Protocol):
    """Stands in for a module's forward method."""

    def __call__(self, module: nn.Module, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        """What the module hands on.

        Args:
            module: the module.
            forward: its forward method, or the hook that lies inside this one.
            args: what the module was called with.
            kwargs: the same, by name.
        """


class SkipHook:
    """A module that cached calls leave out; a part of a site, where the site is left out."""

    def __init__(self, engine: Engine, place: Skippable, site: str = "") -> None:
        self.engine, self.place, self.site = engine, place, site

    def __call__(self, module: nn.Module, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        call, name = self.engine.call, self.place.name
        if call is None:
            return forward(*args, **kwargs)
        for cut in (*call.store, *([] if call.cut is None else [call.cut])):
            if name == cut.entry:
                call.entered[cut] = taken(args, kwargs)
        turn = call.turns[name] = call.turns.get(name, -1) + 1
        computed = call.plan.get(self.site, SKIP) is not SKIP
        if call.cut is not None and name in call.cut.skip and not computed:
            if name not in call.cut.restore:
                call.stood_in.add(name)
                return self._stand_in(call, args, kwargs)
            # A layer that the last full call left out (skip-layer guidance) has nothing to hand on.
            if _turn(call.cut.key(name), turn) in call.slot.store:
                call.restored += 1
                call.stood_in = {other for other in call.stood_in if not call.cut.feeds(other, name)}
                return self._restored(call, call.cut)
        out = forward(*args, **kwargs)
        if call.cut is None:
            call.slot.shapes[name] = [t.shape for t in self.place.tensors(out) if isinstance(t, Tensor)]
        for cut in call.store:
            if name in cut.restore:
                self._keep(call, cut, out)
        return out

    def _keep(self, call: Call, cut: Cut, out: Any) -> None:
        """Keep what a restoring module returned, or what was added to the entry's input."""
        store = call.slot.store
        if cut.entry is None:
            # Whoever is handed this output may write to it, such as the caller of the denoiser.
            key = _turn(cut.key(self.place.name), call.turns[self.place.name])
            call.compare(cut, key, out)
            store.add(key, call.step, copied(out) if call.dense or cut.final else out)
        elif cut in call.entered:
            before, after = call.entered.pop(cut), self.place.tensors(out)
            added = [None if y is None else y - x for x, y in zip(before, after, strict=True)]
            key, (text, image) = cut.key(self.place.name), added
            if call.tokens is None:
                call.compare(cut, key, added)
                store.add(key, call.step, added)
            elif key in store and image is not None:
                # The other tokens keep what was added to them before.
                old = store.last(key)[1]
                put_rows(old, call.tokens.rows(old.shape[1]), image)
                store.amend(key, [text, old])

    def _restored(self, call: Call, cut: Cut) -> Any:
        """What a module hands on instead of running."""
        name, store = self.place.name, call.slot.store
        key = _turn(cut.key(name), call.turns[name])
        feature = store.at(key, call.step, call.recovery)
        if cut.entry is None:
            mine = feature is store.last(key) and (call.dense or cut.final)
            return copied(feature) if mine else feature
        # Not to its own input: others may have added to the tokens on the way here (ControlNet).
        before = call.entered.pop(cut)
        if call.tokens is not None:
            image = feature[1]
            feature = [feature[0], take_rows(image, call.tokens.rows(image.shape[1]))]
        return self._pack([x if d is None else x + d for x, d in zip(before, feature, strict=True)])

    def _stand_in(self, call: Call, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What a module between hands on: nobody reads it."""
        if self.place.returns in (Returns.TOKENS, Returns.JOINT):
            return self._pack(taken(args, kwargs))
        like = args[0] if args else kwargs["hidden_states"]
        shapes = call.slot.shapes.get(self.place.name)
        if self.place.returns is Returns.OWN:
            assert shapes is not None
            return like.new_empty(1).expand(shapes[0])
        return self._pack(placeholders(like, shapes, max(self.place.count, 1), dense=call.dense))

    def _pack(self, tensors: Sequence[Any]) -> Any:
        match self.place.returns:
            case Returns.TENSOR | Returns.OWN:
                return tensors[0]
            case Returns.TUPLE:
                return (tensors[0],)
            case Returns.DOWN:
                return tensors[-1], tuple(tensors)
            case Returns.TOKENS:
                return tensors[-1]
            case Returns.JOINT:
                return tuple(tensors)


def _turn(key: str, turn: int) -> str:
    """What a feature is kept under if its module runs several times a call (chunked feed-forwards)."""
    return key if turn == 0 else f"{key}, turn {turn}"


def taken(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """The text, or None, and the image tokens that a transformer block is given."""
    image = args[0] if args else kwargs["hidden_states"]
    text = args[1] if len(args) > 1 else kwargs.get("encoder_hidden_states")
    return [text, image]


class NormHook:
    """A norm that computes nothing where nobody reads what it returns: the tokens but the first are gone.

    What lies between it and the layers that read it goes token by token, and is spared as well.
    """

    def __init__(self, engine: Engine, norm: Norm) -> None:
        self.engine, self.norm = engine, norm

    def __call__(self, module: nn.Module, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        call, norm = self.engine.call, self.norm
        if call is None or not args or not all(map(call.reuses, norm.readers)):
            return forward(*args, **kwargs)
        # Chunks are counted, and somebody's own hook shall see what it would have seen.
        if getattr(norm.block, "_chunk_size", None) is not None or module._forward_hooks:
            return forward(*args, **kwargs)
        return args[0][:, :1]


class PositionHook:
    """Keeps the table of rotary embeddings of all tokens."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def __call__(self, module: nn.Module, forward: Forward, *args: Any, **kwargs: Any) -> Sequence[Tensor]:
        output = forward(*args, **kwargs)
        call = self.engine.call
        if call is not None:
            call.positions = output
        return output


class TurnHook:
    """Turns queries or keys by the positions of their tokens, where they are made."""

    def __init__(self, engine: Engine, turned: Turned) -> None:
        self.engine, self.attention, self.rows = engine, turned.attention, turned.rows

    def __call__(self, module: nn.Module, forward: Forward, *args: Any, **kwargs: Any) -> Tensor:
        output = forward(*args, **kwargs)
        call = self.engine.call
        if call is None or not call.can_subset:
            return output
        table: Any = self.engine.positions(self.attention, self.rows)
        # Samples that compute other tokens have other positions: then all are one sequence.
        sequences = output.reshape(-1, len(table[0]), *output.shape[2:])
        turned: Any = apply_rotary_emb(sequences, table, sequence_dim=1)
        return cast(Tensor, turned.view(output.shape))


class UnturnedHook:
    """An attention that is handed queries and keys which are turned already."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def __call__(self, module: nn.Module, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        call = self.engine.call
        if call is not None and call.can_subset:
            kwargs["image_rotary_emb"] = None
        return forward(*args, **kwargs)


class CatchHook:
    """Keeps what a projection of a watched attention, or its norm, gives until the attention is done."""

    def __init__(self, engine: Engine, watched: Watched, projection: str) -> None:
        self.engine, self.watched, self.key = engine, watched, f"{watched.name}.{projection}"

    def __call__(self, module: nn.Module, forward: Forward, *args: Any, **kwargs: Any) -> Tensor:
        output = forward(*args, **kwargs)
        call = self.engine.call
        watched = self.watched
        if call is not None and watched.wanted(call):
            heads: Any = getattr(watched.module, "heads", 1)
            call.caught[self.key] = output.unflatten(-1, (heads, -1)) if watched.turned else output
        return output


class ObserveHook:
    """Tells the choice of tokens what an attention multiplied."""

    def __init__(self, engine: Engine, watched: Watched) -> None:
        self.engine, self.watched = engine, watched

    def __call__(self, module: nn.Module, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        call, watched = self.engine.call, self.watched
        if call is None or not watched.wanted(call):
            return out
        caught = {name: call.caught.pop(f"{watched.name}.{name}", None) for name, _ in (*QUERIES, *KEYS)}
        x = args[0] if args else kwargs["hidden_states"]
        tokens = x.shape[1] if call.slot.grid is None else call.slot.grid.tokens
        text = x.shape[1] - tokens
        query, key = (_heads(module, caught, names, text) for names in (QUERIES, KEYS))
        if query is None or key is None or {len(query), len(key)} != {len(x)}:
            self.engine.warn_once(
                "observe",
                "attentions that tokens are chosen by can't be looked at, because their projections were "
                "fused (call unfuse_qkv_projections()), or their processors project a part of the batch "
                "only (perturbed-attention guidance)",
            )
            return out
        bias = kwargs.get("attention_mask")
        bias = bias[:, None] if bias is not None and bias.ndim == 3 else bias
        watched.tell(call, x, Attention(query, key, tokens, bias))
        return out


# Of the image's tokens and of the text's, by name: the projection, and the norm of its heads.
QUERIES = (("to_q", "norm_q"), ("add_q_proj", "norm_added_q"))
KEYS = (("to_k", "norm_k"), ("add_k_proj", "norm_added_k"))


def _heads(
    attention: Any, caught: Mapping[str, Tensor | None], names: Sequence[tuple[str, str]], text: int
) -> Tensor | None:
    """Queries or keys ``(B, heads, n, D)``, the image's tokens first; None if those are missing.

    Args:
        attention: whose.
        caught: by the name of a projection, what it gave, or the norm behind it ``(B, n, heads, D)``.
        names: of these.
        text: number of text tokens that come first in what the image's projection gave.
    """
    found = []
    for projection, norm in names:
        x = caught[projection]
        if x is not None:
            scale = getattr(attention, norm, None)
            if x.ndim == 3:
                x = x.unflatten(-1, (attention.heads, -1))
                x = x if scale is None else scale(x)
            found.append(x.transpose(1, 2))
    if caught[names[0][0]] is None:
        return None
    both = torch.cat(found, dim=2)
    return both.roll(-text, 2) if text else both


class TextHook:
    """Computes what depends on the text alone once for each text."""

    def __init__(self, engine: Engine, name: str) -> None:
        self.engine, self.name = engine, name

    def __call__(self, module: nn.Module, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        call = self.engine.call
        if call is not None and call.knows_text and self.name in call.slot.store:
            return call.slot.store.last(self.name)
        out = forward(*args, **kwargs)
        if call is not None:
            call.slot.store.keep(self.name, out)
        return out
