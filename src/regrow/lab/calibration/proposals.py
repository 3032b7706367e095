"""Plans that compute some calls and forecast the output in the others, from a recording alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from regrow.lab.calibration.drift import FittedGaps, Growth
from regrow.lab.calibration.positions import (
    Positions,
    candidates,
    dense_at_end,
    dense_at_start,
    denser,
    evenly,
)
from regrow.lab.calibration.recording import DEPTH, Recording
from regrow.recover.fit import Array, fitted, weight_matrix
from regrow.recover.time import Taylor, TimeRecovery
from regrow.schedule import FULL, Schedule

LAST = 3
"""Computed outputs that a fitted one is made of. More gain little, and each is kept in memory."""
PULL = 1e-3
"""Ridge towards the line, as a share of the outputs' mean square."""
LINE = Taylor(order=1)
"""The line through the last two outputs."""
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
        before: timesteps of the sampler before the first call.
        after: timesteps behind the last call.
        depth: up-path layers that the others compute; 0 where the output is forecast.
        ratio: share of the tokens that is pruned where layers prune.
    """

    name: str
    full: Positions
    recovery: TimeRecovery
    total: int
    before: int = 0
    after: int = 0
    depth: int = 0
    ratio: float = 0.0

    @property
    def weights(self) -> Array:
        """See `weight_matrix`."""
        return weight_matrix(self.full, self.recovery, self.total)

    def schedule(self) -> Schedule:
        """What the call of each timestep does; at those that are not run it would be full."""
        computed = set(self.full)
        calls = (FULL if call in computed else self.depth for call in range(self.total))
        depth = (*(FULL,) * self.before, *calls, *(FULL,) * self.after)
        return Schedule(
            name=self.name,
            depth=depth,
            ratio=(self.ratio,) * len(depth),
            recovery=(self.recovery.moved(self.before, len(depth)),),
        )


def probes(recording: Recording, count: int) -> tuple[Proposal, ...]:
    """Plans with errors in different parts of the run: to run them tells how errors grow.

    Even positions come first, then denser ones at the start and at the end.
    """
    total = recording.origin.calls
    places = {"evenly": evenly(total, count)}
    for power in PROBES:
        places[f"denser at the start ({power:g})"] = dense_at_start(total, count, power)
        places[f"denser at the end ({power:g})"] = dense_at_end(total, count, power)
    return tuple(_fitted(recording, full, where) for where, full in places.items())


def proposals(recording: Recording, count: int, growth: Growth) -> tuple[Proposal, ...]:
    """Fitted plans at the positions that a search finds, the most promising first, at most two.

    Args:
        recording: of unaccelerated runs.
        count: calls that are computed.
        growth: see `fitted_growth`.
    """
    gaps = FittedGaps(recording.products, recording.moves, LAST)
    total = recording.origin.calls
    found = candidates(total, count, lambda full: gaps.error(full, growth), 2)[:2]
    return tuple(_fitted(recording, full, "searched") for full in found)


def near_the_line(recording: Recording, full: Positions) -> Proposal:
    """The fitted plan at some positions with a pull towards the line, which holds few prompts together."""
    recovery = fitted(recording.products, full, last=LAST, towards=LINE, ridge=PULL)
    return _proposal(recording, full, "searched", "fitted near the line", recovery)


def deep_proposals(recording: Recording, count: int, growth: Growth) -> Iterator[Proposal]:
    """Plans that forecast deep features and compute what lies above them in every call.

    They are on the line through the last two, and fitted where the recording has deep features. For these
    positions are also searched, as if an error of the features moved the output by as much in every call.

    Args:
        recording: of unaccelerated runs.
        count: calls that are computed in full.
        growth: see `fitted_growth`.
    """
    total = recording.origin.calls
    dense = denser(total, count, DEEP)
    for where, full in dense.items():
        yield _proposal(recording, full, where, "on the line", LINE, DEPTH)
    if DEPTH not in recording.deep:
        return
    features = np.array(recording.deep[DEPTH])
    gaps = FittedGaps(features, recording.moves, LAST)
    searched = candidates(total, count, lambda full: gaps.error(full, growth), 1)[0]
    for where, full in {"searched": searched, **dense}.items():
        recovery = fitted(features, full, last=LAST, towards=LINE, ridge=PULL)
        yield _proposal(recording, full, where, "fitted", recovery, DEPTH)


def pruned(recording: Recording, count: int, ratio: float) -> Iterator[Proposal]:
    """Plans of forecast outputs whose full calls prune tokens, at positions denser at the start."""
    for where, full in denser(recording.origin.calls, count, DEEP).items():
        plain = _fitted(recording, full, where)
        yield replace(plain, name=f"{plain.name}, {ratio:.0%} of tokens pruned", ratio=ratio)


def _fitted(recording: Recording, full: Positions, where: str) -> Proposal:
    return _proposal(recording, full, where, "fitted", fitted(recording.products, full, last=LAST))


def _proposal(
    recording: Recording, full: Positions, where: str, what: str, recovery: TimeRecovery, depth: int = 0
) -> Proposal:
    """A plan of the recorded runs, named by where it computes and what it does in the other calls."""
    calls, others = recording.origin.calls, "deep features of the others" if depth else "the others"
    name = f"{len(full)} of {calls} computed, {where}, {others} {what}"
    return Proposal(name, full, recovery, calls, recording.before, recording.after, depth)
