"""Whole calls that compute some of the image's tokens: when, how many, and which."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from regrow.engine.call import OUTPUT, Call, Watched
from regrow.engine.inputs import adds_to_tokens
from regrow.layers import LayerKind
from regrow.methods.parts import Attention, TokenSet
from regrow.models.errors import UnsupportedModelError
from regrow.models.table import Cut, Layout
from regrow.reuse.depth import Slot
from regrow.schedule import Step
from regrow.tokens.select import Subset


class Lean:
    """A choice of the tokens of whole calls at work on a transformer.

    Args:
        token_set: the choice.
        denoiser: the model.
        layout: its table.
        cuts: those that the plan uses, by their depth.
        asked: whether the plan has a ratio above 0.
        instead: what to say to somebody whose model the choice doesn't fit.
        warn_once: takes what a warning is about, and the warning.

    Raises:
        UnsupportedModelError: if a call of the model can't compute some of its tokens only.
        ValueError: if no block comes behind the one that the choice reads, or a cut skips that.
    """

    def __init__(
        self,
        token_set: TokenSet,
        denoiser: nn.Module,
        layout: Layout,
        cuts: Mapping[int, Cut],
        asked: bool,
        instead: str,
        warn_once: Callable[[str, str], None],
    ) -> None:
        self.token_set = token_set
        self._denoiser, self._layout, self._warn_once = denoiser, layout, warn_once
        self._asked = asked
        if asked:
            self._check_supported(instead)
        self.leading = self._leading()
        """The blocks that compute all tokens in every call, before some are chosen."""
        if asked:
            self._check_leading(cuts)
        self.memory = self._memory()
        """By name, the modules whose output for tokens that a call leaves out is remembered."""

    def _check_supported(self, instead: str) -> None:
        name, layout = type(self._denoiser).__name__, self._layout
        if layout.stream is None:
            raise UnsupportedModelError(
                f"model: a call of {name} can't compute some of its tokens only"
                + (f"; {instead}" if instead else "")
            )
        reads, last = self.token_set.reads_block, layout.layer_sites[-1].index
        if reads is not None and reads >= last:
            raise ValueError(
                f"block: {reads} is not allowed, it must be < {last}: some of the {last + 1} blocks of "
                f"{name} have to come behind it"
            )

    def _leading(self) -> tuple[str, ...]:
        reads = self.token_set.reads_block
        blocks = dict.fromkeys(site.block for site in self._layout.layer_sites)
        return () if reads is None else tuple(blocks)[: reads + 1]

    def _check_leading(self, cuts: Mapping[int, Cut]) -> None:
        for depth, cut in cuts.items():
            if cut.entry in self.leading:
                raise ValueError(
                    f"block: {self.token_set.reads_block} is not allowed with cached calls of depth "
                    f"{depth}, it must be < {self.leading.index(cut.entry)}: they leave it out"
                )

    def _memory(self) -> dict[str, nn.Module]:
        stream = self._layout.stream
        own = tuple(f"{block}." for block in self.leading)
        memory = {} if stream is None else stream.memory
        return {name: module for name, module in memory.items() if not name.startswith(own)}

    @property
    def behind(self) -> nn.Module:
        """The module behind which calls compute some of the tokens only."""
        if self.leading:
            return self._layout.skippable[self.leading[-1]].module
        assert self._layout.stream is not None
        return self._layout.stream.embed

    @property
    def watched(self) -> Iterator[Watched]:
        """The attention that tokens are chosen by."""
        for block in self.leading[-1:]:
            site = self._layout.first_layers()[block, LayerKind.SELF_ATTENTION]
            yield Watched(site.name, site.module, lambda call: call.count > 0, self._choose)

    def begins(self, slot: Slot) -> bool:
        """Whether a generation is at its first calls, which are full."""
        return slot.calls <= self.token_set.full_calls

    def warn_of_whole_calls(self, steps: Sequence[Step], cuts: Mapping[int, Cut]) -> None:
        """Say if no call of a generation can leave tokens out, though the method would."""
        if not self._asked:
            return
        first = self.token_set.full_calls
        if not any(step.ratio and streams(cuts.get(step.depth)) for step in steps[first:]):
            self._warn_once(
                "whole",
                f"no call of this generation leaves tokens out: of {len(steps)} calls the first {first} "
                "are computed in full, and none of those behind them, if any, leaves out some",
            )

    def leave_out(self, call: Call, ratio: float, kwargs: Mapping[str, Any]) -> None:
        """Decide how many tokens a call computes, and which, unless that waits for an attention."""
        if ratio == 0:
            return
        slot = call.slot
        if adds_to_tokens(kwargs):
            self._warn_once("residuals", "a ControlNet adds to all tokens; its calls are computed in full")
            return
        if len(slot.outputs) < 2 or self.begins(slot):
            return
        if not any(name in slot.store for name in self.memory if name.endswith("to_v")):
            self._warn_once(
                "memory",
                "all tokens are computed, because the attentions' projections were fused, so that keys "
                "can't be kept; call unfuse_qkv_projections()",
            )
            return
        assert slot.grid is not None
        # As CAT Pruning's released code rounds: 1228 of 4096 tokens for 0.3.
        call.count = max(int((1 - ratio) * slot.grid.tokens + 1e-6), 1)
        if self.token_set.reads_block is None:
            self._choose(call, None, None)

    def _choose(self, call: Call, x: Tensor | None, attention: Attention | None) -> None:
        """Choose the tokens that the call computes."""
        grid = call.slot.grid
        assert grid is not None
        info = replace(call.info, attention=attention)
        call.chosen, call.slot.chosen = self.token_set.select(call.slot.chosen, grid, call.count, info)

    def narrow(self, call: Call | None) -> Tensor | None:
        """From here on a call computes the chosen tokens, which are returned; None: all."""
        if call is None or call.chosen is None:
            return None
        assert call.slot.grid is not None
        call.tokens = Subset(call.chosen, call.slot.grid.tokens)
        return call.chosen

    def forget(self, call: Call) -> None:
        """Keep no keys, values and outputs of a call: they are of a part of its batch."""
        call.remembers = False
        call.slot.outputs.clear()
        call.slot.store.drop(*self.memory, OUTPUT)
        self._warn_once(
            "part",
            "all tokens are computed, because attention processors project a part of the batch only "
            "(perturbed-attention guidance)",
        )

    def end(self, call: Call) -> None:
        """Keep the output of a call that is over."""
        if call.chosen is not None and call.tokens is None:
            self._warn_once(
                "narrow",
                "all tokens are computed, because the module behind which some should be left out was not "
                "called",
            )
        if call.remembers and OUTPUT in call.slot.store:
            assert self._layout.stream is not None
            call.slot.remember(self._layout.stream.noise_of(call.slot.store.last(OUTPUT)))


def streams(cut: Cut | None) -> bool:
    """Whether tokens go through blocks in a call with that cut."""
    return cut is None or cut.entry is not None
