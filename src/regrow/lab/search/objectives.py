"""The objectives of a search: how far plans are from the unaccelerated run, and what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

from regrow.words import offer, shown


class Quality(str, Enum):
    """A measure of a plan's pictures."""

    DEVIATION = "deviation"
    """Mean absolute error of the last latents to those of the unaccelerated run of the same seed. The
    default: it needs no decoder and no other network, is defined for each single picture, and can be read
    while a generation runs. (TokenCache's figure 10 shows it over the steps.)"""
    PSNR = "psnr"
    """PSNR of each picture to the unaccelerated one of the same seed, dB, at most 100; the mean."""
    FEATURES = "features"
    """1 - cosine of both pictures' EfficientNet-Lite0 features, the mean."""
    FD = "fd"
    """Fréchet distance of these features to those of the unaccelerated pictures. It is one figure for all
    pictures together, and means little for few pictures."""
    CLIP = "clip"
    """CLIP score of the pictures with their prompts."""
    IMAGE_REWARD = "imagereward"
    """ImageReward of the pictures with their prompts; its package needs old libraries."""

    @property
    def higher_is_better(self) -> bool:
        return self in (Quality.PSNR, Quality.CLIP, Quality.IMAGE_REWARD)

    @property
    def needs_pictures(self) -> bool:
        """Whether latents must be decoded."""
        return self is not Quality.DEVIATION

    @property
    def by_picture(self) -> bool:
        """Whether each picture has its own figure, so that more pictures make the mean more exact."""
        return self is not Quality.FD


class Cost(str, Enum):
    """A cost of a plan."""

    MACS = "macs"
    """MACs of the denoiser, as a share of the unaccelerated run: exact, and known without a run."""
    LATENCY = "latency"
    """Time of a generation, as a share of the unaccelerated run: medians of alternating runs."""
    MEMORY = "memory"
    """Peak memory of a generation, in MiB above the memory in use before."""

    @property
    def higher_is_better(self) -> bool:
        return False


Objective = Quality | Cost


def objective(text: str) -> Objective:
    """Look up an objective by its name, such as ``quality:deviation`` or ``cost:macs``.

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
    """Refuse objectives of one kind only: doing nothing, or everything, would always win.

    Raises:
        ValueError: if there is not at least one of each kind, or one is given twice.
    """
    if len(set(objectives)) != len(objectives):
        raise ValueError("objective: one is given twice; give each once")
    for kind, name in ((Quality, "quality"), (Cost, "cost")):
        if not any(isinstance(o, kind) for o in objectives):
            raise ValueError(f"objective: there is none of {name}:..., give at least one of {name}:...")


def minimised(kind: Objective, value: float) -> float:
    """Change the sign of a value if higher is better, so that less is better."""
    return -value if kind.higher_is_better else value


def label(kind: Objective) -> str:
    """The name that `objective` reads."""
    return f"{'quality' if isinstance(kind, Quality) else 'cost'}:{kind.value}"
