"""Small real pipelines of families that regrow has no table for, with random weights from fixed seeds.

All make latents from texts, or pictures, that are encoded already.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import diffusers
import pipelines
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.models.unets import StableCascadeUNet
from diffusers.pipelines.stable_audio import StableAudioProjectionModel
from torch import Tensor
from transformer_pipelines import seeded, vae
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

TEXT = 32
STEPS = 6


@dataclass(frozen=True)
class Family:
    """A family of pipelines.

    Args:
        make: a pipeline.
        arguments: of a call, for a number of samples and the seed of their texts.
        calls: of the denoiser a step: guidance in one call, or in two.
        denoiser: what the pipeline calls it.
    """

    make: Callable[[], Any]
    arguments: Callable[[int, int], dict[str, Any]]
    calls: int = 1
    denoiser: str = "transformer"


def drawn(seed: int, *shape: int) -> Tensor:
    """A text, or what stands for one."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def texts(seed: int, *shape: int) -> dict[str, Tensor]:
    """A prompt and a negative prompt."""
    return {"prompt_embeds": drawn(seed, *shape), "negative_prompt_embeds": drawn(seed + 100, *shape)}


def masks(count: int, length: int, dtype: torch.dtype = torch.bool) -> dict[str, Tensor]:
    """Masks of them, in which all is seen."""
    mask = torch.ones(count, length, dtype=dtype)
    return {"prompt_attention_mask": mask, "negative_prompt_attention_mask": mask.clone()}


def bare(kind: str, **parts: Any) -> Any:
    """A pipeline of some parts; None for the others."""
    pipeline = getattr(diffusers, kind)
    names = pipeline._get_signature_keys(pipeline)[0]
    return pipelines.quiet(pipeline(**dict.fromkeys(names) | parts))


def flow(**options: Any) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(**options)


def qwen_image() -> Any:
    model = diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT,
        axes_dims_rope=(8, 4, 4),
    )
    return bare("QwenImagePipeline", transformer=seeded(model), scheduler=flow(use_dynamic_shifting=True))


def of_qwen_image(count: int, seed: int) -> dict[str, Any]:
    mask = torch.ones(count, 5, dtype=torch.long)
    return texts(seed, count, 5, TEXT) | {
        "prompt_embeds_mask": mask,
        "negative_prompt_embeds_mask": mask.clone(),
        "true_cfg_scale": 3.0,
        "height": 64,
        "width": 64,
    }


def flux2() -> Any:
    model = diffusers.Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    coder = diffusers.AutoencoderKLFlux2(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,
    )
    sampler = flow(use_dynamic_shifting=True)
    return bare("Flux2KleinPipeline", transformer=seeded(model), scheduler=sampler, vae=seeded(coder))


def of_flux2(count: int, seed: int) -> dict[str, Any]:
    return texts(seed, count, 5, TEXT) | {"guidance_scale": 3.0, "height": 64, "width": 64}


def z_image() -> Any:
    model = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=TEXT,
        axes_dims=[8, 4, 4],
        axes_lens=[64, 32, 32],
    )
    return bare("ZImagePipeline", transformer=seeded(model), scheduler=flow(use_dynamic_shifting=True))


def of_z_image(count: int, seed: int) -> dict[str, Any]:
    both = texts(seed, count, 5, TEXT)
    return {name: list(text) for name, text in both.items()} | {
        "guidance_scale": 3.0,
        "height": 64,
        "width": 64,
    }


def hunyuan_video() -> Any:
    model = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=1,
        text_embed_dim=TEXT,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
    )
    return bare("HunyuanVideoPipeline", transformer=seeded(model), scheduler=flow())


def of_hunyuan_video(count: int, seed: int) -> dict[str, Any]:
    return {
        **texts(seed, count, 5, TEXT),
        **masks(count, 5),
        "pooled_prompt_embeds": drawn(seed + 1, count, 8),
        "negative_pooled_prompt_embeds": drawn(seed + 101, count, 8),
        "true_cfg_scale": 3.0,
        "height": 32,
        "width": 32,
        "num_frames": 5,
    }


def ltx_video() -> Any:
    model = diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=TEXT,
    )
    return bare("LTXPipeline", transformer=seeded(model), scheduler=flow(use_dynamic_shifting=True))


def of_ltx_video(count: int, seed: int) -> dict[str, Any]:
    words = {"guidance_scale": 3.0, "height": 64, "width": 64, "num_frames": 9}
    return {**texts(seed, count, 5, TEXT), **masks(count, 5), **words}


def cogvideox() -> Any:
    model = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=TEXT,
        num_layers=2,
        sample_width=4,
        sample_height=4,
        sample_frames=9,
        max_text_seq_length=5,
    )
    sampler = diffusers.CogVideoXDDIMScheduler()
    return bare("CogVideoXPipeline", transformer=seeded(model), scheduler=sampler)


