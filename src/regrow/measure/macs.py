"""MACs of a whole generation by any method, without weights."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from regrow.macs import CallCounter, Macs
from regrow.measure.architectures import Architecture
from regrow.methods.parts import parts_of
from regrow.models import layout_of
from regrow.run_report import depth_name
from regrow.schedule import FULL


@dataclass(frozen=True)
class Kind:
    """A kind of call in a generation.

    Args:
        depth: ``"full"``, or the number of up-path layers computed.
        ratio: share of tokens pruned where the method prunes.
        count: how many calls are of this kind.
        macs: MACs of one, batch 1.
        selection_macs: MACs of choosing tokens in one.
    """

    depth: str
    ratio: float
    count: int
    macs: int
    selection_macs: int


@dataclass(frozen=True)
class Profile:
    """MACs of one image; choosing tokens counted apart.

    Args:
        arch: name of the architecture.
        method: name of the method.
        calls: calls of the denoiser.
        baseline_macs_per_call: of a full call without the method.
        baseline_macs: of all calls without the method.
        macs: of all calls with it.
        selection_macs: of choosing tokens, not part of ``macs``.
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
        """Everything as plain data."""
        return asdict(self)


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
) -> Profile:
    """Count the MACs of a generation.

    Args:
        arch: the denoiser.
        config: the method's configuration; None for the unaccelerated denoiser.
        steps: calls of the denoiser in a generation, >= 1.
        name: of the method, for tables.
        height: of the picture in pixels; the model's own size if not given.
        width: likewise.
        attention: count the products of queries, keys and values (scaled dot-product attention) as well.
        guided: count both halves of a guided batch, else one sample (papers differ in both).

    Raises:
        ValueError: if a size or the number of steps is not allowed.
    """
    if steps < 1:
        raise ValueError(f"steps: {steps} is not allowed, it must be >= 1")
    inputs = arch.inputs(height, width)
    layout = layout_of(arch.denoiser)
    parts = None if config is None else parts_of(config)
    chosen = (None,) * 3 if parts is None else (parts.tokens, parts.token_set, parts.refresh)
    counter = CallCounter(arch.denoiser, *chosen, "" if parts is None else parts.instead)

    def macs_of(counted: Macs) -> int:
        return (counted.denoiser - (0 if attention else counted.attention)) * (2 if guided else 1)

    full = macs_of(counter.count(FULL, 0.0, inputs))
    plan = [(FULL, 0.0)] * steps
    if parts is not None:
        plan = [(s.depth, s.ratio) for s in parts.plan.resample(steps).steps()]
        prunes = any(part is not None for part in chosen)
        plan = [(d if layout.cut(d) else FULL, r if d and prunes else 0.0) for d, r in plan]
    known = config is not None and bool(layout.text)
    counted = [counter.count(d, r, inputs, knows_text=known and i > 0) for i, (d, r) in enumerate(plan)]
    kinds = [
        Kind(depth_name(d, layout.depths), r, n, macs_of(m), m.selection)
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
