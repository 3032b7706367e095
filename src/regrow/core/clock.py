"""Where are we: which generation, and which step of how many.

There is one clock a run. A generation is known by the scheduler's ``timesteps``, a new object after every
``set_timesteps``; a step by the place of its timestep in the tensor that the loop runs over, or else by the
timestep's value and by ``scheduler.step``. That holds for samplers that call the denoiser twice a step, for
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
# What pipelines divide timesteps by.
SCALES = (1.0, 1000.0)
# Schedulers whose last timestep is where the last step arrives: no step begins there.
WITH_END = ("DDPMWuerstchenScheduler",)


class ConcurrentGenerationError(RuntimeError):
    """Two threads generate with one accelerated denoiser at the same time."""


@dataclass(frozen=True)
class Position:
    """A step of a generation.

    Args:
        index: of the sampler's step, from 0; a run that starts late starts above 0.
        total: number of steps of the whole trajectory.
        begins: whether its call is the first of a run over the trajectory.
        again: whether that run is over the same timesteps as the one before (members of an ensemble).
    """

    index: int
    total: int
    begins: bool
    again: bool = False


class OutsideError(LookupError):
    """A call belongs to no generation that the clock knows; the message says why."""


class Clock(Protocol):
    """Says where a call of the denoiser stands."""

    @property
    def batch(self) -> int | None:
        """Samples in the last step of this generation, None if it is not known."""

    @property
    def steps(self) -> int:
        """Steps of this generation's sampler, which may call the denoiser twice in each."""

    @property
    def timesteps(self) -> Sequence[float]:
        """The timesteps that this generation runs over; empty if they are not known."""

    def read(self, timestep: Any) -> Position:
        """The position of the call that begins now.

        Raises:
            OutsideError: if it belongs to no known generation.
            ConcurrentGenerationError: if another thread is generating.
        """

    def called(self) -> None:
        """A call of the denoiser is over; the sampler may step next."""

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
        self._index = 0
        self._begins = True

    @property
    def batch(self) -> None:
        """Not known."""
        return None

    @property
    def steps(self) -> int:
        """As many as were announced."""
        return self._total

    @property
    def timesteps(self) -> Sequence[float]:
        """Not known."""
        return ()

    def step(self) -> None:
        """The sampler's step is done; the next call of the denoiser belongs to the next one."""
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
        """Only the caller says when a step ends."""

    def detach(self) -> None:
        self._index = self._total