def of_cogvideox(count: int, seed: int) -> dict[str, Any]:
    words = {"guidance_scale": 3.0, "height": 32, "width": 32, "num_frames": 9, "max_sequence_length": 5}
    return texts(seed, count, 5, TEXT) | words


def sana() -> Any:
    model = diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=TEXT,
        sample_size=4,
    )
    sampler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return bare("SanaPipeline", transformer=seeded(model), scheduler=sampler)


def of_sana(count: int, seed: int) -> dict[str, Any]:
    words = {"guidance_scale": 3.0, "height": 128, "width": 128, "use_resolution_binning": False}
    return {**texts(seed, count, 5, TEXT), **masks(count, 5, torch.long), "negative_prompt": None, **words}


def kandinsky2() -> Any:
    model = pipelines.unet(
        out_channels=8,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        layers_per_block=1,
        addition_embed_type="image",
        encoder_hid_dim=TEXT,
        encoder_hid_dim_type="image_proj",
        resnet_time_scale_shift="scale_shift",
        class_embed_type=None,
        attention_head_dim=4,
    )
    coder = diffusers.VQModel(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
        num_vq_embeddings=8,
    )
    sampler = diffusers.DDPMScheduler(variance_type="learned_range", clip_sample=False)
    return bare("KandinskyV22Pipeline", unet=seeded(model), scheduler=sampler, movq=seeded(coder))


def of_kandinsky2(count: int, seed: int) -> dict[str, Any]:
    return {
        "image_embeds": drawn(seed, count, TEXT),
        "negative_image_embeds": drawn(seed + 100, count, TEXT),
        "guidance_scale": 3.0,
        "height": 64,
        "width": 64,
    }


def kandinsky5() -> Any:
    model = diffusers.Kandinsky5Transformer3DModel(
        in_text_dim=TEXT,
        in_text_dim2=8,
        time_dim=16,
        model_dim=32,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(4, 4, 8),
    )
    pipe = bare("Kandinsky5T2IPipeline", transformer=seeded(model), scheduler=flow())
    pipe.resolutions = [(64, 64)]
    return pipe


def of_kandinsky5(count: int, seed: int) -> dict[str, Any]:
    ends = torch.arange(count + 1, dtype=torch.int32) * 5
    return {
        "prompt_embeds_qwen": drawn(seed, count, 5, TEXT),
        "prompt_embeds_clip": drawn(seed + 1, count, 8),
        "negative_prompt_embeds_qwen": drawn(seed + 100, count, 5, TEXT),
        "negative_prompt_embeds_clip": drawn(seed + 101, count, 8),
        "prompt_cu_seqlens": ends,
        "negative_prompt_cu_seqlens": ends.clone(),
        "guidance_scale": 3.0,
        "height": 64,
        "width": 64,
    }


def animatediff() -> Any:
    model = diffusers.UNetMotionModel.from_unet2d(
        pipelines.unet(layers_per_block=1, attention_head_dim=2),
        diffusers.MotionAdapter(
            block_out_channels=(16, 32),
            motion_layers_per_block=1,
            motion_num_attention_heads=2,
            motion_norm_num_groups=4,
            use_motion_mid_block=False,
        ),
    )
    return bare(
        "AnimateDiffPipeline",
        vae=pipelines.vae(),
        unet=seeded(model),
        scheduler=DDIMScheduler(clip_sample=False, beta_schedule="linear"),
    )


def of_animatediff(count: int, seed: int) -> dict[str, Any]:
    words = {"guidance_scale": 3.0, "height": 32, "width": 32, "num_frames": 3}
    return texts(seed, count, 5, TEXT) | words


def stable_audio() -> Any:
    model = diffusers.StableAudioDiTModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        num_key_value_attention_heads=2,
        cross_attention_dim=16,
        time_proj_dim=16,
        global_states_input_dim=2 * TEXT,
        cross_attention_input_dim=TEXT,
    )
    coder = diffusers.AutoencoderOobleck(
        encoder_hidden_size=4,
        downsampling_ratios=[1, 2],
        channel_multiples=[1, 2],
        decoder_channels=4,
        decoder_input_channels=4,
        sampling_rate=4,
    )
    return bare(
        "StableAudioPipeline",
        vae=seeded(coder),
        projection_model=seeded(StableAudioProjectionModel(TEXT, TEXT, 0, 32)),
        transformer=seeded(model),
        scheduler=diffusers.EDMDPMSolverMultistepScheduler(),
    )


def of_stable_audio(count: int, seed: int) -> dict[str, Any]:
    mask = torch.ones(count, 5, dtype=torch.long)
    both = {"attention_mask": mask, "negative_attention_mask": mask.clone()}
    return {**texts(seed, count, 5, TEXT), **both, "guidance_scale": 3.0, "audio_end_in_s": 4.0}


