"""Diffusion transformers: DiT, PixArt-alpha and -Sigma, Stable Diffusion 3 and 3.5, Flux, Latte, Wan.

A family is a row of a table. Depth counts blocks: a call of depth ``d`` runs the first ``ceil(d / 2)`` and
the last ``floor(d / 2)`` blocks. Instead of the blocks between, it adds what they added in the last full
call (block caching; a U-Net has skip connections for this, a transformer its residual stream).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from operator import attrgetter
from typing import Any

from torch import nn

from regrow.models.layers import LayerKind
from regrow.models.norms import norms_of
from regrow.models.rotary import Rotary, Rows
from regrow.models.table import (
    OUTPUT,
    Keeps,
    Layout,
    Returns,
    Site,
    SkipPlan,
    Spans,
    Stream,
    own_layers,
    whole,
)


@dataclass(frozen=True)
class Family:
    """The places of sites in a family of transformers.

    Args:
        stacks: for each list of blocks its path, the names of their attentions and feed-forwards, and the
            form of a block's output.
        output: path of the module that makes the output from the tokens.
        timestep_scale: number by which the pipelines divide the scheduler's timesteps.
        self_attentions: names of the blocks' attentions with keys and values of the image's tokens; none
            if a call can't compute some of the tokens only.
        conditional_first: the pipeline puts the conditional half of a guided batch first.
        text: paths of the modules that project the text.
        cross_attentions: names of the blocks' attentions with keys and values of the text alone.
        embed: path of the module that makes the image's tokens.
        rotary: name of the attentions' argument with a table of positions, by which they turn queries and
            keys after their norms; empty if there is none.
        spans: in a model of videos, the tokens that form one sequence in each list of blocks. Its blocks
            can compute some of their tokens, whole calls can't.
        in_turn: the lists' blocks run in turn: the first of each list, then the second of each.
    """

    stacks: tuple[tuple[str, tuple[str, ...], Returns], ...]
    output: str
    self_attentions: tuple[str, ...] = ()
    conditional_first: bool = False
    text: tuple[str, ...] = ()
    cross_attentions: tuple[str, ...] = ()
    timestep_scale: float = 1.0
    embed: str = "pos_embed"
    rotary: str = ""
    spans: tuple[Spans, ...] = ()
    in_turn: bool = False


_BASIC = ("transformer_blocks", ("attn1", "attn2", "ff"), Returns.TOKENS)
_JOINT = ("transformer_blocks", ("attn", "attn2", "ff", "ff_context"), Returns.JOINT)
# In a single block, only the output of proj_out is read outside.
_SINGLE = ("single_transformer_blocks", ("attn", "proj_mlp", "act_mlp", "proj_out"), Returns.JOINT)
_ENDS = {"single_transformer_blocks": ("proj_out",)}
_FEED_FORWARDS = ("ff", "ffn")

FAMILIES = {
    "DiTTransformer2DModel": Family(
        (_BASIC,), "proj_out_2", self_attentions=("attn1",), conditional_first=True
    ),
    "PixArtTransformer2DModel": Family(
        (_BASIC,),
        "proj_out",
        self_attentions=("attn1",),
        text=("caption_projection",),
        cross_attentions=("attn2",),
    ),
    "SD3Transformer2DModel": Family(
        (_JOINT,), "proj_out", self_attentions=("attn", "attn2"), text=("context_embedder",)
    ),
    "FluxTransformer2DModel": Family(
        (_JOINT, _SINGLE),
        "proj_out",
        self_attentions=("attn",),
        timestep_scale=1000.0,
        text=("context_embedder",),
        embed="x_embedder",
        rotary="image_rotary_emb",
    ),
    "LatteTransformer3DModel": Family(
        (_BASIC, ("temporal_transformer_blocks", ("attn1", "ff"), Returns.TOKENS)),
        "proj_out",
        self_attentions=("attn1",),
        text=("caption_projection",),
        cross_attentions=("attn2",),
        spans=(Spans.FRAME, Spans.PLACE),
        in_turn=True,
    ),
    "WanTransformer3DModel": Family(
        (("blocks", ("attn1", "attn2", "ffn"), Returns.TOKENS),),
        "proj_out",
        self_attentions=("attn1",),
        text=("condition_embedder.text_embedder",),
        cross_attentions=("attn2",),
        spans=(Spans.VIDEO,),
        rotary="rotary_emb",
    ),
}
"""Families by class name, so that no class is imported before it is used."""


def transformer_layout(transformer: Any) -> Layout:
    """Make the table of a transformer of a known family."""
    family = FAMILIES[_family_name(transformer)]
    blocks = _blocks(transformer, family)
    layers: dict[str, Site] = {}
    restored: set[str] = set()
    for path, names, _ in family.stacks:
        stack = [block for block in blocks.values() if _stack_of(block.name) == path]
        layers |= own_layers(stack, names)
        restored |= set(own_layers(stack, _ENDS.get(path, names)))
    order = list(blocks)
    skip_plans = [OUTPUT]
    streams = bool(family.self_attentions) and not family.spans
    for depth in range(1, len(order)):
        first, last = (depth + 1) // 2, len(order) - depth // 2
        # Tokens have one arrangement at both ends only if the first and the last block are of one list.
        last -= family.in_turn and (last - first) % 2 == 0
        between = order[first:last]
        skip_plans.append(SkipPlan(frozenset(between), frozenset(between[-1:]), between[0]))
    return Layout(
        blocks=(),
        skippable=whole(transformer) | blocks | layers,
        skip_plans=tuple(skip_plans),
        layers=SkipPlan(frozenset(layers), frozenset(restored)),
        head=SkipPlan(frozenset(order), frozenset(order[-1:])),
        sample="hidden_states",
        timestep_scale=family.timestep_scale,
        conditional_first=family.conditional_first,
        text=_text(transformer, family, blocks),
        stream=_stream(transformer, family, blocks) if streams else None,
        block_sites=_block_sites(family, blocks),
        layer_sites=_layer_sites(family, blocks, streams),
        patch=_patch(transformer.config.patch_size) if family.spans else None,
        norms=norms_of((name, site.module) for name, site in blocks.items()),
        rotary=_rotary(family, blocks),
    )


def _blocks(transformer: Any, family: Family) -> dict[str, Site]:
    """List the blocks by name, as they run."""
    stacks = [
        [Site(f"{path}.{i}", block, returns=returns) for i, block in enumerate(getattr(transformer, path))]
        for path, _, returns in family.stacks
    ]
    order = chain(*zip(*stacks, strict=True)) if family.in_turn else chain(*stacks)
    return {site.name: site for site in order}


def _stack_of(block: str) -> str:
    """Find the path of a block's list."""
    return block.rpartition(".")[0]


