"""Pictures of many prompts by many methods, made once however often the run is killed, and compared."""

from __future__ import annotations

import json
import os
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from regrow.measure.images import to_tensor
from regrow.measure.quality import frechet_distance, kernel_distance, precision_recall
from regrow.measure.sampling import make
from regrow.measure.variants import Variant

Extractor = Callable[[Tensor], Tensor]
"""Features ``(B, C)`` of pictures ``(B, 3, H, W)`` in [0, 1]."""


@dataclass(frozen=True)
class Setting:
    """What pictures are made of, apart from the method.

    Args:
        model: name, folder or hub id.
        prompts: one a picture; picture i has seed ``seed + i``.
        seed: of the first picture.
        guidance: guidance scale; None for the pipeline's own.
        height: in pixels; None for the model's own.
        width: likewise.
        dtype: of the weights.
        shard: pictures made in one batch and kept in one file. The batch a picture is made in may change
            its last bits, so a killed run repeats whole shards.
    """

    model: str
    prompts: tuple[str, ...]
    seed: int = 0
    guidance: float | None = None
    height: int | None = None
    width: int | None = None
    dtype: str = "float32"
    shard: int = 16

    def shards(self) -> Iterator[tuple[int, tuple[str, ...]]]:
        """The number of each shard and its prompts."""
        for number, start in enumerate(range(0, len(self.prompts), self.shard)):
            yield number, self.prompts[start : start + self.shard]


class Pictures:
    """The pictures of a setting in a folder, a subfolder for each variant.

    Args:
        folder: made if it is not there; that of an earlier run with the same setting is gone on with.
        setting: what the pictures are made of.

    Raises:
        ValueError: if the folder belongs to another setting, or there is nothing to make.
    """

    def __init__(self, folder: Path, setting: Setting) -> None:
        for name, value in (("prompts", len(setting.prompts)), ("shard", setting.shard)):
            if value < 1:
                raise ValueError(f"{name}: {value} is not allowed, it must be >= 1")
        self.folder, self.setting = folder, setting
        file = folder / "setting.json"
        now = json.loads(json.dumps(asdict(setting)))
        if file.exists():
            before = json.loads(file.read_text(encoding="utf-8"))
            for name, value in now.items():
                if before.get(name) != value:
                    raise ValueError(
                        f"{name}: the pictures in {folder} were made with another one; use another folder"
                    )
        folder.mkdir(parents=True, exist_ok=True)
        _replace(file, lambda to: to.write_text(json.dumps(now, indent=1) + "\n", "utf-8"))

    def missing(self, one: Variant) -> list[tuple[int, tuple[str, ...]]]:
        """The shards of a variant that are not made yet.

        Raises:
            ValueError: if the folder holds pictures of another configuration under this name.
        """
        self._claim(one)
        return [(n, prompts) for n, prompts in self.setting.shards() if not self._file(one, n).exists()]

    def make(self, pipeline: Any, one: Variant, on_shard: Callable[[], None] = lambda: None) -> None:
        """Make what is missing of a variant.

        Args:
            pipeline: the pipeline of the setting's model.
            one: the variant.
            on_shard: called after every shard.
        """
        s = self.setting
        for number, prompts in self.missing(one):
            # Anew for each shard: what a method keeps must not pass from one to the next.
            with one.applied(pipeline):
                made = make(
                    pipeline,
                    prompts,
                    steps=one.steps,
                    guidance=s.guidance,
                    seed=s.seed + number * s.shard,
                    height=s.height,
                    width=s.width,
                )
            pictures = torch.stack([to_tensor(image) for image in made.images])
            tensors = {"pictures": pictures, "seconds": torch.tensor([made.seconds])}
            _replace(self._file(one, number), partial(save_file, tensors))
            on_shard()

    def of(self, one: Variant) -> Iterator[Tensor]:
        """The pictures of a variant in order, a shard at a time: ``(B, 3, H, W)`` in [0, 1]."""
        for number, _ in self.setting.shards():
            yield load_file(self._file(one, number))["pictures"].float() / 255

    def seconds(self, one: Variant) -> float:
        """Median seconds a picture, over the shards; of a machine that may have done other things."""
        shards = [load_file(self._file(one, number)) for number, _ in self.setting.shards()]
        return statistics.median(float(s["seconds"]) / len(s["pictures"]) for s in shards)

    def _folder(self, one: Variant) -> Path:
        return self.folder / re.sub(r"[^\w.+-]", "-", one.name)

    def _file(self, one: Variant, number: int) -> Path:
        return self._folder(one) / f"{number:06d}.safetensors"

    def _claim(self, one: Variant) -> None:
        """Keep a variant's configuration beside its pictures."""
        file = self._folder(one) / "variant.json"
        description = {"name": one.name, "steps": one.steps, "config": one.settings()}
        now = json.dumps(description, indent=1) + "\n"
        if file.exists() and file.read_text(encoding="utf-8") != now:
            raise ValueError(
                f"methods: {file.parent} holds pictures of another {one.name}; use another folder"
            )
        file.parent.mkdir(parents=True, exist_ok=True)
        _replace(file, lambda to: to.write_text(now, "utf-8"))


