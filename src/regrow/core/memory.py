"""The memory of one guidance branch: deep features, outputs, shapes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from regrow.core.store import Store
from regrow.tokens.grid import Grid

# Key of a slot: shape, type and device of the denoiser's input, and the shape of its text.
Key = tuple[Any, ...]


@dataclass
class BranchMemory:
    """The memory (slot) of one guidance branch; a call with another key starts a new one.

    Args:
        key: the inputs that the slot is valid for.
        store: computed values by the key of a skip plan and module, from which later calls recover; and
            values that depend on the text alone.
        shapes: by module name, the shapes of its outputs in the last full call.
        outputs: the last computed outputs of the denoiser, newest last, at most two.
        inputs: the arguments of the slot's first call, on the meta device.
        guided: whether the batch is an unconditional and a conditional half.
        observed: the memory of the method of sites.
        text: the text of the last call and its version, which changes when it is written to.
        adapters: state of the adapters on the modules that read the text.
        calls: number of calls of the slot.
        last: step of its last call; -1 if there was none.
        stored: by skip plan, the step in which the values that it restores were kept.
        grid: grid of the image's tokens, if a call can compute some of them only.
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
        """Whether the text is the same tensor as in the last call; remembers it.

        Args:
            text: the text.
            adapters: state of the adapters on the modules that read it; if it changed, the text is new.
        """
        same, self.adapters = adapters == self.adapters, adapters
        if text is None:
            return False
        # Tensors made in inference mode have no version.
        version = -1 if text.is_inference() else text._version
        before, self.text = self.text, (text, version)
        return same and before is not None and before[0] is text and before[1] == version != -1

    def remember(self, output: Tensor) -> None:
        """Keep a copy of a computed output; the caller's tensor stays the caller's."""
        self.outputs = [*self.outputs[-1:], output.detach().clone()]


def placeholders(like: Tensor, shapes: list[torch.Size] | None, count: int, *, dense: bool) -> list[Tensor]:
    """Make placeholders for skipped modules to return, which nobody reads.

    They have no channels, so concatenating them costs nothing.

    Args:
        like: a tensor of the batch size, type and device wanted.
        shapes: the true shapes, needed for ``dense``.
        count: number of tensors.
        dense: make zeros of the true shapes, for callers that add to them (ControlNet, T2I-Adapter) or
            transform them (FreeU).
    """
    if dense and shapes:
        return [like.new_zeros(shape) for shape in shapes]
    return [like.new_empty(like.shape[0], 0, 1, 1)] * count
