"""Spectrum: adaptive spectral feature forecasting (arXiv 2603.01623)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from math import floor
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from regrow.core.recipe import Recipe, recipe_of
from regrow.fields import MOST_CALLS, MOST_WEIGHT, Calls, Share
from regrow.methods.base import About, DenoiserKind, MethodConfig, register
from regrow.recover.time import MOST_ORDER, Chebyshev
from regrow.schedule import HEAD, Spaced
from regrow.space import Searched


@register
class Spectrum(MethodConfig):
    """Forecast what the last block returns, by polynomials of the step.

    1. The first calls are full. Behind them full calls end windows, which grow: they become rarer along the
       run (`full_calls`).
    2. The others forecast what the last block returns from all values that it had, by Chebyshev polynomials
       fitted with a ridge, mixed with the line through the last two (`regrow.recover.time.Chebyshev`).
    3. The head behind the last block is computed in every call.

    Args:
        full: full calls at the beginning (the paper: 5).
        window: of so many calls the last is full, behind these, rounded down (the paper: 2).
        alpha: what each further full call adds to the window (the paper: .75 for 14 full calls of 50, 3 for
            10).
        degree: M of the polynomials (the paper: 4).
        ridge: lambda (the paper: 0.1).
        mix: w, the share of the spectral forecast; the rest is the line through the last two values (the
            paper: 1).
        stop: share of the run from which on all calls are full (the paper: 1).

    Raises:
        pydantic.ValidationError: naming the field, the value and what is allowed.
    """

    ABOUT: ClassVar[About] = About(
        title="Spectrum",
        what="forecast the last block's features by Chebyshev polynomials of the step",
        models="any model",
        paper="arXiv 2603.01623",
        note="of models that regrow does not know it forecasts the output",
        default="quality",
        measured=dict.fromkeys(DenoiserKind, ("quality", "fast")),
        place=64,
    )
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "quality": {"alpha": 0.75},
        "fast": {"alpha": 3.0},
        # What stable-diffusion.cpp and ComfyUI run SDXL with, in 20 to 40 steps.
        "sdxl": {"full": 4, "alpha": 0.5, "degree": 3, "ridge": 1.0, "mix": 0.4, "stop": 0.9},
    }

    method: Literal["spectrum"] = "spectrum"
    full: Calls = 5
    window: Annotated[float, Searched((2.0, 3.0, 4.0))] = Field(2.0, ge=1, le=MOST_CALLS)
    alpha: Annotated[float, Searched((0.0, 0.25, 0.5, 0.75, 1.0, 2.0, 3.0))] = Field(
        0.75, ge=0, le=MOST_CALLS
    )
    degree: Annotated[int, Searched((2, 3, 4))] = Field(4, ge=1, le=MOST_ORDER)
    ridge: Annotated[float, Searched((0.01, 0.1, 1.0))] = Field(0.1, gt=0, le=MOST_WEIGHT)
    mix: Annotated[Share, Searched((0.4, 0.6, 0.8, 1.0))] = 1.0
    stop: Share = 1.0


def full_calls(config: Spectrum, calls: int) -> set[int]:
    """The indices of the full calls: the first ones, then every call that ends a window.

    With s the number of calls since the last full one, a call is full where ``(s + 1) mod floor(ws) = 0``;
    it adds alpha to ws. Those from ``stop`` of the run on are all full.
    """
    full = set(range(min(config.full, calls)))
    window, skipped = config.window, 0
    for call in range(config.full, calls):
        if (skipped + 1) % floor(window) and call < config.stop * calls:
            skipped += 1
        else:
            full.add(call)
            window, skipped = window + config.alpha, 0
    return full


@recipe_of.register
def _(config: Spectrum) -> Recipe:
    forecast = Chebyshev(degree=config.degree, ridge=config.ridge, mix=config.mix)
    return Recipe(Spaced(2, HEAD, partial(full_calls, config), forecast))
