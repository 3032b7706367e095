"""Record how alike the deep features of every two calls are: what calls of a lesser depth reuse."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from regrow.core.inputs import taken
from regrow.models import layout_of
from regrow.recover.fit import Array

MOST = 1 << 18
"""Elements of a call's features that are kept in a run. Weights are few numbers: more change nothing."""
_SEED = 0


class DeepFeatures:
    """The deep features of the calls of a run; of large ones some elements, the same in every call.

    Args:
        most: elements of a call that are kept.
    """

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._calls: list[Tensor] = []
        self._step: list[Tensor] = []
        self._places: dict[tuple[int, int], Tensor] = {}

    def add(self, features: Sequence[Tensor]) -> None:
        """Keep those of a call of the denoiser. With guidance a step of the sampler may have several."""
        total = sum(one.numel() for one in features)
        for one in features:
            flat = one.detach().flatten()
            if total > self._most:
                flat = flat[self._chosen(flat, len(flat) * self._most // total)]
            self._step.append(flat.to(torch.float32, copy=True))

    def end_step(self) -> None:
        """End a step of the sampler: what is added from now on is of the next one."""
        self._calls.append(torch.cat(self._step) if self._step else torch.empty(0))
        self._step = []

    def gram(self) -> Array | None:
        """``(T, T)``, the mean product of two steps' features over their elements.

        None if the steps have features of other sizes, as where guidance ends before the run.
        """
        sizes = {len(one) for one in self._calls}
        if len(sizes) != 1 or 0 in sizes:
            return None
        stacked = torch.stack(self._calls).cpu().double()
        return (stacked @ stacked.T / stacked.shape[1]).numpy()

    def _chosen(self, flat: Tensor, count: int) -> Tensor:
        """Indices of so many elements, drawn once."""
        key = len(flat), count
        if key not in self._places:
            generator = torch.Generator().manual_seed(_SEED)
            self._places[key] = torch.randint(len(flat), (count,), generator=generator).to(flat.device)
        return self._places[key]


@contextmanager
def watched_features(denoiser: nn.Module, depth: int, to: DeepFeatures) -> Iterator[None]:
    """Add what calls of a depth would reuse, in every full call until this is left.

    Args:
        denoiser: that nothing is applied to.
        depth: of the calls that would reuse it, >= 1.
        to: keeps it.

    Raises:
        ValueError: if the denoiser has no calls of that depth.
    """
    layout = layout_of(denoiser)
    skip_plan = layout.skip_plan(depth)
    if skip_plan is None or skip_plan.final:
        raise ValueError(
            f"deep: True is not allowed, {type(denoiser).__name__} has no known layers that calls of depth "
            f"{depth} would leave out; give deep=False"
        )
    entered: list[Any] = []

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entered[:] = taken(args, kwargs)

    def leave(name: str) -> Any:
        def keep(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            after = layout.skippable[name].tensors(out)
            before = [None] * len(after) if skip_plan.entry is None else entered
            pairs = [(x, y) for x, y in zip(before, after, strict=True) if y is not None]
            to.add([y if x is None else y - x for x, y in pairs])

        return keep

    places = [layout.skippable[name] for name in sorted(skip_plan.restore)]
    hooks = [place.module.register_forward_hook(leave(place.name)) for place in places]
    if skip_plan.entry is not None:
        first = layout.skippable[skip_plan.entry].module
        hooks.append(first.register_forward_pre_hook(enter, with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
