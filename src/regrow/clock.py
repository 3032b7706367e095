"""Where are we: which generation, which call of how many, which guidance branch.

There is one clock a run. It is told of a new generation by the scheduler, whose ``timesteps`` is a
new object after every ``set_timesteps``, and of the next step by ``scheduler.step``. That holds for
samplers that call the denoiser twice a step, for guidance in one call or several, for runs that start
late (image-to-image) and for runs that were interrupted.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any, Protocol

import torch


class ConcurrentGenerationError(RuntimeError):
    """Two threads generate with one accelerated denoiser at the same time."""


@dataclass(frozen=True)
class Position:
    """A call of the denoiser.

    Args:
        index: step of the sampler this call belongs to, from 0; a run that starts late starts above 0.
        total: number of steps of the whole trajectory.
        branch: number of calls already made at this step (separate guidance calls).
        first: whether it is the first call of its generation.
    """

    index: int
    total: int
    branch: int
    first: bool


class Clock(Protocol):
    """Says where a call of the denoiser stands."""

    def read(self, timestep: Any) -> Position | None:
        """The position of the call that begins now, or None if it belongs to no known generation."""

    def detach(self) -> None:
        """Leave everything as it was."""


class ManualClock:
    """A clock for a denoiser used without a pipeline: the caller says when a step ends.

    Args:
        total: number of steps, >= 1.
        on_end: called when the last step is done.
    """

    def __init__(self, total: int, on_end: Callable[[], None]) -> None:
        if total < 1:
            raise ValueError(f"num_steps: {total} is not allowed, it must be >= 1")
        self._total, self._on_end = total, on_end
        self._index = self._branch = 0
        self._first = True

    def step(self) -> None:
        """The sampler's step is done; the next call of the denoiser belongs to the next one."""
        self._index += 1
        self._branch = 0
        if self._index == self._total:
            self._on_end()

    def read(self, timestep: Any) -> Position | None:
        if self._index >= self._total:
            return None
        here = Position(self._index, self._total, self._branch, self._first)
        self._branch += 1
        self._first = False
        return here

    def detach(self) -> None:
        self._index = self._total


class _Step:
    """Stands in for ``scheduler.step``: steps, then ticks the clock."""

    def __init__(self, scheduler: Any, tick: Callable[[], None]) -> None:
        self._step, self._tick = scheduler.step, tick
        self._scheduler = scheduler
        # Pipelines read the parameters of `step` from its signature.
        functools.update_wrapper(self, scheduler.step)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out = self._step(*args, **kwargs)
        self._tick()
        return out

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # A copied scheduler is another sampler: it must step itself and not this clock.
        copied = memo[id(self._scheduler)]
        return MethodType(type(copied).step, copied)


class SchedulerClock:
    """A clock that follows the scheduler of a pipeline.

    Args:
        scheduler: returns the scheduler in use, so that one swapped between generations is followed.
        on_end: called when the last step of a generation is done.
    """

    def __init__(self, scheduler: Callable[[], Any], on_end: Callable[[], None]) -> None:
        self._current, self._on_end = scheduler, on_end
        self._scheduler: Any = None
        self._step: _Step | None = None
        self._timesteps: Any = None
        self._index = self._total = self._branch = 0
        self._first = True
        self._owner = 0
        self._warned = False
        self._attach(scheduler())

    def _attach(self, scheduler: Any) -> None:
        self.detach()
        self._scheduler = scheduler
        self._step = scheduler.step = _Step(scheduler, self._tick)

    def detach(self) -> None:
        if self._step is not None and self._scheduler.__dict__.get("step") is self._step:
            del self._scheduler.step
        self._scheduler = self._step = self._timesteps = None
        self._index = self._total = 0

    def _tick(self) -> None:
        if threading.get_ident() == self._owner:
            self._index += 1
            self._branch = 0
            if self._index == self._total:
                self._on_end()

    def read(self, timestep: Any) -> Position | None:
        if self._current() is not self._scheduler:
            self._attach(self._current())
        timesteps = self._scheduler.timesteps
        if timesteps is not self._timesteps:
            begin = _begin(self._scheduler, timestep)
            if begin is None:
                self._warn_foreign()
                return None
            self._timesteps, self._total = timesteps, len(timesteps)
            self._index, self._branch, self._first = begin, 0, True
            self._owner = threading.get_ident()
        elif self._index >= self._total or not _same(timestep, timesteps, self._index):
            self._warn_foreign()
            return None
        elif threading.get_ident() != self._owner:
            raise ConcurrentGenerationError(
                "another thread is generating with this denoiser; an accelerated denoiser serves one "
                "generation at a time. Give each thread a pipeline with a denoiser of its own."
            )
        here = Position(self._index, self._total, self._branch, self._first)
        self._branch += 1
        self._first = False
        return here

    def _warn_foreign(self) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                "the denoiser was called outside a generation of the pipeline regrow was applied to "
                "(another pipeline with a scheduler of its own, or a loop that does not call "
                "scheduler.set_timesteps); such calls are computed in full",
                stacklevel=2,
            )


def _value(timestep: Any) -> float:
    return float(timestep.flatten()[0]) if isinstance(timestep, torch.Tensor) else float(timestep)


def _place(timestep: Any, timesteps: torch.Tensor) -> int | None:
    """The index of a timestep that is a view of ``timesteps``, as pipelines pass it; else None."""
    if not isinstance(timestep, torch.Tensor) or timestep.device != timesteps.device:
        return None
    if timestep.untyped_storage().data_ptr() != timesteps.untyped_storage().data_ptr():
        return None
    return (timestep.storage_offset() - timesteps.storage_offset()) // max(timesteps.stride(0), 1)


def _begin(scheduler: Any, timestep: Any) -> int | None:
    """The index at which a generation starts: 0, or later for image-to-image."""
    timesteps = scheduler.timesteps
    place = _place(timestep, timesteps)
    if place is None:
        place = getattr(scheduler, "begin_index", None)
    if place is None:
        here = (timesteps.cpu() == _value(timestep)).nonzero()
        place = int(here[0]) if len(here) else None
    return place if place is not None and place < len(timesteps) else None


def _same(timestep: Any, timesteps: torch.Tensor, index: int) -> bool:
    """Whether a timestep is the one at ``index``; a view of ``timesteps`` needs no wait for the device."""
    place = _place(timestep, timesteps)
    return _value(timestep) == float(timesteps[index]) if place is None else place == index
