"""Short names of methods, such as ``dato:b1`` or ``deepcache:5+tome:0.5``: one parser for all."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from pydantic import ValidationError

from regrow import hub
from regrow.fields import explain
from regrow.methods.base import MethodConfig, Role, TextError, methods, whole
from regrow.methods.catalogue import default_of, pairs
from regrow.methods.combined import Combined
from regrow.methods.dato import DaTo
from regrow.schedule import Schedule
from regrow.words import offer, shown

CALLS = 50
"""Calls that ``dato:N`` plans where nobody says how many there will be: the usual default of pipelines."""


class Named(NamedTuple):
    """What a short name stands for.

    Args:
        config: of a method; None for the pipeline as it is.
        steps: sampler steps.
    """

    config: Any
    steps: int


def method_of(name: str, calls: int = CALLS) -> Any:
    """The configuration of a method by its short name; `named` says which there are.

    Args:
        name: all that `named` takes, but no ``steps:N``: the call of the pipeline sets the steps.
        calls: that ``dato:N`` plans; for runs of other lengths its schedule is resampled.

    Raises:
        ValueError: if there is no such method, or the file is not what it should be.
        OSError: if a file can't be read.
    """
    if any(part.startswith("steps:") for part in name.split("+")):
        raise ValueError(
            f"method: {shown(name)} is not allowed, it must be a method without steps: the pipeline's "
            "call sets num_inference_steps"
        )
    return named(name, calls).config


def named(name: str, steps: int) -> Named:
    """A method, or fewer steps, or both, by a short name.

    ``sito:d``, ``dato:b1`` and ``atedm:reuse`` are presets, ``sito:0.5``, ``tome:0.5`` and ``atedm:0.5``
    ratios, ``cat:0.3`` the share computed, ``dato:FILE`` a schedule, ``deepcache:5``, ``fora:3`` and
    ``toca:3`` intervals, ``dato:5`` the same with ``ratio=0.5`` of the tokens pruned, and
    ``deepcache:5+tome:0.5`` or ``cat:0.3+deepcache:2`` both at once, in any order. A method with one
    obvious default needs no more than its name: ``cat`` is ``cat:paper``. Further fields follow after
    colons: ``sito:d:base=V:patch=4``, ``dato:b1:ratio=0.5:alignment=off``.

    ``FILE.json`` is the configuration in a file such as a search writes, ``FILE.yaml`` a schedule for DaTo;
    either may be on the hub: ``hub:owner/name/FILE.json``.

    ``steps:25`` is the same sampler with 25 steps, ``steps:25+sito:d`` a method, or two, in 25 steps.

    Args:
        name: the short name.
        steps: sampler steps where neither ``steps:N`` nor the plan in a file says otherwise.

    Raises:
        ValueError: if the name is none of these, or the file is not what it should be.
        OSError: if a schedule can't be read.
    """
    parts = name.split("+")
    own = [part for part in parts if part.startswith("steps:")]
    if len(own) > 1:
        raise ValueError(f"method: {shown(name)} is not allowed; steps: comes once")
    for part in own:
        steps = _steps(part)
        parts.remove(part)
    if len(parts) > 2:
        raise ValueError(
            f"method: {shown(name)} is not allowed; at most two methods, as in deepcache:5+tome:0.5"
        )
    try:
        configs = [_config(part, steps) for part in parts]
        config = _both(name, configs) if len(configs) == 2 else configs[0] if configs else None
        planned = None if config is None or own else config.sampler_steps
        return Named(config, planned or steps)
    except ValidationError as error:
        raise ValueError(f"method: {shown(name)}: {explain(error)}") from error


def _steps(spec: str) -> int:
    """The number of ``steps:N``."""
    try:
        return whole(spec.partition(":")[2])
    except TextError as error:
        raise _misread(spec, error) from error


def _both(name: str, configs: list[Any]) -> Combined:
    """Two methods as one."""
    # Both together were not found anywhere.
    configs = [config.model_copy(update={"origin": None}) for config in configs]
    tokens = [c for c in configs if c.ABOUT.role is Role.CHOOSES]
    caching = [c for c in configs if c.ABOUT.role in (Role.CACHES, Role.SCHEDULE)]
    if not tokens or not caching:
        raise ValueError(f"method: {shown(name)} is not allowed; {pairs(Role.CACHES, Role.SCHEDULE)}")
    if caching[0].ABOUT.role is Role.CACHES:
        return Combined(caching=caching[0], tokens=tokens[0])
    if caching[0] != type(caching[0])(schedule=caching[0].schedule):
        raise ValueError(
            f"method: {shown(name)} is not allowed; of {caching[0].method} only its schedule goes with "
            "another method, without further fields"
        )
    return Combined(caching=caching[0].schedule, tokens=tokens[0])


def _config(spec: str, steps: int) -> Any:
    """The configuration of one method in a run of so many steps."""
    name, _, rest = spec.partition(":")
    known = methods()
    if name not in known and (name == "hub" or spec.endswith(hub.PLANS)):
        plan = hub.load(spec)
        return DaTo(schedule=plan) if isinstance(plan, Schedule) else plan
    if name not in known:
        allowed = ("steps", *known)
        raise ValueError(
            f"method: {shown(spec)} is not known; before the colon comes one of {', '.join(allowed)}"
            f"{offer(name, allowed)}"
        )
    value, *fields = rest.split(":")
    changes: dict[str, Any] = {}
    for field in fields:
        key, equals, text = field.partition("=")
        if not equals:
            raise ValueError(
                f"method: {shown(spec)} is not allowed; {shown(field)} is not of the form field=value"
            )
        if key in changes:
            raise ValueError(f"method: {shown(spec)} is not allowed; {key} is there twice")
        changes[key] = plain(text)
    config = _of_text(spec, known[name], value, steps) if value else default_of(name)
    return config.changed(changes) if changes else config


def _of_text(spec: str, kind: type[MethodConfig], text: str, steps: int) -> MethodConfig:
    """What stands behind the colon: a method's preset, or what the method makes of it."""
    if text in kind.PRESETS:
        return kind.preset(text)
    try:
        return kind.from_text(text, steps)
    except TextError as error:
        raise _misread(spec, error) from error


def _misread(spec: str, error: TextError) -> ValueError:
    return ValueError(f"method: {shown(spec)} is not allowed; after the colon write {error}")


def plain(text: str) -> Any:
    """A number or a truth value where it is one, else the text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
