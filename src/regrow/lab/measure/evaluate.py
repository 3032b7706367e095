"""Pictures of many prompts by many methods, made once however often the run is killed, and compared."""

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
from regrow.lab.measure.extractors import Extractor, Features
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

# Goes up with every change of how pictures, or sets of them, are measured, the formulas of quality.py
# included: no older figure must be taken for a new one.
_MEASURE = 1


@dataclass(frozen=True)
class Setting:
    """What pictures are made of, apart from the method.

    Args:
        model: name, folder or hub id.
        prompts: one a picture; picture i has seed ``seed + i``.
        seed: of the first picture.
        scheduler: as `Sampler.parse` takes it; None for the model's own.
        guidance: guidance scale; None for the pipeline's own.
        height: in pixels; None for the model's own.
        width: likewise.
        dtype: of the weights.
        model_key: of the model, where it is bundled or in a folder; empty for one of the hub.
        shard: pictures made in one batch and kept in one file. The batch a picture is made in may change
            its last bits, so a killed run repeats whole shards.
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
        """One batch of pictures of some of the prompts, each from its own seed.

        Args:
            pipeline: of the model.
            start: the first prompt.
            stop: behind the last prompt.
            steps: sampler steps.
            options: others of `sampling.make`.
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
        """The number of each shard and its prompts."""
        for number, start in enumerate(range(0, len(self.prompts), self.shard)):
            yield number, self.prompts[start : start + self.shard]


@dataclass(frozen=True)
class Shard:
    """A batch of pictures to be made.

    Args:
        variant: by which method.
        number: of the shard.
        prompts: of its pictures.
    """

    variant: Variant
    number: int
    prompts: tuple[str, ...]


class ShardMaker:
    """Makes shards.

    Args:
        setting: of all shards.
        pipeline: of the setting's model.
    """

    def __init__(self, setting: Setting, pipeline: Any) -> None:
        # At once: files may change while pictures are made.
        self.setting, self.pipeline = setting, pipeline
        self.maker = maker_key(pipeline.device)

    def __call__(self, shard: Shard) -> bytes:
        """The content of the shard's file: its pictures, uint8 ``(B, 3, H, W)``, and seconds, ``(1,)``; as
        metadata `maker_key` of what made them."""
        one, start = shard.variant, shard.number * self.setting.shard
        try:
            # Anew for each shard: what a method keeps must not pass from one to the next.
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


