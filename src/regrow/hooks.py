"""The hooks that carry out what the engine decided, and their removal without a trace.

The root is watched by native module hooks, which survive CPU offload; layers are wrapped by diffusers'
model hooks, which can leave a layer out.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn

from regrow.engine.call import OUTPUT, Call, Watched
from regrow.engine.engine import Engine
from regrow.engine.lean import Lean
from regrow.engine.pruning import Pruning
from regrow.engine.refreshing import Refreshing
from regrow.layers import Layer
from regrow.methods.parts import Attention, Features, Recovery
from regrow.models.table import Cut, Returns, Rotary, Skippable, TokenBlock, TokenLayer, Turned
from regrow.reuse.depth import placeholders
from regrow.tokens.recover import keep, keep_merged, recover
from regrow.tokens.select import put_rows, rows_of, take_rows


def original(hook: ModelHook) -> Callable[..., Any]:
    """The forward method that a hook wraps."""
    reference: Any = hook.fn_ref
    return reference.original_forward


class SkipHook(ModelHook):
    """A module that cached calls leave out."""

    def __init__(self, engine: Engine, place: Skippable) -> None:
        super().__init__()
        self.engine, self.place = engine, place

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        call, name = self.engine.call, self.place.name
        if call is None:
            return original(self)(*args, **kwargs)
        for cut in (*call.store, *([] if call.cut is None else [call.cut])):
            if name == cut.entry:
                call.entered[cut] = _taken(args, kwargs)
        turn = call.turns[name] = call.turns.get(name, -1) + 1
        if name in call.parts:
            # Its own hook, which is inside, sees to it that some of the tokens are computed.
            call.restored += 1
            return original(self)(*args, **kwargs)
        if name in call.whole:
            out = call.slot.features[name] = original(self)(*args, **kwargs)
            return out
        if call.cut is not None and name in call.cut.skip:
            if name not in call.cut.restore:
                return self._stand_in(call, args, kwargs)
            # A layer that the last full call left out (skip-layer guidance) has nothing to hand on.
            if _turn(call.cut.key(name), turn) in call.slot.features:
                call.restored += 1
                return self._restored(call, call.cut)
        out = original(self)(*args, **kwargs)
        if call.cut is None:
            call.slot.shapes[name] = [t.shape for t in self._tensors(out) if isinstance(t, Tensor)]
        for cut in call.store:
            if name in cut.restore:
                self._keep(call, cut, out)
        return out

    def _keep(self, call: Call, cut: Cut, out: Any) -> None:
        """Keep what a restoring module returned, or what was added to the entry's input."""
        features = call.slot.features
        if cut.entry is None:
            # Whoever is handed this output may write to it, such as the caller of the denoiser.
            key = _turn(cut.key(self.place.name), call.turns[self.place.name])
            features[key] = _copied(out) if call.dense or cut.final else out
        elif cut in call.entered:
            before, after = call.entered.pop(cut), self._tensors(out)
            added = [None if y is None else y - x for x, y in zip(before, after, strict=True)]
            key, (text, image) = cut.key(self.place.name), added
            if call.tokens is None:
                features[key] = added
            elif key in features and image is not None:
                # The other tokens keep what was added to them before.
                old = features[key][1]
                put_rows(old, call.tokens.rows(old.shape[1]), image)
                features[key] = [text, old]

    def _restored(self, call: Call, cut: Cut) -> Any:
        """What a module hands on instead of running."""
        name = self.place.name
        feature = call.slot.features[_turn(cut.key(name), call.turns[name])]
        if cut.entry is None:
            return _copied(feature) if call.dense or cut.final else feature
        # Not to its own input: others may have added to the tokens on the way here (ControlNet).
        before = call.entered.pop(cut)
        if call.tokens is not None:
            image = feature[1]
            feature = [feature[0], take_rows(image, call.tokens.rows(image.shape[1]))]
        return self._pack([x if d is None else x + d for x, d in zip(before, feature, strict=True)])

    def _stand_in(self, call: Call, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What a module between hands on: nobody reads it."""
        if self.place.returns in (Returns.TOKENS, Returns.JOINT):
            return self._pack(_taken(args, kwargs))
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

    def _tensors(self, out: Any) -> list[Any]:
        match self.place.returns:
            case Returns.TENSOR | Returns.OWN:
                return [out]
            case Returns.TUPLE:
                return [out[0]]
            case Returns.DOWN:
                return list(out[1])
            case Returns.TOKENS:
                return [None, out]
            case Returns.JOINT:
                return list(out)


def _turn(key: str, turn: int) -> str:
    """What a feature is kept under if its module runs several times a call (chunked feed-forwards)."""
    return key if turn == 0 else f"{key}, turn {turn}"


def _taken(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """The text, or None, and the image tokens that a transformer block is given."""
    image = args[0] if args else kwargs["hidden_states"]
    text = args[1] if len(args) > 1 else kwargs.get("encoder_hidden_states")
    return [text, image]


def _copied(value: Any) -> Any:
    """A tensor, or a tuple of tensors, that nobody else holds."""
    if isinstance(value, tuple):
        return tuple(_copied(v) for v in value)
    return value.clone() if isinstance(value, Tensor) else value


class SelectHook(ModelHook):
    """Selects the tokens of a transformer block from the input of the module it is on."""

    def __init__(self, engine: Engine, pruning: Pruning, block: TokenBlock) -> None:
        super().__init__()
        self.engine, self.pruning, self.block = engine, pruning, block

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else kwargs["hidden_states"]
        self.pruning.select_from(self.engine.call, self.block.name, x)
        return args, kwargs


class KeepHook(ModelHook):
    """A layer that computes the kept tokens only and recovers the others."""

    def __init__(self, engine: Engine, block: TokenBlock, merge: bool) -> None:
        super().__init__()
        self.engine, self.block = engine, block
        self.reduce = keep_merged if merge else keep

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        call = self.engine.call
        selection = None if call is None else call.selections.get(self.block.name)
        x = args[0] if args else kwargs["hidden_states"]
        # IP-Adapter masks, which every attention is handed, speak of all tokens to the cross-attention.
        masked = module is self.block.cross_attention and kwargs.get("ip_adapter_masks") is not None
        # Chunked feed-forwards get a part of the tokens.
        if selection is None or x.shape[1] != selection.tokens or masked:
            return original(self)(*args, **kwargs)
        assert call is not None
        call.pruned += 1
        if args:
            args = (self.reduce(x, selection), *args[1:])
        else:
            kwargs["hidden_states"] = self.reduce(x, selection)
        mask = kwargs.get("attention_mask")
        if mask is not None and module is self.block.self_attention:
            index = selection.kept.view(len(selection.kept), *[1] * (mask.ndim - 2), -1)
            kwargs["attention_mask"] = mask.gather(-1, index.expand(*mask.shape[:-1], -1))
        return recover(original(self)(*args, **kwargs), selection)


class NarrowHook(ModelHook):
    """Hands on those of the image's tokens that the call computes from here on."""

    def __init__(self, engine: Engine, lean: Lean) -> None:
        super().__init__()
        self.engine, self.lean = engine, lean

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        tokens = self.lean.narrow(self.engine.call)
        if tokens is None:
            return output
        if isinstance(output, tuple):
            text, image = output
            return text, rows_of(image, tokens)
        return rows_of(output, tokens)


class MemoryHook(ModelHook):
    """Completes what a module gives for some tokens with what it last gave for the others."""

    def __init__(self, engine: Engine, lean: Lean, key: str) -> None:
        super().__init__()
        self.engine, self.lean, self.key = engine, lean, key

    def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
        call = self.engine.call
        if call is None or not call.remembers:
            return output
        if len(output) != call.info.batch:
            self.lean.forget(call)
            return output
        features = call.slot.features
        if call.tokens is None:
            features[self.key] = output
        elif self.key not in features:
            raise RuntimeError(
                f"{self.key} runs, but was left out of the last full call; layers to skip can't change "
                "within a generation"
            )
        else:
            old = features[self.key]
            put_rows(old, call.tokens.rows(old.shape[1]), output)
        # The caller of the denoiser may write to its output.
        return features[self.key].clone() if self.key == OUTPUT else features[self.key]


class PositionHook(ModelHook):
    """Keeps the table of rotary embeddings of all tokens."""

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self.engine = engine

    def post_forward(self, module: nn.Module, output: Sequence[Tensor]) -> Sequence[Tensor]:
        call = self.engine.call
        if call is not None:
            call.positions = output
        return output


class TurnHook(ModelHook):
    """Turns queries or keys by the positions of their tokens, where they are made."""

    def __init__(self, engine: Engine, turned: Turned) -> None:
        super().__init__()
        self.engine, self.attention, self.rows = engine, turned.attention, turned.rows

    def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
        call = self.engine.call
        if call is None or not call.tells_apart:
            return output
        table: Any = self.engine.positions(self.attention, self.rows)
        # Samples that compute other tokens have other positions: then all are one sequence.
        sequences = output.reshape(-1, len(table[0]), *output.shape[2:])
        turned: Any = apply_rotary_emb(sequences, table, sequence_dim=1)
        return cast(Tensor, turned.view(output.shape))


class UnturnedHook(ModelHook):
    """An attention that is handed queries and keys which are turned already."""

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self.engine = engine

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        call = self.engine.call
        if call is not None and call.tells_apart:
            kwargs["image_rotary_emb"] = None
        return args, kwargs


class TakeHook(ModelHook):
    """Hands a layer those of its tokens that it computes."""

    def __init__(self, engine: Engine, refreshing: Refreshing, layer: Layer) -> None:
        super().__init__()
        self.engine, self.refreshing, self.layer = engine, refreshing, layer

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        call = self.engine.call
        if call is None or self.layer.name not in call.refresh:
            return args, kwargs
        x = args[0] if args else kwargs["hidden_states"]
        short = take_rows(x, self.refreshing.tokens(call, self.layer).rows(x.shape[1]))
        return ((short, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": short})


class PutHook(ModelHook):
    """Hands on the tokens that a layer computed among those of its last output."""

    def __init__(self, engine: Engine, refreshing: Refreshing, layer: Layer) -> None:
        super().__init__()
        self.engine, self.refreshing, self.layer = engine, refreshing, layer

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        call, name = self.engine.call, self.layer.name
        if call is None or name not in call.refresh:
            return output
        tokens, features = self.refreshing.tokens(call, self.layer), call.slot.features
        # Blocks only read what layers return, so that the last output is nobody else's.
        last = features[name]
        if isinstance(output, tuple):
            put_rows(last[0], tokens.rows(last[0].shape[1]), output[0])
            features[name] = last = (last[0], *output[1:])
        else:
            put_rows(last, tokens.rows(last.shape[1]), output)
        call.pruned += 1
        return last


class BesideHook(ModelHook):
    """An attention that hands on its last output for the tokens that the layer beside it computes."""

    def __init__(self, engine: Engine, refreshing: Refreshing, key: str, layer: Layer) -> None:
        super().__init__()
        self.engine, self.refreshing, self.key, self.layer = engine, refreshing, key, layer

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        call = self.engine.call
        if call is not None and self.layer.name in call.refresh:
            last = call.slot.features[self.key]
            return take_rows(last, self.refreshing.tokens(call, self.layer).rows(last.shape[1]))
        out = original(self)(*args, **kwargs)
        if call is not None and call.cut is None:
            call.slot.features[self.key] = out
        return out


class LayerMemoryHook(ModelHook):
    """Completes the keys or values of the tokens that a layer computes with its last ones of the others."""

    def __init__(self, engine: Engine, refreshing: Refreshing, key: str, layer: Layer) -> None:
        super().__init__()
        self.engine, self.refreshing, self.key, self.layer = engine, refreshing, key, layer

    def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
        call = self.engine.call
        if call is None:
            return output
        features = call.slot.features
        if call.cut is None:
            # Of a part of the batch (perturbed-attention guidance) it is of no use.
            features.pop(self.key, None)
            if len(output) == call.info.batch:
                features[self.key] = output
        elif self.layer.name in call.refresh:
            old = features[self.key]
            put_rows(old, self.refreshing.tokens(call, self.layer).rows(old.shape[1]), output)
            return old
        return output


class CatchHook(ModelHook):
    """Keeps what a projection of a watched attention, or its norm, gives until the attention is done."""

    def __init__(self, engine: Engine, watched: Watched, projection: str) -> None:
        super().__init__()
        self.engine, self.watched, self.key = engine, watched, f"{watched.name}.{projection}"

    def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
        call = self.engine.call
        if call is not None and self.watched.wanted(call):
            call.caught[self.key] = output
        return output


class ObserveHook(ModelHook):
    """Tells the choice of tokens what an attention multiplied."""

    def __init__(self, engine: Engine, watched: Watched) -> None:
        super().__init__()
        self.engine, self.watched = engine, watched

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        out = original(self)(*args, **kwargs)
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
                "replaced or fused after regrow.apply (LoRA, fuse_qkv_projections; apply regrow last), or "
                "their processors project a part of the batch only (perturbed-attention guidance)",
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


class TextHook(ModelHook):
    """Computes what depends on the text alone once for each text."""

    def __init__(self, engine: Engine, name: str) -> None:
        super().__init__()
        self.engine, self.name = engine, name

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        call = self.engine.call
        if call is not None and call.knows_text and self.name in call.slot.features:
            return call.slot.features[self.name]
        out = original(self)(*args, **kwargs)
        if call is not None:
            call.slot.features[self.name] = out
        return out


class RootHook:
    """Lets the engine decide before a call of the denoiser, and look at its output."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.engine.begin(args, kwargs)

    def after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.engine.end(output)


class Installed:
    """The hooks of one engine, in place until `remove`."""

    def __init__(self, engine: Engine) -> None:
        self._undo: list[Callable[[], None]] = []
        self._forwards: dict[nn.Module, Any] = {}
        try:
            self._install(engine)
        except BaseException:
            self.remove()
            raise

    @property
    def active(self) -> bool:
        """Whether the hooks are in place."""
        return bool(self._undo)

    def remove(self) -> None:
        """Leave every module as it was before."""
        covered = [m for m, forward in self._forwards.items() if m.__dict__.get("forward") is not forward]
        if covered:
            warnings.warn(
                f"something replaced the forward methods of {len(covered)} modules after regrow.apply; it "
                "is lost with the removal. Enable offload before regrow.apply, or remove regrow first",
                stacklevel=3,
            )
        self._forwards.clear()
        while self._undo:
            self._undo.pop()()

    def _install(self, engine: Engine) -> None:
        if engine.pruning is not None:
            for block in engine.pruning.blocks:
                self._hook_block(engine, engine.pruning, block)
        for name, module in engine.layout.text.items():
            self._hook(module, TextHook(engine, name), "regrow-text")
        if engine.rotary is not None:
            # Registered before what keeps and catches keys, so that those are turned.
            self._hook_rotary(engine, engine.rotary)
        if engine.lean is not None and engine.layout.stream is not None:
            lean = engine.lean
            self._hook(lean.behind, NarrowHook(engine, lean), "regrow-narrow")
            for name, module in lean.memory.items():
                self._hook(module, MemoryHook(engine, lean, name), "regrow-memory")
            self._hook(engine.layout.stream.output, MemoryHook(engine, lean, OUTPUT), "regrow-memory")
        if engine.refreshing is not None:
            for place in engine.refreshing.places:
                self._hook_refreshing(engine, engine.refreshing, place)
        for watched in engine.watched:
            self._hook_watched(engine, watched)
        # Registered last, so that what is skipped is neither selected from nor pruned.
        for name in sorted(frozenset().union(*(cut.skip for cut in engine.cuts.values()))):
            skippable = engine.layout.skippable[name]
            self._hook(skippable.module, SkipHook(engine, skippable), "regrow-skip")
        denoiser, root = engine.denoiser, RootHook(engine)
        before = denoiser.register_forward_pre_hook(root.before, with_kwargs=True)
        self._undo.append(before.remove)
        after = denoiser.register_forward_hook(root.after, with_kwargs=True, always_call=True)
        self._undo.append(after.remove)

    def _hook_rotary(self, engine: Engine, rotary: Rotary) -> None:
        self._hook(rotary.positions, PositionHook(engine), "regrow-positions")
        for attention in rotary.attentions.values():
            self._hook(attention, UnturnedHook(engine), "regrow-unturned")
        for turned in rotary.turned:
            self._hook(turned.module, TurnHook(engine, turned), "regrow-turn")

    def _hook_refreshing(self, engine: Engine, refreshing: Refreshing, place: TokenLayer) -> None:
        layer, attention = place.layer, place.attention
        self._hook(place.first or place.module, TakeHook(engine, refreshing, layer), "regrow-take")
        if attention.layer.name in refreshing.attending:
            for name, module in attention.memory.items():
                self._hook(module, LayerMemoryHook(engine, refreshing, name, layer), "regrow-memory")
        if place.beside is not None:
            name = place.beside.layer.name
            beside: ModelHook = BesideHook(engine, refreshing, name, layer)
            if name in refreshing.attending:
                beside = TakeHook(engine, refreshing, layer)
            self._hook(place.beside.module, beside, "regrow-beside")
        self._hook(place.module, PutHook(engine, refreshing, layer), "regrow-put")

    def _hook_block(self, engine: Engine, pruning: Pruning, block: TokenBlock) -> None:
        where = pruning.rule.where
        layers = {
            block.self_attention: where.self_attention,
            block.cross_attention: where.cross_attention,
            block.feed_forward: where.feed_forward,
        }
        for layer, wanted in layers.items():
            if layer is not None and wanted:
                merge = where.recovery is Recovery.MEAN
                self._hook(layer, KeepHook(engine, block, merge), "regrow-keep")
        reads = {Features.BLOCK_INPUT: block.block, Features.NORM1: block.self_attention}.get(
            where.features
        )
        if reads is not None:
            # Registered after the layer's own hook, so that it runs before it.
            self._hook(reads, SelectHook(engine, pruning, block), "regrow-select")

    def _hook_watched(self, engine: Engine, watched: Watched) -> None:
        for projection, norm in (*QUERIES, *KEYS):
            # Norms give what is turned by position.
            part = getattr(watched.module, projection if engine.rotary is None else norm, None)
            if part is not None:
                self._hook(part, CatchHook(engine, watched, projection), "regrow-catch")
        self._hook(watched.module, ObserveHook(engine, watched), "regrow-observe")

    def _hook(self, module: nn.Module, hook: ModelHook, name: str) -> None:
        had_registry, had_forward = hasattr(module, "_diffusers_hook"), "forward" in module.__dict__
        registry = HookRegistry.check_if_exists_or_initialize(module)
        registry.register_hook(hook, name)
        self._forwards[module] = module.forward

        def undo() -> None:
            registry.remove_hook(name, recurse=False)
            # diffusers leaves its registry and an instance-level forward behind.
            if not registry.hooks:
                if not had_forward:
                    module.__dict__.pop("forward", None)
                if not had_registry:
                    del module._diffusers_hook

        self._undo.append(undo)


def is_hooked(denoiser: nn.Module) -> bool:
    """Whether an engine's hooks are on a denoiser already."""
    hooks = denoiser._forward_pre_hooks.values()
    return any(isinstance(getattr(hook, "__self__", None), RootHook) for hook in hooks)
