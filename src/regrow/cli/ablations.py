"""The papers' ablations, as lists of variants for ``regrow eval --ablation NAME``."""

from __future__ import annotations

from collections.abc import Mapping

_RATIOS = ("0.3", "0.5", "0.7")

ABLATIONS: Mapping[str, tuple[str, ...]] = {
    "base": tuple(f"sito:d:base={choice}" for choice in ("I", "II", "III", "IV", "V", "VI")),
    "noise": tuple(f"sito:d:noise={sigma}" for sigma in ("0", "0.01", "0.1", "1")),
    "alignment": tuple(
        f"dato:b1:ratio={ratio}:alignment={whose}"
        for ratio in _RATIOS
        for whose in ("off", "conditional", "unconditional", "mean")
    ),
    "score": tuple(
        f"dato:b1:ratio={ratio}:score={score}" for ratio in _RATIOS for score in ("diff", "random")
    ),
    "recovery": tuple(f"sito:{ratio}:recovery={how}" for ratio in _RATIOS for how in ("copy", "mean")),
    "patch": tuple(f"sito:d:patch={side}" for side in (2, 3, 4, 8)),
    "where": (
        "sito:d",
        "sito:d:cross_attention=true",
        "sito:d:feed_forward=true",
        "sito:d:cross_attention=true:feed_forward=true",
    ),
    "levels": tuple(f"sito:d:max_downsample={level}" for level in (1, 2, 4, 8)),
    "steps": tuple(f"steps:{steps}" for steps in (25, 16, 10, 8, 5)),
}
"""SiTo's base choices I to VI and its noise; DaTo's CFG alignment over r, and with or without DiffScore;
prune or merge; patch size; layers; levels; fewer steps."""


def ablated(name: str) -> tuple[str, ...]:
    """The variants of an ablation, the unaccelerated pipeline first.

    Raises:
        ValueError: if there is no such ablation.
    """
    if name not in ABLATIONS:
        raise ValueError(f"ablation: {name!r} is not known; allowed are {', '.join(ABLATIONS)}")
    return ("steps:50", *ABLATIONS[name])
