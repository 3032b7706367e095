"""UNet2DConditionModel: Stable Diffusion 1 and 2, SDXL and their kin.

Depth counts the layers of the up path (a residual block and its attention) from the output. Layer ``d``
from the end takes the skip connection of the down path's unit ``d - 1`` (unit 0 is ``conv_in``). So a call
of depth ``d`` runs the first ``d`` units of the down path and the last ``d`` layers of the up path; the
other input of layer ``d``, from below, comes from a cache.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from regrow.models.norms import norms_of
from regrow.models.table import (
    OUTPUT,
    Layout,
    Returns,
    Site,
    SkipPlan,
    TokenBlock,
    own_layers,
    reuse_all,
    whole,
)

KNOWN_BLOCKS = {
    "CrossAttnDownBlock2D",
    "DownBlock2D",
    "UNetMidBlock2DCrossAttn",
    "UNetMidBlock2D",
    "CrossAttnUpBlock2D",
    "UpBlock2D",
}


def unknown_blocks(unet: Any) -> list[str]:
    """List the kinds of blocks that Stable Diffusion's U-Nets do not have."""
    middle = [] if unet.mid_block is None else [unet.mid_block]
    kinds = {type(block).__name__ for block in (*unet.down_blocks, *middle, *unet.up_blocks)}
    return sorted(kinds - KNOWN_BLOCKS)


def unet_layout(unet: Any) -> Layout | None:
    """Make the table of a UNet2DConditionModel; None if its blocks are not Stable Diffusion's."""
    if unknown_blocks(unet):
        return None
    middle_blocks = [] if unet.mid_block is None else [unet.mid_block]
    skippable: dict[str, Site] = {}

    def may_skip(name: str, module: nn.Module, returns: Returns, count: int = 0) -> str:
        skippable[name] = Site(name, module, returns=returns, count=count)
        return name

    entry = may_skip("conv_in", unet.conv_in, Returns.TENSOR)
    down_blocks: list[str] = []
    down_units: list[tuple[int, list[str]]] = []
    for b, block in enumerate(unet.down_blocks):
        path = f"down_blocks.{b}"
        units = _layers(path, block, may_skip)
        if block.downsamplers is not None:
            units.append(
                [
                    may_skip(f"{path}.downsamplers.{i}", module, Returns.TENSOR)
                    for i, module in enumerate(block.downsamplers)
                ]
            )
        down_units += [(b, unit) for unit in units]
        down_blocks.append(may_skip(path, block, Returns.DOWN, len(units)))

    middle = [may_skip("mid_block", block, Returns.TENSOR) for block in middle_blocks]

    up_blocks: list[str] = []
    up_layers: list[tuple[int, list[str]]] = []
    for b, block in enumerate(unet.up_blocks):
        path = f"up_blocks.{b}"
        up_layers += [(b, unit) for unit in _layers(path, block, may_skip)]
        up_blocks.append(may_skip(path, block, Returns.TENSOR))

    head = SkipPlan(frozenset([entry, *down_blocks, *middle, *up_blocks]), frozenset(up_blocks[-1:]))
    skip_plans = [OUTPUT]
    for depth in range(1, len(up_layers)):
        skip = set(middle)
        running = {b for b, _ in down_units[: depth - 1]}
        for b, unit in down_units[depth - 1 :]:
            skip.update(unit if b in running else [down_blocks[b]])
        first = len(up_layers) - depth
        running = {b for b, _ in up_layers[first:]}
        for b, unit in up_layers[:first]:
            skip.update(unit if b in running else [up_blocks[b]])
        b, unit = up_layers[first - 1]
        skip_plans.append(
            SkipPlan(frozenset(skip), frozenset({unit[-1] if b in running else up_blocks[b]}))
        )

    blocks = _token_blocks(unet)
    layers = own_layers([Site(b.name, b.block) for b in blocks], ("attn1", "attn2", "ff"))
    modules = whole(unet) | skippable | layers
    return Layout(
        blocks,
        modules,
        tuple(skip_plans),
        reuse_all(layers),
        head,
        norms=norms_of((b.name, b.block) for b in blocks),
    )


def _layers(path: str, block: Any, may_skip: Any) -> list[list[str]]:
    """List the layers of a block: a residual block, with its attention if there is one."""
    layers = []
    attentions = getattr(block, "attentions", None)
    for i, resnet in enumerate(block.resnets):
        layer = [may_skip(f"{path}.resnets.{i}", resnet, Returns.TENSOR)]
        if attentions is not None:
            layer.append(may_skip(f"{path}.attentions.{i}", attentions[i], Returns.TUPLE))
        layers.append(layer)
    return layers


def _token_blocks(unet: Any) -> tuple[TokenBlock, ...]:
    """List the transformer blocks, with the downsampling of their levels."""
    found: list[TokenBlock] = []

    def add(path: str, block: Any, downsample: int) -> None:
        for i, attention in enumerate(getattr(block, "attentions", None) or []):
            for j, inner in enumerate(getattr(attention, "transformer_blocks", [])):
                found.append(
                    TokenBlock(
                        name=f"{path}.attentions.{i}.transformer_blocks.{j}",
                        stage=f"{path}.attentions.{i}",
                        block=inner,
                        downsample=downsample,
                        # With `only_cross_attention`, attn1 attends to the text too.
                        self_attention=None if inner.only_cross_attention else inner.attn1,
                        cross_attention=inner.attn2,
                        feed_forward=inner.ff,
                    )
                )

    level = 1
    for b, block in enumerate(unet.down_blocks):
        add(f"down_blocks.{b}", block, level)
        level *= 1 if block.downsamplers is None else 2
    if unet.mid_block is not None:
        add("mid_block", unet.mid_block, level)
    for b, block in enumerate(unet.up_blocks):
        add(f"up_blocks.{b}", block, level)
        level //= 1 if block.upsamplers is None else 2
    return tuple(found)
