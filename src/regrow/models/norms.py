"""The norms of transformer blocks and the layers that read them: without its readers a norm is skipped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

_BASIC = {"norm1": ("attn1",), "norm2": ("attn2",), "norm3": ("ff",)}
_BY_TYPE: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "layer_norm": _BASIC,
    "ada_norm_zero": {"norm1.norm": ("attn1",), "norm2": ("attn2",), "norm3": ("ff",)},
    # PixArt's attention to the text has no norm before it.
    "ada_norm_single": {"norm1": ("attn1",), "norm2": ("ff",)},
}
_JOINT = {
    "norm1.norm": ("attn", "attn2"),
    "norm1_context.norm": ("attn",),
    "norm2": ("ff",),
    "norm2_context": ("ff_context",),
}
_BY_CLASS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "JointTransformerBlock": _JOINT,
    "FluxTransformerBlock": _JOINT,
    "FluxSingleTransformerBlock": {"norm.norm": ("proj_out",)},
    "WanTransformerBlock": {"norm1": ("attn1",), "norm2": ("attn2",), "norm3": ("ffn",)},
}


@dataclass(frozen=True)
class Norm:
    """A norm whose output only some layers read, token by token.

    Args:
        module: takes and returns tokens ``(B, N, C)``.
        block: path of its block.
        readers: paths of the layers that read it.
    """

    module: nn.Module
    block: nn.Module
    readers: tuple[str, ...]


def norms_of(blocks: Iterable[tuple[str, nn.Module]]) -> tuple[Norm, ...]:
    """List the norms of blocks whose readers are known; blocks are given with their paths."""
    return tuple(
        Norm(module, block, tuple(f"{path}.{child}" for child in readers if _has(block, child)))
        for path, block in blocks
        for name, readers in _table(block).items()
        if isinstance(module := _part(block, name), nn.Module)
    )


def _table(block: Any) -> Mapping[str, tuple[str, ...]]:
    kind = type(block).__name__
    if kind == "BasicTransformerBlock":
        return _BY_TYPE.get(block.norm_type, {})
    return _BY_CLASS.get(kind, {})


def _has(block: nn.Module, child: str) -> bool:
    return getattr(block, child, None) is not None


def _part(block: Any, name: str) -> Any:
    """Find a module in a block; None if there is none."""
    for child in name.split("."):
        block = getattr(block, child, None)
    return block
