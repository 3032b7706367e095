"""Make pictures by a pipeline, and time it."""

from __future__ import annotations

import importlib.util
import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from types import MappingProxyType
from typing import Any

import torch

from regrow.fields import check_within
from regrow.lab.measure.random_weights import has_random_text, random_text

SHOWN_CLASSES = 10


@dataclass(frozen=True)
class Pictures:
    """Pictures and how long they took.

    Args:
        images: a picture for each prompt; a pipeline with random weights gives a tensor of latents, a
            pipeline of videos or sound its frames or waves.
        seconds: time for all of them together.
    """

    images: Any
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
    frames: int | None = None,
    latents: bool = False,
    on_step: Callable[[], None] | None = None,
    more: Mapping[str, Any] = MappingProxyType({}),
) -> Pictures:
    """Make one batch of pictures, prompt number i from seed ``seed + i``.

    Noise that a pipeline draws from torch's global generator begins from ``seed``; outside, that generator
    goes on as before.

    Args:
        pipeline: a pipeline of pictures from text or from classes, or of videos from text; it may be one of
            `random_pipeline`.
        prompts: a prompt for each picture; names or numbers of classes for a pipeline of classes.
        steps: number of sampler steps.
        guidance: guidance scale; default: the pipeline's own.
        seed: seed of the first picture.
        height: height in pixels; default: the pipeline's own.
        width: width in pixels; default: the pipeline's own.
        frames: number of frames of a video; default: the pipeline's own.
        latents: do not decode; the images are then a tensor.
        on_step: called without arguments after each step.
        more: other arguments of the pipeline's call, such as a negative prompt.

    Raises:
        ValueError: if a prompt is not a class where one is needed, only one side is given, or the
            pipeline takes no size or no number of frames.
    """
    check_size(pipeline, height, width, frames)
    takes = inspect.signature(pipeline.__call__).parameters

    def after(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if on_step is not None:
            on_step()
        return tensors

    own = _own_sizes(pipeline)
    options = {
        "guidance_scale": guidance,
        "height": height or own.get("height"),
        "width": width or own.get("width"),
        _frames_name(type(pipeline)) or "": frames or own.get("frames"),
        "output_type": "latent" if latents else None,
        "clean_caption": False if "clean_caption" in takes and not _cleans_captions() else None,
        "callback_on_step_end": after if on_step and _takes(takes, "callback_on_step_end") else None,
    }
    device = torch.device(pipeline.device)
    # Not every pipeline gives its generators to the sampler: DiT's draws noise from torch's own.
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        wait(pipeline)
        begin = time.perf_counter()
        made = pipeline(
            num_inference_steps=steps,
            generator=[torch.Generator("cpu").manual_seed(seed + i) for i in range(len(prompts))],
            **{name: value for name, value in options.items() if value is not None}
            | prompt_arguments(pipeline, prompts, more)
            | dict(more),
        )
        wait(pipeline)
        seconds = time.perf_counter() - begin
    name = "frames" if makes_videos(type(pipeline)) else "images"
    # Sound takes the place of pictures.
    images = made.audios if hasattr(made, "audios") and not hasattr(made, name) else getattr(made, name)
    return Pictures(images, seconds)


def check_size(pipeline: Any, height: int | None, width: int | None, frames: int | None) -> None:
    """Check that a pipeline takes a size.

    Raises:
        ValueError: if only one side is given, or the pipeline takes no size, or not these frames.
    """
    if (height is None) != (width is None):
        # Pipelines fall back to their own size then.
        missing, given = ("height", "width") if height is None else ("width", "height")
        raise ValueError(f"{missing}: it is missing, give it together with {given}")
    if height is not None and not _takes(inspect.signature(pipeline.__call__).parameters, "height"):
        raise ValueError(f"height: {type(pipeline).__name__} has one size only; leave out height and width")
    check_frames(pipeline, frames)


def check_frames(pipeline: Any, frames: int | None) -> None:
    """Check that a pipeline takes a number of frames.

    Raises:
        ValueError: if it makes pictures, or the number is < 1, or not the one that the model is made for.
    """
    if frames is None:
        return
    if not makes_videos(type(pipeline)):
        raise ValueError(f"frames: {type(pipeline).__name__} makes pictures, not videos; leave out frames")
    check_within("frames", frames, 1, 10_000)
    own = _own_sizes(pipeline).get("frames", frames)
    if frames not in (1, own):
        raise ValueError(f"frames: {frames} is not allowed, this model makes {own} frames, or 1")


def makes_videos(kind: type) -> bool:
    """Whether a class of pipelines makes videos, not pictures."""
    return _frames_name(kind) is not None


def _frames_name(kind: type) -> str | None:
    """Find the argument with the number of frames of a class of pipelines; None if it makes pictures."""
    call: Any = kind.__call__
    takes = inspect.signature(call).parameters
    return next((name for name in ("num_frames", _OWN_FRAMES) if name in takes), None)


_OWN_FRAMES = "video_length"


def _cleans_captions() -> bool:
    """Whether the packages that clean captions are installed; without them each call would warn."""
    return all(importlib.util.find_spec(name) is not None for name in ("bs4", "ftfy"))


def _own_sizes(pipeline: Any) -> dict[str, int]:
    """Find the sizes of a model whose pipeline always defaults to the public model's (Latte)."""
    if _frames_name(type(pipeline)) != _OWN_FRAMES:
        return {}
    config = pipeline.transformer.config
    side = config.sample_size * pipeline.vae_scale_factor
    return {"height": side, "width": side, "frames": config.video_length}


def _takes(parameters: Mapping[str, inspect.Parameter], name: str) -> bool:
    """Whether a function takes an argument, by its name or by ``**kwargs``."""
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


@dataclass(frozen=True)
class Moment:
    """The time at which a device reaches a point of its work; see `moment`.

    Args:
        clock: seconds of the processor's clock.
        event: event of a GPU, which works later than the processor.
    """

    clock: float
    event: torch.cuda.Event | None

    def until(self, later: Moment) -> float:
        """Compute the seconds between two moments; the device must have reached both, see `wait`."""
        if self.event is None or later.event is None:
            return later.clock - self.clock
        return self.event.elapsed_time(later.event) / 1000


def moment(device: torch.device) -> Moment:
    """Mark this point of a device's work; waits for the device only if it has no CUDA events.

    Args:
        device: device of a pipeline; reading it from the pipeline takes longer than some calls.
    """
    event = None
    if device.type == "mps":
        torch.mps.synchronize()
    if device.type == "cuda":
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
    return Moment(time.perf_counter(), event)


def wait(pipeline: Any) -> None:
    """Wait until a GPU has finished its work."""
    if pipeline.device.type == "cuda":
        torch.cuda.synchronize(pipeline.device)
    elif pipeline.device.type == "mps":
        torch.mps.synchronize()


def prompt_arguments(
    pipeline: Any, prompts: Sequence[str], more: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, Any]:
    """Make a pipeline's prompt arguments: texts, classes, or random embeddings if it has no encoder.

    Args:
        pipeline: the pipeline.
        prompts: texts, or names or numbers of classes.
        more: other arguments of the call; embeddings for a denoiser that `random_text` does not know.

    Raises:
        ValueError: if a prompt is not a class where one is needed, or nothing can encode a text.
    """
    if takes_classes(pipeline):
        return {"class_labels": [_class(pipeline, prompt) for prompt in prompts]}
    if getattr(pipeline, "text_encoder", None) is not None:
        return {"prompt": list(prompts)}
    encoded = any("embeds" in name for name in more)
    return {} if encoded and not has_random_text(pipeline) else random_text(pipeline, len(prompts))


def check_prompts(pipeline: Any, prompts: Sequence[str]) -> None:
    """Check that a pipeline takes all prompts.

    Raises:
        ValueError: if one is not a class where one is needed.
    """
    if takes_classes(pipeline):
        prompt_arguments(pipeline, prompts)


def takes_classes(pipeline: Any) -> bool:
    """Whether a pipeline makes pictures of classes, not of texts."""
    return "class_labels" in inspect.signature(pipeline.__call__).parameters


def _class(pipeline: Any, prompt: str) -> int:
    """Read the number of a class from its number or name."""
    # The number after the last class means no class.
    known = [int(number) for number in pipeline.labels.values()] or range(
        pipeline.transformer.config.num_embeds_ada_norm
    )
    if prompt.isdecimal() and int(prompt) in known:
        return int(prompt)
    if prompt not in pipeline.labels:
        names = ", ".join(islice(pipeline.labels, SHOWN_CLASSES))
        raise ValueError(
            f"prompt: {prompt!r} is not allowed, it must be the number of a class, from {min(known)} to "
            f"{max(known)}" + (f", or its name, such as {names}" if names else "")
        )
    return int(pipeline.labels[prompt])
