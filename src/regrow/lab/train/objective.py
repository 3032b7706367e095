"""What training needs to know of a thing that is learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from regrow.lab.train.examples import Batch
from regrow.lab.train.frozen import Frozen


@dataclass(frozen=True, eq=False)
class Losses:
    """The loss of a batch; its parts are added.

    Args:
        error: how far the cached call is from the full one.
        cost: what is computed, weighed.
    """

    error: Tensor
    cost: Tensor


@dataclass(frozen=True, eq=False)
class Objective:
    """Something that is learned while the model stays as it is.

    Args:
        frozen: the model.
    """

    frozen: Frozen

    @property
    def earlier(self) -> Sequence[int]:
        """Numbers of the steps that may be the earlier one of two: all but the last."""
        return range(len(self.frozen.steps) - 1)

    @property
    def weights(self) -> Mapping[str, nn.Parameter]:
        """What is learned, by name."""
        raise NotImplementedError

    def losses(self, batch: Batch) -> Losses:
        """The loss of a batch."""
        raise NotImplementedError


def mean_square(one: Tensor, other: Tensor) -> Tensor:
    """The mean square of the difference of two tensors, in float32."""
    return (one.float() - other.float()).pow(2).mean()
