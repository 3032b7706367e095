"""Make pictures of many prompts by many methods, and compare them; killed runs are resumed."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from regrow.fields import MOST_COUNT, MOST_GUIDANCE, MOST_PIXELS, MOST_SEED, check_within
from regrow.files import damaged, read_kept
from regrow.lab.measure.atomic_files import (
    check_writable,
    digest,
    kept,
    opened_kept,
    write_json,
    write_whole,
)
from regrow.lab.measure.clip import ClipScore
from regrow.lab.measure.extractors import Extractor, PictureFeatures
from regrow.lab.measure.images import to_tensor
from regrow.lab.measure.machine import maker_key
from regrow.lab.measure.quality import (
    FeatureSet,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)
from regrow.lab.measure.reference import Reference
from regrow.lab.measure.sampling import Pictures as Made
from regrow.lab.measure.sampling import make
from regrow.lab.measure.variants import Variant
from regrow.lab.workers import LocalWorkers, Workers

# Raise it with every change of how pictures, or sets of them, are measured, also in quality.py, so that
# older figures are not mixed with new ones.
_MEASURE = 1


@dataclass(frozen=True)
class Setting:
    """The settings of pictures, apart from the method.

    Args:
        model: name, folder or hub id.
        prompts: a prompt for each picture; picture i has seed ``seed + i``.
        seed: seed of the first picture.
        scheduler: scheduler, for `Sampler.parse`; None for the model's own.
        guidance: guidance scale; None for the pipeline's own.
        height: height in pixels; None for the model's own.
        width: width in pixels; None for the model's own.
        dtype: type of the weights.
        model_key: key of a bundled model or of one in a folder; empty for a model of the hub.
        shard: number of pictures in one batch and one file. The batch may change a picture's last bits, so
            a resumed run makes incomplete shards again.
    """

    model: str
    prompts: tuple[str, ...]
    seed: int = 0
    scheduler: str | None = None
    guidance: float | None = None
    height: int | None = None
    width: int | None = None
    dtype: str = "float32"
    model_key: str = ""
    shard: int = 16

    def make(self, pipeline: Any, start: int, stop: int, steps: int, **options: Any) -> Made:
        """Make one batch of pictures of some of the prompts, each from its own seed.

        Args:
            pipeline: pipeline of the model.
            start: index of the first prompt.
            stop: index after the last prompt.
            steps: number of sampler steps.
            options: other options of `sampling.make`.
        """
        return make(
            pipeline,
            self.prompts[start:stop],
            steps=steps,
            guidance=self.guidance,
            seed=self.seed + start,
            height=self.height,
            width=self.width,
            **options,
        )

    def shards(self) -> Iterator[tuple[int, tuple[str, ...]]]:
        """List the number of each shard and its prompts."""
        for number, start in enumerate(range(0, len(self.prompts), self.shard)):
            yield number, self.prompts[start : start + self.shard]


@dataclass(frozen=True)
class Shard:
    """A batch of pictures to be made.

    Args:
        variant: variant that makes it.
        number: number of the shard.
        prompts: prompts of its pictures.
    """

    variant: Variant
    number: int
    prompts: tuple[str, ...]


class ShardMaker:
    """Makes shards.

    Args:
        setting: setting of all shards.
        pipeline: pipeline of the setting's model.
    """

    def __init__(self, setting: Setting, pipeline: Any) -> None:
        # Read now: files may change while pictures are made.
        self.setting, self.pipeline = setting, pipeline
        self.maker = maker_key(pipeline.device)

    def __call__(self, shard: Shard) -> bytes:
        """Make the content of a shard's file: its pictures, uint8 ``(B, 3, H, W)``, and seconds, ``(1,)``;
        its metadata has the `maker_key`."""
        one, start = shard.variant, shard.number * self.setting.shard
        try:
            # Applied again for each shard, so that a method keeps nothing from one to the next.
            with one.applied(self.pipeline):
                stop = start + len(shard.prompts)
                made = self.setting.make(self.pipeline, start, stop, one.steps, **one.arguments({}))
        except torch.OutOfMemoryError as error:
            raise MemoryError(
                f"batch: {len(shard.prompts)} pictures by {one.name} need more memory than the "
                "device has; use a smaller batch and another folder"
            ) from error
        pictures = torch.stack([to_tensor(image) for image in made.images])
        tensors = {"pictures": pictures, "seconds": torch.tensor([made.seconds])}
        return save(tensors, metadata={"maker": self.maker})


class PictureFolder:
    """The pictures of a setting in a folder, a subfolder for each variant.

    Args:
        folder: made with the first pictures. An earlier run with the same setting is resumed; its prompts
            may be more or fewer, if the shorter list begins the longer one and fills whole shards.
        setting: setting of the pictures.
        device: device for the missing pictures. Pictures of another kind of device can be compared, but not
            completed: their rounding, and random numbers of methods, may differ.

    Attributes:
        setting: the setting, with the model's key from the folder if it has no key.

    Raises:
        ValueError: if the folder belongs to another setting or can't be written, the shorter list of
            prompts ends within a shard, or there is nothing to make.
    """

    def __init__(self, folder: Path, setting: Setting, device: str = "cpu") -> None:
        check_within("prompts", len(setting.prompts), 1, MOST_COUNT)
        check_within("shard", setting.shard, 1, MOST_COUNT)
        check_within("seed", setting.seed, 0, MOST_SEED)
        if setting.guidance is not None:
            check_within("guidance", setting.guidance, -MOST_GUIDANCE, MOST_GUIDANCE)
        for name, side in (("height", setting.height), ("width", setting.width)):
            if side is not None:
                check_within(name, side, 1, MOST_PIXELS)
        check_writable("out", folder, folder=True)
        self.folder, self.device = folder, torch.device(device)
        made_on = self.device.type
        file = folder / "setting.json"
        now = json.loads(json.dumps(asdict(setting)))
        if file.exists():
            before = read_kept(file, "use another folder")
            theirs = before.get("prompts")
            if not isinstance(theirs, list) or not all(isinstance(prompt, str) for prompt in theirs):
                raise damaged(file, "use another folder")
            # Missing in older folders.
            made_on = before.pop("device", made_on)
            shorter, longer = sorted((theirs, now["prompts"]), key=len)
            if longer[: len(shorter)] == shorter:
                before["prompts"] = now["prompts"] = longer
            # Empty if the model is not on this machine, and in older folders.
            before["model_key"] = before.get("model_key") or now["model_key"]
            now["model_key"] = now["model_key"] or before["model_key"]
            for name, value in now.items():
                if before.get(name) != value:
                    raise ValueError(
                        f"{name}: the pictures in {folder} were made with another value; use another folder"
                    )
            if len(shorter) < len(longer) and len(shorter) % setting.shard:
                raise ValueError(
                    f"prompts: {len(shorter)} and {len(longer)} can't share {folder}, the lower number "
                    f"must be a multiple of the batch, {setting.shard}"
                )
        self._described = now | {"device": made_on}
        self.setting = replace(setting, model_key=now["model_key"])

    def missing(self, one: Variant) -> list[tuple[int, tuple[str, ...]]]:
        """List the shards of a variant that are not made yet.

        Raises:
            ValueError: if the folder holds pictures of another configuration under this name, or the
                missing ones would be made on another kind of device.
        """
        self._check_configuration(one)
        found = [(n, prompts) for n, prompts in self.setting.shards() if not self._file(one, n).exists()]
        if found and self.device.type != self._described["device"]:
            raise ValueError(
                f"device: {self.device.type} is not allowed for the missing pictures of {one.name}, those "
                f"in {self.folder} were made on {self._described['device']}; use another folder"
            )
        return found

    def made_otherwise(self, one: Variant) -> bool:
        """Whether other code or packages, or another machine, made some of the pictures of a variant.

        Pictures without this information count as such.
        """
        here = maker_key(self.device)
        for number, _ in self.setting.shards():
            file = self._file(one, number)
            if file.exists():
                with opened_kept(file) as opened:
                    if (opened.metadata() or {}).get("maker") != here:
                        return True
        return False

    def make(self, pipeline: Any, one: Variant, on_shard: Callable[[], None] = lambda: None) -> None:
        """Make the missing pictures of a variant in this process.

        Args:
            pipeline: the pipeline of the setting's model.
            one: the variant.
            on_shard: called after every shard.
        """
        with LocalWorkers(lambda: ShardMaker(self.setting, pipeline)) as workers:
            self.make_all(workers, [one], lambda _: on_shard())

    def make_all(
        self,
        workers: Workers[Shard, bytes],
        variants: Sequence[Variant],
        on_shard: Callable[[Variant], None],
    ) -> None:
        """Make all missing pictures.

        Args:
            workers: workers of a `ShardMaker` with this setting. This process writes the files.
            variants: variants to make pictures of.
            on_shard: called after every shard with its variant.

        Raises:
            ValueError: if the folder holds pictures of another configuration under a variant's name.
        """
        jobs = [Shard(one, number, prompts) for one in variants for number, prompts in self.missing(one)]
        # In this order an interrupted run has the first prompts of all variants.
        jobs.sort(key=lambda job: job.number)
        described: set[str] = set()
        for index, content in workers.run(jobs):
            job = jobs[index]
            if job.variant.name not in described:
                # Only after the first picture, so that a run without pictures leaves no files.
                self._describe(job.variant)
                described.add(job.variant.name)
            write_whole(self._file(job.variant, job.number), partial(Path.write_bytes, data=content))
            on_shard(job.variant)

    def of(self, one: Variant) -> Iterator[Tensor]:
        """Read the pictures of a variant in order, a shard at a time: ``(B, 3, H, W)`` in [0, 1]."""
        for number, _ in self.setting.shards():
            yield self.shard(one, number).float() / 255

    def shard(self, one: Variant, number: int) -> Tensor:
        """Read the pictures of one shard: uint8 ``(B, 3, H, W)``."""
        with opened_kept(self._file(one, number)) as opened:
            return opened.get_tensor("pictures")

    def seconds(self, one: Variant) -> float:
        """Compute the median seconds for a picture over the shards; other work may slow the machine."""
        each = []
        for number, _ in self.setting.shards():
            with opened_kept(self._file(one, number)) as opened:
                each.append(float(opened.get_tensor("seconds")) / len(opened.get_tensor("pictures")))
        return statistics.median(each)

    def folder_of(self, one: Variant) -> Path:
        """Find the folder of a variant's pictures and measurements."""
        return self.folder / re.sub(r"[^\w.+-]", "-", one.name)

    def _file(self, one: Variant, number: int) -> Path:
        return self.folder_of(one) / f"{number:06d}.safetensors"

    def _check_configuration(self, one: Variant) -> None:
        """Refuse pictures of another configuration under a variant's name."""
        file = self.folder_of(one) / "variant.json"
        if not file.exists():
            return
        before = read_kept(file, "remove its folder, and the pictures are made again")
        # Older folders have other names for configurations that make equal pictures.
        before.pop("alike", None)
        if before != self._of(one):
            raise ValueError(
                f"methods: {file.parent} holds pictures of another {one.name}; use another folder"
            )

    def _of(self, one: Variant) -> dict[str, Any]:
        """Convert a variant to plain data."""
        return json.loads(json.dumps({"name": one.name, "steps": one.steps, "config": one.settings()}))

    def _describe(self, one: Variant) -> None:
        """Write the setting and the configuration into the folder of a variant's pictures."""
        folder = self.folder_of(one)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "setting.json", self._described)
        write_json(folder / "variant.json", self._of(one))


