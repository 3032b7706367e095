"""Where the places are in each family of denoisers: a small table a family."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from regrow.models.errors import UnsupportedModelError
from regrow.models.table import Layout, TokenBlock
from regrow.models.transformer import FAMILIES, transformer_layout
from regrow.models.unet import unet_layout

__all__ = ["Layout", "TokenBlock", "UnsupportedModelError", "denoiser_of", "layout_of", "module_of"]

# What pipelines call them.
DENOISERS = ("unet", "transformer")

# Class names, so that no model family is imported before somebody uses it.
_LAYOUTS: Mapping[str, Callable[[Any], Layout]] = {
    "UNet2DConditionModel": unet_layout,
    **dict.fromkeys(FAMILIES, transformer_layout),
}


def denoiser_of(target: Any) -> nn.Module:
    """The denoiser of a pipeline, or the denoiser itself.

    Raises:
        UnsupportedModelError: if there is none that regrow knows.
    """
    module = module_of(target)
    layout_of(module)
    return module


def module_of(target: Any) -> nn.Module:
    """The same of any diffusers pipeline, whether regrow knows its denoiser or not.

    Raises:
        UnsupportedModelError: if there is none, or it is compiled as a whole.
    """
    candidates: Sequence[Any] = [target]
    if not isinstance(target, nn.Module):
        candidates = [getattr(target, name, None) for name in DENOISERS]
    for module in candidates:
        if isinstance(module, nn.Module):
            if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
                raise UnsupportedModelError(
                    f"model: {type(getattr(module, '_orig_mod', module)).__name__} is compiled as a "
                    "whole, so what a call computes can't change from step to step; apply regrow to "
                    "the plain model and compile its blocks: regrow.compile_blocks(model)"
                )
            return module
    raise UnsupportedModelError(
        f"model: {type(target).__name__} has no denoiser that is supported; supported are pipelines "
        f"with, or instances of, {', '.join(_LAYOUTS)}"
    )


def layout_of(denoiser: nn.Module) -> Layout:
    """The table of a denoiser.

    Raises:
        UnsupportedModelError: if regrow has no table for its class.
    """
    for base in type(denoiser).__mro__:
        if base.__name__ in _LAYOUTS:
            return _LAYOUTS[base.__name__](denoiser)
    raise UnsupportedModelError(
        f"model: {type(denoiser).__name__} is not supported; supported are {', '.join(_LAYOUTS)}"
    )
