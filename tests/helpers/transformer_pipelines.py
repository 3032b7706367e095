"""Real diffusers pipelines around small diffusion transformers, with random weights from fixed seeds."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import pipelines
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    LattePipeline,
    LatteTransformer3DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3ControlNetModel,
    SD3Transformer2DModel,
    StableDiffusion3ControlNetPipeline,
    StableDiffusion3PAGPipeline,
    StableDiffusion3Pipeline,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

T = TypeVar("T")

TEXT = pipelines.TEXT
# With one left out by guidance and some around those that are reused, there is one to reuse.
LAYERS = 6
STEPS = 5


def seeded(module: Any) -> Any:
    """Every weight drawn: those that start at zero would make a block do nothing."""
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in module.parameters():
            weight.copy_(torch.randn(weight.shape, generator=g) * 0.1)
    return module.eval()


def vae(channels: int = 4) -> AutoencoderKL:
    torch.manual_seed(1)
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=32,
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()


def t5() -> tuple[T5EncoderModel, PreTrainedTokenizerFast]:
    words = ["<pad>", "</s>", "<unk>", "a", "penguin", "pizza"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(4)
    config = T5Config(vocab_size=len(words), d_model=TEXT, d_kv=8, d_ff=TEXT, num_layers=1, num_heads=4)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    return T5EncoderModel(config).eval(), fast


class StableDiffusion3Small(StableDiffusion3Pipeline):
    """With a short text."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, max_sequence_length=16, **kwargs)


def sd3(layers: int = LAYERS, **changes: Any) -> StableDiffusion3Pipeline:
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=2 * TEXT,
        caption_projection_dim=32,
        pooled_projection_dim=2 * TEXT,
        pos_embed_max_size=16,
        **changes,
    )
    return pipelines.quiet(
        StableDiffusion3Small(
            transformer=seeded(transformer),
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=vae(),
            text_encoder=pipelines.text_encoder(2, projection=True),
            tokenizer=pipelines.tokenizer(),
            text_encoder_2=pipelines.text_encoder(3, projection=True),
            tokenizer_2=pipelines.tokenizer(),
            text_encoder_3=None,
            tokenizer_3=None,
        )
    )


class PixArtSmall(PixArtAlphaPipeline):
    """Without the choice among the aspect ratios of the public models' sizes."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, clean_caption=False, use_resolution_binning=False, **kwargs)


def sd35(layers: int = LAYERS) -> StableDiffusion3Pipeline:
    """As Stable Diffusion 3.5 Medium: its first blocks have a second attention, of the image alone."""
    return sd3(layers, dual_attention_layers=(0, 1, 2, 3), qk_norm="rms_norm")


def sd3_perturbed() -> StableDiffusion3PAGPipeline:
    """With perturbed-attention guidance, which projects no keys for the perturbed part of the batch."""
    parts = {n: p for n, p in sd3().components.items() if n not in ("image_encoder", "feature_extractor")}
    return pipelines.quiet(StableDiffusion3PAGPipeline(**parts, pag_applied_layers=["blocks.1"]))


class PixArtSigmaSmall(PixArtSigmaPipeline):
    """As `PixArtSmall`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, clean_caption=False, use_resolution_binning=False, **kwargs)


def pixart(num_layers: int = LAYERS, *, make: Any = PixArtSmall, **changes: Any) -> Any:
    text_encoder, tokenizer = t5()
    config: dict[str, Any] = {
        "sample_size": 16,
        "num_layers": num_layers,
        "patch_size": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "caption_channels": TEXT,
        "cross_attention_dim": 32,
        "in_channels": 4,
        "out_channels": 8,
        "use_additional_conditions": False,
    }
    return pipelines.quiet(
        make(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            vae=vae(),
            transformer=seeded(PixArtTransformer2DModel(**config | changes)),
            scheduler=DDIMScheduler(clip_sample=False),
        )
    )


def pixart_sigma() -> PixArtSigmaPipeline:
    return pixart(make=PixArtSigmaSmall)  # type: ignore[no-any-return]


