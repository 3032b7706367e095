"""What every method says of itself, and the registry of methods."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_origin

from pydantic import Field
from typing_extensions import Self

from regrow.fields import MOST_CALLS, Checked
from regrow.origin import Origin
from regrow.recover.time import TimeRecovery, register_recovery
from regrow.space import Searched, Space, free
from regrow.words import offer, shown

UNETS = "U-Nets: SD 1, SD 2, SDXL"
BLOCKS = "transformers: SD3, PixArt, DiT, Flux"
ALL = f"{UNETS}; transformers: DiT, PixArt, SD3, Flux, Latte, Wan"


class Status(str, Enum):
    """How far a system is."""

    WORKS = "works"
    PARTLY = "partly"
    NOT_YET = "not yet"


class Role(Enum):
    """What a method is in a pair, such as ``deepcache:5+tome:0.5``."""

    CACHES = "caches"
    """It says which calls are full, and how deep the others go."""
    SCHEDULE = "schedule"
    """Its field ``schedule`` says so; in a pair that alone is taken."""
    CHOOSES = "chooses"
    """It says which tokens are computed, and how many."""
    ALONE = "alone"
    """It goes with no other method."""


class DenoiserKind(Enum):
    """A kind of denoiser, for the methods that commands take when they are told none."""

    UNET = "unet"
    TRANSFORMER = "transformer"
    VIDEO = "video"


@dataclass(frozen=True)
class About:
    """What tables, names and the command line say of a method, or of a system that has none here yet.

    Args:
        title: as its authors write it.
        what: what it does, in one line.
        models: model families it runs on.
        status: how far it is here.
        paper: where it was published.
        note: what else a user must know of its state, in one line.
        default: the preset that its name alone means; None where one must be chosen, or there is none and
            the defaults of its fields are meant.
        value: the field that a number behind the colon sets, as in ``sito:0.5``; None where only presets
            may stand there.
        role: what it is in a pair.
        measured: for each kind of denoiser, what stands behind the colon in the rows that ``bench`` and
            ``eval`` take when they are told none.
        traced: the same for ``trace``, whose plots show few well.
        place: in tables, lowest first; of one place, in the order of registration.
    """

    title: str
    what: str
    models: str = "-"
    status: Status = Status.WORKS
    paper: str = ""
    note: str = ""
    default: str | None = None
    value: str | None = None
    role: Role = Role.ALONE
    measured: Mapping[DenoiserKind, tuple[str, ...]] = field(default_factory=dict)
    traced: Mapping[DenoiserKind, tuple[str, ...]] = field(default_factory=dict)
    place: int = 100


class TextError(ValueError):
    """What stands behind a method's colon says no configuration; the message is what may stand there."""


@dataclass(frozen=True)
class Options:
    """The options of the command line that set up a method; None where one is not given.

    Args:
        preset: name of a preset.
        schedule: a schedule file.
        ratio: one pruning ratio for all calls.
        interval: a full call every so many.
    """

    preset: str | None = None
    schedule: Path | None = None
    ratio: float | None = None
    interval: int | None = None

    @property
    def given(self) -> tuple[str, ...]:
        """The names of those that are given."""
        return tuple(one.name for one in fields(self) if getattr(self, one.name) is not None)