class Pictures:
    """The pictures of a setting in a folder, a subfolder for each variant.

    Args:
        folder: made with the first pictures; that of an earlier run with the same setting is gone on with.
            The prompts may be more or fewer than then if one list begins the other with whole shards.
        setting: what the pictures are made of.
        device: that makes what is missing. Pictures of another kind of device can be compared, but not
            gone on with: they are rounded otherwise, and methods may draw otherwise.

    Attributes:
        setting: with the model's key, if only the folder knows it.

    Raises:
        ValueError: if the folder belongs to another setting or can't be written, the fewer prompts end
            within a shard, or there is nothing to make.
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
            # Not there in older folders.
            made_on = before.pop("device", made_on)
            shorter, longer = sorted((theirs, now["prompts"]), key=len)
            if longer[: len(shorter)] == shorter:
                before["prompts"] = now["prompts"] = longer
            # Empty where the model is not at hand, and in folders from before it was kept.
            before["model_key"] = before.get("model_key") or now["model_key"]
            now["model_key"] = now["model_key"] or before["model_key"]
            for name, value in now.items():
                if before.get(name) != value:
                    raise ValueError(
                        f"{name}: the pictures in {folder} were made with another one; use another folder"
                    )
            if len(shorter) < len(longer) and len(shorter) % setting.shard:
                raise ValueError(
                    f"prompts: {len(shorter)} and {len(longer)} can't share {folder}, the fewer must fill "
                    f"whole batches of {setting.shard}"
                )
        self._described = now | {"device": made_on}
        self.setting = replace(setting, model_key=now["model_key"])

    def missing(self, one: Variant) -> list[tuple[int, tuple[str, ...]]]:
        """The shards of a variant that are not made yet.

        Raises:
            ValueError: if the folder holds pictures of another configuration under this name, or some are
                missing and the others were made on another kind of device.
        """
        self._check_configuration(one)
        found = [(n, prompts) for n, prompts in self.setting.shards() if not self._file(one, n).exists()]
        if found and self.device.type != self._described["device"]:
            raise ValueError(
                f"device: {self.device.type} is not allowed for what is missing of {one.name}, the "
                f"pictures in {self.folder} were made on {self._described['device']}; use another folder"
            )
        return found

    def made_otherwise(self, one: Variant) -> bool:
        """Whether other code or packages, or another machine, made some of the pictures of a variant.

        Pictures that do not say what made them count as such.
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
        """Make what is missing of a variant in this process.

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
        """Make what is missing.

        Args:
            workers: of `ShardMaker` with this setting. The files are written here, where this folder is.
            variants: what to make pictures of.
            on_shard: called after every shard with its variant.

        Raises:
            ValueError: if the folder holds pictures of another configuration under a variant's name.
        """
        jobs = [Shard(one, number, prompts) for one in variants for number, prompts in self.missing(one)]
        # Ended early, the first prompts are done by all variants.
        jobs.sort(key=lambda job: job.number)
        described: set[str] = set()
        for index, content in workers.run(jobs):
            job = jobs[index]
            if job.variant.name not in described:
                # Not before there is a picture: what can't be made leaves nothing behind.
                self._describe(job.variant)
                described.add(job.variant.name)
            write_whole(self._file(job.variant, job.number), partial(Path.write_bytes, data=content))
            on_shard(job.variant)

    def of(self, one: Variant) -> Iterator[Tensor]:
        """The pictures of a variant in order, a shard at a time: ``(B, 3, H, W)`` in [0, 1]."""
        for number, _ in self.setting.shards():
            yield self.shard(one, number).float() / 255

    def shard(self, one: Variant, number: int) -> Tensor:
        """The pictures of one shard: uint8 ``(B, 3, H, W)``."""
        with opened_kept(self._file(one, number)) as opened:
            return opened.get_tensor("pictures")

    def seconds(self, one: Variant) -> float:
        """Median seconds a picture, over the shards; of a machine that may have done other things."""
        each = []
        for number, _ in self.setting.shards():
            with opened_kept(self._file(one, number)) as opened:
                each.append(float(opened.get_tensor("seconds")) / len(opened.get_tensor("pictures")))
        return statistics.median(each)

    def folder_of(self, one: Variant) -> Path:
        """Where a variant's pictures are kept, and what was measured on them."""
        return self.folder / re.sub(r"[^\w.+-]", "-", one.name)

    def _file(self, one: Variant, number: int) -> Path:
        return self.folder_of(one) / f"{number:06d}.safetensors"

    def _check_configuration(self, one: Variant) -> None:
        """Refuse pictures of another configuration under a variant's name."""
        file = self.folder_of(one) / "variant.json"
        if not file.exists():
            return
        before = read_kept(file, "remove its folder, and the pictures are made again")
        # Names of what made equal pictures, in older folders.
        before.pop("alike", None)
        if before != self._of(one):
            raise ValueError(
                f"methods: {file.parent} holds pictures of another {one.name}; use another folder"
            )

    def _of(self, one: Variant) -> dict[str, Any]:
        """A variant as plain data."""
        return json.loads(json.dumps({"name": one.name, "steps": one.steps, "config": one.settings()}))

    def _describe(self, one: Variant) -> None:
        """Write setting and configuration beside a variant's pictures."""
        folder = self.folder_of(one)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "setting.json", self._described)
        write_json(folder / "variant.json", self._of(one))


@dataclass(frozen=True)
class Gain:
    """How much nearer to the baseline's pictures a variant comes than another, picture by picture.

    Args:
        over: name of the other variant.
        psnr: mean of what its PSNR has more, dB, over the prompts for which neither's picture equals the
            baseline's; None if there is none.
        error: standard error of that mean; None with fewer than two of them.
    """

    over: str
    psnr: float | None
    error: float | None