def pixart_sized() -> PixArtAlphaPipeline:
    """With the picture's size and aspect ratio as conditions, as the public model of 1024 x 1024.

    The pipeline hands them on if the model's own latents are 128 wide; three embeddings make up the width.
    """
    return pixart(  # type: ignore[no-any-return]
        sample_size=128, use_additional_conditions=True, num_attention_heads=3, cross_attention_dim=24
    )


def dit(num_layers: int = LAYERS, **changes: Any) -> DiTPipeline:
    config: dict[str, Any] = {
        "sample_size": 16,
        "num_layers": num_layers,
        "patch_size": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "in_channels": 4,
        "out_channels": 8,
        "num_embeds_ada_norm": 1000,
    }
    transformer = seeded(DiTTransformer2DModel(**config | changes))
    return pipelines.quiet(
        DiTPipeline(transformer=transformer, vae=vae(), scheduler=DDIMScheduler(clip_sample=False))
    )


class FluxSmall(FluxPipeline):
    """With a short text."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, max_sequence_length=16, **kwargs)


def flux(layers: int = LAYERS) -> FluxPipeline:
    """With two blocks of both streams; the other layers are single blocks."""
    text_encoder, tokenizer = t5()
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=layers - 2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT,
        pooled_projection_dim=TEXT,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )
    return pipelines.quiet(
        FluxSmall(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=vae(),
            text_encoder=pipelines.text_encoder(2),
            tokenizer=pipelines.tokenizer(),
            text_encoder_2=text_encoder,
            tokenizer_2=tokenizer,
            transformer=seeded(transformer),
        )
    )


PAIRS = 3
"""Of a spatial and a temporal block each."""


def latte(**parts: Any) -> LattePipeline:
    """Makes latents of videos, from texts that are encoded already."""
    transformer = LatteTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=PAIRS,
        cross_attention_dim=16,
        sample_size=8,
        patch_size=2,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        caption_channels=TEXT,
        video_length=3,
    )
    none = {"tokenizer": None, "text_encoder": None, "vae": None}
    scheduler = DDIMScheduler(clip_sample=False)
    return pipelines.quiet(
        LattePipeline(transformer=seeded(transformer), scheduler=scheduler, **none | parts)
    )


def latte_of_texts() -> LattePipeline:
    """Complete: from texts to frames of 16 x 16."""
    text_encoder, tokenizer = t5()
    return latte(tokenizer=tokenizer, text_encoder=text_encoder, vae=vae())


def wan_transformer(channels: int = 4, layers: int = LAYERS) -> WanTransformer3DModel:
    model = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=channels,
        out_channels=4,
        text_dim=TEXT,
        freq_dim=16,
        ffn_dim=32,
        num_layers=layers,
        rope_max_seq_len=32,
    )
    return seeded(model)  # type: ignore[no-any-return]


def wan(layers: int = LAYERS, **settings: Any) -> WanPipeline:
    """Makes latents of videos, from texts that are encoded already."""
    two = "boundary_ratio" in settings
    return pipelines.quiet(
        WanPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=None,
            scheduler=FlowMatchEulerDiscreteScheduler(),
            transformer=wan_transformer(layers=layers),
            transformer_2=wan_transformer(layers=layers) if two else None,
            **settings,
        )
    )


def wan_vae() -> AutoencoderKLWan:
    return seeded(  # type: ignore[no-any-return]
        AutoencoderKLWan(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        )
    )


def wan_of_texts(layers: int = LAYERS) -> WanPipeline:
    """Complete: from texts to frames."""
    text_encoder, tokenizer = t5()
    return pipelines.quiet(
        WanPipeline(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            vae=wan_vae(),
            scheduler=FlowMatchEulerDiscreteScheduler(),
            transformer=wan_transformer(layers=layers),
        )
    )


def wan_from_picture(*, expand_timesteps: bool) -> WanImageToVideoPipeline:
    """Makes latents of videos from a picture, which stands beside them or is their first frame."""
    return pipelines.quiet(
        WanImageToVideoPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=wan_vae(),
            scheduler=FlowMatchEulerDiscreteScheduler(),
            transformer=wan_transformer(4 if expand_timesteps else 12),
            expand_timesteps=expand_timesteps,
        )
    )


def sd3_controlled() -> StableDiffusion3ControlNetPipeline:
    """With a ControlNet that adds to the tokens of every block."""
    parts = {n: p for n, p in sd3().components.items() if n not in ("image_encoder", "feature_extractor")}
    taken = inspect.signature(SD3ControlNetModel).parameters
    shape = {k: v for k, v in parts["transformer"].config.items() if k in taken}
    control = SD3ControlNetModel(**shape | {"num_layers": 3, "extra_conditioning_channels": 0})
    return pipelines.quiet(StableDiffusion3ControlNetPipeline(**parts, controlnet=seeded(control)))


def flux_controlled() -> FluxControlNetPipeline:
    """Likewise, of the double and of the single blocks."""
    parts = {n: p for n, p in flux().components.items() if n not in ("image_encoder", "feature_extractor")}
    taken = inspect.signature(FluxControlNetModel).parameters
    shape = {k: v for k, v in parts["transformer"].config.items() if k in taken}
    control = FluxControlNetModel(**shape | {"num_layers": 2, "num_single_layers": 2})
    return pipelines.quiet(FluxControlNetPipeline(**parts, controlnet=seeded(control)))


def controlled(pipe: Any) -> Tensor:
    """Latents of a few steps of a pipeline with a ControlNet."""
    # The control picture's latents are drawn from the global generator.
    torch.manual_seed(1)
    return pipe(
        prompt="a penguin",
        control_image=Image.new("RGB", (32, 32), (200, 30, 90)),
        height=32,
        width=32,
        num_inference_steps=STEPS,
        max_sequence_length=16,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images


KINDS = {"sd3": sd3, "pixart": pixart, "dit": dit, "flux": flux}

VARIETIES = {"sd35": sd35, "pixart-sigma": pixart_sigma, "pixart-sized": pixart_sized}
"""Other models of these families, whose layers or inputs differ."""

FORMS = {
    "guided": {"guidance_scale": 4.0},
    "unguided": {"guidance_scale": 1.0},
    "batch": {"count": 2},
    "wide": {"width": 24},
}
"""What a generation may be asked for beside the plain one."""

CASES = [(kind, form) for form in FORMS for kind in KINDS if (kind, form) != ("dit", "wide")]
"""Each family in each form that it knows; DiT's pictures are square."""

