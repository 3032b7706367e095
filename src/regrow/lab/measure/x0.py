"""Compute the x_0 that a sampler expects at a step, from x_t and the denoiser's guided output."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import Any

from torch import Tensor

# Class names, so that schedulers which are not installed cause no error.
_BY_ALPHAS = ("DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "LCMScheduler", "TCDScheduler")
_BY_SIGMAS = (
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
)
_UNSCALED = (
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
)
_FLOW = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
_PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow_prediction")


@dataclass(frozen=True)
class NoiseLevel:
    """The share of noise in ``x_t = alpha x_0 + sigma noise``."""

    alpha: float
    sigma: float


def unknown_x0(scheduler: Any) -> str | None:
    """Say why the x_0 of a scheduler is not known; None if it is."""
    name = type(scheduler).__name__
    if name not in (*_BY_ALPHAS, *_BY_SIGMAS, *_UNSCALED, *_FLOW):
        return f"the noise levels of {name} are not known to regrow"
    if prediction_type(scheduler) not in _PREDICTIONS:
        return f"prediction_type {prediction_type(scheduler)!r} is not known to regrow"
    return None


def prediction_type(scheduler: Any) -> str:
    """Name what the denoiser predicts; for flow-matching schedulers without a setting it is the flow."""
    default = "flow_prediction" if type(scheduler).__name__ in _FLOW else "epsilon"
    return str(scheduler.config.get("prediction_type", default))


def noise_level(scheduler: Any, timestep: Any, index: int) -> NoiseLevel:
    """Compute the noise level of the x_t that the denoiser gets.

    Args:
        scheduler: a scheduler with timesteps, for which `unknown_x0` is None.
        timestep: timestep of the step.
        index: index of the step in the scheduler's timesteps.
    """
    name = type(scheduler).__name__
    if name in _BY_ALPHAS:
        share = float(scheduler.alphas_cumprod[int(timestep)])
        return NoiseLevel(sqrt(share), sqrt(1 - share))
    sigma = float(scheduler.sigmas[index])
    if name in _UNSCALED:
        return NoiseLevel(1.0, sigma)
    if name in _FLOW or scheduler.config.get("use_flow_sigmas", False):
        return NoiseLevel(1 - sigma, sigma)
    scale = 1 / sqrt(sigma**2 + 1)
    return NoiseLevel(scale, sigma * scale)


def predicted_x0(x: Tensor, output: Tensor, level: NoiseLevel, prediction: str) -> Tensor:
    """Compute the x_0 that follows from the denoiser's output, before any clipping or thresholding.

    Divided by n, where ``n^2 = alpha^2 + sigma^2``, every sampler's x_t has unit variance; with x, alpha
    and sigma divided, ``v = alpha noise - sigma x_0`` (Salimans and Ho, 2202.00512, eq. 11).

    Args:
        x: x_t ``(B, C, H, W)``.
        output: the denoiser's output, after guidance, of the same shape.
        level: noise level of ``x``.
        prediction: ``"epsilon"``, ``"v_prediction"``, ``"sample"`` or ``"flow_prediction"``.

    Raises:
        ValueError: if the prediction is none of these.
    """
    norm = sqrt(level.alpha**2 + level.sigma**2)
    match prediction:
        case "epsilon":
            return (x - level.sigma * output) / level.alpha
        case "v_prediction":
            return level.alpha / norm**2 * x - level.sigma / norm * output
        case "sample":
            return output
        case "flow_prediction":
            return x - level.sigma * output
        case _:
            raise ValueError(
                f"prediction: {prediction!r} is not allowed; allowed are {', '.join(_PREDICTIONS)}"
            )