@dataclass(frozen=True)
class Quality:
    """How far a variant's pictures are from others; ``None`` where there are too few pictures.

    Args:
        name: of the variant.
        psnr: median over the pictures, dB, to the baseline's picture of the same seed; None if all equal.
        ssim: mean, likewise.
        feature_distance: mean of 1 - cosine of the features, likewise.
        fd: Fréchet distance of the features to the reference.
        sfd: Fréchet distance of the spatial features to the reference.
        kd: kernel distance of the features to the reference.
        precision: share of pictures within the reference's manifold.
        recall: share of the reference within the pictures' manifold.
        inception_score: the Inception Score's formula on the extractor's classifier; needs no reference.
        clip_score: mean of `ClipScore` over the pictures; None if it was not asked for.
        gain: over the variant that it was to be compared with, if any.
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
        """Everything as plain data."""
        return asdict(self)


def check_against(variants: Sequence[Variant], against: Mapping[str, str]) -> None:
    """Look whether variants can be compared with each other.

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
    pictures: Pictures,
    variants: Sequence[Variant],
    extractor: Extractor,
    reference: Reference | None = None,
    clip: ClipScore | None = None,
    against: Mapping[str, str] = MappingProxyType({}),
    on_shard: Callable[[], None] = lambda: None,
) -> list[Quality]:
    """Measure the pictures of all variants; the first is the baseline.

    What is measured on a shard, and on all of a variant's pictures as a set, is kept beside them, so that a
    killed comparison goes on where it was, with the same figures.

    Args:
        pictures: made already.
        variants: what to compare.
        extractor: features of pictures.
        reference: features of the data; those of the baseline's pictures if None.
        clip: scores pictures with their prompts, if given.
        against: by names of variants, an earlier one that each is compared with as well.
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
        row = Quality(
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
    """Mean difference of PSNR, where neither picture equals the baseline's."""
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
    """What was measured on the N pictures of a variant."""

    features: Features
    error: Tensor
    ssim: Tensor
    clip: Tensor | None

    @cached_property
    def sets(self) -> tuple[FeatureSet, FeatureSet]:
        return FeatureSet(self.features.pooled), FeatureSet(self.features.spatial)

    @classmethod
    def of(
        cls,
        pictures: Pictures,
        one: Variant,
        base: Variant,
        extractor: Extractor,
        clip: ClipScore | None,
        on_shard: Callable[[], None],
    ) -> _Seen:
        """Measure a variant, or read what was measured before."""
        folder = pictures.folder_of(one) / "measured"
        features, paired, scores = [], [], []
        for number, prompts in pictures.setting.shards():
            own, others = (pictures.shard(variant, number) for variant in (one, base))
            key = f"{_MEASURE} {digest([own])}"
            ending = f"{number:06d}.safetensors"
            found = kept(folder / f"{extractor.name}-{ending}", key, partial(_features, extractor, own))
            features.append(Features(**found))
            both = f"{key} {digest([others])}"
            paired.append(kept(folder / f"paired-{ending}", both, partial(_paired, own, others)))
            if clip is not None:
                with_model = f"{key} {clip.key}"
                scores.append(
                    kept(folder / f"clip-{ending}", with_model, partial(_clip, clip, own, prompts))
                )
            on_shard()
        return cls(
            features=Features.joined(features),
            error=torch.cat([pair["error"] for pair in paired]),
            ssim=torch.cat([pair["ssim"] for pair in paired]),
            clip=torch.cat([score["clip"] for score in scores]) if scores else None,
        )


def _features(extractor: Extractor, own: Tensor) -> dict[str, Tensor]:
    return dict(vars(extractor(own.float() / 255)))


def _paired(own: Tensor, others: Tensor) -> dict[str, Tensor]:
    """Each picture of a shard beside the baseline's: mean squared error and SSIM, float64."""
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
    """Figures of all pictures of a variant together, scalars in float64; those there are enough for."""
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
