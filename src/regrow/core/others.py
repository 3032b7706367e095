"""Things that others put on a denoiser, and that limit what its calls may skip."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

# Modules of diffusers whose model hooks skip work.
_CACHES = {
    "pyramid_attention_broadcast": "PyramidAttentionBroadcast",
    "first_block_cache": "FirstBlockCache",
    "faster_cache": "FasterCache",
    "taylorseer_cache": "TaylorSeer",
    "mag_cache": "MagCache",
    "sea_cache": "SeaCache",
    "text_kv_cache": "the text cache",
}


def other_caches(denoiser: nn.Module) -> list[str]:
    """List the caches of diffusers that are on, by name."""
    found = set()
    for module in denoiser.modules():
        registry = module.__dict__.get("_diffusers_hook")
        for hook in () if registry is None else registry.hooks.values():
            home = type(hook).__module__
            if home.startswith("diffusers.hooks."):
                found.add(_CACHES.get(home.rpartition(".")[2], ""))
    return sorted(found - {""})


def attentions_in(denoiser: nn.Module, names: Iterable[str]) -> list[tuple[str, nn.Module]]:
    """List the attentions inside some modules, with their paths.

    Args:
        denoiser: the denoiser.
        names: paths of the modules; "" is the denoiser.
    """
    found = {}
    for name in names:
        for path, module in denoiser.get_submodule(name).named_modules(prefix=name):
            if getattr(module, "processor", None) is not None:
                found[path] = module
    return sorted(found.items())


def keeps_maps(attention: Any) -> bool:
    """Whether the processor of an attention keeps maps for others to read.

    Processors of some pipelines do (self-attention guidance, LEDITS++). A processor from outside diffusers
    is assumed to, if it holds more than numbers and modules.
    """
    processor = attention.processor
    if is_of_diffusers(processor):
        return False
    own = (v for k, v in vars(processor).items() if not isinstance(processor, nn.Module) or k[0] != "_")
    return type(processor).__module__.startswith("diffusers.pipelines.") or not all(
        isinstance(value, _HARMLESS) for value in own
    )


def hooked_by_others(denoiser: nn.Module, names: Iterable[str]) -> str:
    """Find a module, in or among some, with a forward hook of others that reads its output; "" if none."""
    for name in names:
        for path, module in denoiser.get_submodule(name).named_modules(prefix=name):
            if any(not _is_known(hook) for hook in module._forward_hooks.values()):
                return str(path)
    return ""


def wrapped_by_others(denoiser: nn.Module, names: Iterable[str]) -> str:
    """Find a module, in or among some, with a replaced forward method; "" if there is none."""
    for name in names:
        for path, module in denoiser.get_submodule(name).named_modules(prefix=name):
            forward = module.__dict__.get("forward")
            if forward is not None and not _is_known(forward):
                return str(path)
    return ""


def _is_known(function: Any) -> bool:
    """Whether a function is of a library that wraps modules but does not read their outputs."""
    function = getattr(function, "func", getattr(function, "__func__", function))
    home = getattr(function, "__module__", None) or type(function).__module__
    return home.partition(".")[0] in ("torch", "accelerate", "diffusers", "peft", "DeepCache", "regrow")


def is_of_diffusers(processor: Any) -> bool:
    """Whether an attention processor is one of diffusers' models."""
    return type(processor).__module__.startswith(("diffusers.models.", "diffusers.loaders."))


_HARMLESS = (bool, int, float, str, type(None), nn.Module, torch.Tensor, torch.dtype, torch.device)


def grounding_of(denoiser: nn.Module) -> list[Any]:
    """List the layers that attend to boxes (GLIGEN), which can be switched on and off."""
    return [m for m in denoiser.modules() if type(m).__name__ == "GatedSelfAttentionDense"]


def adapter_state(module: nn.Module) -> tuple[Any, ...] | None:
    """Read the state of a module's adapters: active ones, scales, merged or not; None without."""
    layer: Any = module
    if not hasattr(layer, "base_layer") or not hasattr(layer, "scaling"):
        return None
    scaling = tuple(sorted(layer.scaling.items()))
    return tuple(layer.active_adapters), scaling, layer.merged, layer.disable_adapters


def shape_of(denoiser: nn.Module) -> int:
    """Compute a number that changes with the structure of modules and with processors."""
    return hash(tuple(_parts(denoiser)))


def _parts(denoiser: nn.Module) -> Iterator[tuple[Any, ...]]:
    for module in denoiser.modules():
        processor = type(module.__dict__.get("processor"))
        yield type(module), processor, id(module), adapter_state(module)
