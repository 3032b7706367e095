"""Pictures from a pipeline, timed; pipelines of public architectures with random weights."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from regrow.measure.architectures import CONFIGS


@dataclass(frozen=True)
class Pictures:
    """Pictures and how long they took.

    Args:
        images: one a prompt; a tensor of latents from a pipeline with random weights.
        seconds: for all of them together.
    """

    images: list[Image.Image]
    seconds: float


def make(
    pipeline: Any,
    prompts: Sequence[str],
    *,
    steps: int,
    guidance: float | None = None,
    seed: int = 0,
    height: int | None = None,
    width: int | None = None,
    on_step: Callable[[], None] | None = None,
) -> Pictures:
    """One batch of pictures, prompt number i from seed ``seed + i``.

    Args:
        pipeline: a pipeline of pictures from text or from classes, also one of `random_pipeline`.
        prompts: one a picture; numbers of classes if that is what the pipeline takes.
        steps: sampler steps.
        guidance: guidance scale; the pipeline's own default if not given.
        seed: of the first picture.
        height: in pixels.
        width: in pixels.
        on_step: called without arguments after each step.

    Raises:
        ValueError: if a prompt is no number where a class is needed, or only one side is given.
    """
    if (height is None) != (width is None):
        # Pipelines fall back to their own size then.
        missing, given = ("height", "width") if height is None else ("width", "height")
        raise ValueError(f"{missing}: must be given together with {given}")

    def after(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if on_step is not None:
            on_step()
        return tensors

    options = {
        "guidance_scale": guidance,
        "height": height,
        "width": width,
        # Not every pipeline takes one.
        "callback_on_step_end": None if on_step is None else after,
    }
    wait(pipeline)
    begin = time.perf_counter()
    images = pipeline(
        **prompt_arguments(pipeline, prompts),
        num_inference_steps=steps,
        generator=[torch.Generator("cpu").manual_seed(seed + i) for i in range(len(prompts))],
        **{name: value for name, value in options.items() if value is not None},
    ).images
    wait(pipeline)
    return Pictures(images, time.perf_counter() - begin)


def wait(pipeline: Any) -> None:
    """Until a GPU has done what it was given."""
    if pipeline.device.type == "cuda":
        torch.cuda.synchronize(pipeline.device)


def prompt_arguments(pipeline: Any, prompts: Sequence[str]) -> dict[str, Any]:
    """The prompts as a pipeline takes them: texts, classes, or random embeddings if it has no encoder."""
    if "class_labels" in inspect.signature(pipeline.__call__).parameters:
        for prompt in prompts:
            if not prompt.isdecimal():
                raise ValueError(f"prompt: {prompt!r} is not allowed, it must be the number of a class")
        return {"class_labels": [int(prompt) for prompt in prompts]}
    if pipeline.text_encoder is not None:
        return {"prompt": list(prompts)}
    config, count = pipeline.unet.config, len(prompts)
    like = {"device": pipeline.device, "dtype": pipeline.unet.dtype}
    text = torch.randn(2, count, 77, config.cross_attention_dim, generator=torch.Generator().manual_seed(0))
    out: dict[str, Any] = {
        "prompt_embeds": text[0].to(**like),
        "negative_prompt_embeds": text[1].to(**like),
    }
    if config.addition_embed_type == "text_time":
        width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        pooled = torch.zeros(count, width, **like)
        out |= {"pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": pooled}
    return out | {"output_type": "latent"}


def random_pipeline(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """A pipeline of a public architecture with random weights, random text and no decoder.

    Its speed is that of the real one's denoiser; its latents mean nothing.

    Args:
        name: ``"sd15"``, ``"sd2"`` or ``"sdxl"``.
        device: where it runs.
        dtype: of its weights.

    Raises:
        ValueError: if the name is not one of these.
    """
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )

    if name not in CONFIGS:
        raise ValueError(f"arch: {name!r} is not known; known are {', '.join(CONFIGS)}")
    torch.manual_seed(0)
    unet: Any = UNet2DConditionModel.from_config(CONFIGS[name])
    # Only its number of levels counts: pixels a latent position spans.
    vae: Any = AutoencoderKL(
        block_out_channels=(32,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    parts: dict[str, Any] = {
        "vae": vae,
        "text_encoder": None,
        "tokenizer": None,
        "unet": unet.to(dtype).eval(),
        "scheduler": scheduler,
    }
    if name == "sdxl":
        pipeline: Any = StableDiffusionXLPipeline(**parts, text_encoder_2=None, tokenizer_2=None)
    else:
        none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipeline = StableDiffusionPipeline(**parts, **none)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device, dtype)
