"""Make what is trained on: latents of pictures or videos, and the conditions for the denoiser."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image, ImageOps
from torch import Tensor
from typing_extensions import Self

from regrow.files import read_text
from regrow.lab.measure.images import on_white, to_tensor
from regrow.lab.measure.sampling import check_size, make, makes_videos, takes_classes
from regrow.lab.measure.videos import FRAMES, READ, Clip, check_codec, clips_of, find_clips, read_clip
from regrow.lab.train.steps import Steps
from regrow.models import denoiser_of
from regrow.models.table import Layout

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
"""Endings of pictures in a folder."""
CAPTION = 1 << 16
"""Bytes of a caption."""
_SEPARATOR = "/"
Told = Callable[[str, int, int], None]
"""Takes what is done, how much of it is done, and how much there is."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Noisy examples.

    Args:
        x: ``(B, C, H, W)``, of videos ``(B, C, F, H, W)``, noised to the earlier of two steps.
        index: ``(B,)``, its number.
        given: the other arguments of the denoiser, without x and the time.
    """

    x: Tensor
    index: Tensor
    given: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Examples:
    """Latents and conditions.

    Args:
        tensors: as in their file: ``latents`` ``(M, C, H, W)``, of videos ``(M, C, F, H, W)``; conditions
            ``given/NAME`` ``(M, ...)`` by the name of the denoiser's argument; ``nothing/NAME``, the same
            where there is no condition. Entry b of an argument a that is a mapping has the name ``a/b``.
    """

    tensors: Mapping[str, Tensor]

    @property
    def latents(self) -> Tensor:
        """What is learned from, without noise."""
        return self.tensors["latents"]

    @property
    def given(self) -> dict[str, Tensor]:
        """The conditions."""
        return self._of("given")

    @property
    def nothing(self) -> dict[str, Tensor]:
        """What stands for no condition."""
        return self._of("nothing")

    def _of(self, kind: str) -> dict[str, Tensor]:
        prefix = f"{kind}{_SEPARATOR}"
        return {n.removeprefix(prefix): v for n, v in self.tensors.items() if n.startswith(prefix)}

    def __len__(self) -> int:
        return len(self.latents)

    def part(self, which: slice) -> Self:
        """Some of them."""
        return type(self)({name: value[which] for name, value in self.tensors.items()})

    def to(self, device: torch.device | str) -> Self:
        """The same on a device."""
        return type(self)({name: value.to(device) for name, value in self.tensors.items()})

    def noise(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw noise for so many of them, on the processor."""
        return torch.randn((count, *self.latents.shape[1:]), generator=generator)

    def batch(
        self, steps: Steps, earlier: Sequence[int], size: int, drop: float, generator: torch.Generator
    ) -> Batch:
        """Draw examples, steps and noise.

        Args:
            steps: of the sampler.
            earlier: numbers of the steps that may be the earlier one.
            size: B.
            drop: share of the examples that lose their condition.
            generator: of the processor; everything is drawn from it.
        """
        which = torch.randint(len(self), (size,), generator=generator)
        index = torch.tensor(earlier)[torch.randint(len(earlier), (size,), generator=generator)]
        noise = self.noise(size, generator)
        dropped = torch.rand(size, generator=generator) < drop
        return self.at(steps, which, index, noise, dropped)

    def at(self, steps: Steps, which: Tensor, index: Tensor, noise: Tensor, dropped: Tensor) -> Batch:
        """Examples ``which``, noised to steps number ``index``; dropped ones lose their condition."""
        device = self.latents.device
        which, dropped = which.to(device), dropped.to(device)
        x0, nothing = self.latents[which], self.nothing
        given = {
            name: torch.where(
                dropped.reshape(-1, *(1,) * (value.ndim - 1)), nothing[name][which], value[which]
            )
            for name, value in self.given.items()
        }
        x = steps.noised(x0, noise.to(device, x0.dtype), index)
        return Batch(x, index.to(device), _nested(given))


def _nested(flat: Mapping[str, Tensor]) -> dict[str, Any]:
    """Entries ``a/b`` as mappings."""
    made: dict[str, Any] = {}
    for name, value in flat.items():
        *outer, last = name.split(_SEPARATOR)
        inner = made
        for part in outer:
            inner = inner.setdefault(part, {})
        inner[last] = value
    return made


