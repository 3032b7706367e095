"""Find how much each output of the denoiser moves the final latent, with the network frozen."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import numpy as np
import torch

from regrow.recover.fit import Array

# Small enough that no sampler clips what it makes of it.
_SIZE = 1e-3
# Float32 in the sampler's own arithmetic.
_TOLERANCE = 1e-2
_SEED = 0


def influence(scheduler: Any, begin: int = 0, end: int | None = None) -> Array:
    """The derivative of the final latent in the output of each call, ``(T,)``.

    A copy of the scheduler runs on numbers, one row a call: in row i the output of call i is not 0. It
    runs again with all outputs 0 and the same noise, and the rows are subtracted. For samplers that are
    linear in the outputs (DDIM, Euler, DPM-Solver++, UniPC, flow matching) that is exact.

    Args:
        scheduler: its timesteps are set, and it has not stepped since; it is left as it is.
        begin: index of the first timestep that is run; above 0 in image-to-image.
        end: index behind the last one; None for all.

    Raises:
        ValueError: if its timesteps are not set, or it is not linear in the outputs.
    """
    part = slice(begin, end)
    calls = len(scheduler.timesteps[part])
    if getattr(scheduler, "num_inference_steps", None) is None or not calls:
        raise ValueError(f"scheduler: the timesteps of {type(scheduler).__name__} are not set")
    zero, outputs = torch.zeros(calls, calls), torch.eye(calls) * _SIZE
    nothing, once, twice = (_final(scheduler, part, x) for x in (zero, outputs, 2 * outputs))
    found = (once - nothing) / _SIZE
    if not np.allclose(twice - nothing, 2 * _SIZE * found, rtol=_TOLERANCE, atol=_TOLERANCE * _SIZE):
        raise ValueError(
            f"scheduler: {type(scheduler).__name__} with these settings is not linear in the outputs of "
            "the denoiser"
        )
    return found


def _final(scheduler: Any, part: slice, outputs: torch.Tensor) -> Array:
    """The final latent of each row.

    Args:
        scheduler: that has not stepped.
        part: of its timesteps, T that are run.
        outputs: ``(T, rows)``, of each call.
    """
    own = copy.deepcopy(scheduler)
    # A step that somebody gave the scheduler moves that scheduler, not its copy.
    vars(own).pop("step", None)
    # Some keep their noise levels where the pipeline is.
    for name, value in list(vars(own).items()):
        if isinstance(value, torch.Tensor) and not value.is_meta:
            setattr(own, name, value.cpu())
    given = {"generator": torch.Generator().manual_seed(_SEED)}
    known = {name: value for name, value in given.items() if name in inspect.signature(own.step).parameters}
    sample = torch.zeros(outputs.shape[1], 1, 1, 1, dtype=torch.float64)
    for output, timestep in zip(outputs.to(sample), own.timesteps[part], strict=True):
        own.scale_model_input(sample, timestep) if hasattr(own, "scale_model_input") else None
        sample = own.step(output.view_as(sample), timestep, sample, **known, return_dict=False)[0]
    return sample.flatten().double().cpu().numpy()
