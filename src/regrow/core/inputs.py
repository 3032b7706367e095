"""Arguments of a call of the denoiser."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from regrow.tokens.select import Subset, take_rows

# Arguments with which a ControlNet adds to the tokens of all blocks of a transformer.
RESIDUALS = (
    "block_controlnet_hidden_states",
    "controlnet_block_samples",
    "controlnet_single_block_samples",
)


def without_data(value: Any) -> Any:
    """Copy a structure with its tensors on the meta device, for a model without weights."""
    if isinstance(value, Tensor):
        # Models without weights are float32.
        dtype = torch.float32 if value.is_floating_point() else value.dtype
        return torch.empty_like(value, device="meta", dtype=dtype)
    if isinstance(value, Mapping):
        return {k: without_data(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(without_data(v) for v in value)
    return value


def arguments_of(denoiser: nn.Module) -> tuple[str, ...]:
    """List the names of a denoiser's arguments, in order."""
    # Read from the class: others may have wrapped the module's forward method.
    return tuple(inspect.signature(type(denoiser).forward).parameters)[1:]


def may_be_guided(sample: Tensor) -> bool:
    """Whether a batch is the same input twice, as in guidance, but also for two pictures from the same
    noise; computed once for each generation."""
    if sample.shape[0] % 2 or sample.is_meta:
        return False
    first, second = sample.chunk(2)
    return bool(torch.equal(first, second))


def is_of_no_class(labels: Tensor | None, no_class: int) -> bool:
    """Whether the second half of a batch has no class, as in guidance by pipelines of classes."""
    if labels is None or len(labels) % 2:
        return False
    return bool((labels.chunk(2)[1] == no_class).all())


def adds_to_layers(kwargs: Mapping[str, Any]) -> bool:
    """Whether a ControlNet or an adapter adds to what the blocks of a U-Net return."""
    added = any(v is not None for k, v in kwargs.items() if k.endswith("additional_residuals"))
    return added or kwargs.get("mid_block_additional_residual") is not None


def adds_to_tokens(kwargs: Mapping[str, Any]) -> bool:
    """Whether a ControlNet adds to the tokens of a transformer's blocks."""
    return any(kwargs.get(name) is not None for name in RESIDUALS)


def taken(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """List the text, or None, and the image tokens among a transformer block's arguments."""
    image = args[0] if args else kwargs["hidden_states"]
    text = args[1] if len(args) > 1 else kwargs.get("encoder_hidden_states")
    return [text, image]


def some_rows(
    tokens: Subset, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Make a module's arguments for some of its tokens, which come first or as ``hidden_states``."""
    x = args[0] if args else kwargs["hidden_states"]
    named = {name: _of_tokens(value, tokens, x) for name, value in kwargs.items()}
    rows = take_rows(x, tokens.rows(x.shape[1]))
    if args:
        return (rows, *(_of_tokens(value, tokens, x) for value in args[1:])), named
    return (), named | {"hidden_states": rows}


def _of_tokens(given: Any, tokens: Subset, x: Tensor) -> Any:
    """Take some tokens' rows of an argument for each token ``(B, N, k, C)`` (timesteps of Wan 2.2)."""
    if not isinstance(given, Tensor) or given.ndim != 4 or given.shape[:2] != x.shape[:2]:
        return given
    return take_rows(given.flatten(2), tokens.rows(x.shape[1])).unflatten(2, given.shape[2:])