class StepWatch:
    """Tells when a scheduler steps.

    It is on the scheduler's class: whoever copies or pickles the scheduler meanwhile finds nothing on it,
    and a copy steps itself. Only where somebody gave the scheduler a ``step`` of its own, it is on that.

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
        """Leave all as it was, or, below another watch, let steps pass."""
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
    denoiser, so calls of other loops are known even where their timesteps have the same values.

    Args:
        scheduler: returns the scheduler in use, so that one swapped between generations is followed.
        on_end: called when the last step of a generation is done.
        scale: what the pipeline divides timesteps by before it hands them on; None if that is not known:
            the scheduler's steps are counted.
    """

    def __init__(
        self, scheduler: Callable[[], Any], on_end: Callable[[], None], scale: float | None = 1.0
    ) -> None:
        self._current, self._on_end, self._scale = scheduler, on_end, scale
        self._scheduler: Any = None
        self._watch: StepWatch | None = None
        self._timesteps: Any = None
        self._unproven: Any = None
        # What the first call was given, until the sampler steps.
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
        """Wait for a generation of a scheduler."""
        self.detach()
        self._scheduler = scheduler
        # Timesteps set before may be of a generation long past, or of one that begins now.
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
        """Samples in the last step of this generation, None before it."""
        return self._batch

    @property
    def steps(self) -> int:
        """What the scheduler was told, or else its timesteps."""
        return getattr(self._scheduler, "num_inference_steps", None) or self._total

    @property
    def timesteps(self) -> Sequence[float]:
        """Those of the scheduler."""
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
        # A panorama steps once a view: its last step is over when all views have had it.
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
            # Timesteps set before `apply` may be of a generation long past.
            stepped = getattr(self._scheduler, "step_index", None) is not None
            other = stepped or _is_part(timestep, timesteps.device)
            old = timesteps is self._unproven and other
            places = self._places(timestep, values)
            if old or not places:
                raise self._outside(timestep)
            told = getattr(self._scheduler, "begin_index", None)
            # Where it is not known how timesteps are changed, one may have the value of another.
            begin = places[0] if told is None or not (self._scale is None or told in places) else told
            loop = _Loop.around(timestep, timesteps, begin)
        unfinished = self._index < self._total and self._owner != threading.get_ident()
        self._displaced = self._loop if unfinished else None
        self._timesteps, self._values, self._total = timesteps, values, len(values)
        self._loop, self._unproven = loop, None
        self._first = timestep
        self._set(begin, threading.get_ident())

    def _set(self, place: int, owner: int | None) -> None:
        """Stand at the first call of a run over the timesteps."""
        self._index, self._place, self._stepped = place, place, False
        self._ticks, self._ticks_before, self._batch = 0, 0, None
        self._owner = self._owner if owner is None else owner

    def _find(self, timestep: Any) -> int:
        """The place of a timestep in the present generation.

        Elements of a loop's tensor are told by their place, which needs no wait for the device; others by
        their value: it is that of the step just done or, if the scheduler has stepped since and nobody else
        has called the denoiser, of one behind it.
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
        """Where a run over some timesteps may begin, with one of them."""
        scales: Sequence[float] = SCALES if self._scale is None else (self._scale,)
        places = [
            i for i, value in enumerate(values) if any(_matches(timestep, value, scale) for scale in scales)
        ]
        # What the model is given need not be the scheduler's (Z-Image turns it around).
        return places or (range(len(values)) if self._scale is None else ())

    def _outside(self, timestep: Any) -> OutsideError:
        name = type(self._scheduler).__name__
        if self._timesteps is _timesteps_of(self._scheduler) and not self._values:
            return OutsideError(
                f"no generation of this pipeline's {name} has begun: the loop around the denoiser does not "
                "call its set_timesteps, or it is another pipeline with a scheduler of its own"
            )
        return OutsideError(
            f"its timestep is not the next one of this pipeline's {name}: the call is of another pipeline "
            "with a scheduler of its own, or of a loop over other timesteps or without scheduler.step"
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


def begins_of(scheduler: Any) -> torch.Tensor:
    """The timesteps at which a scheduler's steps begin."""
    timesteps: torch.Tensor = scheduler.timesteps
    return timesteps[:-1] if type(scheduler).__name__ in WITH_END else timesteps


def place_of(scheduler: Any, timestep: Any) -> int:
    """Where among a scheduler's timesteps one of them is; 0 if none is like it."""
    loop = _Loop.over(scheduler.timesteps)
    if loop.holds(timestep):
        return loop.place(timestep)
    told = getattr(scheduler, "begin_index", None)
    if told is not None:
        return int(told)
    values = scheduler.timesteps.tolist()
    return next((i for i, value in enumerate(values) if _matches(timestep, value, 1.0)), 0)


def _matches(timestep: Any, value: float, scale: float) -> bool:
    """Whether a timestep has a value; a scaled one may have been rounded.

    Of timesteps of each token it is the largest: those of a given first frame are 0.
    """
    given = _largest(timestep)
    if scale == 1:
        return given == value
    return abs(given * scale - value) <= ROUNDING * scale


def _timesteps_of(scheduler: Any) -> Any:
    """The timesteps of a scheduler; None if it has none before they are set."""
    return getattr(scheduler, "timesteps", None)


def _largest(timestep: Any) -> float:
    """A timestep, or of those of each sample or token the largest."""
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
