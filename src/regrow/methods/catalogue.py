"""The table of systems: what each does, what it supports, and whether it works here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from regrow.fields import explain
from regrow.files import PLAN, FileError, read_json, said
from regrow.methods.base import About, MethodConfig, Role, methods, methods_of
from regrow.methods.combined import Combined, full_calls_of
from regrow.recover.time import REUSE
from regrow.schedule import Schedule
from regrow.space import Space, product
from regrow.words import offer, shown


@dataclass(frozen=True)
class System:
    """A row of the table: a method, or what there is no method of.

    Args:
        name: on the command line.
        about: what is said of it.
        config: its configuration, if it works.
    """

    name: str
    about: About
    config: type[MethodConfig] | None = None


_OTHERS = {
    "steps": About(
        "Fewer steps",
        "the same sampler with fewer steps",
        "any model",
        note="steps:N among the methods of a comparison, --steps elsewhere",
    ),
}
"""Systems that are no methods here."""


def systems() -> tuple[System, ...]:
    """All systems, the main ones first: the methods, and behind them what is none."""
    known = methods()
    rows = [System(name, kind.ABOUT, kind) for name, kind in known.items()]
    return (*rows, *(System(name, about) for name, about in _OTHERS.items() if name not in known))


def space_of(name: str, calls: int) -> Space:
    """What a search of a method may choose.

    Args:
        name: of a system, or of two with a plus between, such as ``deepcache+tome``: `Combined`.
        calls: calls of the denoiser in a generation.

    Raises:
        ValueError: if a method is not known or not built yet, or these two don't combine.
    """
    kinds = [configured(part) for part in name.split("+")]
    if len(kinds) == 1:
        return kinds[0].space(calls)
    tokens = [k for k in kinds if k.ABOUT.role is Role.CHOOSES]
    caching = [k for k in kinds if k.ABOUT.role is Role.CACHES]
    if len(kinds) > 2 or not tokens or not caching:
        raise ValueError(f"method: {name!r} is not allowed; {pairs(Role.CACHES)}")
    one, other = caching[0].space(calls), tokens[0].space(calls)
    if "recovery" in one.names and _chooses_of_calls(other):
        # Each token is as old as its last choice, so that no forecast fits them all.
        one = one.with_choices("recovery", (REUSE,))
    return product(one, other, lambda c, t: Combined(caching=c, tokens=t))


def _chooses_of_calls(space: Space) -> bool:
    """Whether the plans choose the tokens of whole calls."""
    return full_calls_of(space.config((0,) * len(space.variables))) > 0


def pairs(*caching: Role) -> str:
    """Which methods go together, in words.

    Args:
        caching: the roles on one side; `Role.CHOOSES` is on the other.
    """
    one, other = (_either([*methods_of(*roles)]) for roles in (caching, (Role.CHOOSES,)))
    return f"one side of the '+' must be {one}, the other {other}"


def _either(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


def config_from(data: Mapping[str, Any]) -> MethodConfig:
    """The configuration that `MethodConfig.model_dump` gave.

    Raises:
        ValueError: if it is of no method, or a field is not allowed.
    """
    known: dict[Any, type[MethodConfig]] = {**methods(), "combined": Combined}
    given = data.get("method")
    if not isinstance(given, str) or given not in known:
        raise ValueError(
            f"method: {shown(given)} is not known; use one of {', '.join(known)}{offer(given, known)}"
        )
    return known[given].model_validate(data)


def load_plan(file: Path) -> Schedule | MethodConfig:
    """A schedule, or the configuration of a method, from a file such as a search writes.

    Raises:
        ValueError: if it is neither, or a field is not allowed, naming the file.
        OSError: if it can't be read.
    """
    if file.suffix != ".json":
        return Schedule.load(file)
    data = read_json(file, PLAN)
    if isinstance(data, dict) and "method" in data:
        try:
            return config_from(data)
        except ValidationError as error:
            raise FileError(f"{said(file)}: {explain(error)}") from error
        except ValueError as error:
            raise FileError(f"{said(file)}: {error}") from error
    if not isinstance(data, dict) or "depth" not in data:
        raise FileError(f"{said(file)}: it is neither a schedule nor the configuration of a method")
    return Schedule.load(file)


def configured(name: str) -> type[MethodConfig]:
    """The configuration type of a system that works.

    Raises:
        ValueError: if there is no such system, or it does not work yet.
    """
    working = methods()
    if name in working:
        return working[name]
    if name in _OTHERS:
        raise ValueError(f"method: {shown(name)} is not built yet; allowed: {', '.join(working)}")
    raise ValueError(
        f"method: {shown(name)} is not known; use one of {', '.join(working)}{offer(name, working)}"
    )


def default_of(name: str) -> MethodConfig:
    """What the name of a system alone means, where it has one obvious configuration.

    Raises:
        ValueError: if there is no such system, it does not work yet, or something must be chosen.
    """
    kind = configured(name)
    if kind.ABOUT.default is not None:
        return kind.preset(kind.ABOUT.default)
    if kind.presets():
        choices = ", ".join(f"{name}:{preset}" for preset in kind.presets())
        raise ValueError(f"method: {name!r} alone is not allowed, it needs a choice such as {choices}")
    return kind()
