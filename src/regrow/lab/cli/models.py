"""Models that a command opens: bundled by name, in a folder or a single file, or on the hub."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any

import diffusers
import torch

from regrow import zoo
from regrow.lab.measure.architectures import architecture_of, decoder_channels
from regrow.lab.measure.samplers import Sampler
from regrow.lab.measure.sampling import makes_videos
from regrow.lab.memory import keep_freed_memory
from regrow.words import offer, shown

SINGLE = (".safetensors", ".ckpt")
"""Endings of a single file that holds all weights of a pipeline."""


def best_device() -> str:
    """The fastest device of this machine."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def find_device(name: str | None) -> str:
    """The name of a device that is there; the fastest one if none is given.

    Raises:
        ValueError: if torch does not know the device, or it is not there.
    """
    if not name:
        return best_device()
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"--device: {name!r} can't be used; best here is {best_device()} ({reason})"
        ) from error
    return name


def load_pipeline(
    model: str, device: str, dtype: torch.dtype, scheduler: str | None = None, *, videos: bool = False
) -> Any:
    """A pipeline of pictures from text or classes: bundled by name, from a folder, or from the hub.

    Args:
        model: name, folder or hub id.
        device: to run on; on a CPU, with `keep_freed_memory`.
        dtype: of the weights.
        scheduler: another one than the model's own, as `Sampler.parse` takes it.
        videos: also a pipeline of videos from text.

    Raises:
        ValueError: if there is no such scheduler, or the model can't be sampled by it, or it makes videos.
    """
    sampler = Sampler.parse(scheduler) if scheduler is not None else None
    pipeline = _load(model, device, dtype, videos)
    if sampler is not None:
        sampler.put_into(pipeline)
    if torch.device(device).type == "cpu":
        keep_freed_memory()
    return pipeline


def is_single(model: str) -> bool:
    """Whether a model is a single file of weights."""
    return model.endswith(SINGLE) and Path(model).is_file()


def config_of(model: str) -> str:
    """Where the configuration of a model is: a folder, or a hub id.

    That of a single file is in a folder of its name without the ending, or beside it, or else on the hub,
    told by what the file holds.

    Raises:
        ValueError: if there is no such model, or the file is none that diffusers knows.
    """
    if zoo.bundles(model):
        return str(zoo.path(model))
    if is_single(model):
        file = Path(model)
        beside = (file.with_suffix(""), file.parent)
        here = next((folder for folder in beside if (folder / "model_index.json").is_file()), None)
        return str(here) if here is not None else _config_on_hub(file)
    if not Path(model).exists() and (model.count("/") != 1 or model.startswith((".", "~"))):
        raise ValueError(
            f"model: {shown(model)} is not there, it must be {' or '.join(zoo.MODELS)} (bundled), "
            f"a folder, a file of weights, or owner/name on the hub{offer(model, zoo.MODELS)}"
        )
    return model


def _config_on_hub(file: Path) -> str:
    """The hub id of the public model whose weights a file looks like."""
    from diffusers.loaders.single_file_utils import fetch_diffusers_config, load_single_file_checkpoint

    try:
        found = fetch_diffusers_config(load_single_file_checkpoint(str(file)))
    except Exception as error:
        # Whatever a damaged file makes of the readers of weights.
        raise ValueError(f"model: {file} can't be read as weights of a pipeline") from error
    return str(found["pretrained_model_name_or_path"])


def index_of(model: str) -> dict[str, Any]:
    """What a model's ``model_index.json`` says.

    Raises:
        ValueError: if there is no such model, or it has none that could be read.
    """
    place = config_of(model)
    try:
        index: Any = diffusers.DiffusionPipeline.load_config(place)
    except OSError as error:
        if is_single(model):
            folder = Path(model).with_suffix("")
            raise ValueError(
                f"model: the configuration of {model}, that of {place}, is not on this machine and can't "
                f"be fetched; put it into {folder} (model_index.json and the folders beside it, no weights)"
            ) from error
        if Path(place).is_dir():
            raise ValueError(
                f"model: {model} is no pipeline of diffusers, it has no model_index.json"
            ) from error
        why = str(error).splitlines()[0]
        raise ValueError(
            f"model: {model} is not on this machine and can't be fetched from the hub ({why})"
        ) from error
    return dict(index)


