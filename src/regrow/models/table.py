"""What regrow needs to know of a denoiser: where tokens are, and what can be skipped at each depth."""

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
        stage: path of what holds the blocks that follow each other with the same tokens.
        block: the block; its first input is ``(B, N, C)``.
        downsample: how many latent positions a token spans along one side.
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
        """The block's grid of tokens for a latent of ``height x width``; without a patch, it is all one."""
        rows, columns = ceil(height / self.downsample), ceil(width / self.downsample)
        return Grid(rows, columns, max(rows, columns) if patch is None else patch)


class Returns(Enum):
    """What a module that may be skipped returns."""

    TENSOR = "tensor"
    TUPLE = "tuple"  # (tensor,)
    DOWN = "down"  # tensor, (tensor, ...): a U-Net's down block
    TOKENS = "tokens"  # tensor (B, N, C), as it takes
    JOINT = "joint"  # text or None, image: each (B, N, C), as it takes them
    OWN = "own"  # whatever it returns; where it is left out, what it returned before


@dataclass(frozen=True)
class SkipPlan:
    """A call that computes less: what it skips, and where cached features come in.

    Args:
        skip: names of the modules that do not run.
        restore: those of them that return what is cached; what the others return is read by nobody.
        entry: the first skipped module, if what is cached is what the skipped ones added to its input;
            None if it is the restoring module's own output.
        final: what is restored is handed to the denoiser's caller.
        keys: what the cached features of restoring modules are kept under, where they have names for it.
    """

    skip: frozenset[str]
    restore: frozenset[str]
    entry: str | None = None
    final: bool = False
    keys: Mapping[str, str] = field(default_factory=dict, hash=False, compare=False)

    def key(self, name: str) -> str:
        """What the cached feature of a restoring module is kept under."""
        if name in self.keys:
            return self.keys[name]
        return name if self.entry is None else f"{self.entry} to {name}"

    def feeds(self, name: str, restoring: str) -> bool:
        """Whether what a skipped module returns reaches nobody but a restoring one."""
        # With several, each restores what is in its own block.
        return len(self.restore) == 1 or name.rpartition(".")[0] == restoring.rpartition(".")[0]


