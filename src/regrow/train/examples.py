"""What is trained on: latents of pictures, with the conditions that the denoiser is given for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor
from typing_extensions import Self

from regrow.files import read_text
from regrow.measure.images import on_white, to_tensor
from regrow.measure.keep import kept
from regrow.measure.sampling import make, takes_classes
from regrow.models import denoiser_of
from regrow.models.table import Layout
from regrow.train.steps import Steps

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
"""Endings of pictures in a folder."""
CAPTION = 1 << 16
"""Bytes of a caption."""
_SEPARATOR = "/"
Told = Callable[[str, int, int], None]
"""Takes what is done, how much of it, and of how much."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Noisy examples.

    Args:
        x: ``(B, C, H, W)``, noised to the earlier of two steps.
        index: ``(B,)``, its number.
        given: what the denoiser is given beside x and the time.
    """

    x: Tensor
    index: Tensor
    given: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Examples:
    """Latents and conditions.

    Args:
        latents: ``(M, C, H, W)``.
        given: by the name of the denoiser's argument, ``a/b`` for the entry b of a mapping, values
            ``(M, ...)``.
        nothing: the same of no condition.
    """

    latents: Tensor
    given: Mapping[str, Tensor]
    nothing: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(self.latents)

    def part(self, which: slice) -> Self:
        """Some of them."""
        return type(self)(
            self.latents[which],
            {name: value[which] for name, value in self.given.items()},
            {name: value[which] for name, value in self.nothing.items()},
        )

    def to(self, device: torch.device | str) -> Self:
        """The same on a device."""
        return type(self)(
            self.latents.to(device),
            {name: value.to(device) for name, value in self.given.items()},
            {name: value.to(device) for name, value in self.nothing.items()},
        )

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
        noise = torch.randn((size, *self.latents.shape[1:]), generator=generator)
        dropped = torch.rand(size, generator=generator) < drop
        return self.at(steps, which, index, noise, dropped)

    def at(self, steps: Steps, which: Tensor, index: Tensor, noise: Tensor, dropped: Tensor) -> Batch:
        """Examples ``which``, noised to steps number ``index``; dropped ones lose their condition."""
        device = self.latents.device
        x0 = self.latents[which.to(device)]
        given = {
            name: torch.where(
                _like(dropped.to(device), value),
                self.nothing[name][which.to(device)],
                value[which.to(device)],
            )
            for name, value in self.given.items()
        }
        x = steps.noised(x0, noise.to(device, x0.dtype), index)
        return Batch(x, index.to(device), _nested(given))


def _like(mask: Tensor, value: Tensor) -> Tensor:
    return mask.reshape(-1, *(1,) * (value.ndim - 1))


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


def of_folder(folder: Path, classes: bool) -> list[tuple[Path, str]]:
    """The pictures of a folder, with their captions: ``NAME.txt`` beside one, or the name of its folder.

    Args:
        folder: looked through with all folders in it.
        classes: captions are classes.

    Raises:
        ValueError: if there are no pictures, or one has neither.
    """
    if not folder.is_dir():
        raise ValueError(f"--data: {folder} is not allowed, it must be a folder")
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in PICTURES)
    if not files:
        raise ValueError(f"--data: {folder} has no pictures ({', '.join(PICTURES)})")
    return [(file, _caption(file, folder, classes)) for file in files]


def _caption(file: Path, folder: Path, classes: bool) -> str:
    text = file.with_suffix(".txt")
    if text.exists():
        return read_text(text, CAPTION).strip()
    if file.parent != folder:
        return file.parent.name
    what = "a folder of its class's name or number" if classes else "a folder of its caption's name"
    raise ValueError(f"--data: {file} has no caption; put it into {what}, or the text into {text.name}")


def own(
    pipeline: Any, prompts: Sequence[str], steps: int, guidance: float | None, seed: int, batch: int
) -> Iterator[tuple[Image.Image, str]]:
    """Pictures that the model makes itself."""
    for first in range(0, len(prompts), batch):
        some = prompts[first : first + batch]
        made = make(pipeline, some, steps=steps, guidance=guidance, seed=seed + first)
        yield from zip(made.images, some, strict=True)


def opened(files: Sequence[tuple[Path, str]]) -> Iterator[tuple[Image.Image, str]]:
    """Pictures of files with their captions."""
    for file, caption in files:
        with Image.open(file) as picture:
            yield on_white(picture), caption


def encoded(
    pipeline: Any,
    layout: Layout,
    pictures: Iterable[tuple[Image.Image, str]],
    count: int,
    batch: int,
    file: Path,
    key: str,
    told: Told,
) -> Examples:
    """Latents and conditions of pictures, computed once.

    Args:
        pipeline: of pictures from texts or classes.
        layout: of its denoiser.
        pictures: with captions.
        count: how many.
        batch: that are encoded together.
        file: that keeps them, ``.safetensors``.
        key: all that they depend on.
        told: is told how many are done.
    """

    def compute() -> dict[str, Tensor]:
        parts: list[dict[str, Tensor]] = []
        some: list[tuple[Image.Image, str]] = []
        for done, pair in enumerate(pictures, 1):
            some.append(pair)
            if len(some) == batch or done == count:
                parts.append(_encoded(pipeline, layout, some))
                some = []
            told("pictures", done, count)
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    found = kept(file, key, compute)
    named = {
        kind: {
            n.removeprefix(f"{kind}{_SEPARATOR}"): v
            for n, v in found.items()
            if n.startswith(f"{kind}{_SEPARATOR}")
        }
        for kind in ("given", "nothing")
    }
    return Examples(found["latents"], named["given"], named["nothing"])


def _encoded(pipeline: Any, layout: Layout, some: Sequence[tuple[Image.Image, str]]) -> dict[str, Tensor]:
    given, nothing = conditions(pipeline, layout, [caption for _, caption in some])
    latents = _latents(pipeline, [picture for picture, _ in some])
    return (
        {"latents": latents.cpu()}
        | {f"given{_SEPARATOR}{name}": value.cpu() for name, value in given.items()}
        | {f"nothing{_SEPARATOR}{name}": value.cpu() for name, value in nothing.items()}
    )


@torch.no_grad()
def _latents(pipeline: Any, pictures: Sequence[Image.Image]) -> Tensor:
    """The VAE's means of pictures, cut to squares of the model's own size."""
    vae, denoiser = pipeline.vae, cast(Any, denoiser_of(pipeline))
    side = denoiser.config.sample_size * _scale(pipeline)
    pixels = torch.stack([to_tensor(_square(picture, side)) for picture in pictures])
    x = (pixels.to(vae.device, vae.dtype) / 255) * 2 - 1
    found = vae.encode(x)
    mean = found.latents if hasattr(found, "latents") else found.latent_dist.mode()
    shift = vae.config.get("shift_factor") or 0.0
    return (mean - shift) * vae.config.scaling_factor


def _scale(pipeline: Any) -> int:
    """Pixels that a position of the latent spans along one side."""
    named = getattr(pipeline, "vae_scale_factor", None)
    if named is not None:
        return int(named)
    config = pipeline.vae.config
    stages = config.get("encoder_block_out_channels") or config["block_out_channels"]
    return int(2 ** (len(stages) - 1))


def _square(picture: Image.Image, side: int) -> Image.Image:
    """The middle of a picture, scaled."""
    least = min(picture.size)
    left, top = ((length - least) // 2 for length in picture.size)
    cut = picture.crop((left, top, left + least, top + least))
    return cut if least == side else cut.resize((side, side), Image.Resampling.LANCZOS)


def conditions(
    pipeline: Any, layout: Layout, captions: Sequence[str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What the pipeline gives its denoiser for captions, and for none: seen in one guided step."""
    seen: list[Mapping[str, Any]] = []

    def look(module: Any, args: Any, kwargs: Any) -> None:
        seen.append(kwargs)

    hook = denoiser_of(pipeline).register_forward_pre_hook(look, with_kwargs=True)
    try:
        make(pipeline, captions, steps=1, guidance=2.0, latents=not takes_classes(pipeline))
    finally:
        hook.remove()
    told = {k: v for k, v in seen[0].items() if k not in (layout.sample, layout.time)}
    halves = {name: value.chunk(2) for name, value in _flat(told)}
    one = 0 if layout.conditional_first else 1
    return {n: h[one] for n, h in halves.items()}, {n: h[1 - one] for n, h in halves.items()}
