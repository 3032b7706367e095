"""The sites in each family of denoisers: a small table for each family."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from regrow.models.errors import UnsupportedModelError
from regrow.models.table import Layout, TokenBlock
from regrow.models.transformer import FAMILIES, transformer_layout
from regrow.models.unet import KNOWN_BLOCKS, unet_layout, unknown_blocks
from regrow.models.unknown import output_layout

__all__ = [
    "Layout",
    "TokenBlock",
    "UnsupportedModelError",
    "denoiser_of",
    "known_layout",
    "layout_of",
    "module_of",
    "other_denoisers",
]

# The denoiser's attribute in pipelines.
DENOISERS = ("unet", "transformer", "prior", "decoder")
# Other denoisers' attributes, in pipelines of several.
OTHERS = ("transformer_2", "unconditional_transformer", "prior_prior")

# Class names, so that no model family is imported before somebody uses it.
_LAYOUTS: Mapping[str, Callable[[Any], Layout | None]] = {
    "UNet2DConditionModel": unet_layout,
    **dict.fromkeys(FAMILIES, transformer_layout),
}


def denoiser_of(target: Any) -> nn.Module:
    """Find the denoiser of a pipeline; a denoiser is returned itself.

    Raises:
        UnsupportedModelError: if there is none.
    """
    module = module_of(target)
    layout_of(module)
    return module


def module_of(target: Any) -> nn.Module:
    """Find the denoiser as `denoiser_of` does, without a check of what its forward method takes.

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
                    "whole, so its calls can't compute less; apply regrow to the model before it is "
                    "compiled, and compile its blocks only: regrow.compile_blocks(model)"
                )
            return module
    raise UnsupportedModelError(
        f"model: {type(target).__name__} has no denoiser; give a denoiser such as a UNet2DConditionModel, "
        f"or a pipeline with one as its {', '.join(DENOISERS[:-1])} or {DENOISERS[-1]}"
    )


def other_denoisers(pipeline: Any, denoiser: nn.Module) -> list[str]:
    """List the attributes of a pipeline that hold other denoisers than this one."""
    held = {name: getattr(pipeline, name, None) for name in (*DENOISERS, *OTHERS)}
    return [name for name, part in held.items() if isinstance(part, nn.Module) and part is not denoiser]


def layout_of(denoiser: nn.Module) -> Layout:
    """Make a denoiser's table; if its family or its U-Net's blocks are unknown, of its output alone.

    Raises:
        UnsupportedModelError: if its forward method takes no latent or no timestep.
    """
    family = next((base.__name__ for base in type(denoiser).__mro__ if base.__name__ in _LAYOUTS), None)
    known = None if family is None else _LAYOUTS[family](denoiser)
    return known or output_layout(denoiser)


def known_layout(denoiser: nn.Module) -> Layout:
    """Make the table of a denoiser whose layers are known.

    Raises:
        UnsupportedModelError: if only its output is known.
    """
    layout = layout_of(denoiser)
    if layout.is_known:
        return layout
    name = type(denoiser).__name__
    told = f"regrow does not know the layers of {name}"
    if name == "UNet2DConditionModel":
        told = (
            f"{name} has blocks that regrow does not know: {', '.join(unknown_blocks(denoiser))} (it knows "
            f"{', '.join(sorted(KNOWN_BLOCKS))})"
        )
    raise UnsupportedModelError(
        f"model: {told}; use spectrum, or a schedule of depths 0 and full, which only reuse or forecast "
        f"its output. Everything else needs one of {', '.join(_LAYOUTS)}"
    )