@dataclass(frozen=True)
class Gain:
    """The gain of a variant's PSNR to the baseline over another variant's, picture by picture.

    Args:
        over: name of the other variant.
        psnr: mean difference of PSNR, dB, over the prompts for which neither picture equals the baseline's;
            None if there is none.
        error: standard error of that mean; None for fewer than two prompts.
    """

    over: str
    psnr: float | None
    error: float | None


@dataclass(frozen=True)
class QualityFigures:
    """The figures of a variant's pictures; ``None`` if there are too few pictures.

    Args:
        name: name of the variant.
        psnr: median PSNR, dB, to the baseline's picture of the same seed; None if all are equal.
        ssim: mean SSIM to the baseline's picture of the same seed.
        feature_distance: mean of 1 - cosine of the features to those of the baseline's picture.
        fd: Fréchet distance of the features to the reference.
        sfd: Fréchet distance of the spatial features to the reference.
        kd: kernel distance of the features to the reference.
        precision: share of pictures within the reference's manifold.
        recall: share of the reference within the pictures' manifold.
        inception_score: the Inception Score's formula on the extractor's classifier; needs no reference.
        clip_score: mean of `ClipScore` over the pictures; None if it was not measured.
        gain: gain over the variant that it is compared with, if any.
        made_otherwise: whether other code or packages, or another machine, made some of the pictures.
    """

    name: str
    psnr: float | None
    ssim: float
    feature_distance: float
    fd: float | None
    sfd: float | None
    kd: float | None
    precision: float | None
    recall: float | None
    inception_score: float | None
    clip_score: float | None
    gain: Gain | None
    made_otherwise: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Convert the figures to plain data."""
        return asdict(self)


def check_against(variants: Sequence[Variant], against: Mapping[str, str]) -> None:
    """Check that variants can be compared with each other.

    Raises:
        ValueError: if a name of `against` is no variant, or not compared with an earlier one.
    """
    order = [one.name for one in variants]
    for name, other in against.items():
        if name not in order:
            raise ValueError(f"against: {name} is not known; allowed are {', '.join(order)}")
        if other not in order[: order.index(name)]:
            raise ValueError(
                f"against: {other} is not allowed for {name}, it must come before it among the methods"
            )


def compare(
    pictures: PictureFolder,
    variants: Sequence[Variant],
    extractor: Extractor,
    reference: Reference | None = None,
    clip: ClipScore | None = None,
    against: Mapping[str, str] = MappingProxyType({}),
    on_shard: Callable[[], None] = lambda: None,
) -> list[QualityFigures]:
    """Measure the pictures of all variants; the first is the baseline.

    Measurements of a shard, and of all pictures of a variant together, are kept in its folder, so that a
    killed comparison resumes where it was, with the same figures.

    Args:
        pictures: finished pictures.
        variants: variants to compare.
        extractor: computes features of pictures.
        reference: features of the data; None for those of the baseline's pictures.
        clip: scores pictures with their prompts, if given.
        against: by the name of a variant, an earlier variant that it is compared with too.
        on_shard: called after every shard of every variant.

    Raises:
        ValueError: if a name of `against` is no variant, or not compared with an earlier one.
    """
    check_against(variants, against)
    errors: dict[str, Tensor] = {}
    base: _Seen | None = None
    data: tuple[FeatureSet, FeatureSet] | None = None
    data_key = ""
    out = []
    for one in variants:
        seen = _Seen.of(pictures, one, variants[0], extractor, clip, on_shard)
        base = base or seen
        data = data or (
            base.sets
            if reference is None
            else (FeatureSet(reference.pooled), FeatureSet(reference.spatial))
        )
        data_key = data_key or digest(x.features for x in data)
        errors[one.name] = seen.error
        over = against.get(one.name)
        gain = None if over is None else _gain(over, seen.error, errors[over])
        as_sets = kept(
            pictures.folder_of(one) / "measured" / f"{extractor.name}-all.safetensors",
            f"{_MEASURE} {digest(vars(seen.features).values())} {data_key}",
            partial(_as_sets, seen, data),
        )
        cosine = torch.cosine_similarity(seen.features.pooled.double(), base.features.pooled.double())
        differing = -10 * seen.error[seen.error > 0].log10()
        row = QualityFigures(
            name=one.name,
            psnr=float(differing.quantile(0.5)) if len(differing) else None,
            ssim=float(seen.ssim.mean()),
            feature_distance=float((1 - cosine).mean()),
            clip_score=None if seen.clip is None else float(seen.clip.double().mean()),
            gain=gain,
            made_otherwise=pictures.made_otherwise(one),
            **{name: float(as_sets[name]) if name in as_sets else None for name in _OF_SETS},
        )
        out.append(row)
    return out


def _gain(over: str, own: Tensor, other: Tensor) -> Gain:
    """Compute the mean difference of PSNR, where neither picture equals the baseline's."""
    differ = (own > 0) & (other > 0)
    more = 10 * (other[differ] / own[differ]).log10()
    count = len(more)
    return Gain(
        over,
        float(more.mean()) if count else None,
        float(more.std() / math.sqrt(count)) if count > 1 else None,
    )


