"""Attentions that turn queries and keys by the positions of their tokens (rotary embeddings)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from torch import Tensor, nn

from regrow.tokens.select import Subset, behind


class Rows(Enum):
    """Which tokens the rows of a module's output are."""

    IMAGE = "image"
    TEXT = "text"
    JOINT = "joint"  # all of the text, then the image's


@dataclass(frozen=True)
class Rotary:
    """An attention that is given a table of the positions of all tokens, text before image.

    It turns queries and keys by this one table, so both must be of the same tokens. Where some tokens only
    are computed, or queries and keys are looked at, the table is kept from it, and both are turned where
    they are made.

    Args:
        attention: the attention.
        table: name of its argument with cosines and sines, each with ``(T + N) D`` elements.
        turned: what gives queries and keys as the attention turns them, and of which tokens.
    """

    attention: nn.Module
    table: str
    turned: tuple[tuple[nn.Module, Rows], ...]

    @property
    def is_plain(self) -> bool:
        """Whether its processor is its class's, which does nothing between ``turned`` and the product but
        turn. Another may read what is not turned (IP-Adapter)."""
        attention: Any = self.attention
        return type(attention.processor) is attention._default_processor_cls


def rows_of_table(table: Tensor, which: Rows, count: int, tokens: Subset | None) -> Tensor:
    """The rows of a table ``(T + N, D)`` that belong to queries or keys ``(B, n, ...)``.

    Args:
        table: of the text's tokens and then the image's.
        which: the tokens that the queries or keys are of.
        count: their number n.
        tokens: those of the image's tokens that are computed; None for all.

    Returns:
        ``(n, D)``; ``(B * n, D)`` where some of the image's tokens are computed.
    """
    if which is Rows.TEXT:
        return table[:count]
    if tokens is None:
        return table[len(table) - count :]
    text = len(table) - tokens.image
    index = behind(tokens.tokens, text)
    return table[(index if which is Rows.JOINT else index[:, text:]).flatten()]
