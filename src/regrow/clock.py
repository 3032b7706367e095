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

# A scaled timestep is rounded to bfloat16 twice: before and after it is divided.
ROUNDING = 2.0**-7


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

    @property
    def batch(self) -> int | None:
        """Samples in the last step of this generation, None if it is not known."""

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

    @property
    def batch(self) -> None:
        """Not known."""
        return None

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

    def __init__(self, scheduler: Any, tick: Callable[[Any], None]) -> None:
        # Pipelines read the parameters of `step` from its signature.
        functools.update_wrapper(self, scheduler.step)
        self._scheduler, self._step = scheduler, scheduler.step
        self._below = scheduler.__dict__.get("step")
        self._tick: Callable[[Any], None] | None = tick
        scheduler.step = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out = self._step(*args, **kwargs)
        if self._tick is not None:
            self._tick(kwargs.get("sample", args[2] if len(args) > 2 else None))
        return out

    def remove(self) -> None:
        """Tick no more; the scheduler is as before, unless something else lies on top."""
        self._tick = None
        top = self._scheduler.__dict__.get("step")
        while isinstance(top, _Step) and top._tick is None:
            top = top._below
        if top is None:
            self._scheduler.__dict__.pop("step", None)
        else:
            self._scheduler.step = top

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo.get(id(self._scheduler))
        if copied is None:
            # Panorama pipelines copy the state of a scheduler and put it back.
            return self
        # A copied scheduler is another sampler: it must step itself and not this clock.
        return MethodType(type(copied).step, copied)


class SchedulerClock:
    """A clock that follows the scheduler of a pipeline.

    A generation is known by the tensor its loop runs over: pipelines hand on elements of it, so calls
    of other loops are told apart even where their timesteps have the same values.

    Args:
        scheduler: returns the scheduler in use, so that one swapped between generations is followed.
        on_end: called when the last step of a generation is done.
        scale: what the pipeline divides timesteps by before it hands them on.
    """

    def __init__(
        self, scheduler: Callable[[], Any], on_end: Callable[[], None], scale: float = 1.0
    ) -> None:
        self._current, self._on_end, self._scale = scheduler, on_end, scale
        self._scheduler: Any = None
        self._step: _Step | None = None
        self._timesteps: Any = None
        self._values: list[float] = []
        self._unproven: Any = None
        self._loop: _Loop | None = None
        self._displaced: _Loop | None = None
        self._index = self._total = self._branch = 0
        self._first = True
        self._batch: int | None = None
        self._owner = 0
        self._warned = False
        self._attach(scheduler())

    def _attach(self, scheduler: Any) -> None:
        self.detach()
        self._scheduler = scheduler
        self._step = _Step(scheduler, self._tick)
        if _is_set(scheduler):
            self._unproven = scheduler.timesteps
        else:
            self._timesteps = scheduler.timesteps

    def detach(self) -> None:
        if self._step is not None:
            self._step.remove()
        self._scheduler = self._step = self._timesteps = self._unproven = None
        self._loop = self._displaced = None
        self._index = self._total = 0

    @property
    def batch(self) -> int | None:
        """Samples in the last step of this generation, None before it."""
        return self._batch

    def _tick(self, sample: Any) -> None:
        if threading.get_ident() == self._owner:
            known = isinstance(sample, torch.Tensor) and sample.ndim > 1
            self._batch = len(sample) if known else None
            self._index += 1
            self._branch = 0
            if self._index == self._total:
                self._on_end()

    def read(self, timestep: Any) -> Position | None:
        if self._current() is not self._scheduler:
            self._attach(self._current())
        if self._displaced is not None and self._displaced.holds(timestep):
            raise _concurrent("has begun a generation")
        known = self._loop is not None and self._loop.holds(timestep)
        if not known and self._scheduler.timesteps is not self._timesteps:
            if not self._begin(timestep):
                self._warn_foreign()
                return None
        elif self._index >= self._total or not self._is_next(timestep):
            self._warn_foreign()
            return None
        elif threading.get_ident() != self._owner:
            raise _concurrent("is generating")
        here = Position(self._index, self._total, self._branch, self._first)
        self._branch += 1
        self._first = False
        return here

    def _begin(self, timestep: Any) -> bool:
        """Begin a generation at its first call, at index 0, or later for image-to-image; False if the
        call is not one of the scheduler's."""
        timesteps = self._scheduler.timesteps
        loop: _Loop | None = _Loop.over(timesteps)
        values = timesteps.tolist()
        if loop is not None and loop.holds(timestep):
            begin = loop.place(timestep)
        else:
            # Timesteps set before `apply` may be of a generation long past.
            if timesteps is self._unproven and _is_part(timestep, timesteps.device):
                return False
            places = [i for i, value in enumerate(values) if self._matches(timestep, value)]
            if not places:
                return False
            begin = getattr(self._scheduler, "begin_index", None) or 0
            begin = begin if begin in places else places[0]
            loop = _Loop.around(timestep, timesteps, begin)
        me = threading.get_ident()
        unfinished = self._index < self._total and self._owner != me
        self._displaced = self._loop if unfinished else None
        self._timesteps, self._values, self._total = timesteps, values, len(values)
        self._loop, self._unproven = loop, None
        self._index, self._branch, self._first, self._owner = begin, 0, True, me
        self._batch = None
        return True

    def _is_next(self, timestep: Any) -> bool:
        """Whether a timestep is that of the step that is due. Elements of a loop's tensor are told by
        their place, which needs no wait for the device."""
        if self._loop is not None and self._loop.holds(timestep):
            return self._loop.place(timestep) == self._index
        if self._loop is not None and _is_part(timestep):
            return False
        return self._matches(timestep, self._values[self._index])

    def _matches(self, timestep: Any, value: float) -> bool:
        """Whether a timestep has a value; a scaled one may have been rounded.

        Of timesteps of each token it is the largest: those of a given first frame are 0.
        """
        given = float(timestep.max()) if isinstance(timestep, torch.Tensor) else float(timestep)
        if self._scale == 1:
            return given == value
        return abs(given * self._scale - value) <= ROUNDING * self._scale

    def _warn_foreign(self) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                "the denoiser was called outside a generation of the pipeline regrow was applied to "
                "(another pipeline with a scheduler of its own, or a loop that does not call "
                "scheduler.set_timesteps); such calls are computed in full",
                stacklevel=2,
            )


