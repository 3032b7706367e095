"""Real diffusers models and pipelines, small, with random weights from fixed seeds."""

from __future__ import annotations

import string
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

SIZE = 64
LATENT = 16
TEXT = 32

CROSS_DOWN, PLAIN_DOWN = "CrossAttnDownBlock2D", "DownBlock2D"
CROSS_UP, PLAIN_UP = "CrossAttnUpBlock2D", "UpBlock2D"


def unet(seed: int = 0, **changes: Any) -> UNet2DConditionModel:
    """Two levels like the ends of Stable Diffusion 1's: attention at the latent's resolution."""
    torch.manual_seed(seed)
    config: dict[str, Any] = {
        "sample_size": LATENT,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "down_block_types": (CROSS_DOWN, PLAIN_DOWN),
        "up_block_types": (PLAIN_UP, CROSS_UP),
        "norm_num_groups": 8,
        "cross_attention_dim": TEXT,
        "attention_head_dim": 2,
    }
    return UNet2DConditionModel(**(config | changes)).eval()


def one_level_unet(seed: int = 0, **changes: Any) -> UNet2DConditionModel:
    """A single level, with attention only in the two layers of the way up."""
    config: dict[str, Any] = {
        "block_out_channels": (16,),
        "down_block_types": (PLAIN_DOWN,),
        "mid_block_type": "UNetMidBlock2D",
        "up_block_types": (CROSS_UP,),
    }
    return unet(seed, **(config | changes))


def sd1_unet(seed: int = 0, **changes: Any) -> UNet2DConditionModel:
    """Stable Diffusion 1's four levels, 12 layers in the up path."""
    config: dict[str, Any] = {
        "layers_per_block": 2,
        "block_out_channels": (16, 16, 32, 32),
        "down_block_types": (CROSS_DOWN, CROSS_DOWN, CROSS_DOWN, PLAIN_DOWN),
        "up_block_types": (PLAIN_UP, CROSS_UP, CROSS_UP, CROSS_UP),
    }
    return unet(seed, **(config | changes))


def sdxl_unet(seed: int = 0, **changes: Any) -> UNet2DConditionModel:
    """SDXL's three levels: no attention at the first, several transformer blocks at the others."""
    config: dict[str, Any] = {
        "block_out_channels": (16, 16, 32),
        "down_block_types": (PLAIN_DOWN, CROSS_DOWN, CROSS_DOWN),
        "up_block_types": (CROSS_UP, CROSS_UP, PLAIN_UP),
        "transformer_layers_per_block": (1, 1, 2),
        "attention_head_dim": (1, 2, 4),
        "use_linear_projection": True,
        "cross_attention_dim": 2 * TEXT,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + TEXT,
    }
    return unet(seed, **(config | changes))


def vae() -> AutoencoderKL:
    torch.manual_seed(1)
    return AutoencoderKL(
        block_out_channels=(8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=SIZE,
    ).eval()


def tokenizer() -> CLIPTokenizer:
    letters = string.ascii_lowercase
    words = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=77)


