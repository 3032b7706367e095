"""A method at work on a denoiser: what every call does is decided here, once, before it begins."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from regrow.clock import Clock, ConcurrentGenerationError, ManualClock, Position
from regrow.layers import Layer, LayerKind
from regrow.methods.parts import (
    After,
    Attention,
    CallInfo,
    Features,
    Parts,
    TokenRefresh,
    TokenRule,
    TokenSet,
)
from regrow.models.errors import UnsupportedModelError
from regrow.models.table import Cut, Layout, Rotary, Rows, Stream, TokenBlock, TokenLayer
from regrow.reuse.depth import Slot
from regrow.schedule import FULL, LAYERS, Step
from regrow.tokens.grid import Grid
from regrow.tokens.select import Selection, Subset, behind

# What the output of the tokens is kept under.
OUTPUT = "output of tokens"
# Arguments by which a ControlNet adds to the tokens of all blocks.
RESIDUALS = (
    "block_controlnet_hidden_states",
    "controlnet_block_samples",
    "controlnet_single_block_samples",
)


@dataclass(frozen=True)
class CallRecord:
    """What a call of the denoiser did.

    Args:
        position: where in the generation it stood.
        depth: up-path layers computed; `FULL` for a full call.
        ratio: share of tokens pruned where the method prunes; 1 if layers in which tokens should have been
            computed again handed on all they had.
        planned: what the schedule asked for; something else was done where nothing was cached yet.
        inputs: its positional and keyword arguments on the meta device, enough to count its MACs.
        knew_text: whether what depends on the text alone was not computed again.
    """

    position: Position
    depth: int
    ratio: float
    planned: Step
    inputs: tuple[Any, Any]
    knew_text: bool = False


@dataclass(frozen=True)
class Observation:
    """What an observer is told after a call of the denoiser.

    Args:
        record: what the call did.
        blocks: the transformer blocks that ran, by name, each with the selection of tokens that its
            pruned layers computed; None where they computed all.
        tokens: the tokens ``(B, K)`` that the whole call computed; None where it computed all.
        refreshed: by the name of a layer, or of its block if they are its block's, the tokens ``(B, K)``
            that were computed in a call in which layers hand on their last output.
        grid: of a transformer's image tokens, if a call of it can compute some of them only.
        leading: blocks at the beginning of the call that computed all tokens before ``tokens`` were chosen.
    """

    record: CallRecord
    blocks: Mapping[str, Selection | None]
    tokens: Tensor | None = None
    refreshed: Mapping[str, Tensor] = field(default_factory=dict)
    grid: Grid | None = None
    leading: int = 0


Observer = Callable[[Observation], None]


@dataclass
class Generation:
    """The state of one generation. It is dropped when the next one begins."""

    steps: list[Step]
    generator: torch.Generator
    slots: dict[int, Slot] = field(default_factory=dict)
    records: list[CallRecord] = field(default_factory=list)


@dataclass
class Call:
    """What the call in progress does, decided before it begins.

    Hooks leave in it what others read later in the call: selections, chosen tokens and their rows, features
    on their way, and how often they acted.

    Args:
        slot: memory of the branch.
        cut: what is skipped; None in a full call.
        store: the cuts whose features this call keeps.
        dense: skipped modules hand on zeros of the true shape.
        info: what the token rule may look at.
        counts: for each block that prunes, its grid and the number of tokens pruned.
        prepared: what the rule made ready for each grid.
        selections: the selection of the block that runs, by its name.
        restored: how many modules handed on what is cached.
        entered: what the first module of a cut was given in this call.
        count: how many tokens the whole call computes; 0 if it computes all.
        chosen: which they are, once that is known.
        tokens: the tokens that are computed from here on; None if all are.
        tells_apart: whether the image's tokens, and their queries and keys, can be told apart: some of them
            can be computed, and attentions be looked at.
        positions: cosines and sines ``(T + N, D)`` of all tokens, by which queries and keys are turned.
        rotary: those of some tokens, as far as they were asked for.
        remembers: whether keys, values and outputs of the tokens are kept.
        turns: how often modules that may be skipped were called before in this call.
        knows_text: whether the text is that of the last call.
        pruned: how many blocks pruned, or layers computed some tokens.
        refresh: by the name of a layer that hands on its last output, how many tokens it computes; those
            that compute none are left out.
        runs: the modules that these layers are made of.
        whole: layers of the text that are computed beside them.
        refreshed: which tokens they are, by the name of a layer, or of its block if they are its block's.
        caught: by name, what the projections of an observed attention gave.
    """

    slot: Slot
    cut: Cut | None
    store: tuple[Cut, ...]
    dense: bool
    info: CallInfo
    counts: dict[str, tuple[Grid, int]]
    prepared: Mapping[Grid, Tensor]
    selections: dict[str, Selection] = field(default_factory=dict)
    restored: int = 0
    pruned: int = 0
    entered: dict[Cut, list[Any]] = field(default_factory=dict)
    count: int = 0
    chosen: Tensor | None = None
    tokens: Subset | None = None
    tells_apart: bool = False
    positions: Sequence[Tensor] = ()
    rotary: dict[tuple[Subset | None, Rows], tuple[Tensor, ...]] = field(default_factory=dict)
    remembers: bool = False
    turns: dict[str, int] = field(default_factory=dict)
    knows_text: bool = False
    refresh: Mapping[str, int] = field(default_factory=dict)
    runs: frozenset[str] = frozenset()
    whole: frozenset[str] = frozenset()
    refreshed: dict[str, Subset] = field(default_factory=dict)
    caught: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Watched:
    """An attention that is looked at.

    Args:
        name: its path.
        module: it.
        wanted: whether a call looks at it.
        tell: what is done with its input ``(B, N, C)`` and what it multiplied, when it has run.
    """

    name: str
    module: nn.Module
    wanted: Callable[[Call], bool]
    tell: Callable[[Call, Tensor, Attention], None]


class Engine:
    """Decides at the root of the denoiser what the hooks in its leaves do.

    Args:
        denoiser: the module.
        layout: its table.
        parts: the method.
        clock: where calls stand; None until a generation is opened by hand.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        layout: Layout,
        parts: Parts,
        clock: Clock | None,
    ) -> None:
        self.denoiser, self.layout, self.parts = denoiser, layout, parts
        self.clock = clock
        self.rule: TokenRule | None = parts.tokens
        self.token_set: TokenSet | None = parts.token_set
        self.kinds = parts.plan.kinds()
        refreshes = any(step.depth == LAYERS for step in self.kinds)
        self.refresh: TokenRefresh | None = parts.refresh if refreshes else None
        self.refreshing = self._refreshing()
        self.attending = self._attending()
        self._check_supported()
        self.select = self._select_by_rule
        self.served = self._served_blocks()
        self.blocks = tuple(block for served in self.served.values() for block in served)
        self.memory = self._remembering()
        self.rotary = self._rotary()
        self.cuts = self._used_cuts()
        self.pruned = {cut: self._computed(cut) for cut in (None, *self.cuts.values())}
        self.call: Call | None = None
        self.generation: Generation | None = None
        self.observers: list[Observer] = []
        self._busy: int | None = None
        self._lock = threading.Lock()
        self._warned: set[str] = set()

    def _check_supported(self) -> None:
        """Refuse a method that needs what the model has not.

        Raises:
            UnsupportedModelError: saying what.
        """
        name = type(self.denoiser).__name__
        if self.refresh is not None and not self.refreshing:
            wanted = ", ".join(sorted(kind.value for kind in self.refresh.kinds))
            raise UnsupportedModelError(
                f"model: {name} has no layer that can compute some of its tokens by themselves (asked for: "
                f"{wanted}); methods that only reuse, such as FORA and DeepCache, work on it"
            )
        if not any(step.ratio for step in self.kinds):
            return
        if self.rule is not None and not self.layout.blocks:
            instead = (
                self.parts.instead or "methods that only reuse, such as FORA and DeepCache, work on it"
            )
            raise UnsupportedModelError(
                f"model: tokens can't be left out of the layers of {name} yet; {instead}"
            )
        if self.token_set is not None and self.layout.stream is None:
            instead = f"; {self.parts.instead}" if self.parts.instead else ""
            raise UnsupportedModelError(
                f"model: a call of {name} can't compute some of its tokens only{instead}"
            )
        if self.token_set is not None and self.token_set.reads_block is not None:
            last = self.layout.token_layers[-1].layer.index
            if self.token_set.reads_block >= last:
                raise ValueError(
                    f"block: {self.token_set.reads_block} is not allowed, it must be < {last}: some of the "
                    f"{last + 1} blocks of {name} have to come behind it"
                )

    def _served_blocks(self) -> dict[str, tuple[TokenBlock, ...]]:
        """By the name of each block from which tokens are selected, the blocks that leave them out."""
        if self.rule is None or not any(step.ratio for step in self.kinds):
            return {}
        where = self.rule.where
        limit = where.max_downsample
        deepest = self.layout.top_level if limit == "top" else limit
        blocks = [b for b in self.layout.blocks if b.downsample <= deepest]
        if where.features is not Features.ATTENTION:
            return {block.name: (block,) for block in blocks}
        stages: dict[str, list[TokenBlock]] = {}
        for block in blocks:
            if block.stage in stages or block.self_attention is not None:
                stages.setdefault(block.stage, []).append(block)
        first = 0 if where.after is After.SELF_ATTENTION else 1
        served = {stage[0].name: tuple(stage[first:]) for stage in stages.values() if stage[first:]}
        if stages and not served:
            raise ValueError(
                f"after: {where.after.value} is not allowed on {type(self.denoiser).__name__}, in which "
                f"no block comes right behind another; it must be {After.SELF_ATTENTION.value}"
            )
        return served

    def _remembering(self) -> dict[str, nn.Module]:
        """The modules whose output for tokens that a call leaves out is remembered."""
        if self.token_set is None or self.layout.stream is None:
            return {}
        own = tuple(f"{block}." for block in self._leading())
        return {name: m for name, m in self.layout.stream.memory.items() if not name.startswith(own)}

    def _leading(self) -> list[str]:
        """The blocks that compute all tokens in every call, before some are chosen."""
        reads = None if self.token_set is None else self.token_set.reads_block
        blocks = dict.fromkeys(place.layer.block for place in self.layout.token_layers)
        return [] if reads is None else list(blocks)[: reads + 1]

    def narrows_behind(self, stream: Stream) -> nn.Module:
        """The module behind which calls compute some of the tokens only."""
        leading = self._leading()
        return self.layout.skippable[leading[-1]].module if leading else stream.embed

    def _refreshing(self) -> tuple[TokenLayer, ...]:
        """The layers that compute some of their tokens where they hand on their last output."""
        if self.refresh is None:
            return ()
        return tuple(t for t in self.layout.token_layers if t.layer.kind in self.refresh.kinds)

    def _attending(self) -> dict[str, Layer]:
        """By name, the self-attentions that compute some of their tokens, with the layer whose they are."""
        if self.refresh is None or LayerKind.SELF_ATTENTION not in self.refresh.kinds:
            return {}
        attentions = {t.attention.layer.name: t for t in self.refreshing}
        return {name: t.layer for name, t in attentions.items() if t.attention.memory}

    def _rotary(self) -> Rotary | None:
        """The attentions in which queries and keys are turned where they are made, if that is needed."""
        needed = self.token_set is not None or self.attending or self.watched
        return self.layout.stream.rotary if needed and self.layout.stream is not None else None

    @property
    def watched(self) -> tuple[Watched, ...]:
        """The attentions that are looked at."""
        first: dict[tuple[str, LayerKind], TokenLayer] = {}
        for place in (t.attention for t in self.layout.token_layers):
            first.setdefault((place.layer.block, place.layer.kind), place)
        observes: frozenset[LayerKind] = frozenset() if self.refresh is None else self.refresh.observes
        found = [
            Watched(p.layer.name, p.module, _is_seen_whole, partial(self._observe, p.layer))
            for p in first.values()
            if p.layer.kind in observes
        ]
        for block in self._leading()[-1:]:
            place = first[block, LayerKind.SELF_ATTENTION]
            found.append(Watched(place.layer.name, place.module, lambda call: call.count > 0, self._choose))
        if self.rule is not None and self.rule.where.features is Features.ATTENTION:
            by_name = {block.name: block for block in self.layout.blocks}
            for name in self.served:
                module = by_name[name].self_attention
                assert module is not None
                wanted = partial(self._selects, name)
                found.append(Watched(f"{name}.attn1", module, wanted, partial(self._select_after, name)))
        return tuple(found)

    def _observe(self, layer: Layer, call: Call, x: Tensor, attention: Attention) -> None:
        assert self.refresh is not None
        self.refresh.observe(call.slot.observed, layer, attention)

    def _choose(self, call: Call, x: Tensor, attention: Attention | None) -> None:
        """Choose the tokens that the call computes."""
        assert self.token_set is not None
        grid = call.slot.grid
        assert grid is not None
        info = replace(call.info, attention=attention)
        call.chosen, call.slot.chosen = self.token_set.select(call.slot.chosen, grid, call.count, info)

    def _selects(self, name: str, call: Call) -> bool:
        return self.served[name][0].name in call.counts

    def _select_after(self, name: str, call: Call, x: Tensor, attention: Attention) -> None:
        call.info = replace(call.info, attention=attention)
        self.select_from(name, x)

    def select_from(self, name: str, x: Tensor) -> None:
        """Select the tokens of the blocks that a block's features ``(B, N, C)`` decide for."""
        call = self.call
        if call is None or not self._selects(name, call):
            return
        served = self.served[name]
        selection = self.select(served[0].name, x)
        call.selections |= {block.name: selection for block in served}

    def narrow(self) -> Tensor | None:
        """From here on the call in progress computes the chosen tokens, which are returned; None: all."""
        call = self.call
        if call is None or call.chosen is None:
            return None
        assert call.slot.grid is not None
        call.tokens = Subset(call.chosen, call.slot.grid.tokens)
        return call.chosen

    def positions(self, attention: str, rows: Rows) -> tuple[Tensor, ...]:
        """Cosines and sines of the tokens whose queries and keys an attention makes in the present call.

        Returns:
            Each ``(n, D)``; ``(B * n, D)`` where it makes those of some of the image's tokens only.
        """
        call = self.call
        assert call is not None
        assert call.slot.grid is not None
        layer = self.attending.get(attention)
        refreshes = layer is not None and layer.name in call.refresh
        tokens = self.refreshed(layer) if layer is not None and refreshes else call.tokens
        if (tokens, rows) not in call.rotary:
            text = len(call.positions[0]) - call.slot.grid.tokens
            call.rotary[tokens, rows] = tuple(_rows_of(t, rows, text, tokens) for t in call.positions)
        return call.rotary[tokens, rows]

    def _used_cuts(self) -> dict[int, Cut]:
        """The cuts of the depths that the plan uses on this model."""
        depths = sorted({step.depth for step in self.kinds})
        return {d: cut for d in depths if (cut := self.layout.cut(d)) is not None}

    def _computed(self, cut: Cut | None) -> tuple[TokenBlock, ...]:
        """The blocks in which the rule prunes, of those that run."""
        return tuple(b for b in self.blocks if _runs(b, cut))

    def prunes(self, step: Step) -> bool:
        """Whether a call of the plan prunes in any layer."""
        return step.ratio > 0 and bool(self.pruned[self.cuts.get(step.depth)])

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "a denoiser can't be copied while a method is applied to it; call run.remove() first"
        )

    def warn_once(self, about: str, message: str) -> None:
        """Warn, the first time for this run."""
        if about not in self._warned:
            self._warned.add(about)
            warnings.warn(message, stacklevel=2)

    def begin(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Decide what the call that begins now does."""
        me = threading.get_ident()
        with self._lock:
            if self._busy not in (None, me) and _is_inside(self._busy, self.denoiser):
                raise ConcurrentGenerationError(
                    "the denoiser is in use by another thread; an accelerated denoiser serves one "
                    "generation at a time. Give each thread a pipeline with a denoiser of its own."
                )
            self._busy = me
        self.call = None
        if torch.is_grad_enabled():
            self.warn_once("grad", "regrow steps aside while gradients are recorded; use torch.no_grad()")
            return
        sample = args[0] if args else kwargs.get(self.layout.sample)
        timestep = args[1] if len(args) > 1 else kwargs.get("timestep")
        if sample is None or timestep is None:
            return  # The denoiser says itself what it misses.
        if self.clock is None:
            self.warn_once(
                "clock",
                "the denoiser is used without a pipeline and outside run.generation(num_steps); its "
                "calls are computed in full",
            )
            return
        position = self.clock.read(timestep)
        if position is not None:
            self._decide(position, sample, args, kwargs)

    def _decide(
        self, position: Position, sample: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        if position.first or self.generation is None:
            chooser = self.rule or self.token_set
            seed = 0 if chooser is None else chooser.seed
            plan = self.parts.plan.resample(position.total)
            if plan.found is not None and plan.found.calls != position.total:
                self.warn_once(
                    "origin calls",
                    f"the schedule was found for {plan.found.calls} calls; this generation has "
                    f"{position.total}, to which it is resampled",
                )
            self.generation = Generation(list(plan.steps()), _generator(sample.device, seed))
            self._warn_of_whole_calls(self.generation.steps[position.index :])
        generation = self.generation
        slot = self._slot(generation, position.branch, sample, args, kwargs)
        slot.calls += 1
        planned = generation.steps[position.index]
        cut = self.cuts.get(planned.depth)
        begins = self.token_set is not None and slot.calls <= self.token_set.full_calls
        if cut is not None and (begins or not any(cut.key(n) in slot.features for n in cut.restore)):
            cut = None
        depth = FULL if cut is None else planned.depth
        residuals = any(v is not None for k, v in kwargs.items() if k.endswith("additional_residuals"))
        residuals |= kwargs.get("mid_block_additional_residual") is not None
        info = CallInfo(
            sample.shape[0],
            slot.guided,
            tuple(slot.outputs),
            generation.generator,
            self.layout.conditional_first,
        )
        counts = self._counts(sample, planned.ratio, cut)
        grids = sorted({grid for grid, _ in counts.values()}, key=lambda g: -g.tokens)
        prepared: Mapping[Grid, Tensor] = {}
        if self.rule is not None and grids and not sample.is_meta:
            prepared = self.rule.prepare(grids, info)
        self.call = Call(
            slot=slot,
            cut=cut,
            store=tuple(c for c in self.cuts.values() if cut is None or (c.final and not cut.final)),
            dense=residuals or _freeu(self.denoiser),
            info=info,
            counts=counts,
            prepared=prepared,
        )
        self.call.knows_text = bool(self.layout.text) and slot.knows(kwargs.get("encoder_hidden_states"))
        if not self.call.knows_text:
            # A module that this call skips must not hand on another text's output later.
            for name in self.layout.text:
                slot.features.pop(name, None)
        self.call.tells_apart = self._tells_apart(slot)
        self.call.remembers = self.token_set is not None and _streams(cut) and self.call.tells_apart
        if self.call.remembers:
            self._leave_out(self.call, sample, planned.ratio, kwargs)
        ratio = planned.ratio if counts or self.call.count else 0.0
        if self.refresh is not None and cut is None:
            slot.observed = self.refresh.begin()
        if self.refresh is not None and cut is self.layout.layers:
            if self.call.tells_apart:
                self._refresh(self.refresh, self.call, planned.ratio, kwargs)
            ratio = planned.ratio if self.call.refresh else 1.0
        generation.records.append(
            CallRecord(position, depth, ratio, planned, slot.inputs, self.call.knows_text)
        )

    def _warn_of_whole_calls(self, steps: Sequence[Step]) -> None:
        """Say if no call of a generation can leave tokens out, though the method would."""
        if self.token_set is None or not any(step.ratio for step in self.kinds):
            return
        begin = self.token_set.full_calls
        if not any(step.ratio and _streams(self.cuts.get(step.depth)) for step in steps[begin:]):
            self.warn_once(
                "whole",
                f"no call of this generation leaves tokens out: of {len(steps)} calls the first {begin} "
                "are computed in full, and those behind them, if any, compute no tokens at all",
            )

    def _slot(
        self,
        generation: Generation,
        branch: int,
        sample: Tensor,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Slot:
        """The memory of a branch; a new one if the batch is another."""
        text = kwargs.get("encoder_hidden_states")
        key = (sample.shape, sample.dtype, sample.device, None if text is None else text.shape)
        slot = generation.slots.get(branch)
        if slot is None or slot.key != key:
            chooser = self.rule or self.token_set or self.refresh
            wanted = chooser is not None and chooser.aligns
            inputs = (without_data(args), without_data(_countable(kwargs)))
            slot = Slot(key, inputs, wanted and _is_guided(sample))
            if self.layout.stream is not None:
                slot.grid = self.layout.stream.grid(sample, kwargs)
            generation.slots[branch] = slot
        return slot

    def _tells_apart(self, slot: Slot) -> bool:
        """Whether some of the image's tokens can be computed, and attentions be looked at."""
        if self.layout.stream is None or (self.token_set is None and self.refresh is None):
            return False
        instead = (
            "all tokens are computed" if self.refresh is None else "layers hand on their last output whole"
        )
        if slot.grid is None:
            self.warn_once("grid", f"{instead}, because the tokens are not those of one picture (Kontext)")
        elif self.rotary is not None and self.rotary.others():
            self.warn_once(
                "processor",
                f"{instead}, because attention processors were replaced after regrow.apply (IP-Adapter), "
                "so that queries can't be turned before the attention",
            )
        else:
            return True
        # What was kept gets old.
        slot.outputs.clear()
        return False

    def forget_tokens(self) -> None:
        """Keep no keys, values and outputs of the call in progress: they are of a part of its batch."""
        assert self.call is not None
        self.call.remembers = False
        self.call.slot.outputs.clear()
        self.warn_once(
            "part",
            "all tokens are computed, because attention processors project a part of the batch only "
            "(perturbed-attention guidance)",
        )

    def _leave_out(self, call: Call, sample: Tensor, ratio: float, kwargs: Mapping[str, Any]) -> None:
        """Decide how many tokens a call computes, and which, unless that waits for an attention."""
        if ratio == 0:
            return
        stream, slot = self.layout.stream, call.slot
        assert stream is not None
        assert self.token_set is not None
        if any(kwargs.get(name) is not None for name in RESIDUALS):
            self.warn_once("residuals", "a ControlNet adds to all tokens; its calls are computed in full")
            return
        if len(slot.outputs) < 2 or slot.calls <= self.token_set.full_calls:
            return
        if not all(
            self.denoiser.get_submodule(name) is module for name, module in self.memory.items()
        ) or not any(name in slot.features for name in self.memory if name.endswith("to_v")):
            self.warn_once(
                "memory",
                "all tokens are computed, because the attentions' projections were replaced or fused after "
                "regrow.apply (LoRA, fuse_qkv_projections), so that keys can't be kept; apply regrow last",
            )
            return
        assert slot.grid is not None
        # As CAT Pruning's released code rounds: 1228 of 4096 tokens for 0.3.
        call.count = max(int((1 - ratio) * slot.grid.tokens + 1e-6), 1)
        if self.token_set.reads_block is None:
            self._choose(call, sample, None)

    def _refresh(self, rule: TokenRefresh, call: Call, ratio: float, kwargs: Mapping[str, Any]) -> None:
        """Decide how many tokens each layer of a call computes that hands on its last output."""
        grid = call.slot.grid
        assert grid is not None
        able = [place for place in self.refreshing if self._can_refresh(place, call.slot, kwargs)]
        counts = {t.layer.name: rule.count(t.layer, grid.tokens, ratio) for t in able}
        call.refresh = {name: count for name, count in counts.items() if count > 0}
        refreshing = [t for t in able if t.layer.name in call.refresh]
        call.runs = frozenset().union(*(t.parts for t in refreshing))
        call.whole = frozenset().union(*(t.text for t in refreshing))

    def _can_refresh(self, place: TokenLayer, slot: Slot, kwargs: Mapping[str, Any]) -> bool:
        """Whether a layer has what it needs to compute some of its tokens by themselves."""
        layer = place.layer
        if layer.name not in slot.features:
            # The last full call left it out (skip-layer guidance).
            return False
        block = self.layout.skippable[layer.block].module
        if layer.kind is LayerKind.FEED_FORWARD and getattr(block, "_chunk_size", None) is not None:
            self.warn_once(
                "chunks",
                "feed-forwards hand on their last output whole, because they are computed in chunks; call "
                "disable_forward_chunking() to have some of their tokens computed",
            )
            return False
        attention = place.attention
        if attention.layer.name not in self.attending:
            return place.beside is None or attention.layer.name in slot.features
        known = all(
            name in slot.features and self.denoiser.get_submodule(name) is module
            for name, module in attention.memory.items()
        )
        if not known or kwargs.get("attention_mask") is not None:
            self.warn_once(
                "memory",
                "self-attentions, and what is computed with them, hand on their last output whole, because "
                "their projections were replaced or fused after regrow.apply (LoRA, fuse_qkv_projections), "
                "so that keys can't be kept, or their tokens are masked; apply regrow last",
            )
            return False
        return True

    def refreshed(self, layer: Layer) -> Subset:
        """The tokens that a layer computes in the call in progress."""
        call, rule = self.call, self.refresh
        assert call is not None
        assert rule is not None
        grid = call.slot.grid
        assert grid is not None
        key = layer.block if rule.per_block else layer.name
        if key not in call.refreshed:
            count = call.refresh[layer.name]
            tokens = rule.select(call.slot.observed, layer, grid, count, call.info)
            call.refreshed[key] = Subset(tokens, grid.tokens)
        return call.refreshed[key]

    def _counts(self, sample: Tensor, ratio: float, cut: Cut | None) -> dict[str, tuple[Grid, int]]:
        """For each block that prunes, its grid and how many tokens go."""
        blocks = self.pruned[cut]
        if self.rule is None or ratio == 0 or not blocks:
            return {}
        height, width = sample.shape[-2:]
        counts = {}
        for block in blocks:
            grid = block.grid(height, width, self.rule.patch)
            if grid.pruned(ratio) > 0:
                counts[block.name] = (grid, grid.pruned(ratio))
        if not counts:
            self.warn_once(
                "grid",
                f"a latent of {height} x {width} has no layer in which a ratio of {ratio:g} prunes a "
                "token; nothing is pruned",
            )
        return counts

    def _select_by_rule(self, name: str, x: Tensor) -> Selection:
        """The selection of a block from its features ``(B, N, C)``."""
        call = self.call
        assert call is not None
        assert self.rule is not None
        grid, count = call.counts[name]
        return self.rule.select(x, grid, count, call.prepared.get(grid), call.info)

    def end(self, output: Any) -> None:
        """The call is over; ``output`` is None if it raised."""
        if self._busy != threading.get_ident():
            return
        call, self.call, self._busy = self.call, None, None
        if call is None or output is None or self.generation is None:
            return
        if call.cut is not None and not call.restored:
            self.warn_once(
                "hooks",
                "a cached call was computed in full, because something replaced the forward methods of "
                "the denoiser's blocks after regrow.apply; apply regrow last",
            )
        if call.counts and not call.pruned:
            self.warn_once(
                "prune",
                f"none of the {len(call.counts)} layers that should prune tokens did, because something "
                "replaced their forward methods after regrow.apply; apply regrow last",
            )
        if call.refresh and not call.pruned:
            self.warn_once(
                "refresh",
                f"none of the {len(call.refresh)} layers that should compute some of their tokens did, "
                "because something replaced their forward methods after regrow.apply; apply regrow last",
            )
        if call.chosen is not None and call.tokens is None:
            self.warn_once(
                "narrow",
                "all tokens are computed, because something replaced the forward method of the module "
                "behind which some should be left out after regrow.apply; apply regrow last",
            )
        if (call.count and call.tokens is None) or (call.counts and not call.pruned):
            # Nothing was left out: an attention to choose by did not run (skip-layer guidance), for one.
            self.generation.records[-1] = replace(self.generation.records[-1], ratio=0.0)
        if call.remembers and OUTPUT in call.slot.features:
            assert self.layout.stream is not None
            call.slot.remember(self.layout.stream.noise_of(call.slot.features[OUTPUT]))
        reads = self.rule is not None and self.rule.reads_outputs
        if reads and (call.cut is None or not call.cut.final):
            call.slot.remember(output[0])
        self._tell(call, self.generation.records[-1])

    def _tell(self, call: Call, record: CallRecord) -> None:
        """Tell the observers what a call computed."""
        if not self.observers:
            return
        ran = (b.name for b in self.layout.blocks if _runs(b, call.cut))
        blocks = {name: call.selections.get(name) for name in ran}
        refreshed = {name: chosen.tokens for name, chosen in call.refreshed.items()}
        tokens = None if call.tokens is None else call.tokens.tokens
        for observer in self.observers:
            observer(Observation(record, blocks, tokens, refreshed, call.slot.grid, len(self._leading())))

    def release(self) -> None:
        """Drop what is cached; the records of the last generation stay for the report."""
        self.call = None
        if self.generation is not None:
            self.generation.slots.clear()

    @contextmanager
    def manual(self, num_steps: int) -> Iterator[ManualClock]:
        """A generation stepped by hand."""
        clock, before = ManualClock(num_steps, self.release), self.clock
        self.clock = clock
        try:
            yield clock
        finally:
            self.release()
            self.clock = before


def _is_seen_whole(call: Call) -> bool:
    """Whether a call computes all tokens, which can be told apart."""
    return call.cut is None and call.tells_apart


def _rows_of(table: Tensor, rows: Rows, text: int, tokens: Subset | None) -> Tensor:
    """The rows of a table ``(T + N, D)`` of T text tokens and then the image's, or some of those."""
    if rows is Rows.TEXT:
        return table[:text]
    if tokens is None:
        return table if rows is Rows.JOINT else table[text:]
    index = behind(tokens.tokens, text)
    return table[(index if rows is Rows.JOINT else index[:, text:]).flatten()]


def _runs(block: TokenBlock, cut: Cut | None) -> bool:
    """Whether a block runs, with its layers, in a call with that cut."""
    own = f"{block.name}."
    return cut is None or not any(own.startswith(f"{n}.") or n.startswith(own) for n in cut.skip)


def _streams(cut: Cut | None) -> bool:
    """Whether tokens go through blocks in a call with that cut."""
    return cut is None or cut.entry is not None


def _is_inside(thread: int | None, module: nn.Module) -> bool:
    """Whether a thread is in a call of a module. One that was interrupted there told nobody."""
    frame = sys._current_frames().get(thread or 0)
    while frame is not None:
        if frame.f_locals.get("self") is module:
            return True
        frame = frame.f_back
    return False


def _countable(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments with which a model without adapters can be run; an IP-Adapter's part is not counted."""
    out = dict(kwargs)
    if out.get("joint_attention_kwargs"):
        kept = out["joint_attention_kwargs"].items()
        out["joint_attention_kwargs"] = {k: v for k, v in kept if not k.startswith("ip_")}
    return out


def _is_guided(sample: Tensor) -> bool:
    """Whether a batch is two halves for guidance: the same input twice. Looked at once a generation."""
    if sample.shape[0] % 2 or sample.is_meta:
        return False
    first, second = sample.chunk(2)
    return bool(torch.equal(first, second))


def _generator(device: torch.device, seed: int) -> torch.Generator:
    where = "cpu" if device.type == "meta" else device
    return torch.Generator(where).manual_seed(seed)


def _freeu(denoiser: nn.Module) -> bool:
    """Whether FreeU is on: it transforms what up blocks are given."""
    return any(getattr(b, "b1", None) is not None for b in getattr(denoiser, "up_blocks", ()))


def without_data(value: Any) -> Any:
    """The same structure with tensors on the meta device, as a model without weights takes them."""
    if isinstance(value, Tensor):
        # Models without weights are float32.
        dtype = torch.float32 if value.is_floating_point() else value.dtype
        return torch.empty_like(value, device="meta", dtype=dtype)
    if isinstance(value, Mapping):
        return {k: without_data(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(without_data(v) for v in value)
    return value
