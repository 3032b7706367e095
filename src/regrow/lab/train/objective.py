"""What training asks of whatever is learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from regrow.lab.train.examples import Batch


@dataclass(frozen=True, eq=False)
class Losses:
    """The loss of a batch; its parts are added.

    Args:
        error: how far the cached call is from the full one.
        cost: what is computed, weighed.
    """

    error: Tensor
    cost: Tensor


class Objective(Protocol):
    """Something that is learned while the model stays as it is."""

    @property
    def earlier(self) -> Sequence[int]:
        """Numbers of the steps that may be the earlier one of two."""

    @property
    def weights(self) -> Mapping[str, nn.Parameter]:
        """What is learned, by name."""

    def losses(self, batch: Batch) -> Losses:
        """The loss of a batch."""