def text_encoder(seed: int, *, projection: bool = False) -> CLIPTextModel:
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=54,
        hidden_size=TEXT,
        intermediate_size=TEXT,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        projection_dim=TEXT,
        bos_token_id=52,
        eos_token_id=53,
        pad_token_id=53,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def scheduler(kind: type = DDIMScheduler, **changes: Any) -> Any:
    if kind is DDIMScheduler:
        changes = {"clip_sample": False} | changes
    return kind(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, **changes
    )


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sd(
    denoiser: UNet2DConditionModel | None = None,
    kind: type = StableDiffusionPipeline,
    sampler: Any = None,
) -> Any:
    return quiet(
        kind(
            vae=vae(),
            text_encoder=text_encoder(2),
            tokenizer=tokenizer(),
            unet=denoiser or unet(),
            scheduler=sampler or scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    )


def sd2() -> Any:
    return sd(
        unet(use_linear_projection=True, attention_head_dim=(2, 4)),
        sampler=scheduler(prediction_type="v_prediction"),
    )


def sdxl(kind: type = StableDiffusionXLPipeline) -> Any:
    return quiet(
        kind(
            vae=vae(),
            text_encoder=text_encoder(2),
            text_encoder_2=text_encoder(3, projection=True),
            tokenizer=tokenizer(),
            tokenizer_2=tokenizer(),
            unet=sdxl_unet(),
            scheduler=scheduler(EulerDiscreteScheduler),
            force_zeros_for_empty_prompt=True,
            add_watermarker=False,
        )
    )


def picture(width: int = SIZE, height: int = SIZE) -> Image.Image:
    """A smooth, coloured picture."""
    x = torch.linspace(0, 255, width).expand(height, width)
    y = torch.linspace(0, 255, height)[:, None].expand(height, width)
    rgb = torch.stack([x, y, (x + y) / 2], dim=-1).to(torch.uint8)
    return Image.fromarray(rgb.numpy())


def mask(width: int = SIZE, height: int = SIZE) -> Image.Image:
    """White on the left half."""
    left = torch.zeros(height, width, dtype=torch.uint8)
    left[:, : width // 2] = 255
    return Image.fromarray(left.numpy())


# Every kind of pipeline: how it is made, and what else it is called with.
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "sd1": (sd, {}),
    "sd1-four-levels": (lambda: sd(sd1_unet(layers_per_block=1)), {}),
    "sd2": (sd2, {}),
    "sdxl": (sdxl, {}),
    "img2img": (
        lambda: sd(kind=StableDiffusionImg2ImgPipeline),
        {"image": picture(), "strength": 0.7},
    ),
    "sdxl-img2img": (
        lambda: sdxl(StableDiffusionXLImg2ImgPipeline),
        {"image": picture(), "strength": 0.7},
    ),
    "inpaint": (
        lambda: sd(kind=StableDiffusionInpaintPipeline),
        {"image": picture(), "mask_image": mask(), "strength": 1.0},
    ),
    "inpaint-nine-channels": (
        lambda: sd(unet(in_channels=9), kind=StableDiffusionInpaintPipeline),
        {"image": picture(), "mask_image": mask(), "strength": 1.0},
    ),
}


def make(kind: str) -> Any:
    return KINDS[kind][0]()


def generate(pipe: Any, *, kind: str = "sd1", seed: int = 0, **changes: Any) -> torch.Tensor:
    """The latents of a short generation."""
    extra = KINDS[kind][1]
    if not any("image" in key for key in extra):
        extra = extra | {"height": SIZE, "width": SIZE}
    arguments: dict[str, Any] = {
        "prompt": "a penguin",
        "num_inference_steps": 4,
        "guidance_scale": 5.0,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(seed),
    }
    return pipe(**(arguments | extra | changes)).images


def unet_inputs(
    denoiser: UNet2DConditionModel,
    *,
    batch: int = 2,
    height: int = LATENT,
    width: int = LATENT,
    seed: int = 0,
    timestep: int = 500,
) -> dict[str, Any]:
    """Keyword arguments of a call of a U-Net, of its own type; the text is the same for all seeds."""
    g, of_text = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(1)
    c, dtype = denoiser.config, denoiser.dtype
    inputs: dict[str, Any] = {
        "sample": torch.randn(batch, c.in_channels, height, width, generator=g).to(dtype),
        "timestep": torch.tensor(timestep),
        "encoder_hidden_states": torch.randn(batch, 7, c.cross_attention_dim, generator=of_text).to(dtype),
    }
    if c.addition_embed_type == "text_time":
        inputs["added_cond_kwargs"] = {
            "text_embeds": torch.randn(batch, TEXT, generator=of_text).to(dtype),
            "time_ids": torch.tensor([[64, 64, 0, 0, 64, 64]] * batch),
        }
    return inputs