class MethodConfig(Checked):
    """A frozen, validated, versioned configuration that equals, hashes and goes to JSON and back.

    A method that `register` takes has `ABOUT`, and a field ``method: Literal["name"] = "name"`` with the
    name that it has on the command line and in files.

    Args:
        version: of its fields; a file of a newer one is refused.
        origin: what it was searched on, if it was; applied elsewhere, it is warned of. `dump` keeps it,
            ``model_dump`` leaves it out: it changes nothing that the method does. Of a method whose plan
            is a schedule, the schedule's own counts.
    """

    ABOUT: ClassVar[About]
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """By the name of a preset, the fields that it sets."""

    version: Literal[1] = 1
    origin: Origin | None = Field(None, exclude=True)

    def dump(self) -> str:
        """The text of a file, JSON, with `origin`."""
        origin = {} if self.origin is None else {"origin": self.origin.model_dump(mode="json")}
        return json.dumps(self.model_dump(mode="json") | origin, indent=1) + "\n"

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Self:
        """A configuration by the name of its preset.

        Args:
            name: one of `presets`.
            changes: fields to set otherwise.

        Raises:
            ValueError: if there is no preset of that name.
        """
        if name not in cls.PRESETS:
            allowed = ", ".join(cls.PRESETS) or "none"
            raise ValueError(
                f"preset: {shown(name)} is not a preset of {cls.__name__}; use one of {allowed}"
                f"{offer(name, cls.PRESETS)}"
            )
        config = cls.of_preset(cls.PRESETS[name])
        return cls.model_validate(config.model_dump() | changes) if changes else config

    @classmethod
    def of_preset(cls, fields: Mapping[str, Any]) -> Self:
        """The configuration of a preset's fields; a method whose presets name files reads them here."""
        return cls.model_validate(fields)

    @classmethod
    def presets(cls) -> tuple[str, ...]:
        """Names of the presets."""
        return tuple(cls.PRESETS)

    @classmethod
    def from_text(cls, text: str, calls: int) -> Self:
        """The configuration of ``name:text`` where ``text`` is no preset: a number for `About.value`.

        Args:
            text: what stands behind the colon, up to the next one.
            calls: calls in the generation, for methods that plan each of them.

        Raises:
            TextError: if it is no such number.
            pydantic.ValidationError: if the field can't have it.
        """
        value = cls.ABOUT.value
        if value is None:
            raise TextError(f"{', '.join(cls.PRESETS) or 'nothing'}{offer(text, cls.PRESETS)}")
        if cls.model_fields[value].annotation is int:
            return cls(**{value: whole(text)})
        try:
            number = float(text)
        except ValueError as error:
            allowed = " or ".join(filter(None, ("a ratio", ", ".join(cls.PRESETS))))
            raise TextError(f"{allowed}{offer(text, cls.PRESETS)}") from error
        return cls(**{value: number})

    @classmethod
    def options(cls) -> tuple[str, ...]:
        """Names of the `Options` that it takes: those that are fields of it, and presets if it has any."""
        own = (name for name in ("ratio", "interval") if name in cls.model_fields)
        return (*(("preset",) if cls.PRESETS else ()), *own)

    @classmethod
    def from_options(cls, options: Options, calls: int) -> Self:
        """The configuration of these options, of which at least one of `options` is given.

        Args:
            options: none is given that it does not take.
            calls: calls in the generation, for methods that plan each of them.

        Raises:
            ValueError: if there is no such preset, or a field can't have its value.
        """
        changes = {name: getattr(options, name) for name in options.given if name != "preset"}
        return cls(**changes) if options.preset is None else cls.preset(options.preset, **changes)

    def changed(self, changes: Mapping[str, Any]) -> Self:
        """The same with other fields, as they stand behind further colons of its name.

        Raises:
            pydantic.ValidationError: if a field is none of its own, or can't have its value.
        """
        return type(self).model_validate(self.model_dump() | dict(changes))

    @property
    def sampler_steps(self) -> int | None:
        """The sampler's steps that it is for; None if it is for any number."""
        return None

    @property
    def unaccelerated_steps(self) -> int | None:
        """The sampler's steps of the run that it stands in for; None if they are its own."""
        return None

    def arguments(self) -> Mapping[str, Any]:
        """What a pipeline's call is to be given besides its steps."""
        return {}

    @classmethod
    def space(cls, calls: int) -> Space:
        """What a search may choose: what the fields say by `Searched`.

        Args:
            calls: calls of the denoiser in a generation, for methods that plan each of them.

        Raises:
            ValueError: if the method leaves nothing open.
        """
        open_fields = [
            one.variable(name, calls)
            for name, info in cls.model_fields.items()
            for one in info.metadata
            if isinstance(one, Searched)
        ]
        if not open_fields:
            raise ValueError(f"method: {cls.__name__} has no plans to search")
        return free(open_fields, cls)

    def at(self, calls: int) -> Self:
        """The same with what it plans for single calls written out for so many; itself if it plans none."""
        return self