TWO_CALLS = {"true_cfg_scale": 3.0, "negative_prompt": ["a pizza"]}
"""Guidance of Flux, in two calls of the denoiser a step."""

SKIP_LAYER: dict[str, Any] = {
    "guidance_scale": 4.0,
    "skip_guidance_layers": [3],
    "skip_layer_guidance_start": 0.0,
    "skip_layer_guidance_stop": 1.0,
}
"""Guidance of SD3 with a further call without a layer, in every step but the first."""


def generate(pipe: Any, *, seed: int = 0, count: int = 1, width: int = 16, **options: Any) -> Tensor:
    """Latents of a few steps."""
    side = pipe.vae_scale_factor if hasattr(pipe, "vae_scale_factor") else 2
    words: dict[str, Any] = {"num_inference_steps": STEPS, "output_type": "latent"} | options
    if type(pipe).__name__ == "DiTPipeline":
        words |= {"class_labels": [1, 2][:count], "output_type": "np"}
    else:
        words |= {"prompt": ["a penguin", "a pizza"][:count], "height": 16 * side, "width": width * side}
    words["generator"] = torch.Generator().manual_seed(seed)
    return torch.as_tensor(pipe(**words).images)


@functools.cache
def plain(kind: str, form: str) -> Tensor:
    """What `generate` makes in a form with a pipeline that nothing was applied to. Not to be written to."""
    return generate(KINDS[kind](), **FORMS[form])


def in_turn(choices: Sequence[T], forms: Iterable[str] = FORMS) -> list[tuple[str, str, T]]:
    """All of `CASES` that are of some forms, each with one of two or three choices.

    Each choice meets every family, and every form.
    """
    return [
        (kind, form, choices[(i + place) % len(choices)])
        for i, form in enumerate(forms)
        for place, kind in enumerate(kind for kind, other in CASES if other == form)
    ]
