"""SiTo: similarity-based token pruning (AAAI 2025)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar, Literal

from pydantic import model_validator
from torch import Tensor
from typing_extensions import Self

from regrow.core.recipe import CallInfo, Recipe, recipe_of
from regrow.fields import Weight
from regrow.methods.base import UNETS, About, DenoiserKind, Role, register
from regrow.methods.pruning import Features, LayerPruning, PatchRule
from regrow.schedule import Schedule
from regrow.tokens.alignment import Alignment, align
from regrow.tokens.grid import Grid, best_of_patch, tokens_of_patch
from regrow.tokens.scores import noise, random_score, sim_score
from regrow.tokens.select import Selection, prune_similar, top_share


class BaseChoice(str, Enum):
    """How base tokens are chosen: the ablation's rows I to VI."""

    TOP_LEFT = "I"
    """The top-left token of each patch."""
    RANDOM = "II"
    """A random share of 1 / patch**2 of all tokens (25% for patch 2)."""
    HIGHEST = "III"
    """The same share of all tokens, those of highest SimScore."""
    RANDOM_IN_PATCH = "IV"
    """A random token of each patch."""
    BEST_IN_PATCH = "V"
    """The token of highest SimScore in each patch."""
    NOISY_BEST_IN_PATCH = "VI"
    """As V, with noise on the score (the paper's choice)."""


@register
class SiTo(LayerPruning):
    """Prune in every call, and every layer by itself, tokens that are similar to a base token.

    1. Score: ``SimScore_i = sum_j cos(x_i, x_j)`` of each token, with Gaussian noise.
    2. Base tokens: in each patch of s x s tokens the one of the highest score.
    3. Pruned tokens: of the others the ``r N`` of the largest cosine similarity to a base token.
    4. The layer computes the kept tokens; a pruned one takes a copy of what its base token got.

    Further fields are those of `LayerPruning`.

    Args:
        base: how base tokens are chosen (the paper: VI).
        noise: sigma of the Gaussian noise on SimScore (the paper: 0.1); used by choice VI.
        features: what similarity is measured on (released code: the block's input).
        alignment: give both halves of a guided batch the same base scores, as DaTo does (off in the
            paper).
        nearby: look for similar base tokens in the surrounding 3 x 3 patches only.

    Raises:
        pydantic.ValidationError: naming the field, the value and what is allowed.
    """

    ABOUT: ClassVar[About] = About(
        title="SiTo",
        what="prune tokens similar to others in every call",
        models=UNETS,
        paper="AAAI 2025",
        value="ratio",
        role=Role.CHOOSES,
        measured={DenoiserKind.UNET: ("d",)},
        traced={DenoiserKind.UNET: ("d",)},
        place=20,
    )
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "a": {"ratio": 0.3},
        "b": {"ratio": 0.4},
        "c": {"ratio": 0.5},
        "d": {"ratio": 0.6},
        "e": {"ratio": 0.7},
    }

    method: Literal["sito"] = "sito"
    base: BaseChoice = BaseChoice.NOISY_BEST_IN_PATCH
    noise: Weight = 0.1
    features: Features = Features.BLOCK_INPUT
    alignment: Alignment = Alignment.OFF
    nearby: bool = False

    @model_validator(mode="after")
    def _near_base_tokens(self) -> Self:
        if self.nearby and self.base in (BaseChoice.RANDOM, BaseChoice.HIGHEST):
            raise ValueError(
                f"nearby: not possible with base={self.base.value}, which has no base token in every "
                "patch; allowed with I, IV, V, VI"
            )
        return self


@dataclass(frozen=True)
class _Rule(PatchRule[SiTo]):
    """SiTo's token pruning."""

    def prepare(self, grids: Sequence[Grid], call: CallInfo) -> Mapping[Grid, Tensor]:
        """What chance decides, drawn once a call for all layers of a grid and all samples ``(1, N)``."""
        c = self.config
        if c.base in (BaseChoice.RANDOM, BaseChoice.RANDOM_IN_PATCH):
            return {grid: random_score(grid.tokens, call.generator) for grid in grids}
        if c.base is BaseChoice.NOISY_BEST_IN_PATCH and c.noise:
            return {grid: noise(grid.tokens, c.noise, call.generator) for grid in grids}
        return {}

    def select(
        self, x: Tensor, grid: Grid, count: int, prepared: Tensor | None, call: CallInfo
    ) -> Selection:
        """Choose the layer's base tokens, then prune what is most similar to one."""
        base = self.base_tokens(x, grid, prepared, call.guided)
        c = self.config
        return prune_similar(x, base, grid, count, nearby=c.nearby, exact=c.exact)

    def base_tokens(self, x: Tensor, grid: Grid, chance: Tensor | None, guided: bool) -> Tensor:
        """The base tokens ``(B, m)``, by one of the choices I to VI.

        Args:
            x: features ``(B, N, C)``.
            grid: the grid of the N tokens.
            chance: random scores (II, IV) or noise on SimScore (VI), ``(1, N)``.
            guided: whether the batch is two halves of guidance.
        """
        c = self.config
        if c.base is BaseChoice.TOP_LEFT:
            return tokens_of_patch(grid, x.device)[:, 0].expand(x.shape[0], -1)
        if c.base in (BaseChoice.RANDOM, BaseChoice.RANDOM_IN_PATCH) and chance is not None:
            score = chance.expand(len(x), -1)
        else:
            score = sim_score(x) if chance is None else sim_score(x) + chance
        score = align(score, c.alignment, guided)
        if c.base in (BaseChoice.RANDOM, BaseChoice.HIGHEST):
            return top_share(score, grid.patches)
        return best_of_patch(score, grid)


@recipe_of.register
def _(config: SiTo) -> Recipe:
    return Recipe(Schedule.constant(config.ratio, name=f"constant {config.ratio:g}"), sites=_Rule(config))
