"""Any other denoiser: only its output is known, which can be reused or forecast."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from regrow.models.errors import UnsupportedModelError
from regrow.models.table import OUTPUT, Layout, whole

# Their names in diffusers' denoisers.
SAMPLES = ("hidden_states", "sample", "x", "latents", "x_t")
TIMES = ("timestep", "timesteps", "t", "timestep_ratio", "r")


def output_layout(denoiser: Any) -> Layout:
    """Make the table of a denoiser of which only the output is known.

    Raises:
        UnsupportedModelError: if its forward method takes no latent or no timestep.
    """
    arguments = tuple(inspect.signature(type(denoiser).forward).parameters)[1:]
    return Layout(
        (),
        whole(denoiser),
        (OUTPUT,),
        layers=None,
        head=None,
        sample=_argument(denoiser, arguments, SAMPLES, "latent"),
        time=_argument(denoiser, arguments, TIMES, "timestep"),
        timestep_scale=None,
    )


def _argument(denoiser: Any, arguments: Sequence[str], names: Sequence[str], what: str) -> str:
    found = next((name for name in names if name in arguments), None)
    if found is None:
        raise UnsupportedModelError(
            f"model: {type(denoiser).__name__} is no denoiser such as UNet2DConditionModel: its forward "
            f"method needs an argument for the {what}, named {' or '.join(names)}"
        )
    return found
