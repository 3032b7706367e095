"""The clock: it finds the generation and the step of each call.

Each run has one clock. A generation is known by the scheduler's ``timesteps``, a new object after every
``set_timesteps``; a step by the position of its timestep in the tensor that the loop runs over, or else by
the timestep's value and by ``scheduler.step``. This works for samplers with two calls a step, for
guidance in one call or several, for runs that start late (image-to-image), for runs that were interrupted,
for loops that never call ``scheduler.step``, and for those that call it once a view (panoramas).
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

# A scaled timestep is rounded to bfloat16 twice: before and after it is divided.
ROUNDING = 2.0**-7
# Numbers by which pipelines divide timesteps.
SCALES = (1.0, 1000.0)
# Schedulers whose last timestep is the end of the last step: no step begins there.
WITH_END = ("DDPMWuerstchenScheduler",)


class ConcurrentGenerationError(RuntimeError):
    """Two threads used one accelerated denoiser at the same time."""


@dataclass(frozen=True)
class Position:
    """A step of a generation.

    Args:
        index: index of the sampler's step, from 0; a run that starts late starts above 0.
        total: number of steps of the whole trajectory.
        begins: whether its call is the first of a run over the trajectory.
        again: whether that run has the same timesteps as the run before (members of an ensemble).
    """

    index: int
    total: int
    begins: bool
    again: bool = False


class OutsideError(LookupError):
    """A call that belongs to no known generation; the message says why."""


class Clock(Protocol):
    """Finds the position of each call of the denoiser."""

    @property
    def batch(self) -> int | None:
        """Number of samples in the last step of this generation; None if it is not known."""

    @property
    def steps(self) -> int:
        """Number of steps of this generation's sampler, each of one or two calls."""

    @property
    def timesteps(self) -> Sequence[float]:
        """The timesteps that this generation runs over; empty if they are not known."""

    def read(self, timestep: Any) -> Position:
        """Find the position of the call that begins now.

        Raises:
            OutsideError: if it belongs to no known generation.
            ConcurrentGenerationError: if another thread is generating.
        """

    def called(self) -> None:
        """Note that a call of the denoiser is over; the sampler may step next."""

    def detach(self) -> None:
        """Remove the clock; everything is as it was."""


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
        self._index = 0
        self._begins = True

    @property
    def batch(self) -> None:
        """Not known."""
        return None

    @property
    def steps(self) -> int:
        """Number of steps, as given."""
        return self._total

    @property
    def timesteps(self) -> Sequence[float]:
        """Not known."""
        return ()

    def step(self) -> None:
        """End the sampler's step; the next call of the denoiser belongs to the next step."""
        self._index += 1
        if self._index == self._total:
            self._on_end()

    def read(self, timestep: Any) -> Position:
        if self._index >= self._total:
            raise OutsideError(f"the denoiser was called after the last of the {self._total} steps")
        here = Position(self._index, self._total, self._begins)
        self._begins = False
        return here

    def called(self) -> None:
        """Do nothing: the caller ends steps."""

    def detach(self) -> None:
        self._index = self._total


class StepWatch:
    """Tells when a scheduler steps.

    It is on the scheduler's class, so that copies and pickles of the scheduler contain nothing of it, and a
    copy steps itself. If the scheduler object has its own ``step``, it is on that.

    Args:
        scheduler: whose steps.
        tell: given by name what a step is given: ``model_output``, ``timestep``, ``sample``.
        lasting: tell before each step until `remove`; otherwise once, behind the next step.
    """

    _lock = threading.Lock()

    def __init__(
        self, scheduler: Any, tell: Callable[[Mapping[str, Any]], None], lasting: bool = False
    ) -> None:
        own = "step" in vars(scheduler)
        self._holder: Any = scheduler if own else type(scheduler)
        self._scheduler = scheduler
        with self._lock:
            # None if the class inherits it.
            self._below = vars(self._holder).get("step")
            below = self._holder.step

            @functools.wraps(below)
            def step(*args: Any, **kwargs: Any) -> Any:
                if self._scheduler is None or not (own or args[0] is self._scheduler):
                    return below(*args, **kwargs)
                names = ("model_output", "timestep", "sample")
                given = dict(zip(names, args if own else args[1:], strict=False)) | kwargs
                if lasting:
                    tell(given)
                    return below(*args, **kwargs)
                self.remove()
                out = below(*args, **kwargs)
                tell(given)
                return out

            step.__dict__["watch"] = self
            self._holder.step = step

    def remove(self) -> None:
        """Restore ``step``; if another watch is on top, let steps pass instead."""
        self._scheduler = None
        with self._lock:
            top = vars(self._holder).get("step")
            while isinstance(watch := getattr(top, "watch", None), StepWatch) and watch._scheduler is None:
                top = watch._below
            if top is not None:
                self._holder.step = top
            elif "step" in vars(self._holder):
                del self._holder.step


