"""Plans that compute some calls and forecast the output in the others, from a recording alone."""

from __future__ import annotations

from dataclasses import dataclass, replace

from regrow.calibration.drift import Growth, drifting_error
from regrow.calibration.fit import fitted, weight_matrix
from regrow.calibration.influence import Array
from regrow.calibration.positions import (
    Positions,
    candidates,
    dense_at_end,
    dense_at_start,
    evenly,
)
from regrow.calibration.recording import Recording
from regrow.recover.time import Taylor, TimeRecovery
from regrow.schedule import FULL, Schedule

LAST = 3
"""Computed outputs that a fitted one is made of. More gain little, and each is kept in memory."""
PULL = 1e-3
"""Ridge towards the line through the last two outputs, as a share of their mean square."""
PROBES = (1.4, 2.0)
"""How much denser at one end the plans are that are run to find the growth."""
DEEP = (1.5, 2.0)
"""How much denser at the start full calls are where the others compute the outermost layers."""


@dataclass(frozen=True)
class Proposal:
    """A plan of forecasts.

    Args:
        name: what it does, in words.
        full: the calls that are computed.
        recovery: what the others follow from.
        total: calls of the run.
        depth: up-path layers that the others compute; 0 where the output is forecast.
        ratio: share of the tokens that is pruned where layers prune.
    """

    name: str
    full: Positions
    recovery: TimeRecovery
    total: int
    depth: int = 0
    ratio: float = 0.0

    @property
    def weights(self) -> Array:
        """See `weight_matrix`."""
        return weight_matrix(self.full, self.recovery, self.total)

    def schedule(self) -> Schedule:
        """What each call does."""
        computed = set(self.full)
        return Schedule(
            name=self.name,
            depth=tuple(FULL if call in computed else self.depth for call in range(self.total)),
            ratio=(self.ratio,) * self.total,
            recovery=(self.recovery,),
        )


def probes(recording: Recording, count: int) -> tuple[Proposal, ...]:
    """Plans whose errors lie in different parts of the run, so that running them tells how these grow.

    Even positions first; then denser ones at the start and at the end.
    """
    total = recording.origin.calls
    places = {"evenly": evenly(total, count)}
    for power in PROBES:
        places[f"denser at the start ({power:g})"] = dense_at_start(total, count, power)
        places[f"denser at the end ({power:g})"] = dense_at_end(total, count, power)
    return tuple(_fitted(recording, full, where) for where, full in places.items())


def proposals(recording: Recording, count: int, growth: Growth, keep: int = 2) -> tuple[Proposal, ...]:
    """Fitted plans at the positions that a search finds, the most promising first.

    Args:
        recording: of unaccelerated runs.
        count: calls that are computed.
        growth: see `fitted_growth`.
        keep: how many at most.
    """
    total = recording.origin.calls

    def error(full: Positions) -> float:
        weights = weight_matrix(full, fitted(recording.products, full, last=LAST), total)
        return drifting_error(recording.products, recording.moves, weights, growth)

    found = candidates(total, count, error, keep)[:keep]
    return tuple(_fitted(recording, full, "searched") for full in found)


def near_the_line(recording: Recording, full: Positions) -> Proposal:
    """The fitted plan at some positions with a pull towards the line, which holds few prompts together."""
    recovery = fitted(recording.products, full, last=LAST, towards=Taylor(order=1), ridge=PULL)
    name = _name(recording, full, "searched", "fitted near the line")
    return Proposal(name, full, recovery, recording.origin.calls)


def deep_proposals(total: int, count: int, depth: int = 1) -> tuple[Proposal, ...]:
    """Plans that forecast deep features and compute what lies above them in every call.

    Args:
        total: calls of the run.
        count: calls that are computed in full.
        depth: up-path layers that the others compute.
    """
    return tuple(
        Proposal(
            f"{count} of {total} computed, denser at the start ({power:g}), deep features of the others on "
            "the line",
            dense_at_start(total, count, power),
            Taylor(order=1),
            total,
            depth,
        )
        for power in DEEP
    )


def pruned(recording: Recording, count: int, ratio: float) -> tuple[Proposal, ...]:
    """Plans of forecast outputs whose full calls prune tokens, at positions denser at the start."""
    total = recording.origin.calls
    places = {f"denser at the start ({p:g})": dense_at_start(total, count, p) for p in DEEP}
    plain = (_fitted(recording, full, where) for where, full in places.items())
    return tuple(
        replace(one, name=f"{one.name}, {ratio:.0%} of tokens pruned", ratio=ratio) for one in plain
    )


def _fitted(recording: Recording, full: Positions, where: str) -> Proposal:
    recovery = fitted(recording.products, full, last=LAST)
    return Proposal(_name(recording, full, where, "fitted"), full, recovery, recording.origin.calls)


def _name(recording: Recording, full: Positions, where: str, what: str) -> str:
    return f"{len(full)} of {recording.origin.calls} computed, {where}, the others {what}"
