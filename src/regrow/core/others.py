"""What others have put on a denoiser that changes what its calls may leave out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

# Of diffusers, the modules whose model hooks leave out work.
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
    """The caches of diffusers that are on, by name."""
    found = set()
    for module in denoiser.modules():
        registry = module.__dict__.get("_diffusers_hook")
        for hook in () if registry is None else registry.hooks.values():
            home = type(hook).__module__
            if home.startswith("diffusers.hooks."):
                found.add(_CACHES.get(home.rpartition(".")[2], ""))
    return sorted(found - {""})


def attentions_in(denoiser: nn.Module, names: Iterable[str]) -> list[tuple[str, nn.Module]]:
    """The attentions within some modules, with their paths.

    Args:
        denoiser: the denoiser.
        names: paths of the modules; "" is the whole.
    """
    found = {}
    for name in names:
        for path, module in denoiser.get_submodule(name).named_modules(prefix=name):
            if getattr(module, "processor", None) is not None:
                found[path] = module
    return sorted(found.items())


def keeps_maps(attention: Any) -> bool:
    """Whether the processor of an attention keeps maps for somebody to read.

    That is the case of processors that pipelines bring with them (self-attention guidance, LEDITS++), and
    of those of somebody's own that hold more than numbers and modules.
    """
    processor = attention.processor
    if is_of_diffusers(processor):
        return False
    own = (v for k, v in vars(processor).items() if not isinstance(processor, nn.Module) or k[0] != "_")
    return type(processor).__module__.startswith("diffusers.pipelines.") or not all(
        isinstance(value, _HARMLESS) for value in own
    )


def hooked_by_others(denoiser: nn.Module, names: Iterable[str]) -> str:
    """A module, in or among some, with a forward hook of somebody's own, who wants its output; or ""."""
    for name in names:
        for path, module in denoiser.get_submodule(name).named_modules(prefix=name):
            if any(not _is_known(hook) for hook in module._forward_hooks.values()):
                return str(path)
    return ""


def wrapped_by_others(denoiser: nn.Module, names: Iterable[str]) -> str:
    """A module, in or among some, with a forward method of somebody's own; or "" if there is none."""
    for name in names:
        for path, module in denoiser.get_submodule(name).named_modules(prefix=name):
            forward = module.__dict__.get("forward")
            if forward is not None and not _is_known(forward):
                return str(path)
    return ""


def _is_known(function: Any) -> bool:
    """Whether a function is of a library that wraps modules and reads nothing of what they give."""
    function = getattr(function, "func", getattr(function, "__func__", function))
    home = getattr(function, "__module__", None) or type(function).__module__
    return home.partition(".")[0] in ("torch", "accelerate", "diffusers", "peft", "DeepCache", "regrow")


def is_of_diffusers(processor: Any) -> bool:
    """Whether an attention processor is one that diffusers' models come with."""
    return type(processor).__module__.startswith(("diffusers.models.", "diffusers.loaders."))


_HARMLESS = (bool, int, float, str, type(None), nn.Module, torch.Tensor, torch.dtype, torch.device)


def grounding_of(denoiser: nn.Module) -> list[Any]:
    """The layers that attend to boxes (GLIGEN), each of which is switched on and off."""
    return [m for m in denoiser.modules() if type(m).__name__ == "GatedSelfAttentionDense"]


def adapter_state(module: nn.Module) -> tuple[Any, ...] | None:
    """What an adapter on a module is set to: which are active, how strong, merged or not; None without."""
    layer: Any = module
    if not hasattr(layer, "base_layer") or not hasattr(layer, "scaling"):
        return None
    scaling = tuple(sorted(layer.scaling.items()))
    return tuple(layer.active_adapters), scaling, layer.merged, layer.disable_adapters


def shape_of(denoiser: nn.Module) -> int:
    """A number that another structure of modules, or other processors, would give otherwise."""
    return hash(tuple(_parts(denoiser)))


def _parts(denoiser: nn.Module) -> Iterator[tuple[Any, ...]]:
    for module in denoiser.modules():
        processor = type(module.__dict__.get("processor"))
        yield type(module), processor, id(module), adapter_state(module)