def _patch(size: Any) -> tuple[int, int]:
    """Read the rows and columns that a token spans, from one number or (frames, rows, columns)."""
    return (size, size) if isinstance(size, int) else (size[-2], size[-1])


def _text(transformer: Any, family: Family, blocks: dict[str, Site]) -> dict[str, nn.Module]:
    """Find the modules whose output depends on the text alone."""
    own = {name: attrgetter(name)(transformer) for name in family.text}
    found = {name: module for name, module in own.items() if module is not None}
    return found | _keys_and_values(blocks, family.cross_attentions)


def _keys_and_values(blocks: dict[str, Site], attentions: Sequence[str]) -> dict[str, nn.Module]:
    """Find the modules that give keys and values in these attentions of all blocks."""
    layers = own_layers(blocks.values(), attentions)
    found = own_layers(layers.values(), ("to_k", "to_v"))
    return {name: site.module for name, site in found.items()}


def _stream(transformer: Any, family: Family, blocks: dict[str, Site]) -> Stream:
    """Describe where the image's tokens begin and end."""
    config = transformer.config
    attentions = own_layers(blocks.values(), family.self_attentions)
    return Stream(
        embed=getattr(transformer, family.embed),
        memory=_memory(family, attentions),
        output=getattr(transformer, family.output),
        patch=config.patch_size,
        noise=config.in_channels,
    )


def _memory(family: Family, attentions: dict[str, Site]) -> dict[str, nn.Module]:
    """Find the modules that give the keys and values of the image's tokens."""
    # Keys are kept after they are turned, so that only new ones are turned.
    kept = ("norm_k", "to_v") if family.rotary else ("to_k", "to_v")
    found = own_layers(attentions.values(), kept)
    return {name: site.module for name, site in found.items()}


