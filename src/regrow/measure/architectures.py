"""Public architectures by name, as configurations without weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig

from regrow import zoo

_SD = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}

CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "sd15": _SD | {"cross_attention_dim": 768, "attention_head_dim": 8},
    "sd2": _SD
    | {
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    },
    "sdxl": {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
"""Settings of the public models: Stable Diffusion 1.5, 2 (base) and XL."""

NAMES = (*CONFIGS, "emoji")


@dataclass(frozen=True)
class Architecture:
    """A denoiser without weights.

    Args:
        name: for tables.
        denoiser: on the meta device.
        scale: pixels a latent position spans along one side.
        text_tokens: length of a prompt.
    """

    name: str
    denoiser: Any
    scale: int = 8
    text_tokens: int = 77

    def inputs(
        self, height: int | None = None, width: int | None = None, batch: int = 1
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of one call, on the meta device.

        Args:
            height: of the picture in pixels; the model's own size if not given.
            width: likewise.
            batch: samples in the call.

        Raises:
            ValueError: if a side is no positive multiple of ``scale``.
        """
        config = self.denoiser.config
        sides = []
        for name, side in (("height", height), ("width", width)):
            side = config.sample_size * self.scale if side is None else side
            if side < self.scale or side % self.scale:
                raise ValueError(f"{name}: {side} is not allowed, it must be a multiple of {self.scale}")
            sides.append(side // self.scale)
        with torch.device("meta"):
            sample = torch.empty(batch, config.in_channels, *sides)
            text = torch.empty(batch, self.text_tokens, config.cross_attention_dim)
            extra: dict[str, Any] = {}
            if config.addition_embed_type == "text_time":
                pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
                extra["added_cond_kwargs"] = {
                    "text_embeds": torch.empty(batch, pooled),
                    "time_ids": torch.empty(batch, 6),
                }
            return (sample, torch.empty((), dtype=torch.long), text), extra


def architecture(name: str) -> Architecture:
    """An architecture by name.

    Raises:
        ValueError: if the name is not one of `NAMES`.
    """
    if name not in NAMES:
        raise ValueError(f"arch: {name!r} is not known; known are {', '.join(NAMES)}")
    if name in CONFIGS:
        return Architecture(name, _without_weights(CONFIGS[name]))
    return _of_path(name, str(zoo.path(name)))


def architecture_of(model: str) -> Architecture:
    """The architecture of a model's folder or hub id; reads its configuration, not its weights.

    Raises:
        OSError: if there is no such model.
    """
    return _of_path(model, model)


def _of_path(name: str, path: str) -> Architecture:
    """What the configuration files of a pipeline say; the public models' values where they don't."""
    unet: Any = UNet2DConditionModel.load_config(path, subfolder="unet")
    vae: Any = AutoencoderKL.load_config(path, subfolder="vae")
    text: Any = CLIPTextConfig.from_pretrained(path, subfolder="text_encoder")
    levels = vae.get("block_out_channels") or vae["encoder_block_out_channels"]
    scale = 2 ** (len(levels) - 1)
    return Architecture(name, _without_weights(unet), scale, text.max_position_embeddings)


def _without_weights(config: Any) -> Any:
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(config).eval()
