"""U-Nets with blocks that have no attention among the image's tokens (the 4x upscaler's)."""

from __future__ import annotations

from typing import Any

import pipelines
import pytest
import torch

import regrow
from regrow import ATEDM, FULL, BaseChoice, DaTo, Features, Observation, Schedule, SiTo, ToMeSD


def unet(*only_cross_attention: bool) -> Any:
    """Two levels; by level, whether its blocks attend to the text alone."""
    return pipelines.unet(
        down_block_types=(pipelines.CROSS_DOWN,) * 2,
        up_block_types=(pipelines.CROSS_UP,) * 2,
        mid_block_type=None,
        only_cross_attention=only_cross_attention,
        layers_per_block=1,
    )


def chosen(model: Any, config: Any) -> set[str]:
    """The blocks whose tokens are chosen in a call."""
    found: list[Observation] = []
    inputs = pipelines.unet_inputs(model)
    with (
        torch.no_grad(),
        regrow.apply(model, config) as run,
        run.observed(found.append),
        run.generation(1) as clock,
    ):
        model(**inputs)
        clock.step()
    return {name for name, selection in found[0].blocks.items() if selection is not None}


def levels(names: set[str]) -> set[str]:
    return {".".join(name.split(".")[:2]) for name in names}


@pytest.mark.parametrize(
    "config",
    [
        SiTo(ratio=0.5),
        SiTo(ratio=0.5, features=Features.NORM1, feed_forward=True),
        ToMeSD(),
        DaTo(schedule=Schedule(depth=(FULL,), ratio=(0.5,))),
        ATEDM(ratio=0.5, early=0.0),
    ],
    ids=lambda config: type(config).__name__,
)
def test_tokens_are_chosen_only_where_a_layer_prunes(config: Any) -> None:
    assert levels(chosen(unet(True, False), config)) == {"down_blocks.1", "up_blocks.0"}


def test_layers_that_are_there_prune_in_every_block() -> None:
    config = SiTo(ratio=0.5, feed_forward=True, base=BaseChoice.BEST_IN_PATCH)
    assert levels(chosen(unet(True, False), config)) == {
        *("down_blocks.0", "down_blocks.1"),
        *("up_blocks.0", "up_blocks.1"),
    }


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (SiTo(ratio=0.5, max_downsample=1), "max_downsample: 1 leaves no layer .*; the finest is at 2"),
        (ATEDM(early=0.0, max_downsample=1), "max_downsample: 1 leaves no layer .*; the finest is at 2"),
    ],
)
def test_levels_without_such_a_layer_are_refused(config: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        regrow.apply(unet(True, False), config)


@pytest.mark.parametrize("config", [SiTo(ratio=0.5), ATEDM(early=0.0), ToMeSD()])
def test_a_model_without_such_a_layer_is_refused(config: Any) -> None:
    model = unet(True, True)
    with pytest.raises(ValueError, match=r"self_attention.*: UNet2DConditionModel has no such layer"):
        regrow.apply(model, config)
    assert not any("forward" in vars(module) for module in model.modules())