@dataclass(frozen=True)
class _Loop:
    """The tensor of timesteps that a sampling loop runs over.

    Args:
        part: the tensor or an element of it, which keeps its memory from being given to another.
        origin: where in memory the element of index 0 is, in elements.
        stride: distance of its elements.
    """

    part: torch.Tensor
    origin: int
    stride: int

    @classmethod
    def over(cls, timesteps: torch.Tensor) -> _Loop:
        """The loop over a whole tensor ``(S,)``."""
        return cls(timesteps, int(timesteps.storage_offset()), max(int(timesteps.stride(0)), 1))

    @classmethod
    def around(cls, timestep: Any, timesteps: torch.Tensor, index: int) -> _Loop | None:
        """The loop over a copy of ``timesteps`` whose element of that index is given; None if the
        given one is not followed by the others."""
        if not _is_part(timestep):
            return None
        rest, offset = timesteps[index:], int(timestep.storage_offset())
        room = timestep.untyped_storage().nbytes() // timestep.element_size() - offset
        if room < len(rest):
            return None
        following = timestep.as_strided((len(rest),), (1,), offset)
        return cls(timestep, offset - index, 1) if torch.equal(following.to(rest), rest) else None

    def holds(self, timestep: Any) -> bool:
        """Whether a timestep is an element of this loop's tensor."""
        return (
            isinstance(timestep, torch.Tensor)
            and timestep.device == self.part.device
            and timestep.untyped_storage().data_ptr() == self.part.untyped_storage().data_ptr()
        )

    def place(self, timestep: torch.Tensor) -> int:
        """The index of an element."""
        return (int(timestep.storage_offset()) - self.origin) // self.stride


def _concurrent(what: str) -> ConcurrentGenerationError:
    return ConcurrentGenerationError(
        f"another thread {what} with this denoiser; an accelerated denoiser serves one generation at a "
        "time. Give each thread a pipeline with a denoiser of its own."
    )


def _is_set(scheduler: Any) -> bool:
    """Whether ``set_timesteps`` was called; a new scheduler holds no or all training timesteps."""
    steps = getattr(scheduler, "num_inference_steps", None)
    return steps is not None and steps != scheduler.config.get("num_train_timesteps")


def _is_part(timestep: Any, device: torch.device | None = None) -> bool:
    """Whether a timestep is an element of a larger tensor (on that device)."""
    if not isinstance(timestep, torch.Tensor) or timestep.is_meta:
        return False
    own = timestep.numel() if any(timestep.stride()) else 1
    larger = timestep.untyped_storage().nbytes() > own * timestep.element_size()
    return larger and device in (None, timestep.device)
