"""A record of a denoiser, for counting its calls afterwards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from regrow.core.meta import meta_copy, unknown_attentions


@dataclass(frozen=True)
class Twin:
    """A denoiser as it was at some time.

    Args:
        shape: number for its modules and processors, see `shape_of`.
        model: its copy without weights; None if none was made.
        unknown: its attentions with processors that are not of diffusers.
    """

    shape: int
    model: Any = None
    unknown: tuple[str, ...] = ()

    @classmethod
    def none(cls) -> Twin:
        """Make the record of no denoiser."""
        return cls(0)

    @classmethod
    def of(cls, denoiser: nn.Module, shape: int) -> Twin:
        """Record a denoiser as it is now, with a model to count by if it can be copied."""
        try:
            return cls(shape, meta_copy(denoiser), tuple(unknown_attentions(denoiser)))
        except Exception:
            # A module of others may hold anything; then the report says that MACs are not known.
            return cls(shape)
