"""What several methods that decide for the sites of a transformer have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from regrow.core.decision import Decider, Decision, Sited, Some, View
from regrow.methods.base import MethodConfig
from regrow.models.errors import UnsupportedModelError
from regrow.models.table import TOKENS, Layout, Site
from regrow.tokens.alignment import Alignment

Config = TypeVar("Config", bound=MethodConfig)


@dataclass(frozen=True)
class SitesOf(Sited, Generic[Config]):
    """A method of sites before a denoiser is known.

    Args:
        config: its configuration; the fields ``seed`` and ``alignment`` are used if it has them.
    """

    config: Config

    @property
    def seed(self) -> int:
        """The field ``seed``."""
        return int(getattr(self.config, "seed", 0))

    @property
    def aligns(self) -> bool:
        """Whether the field ``alignment`` is another than off."""
        return getattr(self.config, "alignment", Alignment.OFF) is not Alignment.OFF


@dataclass
class Ages:
    """What is remembered of the last full call and since, where layers or blocks compute some tokens.

    Args:
        attended: by block, a score from its attentions in the full call: ``(B, N)``.
        reused: by site, how often each token was reused since it was computed: ``(B, N)``.
    """

    attended: dict[str, Tensor] = field(default_factory=dict)
    reused: dict[str, Tensor] = field(default_factory=dict)

    def of(self, site: str, sequences: int, tokens: int, device: torch.device) -> Tensor:
        """`reused` of a site; zeros before its first choice."""
        if site not in self.reused:
            self.reused[site] = torch.zeros(sequences, tokens, device=device)
        return self.reused[site]

    def choose(self, site: str, score: Tensor, count: int) -> Tensor:
        """The tokens ``(B, count)`` of the highest score, ascending; the others are reused once more."""
        chosen = score.topk(count, dim=1).indices
        self.reused[site] = (self.reused[site] + 1).scatter_(1, chosen, 0)
        return chosen.sort(1).values


@dataclass(frozen=True)
class StreamChoice(Decider, Generic[Config]):
    """A method at work that chooses the tokens which a call of a transformer computes through its blocks.

    Args:
        config: its configuration.
        sites: the way of the tokens through the blocks.
    """

    config: Config
    sites: tuple[Site, ...]

    def plan(self, view: View) -> Mapping[str, Decision]:
        """All tokens but the plan's share; the first calls are full in any case."""
        return some_of_stream(view.step.ratio)


def stream_of(denoiser: nn.Module, layout: Layout, reads: int | None = None, hint: str = "") -> Site:
    """Make the site of all blocks of a transformer, or of those after one.

    Args:
        denoiser: the model.
        layout: its table.
        reads: index of the block whose self-attention chooses the tokens; None for all blocks.
        hint: advice in the error for a model that has no such site.

    Raises:
        UnsupportedModelError: if a call of the model can't compute some of its tokens only.
        ValueError: if no block comes after that one.
    """
    site = layout.token_stream(reads)
    if site is None:
        raise UnsupportedModelError(
            f"model: a call of {type(denoiser).__name__} can't compute some of its tokens only"
            + (f"; {hint}" if hint else "")
        )
    return site


def some_of_stream(ratio: float) -> Mapping[str, Decision]:
    """Make the plan of a call that computes all but a share of the tokens.

    The number is rounded down, as in CAT Pruning's released code: 1228 of 4096 tokens for 0.3.
    """
    return {TOKENS: Some(1 - ratio, TOKENS, down=True)} if ratio else {}
