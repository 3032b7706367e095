"""``regrow methods``: the systems in blocks, or one of them in full."""

from __future__ import annotations

import inspect
import json
import re
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

from pydantic import BaseModel

from regrow.lab.cli.options import settable
from regrow.lab.cli.requests import Request, argument, command
from regrow.methods.base import MethodConfig
from regrow.methods.catalogue import System, default_of, systems
from regrow.recover.time import TimeRecovery, recovery_from
from regrow.schedule import Schedule
from regrow.words import offer, shown

WIDTH = 80


@dataclass(frozen=True, kw_only=True)
class MethodsRequest(Request):
    """What to tell of."""

    name: str | None = argument(None, "A system: all its fields and presets.")


@command(MethodsRequest)
def methods(request: MethodsRequest) -> None:
    """The systems: what each does, where it works, its presets; or all of one.

    Example: [b]regrow methods[/b]
    or [b]regrow methods dato[/b]
    """
    name, as_json = request.name, request.as_json
    if name is None:
        if as_json:
            print(json.dumps([summary(system) for system in systems()], indent=1))
            return
        print("\n\n".join("\n".join(block(system)) for system in systems()))
        print("\nregrow methods NAME says all of one: its fields, defaults and presets.")
        return
    system = next((one for one in systems() if one.name == name), None)
    if system is None:
        names = [one.name for one in systems()]
        raise ValueError(
            f"name: {shown(name)} is not known; allowed: {', '.join(names)}{offer(name, names)}"
        )
    if as_json:
        fields = [] if system.config is None else list(fields_of(system.config))
        print(json.dumps(summary(system) | {"fields": fields}, indent=1))
        return
    print("\n".join(block(system)))
    if system.config is not None:
        print("\n".join(in_full(system, system.config)))


def summary(system: System) -> dict[str, Any]:
    """A system as plain data."""
    about = system.about
    return {
        "name": system.name,
        "title": about.title,
        "paper": about.paper,
        "what": about.what,
        "status": about.status.value,
        "models": about.models,
        "note": about.note,
        "presets": list(system.config.presets()) if system.config else [],
    }


def block(system: System) -> Iterator[str]:
    """The lines of a system."""
    about = system.about
    paper = f" ({about.paper})" if about.paper else ""
    yield f"{system.name}: {about.title}{paper}, {about.status.value}"
    presets = ", ".join(system.config.presets()) if system.config else ""
    rows = {"": about.what, "on ": about.models, "note: ": about.note, "presets: ": presets}
    for head, text in rows.items():
        if text and text != "-":
            yield from _wrapped(head + text, 4)


def in_full(system: System, config: type[MethodConfig]) -> Iterator[str]:
    """The lines of a system's name alone, fields and presets."""
    try:
        default_of(system.name)
        preset = f", the preset {system.about.default}" if system.about.default else ""
        yield from _wrapped(f"alone: --method {system.name}{preset}", 4)
    except ValueError:
        pass
    yield "\nfields"
    for field in fields_of(config):
        default = "must be given" if field["required"] else f"default {field['default']}"
        yield f"    {field['name']} ({default})"
        yield from _wrapped(field["about"], 8)
    if config.presets():
        yield "\npresets"
    for name in config.presets():
        said = ", ".join(_changes(config, config.preset(name))) or "the defaults"
        yield from _wrapped(f"{name}: {said}", 4)


def fields_of(config: type[MethodConfig]) -> Iterator[dict[str, Any]]:
    """Name, default and meaning of each field that a user sets."""
    about = _arguments(config)
    for name, info in settable(config).items():
        required = info.is_required()
        default = None if required else _plain(info.default)
        yield {"name": name, "required": required, "default": default, "about": about.get(name, "")}


def _arguments(config: type[MethodConfig]) -> dict[str, str]:
    """What the docstrings of a class and of those that it inherits from say of each field."""
    about: dict[str, str] = {}
    for kind in reversed(config.__mro__):
        lines = (inspect.cleandoc(kind.__doc__ or "")).partition("Args:\n")[2].partition("\nRaises:")[0]
        found = re.findall(r"^    (\w+): (.*(?:\n        .*)*)", lines, re.MULTILINE)
        about |= {name: " ".join(text.replace("``", "").split()) for name, text in found}
    return about


def _changes(config: type[MethodConfig], preset: MethodConfig) -> Iterator[str]:
    """The fields of a preset that are not the defaults."""
    for name, info in settable(config).items():
        value = getattr(preset, name)
        if value != info.default:
            yield f"{name}={_plain(value)}"


def _plain(value: Any) -> Any:
    """A value as it is typed; a schedule by its name."""
    if isinstance(value, TimeRecovery):
        return _typed(value)
    if isinstance(value, Schedule):
        return value.name or f"a schedule of {len(value)} calls"
    if isinstance(value, tuple) and any(isinstance(one, BaseModel) for one in value):
        return f"{len(value)} entries"
    return value.value if isinstance(value, Enum) else value


def _typed(recovery: TimeRecovery) -> Any:
    """The name of a recovery, or its fields where the name does not say them all."""
    fields = recovery.model_dump(mode="json")
    name = f"{fields['kind']}{fields.get('order', fields.get('degree', ''))}"
    return name if recovery_from(name) == recovery else fields


def _wrapped(text: str, indent: int) -> Iterable[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=" " * indent, subsequent_indent=" " * (indent + 2))