def lumina2() -> Any:
    model = diffusers.Lumina2Transformer2DModel(
        sample_size=4,
        in_channels=4,
        hidden_size=32,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=2,
        multiple_of=8,
        axes_dim_rope=(8, 4, 4),
        axes_lens=(64, 32, 32),
        cap_feat_dim=TEXT,
    )
    return bare("Lumina2Pipeline", transformer=seeded(model), scheduler=flow(use_dynamic_shifting=True))


def of_lumina2(count: int, seed: int) -> dict[str, Any]:
    words = {"guidance_scale": 3.0, "height": 64, "width": 64}
    return {**texts(seed, count, 5, TEXT), **masks(count, 5), **words}


def chroma() -> Any:
    model = diffusers.ChromaTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT,
        axes_dims_rope=(8, 4, 4),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    return bare("ChromaPipeline", transformer=seeded(model), scheduler=flow(), vae=vae())


def of_chroma(count: int, seed: int) -> dict[str, Any]:
    words = {"guidance_scale": 3.0, "height": 16, "width": 16}
    return {**texts(seed, count, 5, TEXT), **masks(count, 5), **words}


def hidream() -> Any:
    model = diffusers.HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        caption_channels=[TEXT, TEXT],
        text_emb_dim=8,
        num_routed_experts=2,
        num_activated_experts=1,
        axes_dims_rope=(8, 4, 4),
        max_resolution=(16, 16),
        llama_layers=[0, 0],
        force_inference_output=True,
    )
    pipe = bare("HiDreamImagePipeline", transformer=seeded(model), scheduler=flow())
    # Pictures are made as large as the model's own.
    pipe.default_sample_size = 8
    return pipe


def of_hidream(count: int, seed: int) -> dict[str, Any]:
    return {
        "prompt_embeds_t5": drawn(seed, count, 5, TEXT),
        "negative_prompt_embeds_t5": drawn(seed + 100, count, 5, TEXT),
        "prompt_embeds_llama3": drawn(seed + 1, 1, count, 5, TEXT),
        "negative_prompt_embeds_llama3": drawn(seed + 101, 1, count, 5, TEXT),
        "pooled_prompt_embeds": drawn(seed + 2, count, 8),
        "negative_pooled_prompt_embeds": drawn(seed + 102, count, 8),
        "guidance_scale": 3.0,
        "height": 64,
        "width": 64,
    }


def mochi() -> Any:
    model = diffusers.MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=4,
        text_embed_dim=TEXT,
        time_embed_dim=8,
        max_sequence_length=5,
    )
    return bare(
        "MochiPipeline", transformer=seeded(model), scheduler=flow(), force_zeros_for_empty_prompt=False
    )


def of_mochi(count: int, seed: int) -> dict[str, Any]:
    words = {"guidance_scale": 3.0, "height": 32, "width": 32, "num_frames": 7}
    return {**texts(seed, count, 5, TEXT), **masks(count, 5), **words}


def deepfloyd_if() -> Any:
    model = pipelines.unet(
        in_channels=3,
        out_channels=6,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        layers_per_block=1,
        addition_embed_type="text",
        addition_embed_type_num_heads=2,
        encoder_hid_dim=TEXT,
        resnet_time_scale_shift="scale_shift",
        attention_head_dim=4,
    )
    sampler = diffusers.DDPMScheduler(variance_type="learned_range", clip_sample=False)
    return bare("IFPipeline", unet=seeded(model), scheduler=sampler, requires_safety_checker=False)


def of_deepfloyd_if(count: int, seed: int) -> dict[str, Any]:
    words = {"guidance_scale": 3.0, "height": 16, "width": 16, "output_type": "pt"}
    return texts(seed, count, 5, TEXT) | words


def stable_cascade_prior() -> Any:
    model = StableCascadeUNet(
        in_channels=4,
        out_channels=4,
        timestep_ratio_embedding_dim=8,
        conditioning_dim=16,
        block_out_channels=(16, 16),
        num_attention_heads=(2, 2),
        down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1),
        clip_text_in_channels=TEXT,
        clip_text_pooled_in_channels=TEXT,
        clip_image_in_channels=TEXT,
        dropout=(0.1, 0.1),
    )
    sampler = diffusers.DDPMWuerstchenScheduler()
    return bare(
        "StableCascadePriorPipeline",
        text_encoder=pipelines.text_encoder(2, projection=True),
        prior=seeded(model),
        scheduler=sampler,
        resolution_multiple=42.67,
    )


def of_stable_cascade_prior(count: int, seed: int) -> dict[str, Any]:
    pooled = {
        "prompt_embeds_pooled": drawn(seed + 1, count, 1, TEXT),
        "negative_prompt_embeds_pooled": drawn(seed + 101, count, 1, TEXT),
    }
    words = {"guidance_scale": 3.0, "height": 256, "width": 256, "output_type": "pt"}
    return {**texts(seed, count, 5, TEXT), **pooled, **words}