class SchedulerClock:
    """A clock that follows the scheduler of a pipeline.

    A generation is known by the tensor its loop runs over: pipelines pass elements of it to the
    denoiser, so calls of other loops are recognised even if their timesteps have the same values.

    Args:
        scheduler: returns the scheduler in use, which may be replaced between generations.
        on_end: called when the last step of a generation is done.
        scale: number by which the pipeline divides timesteps for the denoiser; None if it is not known,
            then the scheduler's steps are counted.
    """

    def __init__(
        self, scheduler: Callable[[], Any], on_end: Callable[[], None], scale: float | None = 1.0
    ) -> None:
        self._current, self._on_end, self._scale = scheduler, on_end, scale
        self._scheduler: Any = None
        self._watch: StepWatch | None = None
        self._timesteps: Any = None
        self._unproven: Any = None
        # Timestep of the first call, until the sampler steps.
        self._first: Any = None
        self._values: list[float] = []
        self._loop: _Loop | None = None
        self._displaced: _Loop | None = None
        self._place = self._index = self._total = 0
        self._ticks = self._ticks_before = 0
        self._stepped = False
        self._batch: int | None = None
        self._owner = 0
        self._follow(scheduler())

    def _follow(self, scheduler: Any) -> None:
        """Follow a scheduler and wait for its next generation."""
        self.detach()
        self._scheduler = scheduler
        # Timesteps set before may belong to an old generation, or to one that begins now.
        self._unproven = scheduler.timesteps if _is_set(scheduler) else None
        self._timesteps = None if _is_set(scheduler) else _timesteps_of(scheduler)

    def detach(self) -> None:
        self._unwatch()
        self._scheduler = self._timesteps = self._unproven = self._first = self._batch = None
        self._loop = self._displaced = None
        self._values = []
        self._place = self._index = self._total = 0
        self._ticks = self._ticks_before = 0

    @property
    def batch(self) -> int | None:
        """Number of samples in the last step of this generation; None before it."""
        return self._batch

    @property
    def steps(self) -> int:
        """Number of steps that the scheduler was set to, or else of its timesteps."""
        return getattr(self._scheduler, "num_inference_steps", None) or self._total

    @property
    def timesteps(self) -> Sequence[float]:
        """The scheduler's timesteps."""
        return self._values

    def called(self) -> None:
        self._unwatch()
        if self._scheduler is not None:
            self._watch = StepWatch(self._scheduler, self._tick)

    def _unwatch(self) -> None:
        if self._watch is not None:
            self._watch.remove()
            self._watch = None

    def _tick(self, given: Mapping[str, Any]) -> None:
        if threading.get_ident() != self._owner:
            return
        sample: Any = given.get("sample")
        known = isinstance(sample, torch.Tensor) and sample.ndim > 1
        self._batch = len(sample) if known else None
        self._index, self._stepped, self._first = self._place + 1, True, None
        self._ticks += 1
        # A panorama steps once for each view: its last step ends when all views have stepped.
        if self._index == self._total and self._ticks >= self._ticks_before:
            self._on_end()

    def read(self, timestep: Any) -> Position:
        if self._current() is not self._scheduler:
            self._follow(self._current())
        if self._displaced is not None and self._displaced.holds(timestep):
            raise _concurrent("has begun a generation")
        known = self._loop is not None and self._loop.holds(timestep)
        if not known and _timesteps_of(self._scheduler) is not self._timesteps:
            self._begin(timestep)
            return Position(self._place, self._total, True)
        place = self._find(timestep)
        if threading.get_ident() != self._owner:
            if self._index < self._total:
                raise _concurrent("is generating")
            self._owner = threading.get_ident()
        if place < self._place:
            self._set(place, None)
            return Position(place, self._total, True, again=True)
        if place > self._place:
            self._ticks_before, self._ticks = self._ticks, 0
        self._index, self._place, self._stepped = place, place, False
        return Position(place, self._total, False)

    def _begin(self, timestep: Any) -> None:
        """Begin a generation at its first call, at index 0, or later for image-to-image."""
        timesteps = self._scheduler.timesteps
        values, whole = begins_of(self._scheduler).tolist(), _Loop.over(timesteps)
        loop: _Loop | None = whole
        if whole.holds(timestep):
            begin = whole.place(timestep)
        else:
            # Timesteps set before `apply` may belong to an old generation.
            stepped = getattr(self._scheduler, "step_index", None) is not None
            other = stepped or _is_part(timestep, timesteps.device)
            old = timesteps is self._unproven and other
            places = self._places(timestep, values)
            if old or not places:
                raise self._outside(timestep)
            told = getattr(self._scheduler, "begin_index", None)
            # If timesteps are changed in an unknown way, one may have the value of another.
            begin = places[0] if told is None or not (self._scale is None or told in places) else told
            loop = _Loop.around(timestep, timesteps, begin)
        unfinished = self._index < self._total and self._owner != threading.get_ident()
        self._displaced = self._loop if unfinished else None
        self._timesteps, self._values, self._total = timesteps, values, len(values)
        self._loop, self._unproven = loop, None
        self._first = timestep
        self._set(begin, threading.get_ident())

    def _set(self, place: int, owner: int | None) -> None:
        """Go to the first call of a run over the timesteps."""
        self._index, self._place, self._stepped = place, place, False
        self._ticks, self._ticks_before, self._batch = 0, 0, None
        self._owner = self._owner if owner is None else owner

    def _find(self, timestep: Any) -> int:
        """Find the position of a timestep in the present generation.

        Elements of a loop's tensor are found by their place in memory, without waiting for the device;
        others by value: that of the present step or, if the scheduler has stepped and nobody else has
        called the denoiser, that of a later step.
        """
        if self._loop is not None:
            if self._loop.holds(timestep):
                return self._loop.place(timestep)
            if _is_part(timestep) and self._scale is not None:
                raise self._outside(timestep)
        if self._scale is None and self._values:
            unstepped = self._first is not None and _largest(timestep) != _largest(self._first)
            if unstepped or self._index >= self._total:
                raise self._outside(timestep)
            return self._index
        places: tuple[int, ...] = ()
        if self._values:
            places = (*range(self._index, self._total), self._place)
        for place in places if self._stepped else places[-1:]:
            if _matches(timestep, self._values[place], self._scale or 1.0):
                return place
        self._stepped = False
        raise self._outside(timestep)

    def _places(self, timestep: Any, values: Sequence[float]) -> Sequence[int]:
        """List the positions where a run that begins with a timestep may begin."""
        scales: Sequence[float] = SCALES if self._scale is None else (self._scale,)
        places = [
            i for i, value in enumerate(values) if any(_matches(timestep, value, scale) for scale in scales)
        ]
        # The model's timestep may differ from the scheduler's (Z-Image reverses it).
        return places or (range(len(values)) if self._scale is None else ())

    def _outside(self, timestep: Any) -> OutsideError:
        name = type(self._scheduler).__name__
        if self._timesteps is _timesteps_of(self._scheduler) and not self._values:
            return OutsideError(
                f"no generation of this pipeline's {name} has begun: the sampling loop does not call its "
                "set_timesteps, or belongs to another pipeline with its own scheduler"
            )
        return OutsideError(
            f"its timestep is not the next one of this pipeline's {name}: the call is of another pipeline "
            "with its own scheduler, or of a loop over other timesteps or without scheduler.step"
        )


