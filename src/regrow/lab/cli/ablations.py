"""The papers' ablations, as lists of variants for ``regrow eval --ablation NAME``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain

from regrow.words import offer, shown

_RATIOS = ("0.3", "0.5", "0.7")
# The bundled transformer has six blocks.
_TOKENCACHE = "tokencache:12:last_blocks=1"

Alternatives = tuple[str, ...]
"""Variants that differ in what the ablation is about; the others are compared with the first."""

ABLATIONS: Mapping[str, tuple[Alternatives, ...]] = {
    "base": (tuple(f"sito:d:base={choice}" for choice in ("I", "II", "III", "IV", "V", "VI")),),
    "noise": (tuple(f"sito:d:noise={sigma}" for sigma in ("0", "0.01", "0.1", "1")),),
    "alignment": tuple(
        tuple(
            f"dato:b1:ratio={ratio}:alignment={whose}"
            for whose in ("off", "conditional", "unconditional", "mean")
        )
        for ratio in _RATIOS
    ),
    "score": tuple(
        tuple(f"dato:b1:ratio={ratio}:score={score}" for score in ("random", "diff")) for ratio in _RATIOS
    ),
    "choice": tuple((f"deepcache:{n}+tome:0.5", f"dato:{n}") for n in (2, 3, 5, 7, 10)),
    "recovery": tuple(
        tuple(f"sito:{ratio}:recovery={how}" for how in ("copy", "mean")) for ratio in _RATIOS
    ),
    "patch": (tuple(f"sito:d:patch={side}" for side in (2, 3, 4, 8)),),
    "where": (
        (
            "sito:d",
            "sito:d:cross_attention=true",
            "sito:d:feed_forward=true",
            "sito:d:self_attention=false:cross_attention=true",
            "sito:d:self_attention=false:feed_forward=true",
            "sito:d:cross_attention=true:feed_forward=true",
        ),
    ),
    "levels": (tuple(f"sito:d:max_downsample={level}" for level in (1, 2, 4, 8)),),
    "cat": (
        tuple(f"cat:0.3:choice={choice}" for choice in ("rows", "noise", "clusters")),
        *((f"cat:{alpha}:choice=clusters", f"cat:released:alpha={alpha}") for alpha in ("0.3", "0.5")),
    ),
    "steps": (tuple(f"steps:{steps}" for steps in (25, 16, 10, 8, 5)),),
    "predictor": tuple(
        tuple(
            f"{_TOKENCACHE}:ratio={ratio}:choice={choice}"
            for choice in ("predictor", "random", "toca", "tome")
        )
        for ratio in ("0.7", "0.9")
    ),
    "ratio": (tuple(f"{_TOKENCACHE}:ratio={ratio}" for ratio in (0.9, 0.5, 0.6, 0.7, 0.8, 1.0)),),
    "spacing": (tuple(f"{_TOKENCACHE}:spacing={how}" for how in ("adaptive", "uniform", "reverse")),),
    "blocks": (tuple(f"tokencache:12:last_blocks={count}" for count in (1, 0, 2, 3)),),
}
"""SiTo's base choices I to VI and its noise; DaTo's CFG alignment over r, with or without DiffScore, and
its choice of tokens against ToMeSD's in the same calls; prune or merge; patch size; layers; levels; CAT
Pruning's choice of tokens, and how its clusters choose; fewer steps; TokenCache's choice of tokens, r,
I-steps and K (its tables VI to IX)."""


def alternatives(name: str) -> tuple[Alternatives, ...]:
    """What an ablation compares.

    Raises:
        ValueError: if there is no such ablation.
    """
    if name not in ABLATIONS:
        raise ValueError(
            f"ablation: {shown(name)} is not known; allowed are {', '.join(ABLATIONS)}"
            f"{offer(name, ABLATIONS)}"
        )
    return ABLATIONS[name]


def ablated(name: str, steps: int) -> tuple[str, ...]:
    """The variants of an ablation, the unaccelerated pipeline first; see `alternatives`."""
    first = f"steps:{steps}"
    return tuple(dict.fromkeys((first, *chain(*alternatives(name)))))


def against(name: str | None, steps: int, pairs: Iterable[str] = ()) -> dict[str, str]:
    """The variant that each one is compared with picture by picture.

    Args:
        name: of an ablation, whose alternatives are compared with the first; see `alternatives`.
        steps: of the unaccelerated pipeline.
        pairs: more, each as ``ONE,OTHER``.

    Raises:
        ValueError: if one is no pair, or would be compared with two.
    """
    found: dict[str, str] = {}
    for first, *others in () if name is None else alternatives(name):
        found |= {one: first for one in others if one != f"steps:{steps}"}
    for text in pairs:
        names = [word.strip() for word in text.split(",")]
        if len(names) != 2 or not all(names):
            raise ValueError(f"--against: {text!r} is not allowed, it must be two methods, a comma between")
        one, other = names
        if found.setdefault(one, other) != other:
            raise ValueError(f"--against: {one} is compared with {found[one]}, not with {other} too")
    return found
