"""What regrow needs to know of a denoiser: where tokens are, and what can be skipped at each depth."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from math import ceil

from torch import nn

from regrow.tokens.grid import Grid


@dataclass(frozen=True)
class TokenBlock:
    """A transformer block whose tokens form a grid.

    Args:
        name: path of the block in the denoiser.
        block: the block; its first input is ``(B, N, C)``.
        downsample: how many latent positions a token spans along one side.
        self_attention: takes and returns ``(B, N, C)``; None if the block has none.
        cross_attention: the attention to the text, or None.
        feed_forward: the token-wise network.
    """

    name: str
    block: nn.Module
    downsample: int
    self_attention: nn.Module | None
    cross_attention: nn.Module | None
    feed_forward: nn.Module

    def grid(self, height: int, width: int, patch: int) -> Grid:
        """The block's grid of tokens for a latent of ``height x width``."""
        return Grid(ceil(height / self.downsample), ceil(width / self.downsample), patch)


class Returns(Enum):
    """What a module that may be skipped returns."""

    TENSOR = "tensor"
    TUPLE = "tuple"  # (tensor,)
    DOWN = "down"  # tensor, (tensor, ...): a U-Net's down block


@dataclass(frozen=True)
class Skippable:
    """A module that may be skipped in a cached call.

    Args:
        name: path of the module in the denoiser.
        module: the module.
        returns: the form of what it returns.
        count: for `Returns.DOWN`, the number of tensors in the inner tuple.
    """

    name: str
    module: nn.Module
    returns: Returns
    count: int = 0


@dataclass(frozen=True)
class Cut:
    """A call of less than full depth: what it skips, and where the cached feature comes in.

    Args:
        skip: names of the modules that do not run.
        boundary: the one of them that returns the cached feature of the last full call.
    """

    skip: frozenset[str]
    boundary: str


@dataclass(frozen=True)
class Layout:
    """The table of a denoiser.

    Args:
        blocks: its transformer blocks in the order they run.
        skippable: the modules that some cut skips, by name.
        cuts: the cut of each depth from 0 to ``depths - 1``.
    """

    blocks: tuple[TokenBlock, ...]
    skippable: dict[str, Skippable]
    cuts: tuple[Cut, ...]

    @property
    def depths(self) -> int:
        return len(self.cuts)

    @property
    def top_level(self) -> int:
        """The smallest downsampling at which there is a self-attention."""
        return min(b.downsample for b in self.blocks if b.self_attention is not None)
