"""Names of transformer blocks' layers, shared by methods and the models' tables."""

from __future__ import annotations

from enum import Enum


class LayerKind(str, Enum):
    """The kind of a layer, by what it does with tokens."""

    SELF_ATTENTION = "self_attention"
    """The attention among the image's tokens, and the text's tokens in joint blocks."""
    CROSS_ATTENTION = "cross_attention"
    """The attention of the image's tokens to the text."""
    FEED_FORWARD = "feed_forward"
    """The token-wise network."""
