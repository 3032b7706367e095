"""Public architectures by name, as configurations without weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import torch

from regrow import zoo
from regrow.words import offer, shown

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

_PATCHES = {"num_attention_heads": 16, "attention_head_dim": 72, "num_layers": 28, "out_channels": 8}
_PIXART = _PATCHES | {"cross_attention_dim": 1152, "caption_channels": 4096}

TRANSFORMERS: Mapping[str, tuple[str, int, Mapping[str, Any]]] = {
    "dit-xl-256": ("DiTTransformer2DModel", 0, _PATCHES | {"sample_size": 32}),
    "dit-xl-512": ("DiTTransformer2DModel", 0, _PATCHES | {"sample_size": 64}),
    "pixart-alpha-256": (
        "PixArtTransformer2DModel",
        120,
        _PIXART | {"sample_size": 32, "use_additional_conditions": False},
    ),
    "pixart-alpha-1024": (
        "PixArtTransformer2DModel",
        120,
        _PIXART | {"sample_size": 128, "use_additional_conditions": True},
    ),
    "pixart-sigma-1024": (
        "PixArtTransformer2DModel",
        300,
        _PIXART | {"sample_size": 128, "use_additional_conditions": False},
    ),
    "sd3-1024": (
        "SD3Transformer2DModel",
        77 + 256,
        {
            "sample_size": 128,
            "num_layers": 24,
            "num_attention_heads": 24,
            "attention_head_dim": 64,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 192,
        },
    ),
    "flux-1024": ("FluxTransformer2DModel", 512, {"guidance_embeds": True}),
    "latte-512": (
        "LatteTransformer3DModel",
        120,
        {
            "attention_head_dim": 72,
            "num_layers": 28,
            "in_channels": 4,
            "out_channels": 8,
            "cross_attention_dim": 1152,
            "attention_bias": True,
            "patch_size": 2,
            "activation_fn": "gelu-approximate",
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
            "norm_eps": 1e-6,
            "caption_channels": 4096,
        },
    ),
    "wan-1.3b-480": (
        "WanTransformer3DModel",
        512,
        {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
    ),
    "wan-14b-480": ("WanTransformer3DModel", 512, {}),
}
"""Transformers of the public models: class, text tokens, settings that are not its class's defaults."""

NAMES = (*CONFIGS, *zoo.MODELS, *TRANSFORMERS)


