"""Plans that compute some calls and forecast the output in the others, from a recording alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from regrow.calibration.drift import drifting_error
from regrow.calibration.fit import decibels, fitted, weight_matrix
from regrow.calibration.influence import Array
from regrow.calibration.positions import (
    Positions,
    candidates,
    dense_at_end,
    dense_at_start,
    evenly,
)
from regrow.calibration.recording import Recording
from regrow.recover.time import Chebyshev, Taylor, TimeRecovery
from regrow.schedule import FULL, Schedule

LAST = 3
"""Computed outputs that a fitted one is made of. More gain little, and each is kept in memory."""
PULL = 1e-3
"""Ridge towards the line through the last two outputs, as a share of their mean square."""
PROBES = (1.5, 2.5)
"""How much denser at the start the plans are that are run to find the drift."""
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
    """Plans whose errors lie far apart, so that running them tells the drift; even positions first."""
    total = recording.origin.calls
    places = {"evenly": evenly(total, count)}
    places |= {f"denser at the start ({p:g})": dense_at_start(total, count, p) for p in PROBES}
    places |= {"denser at the end (1.5)": dense_at_end(total, count, 1.5)}
    return tuple(_fitted(recording, full, where) for where, full in places.items())


def proposals(recording: Recording, count: int, drift: float, keep: int = 2) -> tuple[Proposal, ...]:
    """Plans that are worth a run, the most promising first.

    Fitted ones at the positions that a search finds, with and without a pull towards the line; at the best
    of these positions the line itself and Spectrum's forecast.

    Args:
        recording: of unaccelerated runs.
        count: calls that are computed.
        drift: see `fitted_drift`.
        keep: positions that are searched for.
    """
    total = recording.origin.calls

    def error(full: Positions) -> float:
        weights = weight_matrix(full, fitted(recording.products, full, last=LAST), total)
        return drifting_error(recording.products, recording.moves, weights, drift)

    searched = [full for full in candidates(total, count, error, keep) if full != evenly(total, count)]
    found = [_fitted(recording, full, f"searched ({i})") for i, full in enumerate(searched[:keep], 1)]
    return (*found, *_others(recording, found[0].full if found else evenly(total, count)))


def deep_proposals(total: int, count: int, depth: int = 1) -> tuple[Proposal, ...]:
    """Plans that forecast deep features and compute what lies above them in every call.

    Args:
        total: calls of the run.
        count: calls that are computed in full.
        depth: up-path layers that the others compute.
    """
    forecasts: Mapping[str, TimeRecovery] = {
        "line": Taylor(order=1),
        "Chebyshev": Chebyshev(degree=3, mix=0.5),
    }
    places = {"evenly": evenly(total, count)}
    places |= {f"denser at the start ({p:g})": dense_at_start(total, count, p) for p in DEEP}
    return tuple(
        Proposal(
            f"{count} of {total} computed, {where}, deep features of the others {name}",
            full,
            recovery,
            total,
            depth,
        )
        for where, full in places.items()
        for name, recovery in forecasts.items()
    )


def pruned(recording: Recording, count: int, ratio: float) -> tuple[Proposal, ...]:
    """Plans of forecast outputs whose full calls prune tokens, at positions denser at the start."""
    total = recording.origin.calls
    places = {f"denser at the start ({p:g})": dense_at_start(total, count, p) for p in PROBES}
    plain = (_fitted(recording, full, where) for where, full in places.items())
    return tuple(
        replace(one, name=f"{one.name}, {ratio:.0%} of tokens pruned", ratio=ratio) for one in plain
    )


def foretold(recording: Recording, proposal: Proposal, drift: float) -> float:
    """What a proposal's error is by the recording, in dB up to a constant; more is nearer."""
    return decibels(drifting_error(recording.products, recording.moves, proposal.weights, drift))


def _fitted(recording: Recording, full: Positions, where: str) -> Proposal:
    recovery = fitted(recording.products, full, last=LAST)
    return Proposal(_name(recording, full, where, "fitted"), full, recovery, recording.origin.calls)


def _others(recording: Recording, full: Positions) -> Iterator[Proposal]:
    """Other forecasts at the positions that the search found."""
    line = Taylor(order=1)
    near = fitted(recording.products, full, last=LAST, towards=line, ridge=PULL)
    spectrum = Chebyshev(degree=3, mix=0.5)
    for what, recovery in (("fitted near the line", near), ("on the line", line), ("Chebyshev", spectrum)):
        name = _name(recording, full, "searched (1)", what)
        yield Proposal(name, full, recovery, recording.origin.calls)


def _name(recording: Recording, full: Positions, where: str, what: str) -> str:
    return f"{len(full)} of {recording.origin.calls} computed, {where}, the others {what}"
