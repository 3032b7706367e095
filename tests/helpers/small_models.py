"""A bundled model's small twin: all of its parts and its words, fewer channels, random weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel

from regrow import zoo


def save_small_emoji(folder: Path) -> Path:
    """Write the twin of the bundled model of pictures from texts, and return its folder."""
    big, left_out = zoo.path("emoji"), shutil.ignore_patterns("*.md", "*.jpg", "*.png", "unet", "vae")
    shutil.copytree(big, folder, dirs_exist_ok=True, ignore=left_out)
    changes: tuple[tuple[Any, dict[str, Any]], ...] = (
        (UNet2DConditionModel, {"block_out_channels": (16, 32, 64), "norm_num_groups": 8}),
        (AutoencoderTiny, {f"{side}_block_out_channels": (8, 8, 8) for side in ("encoder", "decoder")}),
    )
    for kind, smaller in changes:
        name = "unet" if kind is UNet2DConditionModel else "vae"
        torch.manual_seed(0)
        kind.from_config({**kind.load_config(big, subfolder=name), **smaller}).save_pretrained(
            folder / name
        )
    return folder