@dataclass(frozen=True)
class Quality:
    """How far a variant's pictures are from others; ``None`` where there are too few pictures.

    Args:
        name: of the variant.
        psnr: median over the pictures, dB, to the baseline's picture of the same seed; None if all equal.
        ssim: mean, likewise.
        feature_distance: mean of 1 - cosine of the features, likewise.
        fd: Fréchet distance of the features to the reference.
        kd: kernel distance, likewise.
        precision: share of pictures within the reference's manifold.
        recall: share of the reference within the pictures' manifold.
    """

    name: str
    psnr: float | None
    ssim: float
    feature_distance: float
    fd: float | None
    kd: float | None
    precision: float | None
    recall: float | None

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data."""
        return asdict(self)


def compare(
    pictures: Pictures,
    variants: Sequence[Variant],
    extractor: Extractor,
    reference: Tensor | None = None,
    on_variant: Callable[[], None] = lambda: None,
) -> list[Quality]:
    """Measure the pictures of all variants; the first is the baseline.

    Args:
        pictures: made already.
        variants: what to compare.
        extractor: features of pictures.
        reference: features of the data ``(N, C)``; those of the baseline's pictures if None.
        on_variant: called after every variant.
    """
    base_features = _features(pictures.of(variants[0]), extractor)
    others = base_features if reference is None else reference
    out = []
    for one in variants:
        features = _features(pictures.of(one), extractor)
        errors, likeness = [], []
        for own, base in zip(pictures.of(one), pictures.of(variants[0]), strict=True):
            errors.append((own.double() - base.double()).square().mean((1, 2, 3)))
            likeness += [_ssim(a, b) for a, b in zip(own, base, strict=True)]
        error = torch.cat(errors)
        finite = -10 * error[error > 0].log10()
        cosine = torch.cosine_similarity(features.double(), base_features.double())
        enough = min(len(features), len(others)) > 3
        near, far = precision_recall(others, features) if enough else (None, None)
        out.append(
            Quality(
                name=one.name,
                psnr=float(finite.median()) if len(finite) else None,
                ssim=statistics.mean(likeness),
                feature_distance=float((1 - cosine).mean()),
                fd=frechet_distance(others, features) if enough else None,
                kd=kernel_distance(others, features) if enough else None,
                precision=near,
                recall=far,
            )
        )
        on_variant()
    return out


def _features(shards: Iterator[Tensor], extractor: Extractor) -> Tensor:
    return torch.cat([extractor(shard).float().cpu() for shard in shards])


def _ssim(a: Tensor, b: Tensor) -> float:
    from skimage.metrics import structural_similarity

    pair = [x.permute(1, 2, 0).numpy().astype(np.float64) for x in (a, b)]
    return float(structural_similarity(*pair, channel_axis=2, data_range=1.0))


def _replace(file: Path, write: Callable[[Path], Any]) -> None:
    """Write a file so that it is whole or not there."""
    unfinished = file.with_name(f"{file.name}.partial")
    write(unfinished)
    os.replace(unfinished, file)