# For the image's tokens, and for the text's in blocks that keep both apart.
_TURNED = {
    "norm_q": Rows.IMAGE,
    "norm_k": Rows.IMAGE,
    "norm_added_q": Rows.TEXT,
    "norm_added_k": Rows.TEXT,
}


def _rotary(family: Family, blocks: dict[str, Site]) -> dict[str, Rotary]:
    """Find the attentions that turn queries and keys."""
    if not family.rotary:
        return {}
    own = own_layers(blocks.values(), family.self_attentions)
    return {name: Rotary(site.module, family.rotary, _turned(site)) for name, site in own.items()}


def _turned(attention: Site) -> tuple[tuple[nn.Module, Rows], ...]:
    """Find the norms after which an attention turns, and the tokens that they take."""
    # In single blocks the text comes first.
    joint = attention.name.startswith(_SINGLE[0])
    found = ((getattr(attention.module, name, None), rows) for name, rows in _TURNED.items())
    return tuple((norm, Rows.JOINT if joint else rows) for norm, rows in found if norm is not None)


def _block_sites(family: Family, blocks: dict[str, Site]) -> tuple[Site, ...]:
    """Make the sites of blocks, if each takes and returns the image's tokens."""
    if any(site.returns is not Returns.TOKENS for site in blocks.values()):
        return ()
    spans = _spans(family)
    sites = []
    for index, (name, site) in enumerate(blocks.items()):
        attentions = own_layers([site], family.self_attentions)
        memory = _memory(family, attentions)
        sites.append(
            replace(
                site,
                keeps=Keeps.UPDATE,
                block=name,
                index=index,
                memory=memory,
                able=bool(memory),
                attentions={path: layer.module for path, layer in attentions.items()},
                spans=spans[_stack_of(name)],
            )
        )
    return tuple(sites)


def _spans(family: Family) -> dict[str, Spans]:
    """Map the path of each list of blocks to the tokens that form one sequence there."""
    paths = [path for path, _, _ in family.stacks]
    return dict(zip(paths, family.spans or (Spans.VIDEO,) * len(paths), strict=True))


def _layer_sites(family: Family, blocks: dict[str, Site], streams: bool) -> tuple[Site, ...]:
    """Make the sites of attentions and feed-forwards, as they run."""
    names = {path: layers for path, layers, _ in family.stacks}
    sites: list[Site] = []
    for index, (block, site) in enumerate(blocks.items()):
        own = own_layers([site], names[_stack_of(block)])
        layers = [_layer_site(family, layer, site, index, streams) for layer in own.values()]
        sites += [_single(layers, site.module)] if block.startswith(_SINGLE[0]) else layers
    return tuple(sites)


def _layer_site(family: Family, layer: Site, block: Site, index: int, streams: bool) -> Site:
    """Make the site of an attention or a feed-forward."""
    child = layer.name.removeprefix(f"{block.name}.")
    kind = _kind(family, child)
    spans = _spans(family)[_stack_of(block.name)]
    joined = (f"{child}_context",) if kind is LayerKind.FEED_FORWARD else ()
    return replace(
        layer,
        block=block.name,
        index=index,
        memory=_memory(family, {layer.name: layer}) if kind is LayerKind.SELF_ATTENTION else {},
        able=streams and kind is not None,
        spans=spans,
        kind=kind,
        text=tuple(own_layers([block], joined)),
    )


def _kind(family: Family, child: str) -> LayerKind | None:
    """Name what a layer does with the image's tokens; None if it has the text's tokens."""
    if child in family.self_attentions:
        return LayerKind.SELF_ATTENTION
    if child in family.cross_attentions:
        return LayerKind.CROSS_ATTENTION
    return LayerKind.FEED_FORWARD if child in _FEED_FORWARDS else None


def _single(layers: Sequence[Site], block: nn.Module) -> Site:
    """Make the one layer of a single block, whose attention and feed-forward share the last projection."""
    attention, *_, last = layers
    return replace(
        last,
        memory={},
        able=attention.able,
        kind=LayerKind.FEED_FORWARD,
        joint=True,
        entry=block.get_submodule("proj_mlp"),
        parts=frozenset(site.name for site in layers) - {last.name},
        fused_attention=replace(attention, joint=True),
    )


def _family_name(transformer: Any) -> str:
    return next(base.__name__ for base in type(transformer).__mro__ if base.__name__ in FAMILIES)
