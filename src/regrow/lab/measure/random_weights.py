"""Pipelines of public architectures with random weights, random text and no decoder.

Their speed is that of the real ones' denoisers; their latents mean nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from regrow.lab.measure.architectures import CONFIGS, TRANSFORMERS
from regrow.words import offer, shown


def random_pipeline(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """A pipeline of a public architecture with random weights, without text encoders.

    `prompt_arguments` gives what it is called with.

    Args:
        name: one of `NAMES`.
        device: where it runs, and where its weights are drawn.
        dtype: of its weights.

    Raises:
        ValueError: if the name is not one of these.
    """
    if name not in NAMES:
        raise ValueError(
            f"arch: {shown(name)} is not known; known are {', '.join(NAMES)}{offer(name, NAMES)}"
        )
    kind, config = ("UNet2DConditionModel", CONFIGS.get(name))
    if config is None:
        kind, _, config = TRANSFORMERS[name]
    torch.manual_seed(0)
    with torch.device(device), _default_dtype(dtype):
        denoiser: Any = getattr(diffusers, kind).from_config(config).eval()
    pipeline = (_stable_diffusion_xl if name == "sdxl" else _PIPELINES[kind])(denoiser)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device, dtype)


def random_text(pipeline: Any, count: int) -> dict[str, Any]:
    """Arguments of a call of a pipeline without text encoder, for so many pictures."""
    denoiser = pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        noise = torch.randn(count, *shape, generator=generator)
        return noise.to(pipeline.device, denoiser.dtype)

    return _TEXTS[type(denoiser).__name__](denoiser.config, draw) | {"output_type": "latent"}


Draw = Callable[..., Tensor]


def _unet_text(config: Any, draw: Draw) -> dict[str, Any]:
    said = {f"{negative}prompt_embeds": draw(77, config.cross_attention_dim) for negative in _BOTH}
    if config.addition_embed_type != "text_time":
        return said
    width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    return said | {f"{negative}pooled_prompt_embeds": draw(width) for negative in _BOTH}


def _pixart_text(config: Any, draw: Draw) -> dict[str, Any]:
    tokens = 120 if config.use_additional_conditions or config.sample_size < 128 else 300
    said = {f"{negative}prompt_embeds": draw(tokens, config.caption_channels) for negative in _BOTH}
    masks = {f"{negative}prompt_attention_mask": draw(tokens).fill_(1) for negative in _BOTH}
    return said | masks | {"negative_prompt": None, "use_resolution_binning": False}


def _sd3_text(config: Any, draw: Draw) -> dict[str, Any]:
    said = {f"{negative}prompt_embeds": draw(77 + 256, config.joint_attention_dim) for negative in _BOTH}
    pooled = config.pooled_projection_dim
    return said | {f"{negative}pooled_prompt_embeds": draw(pooled) for negative in _BOTH}


def _flux_text(config: Any, draw: Draw) -> dict[str, Any]:
    return {
        "prompt_embeds": draw(512, config.joint_attention_dim),
        "pooled_prompt_embeds": draw(config.pooled_projection_dim),
    }


def _latte_text(config: Any, draw: Draw) -> dict[str, Any]:
    said = {f"{negative}prompt_embeds": draw(120, config.caption_channels) for negative in _BOTH}
    return said | {"negative_prompt": None}


def _wan_text(config: Any, draw: Draw) -> dict[str, Any]:
    return {f"{negative}prompt_embeds": draw(512, config.text_dim) for negative in _BOTH}


_BOTH = ("", "negative_")
_TEXTS: Mapping[str, Callable[[Any, Draw], dict[str, Any]]] = {
    "UNet2DConditionModel": _unet_text,
    "PixArtTransformer2DModel": _pixart_text,
    "SD3Transformer2DModel": _sd3_text,
    "FluxTransformer2DModel": _flux_text,
    "LatteTransformer3DModel": _latte_text,
    "WanTransformer3DModel": _wan_text,
}


def _vae() -> AutoencoderKL:
    """Only its number of levels counts: pixels a latent position spans."""
    return AutoencoderKL(
        block_out_channels=(32,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )


def _ddim() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def _stable_diffusion(unet: Any) -> Any:
    return diffusers.StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=None,
        tokenizer=None,
        unet=unet,
        scheduler=_ddim(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _stable_diffusion_xl(unet: Any) -> Any:
    return diffusers.StableDiffusionXLPipeline(
        vae=_vae(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        unet=unet,
        scheduler=_ddim(),
    )


def _dit(transformer: Any) -> Any:
    # This pipeline always decodes: as little as possible.
    vae = AutoencoderTiny(
        encoder_block_out_channels=(4,) * 4,
        decoder_block_out_channels=(4,) * 4,
        num_encoder_blocks=(0,) * 4,
        num_decoder_blocks=(0,) * 4,
    )
    return diffusers.DiTPipeline(transformer=transformer, vae=vae, scheduler=_ddim())


def _pixart(transformer: Any) -> Any:
    # Only this one hands on the sizes that PixArt-alpha was told.
    return diffusers.PixArtAlphaPipeline(
        tokenizer=None, text_encoder=None, vae=_vae(), transformer=transformer, scheduler=_ddim()
    )


def _sd3(transformer: Any) -> Any:
    encoders = (
        "text_encoder",
        "tokenizer",
        "text_encoder_2",
        "tokenizer_2",
        "text_encoder_3",
        "tokenizer_3",
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(),
        **dict.fromkeys(encoders),
    )


def _flux(transformer: Any) -> Any:
    encoders = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    return diffusers.FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(),
        transformer=transformer,
        **dict.fromkeys(encoders),
    )


def _latte(transformer: Any) -> Any:
    return diffusers.LattePipeline(
        tokenizer=None, text_encoder=None, vae=_vae(), transformer=transformer, scheduler=_ddim()
    )


def _wan(transformer: Any) -> Any:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return diffusers.WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler, transformer=transformer
    )


_PIPELINES: Mapping[str, Callable[[Any], Any]] = {
    "UNet2DConditionModel": _stable_diffusion,
    "DiTTransformer2DModel": _dit,
    "PixArtTransformer2DModel": _pixart,
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
    "LatteTransformer3DModel": _latte,
    "WanTransformer3DModel": _wan,
}

NAMES = (*CONFIGS, *TRANSFORMERS)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """What new parameters are of."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
