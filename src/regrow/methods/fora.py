"""FORA: fast-forward caching in diffusion transformers (arXiv 2407.01425).

Every N-th call is full; in the others each block hands on the outputs that its attention and its
feed-forward had in the last full call. What is cheap (modulation, norms, the residual stream) is computed.
"""

from __future__ import annotations

from typing import Literal

from regrow.fields import Calls
from regrow.methods.parts import MethodConfig, Parts, parts_of
from regrow.recover.time import REUSE, RecoveryField
from regrow.schedule import LAYERS, Spaced
from regrow.space import Space, Variable, free


class FORA(MethodConfig):
    """FORA's configuration.

    Args:
        interval: N, one call in so many is full (the paper: 2 to 7, 3 in its main table).
        recovery: how a layer's output follows from those computed (the paper: the last one is reused).

    Raises:
        pydantic.ValidationError: naming the field, the value and what is allowed.
    """

    method: Literal["fora"] = "fora"
    version: Literal[1] = 1
    interval: Calls = 3
    recovery: RecoveryField = REUSE

    @classmethod
    def space(cls, calls: int) -> Space:
        """Intervals."""
        return free((Variable("interval", tuple(range(2, 11))),), cls)


@parts_of.register
def _(config: FORA) -> Parts:
    return Parts(Spaced(config.interval, LAYERS, recovery=config.recovery))