@dataclass(frozen=True)
class _Seen:
    """The measurements of the N pictures of a variant."""

    features: PictureFeatures
    error: Tensor
    ssim: Tensor
    clip: Tensor | None

    @cached_property
    def sets(self) -> tuple[FeatureSet, FeatureSet]:
        return FeatureSet(self.features.pooled), FeatureSet(self.features.spatial)

    @classmethod
    def of(
        cls,
        pictures: PictureFolder,
        one: Variant,
        base: Variant,
        extractor: Extractor,
        clip: ClipScore | None,
        on_shard: Callable[[], None],
    ) -> _Seen:
        """Measure a variant, or read its earlier measurements."""
        folder = pictures.folder_of(one) / "measured"
        features, paired, scores = [], [], []
        for number, prompts in pictures.setting.shards():
            own, others = (pictures.shard(variant, number) for variant in (one, base))
            key = f"{_MEASURE} {digest([own])}"
            ending = f"{number:06d}.safetensors"
            found = kept(folder / f"{extractor.name}-{ending}", key, partial(_features, extractor, own))
            features.append(PictureFeatures(**found))
            both = f"{key} {digest([others])}"
            paired.append(kept(folder / f"paired-{ending}", both, partial(_paired, own, others)))
            if clip is not None:
                with_model = f"{key} {clip.key}"
                scores.append(
                    kept(folder / f"clip-{ending}", with_model, partial(_clip, clip, own, prompts))
                )
            on_shard()
        return cls(
            features=PictureFeatures.joined(features),
            error=torch.cat([pair["error"] for pair in paired]),
            ssim=torch.cat([pair["ssim"] for pair in paired]),
            clip=torch.cat([score["clip"] for score in scores]) if scores else None,
        )