def stable_video_diffusion() -> Any:
    model = diffusers.UNetSpatioTemporalConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        cross_attention_dim=TEXT,
        num_attention_heads=2,
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
        num_frames=3,
    )
    coder = diffusers.AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        latent_channels=4,
        force_upcast=False,
    )
    eye = CLIPVisionConfig(
        hidden_size=TEXT,
        projection_dim=TEXT,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=32,
        intermediate_size=TEXT,
        patch_size=16,
    )
    sampler = diffusers.EulerDiscreteScheduler(
        prediction_type="v_prediction",
        use_karras_sigmas=True,
        sigma_min=0.002,
        sigma_max=700.0,
        timestep_type="continuous",
    )
    return bare(
        "StableVideoDiffusionPipeline",
        vae=seeded(coder),
        image_encoder=seeded(CLIPVisionModelWithProjection(eye)),
        unet=seeded(model),
        scheduler=sampler,
        feature_extractor=CLIPImageProcessor(crop_size=32, size=32),
    )


def of_stable_video_diffusion(count: int, seed: int) -> dict[str, Any]:
    pictures = drawn(seed, count, 3, 32, 32).clamp(0, 1)
    return {"image": pictures, "height": 32, "width": 32, "num_frames": 3, "max_guidance_scale": 3.0}


def auraflow() -> Any:
    model = diffusers.AuraFlowTransformer2DModel(
        sample_size=8,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT,
        caption_projection_dim=32,
        pos_embed_max_size=16,
    )
    return bare("AuraFlowPipeline", transformer=seeded(model), scheduler=flow(), vae=vae())


def of_auraflow(count: int, seed: int) -> dict[str, Any]:
    words = {"guidance_scale": 3.0, "height": 16, "width": 16}
    return {**texts(seed, count, 5, TEXT), **masks(count, 5, torch.long), **words}


def cogview4() -> Any:
    model = diffusers.CogView4Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=TEXT,
        time_embed_dim=8,
        condition_dim=4,
        pos_embed_max_size=8,
        sample_size=8,
        rope_axes_dim=(8, 8),
    )
    return bare("CogView4Pipeline", transformer=seeded(model), scheduler=flow(use_dynamic_shifting=True))


def of_cogview4(count: int, seed: int) -> dict[str, Any]:
    words = {"guidance_scale": 3.0, "height": 64, "width": 64}
    return texts(seed, count, 16, TEXT) | words


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "qwen-image": Family(qwen_image, of_qwen_image, 2),
        "flux2": Family(flux2, of_flux2, 2),
        "z-image": Family(z_image, of_z_image),
        "hunyuan-video": Family(hunyuan_video, of_hunyuan_video, 2),
        "ltx-video": Family(ltx_video, of_ltx_video),
        "cogvideox": Family(cogvideox, of_cogvideox),
        "cogview4": Family(cogview4, of_cogview4, 2),
        "sana": Family(sana, of_sana),
        "kandinsky2": Family(kandinsky2, of_kandinsky2, denoiser="unet"),
        "kandinsky5": Family(kandinsky5, of_kandinsky5, 2),
        "animatediff": Family(animatediff, of_animatediff, denoiser="unet"),
        "stable-video-diffusion": Family(
            stable_video_diffusion, of_stable_video_diffusion, denoiser="unet"
        ),
        "stable-audio": Family(stable_audio, of_stable_audio),
        "lumina2": Family(lumina2, of_lumina2, 2),
        "chroma": Family(chroma, of_chroma, 2),
        "hidream": Family(hidream, of_hidream),
        "mochi": Family(mochi, of_mochi),
        "auraflow": Family(auraflow, of_auraflow),
        "deepfloyd-if": Family(deepfloyd_if, of_deepfloyd_if, denoiser="unet"),
        "stable-cascade": Family(stable_cascade_prior, of_stable_cascade_prior, denoiser="prior"),
    }
)


def generate(
    family: str,
    pipe: Any,
    *,
    text: int = 0,
    seed: int = 0,
    count: int = 1,
    steps: int = STEPS,
    **options: Any,
) -> Tensor:
    """What a short generation gives.

    Args:
        family: its name.
        pipe: of that family.
        text: the seed of its texts.
        seed: of its noise.
        count: samples.
        steps: of the sampler.
        options: other arguments of the pipeline.
    """
    arguments: dict[str, Any] = {"output_type": "latent"} | FAMILIES[family].arguments(count, 10 * text)
    arguments |= {"num_inference_steps": steps, "generator": torch.Generator().manual_seed(seed)}
    return torch.as_tensor(pipe(**arguments | options, return_dict=False)[0])