@dataclass(frozen=True)
class _Loop:
    """The tensor of timesteps that a sampling loop runs over.

    Args:
        part: the tensor or an element of it; while it exists, its memory is not reused.
        origin: place of the element of index 0 in memory, in elements.
        stride: distance between its elements, in elements.
    """

    part: torch.Tensor
    origin: int
    stride: int

    @classmethod
    def over(cls, timesteps: torch.Tensor) -> _Loop:
        """Make the loop over a whole tensor ``(S,)``."""
        return cls(timesteps, int(timesteps.storage_offset()), max(int(timesteps.stride(0)), 1))

    @classmethod
    def around(cls, timestep: Any, timesteps: torch.Tensor, index: int) -> _Loop | None:
        """Make the loop over a copy of ``timesteps``, from its element of that index; None if the other
        elements do not follow it in memory."""
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
        """Find the index of an element."""
        return (int(timestep.storage_offset()) - self.origin) // self.stride


def begins_of(scheduler: Any) -> torch.Tensor:
    """Read the timesteps at which a scheduler's steps begin."""
    timesteps: torch.Tensor = scheduler.timesteps
    return timesteps[:-1] if type(scheduler).__name__ in WITH_END else timesteps


def place_of(scheduler: Any, timestep: Any) -> int:
    """Find the index of a timestep among the scheduler's; 0 if it has no such one."""
    loop = _Loop.over(scheduler.timesteps)
    if loop.holds(timestep):
        return loop.place(timestep)
    told = getattr(scheduler, "begin_index", None)
    if told is not None:
        return int(told)
    values = scheduler.timesteps.tolist()
    return next((i for i, value in enumerate(values) if _matches(timestep, value, 1.0)), 0)


def _matches(timestep: Any, value: float, scale: float) -> bool:
    """Whether a timestep has a value; a scaled timestep may have been rounded.

    If each token has a timestep, the largest counts: those of a given first frame are 0.
    """
    given = _largest(timestep)
    if scale == 1:
        return given == value
    return abs(given * scale - value) <= ROUNDING * scale


def _timesteps_of(scheduler: Any) -> Any:
    """Read a scheduler's timesteps; None if it has none before they are set."""
    return getattr(scheduler, "timesteps", None)


def _largest(timestep: Any) -> float:
    """Read a timestep; if each sample or token has one, the largest."""
    return float(timestep.max() if isinstance(timestep, torch.Tensor) else timestep)


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