def _features(extractor: Extractor, own: Tensor) -> dict[str, Tensor]:
    return dict(vars(extractor(own.float() / 255)))


def _paired(own: Tensor, others: Tensor) -> dict[str, Tensor]:
    """Compare each picture of a shard with the baseline's: mean squared error and SSIM, float64."""
    from skimage.metrics import structural_similarity

    one, other = (x.double() / 255 for x in (own, others))
    likeness = [
        structural_similarity(*(x.permute(1, 2, 0).numpy() for x in pair), channel_axis=2, data_range=1.0)
        for pair in zip(one, other, strict=True)
    ]
    error = (one - other).square().mean((1, 2, 3))
    return {"error": error, "ssim": torch.tensor(likeness, dtype=torch.float64)}


def _clip(clip: ClipScore, own: Tensor, prompts: tuple[str, ...]) -> dict[str, Tensor]:
    return {"clip": clip(own, prompts)}


_OF_SETS = ("fd", "sfd", "kd", "precision", "recall", "inception_score")


def _as_sets(seen: _Seen, data: tuple[FeatureSet, FeatureSet]) -> dict[str, Tensor]:
    """Compute figures of all pictures of a variant together, float64, if there are enough pictures."""
    (own, spatial), (others, others_spatial) = seen.sets, data
    found = {}
    if len(own.features) > 3:
        found["inception_score"] = inception_score(seen.features.logits)
    if min(len(own.features), len(others.features)) > 3:
        found["fd"] = frechet_distance(others, own)
        found["sfd"] = frechet_distance(others_spatial, spatial)
        found["kd"] = kernel_distance(others, own)
        found["precision"], found["recall"] = precision_recall(others, own)
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in found.items()}
