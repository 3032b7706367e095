"""What regrow needs to know about a denoiser: where its tokens are, and what each depth can skip."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from math import ceil
from typing import Any

from torch import Tensor, nn

from regrow.models.layers import LayerKind
from regrow.models.norms import Norm
from regrow.models.rotary import Rotary
from regrow.schedule import HEAD, LAYERS
from regrow.tokens.grid import Grid, grid_of_positions


@dataclass(frozen=True)
class TokenBlock:
    """A transformer block whose tokens form a grid.

    Args:
        name: path of the block in the denoiser.
        stage: path of the module with the consecutive blocks that have the same tokens.
        block: the block; its first input is ``(B, N, C)``.
        downsample: number of latent positions a token spans along one side.
        self_attention: takes and returns ``(B, N, C)``; None if the block has none.
        cross_attention: the attention to the text, or None.
        feed_forward: the token-wise network.
    """

    name: str
    stage: str
    block: nn.Module
    downsample: int
    self_attention: nn.Module | None
    cross_attention: nn.Module | None
    feed_forward: nn.Module

    def grid(self, height: int, width: int, patch: int | None) -> Grid:
        """Make the grid for a latent of ``height x width``; if patch is None, one patch holds all."""
        rows, columns = ceil(height / self.downsample), ceil(width / self.downsample)
        return Grid(rows, columns, max(rows, columns) if patch is None else patch)


class Returns(Enum):
    """The form of a skippable module's output."""

    TENSOR = "tensor"
    TUPLE = "tuple"  # (tensor,)
    DOWN = "down"  # tensor, (tensor, ...): a U-Net's down block
    TOKENS = "tokens"  # tensor (B, N, C), as it takes
    JOINT = "joint"  # text or None, image: each (B, N, C), as it takes them
    OWN = "own"  # any form; where it is skipped, its last output is reused


@dataclass(frozen=True)
class SkipPlan:
    """A call that computes less: the modules that it skips, and where cached features enter.

    Args:
        skip: names of the modules that do not run.
        restore: the skipped modules that return cached features; nobody reads the others' outputs.
        entry: the first skipped module, if the cache holds what the skipped modules added to its input;
            None if it holds the restoring module's output.
        final: the restored value is the denoiser's output.
        keys: keys of the cached features by restoring module, if they are not the default ones.
    """

    skip: frozenset[str]
    restore: frozenset[str]
    entry: str | None = None
    final: bool = False
    keys: Mapping[str, str] = field(default_factory=dict, hash=False, compare=False)

    def key(self, name: str) -> str:
        """Key of the cached feature of a restoring module."""
        if name in self.keys:
            return self.keys[name]
        return name if self.entry is None else f"{self.entry} to {name}"

    def feeds(self, name: str, restoring: str) -> bool:
        """Whether only a restoring module reads what a skipped module returns."""
        # If there are several, each restores its own block.
        return len(self.restore) == 1 or name.rpartition(".")[0] == restoring.rpartition(".")[0]