@dataclass(frozen=True)
class Architecture:
    """A denoiser without weights.

    Args:
        name: for tables.
        denoiser: the model, on the meta device.
        scale: pixels a latent position spans along one side.
        text_tokens: number of text tokens of a prompt.
    """

    name: str
    denoiser: Any
    scale: int = 8
    text_tokens: int = 77

    def own_size(self) -> tuple[int, int]:
        """Height and width, in pixels, of the pictures the model was made for."""
        size = getattr(self.denoiser.config, "sample_size", None)
        rows, columns = (size, size) if size else _SIZES[type(self.denoiser).__name__]
        return rows * self.scale, columns * self.scale

    def inputs(
        self, height: int | None = None, width: int | None = None, batch: int = 1
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Make the arguments of one call, on the meta device.

        Args:
            height: height of the picture in pixels; default: the model's own.
            width: width of the picture in pixels; default: the model's own.
            batch: number of samples in the call.

        Raises:
            ValueError: if a side is not a positive multiple of ``scale``.
        """
        config = self.denoiser.config
        sides = []
        for name, side, own in zip(("height", "width"), (height, width), self.own_size(), strict=True):
            side = own if side is None else side
            if side < self.scale or side % self.scale:
                raise ValueError(f"{name}: {side} is not allowed, it must be a multiple of {self.scale}")
            sides.append(side // self.scale)
        make = _INPUTS[type(self.denoiser).__name__]
        with torch.device("meta"):
            return make(config, batch, sides[0], sides[1], self.text_tokens)


Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def _unet_inputs(config: Any, batch: int, height: int, width: int, text: int) -> Inputs:
    extra: dict[str, Any] = {}
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        extra["added_cond_kwargs"] = {
            "text_embeds": torch.empty(batch, pooled),
            "time_ids": torch.empty(batch, 6),
        }
    sample = torch.empty(batch, config.in_channels, height, width)
    words = torch.empty(batch, text, config.cross_attention_dim)
    return (sample, torch.empty((), dtype=torch.long), words), extra


def _dit_inputs(config: Any, batch: int, height: int, width: int, text: int) -> Inputs:
    step = torch.empty(batch, dtype=torch.long)
    sample = torch.empty(batch, config.in_channels, height, width)
    return (sample,), {"timestep": step, "class_labels": step}


def _pixart_inputs(config: Any, batch: int, height: int, width: int, text: int) -> Inputs:
    widths = {"resolution": 2, "aspect_ratio": 1}
    said = config.use_additional_conditions
    added = {name: torch.empty(batch, size) if said else None for name, size in widths.items()}
    sample = torch.empty(batch, config.in_channels, height, width)
    return (sample,), {
        "encoder_hidden_states": torch.empty(batch, text, config.caption_channels),
        "encoder_attention_mask": torch.empty(batch, text),
        "timestep": torch.empty(batch, dtype=torch.long),
        "added_cond_kwargs": added,
    }


def _sd3_inputs(config: Any, batch: int, height: int, width: int, text: int) -> Inputs:
    return (), {
        "hidden_states": torch.empty(batch, config.in_channels, height, width),
        "encoder_hidden_states": torch.empty(batch, text, config.joint_attention_dim),
        "pooled_projections": torch.empty(batch, config.pooled_projection_dim),
        "timestep": torch.empty(batch),
    }


def _flux_inputs(config: Any, batch: int, height: int, width: int, text: int) -> Inputs:
    # The pipeline packs 2 x 2 latent positions into a token.
    tokens = (height // 2) * (width // 2)
    return (), {
        "hidden_states": torch.empty(batch, tokens, config.in_channels),
        "encoder_hidden_states": torch.empty(batch, text, config.joint_attention_dim),
        "pooled_projections": torch.empty(batch, config.pooled_projection_dim),
        "timestep": torch.empty(batch),
        "img_ids": torch.empty(tokens, 3),
        "txt_ids": torch.empty(text, 3),
        "guidance": torch.empty(batch) if config.guidance_embeds else None,
    }


def _latte_inputs(config: Any, batch: int, height: int, width: int, text: int) -> Inputs:
    return (), {
        "hidden_states": torch.empty(batch, config.in_channels, config.video_length, height, width),
        "timestep": torch.empty(batch, dtype=torch.long),
        "encoder_hidden_states": torch.empty(batch, text, config.caption_channels),
    }


def _wan_inputs(config: Any, batch: int, height: int, width: int, text: int) -> Inputs:
    return (), {
        "hidden_states": torch.empty(batch, config.in_channels, WAN_FRAMES, height, width),
        "timestep": torch.empty(batch, dtype=torch.long),
        "encoder_hidden_states": torch.empty(batch, text, config.text_dim),
    }


# Latent sizes that are not in the configurations: 1024 x 1024 and 480 x 832 pixels.
_SIZES = {"FluxTransformer2DModel": (128, 128), "WanTransformer3DModel": (60, 104)}
# 81 frames: the autoencoder makes one latent frame of the first, and one of each four others.
WAN_FRAMES = 21
_INPUTS = {
    "UNet2DConditionModel": _unet_inputs,
    "DiTTransformer2DModel": _dit_inputs,
    "PixArtTransformer2DModel": _pixart_inputs,
    "SD3Transformer2DModel": _sd3_inputs,
    "FluxTransformer2DModel": _flux_inputs,
    "LatteTransformer3DModel": _latte_inputs,
    "WanTransformer3DModel": _wan_inputs,
}


def architecture(name: str) -> Architecture:
    """Look up an architecture by name.

    Raises:
        ValueError: if the name is not one of `NAMES`.
    """
    if name not in NAMES:
        raise ValueError(
            f"arch: {shown(name)} is not known; use one of {', '.join(NAMES)}{offer(name, NAMES)}"
        )
    if name in CONFIGS:
        return Architecture(name, _without_weights("UNet2DConditionModel", CONFIGS[name]))
    if name in TRANSFORMERS:
        kind, text, config = TRANSFORMERS[name]
        return Architecture(name, _without_weights(kind, config), text_tokens=text)
    return _of_path(name, str(zoo.path(name)))


def architecture_of(model: str) -> Architecture:
    """Make the architecture of a model's folder or hub id; reads its configuration, not its weights.

    Raises:
        OSError: if there is no such model.
    """
    return _of_path(model, model)


def _of_path(name: str, path: str) -> Architecture:
    """Read an architecture from a pipeline's configuration; missing values are the public models'."""
    index: Any = diffusers.DiffusionPipeline.load_config(path)
    part = "unet" if "unet" in index else "transformer"
    kind = index[part][1] if part in index else ""
    if kind not in _INPUTS:
        raise ValueError(
            f"model: {path} has no denoiser that can be profiled; it must be one of {', '.join(_INPUTS)}"
        )
    config: Any = getattr(diffusers, kind).load_config(path, subfolder=part)
    vae: Any = diffusers.AutoencoderKL.load_config(path, subfolder="vae")
    names = (*_CHANNELS, "dim_mult")
    levels = next(vae[name] for name in names if vae.get(name))
    return Architecture(
        name, _without_weights(kind, config), 2 ** (len(levels) - 1), _text_tokens(path, index, kind)
    )


_CHANNELS = ("block_out_channels", "encoder_block_out_channels")


def decoder_channels(path: str) -> int:
    """Count a decoder's channels where its features have the picture's size; 1 if not known.

    Args:
        path: folder or hub id.

    Raises:
        OSError: if there is no decoder.
    """
    vae: Any = diffusers.AutoencoderKL.load_config(path, subfolder="vae")
    return int(next((vae[name][0] for name in _CHANNELS if vae.get(name)), 1))


def _text_tokens(path: str, index: Any, kind: str) -> int:
    """Count the text tokens that a pipeline gives to its denoiser."""
    if index["_class_name"] == "PixArtSigmaPipeline":
        return 300
    known = {type_: text for type_, text, _ in TRANSFORMERS.values() if text != 300}
    if kind in known:
        return known[kind]
    from transformers import CLIPTextConfig

    text: Any = CLIPTextConfig.from_pretrained(path, subfolder="text_encoder")
    return int(text.max_position_embeddings)


def _without_weights(kind: str, config: Any) -> Any:
    with torch.device("meta"):
        return getattr(diffusers, kind).from_config(config).eval()
