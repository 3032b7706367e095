"""The steps of a sampler as training sees them: noise to a step, and from a step to the next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from regrow.lab.measure.x0 import noise_level, prediction_type

PREDICTIONS = ("epsilon", "v_prediction", "sample")
FLOW = "flow_prediction"


@dataclass(frozen=True, eq=False)
class Steps:
    """The S steps of DDIM (Song et al., 2010.02502) in which ``x_t = alpha x_0 + sigma noise``.

    With flow matching, where ``alpha = 1 - sigma``, they are Euler's.

    Args:
        times: ``(S,)``, timesteps of the denoiser, the noisiest first.
        alpha: ``(S,)``.
        sigma: ``(S,)``.
        prediction: what the denoiser predicts.
    """

    times: Tensor
    alpha: Tensor
    sigma: Tensor
    prediction: str

    @classmethod
    def of(cls, scheduler: Any, count: int) -> Self:
        """So many steps with a scheduler's noise levels.

        Raises:
            ValueError: if the scheduler has none of these, or noise levels that depend on the size.
        """
        from diffusers import DDIMScheduler

        prediction = prediction_type(scheduler)
        flows = prediction == FLOW and _flows(scheduler)
        if not flows and ("beta_schedule" not in scheduler.config or prediction not in PREDICTIONS):
            raise ValueError(
                f"model: the scheduler {type(scheduler).__name__} ({prediction}) is not allowed in "
                f"training, it must have betas and predict one of {', '.join(PREDICTIONS)}, or be of flow "
                "matching with noise levels that don't depend on the picture's size"
            )
        own: Any = (type(scheduler) if flows else DDIMScheduler).from_config(scheduler.config)
        own.set_timesteps(count)
        if not flows:
            share = own.alphas_cumprod[own.timesteps].double()
            return cls(own.timesteps, share.sqrt(), (1 - share).sqrt(), prediction)
        levels = [noise_level(own, time, index) for index, time in enumerate(own.timesteps)]
        pairs = torch.tensor([(level.alpha, level.sigma) for level in levels], dtype=torch.float64)
        return cls(own.timesteps, pairs[:, 0], pairs[:, 1], FLOW)

    def __len__(self) -> int:
        return len(self.times)

    def noised(self, x0: Tensor, noise: Tensor, index: Tensor) -> Tensor:
        """x at step number ``index`` ``(B,)`` of x_0 ``(B, ...)``."""
        return self._at(self.alpha, index, x0) * x0 + self._at(self.sigma, index, x0) * noise

    def next(self, x: Tensor, output: Tensor, index: Tensor) -> Tensor:
        """x at step number ``index + 1`` from that at ``index`` and the denoiser's output there."""
        alpha, sigma = self._at(self.alpha, index, x), self._at(self.sigma, index, x)
        match self.prediction:
            case "epsilon":
                x0 = (x - sigma * output) / alpha
            case "v_prediction":
                x0 = alpha * x - sigma * output
            case "flow_prediction":
                x0 = x - sigma * output
            case _:
                x0 = output
        return self.noised(x0, (x - alpha * x0) / sigma, index + 1)

    @staticmethod
    def _at(values: Tensor, index: Tensor, like: Tensor) -> Tensor:
        """The values of steps ``(B,)``, in the form of a batch."""
        chosen = values[index.cpu()].to(like.device, like.dtype)
        return chosen.reshape(-1, *(1,) * (like.ndim - 1))


def _flows(scheduler: Any) -> bool:
    """Whether ``x_t = (1 - sigma) x_0 + sigma noise``, with one sigma a step for pictures of any size."""
    config = scheduler.config
    named = type(scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
    return (named or config.get("use_flow_sigmas", False)) and not config.get("use_dynamic_shifting", False)