@dataclass(frozen=True)
class Stream:
    """Where the image's tokens begin and end, and what is remembered of those that a call leaves out.

    Args:
        embed: makes the tokens ``(B, N, C)`` from the latent.
        memory: by name, the modules that give the keys and values of the image's tokens, alone or behind
            those of the text: ``(B, n, C)`` or ``(B, n, heads, D)``.
        output: makes the output of the tokens ``(B, N, D)``.
        patch: latent positions a token spans along one side; 1 where the pipeline packs the latent.
        noise: of the output's channels, how many are predicted noise; they come first.
    """

    embed: nn.Module
    memory: dict[str, nn.Module]
    output: nn.Module
    patch: int
    noise: int

    def grid(self, sample: Tensor, inputs: Mapping[str, Any]) -> Grid | None:
        """The grid of tokens of a latent ``(B, C, H, W)``, or one packed to tokens ``(B, N, C)``, whose
        positions are an input of their own; None if they are not those of one picture."""
        if sample.ndim == 3:
            return grid_of_positions(inputs.get("img_ids"), sample.shape[1])
        return Grid(sample.shape[-2] // self.patch, sample.shape[-1] // self.patch)

    def noise_of(self, tokens: Tensor) -> Tensor:
        """The predicted noise in an output ``(B, N, D)``, which has the channels of a position together."""
        positions: Tensor = tokens.unflatten(2, (self.patch**2, -1))
        return positions[..., : self.noise].flatten(2)


class Spans(Enum):
    """Which tokens of a video are one sequence, of its f frames of h x w tokens."""

    VIDEO = "video"
    """All of a sample, frame by frame: ``(B, f h w, C)``."""
    FRAME = "frame"
    """Those of a frame: ``(B f, h w, C)``."""
    PLACE = "place"
    """Those of a place in the picture, one of each frame: ``(B h w, f, C)``."""


def in_sequences(values: Tensor, spans: Spans, sequences: int) -> Tensor:
    """Values of a sample's tokens ``(B, N)``, frame by frame, as those of so many sequences ``(S, n)``."""
    if spans is Spans.PLACE:
        places = sequences // len(values)
        frames: Tensor = values.unflatten(1, (-1, places))
        return frames.transpose(1, 2).reshape(sequences, -1)
    return values.reshape(sequences, -1)


class Keeps(Enum):
    """What is kept of a site, from which later calls recover it."""

    OUTPUT = "output"
    """What it returned."""
    UPDATE = "update"
    """What it added to the tokens that it was given."""
    NOTHING = "nothing"
    """Nothing: tokens that it leaves out follow from others of the same call."""


TOKENS = "tokens"
"""Name of the site that is the way of the tokens through the blocks."""


@dataclass(frozen=True)
class Site:
    """A place that a call computes whole, for some tokens, or not at all.

    Args:
        name: path of the module in the denoiser.
        module: takes tokens ``(B, N, C)`` first and, where `Keeps.UPDATE` is kept, returns them.
        keeps: what is kept of it.
        block: path of the transformer's block that it is, or is in.
        index: of that block, in the order they run, from 0.
        memory: by name, the modules in it that give the keys and values of its tokens.
        able: whether some of its tokens can be computed by themselves.
        attentions: of a block, by name, the self-attentions in it.
        spans: which tokens of a video are one of its sequences; a picture is a video of one frame.
        kind: of a layer with tokens of the image; None of a block, and of a layer of the text.
        joint: the text's tokens come first in its sequences.
        text: names of the sites that do the same for the text's tokens.
        entry: takes the tokens, as ``module`` returns them, as its first argument; None if ``module`` does.
        parts: names of other modules that it is made of.
        fused_attention: of a block with one last projection for both, the self-attention whose output
            ``module`` reads beside what the other parts make. Its tokens are those of the site.
        stream: it is the way of the tokens through the blocks: they are some behind what ``entry`` returns,
            and all again behind ``module``, whose output the denoiser hands out.
        leading: of a stream, the blocks before it, by the attention of the last of which tokens are chosen.
        returns: the form of what ``module`` returns.
        count: for `Returns.DOWN`, the number of tensors in the inner tuple.
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
        """What its values are kept under."""
        return self.name if self.keeps is Keeps.OUTPUT else f"{self.name} update"

    @property
    def attention(self) -> Site:
        """The attention that is fused with it, or else the site itself."""
        return self.fused_attention or self

    @property
    def whole(self) -> Site:
        """The same, computed whole or not at all."""
        return replace(self, able=False)

    def tensors(self, out: Any) -> list[Any]:
        """The tensors in what ``module`` returned; of a transformer's block the text or None, the image."""
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
        """What ``module`` would return with these tensors, see `tensors`."""
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
        blocks: the transformer blocks in which tokens can be left out of a layer, in the order they run.
        skippable: the modules that some cut skips, by name.
        cuts: the cut of each depth from 0 to ``depths - 1``; that of depth 0 reuses the last output.
        layers: the cut in which every attention and feed-forward reuses its last output; None where the
            model's layers are not known.
        head: the cut that computes what lies behind the last block alone; None where it is not known.
        sample: name of the argument that is denoised.
        time: name of the argument that holds the timestep.
        timestep_scale: what pipelines divide the scheduler's timesteps by; None if that is not known.
        conditional_first: of a guided batch, the pipelines put the conditional half first.
        text: by name, modules whose output depends on the text alone.
        stream: of a transformer in which a call can compute some of the tokens only.
        block_sites: the blocks of a transformer, as they run; none where a block returns more than tokens.
        layer_sites: the attentions and feed-forwards of its blocks.
        patch: of a model of videos, rows and columns of a latent frame that a token spans.
        norms: those whose output only some layers read.
        rotary: by path, the attentions that turn queries and keys by the positions of their tokens.
    """

    blocks: tuple[TokenBlock, ...]
    skippable: dict[str, Site]
    cuts: tuple[SkipPlan, ...]
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
        """The grid of tokens of one frame of a video's latent ``(B, C, F, H, W)``; None of pictures."""
        if self.patch is None:
            return None
        return Grid(sample.shape[-2] // self.patch[0], sample.shape[-1] // self.patch[1])

    def token_stream(self, reads: int | None = None) -> Site | None:
        """The way of the tokens through the blocks, or through those behind one; None if some can't go it.

        Args:
            reads: index of the block.

        Raises:
            ValueError: if no block comes behind it.
        """
        if self.stream is None:
            return None
        blocks = tuple(dict.fromkeys(site.block for site in self.layer_sites))
        if reads is not None and reads >= len(blocks) - 1:
            raise ValueError(
                f"block: {reads} is not allowed, it must be < {len(blocks) - 1}: some of the {len(blocks)} "
                "blocks have to come behind it"
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
        return len(self.cuts)

    @property
    def is_known(self) -> bool:
        """Whether more is known of the model than its output."""
        return self.layers is not None

    def cut(self, depth: int) -> SkipPlan | None:
        """The cut of a depth; None if everything is computed."""
        if depth == LAYERS:
            return self.layers
        if depth == HEAD:
            # Where the last block is not known, the output is what can be recovered.
            return self.head or OUTPUT
        return self.cuts[depth] if depth < self.depths else None

    def first_layers(self) -> dict[tuple[str, LayerKind], Site]:
        """By block and kind, the first layer with tokens of the image, or the attention fused with it."""
        first: dict[tuple[str, LayerKind], Site] = {}
        for site in (site.attention for site in self.layer_sites):
            if site.kind is not None:
                first.setdefault((site.block, site.kind), site)
        return first

    @property
    def top_level(self) -> int:
        """The smallest downsampling at which there is a self-attention."""
        return min((b.downsample for b in self.blocks if b.self_attention is not None), default=1)


def own_layers(blocks: Iterable[Site], layers: Sequence[str]) -> dict[str, Site]:
    """The attentions and feed-forwards of blocks, each of which can reuse its own last output.

    Args:
        blocks: the blocks, or other modules.
        layers: names of their children; those that a block lacks are left out.
    """
    found = {
        f"{block.name}.{layer}": getattr(block.module, layer)
        for block in blocks
        for layer in layers
        if getattr(block.module, layer, None) is not None
    }
    return {name: Site(name, module) for name, module in found.items()}


OUTPUT = SkipPlan(frozenset({""}), frozenset({""}), final=True)
"""The denoiser itself, under the empty name, reuses its output: the cut of depth 0 of every model."""


def whole(denoiser: nn.Module) -> dict[str, Site]:
    """What `OUTPUT` skips."""
    return {"": Site("", denoiser)}


def reuse_all(layers: Iterable[str]) -> SkipPlan:
    """The cut in which all of these reuse their own last output."""
    names = frozenset(layers)
    return SkipPlan(names, names)


def decided(sites: Sequence[Site]) -> SkipPlan:
    """The cut in which each of these sites does what a method decides for it."""
    keys = {site.name: site.key for site in sites}
    parts = frozenset[str]().union(*(site.parts for site in sites))
    return SkipPlan(frozenset(keys) | parts, frozenset(keys), keys=keys)
