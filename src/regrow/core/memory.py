"""What one guidance branch keeps from call to call: deep features, outputs, shapes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from regrow.core.store import Store
from regrow.tokens.grid import Grid

# What a slot is valid for: shape, type and device of the denoiser's input, and the shape of its text.
Key = tuple[Any, ...]


@dataclass
class BranchMemory:
    """The memory of one guidance branch; a call with another key starts a new one.

    Args:
        key: what the slot is valid for.
        store: by the key of a cut and module, what calls computed, from which others recover it; and what
            depends on the text alone.
        shapes: by module name, the shapes of what it returned in the last full call.
        outputs: the last computed outputs of the denoiser, newest last, at most two.
        inputs: the denoiser's arguments on the meta device, of the call that opened the slot.
        guided: whether the batch is an unconditional and a conditional half.
        observed: what the method of sites remembers.
        text: the text of the last call and its version, which writing to it changes.
        adapters: what state adapters on the modules that read the text were in.
        calls: how many calls the slot has seen.
        last: step of its last call; -1 if there was none.
        stored: by cut, the step in which what it restores was kept.
        grid: of the image's tokens, where a call can compute some of them only.
    """

    key: Key
    inputs: tuple[Any, Any]
    guided: bool
    store: Store
    shapes: dict[str, list[torch.Size]] = field(default_factory=dict)
    outputs: list[Tensor] = field(default_factory=list)
    observed: Any = None
    text: tuple[Tensor, int] | None = None
    adapters: Any = None
    calls: int = 0
    last: int = -1
    stored: dict[Any, int] = field(default_factory=dict)
    grid: Grid | None = None

    def knows(self, text: Tensor | None, adapters: Any = None) -> bool:
        """Whether the text is that of the last call, the very tensor; remembers it.

        Args:
            text: the text.
            adapters: the state of adapters on the modules that read it; with another it is not known.
        """
        same, self.adapters = adapters == self.adapters, adapters
        if text is None:
            return False
        # A tensor made in inference mode does not tell.
        version = -1 if text.is_inference() else text._version
        before, self.text = self.text, (text, version)
        return same and before is not None and before[0] is text and before[1] == version != -1

    def remember(self, output: Tensor) -> None:
        """Keep a copy of a computed output; the caller's tensor stays the caller's."""
        self.outputs = [*self.outputs[-1:], output.detach().clone()]


def placeholders(like: Tensor, shapes: list[torch.Size] | None, count: int, *, dense: bool) -> list[Tensor]:
    """What skipped modules return: tensors that nobody reads.

    Concatenations of them cost nothing, since they have no channels.

    Args:
        like: a tensor of the batch size, type and device wanted.
        shapes: the true shapes, needed for ``dense``.
        count: how many.
        dense: tensors of zeros of the true shapes instead, for callers that add to them (ControlNet,
            T2I-Adapter) or transform them (FreeU).
    """
    if dense and shapes:
        return [like.new_zeros(shape) for shape in shapes]
    return [like.new_empty(like.shape[0], 0, 1, 1)] * count