def _flat(given: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of mappings, by their names."""
    for name, value in given.items():
        if isinstance(value, Tensor):
            yield prefix + name, value
        elif isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}{_SEPARATOR}")


@dataclass(frozen=True)
class Size:
    """Of what is trained on, in pixels.

    Args:
        height: a multiple of what a token spans.
        width: a multiple of what a token spans.
        frames: of a video; None of pictures.
    """

    height: int
    width: int
    frames: int | None


def size_of(
    pipeline: Any, layout: Layout, height: int | None, width: int | None, frames: int | None
) -> Size:
    """The size that is given, or else the model's own, or else what its pipeline makes.

    Raises:
        ValueError: if the pipeline does not take it, or tokens or latent frames don't fill it.
    """
    check_size(pipeline, height, width, frames)
    config: Any = cast(Any, denoiser_of(pipeline)).config
    defaults = inspect.signature(pipeline.__call__).parameters
    scale, side = _scale(pipeline), config.get("sample_size")
    patch = (layout.stream.patch,) * 2 if layout.stream else layout.patch or (1, 1)

    def length(name: str, given: int | None, spans: int) -> int:
        found: int = given or (defaults[name].default if side is None else side * scale)
        if found % spans:
            raise ValueError(f"{name}: {found} is not allowed, it must be a multiple of {spans}")
        return found

    sides = length("height", height, patch[0] * scale), length("width", width, patch[1] * scale)
    if not makes_videos(type(pipeline)):
        return Size(*sides, None)
    count = frames or config.get("video_length") or defaults["num_frames"].default
    step = getattr(pipeline, "vae_scale_factor_temporal", 1)
    if (count - 1) % step:
        raise ValueError(f"frames: {count} is not allowed, it must be 1 more than a multiple of {step}")
    return Size(*sides, count)


def of_folder(folder: Path, classes: bool, videos: bool = False) -> list[tuple[Path, str]]:
    """The pictures of a folder, with their captions: ``NAME.txt`` beside one, or the name of its folder.

    Args:
        folder: looked through with all folders in it.
        classes: captions are classes.
        videos: look for videos instead, see `regrow.lab.measure.videos.find_clips`.

    Raises:
        ValueError: if there are none, one has no caption, or videos can't be read here.
    """
    if not folder.is_dir():
        raise ValueError(f"--data: {folder} is not allowed, it must be a folder")
    if videos:
        found = find_clips(folder)
        allowed = f"videos ({', '.join(READ)}, or folders of frames: {', '.join(FRAMES)})"
    else:
        found = sorted(file for file in folder.rglob("*") if file.suffix.lower() in PICTURES)
        allowed = f"pictures ({', '.join(PICTURES)})"
    if not found:
        raise ValueError(f"--data: {folder} has no {allowed}")
    for file in found:
        check_codec("--data", file, READ[1:])
    return [(file, _caption(file, folder, classes)) for file in found]


def bytes_of(file: Path) -> int:
    """The size of a picture or video; of a folder, that of its files."""
    files = file.iterdir() if file.is_dir() else (file,)
    return sum(one.stat().st_size for one in files)


def _caption(file: Path, folder: Path, classes: bool) -> str:
    text = file.with_name(f"{file.name if file.is_dir() else file.stem}.txt")
    if text.exists():
        return read_text(text, CAPTION).strip()
    if file.parent != folder:
        return file.parent.name
    what = "a folder of its class's name or number" if classes else "a folder of its caption's name"
    raise ValueError(f"--data: {file} has no caption; put it into {what}, or the text into {text.name}")


def own(
    pipeline: Any, prompts: Sequence[str], seed: int, batch: int, **options: Any
) -> Iterator[tuple[Clip, str]]:
    """Pictures or videos that the model makes itself, with options of `sampling.make`."""
    for first in range(0, len(prompts), batch):
        some = prompts[first : first + batch]
        made = make(pipeline, some, seed=seed + first, **options)
        yield from zip(clips_of(made.images), some, strict=True)


def opened(files: Sequence[tuple[Path, str]], frames: int | None) -> Iterator[tuple[Clip, str]]:
    """Pictures of files with their captions, or so many frames of videos."""
    for file, caption in files:
        if frames is not None:
            yield read_clip(file, frames), caption
            continue
        with Image.open(file) as picture:
            yield [on_white(picture)], caption


def encoded(
    pipeline: Any,
    layout: Layout,
    size: Size,
    pictures: Iterable[tuple[Clip, str]],
    count: int,
    batch: int,
    told: Told,
) -> dict[str, Tensor]:
    """Latents and conditions of pictures or videos: see `Examples`.

    Args:
        pipeline: of pictures from texts or classes, or of videos from texts.
        layout: of its denoiser.
        size: that they are cut and scaled to.
        pictures: with captions.
        count: how many.
        batch: that are encoded together.
        told: is told how many are done.
    """
    parts: list[dict[str, Tensor]] = []
    some: list[tuple[Clip, str]] = []
    for done, pair in enumerate(pictures, 1):
        some.append(pair)
        if len(some) == batch or done == count:
            clips, captions = zip(*some, strict=True)
            found = conditions(pipeline, layout, captions, size)
            found["latents"] = _latents(pipeline, clips, size)
            parts.append({name: value.cpu() for name, value in found.items()})
            some = []
        told("pictures", done, count)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@torch.no_grad()
def _latents(pipeline: Any, clips: Sequence[Clip], size: Size) -> Tensor:
    """The VAE's means ``(B, C, H, W)``, of videos ``(B, C, F, H, W)``; the middle of pictures, scaled."""
    vae, sides = pipeline.vae, (size.width, size.height)

    def fitted(clip: Clip) -> Tensor:
        fits = (ImageOps.fit(frame, sides, Image.Resampling.LANCZOS) for frame in clip)
        return torch.stack([to_tensor(frame) for frame in fits])

    pixels = torch.stack([fitted(clip) for clip in clips])
    x = (pixels.to(vae.device, vae.dtype) / 255) * 2 - 1
    if size.frames is None:
        mean = _mean(vae, x[:, 0])
    elif hasattr(pipeline, "vae_scale_factor_temporal"):
        mean = torch.cat([_mean(vae, video[None].transpose(1, 2)) for video in x])
    else:
        frames = [torch.cat([_mean(vae, frame[None]) for frame in video]) for video in x]
        mean = torch.stack(frames).transpose(1, 2)
    if vae.config.get("scaling_factor") is None:
        # Wan's has a mean and a deviation of each channel.
        middle, spread = (
            torch.tensor(values, device=mean.device, dtype=mean.dtype).view(-1, 1, 1, 1)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        return (mean - middle) / spread
    return (mean - (vae.config.get("shift_factor") or 0.0)) * vae.config.scaling_factor


def _mean(vae: Any, x: Tensor) -> Tensor:
    """What a VAE makes of pictures, or of a video, without chance."""
    found = vae.encode(x)
    mean: Tensor = found.latents if hasattr(found, "latents") else found.latent_dist.mode()
    return mean


def _scale(pipeline: Any) -> int:
    """Pixels that a position of the latent spans along one side."""
    for name in ("vae_scale_factor", "vae_scale_factor_spatial"):
        if hasattr(pipeline, name):
            return int(getattr(pipeline, name))
    config = pipeline.vae.config
    stages = config.get("encoder_block_out_channels") or config["block_out_channels"]
    return int(2 ** (len(stages) - 1))


def conditions(pipeline: Any, layout: Layout, captions: Sequence[str], size: Size) -> dict[str, Tensor]:
    """What the pipeline gives its denoiser for captions, and for none, as in `Examples`.

    It is seen in one guided step.
    """
    seen: list[tuple[int, Mapping[str, Any]]] = []

    def look(module: Any, args: Any, kwargs: Any) -> None:
        sample: Tensor = args[0] if args else kwargs[layout.sample]
        seen.append((len(sample), kwargs))

    hook = denoiser_of(pipeline).register_forward_pre_hook(look, with_kwargs=True)
    # Latte cuts a single text to its own length, which texts of other batches don't have.
    asked = captions if len(captions) > 1 else [*captions, *captions]
    options: dict[str, Any] = {}
    if not takes_classes(pipeline):
        # Texts are the same in videos of any length; one frame is the least work.
        frames = None if size.frames is None else 1
        options = {"latents": True, "height": size.height, "width": size.width, "frames": frames}
    try:
        make(pipeline, asked, steps=1, guidance=2.0, **options)
    finally:
        hook.remove()
    calls = [
        {n: v for n, v in _flat(kwargs) if n not in (layout.sample, layout.time)} for _, kwargs in seen
    ]
    if seen[0][0] == len(asked):
        # A call for each, the one with the captions first.
        kinds = {"given": calls[0], "nothing": calls[1]}
    else:
        order = ("given", "nothing") if layout.conditional_first else ("nothing", "given")
        kinds = {
            kind: {n: v.chunk(2)[half] for n, v in calls[0].items()} for half, kind in enumerate(order)
        }
    count = len(captions)
    return {f"{kind}{_SEPARATOR}{n}": v[:count] for kind, part in kinds.items() for n, v in part.items()}
