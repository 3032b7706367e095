"""Put a method on a pipeline or a denoiser, take it off, and report what it did."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from regrow.core.call import Observer
from regrow.core.clock import ManualClock, SchedulerClock
from regrow.core.engine import Engine
from regrow.core.install import Installed, is_hooked
from regrow.core.recipe import Recipe, origin_of, recipe_of
from regrow.methods.names import method_of
from regrow.models import DENOISERS, denoiser_of, known_layout, other_denoisers
from regrow.report import RunReport, check_freezable, report_of, schedule_of
from regrow.schedule import FULL, HEAD, SITES, Schedule


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
            "target: a method is applied to this denoiser already; call its run's remove() first. "
            "Pipelines that share a denoiser and a scheduler share its run as well."
        )
    pipeline = None if target is denoiser else target
    if pipeline is not None and scheduler is not None:
        raise ValueError("scheduler: a pipeline has its own; give one with a bare denoiser only")
    _check_plan(parts, denoiser)
    engine = Engine(denoiser, parts, keep_text=keep_text)
    _check_useful(engine)
    engine.found = origin_of(config)
    if engine.found is not None:
        for difference in engine.found.unlike(denoiser, getattr(pipeline, "scheduler", scheduler)):
            engine.warn_once(f"origin {difference}", f"the plan may not suit: {difference}")
    for name in other_denoisers(pipeline, denoiser):
        engine.warn_once(
            f"second {name}",
            f"the pipeline has a second denoiser, {name}, which is left as it is; for it call "
            f"regrow.apply(pipeline.{name}, config, scheduler=pipeline.scheduler), or with the scheduler "
            "that it is sampled by if that is another",
        )
    source = (lambda: pipeline.scheduler) if pipeline is not None else (lambda: scheduler)
    if source() is not None and not hasattr(source(), "step"):
        raise TypeError(f"scheduler: {type(source()).__name__} has no step()")
    installed = Installed(engine)
    if source() is not None:
        engine.clock = SchedulerClock(source, engine.release, engine.layout.timestep_scale)
    return Run(config, engine, installed, pipeline)


def _check_plan(parts: Recipe, denoiser: nn.Module) -> None:
    """Refuse calls that the denoiser can't make, or for which the method decides nothing.

    The first leave out a part of a denoiser though only its output is known. The others are of depth
    `SITES`, with a method that decides for no sites.
    """
    kinds = parts.plan.kinds()
    if any(step.ratio or step.depth not in (FULL, HEAD, 0) for step in kinds):
        known_layout(denoiser)
    decides = parts.sites is not None and not parts.sites.by_ratio
    if not decides and any(step.depth == SITES for step in kinds):
        raise ValueError(
            "depth: 'sites' is not allowed for a method that decides for no single sites; it must be a "
            "number of layers, 'full', 'layers' or 'head'"
        )


def _check_useful(engine: Engine) -> None:
    """Refuse what could only do nothing, warn of what is asked to do nothing."""
    clash, layout, sites, name = engine.clash(), engine.layout, engine.sites, type(engine.denoiser).__name__
    if clash:
        raise ValueError(f"target: {clash}")
    if not layout.is_known and any(step.depth == HEAD for step in engine.kinds):
        engine.warn_once(
            "head",
            f"the last block of {name} is not known: calls that should compute what lies behind it recover "
            "the output instead",
        )
    if engine.watched or (sites is not None and sites.attending):
        _check_attentions(engine)
    beyond = sorted({s.depth for s in engine.kinds if layout.depths <= s.depth < SITES})
    if beyond and engine.cuts:
        engine.warn_once(
            "depths",
            f"calls of depth {', '.join(map(str, beyond))} are full: a depth (a branch, plus 1) must be "
            f"below {layout.depths} to leave layers of {name} out",
        )
    if sites is not None and sites.decider.space is not None:
        _check_pruned(engine, sites.shallowest)
    prunes = any(engine.prunes(step) for step in engine.kinds)
    if not prunes and not engine.cuts and not engine.recipe.whole:
        engine.warn_once(
            "nothing",
            "the method prunes nothing and reuses nothing: after the first call, which is always full, no "
            f"call goes less deep than {layout.depths} layers, and no ratio is above 0",
        )


def _check_pruned(engine: Engine, deeper: int | None) -> None:
    """Warn of calls that should prune, but compute no layer that does.

    Args:
        engine: of the run.
        deeper: the least depth of calls that prune; None if only full ones do.
    """
    asked = {s for s in engine.kinds if s.ratio and 0 < s.depth < SITES}
    idle = sorted({s.depth for s in asked if not engine.prunes(s)})
    if not idle:
        return
    calls = engine.recipe.plan.calls
    pruned = "full calls only" if deeper is None else f"calls of depth {deeper} or more only"
    if calls is not None:
        steps = engine.recipe.plan.resample(calls).steps()
        pruned = f"{sum(engine.prunes(step) for step in steps)} of {calls} calls"
    hint = f" (depth {deeper} in a schedule, branch={deeper - 1} of DeepCache)" if deeper else ""
    engine.warn_once(
        "idle",
        f"tokens are pruned in {pruned}: those of depth {', '.join(map(str, idle))} compute no layer of "
        f"{type(engine.denoiser).__name__} that prunes; use a deeper branch{hint}",
    )


def _check_attentions(engine: Engine) -> None:
    """Refuse attentions that can't keep their keys, or can't compute some of their tokens alone."""
    fused = sum(getattr(module, "fused_projections", False) for module in engine.denoiser.modules())
    if fused:
        raise ValueError(
            f"target: the projections of {fused} attentions are fused, so keys can't be kept or "
            "seen by themselves; call unfuse_qkv_projections() first"
        )
    stream = engine.layout.stream
    others = [] if stream is None or stream.rotary is None else stream.rotary.others()
    if others:
        raise ValueError(
            f"target: {len(others)} attentions have processors of their own (IP-Adapter), so they can't "
            "compute some of their tokens or be looked at; call unload_ip_adapter() first"
        )
