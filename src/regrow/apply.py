"""Put a method on a pipeline or a denoiser, take it off, and report what it did."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from regrow.core import checks
from regrow.core.call import Observer
from regrow.core.clock import ManualClock, SchedulerClock
from regrow.core.engine import Engine
from regrow.core.install import Installed, is_hooked
from regrow.core.recipe import origin_of, recipe_of
from regrow.methods.names import method_of
from regrow.models import DENOISERS, denoiser_of, other_denoisers
from regrow.report import RunReport, check_freezable, report_of, schedule_of
from regrow.schedule import Schedule


class Run:
    """A method at work on a denoiser, from `apply` until `remove` or the end of the ``with`` block."""

    def __init__(self, config: Any, engine: Engine, installed: Installed, pipeline: Any = None) -> None:
        self.config = config
        self._engine, self._installed, self._pipeline = engine, installed, pipeline

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"Run({self.config!r} on {type(self._engine.denoiser).__name__})"

    def remove(self) -> None:
        """Take the method off; everything is as before. Removing twice is allowed."""
        active = self._installed.active
        self._installed.remove()
        if self._engine.clock is not None:
            self._engine.clock.detach()
        self._engine.release()
        if active and self._engine.generation is None and self._swapped:
            self._engine.warn_once("swapped", self._swapped)

    @contextmanager
    def generation(self, num_steps: int) -> Iterator[ManualClock]:
        """A generation with a denoiser that is used without a pipeline.

        Args:
            num_steps: number of sampler steps.

        Yields:
            a clock whose ``step()`` is called after every step of the sampler.

        Raises:
            ValueError: if ``num_steps < 1``.
            RuntimeError: if the method was taken off.
        """
        if not self._installed.active:
            raise RuntimeError("this run's method was taken off; call regrow.apply again")
        with self._engine.manual(num_steps) as clock:
            yield clock

    @contextmanager
    def observed(self, observer: Observer) -> Iterator[None]:
        """Tell an observer after every call of the denoiser what it computed, for as long as this lasts.

        Args:
            observer: called with an `Observation`; it must not change its tensors.
        """
        observers = self._engine.observers
        observers.append(observer)
        try:
            yield
        finally:
            observers.remove(observer)

    def report(self) -> RunReport:
        """What the last generation computed, reused and saved, call by call.

        Raises:
            RuntimeError: if nothing was generated yet.
        """
        if self._engine.generation is None and self._swapped:
            raise RuntimeError(f"there is nothing to report: {self._swapped}")
        return report_of(self._engine)

    def frozen(self) -> Schedule:
        """What the calls of the last generation did, as a plan: their depths and recoveries.

        Saved and applied as any schedule, it gives the same pictures for the same seeds, bit for bit, and
        measures nothing.

        Raises:
            RuntimeError: if nothing was generated yet.
            ValueError: if calls left out tokens, or parts of layers, that the method chose.
        """
        check_freezable(self.config)
        if self._engine.generation is None:
            raise RuntimeError("there is nothing to keep: no generation has begun since regrow.apply")
        return schedule_of(self._engine.generation)

    @property
    def _swapped(self) -> str:
        """What to say if the pipeline has another denoiser now; empty if it has the same."""
        if self._pipeline is None:
            return ""
        denoiser = self._engine.denoiser
        held = (getattr(self._pipeline, name, None) for name in DENOISERS)
        # Compiled as a whole, or wrapped, it is inside what the pipeline holds.
        if any(denoiser in part.modules() for part in held if isinstance(part, nn.Module)):
            return ""
        return (
            f"the pipeline's {type(denoiser).__name__} was replaced after regrow.apply, so the method is "
            "on one that it no longer calls; call regrow.apply again"
        )


def apply(target: Any, config: Any, *, scheduler: Any = None, keep_text: bool = True) -> Run:
    """Put a method on a pipeline or a denoiser.

    Args:
        target: a diffusers pipeline, or its denoiser.
        config: the configuration of a method, such as `DaTo` or `SiTo`, or its short name, such as
            ``"dato:b1"``: those of the command line, see `regrow.methods.names.method_of`. A `Schedule` is
            one for `DaTo`; without ratios it does on any denoiser.
        scheduler: with a bare denoiser, the scheduler whose steps are followed; without one, use
            `Run.generation`.
        keep_text: in a transformer compute what depends on the text alone (PixArt's projected captions and
            their keys and values) once a generation. Exact; without it, and in inference mode, whose
            tensors don't tell whether they were written to, in every call.

    Returns:
        the run, which is a context manager: leaving it takes the method off.

    Raises:
        UnsupportedModelError: if regrow has no table for the model.
        TypeError: if ``config`` is no method's configuration.
        ValueError: if the short name is not known, the model has no layer the method could prune, a method
            is applied already, or a scheduler is given with a pipeline.
    """
    config = method_of(config) if isinstance(config, str) else config
    denoiser = denoiser_of(target)
    parts = recipe_of(config)
    if is_hooked(denoiser):
        raise ValueError(
            "target: a method is applied to this denoiser already; first call remove() on the run that "
            "regrow.apply returned. It serves all pipelines that share this denoiser and its scheduler."
        )
    pipeline = None if target is denoiser else target
    if pipeline is not None and scheduler is not None:
        raise ValueError("scheduler: a pipeline has its own; give one with a bare denoiser only")
    checks.check_recipe(parts, denoiser)
    engine = Engine(denoiser, parts, keep_text=keep_text)
    checks.check_useful(engine)
    engine.origin = origin_of(config)
    checks.warn_of_origin(engine, getattr(pipeline, "scheduler", scheduler))
    checks.warn_of_others(engine, other_denoisers(pipeline, denoiser))
    source = (lambda: pipeline.scheduler) if pipeline is not None else (lambda: scheduler)
    if source() is not None and not hasattr(source(), "step"):
        raise TypeError(f"scheduler: {type(source()).__name__} has no step()")
    installed = Installed(engine)
    if source() is not None:
        engine.clock = SchedulerClock(source, engine.release, engine.layout.timestep_scale)
    return Run(config, engine, installed, pipeline)
