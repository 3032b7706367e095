"""FORA: fast-forward caching in diffusion transformers (arXiv 2407.01425)."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from regrow.core.recipe import Recipe, recipe_of
from regrow.fields import Calls
from regrow.methods.base import ALL, About, DenoiserKind, MethodConfig, Role, register
from regrow.recover.time import REUSE, RecoveryField
from regrow.schedule import LAYERS, Spaced
from regrow.space import INTERVALS, RECOVERIES


@register
class FORA(MethodConfig):
    """Reuse the outputs of attentions and feed-forwards.

    1. Every N-th call is full.
    2. In the others each attention and each feed-forward gives the output that it had in the last full
       call. What is cheap (modulation, norms, the residual stream) is computed.

    Args:
        interval: N, one call in so many is full (the paper: 2 to 7, 3 in its main table).
        recovery: how a layer's output follows from those computed (the paper: the last one is reused).

    Raises:
        pydantic.ValidationError: naming the field, the value and what is allowed.
    """

    ABOUT: ClassVar[About] = About(
        title="FORA",
        what="reuse attention and MLP outputs every N calls",
        models=ALL,
        paper="arXiv 2407.01425",
        note="on U-Nets inside their transformer blocks",
        value="interval",
        role=Role.CACHES,
        measured={DenoiserKind.TRANSFORMER: ("3",), DenoiserKind.VIDEO: ("3",)},
        traced={DenoiserKind.VIDEO: ("3",)},
        place=60,
    )

    method: Literal["fora"] = "fora"
    interval: Annotated[Calls, INTERVALS] = 3
    recovery: Annotated[RecoveryField, RECOVERIES] = REUSE


@recipe_of.register
def _(config: FORA) -> Recipe:
    return Recipe(Spaced(config.interval, LAYERS, recovery=config.recovery))
