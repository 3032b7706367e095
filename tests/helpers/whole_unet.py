"""Whole U-Net calls with the reference's pruning, to compare a method's calls with."""

from __future__ import annotations

import copy
from typing import Any

import pipelines
import reference
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

import regrow


def blocks_at(
    model: UNet2DConditionModel, size: tuple[int, int], levels: tuple[int, ...]
) -> list[tuple[Any, int, int]]:
    """The transformer blocks at these levels (0 is the latent's resolution) with their grids."""
    last = len(model.down_blocks) - 1
    found = []
    for level in levels:
        height, width = size
        for _ in range(level):
            # A 3 x 3 convolution of stride 2 with a padding of 1.
            height, width = (height + 1) // 2, (width + 1) // 2
        for block in (model.down_blocks[level], model.up_blocks[last - level]):
            for attention in getattr(block, "attentions", []):
                found += [(inner, height, width) for inner in attention.transformer_blocks]
    return found


def with_reference(
    model: UNet2DConditionModel,
    inputs: dict[str, Any],
    base: Any,
    ratio: float,
    *,
    levels: tuple[int, ...] = (0,),
    **options: Any,
) -> Tensor:
    """The output of a copy of the U-Net that prunes by the reference."""
    twin = copy.deepcopy(model)
    blocks = blocks_at(twin, tuple(inputs["sample"].shape[-2:]), levels)
    assert blocks
    reference.Pruning(blocks, base, ratio, **options)
    with torch.no_grad():
        return twin(**inputs).sample


def guided_inputs(
    model: UNet2DConditionModel, calls: int, *, pairs: int = 1, height: int = 16, width: int = 16
) -> list[dict[str, Any]]:
    """Inputs of consecutive calls whose batch holds the same latents twice, with other texts."""
    out = []
    for i in range(calls):
        inputs = pipelines.unet_inputs(
            model, batch=2 * pairs, height=height, width=width, seed=i, timestep=900 - 100 * i
        )
        inputs["sample"] = inputs["sample"][:pairs].repeat(2, 1, 1, 1)
        out.append(inputs)
    return out


@torch.no_grad()
def outputs(model: UNet2DConditionModel, config: Any, inputs: list[dict[str, Any]]) -> list[Tensor]:
    """The outputs of one generation of a method."""
    found = []
    with regrow.apply(model, config) as run, run.generation(len(inputs)) as clock:
        for one in inputs:
            found.append(model(**one).sample)
            clock.step()
    return found


def assert_near(got: Tensor, expected: Tensor) -> None:
    # In single precision some processor rounds two tokens to a tie that others don't, and prunes the other.
    assert got.dtype is torch.float64
    scale = float(expected.abs().max())
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * scale)
