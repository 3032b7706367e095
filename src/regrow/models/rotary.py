"""Attentions that turn queries and keys by their tokens' positions (rotary embeddings)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from torch import Tensor, nn

from regrow.tokens.select import Subset, behind


class Rows(Enum):
    """The tokens that the rows of a module's output belong to."""

    IMAGE = "image"
    TEXT = "text"
    JOINT = "joint"  # all of the text, then the image's


@dataclass(frozen=True)
class Rotary:
    """An attention that takes a table of the positions of all tokens, text before image.

    It turns queries and keys by this one table, so both must be of the same tokens. If only some tokens are
    computed, or queries and keys are observed, hooks remove this argument and turn queries and keys where
    they are made.

    Args:
        attention: the attention.
        table: name of its argument with cosines and sines, each with ``(T + N) D`` elements.
        turned: the modules whose outputs the attention turns, and the tokens that these are of.
    """

    attention: nn.Module
    table: str
    turned: tuple[tuple[nn.Module, Rows], ...]

    @property
    def is_plain(self) -> bool:
        """Whether its processor is its class's own, which only turns between ``turned`` and the product.
        Another processor may read queries before they are turned (IP-Adapter)."""
        own = getattr(self.attention, "_default_processor_cls", None)
        return own is not None and type(getattr(self.attention, "processor", None)) is own


def rows_of_table(table: Tensor, which: Rows, count: int, tokens: Subset | None) -> Tensor:
    """Take the rows of a table ``(T + N, D)`` that belong to queries or keys ``(B, n, ...)``.

    Args:
        table: rows of the text's tokens, then the image's.
        which: the tokens that the queries or keys are of.
        count: their number n.
        tokens: the image's tokens that are computed; None for all.

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
