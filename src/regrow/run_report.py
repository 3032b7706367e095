"""What a generation computed, reused and saved."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from regrow.engine.engine import Engine
from regrow.macs import CallCounter
from regrow.schedule import FULL, LAYERS


@dataclass(frozen=True)
class CallRow:
    """One call of the denoiser.

    Args:
        step: step of the sampler, from 0.
        branch: separate guidance call of that step, from 0.
        depth: what was computed: ``"full"`` or a number of up-path layers.
        planned: what the schedule asked for; differs where nothing was cached yet.
        ratio: share of tokens pruned where the method prunes.
        macs: MACs of the call, the whole batch, attention counted.
        selection_macs: MACs of choosing tokens.
        full_macs: MACs of the same call without the method.
    """

    step: int
    branch: int
    depth: str
    planned: str
    ratio: float
    macs: int
    selection_macs: int
    full_macs: int


@dataclass(frozen=True)
class RunReport:
    """All calls of a generation; as text, a table and a sum."""

    calls: tuple[CallRow, ...]

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

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data."""
        return {
            "macs": self.macs,
            "full_macs": self.full_macs,
            "selection_macs": self.selection_macs,
            "calls": [asdict(c) for c in self.calls],
        }

    def __str__(self) -> str:
        lines = ["step  depth  pruned    GMACs   of full"]
        for c in self.calls:
            note = "" if c.depth == c.planned else f"  (planned {c.planned}: nothing cached yet)"
            step = f"{c.step}" if c.branch == 0 else f"{c.step}.{c.branch}"
            lines.append(
                f"{step:>4}  {c.depth:>5}  {c.ratio:6.0%}  {c.macs / 1e9:7.2f}  "
                f"{c.macs / c.full_macs:8.1%}{note}"
            )
        ratio = self.full_macs / self.macs if self.macs else float("inf")
        lines.append(
            f"{len(self.calls)} calls: {self.macs / 1e9:.1f} of {self.full_macs / 1e9:.1f} GMACs, "
            f"{ratio:.2f}x fewer; choosing tokens {self.selection_macs / 1e9:.2f} GMACs"
        )
        return "\n".join(lines)


def depth_name(depth: int, depths: int) -> str:
    """A depth in words: a number of layers, ``"layers"``, or ``"full"`` from the model's own number on."""
    if depth == LAYERS:
        return "layers"
    return "full" if depth >= depths else str(depth)


def report_of(engine: Engine) -> RunReport:
    """The report of an engine's last generation.

    Raises:
        RuntimeError: if there was none.
    """
    if engine.generation is None:
        raise RuntimeError("there is nothing to report: no generation has begun since regrow.apply")
    parts = engine.parts
    counter = CallCounter(engine.denoiser, parts.tokens, parts.token_set, engine.refresh)
    depths = engine.layout.depths
    rows = []
    for record in engine.generation.records:
        counted = counter.count(record.depth, record.ratio, record.inputs, knows_text=record.knew_text)
        rows.append(
            CallRow(
                record.position.index,
                record.position.branch,
                depth_name(record.depth, depths),
                depth_name(record.planned.depth, depths),
                record.ratio,
                counted.denoiser,
                counted.selection,
                counter.count(FULL, 0.0, record.inputs).denoiser,
            )
        )
    return RunReport(tuple(rows))
