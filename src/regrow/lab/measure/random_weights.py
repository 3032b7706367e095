"""Pipelines of public architectures with random weights, random text and no decoder.

Their denoisers are as fast as the real ones; their latents mean nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import diffusers
import torch
from torch import Tensor

from regrow.lab.measure.architectures import CONFIGS, TRANSFORMERS
from regrow.models import module_of
from regrow.words import offer, shown


def random_pipeline(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """Make a pipeline of a public architecture with random weights, without text encoders.

    `prompt_arguments` makes the arguments of its call.

    Args:
        name: one of `NAMES`.
        device: where it runs, and where its weights are drawn.
        dtype: type of its weights.

    Raises:
        ValueError: if the name is not one of `NAMES`.
    """
    if name not in NAMES:
        raise ValueError(
            f"arch: {shown(name)} is not known; use one of {', '.join(NAMES)}{offer(name, NAMES)}"
        )
    kind, config = ("UNet2DConditionModel", CONFIGS.get(name))
    if config is None:
        kind, _, config = TRANSFORMERS[name]
    torch.manual_seed(0)
    with torch.device(device), _default_dtype(dtype):
        denoiser: Any = getattr(diffusers, kind).from_config(config).eval()
    wanted = "StableDiffusionXLPipeline" if name == "sdxl" else _PIPELINES[kind]
    pipeline = _without_encoders(wanted, denoiser)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device, dtype)


def has_random_text(pipeline: Any) -> bool:
    """Whether `random_text` can make text for the denoiser of a pipeline."""
    return type(module_of(pipeline)).__name__ in _TEXTS


def random_text(pipeline: Any, count: int) -> dict[str, Any]:
    """Make the text arguments of a pipeline without text encoder, for ``count`` pictures.

    Raises:
        ValueError: if the form of the denoiser's text is not known.
    """
    denoiser: Any = module_of(pipeline)
    family = type(denoiser).__name__
    if family not in _TEXTS:
        raise ValueError(
            f"pipeline: {type(pipeline).__name__} has no text encoder, and regrow knows the text of "
            f"{', '.join(_TEXTS)} only, not of {family}; load it with its text encoders, or give the "
            "encoded text as arguments of its call (prompt_embeds and so on)"
        )
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        noise = torch.randn(count, *shape, generator=generator)
        return noise.to(pipeline.device, denoiser.dtype)

    return _TEXTS[family](denoiser.config, draw) | {"output_type": "latent"}


Draw = Callable[..., Tensor]


def _both(name: str, of: Callable[[], Tensor]) -> dict[str, Any]:
    """Make an argument for the prompt and one for the negative prompt."""
    return {name: of(), f"negative_{name}": of()}


def _unet_text(config: Any, draw: Draw) -> dict[str, Any]:
    said = _both("prompt_embeds", lambda: draw(77, config.cross_attention_dim))
    if config.addition_embed_type != "text_time":
        return said
    width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    return said | _both("pooled_prompt_embeds", lambda: draw(width))


def _pixart_text(config: Any, draw: Draw) -> dict[str, Any]:
    tokens = 120 if config.use_additional_conditions or config.sample_size < 128 else 300
    said = _both("prompt_embeds", lambda: draw(tokens, config.caption_channels))
    masks = _both("prompt_attention_mask", lambda: draw(tokens).fill_(1))
    return said | masks | {"negative_prompt": None, "use_resolution_binning": False}


def _sd3_text(config: Any, draw: Draw) -> dict[str, Any]:
    said = _both("prompt_embeds", lambda: draw(77 + 256, config.joint_attention_dim))
    return said | _both("pooled_prompt_embeds", lambda: draw(config.pooled_projection_dim))


def _flux_text(config: Any, draw: Draw) -> dict[str, Any]:
    return {
        "prompt_embeds": draw(512, config.joint_attention_dim),
        "pooled_prompt_embeds": draw(config.pooled_projection_dim),
    }


def _latte_text(config: Any, draw: Draw) -> dict[str, Any]:
    said = _both("prompt_embeds", lambda: draw(120, config.caption_channels))
    return said | {"negative_prompt": None}


def _wan_text(config: Any, draw: Draw) -> dict[str, Any]:
    return _both("prompt_embeds", lambda: draw(512, config.text_dim))


_TEXTS: Mapping[str, Callable[[Any, Draw], dict[str, Any]]] = {
    "UNet2DConditionModel": _unet_text,
    "PixArtTransformer2DModel": _pixart_text,
    "SD3Transformer2DModel": _sd3_text,
    "FluxTransformer2DModel": _flux_text,
    "LatteTransformer3DModel": _latte_text,
    "WanTransformer3DModel": _wan_text,
}


# The pipeline of each family of denoisers.
_PIPELINES: Mapping[str, str] = {
    "UNet2DConditionModel": "StableDiffusionPipeline",
    "DiTTransformer2DModel": "DiTPipeline",
    # Only this pipeline passes on the sizes that PixArt-alpha takes.
    "PixArtTransformer2DModel": "PixArtAlphaPipeline",
    "SD3Transformer2DModel": "StableDiffusion3Pipeline",
    "FluxTransformer2DModel": "FluxPipeline",
    "LatteTransformer3DModel": "LattePipeline",
    "WanTransformer3DModel": "WanPipeline",
}
_FLOW = ("StableDiffusion3Pipeline", "FluxPipeline", "WanPipeline")


def _without_encoders(kind: str, denoiser: Any) -> Any:
    """Make a pipeline of a denoiser, a scheduler and, except for Wan, an autoencoder; nothing else."""
    made: Any = getattr(diffusers, kind)
    takes = inspect.signature(made.__init__).parameters
    own = {
        "unet" if "unet" in takes else "transformer": denoiser,
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0) if kind in _FLOW else _ddim(),
        "vae": None if kind == "WanPipeline" else _vae(decodes=kind == "DiTPipeline"),
    }
    if "requires_safety_checker" in takes:
        own["requires_safety_checker"] = False
    needed = [name for name, one in takes.items() if name != "self" and one.default is one.empty]
    return made(**dict.fromkeys(needed) | own)


def _vae(decodes: bool) -> diffusers.AutoencoderKL | diffusers.AutoencoderTiny:
    """Make an autoencoder for its number of levels only, which sets the pixels a latent position spans.

    Args:
        decodes: the pipeline always decodes, so the autoencoder is as small as possible.
    """
    if decodes:
        return diffusers.AutoencoderTiny(
            encoder_block_out_channels=(4,) * 4,
            decoder_block_out_channels=(4,) * 4,
            num_encoder_blocks=(0,) * 4,
            num_decoder_blocks=(0,) * 4,
        )
    return diffusers.AutoencoderKL(
        block_out_channels=(32,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )


def _ddim() -> diffusers.DDIMScheduler:
    return diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


NAMES = (*CONFIGS, *TRANSFORMERS)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Set the type of new parameters inside this context."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
