"""A frozen denoiser in training: its calls, and what its sites return in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from regrow.core.decision import Entered
from regrow.lab.train.examples import Batch
from regrow.lab.train.steps import Steps
from regrow.models.table import Keeps, Layout, Site

Act = Callable[[Site, Entered, Tensor], Tensor]
"""Given a site, what it was given and what it returns: what it shall return instead."""


@dataclass(frozen=True, eq=False)
class Frozen:
    """A denoiser whose weights stay as they are.

    Args:
        denoiser: the model.
        layout: its table.
        steps: of the sampler that it is trained for.
        recompute: in the backward pass sites are computed again, rather than what they made kept.
    """

    denoiser: nn.Module
    layout: Layout
    steps: Steps
    recompute: bool = False

    def call(self, x: Tensor, index: Tensor, given: Mapping[str, Any]) -> Tensor:
        """Its output at step number ``index`` ``(B,)``, without the channels of a learned variance."""
        times = self.steps.times[index.cpu()].to(x.device)
        words = {self.layout.sample: x, self.layout.time: times, "return_dict": False, **given}
        output: Tensor = self.denoiser(**words)[0]
        return output[:, : x.shape[1]]


@dataclass(frozen=True, eq=False)
class Past:
    """A full call at a step, and where it leads.

    Args:
        kept: by the key of a site, what the call leaves for the next one.
        x: what the next step is given.
        index: number of the next step, ``(B,)``.
    """

    kept: Mapping[str, Tensor]
    x: Tensor
    index: Tensor


@dataclass(frozen=True, eq=False)
class Truth:
    """A full call that others are compared with.

    Args:
        output: of the denoiser.
        last: what the last site returns.
        entered: what the first site is given.
    """

    output: Tensor
    last: Tensor
    entered: Entered


def of_sequences(values: Tensor, sequences: int) -> Tensor:
    """A value of each sample ``(B,)`` as that of its sequences ``(S,)``: of frames, or of places."""
    return values.repeat_interleave(sequences // len(values))


@contextmanager
def acting(sites: Sequence[Site], act: Act) -> Iterator[None]:
    """Have sites return what ``act`` says, by torch's own hooks, for as long as this lasts."""

    def hook(site: Site) -> Callable[..., Tensor]:
        def replace(module: nn.Module, args: Any, kwargs: Any, out: Tensor) -> Tensor:
            return act(site, Entered.of(args, kwargs), out)

        return replace

    hooks = [site.module.register_forward_hook(hook(site), with_kwargs=True) for site in sites]
    try:
        yield
    finally:
        for one in hooks:
            one.remove()


@contextmanager
def recomputed(sites: Sequence[Site]) -> Iterator[None]:
    """Have sites keep nothing for the backward pass but what they are given, for as long as this lasts.

    Not by diffusers' own switch: it would compute blocks again with hooks that are gone by then.
    """
    before = [(site.module.__dict__, site.module.__dict__.get("forward")) for site in sites]
    for site in sites:
        site.module.__dict__["forward"] = partial(checkpoint, site.module.forward, use_reentrant=False)
    try:
        yield
    finally:
        for state, forward in before:
            if forward is None:
                del state["forward"]
            else:
                state["forward"] = forward


@torch.no_grad()
def past(frozen: Frozen, sites: Sequence[Site], batch: Batch) -> Past:
    """The full call at t + 1, which fills the caches and leads to t (algorithm 1)."""
    kept: dict[str, Tensor] = {}

    def keep(site: Site, entered: Entered, out: Tensor) -> Tensor:
        kept[site.key] = out if site.keeps is Keeps.OUTPUT else out - entered.x
        return out

    with acting(sites, keep):
        output = frozen.call(batch.x, batch.index, batch.given)
    return Past(kept, frozen.steps.next(batch.x, output, batch.index), batch.index + 1)


@torch.no_grad()
def truth(frozen: Frozen, sites: Sequence[Site], before: Past, given: Mapping[str, Any]) -> Truth:
    """The full call at t."""
    seen: list[tuple[Entered, Tensor]] = []

    def see(site: Site, entered: Entered, out: Tensor) -> Tensor:
        seen.append((entered, out))
        return out

    with acting([sites[0], sites[-1]], see):
        output = frozen.call(before.x, before.index, given)
    return Truth(output, last=seen[-1][1], entered=seen[0][0])


def relaxed(
    frozen: Frozen,
    sites: Sequence[Site],
    before: Past,
    given: Mapping[str, Any],
    weights: Mapping[str, Tensor],
) -> tuple[Tensor, Tensor]:
    """Make the call at t with mixtures of what sites compute and what is kept of them (Eq. 10).

    Args:
        frozen: the model.
        sites: whose outputs are mixed; that of the last one is returned.
        before: the call at t + 1.
        given: conditions.
        weights: by the name of a site, the part that is computed, 0 to 1, in a form that goes with its
            output ``(S, n, C)``; other sites compute all.

    Returns:
        The denoiser's output, and that of the last site.
    """
    last: list[Tensor] = []

    def mix(site: Site, entered: Entered, out: Tensor) -> Tensor:
        if site.name in weights:
            kept = before.kept[site.key]
            old = kept if site.keeps is Keeps.OUTPUT else entered.x + kept
            # At the weights 0 and 1 it is one or the other, bit for bit.
            out = torch.lerp(old, out.to(old.dtype), weights[site.name].to(old.dtype))
        last[:] = [out]
        return out

    with acting(sites, mix), recomputed(sites) if frozen.recompute else nullcontext():
        output = frozen.call(before.x, before.index, given)
    return output, last[0]
