"""TokenCache: token caching for diffusion transformers (arXiv 2409.18523).

A block's *update* of a token is what it adds to it. Some calls, the I-steps, are full. In the others, the
P-steps, a block computes its update of some tokens and the others get the update that was computed last
(Eq. 6). A trained cache predictor (`regrow.predictors.CachePredictor`) says which, from the tokens that
enter the first block:

1. Tokens: of all its values alpha ``(L, N)``, the highest ``1 - r`` of them stand for updates to compute
   (section III-B).
2. Blocks: all samples of a batch compute the same share of a block's tokens, ``r_l``, and each sample those
   of the highest alpha in the block (III-C). Here the shares come from a table that is made after training,
   so that the shapes of a call depend on the plan alone; `Counts.DATA` takes them from the call, as the
   paper does.
3. Steps: I-steps are where the accumulated ``exp(beta mean(alpha_t))`` passes even parts of its sum (III-D,
   Eq. 13). The first step always is one.

Some video models have blocks for the tokens of a frame, and blocks for those of a place in all frames. The
predictor sees the frames, which the first block is given. A block of the second kind computes an equal
number of frames at every place.

The last K blocks are computed in every call. Keys and values of tokens that a block does not compute are
those of its last computation, which gives the paper's MACs. The predictor's own MACs are counted as those
of choosing tokens. To train a predictor: ``regrow train predictor``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from regrow import zoo
from regrow.core.decision import ALL, SKIP, Adapter, Decider, Decision, Entered, Sited, Some, View
from regrow.core.recipe import Attention, CallInfo, Recipe, recipe_of
from regrow.fields import MOST_BLOCKS, MOST_CALLS, Calls, Seed, Share, Weight
from regrow.files import said
from regrow.methods.base import About, MethodConfig, register
from regrow.methods.toca import Memory, influence, spread, staleness
from regrow.models.errors import UnsupportedModelError
from regrow.models.layers import LayerKind
from regrow.models.table import Layout, Site, Spans, in_sequences
from regrow.origin import denoiser_key
from regrow.predictors import CachePredictor, LearnedFile, read_learned, without_data
from regrow.recover.time import REUSE, RecoveryField
from regrow.schedule import SITES, Schedule, Spaced
from regrow.space import Space, Variable, free
from regrow.tokens.grid import Grid, tokens_of_patch
from regrow.tokens.scores import random_score
from regrow.tokens.select import complement, most_similar

UNTRAINED = "untrained"
"""What to name in place of a file to have a predictor of the right size that has learned nothing."""
BUNDLED = "predictor.safetensors"
"""Name of the file in the folder of a bundled model."""
PATCH = 2
"""Side of the cells that ToCa and ToMe spread tokens over."""


class Spacing(str, Enum):
    """Where the I-steps are."""

    ADAPTIVE = "adaptive"
    """By Eq. 13."""
    UNIFORM = "uniform"
    """Evenly spread."""
    REVERSE = "reverse"
    """Those of Eq. 13, mirrored in time."""


class Choice(str, Enum):
    """What says which tokens a block computes (table VI)."""

    PREDICTOR = "predictor"
    """The cache predictor."""
    RANDOM = "random"
    """Chance."""
    TOCA = "toca"
    """ToCa's scores."""
    TOME = "tome"
    """Similarity, as tokens are merged: those that are least like the destination of their patch."""


class Counts(str, Enum):
    """Where the share of the tokens that a block computes comes from."""

    TABLE = "table"
    """From the means over many calls."""
    DATA = "data"
    """From the call itself, as in the paper: shapes depend on data, and the device is waited for."""


Beta = Annotated[float, Field(ge=-1e6, le=1e6, allow_inf_nan=False)]