def whole(text: str) -> int:
    """The whole number of a text, of calls or steps.

    Raises:
        TextError: if it is none.
    """
    # Python reads no number of thousands of digits.
    number = int(text) if text.isdecimal() and len(text) < 20 else 0
    if not 1 <= number <= MOST_CALLS:
        raise TextError(f"a whole number >= 1 and <= {MOST_CALLS}")
    return number


RESERVED = ("steps", "combined", "schedule", "hub")
"""Names that mean something else on the command line and in files."""

_METHODS: dict[str, type[MethodConfig]] = {}

Registered = TypeVar("Registered", bound=type[MethodConfig] | type[TimeRecovery])


def register(kind: Registered) -> Registered:
    """Make a method, or a recovery in time, known by its name everywhere, as a decorator.

    A `MethodConfig` is known to `regrow.apply`, to the command line, in pairs, and in files. A
    `TimeRecovery` is known to every field that holds one. A class that is defined again replaces itself.

    Raises:
        TypeError: if it is neither, or a method lacks `MethodConfig.ABOUT` or its field ``method``.
        ValueError: if its name is another one's, or can't be a name.
    """
    if isinstance(kind, type) and issubclass(kind, TimeRecovery):
        register_recovery(kind)
        return kind
    if not (isinstance(kind, type) and issubclass(kind, MethodConfig)):
        raise TypeError(
            f"register: {shown(kind)} is not allowed, it must be a subclass of MethodConfig or TimeRecovery"
        )
    _check_about(kind)
    _check_name(kind)
    _METHODS[name_of(kind)] = kind
    return kind


def _check_about(kind: type[MethodConfig]) -> None:
    """Refuse a method that says nothing of itself, or names a field that it does not have."""
    about = getattr(kind, "ABOUT", None)
    if not isinstance(about, About):
        raise TypeError(f"ABOUT: {kind.__name__} has none; it must be a regrow.About")
    needed = ("schedule",) if about.role is Role.SCHEDULE else ()
    for name in (*needed, *filter(None, [about.value])):
        if name not in kind.model_fields:
            raise ValueError(f"ABOUT: {kind.__name__} has no field {name!r}")


def _check_name(kind: type[MethodConfig]) -> None:
    """Refuse a name that is another one's, or can't be one."""
    name = name_of(kind)
    if not re.fullmatch("[a-z][a-z0-9_-]*", name):
        raise ValueError(
            f"method: {shown(name)} is not allowed, it must be of a-z, 0-9, '-' and '_', a letter first"
        )
    if name in RESERVED:
        raise ValueError(f"method: {name!r} is not allowed, it means something else here")
    other = _METHODS.get(name, kind)
    if (other.__module__, other.__qualname__) != (kind.__module__, kind.__qualname__):
        taken = f"{other.__name__} of {other.__module__}"
        raise ValueError(f"method: {name!r} is not allowed for {kind.__name__}, {taken} has that name")


def name_of(kind: type[MethodConfig]) -> str:
    """The name of a method on the command line and in files.

    Raises:
        TypeError: if it has none.
    """
    info = kind.model_fields.get("method")
    if info is None or get_origin(info.annotation) is not Literal or not isinstance(info.default, str):
        raise TypeError(
            f'method: {kind.__name__} has no field of the form method: Literal["name"] = "name"'
        )
    return info.default


def methods() -> dict[str, type[MethodConfig]]:
    """All methods by their names, in the order of tables."""
    return dict(sorted(_METHODS.items(), key=lambda item: item[1].ABOUT.place))


def methods_of(*roles: Role) -> dict[str, type[MethodConfig]]:
    """The methods of these roles in pairs, by their names; those of the first role first."""
    known = methods().items()
    return {name: kind for role in roles for name, kind in known if kind.ABOUT.role is role}