@dataclass(frozen=True)
class Stream:
    """The modules where the image's tokens begin and end, and those whose values are kept between calls.

    Args:
        embed: makes the tokens ``(B, N, C)`` from the latent.
        memory: by name, the modules that give the keys and values of the image's tokens, alone or after
            those of the text: ``(B, n, C)`` or ``(B, n, heads, D)``.
        output: makes the output ``(B, N, D)`` from the tokens.
        patch: latent positions a token spans along one side; 1 if the pipeline packs the latent.
        noise: number of output channels that are predicted noise; they come first.
    """

    embed: nn.Module
    memory: dict[str, nn.Module]
    output: nn.Module
    patch: int
    noise: int

    def grid(self, sample: Tensor, inputs: Mapping[str, Any]) -> Grid | None:
        """Find the token grid of a latent ``(B, C, H, W)``, or of one packed to tokens ``(B, N, C)`` with
        their positions as another input; None if the tokens are not of one picture."""
        if sample.ndim == 3:
            return grid_of_positions(inputs.get("img_ids"), sample.shape[1])
        return Grid(sample.shape[-2] // self.patch, sample.shape[-1] // self.patch)

    def noise_of(self, tokens: Tensor) -> Tensor:
        """Take the predicted noise of an output ``(B, N, D)``; a position's channels are adjacent."""
        positions: Tensor = tokens.unflatten(2, (self.patch**2, -1))
        return positions[..., : self.noise].flatten(2)


class Spans(Enum):
    """The tokens of a video, f frames of h x w tokens, that form one sequence."""

    VIDEO = "video"
    """All tokens of a sample, frame by frame: ``(B, f h w, C)``."""
    FRAME = "frame"
    """The tokens of a frame: ``(B f, h w, C)``."""
    PLACE = "place"
    """The tokens at one position, one from each frame: ``(B h w, f, C)``."""


def in_sequences(values: Tensor, spans: Spans, sequences: int) -> Tensor:
    """Arrange values of tokens ``(B, N)``, frame by frame, in ``sequences`` sequences ``(S, n)``."""
    if spans is Spans.PLACE:
        places = sequences // len(values)
        frames: Tensor = values.unflatten(1, (-1, places))
        return frames.transpose(1, 2).reshape(sequences, -1)
    return values.reshape(sequences, -1)


class Keeps(Enum):
    """The value that is kept of a site, to recover it in later calls."""

    OUTPUT = "output"
    """Its output."""
    UPDATE = "update"
    """The difference between its output and its input tokens."""
    NOTHING = "nothing"
    """Nothing: the tokens that it leaves out are recovered from other tokens of the same call."""


TOKENS = "tokens"
"""Name of the site that stands for all blocks, from the first tokens to the output."""


@dataclass(frozen=True)
class Site:
    """A place in the denoiser that a call computes whole, for some tokens, or not at all.

    Args:
        name: path of the module in the denoiser.
        module: its first argument is tokens ``(B, N, C)``; with `Keeps.UPDATE` it returns them.
        keeps: what is kept of it.
        block: path of the transformer's block that it is, or is in.
        index: number of that block, in the order they run, from 0.
        memory: by name, the modules in it that give the keys and values of its tokens.
        able: whether some of its tokens can be computed without the others.
        attentions: by name, the self-attentions of a block.
        spans: which tokens of a video form one of its sequences; a picture is a video of one frame.
        kind: kind of a layer with tokens of the image; None for a block, and for a layer of the text.
        joint: the text's tokens come first in its sequences.
        text: names of the sites that do the same for the text's tokens.
        entry: the module whose first argument is the site's tokens; None if it is ``module``.
        parts: names of other modules that it is made of.
        fused_attention: the self-attention that shares its last projection with the site: ``module`` reads
            the attention's output and the other parts' outputs. Its tokens are those of the site.
        stream: it stands for all blocks: after ``entry`` there are only the chosen tokens, after ``module``
            all tokens again; the denoiser returns what ``module`` returns.
        leading: blocks before a stream; the attention of the last of them chooses the tokens.
        returns: the form of what ``module`` returns.
        count: number of tensors in the inner tuple of `Returns.DOWN`.
    """

    name: str
    module: nn.Module
    keeps: Keeps = Keeps.OUTPUT
    block: str = ""
    index: int = 0
    memory: Mapping[str, nn.Module] = field(default_factory=dict)
    able: bool = False
    attentions: Mapping[str, nn.Module] = field(default_factory=dict)
    spans: Spans = Spans.VIDEO
    kind: LayerKind | None = None
    joint: bool = False
    text: tuple[str, ...] = ()
    entry: nn.Module | None = None
    parts: frozenset[str] = frozenset()
    fused_attention: Site | None = None
    stream: bool = False
    leading: tuple[str, ...] = ()
    returns: Returns = Returns.OWN
    count: int = 0

    @property
    def key(self) -> str:
        """Key of its values in the store."""
        return self.name if self.keeps is Keeps.OUTPUT else f"{self.name} update"

    @property
    def attention(self) -> Site:
        """Its fused attention; the site itself if it has none."""
        return self.fused_attention or self

    @property
    def whole(self) -> Site:
        """Make a copy that is computed whole or not at all."""
        return replace(self, able=False)

    def tensors(self, out: Any) -> list[Any]:
        """List the tensors that ``module`` returned; a transformer's block: the text or None, the image."""
        match self.returns:
            case Returns.TENSOR | Returns.OWN:
                return [out]
            case Returns.TUPLE:
                return [out[0]]
            case Returns.DOWN:
                return list(out[1])
            case Returns.TOKENS:
                return [None, out]
            case Returns.JOINT:
                return list(out)

    def packed(self, tensors: Sequence[Any]) -> Any:
        """Put tensors into the form that ``module`` returns; the inverse of `tensors`."""
        match self.returns:
            case Returns.TENSOR | Returns.OWN:
                return tensors[0]
            case Returns.TUPLE:
                return (tensors[0],)
            case Returns.DOWN:
                return tensors[-1], tuple(tensors)
            case Returns.TOKENS:
                return tensors[-1]
            case Returns.JOINT:
                return tuple(tensors)


@dataclass(frozen=True)
class Layout:
    """The table of a denoiser.

    Args:
        blocks: the transformer blocks with layers that can leave tokens out, in the order they run.
        skippable: by name, the modules that some skip plan skips.
        skip_plans: the skip plan of each depth from 0 to ``depths - 1``; depth 0 reuses the last output.
        layers: the skip plan in which every attention and feed-forward reuses its last output; None if the
            layers are not known.
        head: the skip plan that computes only what follows the last block; None if that is not known.
        sample: name of the argument with the latent.
        time: name of the argument that holds the timestep.
        timestep_scale: number by which pipelines divide the scheduler's timesteps; None if not known.
        conditional_first: pipelines put the conditional half of a guided batch first.
        text: by name, modules whose output depends on the text alone.
        stream: its tokens, if whole calls of the transformer can compute some of them only.
        block_sites: the blocks of a transformer, as they run; none if a block returns more than tokens.
        layer_sites: the attentions and feed-forwards of its blocks.
        patch: rows and columns of a latent frame that a token spans, in a model of videos.
        norms: norms whose output only some layers read.
        rotary: by path, the attentions that turn queries and keys by the positions of their tokens.
    """

    blocks: tuple[TokenBlock, ...]
    skippable: dict[str, Site]
    skip_plans: tuple[SkipPlan, ...]
    layers: SkipPlan | None
    head: SkipPlan | None
    sample: str = "sample"
    time: str = "timestep"
    timestep_scale: float | None = 1.0
    conditional_first: bool = False
    text: Mapping[str, nn.Module] = field(default_factory=dict)
    stream: Stream | None = None
    block_sites: tuple[Site, ...] = ()
    layer_sites: tuple[Site, ...] = ()
    patch: tuple[int, int] | None = None
    norms: tuple[Norm, ...] = ()
    rotary: Mapping[str, Rotary] = field(default_factory=dict)

    def frame(self, sample: Tensor) -> Grid | None:
        """Make the token grid of a frame of a video's latent ``(B, C, F, H, W)``; None for pictures."""
        if self.patch is None:
            return None
        return Grid(sample.shape[-2] // self.patch[0], sample.shape[-1] // self.patch[1])

    def token_stream(self, reads: int | None = None) -> Site | None:
        """Make the site of all blocks, or of those after one; None if tokens can't be left out.

        Args:
            reads: index of the block before it; None for all blocks.

        Raises:
            ValueError: if no block comes after it.
        """
        if self.stream is None:
            return None
        blocks = tuple(dict.fromkeys(site.block for site in self.layer_sites))
        if reads is not None and reads >= len(blocks) - 1:
            raise ValueError(
                f"block: {reads} is not allowed, it must be < {len(blocks) - 1}: at least one of the "
                f"{len(blocks)} blocks must come after it"
            )
        leading = () if reads is None else blocks[: reads + 1]
        before = tuple(f"{block}." for block in leading)
        return Site(
            TOKENS,
            self.stream.output,
            Keeps.OUTPUT,
            "",
            0,
            {name: module for name, module in self.stream.memory.items() if not name.startswith(before)},
            able=True,
            entry=self.skippable[leading[-1]].module if leading else self.stream.embed,
            stream=True,
            leading=leading,
        )

    @property
    def depths(self) -> int:
        return len(self.skip_plans)

    @property
    def is_known(self) -> bool:
        """Whether more of the model is known than its output."""
        return self.layers is not None

    def skip_plan(self, depth: int) -> SkipPlan | None:
        """Look up the skip plan of a depth; None if everything is computed."""
        if depth == LAYERS:
            return self.layers
        if depth == HEAD:
            # If the last block is not known, only the output can be recovered.
            return self.head or OUTPUT
        return self.skip_plans[depth] if depth < self.depths else None

    def first_layers(self) -> dict[tuple[str, LayerKind], Site]:
        """First layer with tokens of the image, by block and kind, or the attention fused with it."""
        first: dict[tuple[str, LayerKind], Site] = {}
        for site in (site.attention for site in self.layer_sites):
            if site.kind is not None:
                first.setdefault((site.block, site.kind), site)
        return first

    @property
    def top_level(self) -> int:
        """The smallest downsampling of a block with a self-attention."""
        return min((b.downsample for b in self.blocks if b.self_attention is not None), default=1)


def own_layers(blocks: Iterable[Site], layers: Sequence[str]) -> dict[str, Site]:
    """Make a site of each attention and feed-forward of blocks, which can reuse its own last output.

    Args:
        blocks: the blocks, or other modules.
        layers: names of their children; a block may lack some.
    """
    found = {
        f"{block.name}.{layer}": getattr(block.module, layer)
        for block in blocks
        for layer in layers
        if getattr(block.module, layer, None) is not None
    }
    return {name: Site(name, module) for name, module in found.items()}


OUTPUT = SkipPlan(frozenset({""}), frozenset({""}), final=True)
"""The skip plan of depth 0 of every model: the denoiser, under the empty name, reuses its output."""


def whole(denoiser: nn.Module) -> dict[str, Site]:
    """Make the site that `OUTPUT` skips: the denoiser itself."""
    return {"": Site("", denoiser)}


def reuse_all(layers: Iterable[str]) -> SkipPlan:
    """Make the skip plan in which each of these layers reuses its own last output."""
    names = frozenset(layers)
    return SkipPlan(names, names)


def decided(sites: Sequence[Site]) -> SkipPlan:
    """Make the skip plan in which each of these sites does what a method decides for it."""
    keys = {site.name: site.key for site in sites}
    parts = frozenset[str]().union(*(site.parts for site in sites))
    return SkipPlan(frozenset(keys) | parts, frozenset(keys), keys=keys)
