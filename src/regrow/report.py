"""What a generation computed, reused and saved; and the same as a schedule."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from regrow.core.call import CallRecord, Generation
from regrow.core.engine import Engine
from regrow.core.macs import CallCounter
from regrow.core.meta import unknown_attentions
from regrow.core.others import shape_of
from regrow.core.recipe import recipe_of
from regrow.models.table import TOKENS
from regrow.schedule import FULL, NAMES, Schedule


@dataclass(frozen=True)
class CallRow:
    """One call of the denoiser.

    Args:
        step: step of the sampler, from 0; None if the call belongs to no generation that is known.
        branch: of guidance, in the order in which they first came, from 0.
        depth: what was computed: ``"full"`` or a number of up-path layers.
        planned: what the schedule asked for, as depth.
        ratio: share of tokens pruned where the method prunes.
        macs: MACs of the call, the whole batch, attention counted.
        selection_macs: MACs of choosing tokens.
        full_macs: MACs of the same call without the method.
        age: how many steps old the features are that the call reused; 0 if it reused none.
        recovery: what filled in what was not computed: ``"reuse"``, ``"taylor(1)"``, ``"fitted"`` in time,
            ``"copy"`` or ``"mean"`` for pruned tokens; empty if all was computed.
        reason: why it did something else than planned; empty if it did as planned.
        error: of a full call, the relative deviation of what would have been forecast for it; None if it
            was not measured.
    """

    step: int | None
    branch: int
    depth: str
    planned: str
    ratio: float
    macs: int
    selection_macs: int
    full_macs: int
    age: int = 0
    recovery: str = ""
    reason: str = ""
    error: float | None = None


@dataclass(frozen=True)
class RunReport:
    """All calls of a generation; as text, a table and a sum.

    Args:
        calls: in their order.
        notes: what the figures do not know of, such as attention processors that are not of diffusers.
    """

    calls: tuple[CallRow, ...]
    notes: tuple[str, ...] = ()

    @property
    def macs(self) -> int:
        """MACs of the denoiser."""
        return sum(c.macs for c in self.calls)

    @property
    def full_macs(self) -> int:
        """MACs without the method."""
        return sum(c.full_macs for c in self.calls)

    @property
    def selection_macs(self) -> int:
        """MACs of choosing tokens, not part of `macs`."""
        return sum(c.selection_macs for c in self.calls)

    @property
    def recovered(self) -> Mapping[str, int]:
        """By recovery, the calls in which it filled in what was not computed."""
        return Counter(c.recovery for c in self.calls if c.recovery)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data."""
        return {
            "macs": self.macs,
            "full_macs": self.full_macs,
            "selection_macs": self.selection_macs,
            "recovered": dict(self.recovered),
            "calls": [asdict(c) for c in self.calls],
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        lines = ["step  depth  age  pruned    GMACs   of full  recovery"]
        width = max((len(c.recovery) for c in self.calls), default=0)
        reasons: list[str] = []
        for c in self.calls:
            mark = "" if c.error is None else f"  (forecast off by {c.error:.1%})"
            if c.reason:
                reasons += [] if c.reason in reasons else [c.reason]
                asked = "" if c.planned == c.depth else f"planned {c.planned}, "
                mark += f"  ({asked}see {reasons.index(c.reason) + 1})"
            step = "-" if c.step is None else f"{c.step}" if c.branch == 0 else f"{c.step}.{c.branch}"
            share = c.macs / c.full_macs if c.full_macs else 0.0
            lines.append(
                f"{step:>4}  {c.depth:>5}  {c.age or '':>3}  {c.ratio:6.0%}  {c.macs / 1e9:7.2f}"
                f"  {share:8.1%}  {c.recovery:<{width}}{mark}".rstrip()
            )
        lines += [f"({i}) {reason}" for i, reason in enumerate(reasons, 1)]
        ratio = self.full_macs / self.macs if self.macs else float("inf")
        lines.append(
            f"{len(self.calls)} calls: {self.macs / 1e9:.1f} of {self.full_macs / 1e9:.1f} GMACs, "
            f"{ratio:.2f}x fewer; choosing tokens {self.selection_macs / 1e9:.2f} GMACs"
        )
        return "\n".join([*lines, *(f"Note: {note}" for note in self.notes)])


def depth_name(depth: int, depths: int) -> str:
    """A depth in words: a number of layers, a name, or ``"full"`` from the model's own number on."""
    if depth in NAMES:
        return NAMES[depth]
    return "full" if depth >= depths else str(depth)


def report_of(engine: Engine) -> RunReport:
    """The report of an engine's last generation.

    Raises:
        RuntimeError: if there was none.
    """
    generation = engine.generation
    if generation is None:
        raise RuntimeError("there is nothing to report: no generation has begun since regrow.apply")
    notes, twin = [], generation.twin
    model = engine.denoiser if twin.model is None else twin.model
    unknown = unknown_attentions(engine.denoiser) if twin.model is None else twin.unknown
    if unknown:
        notes.append(
            f"{len(unknown)} attentions, {unknown[0]} for one, have processors that are not of diffusers; "
            "they are counted as if they had the model's own"
        )
    if twin.model is None and shape_of(engine.denoiser) != twin.shape:
        notes.append(
            "the denoiser's modules or attention processors were replaced since that generation; the "
            "figures are of those that it has now"
        )
    try:
        depths = {record.depth for record in generation.records}
        counter = CallCounter(model, None if engine.sites is None else engine.recipe.sites, depths)
        rows = [_row(record, engine, counter) for record in generation.records]
    except Exception as error:
        # Whatever a module of somebody's own says to tensors without data.
        notes.append(
            f"nothing is counted: the denoiser can't run without data ({type(error).__name__}: {error})"
        )
        rows = [_row(record, engine, None) for record in generation.records]
    return RunReport(tuple(rows), tuple(notes))


def _row(record: CallRecord, engine: Engine, counter: CallCounter | None) -> CallRow:
    depths = engine.layout.depths
    macs = selection = full = 0
    if counter is not None:
        counter.attend_to_boxes(record.grounded)
        counted = counter.count(
            record.depth, record.ratio, record.inputs, knows_text=record.knew_text, plan=record.plan
        )
        macs, selection = counted.denoiser, counted.selection
        full = counter.count(FULL, 0.0, record.inputs).denoiser
    # What filled in the tokens that the call left out.
    space = None if engine.sites is None else engine.sites.decider.space
    of_tokens = "reuse" if TOKENS in record.plan else ""
    if space is not None:
        of_tokens = space.value
    return CallRow(
        step=None if record.position is None else record.position.index,
        branch=record.branch,
        depth=depth_name(record.depth, depths),
        planned=depth_name(FULL if record.planned is None else record.planned.depth, depths),
        ratio=record.ratio,
        macs=macs,
        selection_macs=selection,
        full_macs=full,
        age=record.age,
        recovery=" + ".join(filter(None, (record.recovery, of_tokens if record.ratio else ""))),
        reason=record.reason,
        error=None if record.error is None else record.error.read(),
    )


def check_freezable(config: Any) -> None:
    """Refuse a method with calls that a schedule can't describe.

    Raises:
        ValueError: if it chooses tokens, or decides for single sites.
    """
    parts = recipe_of(config)
    if parts.sites is not None and any(map(parts.sites.acts_in, parts.plan.kinds())):
        raise ValueError(
            f"method: {getattr(config, 'method', type(config).__name__)} can't be kept as a schedule: its "
            "calls leave out tokens, or parts of layers, that the method chooses, and a schedule has no "
            "more than depths and recoveries"
        )


def schedule_of(generation: Generation) -> Schedule:
    """Depth and recovery of every step of a generation, as it was carried out.

    A step is full if all its calls were computed in full. So are steps that were not made: before the
    beginning of a run that began late, and behind the end of one that was interrupted.

    Raises:
        ValueError: if no step of it is known.
    """
    steps, depth = generation.steps, [FULL] * len(generation.steps)
    for record in generation.records:
        if record.position is None:
            continue
        if record.position.begins:
            # Members of an ensemble share one list: what counts is the last run over the steps.
            depth = [FULL] * len(steps)
        if record.depth != FULL and record.planned is not None:
            depth[record.position.index] = record.planned.depth
    if not depth:
        raise ValueError("calls: none of them belongs to a generation with known steps")
    used = {step.recovery for step, d in zip(steps, depth, strict=True) if d != FULL} or {steps[0].recovery}
    return Schedule(
        depth=tuple(depth),
        ratio=(0.0,) * len(depth),
        recovery=tuple(used) if len(used) == 1 else tuple(step.recovery for step in steps),
        name="frozen",
        note="what a generation did",
    )
