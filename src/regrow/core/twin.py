"""What a denoiser was, to count its calls by afterwards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from regrow.core.meta import meta_copy, unknown_attentions


@dataclass(frozen=True)
class Twin:
    """What a denoiser was at some time.

    Args:
        shape: of its modules and processors: see `shape_of`.
        model: it, without weights; None if none was made.
        unknown: its attentions whose processors are somebody's own.
    """

    shape: int
    model: Any = None
    unknown: tuple[str, ...] = ()

    @classmethod
    def none(cls) -> Twin:
        """Of no denoiser."""
        return cls(0)

    @classmethod
    def of(cls, denoiser: nn.Module, shape: int) -> Twin:
        """What a denoiser is now, with a model to count by, or without if it can't be copied."""
        try:
            return cls(shape, meta_copy(denoiser), tuple(unknown_attentions(denoiser)))
        except Exception:
            # Whatever a module of somebody's own holds: the report says that it does not know.
            return cls(shape)
