"""What a search minimises: how far plans are from the unaccelerated run, and what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

from regrow.words import offer, shown


class Quality(str, Enum):
    """How good a plan's pictures are."""

    DEVIATION = "deviation"
    """Mean absolute error of the last latents to those of the unaccelerated run of the same seed. The
    default: it needs no decoder and no other network, is defined for each picture by itself, and can be
    read while a generation runs. (TokenCache's figure 10 draws it over the steps.)"""
    PSNR = "psnr"
    """Of each picture to the unaccelerated one of the same seed, dB, at most 100; the mean."""
    FEATURES = "features"
    """1 - cosine of both pictures' EfficientNet-Lite0 features, the mean."""
    FD = "fd"
    """Fréchet distance of these features to those of the unaccelerated pictures. It is one figure of all
    pictures together, and means little for few of them."""
    CLIP = "clip"
    """CLIP score of the pictures with their prompts."""
    IMAGE_REWARD = "imagereward"
    """ImageReward of the pictures with their prompts; needs its package, which pins old libraries."""

    @property
    def higher_is_better(self) -> bool:
        return self in (Quality.PSNR, Quality.CLIP, Quality.IMAGE_REWARD)

    @property
    def needs_pictures(self) -> bool:
        """Whether latents must be decoded."""
        return self is not Quality.DEVIATION

    @property
    def by_picture(self) -> bool:
        """Whether each picture has a figure of its own, so that more of them sharpen the mean."""
        return self is not Quality.FD


class Cost(str, Enum):
    """What a plan takes."""

    MACS = "macs"
    """MACs of the denoiser, as a share of the unaccelerated run: exact, and known beforehand."""
    LATENCY = "latency"
    """Time of a generation, as a share of the unaccelerated run: medians of runs in turns."""
    MEMORY = "memory"
    """Peak memory of a generation, MiB above what was in use before."""

    @property
    def higher_is_better(self) -> bool:
        return False


Objective = Quality | Cost


def objective(text: str) -> Objective:
    """An objective by its name, such as ``quality:deviation`` or ``cost:macs``.

    Raises:
        ValueError: if there is no such objective.
    """
    kind, _, name = text.partition(":")
    for label, values in (("quality", Quality), ("cost", Cost)):
        if kind == label and name in {v.value for v in values}:
            return values(name)
    known = [f"quality:{q.value}" for q in Quality] + [f"cost:{c.value}" for c in Cost]
    raise ValueError(
        f"objective: {shown(text)} is not known; allowed are {', '.join(known)}{offer(text, known)}"
    )


def check_objectives(objectives: Sequence[Objective]) -> None:
    """Refuse what could only be won by doing nothing, or everything.

    Raises:
        ValueError: if there is not at least one of each kind, or one is given twice.
    """
    if len(set(objectives)) != len(objectives):
        raise ValueError("objective: one is given twice")
    for kind, name in ((Quality, "quality"), (Cost, "cost")):
        if not any(isinstance(o, kind) for o in objectives):
            raise ValueError(f"objective: there must be at least one of {name}:..., got none")


def minimised(kind: Objective, value: float) -> float:
    """A value so that less is better."""
    return -value if kind.higher_is_better else value


def label(kind: Objective) -> str:
    """The name that `objective` reads."""
    return f"{'quality' if isinstance(kind, Quality) else 'cost'}:{kind.value}"