def check_scheduler(model: str, scheduler: str) -> None:
    """Look whether a model can be sampled by a scheduler, without its weights.

    Raises:
        ValueError: if there is no such scheduler, or the model can't be sampled by it.
    """
    where = config_of(model)
    sampler = Sampler.parse(scheduler)
    _, name = index_of(model).get("scheduler", (None, None))
    kind = getattr(diffusers, name or "", None)
    if kind is None:
        raise ValueError(f"scheduler: {model} has none of diffusers that could be replaced")
    sampler.instead_of(kind.from_pretrained(where, subfolder="scheduler"))


def _load(model: str, device: str, dtype: torch.dtype, videos: bool) -> Any:
    kind = _kind(model, videos)
    if zoo.bundles(model):
        return zoo.load(model, dtype=dtype, device=device)
    if is_single(model):
        pipeline: Any = kind.from_single_file(model, config=config_of(model), dtype=dtype)
    else:
        pipeline = kind.from_pretrained(model, dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def check_pictures(model: str) -> None:
    """Look whether a model makes pictures, without its weights.

    Raises:
        ValueError: if it makes videos.
        OSError: if there is no such model.
    """
    _kind(model, videos=False)


def is_video(model: str) -> bool:
    """Whether a model makes videos, without its weights.

    Raises:
        ValueError: if it makes them from more than a text.
        OSError: if there is no such model.
    """
    return makes_videos(_kind(model, videos=True))


def _kind(model: str, videos: bool) -> Any:
    """The class by which a model's pipeline is opened."""
    name = index_of(model)["_class_name"]
    own = getattr(diffusers, name, None)
    if own is diffusers.DiTPipeline:
        return own
    if own is None or not makes_videos(own):
        if is_single(model):
            if not hasattr(own, "from_single_file"):
                raise ValueError(f"model: {model} is a single file, by which {name} can't be opened")
            return own
        # The automatic choice knows pipelines of pictures from text only.
        return diffusers.AutoPipelineForText2Image
    if not videos:
        raise ValueError(
            f"model: {model} makes videos ({name}); only regrow generate, bench and train take them"
        )
    given = {"image", "video"} & set(inspect.signature(own.__call__).parameters)
    if given:
        raise ValueError(f"model: {model} ({name}) needs {' and '.join(sorted(given))}, not a text alone")
    return own


def check_room(
    model: str, height: int | None, width: int | None, pictures: int, device: str, dtype: torch.dtype
) -> None:
    """Refuse what can't fit into the memory of a device, by a bound that is lower than any real need.

    Counted are the denoiser's weights, and what one convolution of the decoder reads and writes.

    Args:
        model: bundled name, folder, file or hub id; where its parts are not known nothing is refused.
        height: of a picture in pixels; the model's own if not given.
        width: likewise.
        pictures: in one batch.
        device: that computes.
        dtype: of the weights.

    Raises:
        ValueError: if one side alone is given; or naming what is needed and what is there.
    """
    if (height is None) != (width is None):
        missing, given = ("height", "width") if height is None else ("width", "height")
        raise ValueError(f"{missing}: must be given together with {given}")
    have = _memory(device)
    try:
        arch = architecture_of(config_of(model))
        channels = decoder_channels(config_of(model))
    except (ValueError, OSError, KeyError, StopIteration):
        return
    rows, columns = (side or own for side, own in zip((height, width), arch.own_size(), strict=True))
    weights = sum(p.numel() for p in arch.denoiser.parameters()) * dtype.itemsize
    working = 2 * pictures * rows * columns * channels * dtype.itemsize
    if have is None or weights + working <= have:
        return
    name = "height, width, batch" if weights <= have else "model"
    counted = f"{pictures} picture{'s' * (pictures > 1)} of {columns} x {rows}"
    raise ValueError(
        f"{name}: {counted} by {model} in {str(dtype).removeprefix('torch.')} need more than "
        f"{(weights + working) / 2**30:.0f} GiB, {device} has {have / 2**30:.0f}; use less, a smaller "
        "--dtype or another --device"
    )


def _memory(device: str) -> int | None:
    """Bytes of memory that a device has; None where the system does not tell."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if torch.device(device).type != "cpu" or not hasattr(os, "sysconf"):
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