@register
class TokenCache(MethodConfig):
    """TokenCache's configuration; the defaults but beta are the paper's for DiT-XL/2 256 in 50 steps.

    Args:
        predictor: the file of a trained predictor, ``NAME.safetensors``; None for the one that is bundled
            with the model; ``"untrained"`` for one that has learned nothing, to measure time.
        full_steps: number of I-steps (the paper: 50 of 250, 12 of 50, 9 of 20, 6 of 10 at 256 pixels; 21 of
            50 and 10 of 20 at 512).
        ratio: r, share of all updates that are not computed in P-steps; 0 makes every call full.
        last_blocks: K, blocks at the end that are computed in every call (the paper: 4; 2 of 250 steps).
        beta: of Eq. 13; what suits depends on how far alpha goes apart, that is on the predictor (the
            paper's, in the presets: -8000 for 50 steps, -6000 for 250, -4000 for 20, -2000 for 10). 0 is
            ours: it spreads I-steps evenly.
        spacing: where the I-steps are.
        choice: what says which tokens a block computes.
        counts: where a block's share comes from; only a predictor's choice has other than even ones.
        recovery: how an update follows from those computed, where it is not (the paper: the last is
            reused).
        staleness: what is added to a token's score for each P-step since it was computed last, so that no
            token is left out for long (the paper: 0; ToCa's s3, for any choice). 1 takes turns.
        seed: of random choices.
        lora: the file of trained updates of the last K blocks, ``NAME.safetensors``, for P-steps.

    Raises:
        pydantic.ValidationError: naming the field, the value and what is allowed.
    """

    ABOUT: ClassVar[About] = About(
        title="TokenCache",
        what="a trained predictor says which tokens each block computes; the others get its last update",
        models="transformers: DiT, PixArt, Latte, Wan",
        paper="arXiv 2409.18523",
        note="needs a predictor trained for the model (regrow train predictor); on the bundled model of "
        "pictures its choice gains nothing over chance",
        default="even",
        value="full_steps",
        place=30,
    )

    method: Literal["tokencache"] = "tokencache"
    version: Literal[1] = 1
    predictor: str | None = None
    full_steps: Calls = 12
    ratio: Share = 0.9
    last_blocks: int = Field(4, ge=0, lt=MOST_BLOCKS)
    beta: Beta = 0.0
    spacing: Spacing = Spacing.ADAPTIVE
    choice: Choice = Choice.PREDICTOR
    counts: Counts = Counts.TABLE
    recovery: RecoveryField = REUSE
    staleness: Weight = 0.0
    seed: Seed = 0
    lora: str | None = None

    @classmethod
    def space(cls, calls: int) -> Space:
        """The number of I-steps, the ratio, and the blocks that are always computed."""
        most = max(calls // 2, 1)
        return free(
            (
                Variable("full_steps", tuple(range(1, most + 1))),
                Variable("ratio", (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)),
                Variable("last_blocks", (0, 1, 2, 3, 4)),
            ),
            cls,
        )


TokenCache.PRESETS = {
    "even": TokenCache,
    "dit-256-250": lambda: TokenCache(full_steps=50, beta=-6000, last_blocks=2),
    "dit-256-50": lambda: TokenCache(beta=-8000),
    "dit-256-20": lambda: TokenCache(full_steps=9, beta=-4000),
    "dit-256-10": lambda: TokenCache(full_steps=6, beta=-2000),
    "dit-512-50": lambda: TokenCache(full_steps=21, beta=-4000),
    "dit-512-20": lambda: TokenCache(full_steps=10, beta=-2000),
}


@dataclass(frozen=True, eq=False)
class Table:
    """What a trained predictor said in many calls, by their place in the run.

    Args:
        quantiles: ``(T, L, Q)``: of alpha, at the levels 0 to 1, for T places in the run, the first first,
            and each of L blocks.
        alpha: ``(T,)``: its mean over blocks and tokens.
    """

    quantiles: np.ndarray[Any, np.dtype[np.float64]]
    alpha: np.ndarray[Any, np.dtype[np.float64]]

    def shares(self, place: float, sites: int, ratio: float) -> tuple[float, ...]:
        """The share of its tokens that each of the first so many blocks computes, ``1 - r`` in the mean.

        They are the parts of each block's alpha above one threshold for all, as the cut of the highest
        values of all blocks gives.

        Args:
            place: in the run, 0 for its beginning, below 1.
            sites: blocks that are decided for.
            ratio: r.
        """
        rows = self.quantiles[min(int(place * len(self.quantiles)), len(self.quantiles) - 1), :sites]
        levels = np.linspace(0, 1, rows.shape[1])
        # Equal quantiles tell nothing apart: a little is added, so that each value has one level.
        ascending = np.maximum.accumulate(rows, 1) + np.arange(rows.shape[1]) * 1e-9
        low, high = 0.0, 1.0
        for _ in range(50):
            threshold = (low + high) / 2
            below = [np.interp(threshold, row, levels, left=0.0, right=1.0) for row in ascending]
            above = 1 - np.array(below)
            low, high = (threshold, high) if above.mean() > 1 - ratio else (low, threshold)
        scale = (1 - ratio) / max(float(above.mean()), 1e-12)
        return tuple(np.minimum(above * scale, 1.0).tolist())

    def means(self, calls: int) -> Any:
        """The mean alpha of each of so many calls."""
        places = (np.arange(calls) + 0.5) / calls * len(self.alpha) - 0.5
        return np.interp(places, np.arange(len(self.alpha)), self.alpha)


def i_steps(means: Any, full: int, beta: float) -> set[int]:
    """The I-steps (Eq. 13): where ``v_t = sum_(s < t) exp(beta mean(alpha_s))`` passes even parts of all.

    Args:
        means: of each step the mean alpha, in the order of the run.
        full: how many.
        beta: how strongly steps follow alpha; 0 spreads them evenly.

    Returns:
        The indices of ``min(full, len(means))`` steps; 0 is one of them.
    """
    full = min(full, len(means))
    exponent = beta * (np.asarray(means, dtype=np.float64) - np.min(means))
    weights = np.exp(exponent - exponent.max())
    passed = np.concatenate([[0.0], np.cumsum(weights)[:-1]]) / weights.sum()
    chosen: set[int] = set()
    for part in range(full):
        # The small term keeps 3 / 10 of a sum from being missed by rounding.
        step = int(np.searchsorted(passed, part / full - 1e-9))
        free_steps = [s for s in (*range(step, len(means)), *range(step - 1, -1, -1)) if s not in chosen]
        chosen.add(free_steps[0])
    return chosen


def full_calls(config: TokenCache, table: Table | None, calls: int) -> set[int]:
    """The I-steps of a generation of so many calls."""
    if table is None or config.spacing is Spacing.UNIFORM:
        return i_steps(np.zeros(calls), config.full_steps, 0.0)
    means = table.means(calls)
    if config.spacing is Spacing.REVERSE:
        means = means[::-1]
    return i_steps(means, config.full_steps, config.beta)


@dataclass(frozen=True)
class _Rule(Sited):
    """TokenCache before a model is known."""

    config: TokenCache

    @property
    def seed(self) -> int:
        return self.config.seed

    def on(self, denoiser: nn.Module, layout: Layout) -> _Deciding:
        """The method at work on a transformer whose blocks take and return tokens.

        Raises:
            UnsupportedModelError: if its blocks don't.
            ValueError: if it has no more than K blocks, or there is no predictor for it.
        """
        c = self.config
        sites = layout.block_sites
        if not sites or not all(site.able for site in sites):
            raise UnsupportedModelError(
                f"model: {type(denoiser).__name__} has no blocks that can compute some of their tokens by "
                "themselves; TokenCache works on DiT, PixArt, Latte and Wan"
            )
        if c.last_blocks >= len(sites):
            raise ValueError(
                f"last_blocks: {c.last_blocks} is not allowed, it must be < {len(sites)}, the blocks that "
                f"this {type(denoiser).__name__} has"
            )
        learned = _learned(c, denoiser)
        predictor, table = None, None
        if c.choice is Choice.PREDICTOR:
            # The caller's chance stays as it is.
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(c.seed)
                predictor = CachePredictor.of(denoiser, len(sites)).eval().requires_grad_(False)
        if learned is not None:
            learned.check(denoiser, len(sites))
            table = table_of(learned)
            if predictor is not None:
                load_predictor(predictor, learned)
        adapters = {} if c.lora is None else _adapters(Path(c.lora), denoiser, len(sites), c.last_blocks)
        return _Deciding(c, sites[: len(sites) - c.last_blocks], predictor, table, adapters)


def load_predictor(predictor: CachePredictor, learned: LearnedFile) -> None:
    """Put the weights of a file into a predictor; on the meta device there is nowhere to put them.

    Raises:
        FileError: naming a tensor that is missing, of another form, or not the predictor's.
    """
    if next(predictor.parameters()).is_meta:
        return
    prefix = "predictor."
    weights = {k.removeprefix(prefix): v for k, v in learned.tensors.items() if k.startswith(prefix)}
    own = predictor.state_dict()
    for name in sorted(own.keys() | weights.keys()):
        if name not in own or name not in weights or own[name].shape != weights[name].shape:
            raise learned.wrong(f"{prefix}{name}")
    predictor.load_state_dict(weights)


def table_of(learned: LearnedFile) -> Table:
    """The table of a file.

    Raises:
        FileError: naming the tensor that is missing, of another form, or not within 0 to 1.
    """
    tensors = {"quantiles": (3, 2), "alpha": (1, 1)}
    for name, (dimensions, least) in tensors.items():
        tensor = learned.tensors.get(name)
        formed = tensor is not None and tensor.dim() == dimensions and tensor.shape[-1] >= least
        if tensor is None or not formed or not tensor.numel() or not ((tensor >= 0) & (tensor <= 1)).all():
            raise learned.wrong(name)
    if learned.tensors["quantiles"].shape[1] != learned.about.sites:
        raise learned.wrong("quantiles")
    return Table(*(learned.tensors[name].double().numpy() for name in tensors))


def _learned(config: TokenCache, denoiser: nn.Module) -> LearnedFile | None:
    """The file of a configuration; None where none is needed.

    Args:
        config: names it, or leaves it to the model.
        denoiser: the model's; one without data needs none.

    Raises:
        ValueError: if there is none for the model.
    """
    if config.predictor == UNTRAINED or config.choice is not Choice.PREDICTOR:
        return None
    if config.predictor is not None:
        return read_learned(Path(config.predictor), "predictor")
    found = bundled_for(denoiser)
    if found is None and not without_data(denoiser):
        raise ValueError(
            f"predictor: none is bundled for this {type(denoiser).__name__}; train one (regrow train "
            f"predictor) and name its file, or take {UNTRAINED!r} to measure time alone"
        )
    return found


def _adapters(file: Path, denoiser: nn.Module, sites: int, last_blocks: int) -> dict[str, Adapter]:
    """The updates of a file, by the paths of their layers.

    Raises:
        ValueError: if they are of another model, or of more or fewer blocks.
        FileError: if the file is none of theirs.
    """
    learned = read_learned(file, "lora")
    learned.check(denoiser, sites)
    trained = learned.about.settings.get("last_blocks")
    if trained != last_blocks:
        raise ValueError(f"lora: {said(file)} is for last_blocks={trained}, not {last_blocks}")
    down, up = ".lora_A.weight", ".lora_B.weight"
    layers, found = dict(denoiser.named_modules()), dict[str, Adapter]()
    for name in (name.removesuffix(down) for name in learned.tensors if name.endswith(down)):
        path, first = name.removeprefix("transformer."), learned.tensors[name + down]
        second = learned.tensors.get(name + up)
        if second is None or not _fits(layers.get(path), first, second):
            raise learned.wrong(name)
        found[path] = Adapter(first, second)
    return found


def _fits(layer: Any, down: Tensor, up: Tensor) -> bool:
    """Whether a linear layer can have a low-rank update."""
    if down.dim() != 2 or up.dim() != 2 or down.shape[0] != up.shape[1]:
        return False
    own = getattr(layer, "in_features", None), getattr(layer, "out_features", None)
    return own == (down.shape[1], up.shape[0])


def bundled_for(denoiser: nn.Module) -> LearnedFile | None:
    """The predictor that is bundled with a model, if it is one of those."""
    for name in zoo.MODELS:
        file = zoo.path(name) / BUNDLED
        if file.exists():
            learned = read_learned(file, "predictor")
            if learned.about.denoiser == denoiser_key(denoiser):
                return learned
    return None


@dataclass(frozen=True, eq=False)
class _Deciding(Decider):
    """TokenCache at work.

    Args:
        config: its configuration.
        sites: the blocks that it decides for.
        predictor: None if tokens are chosen otherwise.
        table: of the predictor; None if it has learned nothing.
        updates: of the last blocks.
    """

    config: TokenCache
    sites: tuple[Site, ...]
    predictor: CachePredictor | None
    table: Table | None
    updates: Mapping[str, Adapter]
    _plans: dict[View, Mapping[str, Decision]] = field(default_factory=dict, init=False)

    @property
    def adapters(self) -> Mapping[str, Adapter]:
        return self.updates

    @property
    def observes(self) -> frozenset[LayerKind]:
        toca = self.config.choice is Choice.TOCA
        return frozenset({LayerKind.SELF_ATTENTION} if toca else ())

    def plan(self, view: View) -> Mapping[str, Decision]:
        """In I-steps all; else of each block ``r_l`` of the tokens (section III-C)."""
        # Branches and generations of the run ask for the same.
        if view not in self._plans:
            self._plans[view] = self._planned(view)
        return self._plans[view]

    def _planned(self, view: View) -> Mapping[str, Decision]:
        if view.index in full_calls(self.config, self.table, view.total):
            return {site.name: ALL for site in self.sites}
        ratio = self.config.ratio
        shares: tuple[float | None, ...] = (1 - ratio,) * len(self.sites)
        if self._counts_data:
            shares = (None,) * len(self.sites)
        elif self.table is not None:
            shares = self.table.shares(view.index / view.total, len(self.sites), ratio)
        return {
            site.name: SKIP if share is not None and share <= 0 else Some(share, site.name)
            for site, share in zip(self.sites, shares, strict=True)
        }

    @property
    def _counts_data(self) -> bool:
        """Whether shares come from the call itself; without data there is nothing to take them from."""
        predictor, data = self.predictor, self.config.counts is Counts.DATA
        return data and predictor is not None and not next(predictor.parameters()).is_meta

    def begin(self, memory: Memory | None = None) -> Memory:
        """How often each token was reused, and what ToCa alone needs."""
        return Memory()

    def observe(self, memory: Memory, site: Site, attention: Attention) -> None:
        """ToCa's s1."""
        memory.attended[site.block] = influence(attention, None)

    def look(self, memory: Memory, entered: Entered, info: CallInfo) -> _Seen | None:
        """The predictor's alpha (section III-B)."""
        if self.predictor is None:
            return None
        like = next(self.predictor.parameters())
        if like.device != entered.x.device or like.dtype != entered.x.dtype:
            # The model was moved after `regrow.apply`, or casts what it is given.
            self.predictor.to(entered.x.device, entered.x.dtype)
        alpha = self.predictor.of_samples(entered, info.batch)[..., : len(self.sites)]
        if self.config.counts is Counts.TABLE or alpha.is_meta:
            return _Seen(alpha, {})
        return _Seen(alpha, dict(zip((s.name for s in self.sites), self._shares(alpha), strict=True)))

    def _shares(self, alpha: Tensor) -> list[float]:
        """The paper's shares: the part of each block's alphas that is among the highest of all."""
        _, tokens, sites = alpha.shape
        keep = max(round((1 - self.config.ratio) * tokens * sites), 1)
        least = alpha.flatten(1).topk(keep, dim=1).values[:, -1:, None]
        shares: list[float] = (alpha >= least).float().mean((0, 1)).tolist()
        return shares

    def choose(
        self, memory: Memory, seen: _Seen | None, site: Site, x: Tensor, count: int | None, info: CallInfo
    ) -> Tensor:
        """The tokens of the highest score in the block."""
        if count is None:
            assert seen is not None
            count = round(seen.shares[site.name] * x.shape[1])
        if site.name not in memory.reused:
            memory.reused[site.name] = torch.zeros(x.shape[:2], device=x.device)
        reused = memory.reused[site.name]
        score = self._score(memory, seen, site, x, info) + self.config.staleness * reused
        chosen: Tensor = score.topk(count, dim=1).indices.sort(1).values
        memory.reused[site.name] = (reused + 1).scatter_(1, chosen, 0)
        return chosen

    def _score(self, memory: Memory, seen: _Seen | None, site: Site, x: Tensor, info: CallInfo) -> Tensor:
        """``(B, N)``: high where a token should be computed."""
        sequences, tokens, channels = x.shape
        if seen is not None:
            return in_sequences(seen.alpha[..., site.index], site.spans, sequences)
        if self.config.choice is Choice.RANDOM:
            chance = random_score(sequences // info.batch * tokens, info.generator).expand(info.batch, -1)
            return chance.reshape(sequences, tokens)
        grid = _grid(site, tokens, info)
        if self.config.choice is Choice.TOME:
            return _unlike(x.reshape(-1, grid.tokens, channels), grid, info).view(sequences, tokens)
        score = 0.25 * staleness(memory.reused[site.name], self.config.full_steps)
        if site.block in memory.attended:
            score = score + memory.attended[site.block]
        return score + 0.6 * spread(score.view(-1, grid.tokens), grid).view(sequences, tokens)


@dataclass(frozen=True)
class _Seen:
    """What the predictor says in a call.

    Args:
        alpha: ``(B, N, L)``; of a video, N are the tokens of all frames.
        shares: by block, the share of the tokens that it computes, where that depends on data.
    """

    alpha: Tensor
    shares: Mapping[str, float]


def _grid(site: Site, tokens: int, info: CallInfo) -> Grid:
    """The grid of a site's tokens: of a frame, or the frames of one place in a row."""
    if site.spans is Spans.PLACE or info.grid is None:
        return Grid(1, tokens, PATCH)
    return replace(info.grid, patch=PATCH)


def _unlike(x: Tensor, grid: Grid, info: CallInfo) -> Tensor:
    """How little each token is like the destinations of ToMe, one a patch by chance; these come first."""
    members = tokens_of_patch(grid, x.device)
    chance = random_score(grid.tokens, info.generator)[0].to(x.device)
    score = torch.where(members >= 0, chance[members.clamp(min=0)], -1.0)
    base = members.gather(1, score.argmax(1, keepdim=True)).T.expand(len(x), -1)
    rest = complement(base, grid.tokens)
    similarity, _ = most_similar(x, rest, base)
    first = 2 + chance.expand(len(x), -1).to(similarity.dtype)
    return first.clone().scatter_(1, rest, -similarity)


@recipe_of.register
def _(config: TokenCache) -> Recipe:
    if config.ratio == 0:
        return Recipe(Schedule.constant())
    # Which calls are I-steps is decided when the predictor is known; behind the first, any may be.
    return Recipe(Spaced(MOST_CALLS, SITES, recovery=config.recovery), sites=_Rule(config))
