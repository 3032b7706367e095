"""Count the MACs of a whole generation by any method, without weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from regrow.core.decision import ALL, Decision, Sited, View, left_out
from regrow.core.macs import CallCounter, Macs
from regrow.core.recipe import Recipe, recipe_of
from regrow.core.sites import streams
from regrow.lab.measure.architectures import Architecture
from regrow.models import layout_of
from regrow.report import depth_name
from regrow.schedule import FULL, SITES, Schedule


@dataclass(frozen=True)
class Kind:
    """A kind of call in a generation.

    Args:
        depth: ``"full"``, or the number of up-path layers computed.
        ratio: share of tokens pruned where the method prunes.
        count: number of calls of this kind.
        macs: MACs of one call, batch 1.
        selection_macs: MACs of choosing tokens in one call.
    """

    depth: str
    ratio: float
    count: int
    macs: int
    selection_macs: int


@dataclass(frozen=True)
class Profile:
    """MACs of one image; choosing tokens is counted separately.

    Args:
        arch: name of the architecture.
        method: name of the method.
        calls: number of calls of the denoiser.
        baseline_macs_per_call: MACs of a full call without the method.
        baseline_macs: MACs of all calls without the method.
        macs: MACs of all calls with the method.
        selection_macs: MACs of choosing tokens, not part of ``macs``.
        macs_ratio: ``baseline_macs / macs``.
        per_call: MACs of each call.
        kinds: the calls, grouped.
    """

    arch: str
    method: str
    calls: int
    baseline_macs_per_call: int
    baseline_macs: int
    macs: int
    selection_macs: int
    macs_ratio: float
    per_call: tuple[int, ...]
    kinds: tuple[Kind, ...]

    def to_dict(self) -> dict[str, Any]:
        """Convert the profile to plain data."""
        return asdict(self)


class PlanCounter:
    """Counts the calls of generations by any method, each kind of call once.

    Args:
        denoiser: the model, on any device; only its configuration is used.
        inputs: arguments of a call, on the meta device.
        text_once: count what depends on the text alone in the first call only, where it is computed; if
            not, in every full call.
    """

    def __init__(
        self, denoiser: Any, inputs: tuple[tuple[Any, ...], dict[str, Any]], *, text_once: bool = True
    ) -> None:
        self.layout = layout_of(denoiser)
        self._denoiser, self._inputs, self._text_once = denoiser, inputs, text_once
        self._counters: dict[Any, CallCounter] = {}

    def full(self) -> Macs:
        """Count a call without a method."""
        return self._counter(Recipe(Schedule.constant())).count(FULL, 0.0, self._inputs)

    def calls(self, config: Any, calls: int) -> list[tuple[tuple[int, float], Macs]]:
        """List depth, ratio and MACs of every call of a generation; the ratio is 0 if nothing is pruned.

        Args:
            config: the method's configuration; None for the unaccelerated denoiser.
            calls: number of calls of the denoiser, >= 1.
        """
        if config is None:
            return [((FULL, 0.0), self.full())] * calls
        parts = recipe_of(config)
        counter = self._counter(parts)
        sites = _asked(parts)
        decider = None if sites is None else sites.on(self._denoiser, self.layout)
        prunes, in_layers = decider is not None, decider is not None and decider.space is not None
        out = []
        for i, step in enumerate(parts.plan.resample(calls).steps()):
            plan: Mapping[str, Decision] = {}
            streamed = sites is not None and sites.by_ratio and streams(self.layout.skip_plan(step.depth))
            if decider is not None and not in_layers and (step.of_sites or streamed):
                plan = decider.plan(View(i, calls, step))
            sited = any(decision is not ALL for decision in plan.values())
            depth = step.depth if sited or self.layout.skip_plan(step.depth) else FULL
            ratio = step.ratio if depth and prunes else 0.0
            whole = depth == FULL and ratio == 0
            known = bool(self.layout.text) and i > 0 and (self._text_once or not whole)
            ratio = left_out(plan) if step.depth == SITES else ratio
            counted = counter.count(depth, ratio, self._inputs, knows_text=known, plan=plan)
            if ratio and in_layers:
                without = counter.count(depth, 0.0, self._inputs, knows_text=known)
                # Such a call computes no layer that prunes.
                ratio = ratio if counted.denoiser < without.denoiser else 0.0
            out.append(((depth, ratio), counted))
        return out

    def _counter(self, parts: Recipe) -> CallCounter:
        """Find the counter of a method; methods with the same decisions share one."""
        sites = _asked(parts)
        if sites not in self._counters:
            self._counters[sites] = CallCounter(self._denoiser, sites)
        return self._counters[sites]


def _asked(parts: Recipe) -> Sited | None:
    """Find the part that decides for sites, if the plan has calls in which it does."""
    sites = parts.sites
    return sites if sites is not None and any(map(sites.acts_in, parts.plan.kinds())) else None


def profile(
    arch: Architecture,
    config: Any,
    steps: int,
    *,
    name: str = "",
    height: int | None = None,
    width: int | None = None,
    attention: bool = True,
    guided: bool = False,
    text_once: bool = True,
) -> Profile:
    """Count the MACs of a generation.

    Args:
        arch: the denoiser.
        config: the method's configuration; None for the unaccelerated denoiser.
        steps: number of calls of the denoiser in a generation, >= 1.
        name: name of the method, for tables.
        height: height of the picture in pixels; default: the model's own.
        width: width of the picture in pixels; default: the model's own.
        attention: include the products of queries, keys and values (scaled dot-product attention).
        guided: count both halves of a guided batch, otherwise one sample (papers differ in both).
        text_once: count what depends on the text alone once, where it is computed; otherwise in every full
            call, as published figures do.

    Raises:
        ValueError: if a size or the number of steps is not allowed.
    """
    if steps < 1:
        raise ValueError(f"steps: {steps} is not allowed, it must be >= 1")
    counter = PlanCounter(arch.denoiser, arch.inputs(height, width), text_once=text_once)

    def macs_of(counted: Macs) -> int:
        return (counted.denoiser - (0 if attention else counted.attention)) * (2 if guided else 1)

    full = macs_of(counter.full())
    plan, counted = zip(*counter.calls(config, steps), strict=True)
    kinds = [
        Kind(depth_name(d, counter.layout.depths), r, n, macs_of(m), m.selection)
        for ((d, r), m), n in Counter(zip(plan, counted, strict=True)).items()
    ]
    macs = sum(macs_of(m) for m in counted)
    return Profile(
        arch=arch.name,
        method=name,
        calls=steps,
        baseline_macs_per_call=full,
        baseline_macs=full * steps,
        macs=macs,
        selection_macs=sum(m.selection for m in counted),
        macs_ratio=full * steps / macs,
        per_call=tuple(macs_of(m) for m in counted),
        kinds=tuple(sorted(kinds, key=lambda k: -k.macs)),
    )
