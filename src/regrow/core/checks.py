"""Errors and warnings that a user sees when a method is applied, and while it runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from regrow.core import others
from regrow.models import known_layout
from regrow.recover.time import REUSE
from regrow.schedule import FULL, HEAD, SITES

if TYPE_CHECKING:
    from regrow.core.call import Generation
    from regrow.core.clock import Position
    from regrow.core.engine import Engine
    from regrow.core.memory import BranchMemory
    from regrow.core.recipe import Recipe


def check_recipe(recipe: Recipe, denoiser: nn.Module) -> None:
    """Refuse calls that are not possible with the denoiser, or with the method itself.

    Raises:
        UnsupportedModelError: if calls skip a part of a denoiser of which only the output is known.
        ValueError: if calls need decisions that the method does not make, or forecast chosen tokens.
    """
    kinds, sites = recipe.plan.kinds(), recipe.sites
    if any(step.ratio or step.depth not in (FULL, HEAD, 0) for step in kinds):
        known_layout(denoiser)
    decides = sites is not None and not sites.by_ratio
    if not decides and any(step.depth == SITES for step in kinds):
        raise ValueError(
            "depth: 'sites' is not allowed, this method does not decide for single sites; it must be a "
            "number of layers, 'full', 'layers' or 'head'"
        )
    streams = sites is not None and sites.full_calls > 0
    if streams and any(step.recovery != REUSE for step in kinds):
        raise ValueError(
            "recovery: a forecast is not allowed where the tokens of whole calls are chosen, because "
            "their last values are of different steps; it must be 'reuse'"
        )


def check_useful(engine: Engine) -> None:
    """Refuse a method that could save nothing here, and warn if it is set to save nothing.

    Raises:
        ValueError: if another cache, or the attentions, prevent the method from working.
    """
    clash = beside_others(engine)
    if clash:
        raise ValueError(f"target: {clash}")
    name, layout, sites = type(engine.denoiser).__name__, engine.layout, engine.sites
    if not layout.is_known and any(step.depth == HEAD for step in engine.kinds):
        engine.warn_once(
            "head",
            f"the last block of {name} is not known: calls of depth 'head', which compute what follows it, "
            "recover the output instead",
        )
    if (sites is not None and sites.attending) or engine.watched:
        _check_attentions(engine)
    beyond = sorted({s.depth for s in engine.kinds if layout.depths <= s.depth < SITES})
    if beyond and engine.skip_plans:
        engine.warn_once(
            "depths",
            f"calls of depth {', '.join(map(str, beyond))} are full: a depth (a branch, plus 1) must be "
            f"below {layout.depths} to leave layers of {name} out",
        )
    if sites is not None and sites.decider.space is not None:
        _warn_of_unpruned(engine)
    prunes = any(engine.prunes(step) for step in engine.kinds)
    if not prunes and not engine.skip_plans and not engine.recipe.whole:
        engine.warn_once(
            "nothing",
            "the method prunes nothing and reuses nothing: after the first call, which is always full, no "
            f"call is less deep than {layout.depths} layers, and no ratio is above 0",
        )


def _check_attentions(engine: Engine) -> None:
    """Refuse attentions whose keys can't be kept, or that can't have fewer queries than keys."""
    modules = engine.denoiser.named_modules()
    fused = [name for name, m in modules if getattr(m, "fused_projections", False)]
    if fused:
        raise ValueError(
            f"target: the projections of {len(fused)} attentions are fused, so their keys can't be kept or "
            "read; call unfuse_qkv_projections() first"
        )
    # Blocks, whose attention is the site itself, are computed whole instead.
    streams = engine.layout.stream is not None
    other = [one for one in engine.layout.rotary.values() if streams and not one.is_plain]
    if other:
        raise ValueError(
            f"target: {len(other)} attentions have special processors (IP-Adapter), so they can't compute "
            "some of their tokens only, or be observed; call unload_ip_adapter() first"
        )


def _warn_of_unpruned(engine: Engine) -> None:
    """Warn if calls should prune, but compute no layer that can."""
    asked = {s for s in engine.kinds if s.ratio and 0 < s.depth < SITES}
    idle = sorted({s.depth for s in asked if not engine.prunes(s)})
    if not idle:
        return
    calls, deeper = engine.recipe.plan.calls, engine.sited.shallowest
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


def warn_of_origin(engine: Engine, scheduler: Any) -> None:
    """Warn if a plan was found on another pipeline than it is applied to, and say how they differ."""
    if engine.origin is not None:
        for difference in engine.origin.unlike(engine.denoiser, scheduler):
            engine.warn_once(f"origin {difference}", f"the plan may not suit: {difference}")


def warn_of_others(engine: Engine, names: Iterable[str]) -> None:
    """Warn that a pipeline has other denoisers, which stay unaccelerated."""
    for name in names:
        engine.warn_once(
            f"second {name}",
            f"the pipeline has a second denoiser, {name}, which is not accelerated; for it call "
            f"regrow.apply(pipeline.{name}, config, scheduler=pipeline.scheduler), or give its own "
            "scheduler if it has one",
        )


def warn_of_run(engine: Engine, position: Position) -> None:
    """Warn if a generation that begins is not the run that the plan was made for."""
    recipe, origin, clock, total = engine.recipe, engine.origin, engine.clock, position.total
    differs = ""
    if clock is not None and recipe.made_for is not None:
        differs = recipe.made_for.unlike(clock.steps, total, position.index, clock.timesteps)
    if differs:
        engine.warn_once("run", differs)
    elif origin is not None and not recipe.whole and origin.calls != total:
        engine.warn_once(
            "origin calls", f"the plan was found for {origin.calls} calls; this generation has {total}"
        )
    planned = recipe.plan.calls
    if planned is not None and 2 * total < planned and not differs:
        engine.warn_once(
            "resampled",
            f"the schedule is for {planned} calls and is resampled to {total}, which may lose quality; "
            "find one for this number by regrow search --steps, or use a method without a schedule",
        )


def warn_of_wrapped(engine: Engine, skipped: Sequence[str]) -> None:
    """Warn if a module that calls skip has a forward method that somebody replaced."""
    wrapped = others.wrapped_by_others(engine.denoiser, skipped)
    if wrapped:
        engine.warn_once(
            "wrapped",
            f"{wrapped}, for example, has a replaced forward method, which is not called in calls that "
            "skip this module",
        )


def warn_of_nothing_saved(engine: Engine, generation: Generation) -> None:
    """Warn if a finished generation saved nothing, although the method should."""
    known = [record for record in generation.records if record.position is not None]
    would = any(step.ratio or engine.skip_plans.get(step.depth) is not None for step in engine.kinds)
    saved = any(record.depth != FULL or record.ratio for record in known)
    if not known or not would or saved or generation.whole:
        return
    position = known[-1].position
    if position is None or position.index < position.total - 1:
        # Interrupted.
        return
    reasons = [record.reason for record in known if record.reason]
    reason = max(set(reasons), key=reasons.count) if reasons else ""
    if len(known) == 1:
        reason = "the first call of a run always is"
    engine.warn_once(
        "saved nothing",
        f"a generation saved nothing: all of its {len(known)} calls were computed in full"
        + (f" ({reason})" if reason else ""),
    )


def beside_others(engine: Engine) -> str:
    """Say why the method can't work with another cache; empty if it can, or if there is none."""
    caches = " and ".join(others.other_caches(engine.denoiser))
    if not caches:
        return ""
    if engine.sites is not None:
        return (
            f"diffusers' {caches} is on, which would reuse outputs of some tokens for other tokens; call "
            "disable_cache() first"
        )
    engine.warn_once(
        "other caches",
        f"diffusers' {caches} is on too and skips other work, which the report does not count; call "
        "disable_cache() to see what regrow saves alone",
    )
    return ""


