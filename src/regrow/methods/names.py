"""Short names of methods, such as ``dato:b1`` or ``deepcache:5+tome:0.5``: one parser for all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from regrow import hub
from regrow.fields import MOST_CALLS, explain
from regrow.methods.atedm import ATEDM
from regrow.methods.cat import CATPruning
from regrow.methods.catalogue import configured, default_of
from regrow.methods.combined import Combined
from regrow.methods.dato import DaTo
from regrow.methods.deepcache import DeepCache
from regrow.methods.fora import FORA
from regrow.methods.parts import MethodConfig
from regrow.methods.sito import SiTo
from regrow.methods.toca import ToCa
from regrow.methods.tome import ToMeSD
from regrow.schedule import Schedule
from regrow.words import offer, shown

PLANS = (".json", ".yaml", ".yml")
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
        steps: sampler steps where no ``steps:N`` says otherwise.

    Raises:
        ValueError: if the name is none of these, or the file is not what it should be.
        OSError: if a schedule can't be read.
    """
    parts = name.split("+")
    own = [part for part in parts if part.startswith("steps:")]
    if len(own) > 1:
        raise ValueError(f"method: {shown(name)} is not allowed; steps: comes once")
    for part in own:
        steps = _whole(part, part.partition(":")[2])
        parts.remove(part)
    if len(parts) > 2:
        raise ValueError(
            f"method: {shown(name)} is not allowed; at most two methods, as in deepcache:5+tome:0.5"
        )
    try:
        configs = [_config(part, steps) for part in parts]
        return Named(_both(name, configs) if len(configs) == 2 else configs[0] if configs else None, steps)
    except ValidationError as error:
        raise ValueError(f"method: {shown(name)}: {explain(error)}") from error


def _both(name: str, configs: list[Any]) -> Combined:
    """Two methods as one."""
    # Both together were not found anywhere.
    configs = [config.model_copy(update={"found": None}) for config in configs]
    tokens = [c for c in configs if isinstance(c, (SiTo, ToMeSD, CATPruning, ATEDM))]
    caching = [c for c in configs if isinstance(c, (DeepCache, FORA, DaTo))]
    if not tokens or not caching:
        raise ValueError(
            f"method: {shown(name)} is not allowed; one side of the '+' must be deepcache, fora or dato, "
            "the other sito, tome, cat or atedm"
        )
    if isinstance(caching[0], DaTo) and caching[0] != DaTo(schedule=caching[0].schedule):
        raise ValueError(
            f"method: {shown(name)} is not allowed; of dato only its schedule goes with another method, "
            "without further fields"
        )
    plan = caching[0].schedule if isinstance(caching[0], DaTo) else caching[0]
    return Combined(caching=plan, tokens=tokens[0])


def _config(spec: str, steps: int) -> Any:
    """The configuration of one method in a run of so many steps."""
    kind, _, rest = spec.partition(":")
    if kind not in _METHODS and (kind == "hub" or spec.endswith(PLANS)):
        plan = hub.load(spec)
        return DaTo(schedule=plan) if isinstance(plan, Schedule) else plan
    if kind not in _METHODS:
        known = ("steps", *_METHODS)
        raise ValueError(
            f"method: {shown(spec)} is not known; before the colon comes one of {', '.join(known)}"
            f"{offer(kind, known)}"
        )
    value, *fields = rest.split(":")
    changes: dict[str, Any] = {}
    for field in fields:
        name, equals, text = field.partition("=")
        if not equals:
            raise ValueError(
                f"method: {shown(spec)} is not allowed; {shown(field)} is not of the form field=value"
            )
        if name in changes:
            raise ValueError(f"method: {shown(spec)} is not allowed; {name} is there twice")
        changes[name] = plain(text)
    config = default_of(kind) if not value else _preset(kind, value) or _METHODS[kind](spec, value, steps)
    if not changes:
        return config
    if isinstance(config, DaTo) and "ratio" in changes:
        # DaTo's ratios are its schedule's.
        changes["schedule"] = config.schedule.with_ratio(changes.pop("ratio"))
    return type(config).model_validate(config.model_dump() | changes)


def _preset(kind: str, value: str) -> MethodConfig | None:
    """A method's preset, if it has one of that name."""
    method = configured(kind)
    return method.preset(value) if value in method.presets() else None


def plain(text: str) -> Any:
    """A number or a truth value where it is one, else the text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _dato(spec: str, value: str, steps: int) -> DaTo:
    if value.isdecimal():
        return DaTo(schedule=Schedule.every(_whole(spec, value), steps, ratio=0.5))
    if not value.startswith(hub.PREFIX) and not value.endswith(PLANS) and not Path(value).exists():
        raise ValueError(
            f"method: {shown(spec)} is not allowed; after the colon comes an interval, a schedule file or "
            f"{', '.join(DaTo.presets())}{offer(value, DaTo.presets())}"
        )
    return DaTo(schedule=hub.load_schedule(value))


_METHODS: dict[str, Callable[[str, str, int], Any]] = {
    "sito": lambda spec, value, steps: SiTo(ratio=_share(spec, value)),
    "atedm": lambda spec, value, steps: ATEDM(ratio=_share(spec, value)),
    "dato": _dato,
    "tome": lambda spec, value, steps: ToMeSD(ratio=_share(spec, value)),
    "deepcache": lambda spec, value, steps: DeepCache(interval=_whole(spec, value)),
    "cat": lambda spec, value, steps: CATPruning(alpha=_share(spec, value)),
    "fora": lambda spec, value, steps: FORA(interval=_whole(spec, value)),
    "toca": lambda spec, value, steps: ToCa(interval=_whole(spec, value)),
}


def _whole(spec: str, value: str) -> int:
    # Python reads no number of thousands of digits.
    number = int(value) if value.isdecimal() and len(value) < 20 else 0
    if not 1 <= number <= MOST_CALLS:
        raise ValueError(
            f"method: {shown(spec)} is not allowed; after the colon comes a whole number >= 1 and <= "
            f"{MOST_CALLS}"
        )
    return number


def _share(spec: str, value: str) -> float:
    presets = configured(spec.partition(":")[0]).presets()
    allowed = " or ".join(("a ratio", *((", ".join(presets),) if presets else ())))
    try:
        return float(value)
    except ValueError as error:
        raise ValueError(
            f"method: {shown(spec)} is not allowed; after the colon comes {allowed}{offer(value, presets)}"
        ) from error
