"""Latents of every family of pipelines, made alike: guided, unguided, of a batch, and not square."""

from __future__ import annotations

from typing import Any

import any_pipelines
import pipelines
import torch
import transformer_pipelines
from torch import Tensor

STEPS = 6


def of_unet(pipe: Any, *, kind: str = "sd1", **options: Any) -> Tensor:
    """Latents of a U-Net."""
    return pipelines.generate(pipe, kind=kind, **{"num_inference_steps": STEPS} | options)


def of_transformer(pipe: Any, **options: Any) -> Tensor:
    """Latents of a transformer's picture."""
    return transformer_pipelines.generate(pipe, **{"num_inference_steps": STEPS} | options)


def of_dit(pipe: Any, **options: Any) -> Tensor:
    """Latents of DiT, whose pipeline returns pictures alone."""
    seen: list[Tensor] = []
    handle = pipe.vae.decoder.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    try:
        of_transformer(pipe, **options)
    finally:
        handle.remove()
    return seen[0]


def of_video(pipe: Any, *, seed: int = 0, count: int = 1, **options: Any) -> Tensor:
    """Latents of a video that is not square."""
    words = torch.randn(2, 6, transformer_pipelines.TEXT, generator=torch.Generator().manual_seed(9))
    words = words.to(pipe.transformer.dtype)
    frames = {"num_frames": 5}
    if type(pipe).__name__ == "LattePipeline":
        frames = {"video_length": 3, "negative_prompt": None}
    arguments = {"height": 64, "width": 96, "num_inference_steps": STEPS, "guidance_scale": 3.0}
    made = pipe(
        prompt_embeds=words[:count],
        negative_prompt_embeds=words.flip(0)[:count],
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
        **frames | arguments | options,
    )
    return torch.as_tensor(made.frames)


def of_any(family: str, pipe: Any, **options: Any) -> Tensor:
    """Latents of a family that regrow has no table for."""
    return any_pipelines.generate(family, pipe, steps=STEPS, **options)


def controlled(pipe: Any, *, seed: int = 0, **options: Any) -> Tensor:
    """Latents of a pipeline with a ControlNet."""
    arguments = {"control_image": pipelines.picture(32, 32), "max_sequence_length": 16} | options
    return of_transformer(pipe, seed=seed, **arguments)


UNET_FORMS = {
    "guided": {},
    "unguided": {"guidance_scale": 1.0},
    "batch": {"prompt": ["a penguin", "a pizza"]},
    "wide": {"width": 48},
}
GUIDED = {"guided": {"guidance_scale": 4.0}}
TEXT_FORMS = {**GUIDED, "unguided": {"guidance_scale": 1.0}, "batch": {**GUIDED["guided"], "count": 2}}
WIDE_FORMS = {**TEXT_FORMS, "wide": {**GUIDED["guided"], "width": 24}}
# Its guidance by an embedding, and by a second call.
FLUX_FORMS = {**WIDE_FORMS, "guided": transformer_pipelines.TWO_CALLS}
VIDEO_FORMS = {
    "guided": {},
    "unguided": {"guidance_scale": 1.0},
    "batch": {"count": 2},
    "wide": {"width": 160},
}
SIZED_FORMS = {way: form for way, form in VIDEO_FORMS.items() if way != "wide"}
