"""Choose timesteps for a run with fewer steps, in place of the sampler's own."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from regrow.lab.calibration.positions import denser
from regrow.recover.fit import Array

Timesteps = tuple[float, ...]

DENSER = (1.5, 2.0)
"""How much denser at the start the timesteps are, besides the sampler's own."""
# What Stable Diffusion was trained with, and "Align Your Steps" (arXiv 2404.14507) was found for.
_BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
_TRAINED = 1000


def other_timesteps(pipe: Any, whole: int, steps: int) -> Iterator[tuple[str, Timesteps]]:
    """Timesteps that a pipeline and its sampler take, each with what they are in words.

    They are some of the whole run's, denser at the start; those at noise levels whose logarithms are evenly
    spaced; and those of "Align Your Steps", for the models that these were found for.

    Args:
        pipe: a diffusers pipeline.
        whole: steps of the unaccelerated run.
        steps: fewer ones.
    """
    takers = pipe.scheduler.set_timesteps, pipe.__call__
    takes = all("timesteps" in inspect.signature(taker).parameters for taker in takers)
    # Flow matching with a shift would shift the noise levels of given timesteps, not the timesteps.
    if not takes or pipe.scheduler.config.get("shift", 1.0) != 1.0:
        return
    # Of its own: the pipeline's stays as it is.
    scheduler = copy.deepcopy(pipe.scheduler)
    try:
        scheduler.set_timesteps(whole)
        own = list(dict.fromkeys(scheduler.timesteps.tolist()))
        places = denser(len(own), min(steps, len(own)), DENSER)
        found = {name: tuple(own[i] for i in some) for name, some in places.items()}
        levels = _trained_levels(scheduler)
        if levels is not None:
            found["noise levels even in logarithm"] = log_even(levels, own[0], steps)
            published = align_your_steps(pipe, levels, steps)
            found |= {} if published is None else {"Align Your Steps": published}
        for name, timesteps in found.items():
            scheduler.set_timesteps(timesteps=list(timesteps))
            # Few noise levels may round to the same timestep, and some settings move those that are given.
            if tuple(dict.fromkeys(scheduler.timesteps.tolist())) == timesteps:
                yield name, timesteps
    except (ValueError, TypeError, AttributeError, NotImplementedError):
        # With some settings (Karras' noise levels, dynamic shifting) it takes none after all.
        return


def log_even(levels: Array, first: float, steps: int) -> Timesteps:
    """Timesteps with noise levels that are evenly spaced in their logarithm.

    Args:
        levels: the noise level of every training step, ascending, ``(S,)``.
        first: the timestep to begin with.
        steps: how many.
    """
    begin = float(np.interp(first, np.arange(len(levels)), levels))
    return _at(levels, np.geomspace(begin, levels[0], steps + 1)[:-1])


def align_your_steps(pipe: Any, levels: Array, steps: int) -> Timesteps | None:
    """The timesteps of "Align Your Steps" (arXiv 2404.14507); None for models without published ones.

    They are published for 10 steps. For other numbers the logarithms of the noise levels are interpolated,
    as the authors say.

    Args:
        pipe: its denoiser and scheduler tell the model.
        levels: the noise level of every training step, ascending, ``(S,)``.
        steps: how many.
    """
    family = _family(pipe)
    if family is None or len(levels) != _TRAINED:
        return None
    from diffusers.schedulers import AysSchedules

    tables: Mapping[str, Any] = AysSchedules
    published = tables[f"{family}Timesteps"]
    if steps == len(published):
        return tuple(float(timestep) for timestep in published)
    # The last one is 0, of the picture itself.
    known = [*tables[f"{family}Sigmas"][:-1], levels[0]]
    places = np.linspace(0, len(known) - 1, steps + 1)
    return _at(levels, np.exp(np.interp(places, np.arange(len(known)), np.log(known)))[:-1])


def _family(pipe: Any) -> str | None:
    """What diffusers calls the published noise levels of a pipeline's model."""
    config = pipe.scheduler.config
    known = all(config.get(name) == value for name, value in _BETAS.items())
    unet: Any = getattr(pipe, "unet", None)
    if not known or type(unet).__name__ != "UNet2DConditionModel":
        return None
    return "StableDiffusionXL" if unet.config.addition_embed_type == "text_time" else "StableDiffusion"


def _trained_levels(scheduler: Any) -> Array | None:
    """The noise level of every training step, ascending; None of samplers of flow matching."""
    kept = getattr(scheduler, "alphas_cumprod", None)
    if kept is None or scheduler.config.get("use_flow_sigmas"):
        return None
    kept = np.asarray(kept, dtype=np.float64)
    # Rescaled to end without signal, the last level is infinite.
    return np.sqrt((1 - kept) / np.maximum(kept, 1e-8))


def _at(levels: Array, wanted: ArrayLike) -> Timesteps:
    """The timesteps nearest to noise levels, by their logarithms."""
    places = np.interp(np.log(wanted), np.log(levels), np.arange(len(levels)))
    return tuple(np.round(places).tolist())