def listened(denoiser: nn.Module, skipped: Sequence[str]) -> str:
    """Say why modules with forward hooks of others can't be skipped; empty if there are none."""
    module = others.hooked_by_others(denoiser, skipped)
    if not module:
        return ""
    return f"{module}, for example, has a forward hook, which would get no output to read"


def keeps_maps(attentions: Iterable[tuple[str, nn.Module]]) -> str:
    """Say why calls can't skip attentions; empty if they can."""
    keeper = next((name for name, attention in attentions if others.keeps_maps(attention)), "")
    if not keeper:
        return ""
    return (
        f"attention processors, for example that of {keeper}, keep attention maps that are read later, "
        "and calls that skip attentions or leave tokens out make no maps"
    )


def can_subset(engine: Engine, slot: BranchMemory) -> bool:
    """Whether some of the image's tokens can be computed, and attentions observed; warns if not."""
    sites = engine.sites is not None and engine.sites.can_subset
    if engine.layout.stream is None or not sites:
        return sites
    what = "all tokens are computed" if engine.sited.stream else "layers reuse their last output whole"
    if slot.grid is None:
        engine.warn_once("grid", f"{what}, because the tokens are not those of one picture (Kontext)")
    elif not all(rotary.is_plain for rotary in engine.turning.values()):
        engine.warn_once(
            "processor",
            f"{what}, because attention processors were replaced after regrow.apply (IP-Adapter), so "
            "queries can't be turned before the attention",
        )
    else:
        return True
    # Kept values are now outdated.
    slot.outputs.clear()
    return False
