"""The tokens of both halves of a guided batch, aligned: both halves keep the same (DaTo, step 3)."""

from __future__ import annotations

from enum import Enum

from torch import Tensor


class Alignment(str, Enum):
    """The way in which both halves of a guided batch get the same base tokens."""

    CONDITIONAL = "conditional"
    UNCONDITIONAL = "unconditional"
    MEAN = "mean"
    OFF = "off"


def align(score: Tensor, alignment: Alignment, guided: bool, *, conditional_first: bool = False) -> Tensor:
    """Align the scores of both halves of a guided batch (step 3 of DaTo, CFG alignment).

    Equal scores give equal base tokens, so this equals copying the positions of one half to the other; it
    also works for the mean.

    Args:
        score: ``(B, N)``; in a guided batch the unconditional half comes first, as in diffusers.
        alignment: whose scores count.
        guided: whether the batch has two halves; if not, the scores are unchanged.
        conditional_first: the conditional half comes first instead.
    """
    if not guided or alignment is Alignment.OFF:
        return score
    return deciding_half(score, alignment, conditional_first).repeat(2, 1)


def deciding_half(values: Tensor, alignment: Alignment, conditional_first: bool) -> Tensor:
    """Of a guided batch ``(2 B, ...)`` the half, or the mean of both, that decides for both: ``(B, ...)``.

    Args:
        values: of both halves.
        alignment: which; not off.
        conditional_first: the conditional half comes first, not second.
    """
    unconditional, conditional = values.chunk(2)
    if conditional_first:
        unconditional, conditional = conditional, unconditional
    if alignment is Alignment.MEAN:
        return (unconditional + conditional) / 2
    return conditional if alignment is Alignment.CONDITIONAL else unconditional
