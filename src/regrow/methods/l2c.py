"""Learning-to-Cache: a learned table of layers to reuse (arXiv 2406.01733)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from torch import nn
from typing_extensions import Self

from regrow.core.decision import ALL, SKIP, Decider, Decision, View
from regrow.core.recipe import Recipe, recipe_of
from regrow.fields import MOST_CALLS, Share
from regrow.methods.base import About, MethodConfig, register
from regrow.methods.sites import SitesOf
from regrow.models.errors import UnsupportedModelError
from regrow.models.table import Layout, Site
from regrow.predictors import UNTRAINED, read_learned, untrained, without_data
from regrow.schedule import SITES, Spaced


@register
class L2C(MethodConfig):
    """Reuse the outputs of those attentions and feed-forwards that a learned table names.

    1. Every other step is full.
    2. In the others each attention and each feed-forward is either computed, or reuses what it returned in
       the step before: it is computed where its trained beta in (0, 1), of the step and layer, is above a
       threshold. That is one table for all samples, learned for one number of steps.

    To train a table: ``regrow train router``.

    Args:
        router: the file of a trained router, ``NAME.safetensors``; ``"untrained"`` for a table that reuses
            every layer of every other step, to measure time. None, where there are no weights, is the same.
        threshold: a layer is computed where beta is above it; None for the table that was made of the
            training's own threshold.

    Raises:
        pydantic.ValidationError: naming the field, the value and what is allowed.
    """

    ABOUT: ClassVar[About] = About(
        title="Learning-to-Cache",
        what="a learned table says which attention and MLP outputs each second step reuses",
        models="transformers: DiT, PixArt, Latte, Wan",
        paper="arXiv 2406.01733",
        note="needs a router trained for the model and its number of steps: regrow train router",
        place=31,
    )

    method: Literal["l2c"] = "l2c"
    router: str | None = None
    threshold: Share | None = None

    @classmethod
    def from_text(cls, text: str, calls: int) -> Self:
        """By the file of its router, as in ``l2c:router-50.safetensors``, or ``l2c:untrained``."""
        return cls(router=text)

    @property
    def sampler_steps(self) -> int | None:
        """The steps that the router was trained for."""
        if self.router in (None, UNTRAINED):
            return None
        return read_learned(Path(str(self.router)), "router").about.steps


@dataclass(frozen=True)
class _Rule(SitesOf[L2C]):
    """Learning-to-Cache before a model is known."""

    def on(self, denoiser: nn.Module, layout: Layout) -> L2CDecider:
        """The method at work on a transformer.

        Raises:
            UnsupportedModelError: if its layers are not known.
            ValueError: if the router is of another model.
            FileError: naming the tensor that is missing or of another form.
        """
        sites = tuple(site.whole for site in layout.layer_sites)
        if not sites:
            raise UnsupportedModelError(
                f"model: regrow does not know the layers of {type(denoiser).__name__}; Learning-to-Cache "
                "works on transformers such as DiT, PixArt, Latte and Wan"
            )
        c = self.config
        if c.router is None and not without_data(denoiser):
            raise untrained("router", "given", denoiser)
        if c.router in (None, UNTRAINED):
            return L2CDecider(sites, None)
        learned = read_learned(Path(str(c.router)), "router")
        learned.check(denoiser, len(sites))
        name = "table" if c.threshold is None else "beta"
        tensor = learned.tensors.get(name)
        if tensor is None or tensor.dim() != 2 or tensor.shape[1] != len(sites):
            raise learned.wrong(name)
        table = tensor if c.threshold is None else tensor > c.threshold
        return L2CDecider(sites, tuple(tuple(row) for row in table.tolist()))


@dataclass(frozen=True)
class L2CDecider(Decider):
    """Learning-to-Cache at work.

    Args:
        sites: the layers.
        table: for each call, whether each layer is computed; None to compute none in every other call.
    """

    sites: tuple[Site, ...]
    table: tuple[tuple[bool, ...], ...] | None

    def plan(self, view: View) -> Mapping[str, Decision]:
        """The table's row of the call.

        Raises:
            ValueError: if the table is for another number of calls.
        """
        if self.table is None:
            return {site.name: SKIP if view.index % 2 else ALL for site in self.sites}
        if view.total != len(self.table):
            raise ValueError(
                f"router: it was trained for {len(self.table)} steps, not for {view.total}; take as many, "
                f"or train one: regrow train router --sampler-steps {view.total}"
            )
        row = self.table[view.index]
        return {site.name: ALL if whole else SKIP for site, whole in zip(self.sites, row, strict=True)}


@recipe_of.register
def _(config: L2C) -> Recipe:
    return Recipe(Spaced(MOST_CALLS, SITES), sites=_Rule(config))
