"""The table of systems: what each does, what it supports, and whether it works here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from regrow.fields import explain
from regrow.files import PLAN, FileError, read_json, said
from regrow.methods.atedm import ATEDM
from regrow.methods.cat import CATPruning
from regrow.methods.combined import Combined
from regrow.methods.dato import DaTo
from regrow.methods.deepcache import DeepCache
from regrow.methods.fora import FORA
from regrow.methods.parts import MethodConfig
from regrow.methods.sito import SiTo
from regrow.methods.toca import ToCa
from regrow.methods.tome import ToMeSD
from regrow.schedule import Schedule
from regrow.space import Space, product
from regrow.words import offer, shown


class Status(str, Enum):
    """How far a system is."""

    WORKS = "works"
    PARTLY = "partly"
    NOT_YET = "not yet"


@dataclass(frozen=True)
class System:
    """A published system.

    Args:
        name: on the command line.
        title: as its authors write it.
        what: what it does, in one line.
        status: how far it is here.
        models: model families it runs on.
        config: its configuration, if it works.
        default: the preset that its name alone means; None where one must be chosen, or there is none and
            the defaults of its fields are meant.
        paper: where it was published.
        note: what else a user must know of its state, in one line.
    """

    name: str
    title: str
    what: str
    status: Status
    models: str
    config: type[MethodConfig] | None = None
    default: str | None = None
    paper: str = ""
    note: str = ""


_UNETS = "U-Nets: SD 1, SD 2, SDXL"
_ALL = f"{_UNETS}; transformers: DiT, PixArt, SD3, Flux, Wan"

_BLOCKS = "transformers: SD3, PixArt, DiT, Flux"

SYSTEMS = (
    System(
        "dato",
        "DaTo",
        "prune tokens where the noise changes least, reuse deep features, by a schedule",
        Status.WORKS,
        _UNETS,
        DaTo,
        paper="arXiv 2501.00375",
        note="regrow search and calibrate find schedules",
    ),
    System(
        "sito",
        "SiTo",
        "prune tokens similar to others in every call",
        Status.WORKS,
        _UNETS,
        SiTo,
        paper="AAAI 2025",
    ),
    System(
        "cat",
        "CAT Pruning",
        "compute the tokens that change, in clusters",
        Status.WORKS,
        _BLOCKS,
        CATPruning,
        default="paper",
        paper="arXiv 2502.00433",
        note="also with block caching: cat:0.3+deepcache:2",
    ),
    System(
        "tokencache",
        "TokenCache",
        "a learned predictor of what to cache",
        Status.NOT_YET,
        "-",
        paper="arXiv 2409.18523",
    ),
    System(
        "tome", "ToMeSD", "merge similar tokens", Status.WORKS, _UNETS, ToMeSD, paper="arXiv 2303.17604"
    ),
    System(
        "deepcache",
        "DeepCache",
        "reuse deep features every N calls",
        Status.WORKS,
        _ALL,
        DeepCache,
        paper="arXiv 2312.00858",
        note="on transformers it caches blocks",
    ),
    System(
        "fora",
        "FORA",
        "reuse attention and MLP outputs every N calls",
        Status.WORKS,
        _ALL,
        FORA,
        paper="arXiv 2407.01425",
        note="on U-Nets inside their transformer blocks",
    ),
    System(
        "toca",
        "ToCa",
        "reuse attention and MLP outputs every N calls, but for the tokens of highest score in the MLPs",
        Status.WORKS,
        _BLOCKS,
        ToCa,
        default="paper",
        paper="arXiv 2410.05317",
        note="the preset paper scores by all queries, toca:N by 64",
    ),
    System(
        "atedm",
        "AT-EDM",
        "prune the tokens that matter least in attention graphs",
        Status.PARTLY,
        f"{_UNETS}; {_BLOCKS}",
        ATEDM,
        paper="arXiv 2405.05252",
        note="on U-Nets three differences from the paper; on transformers with a cache, as the CAT Pruning "
        "paper ran it",
    ),
    System("l2c", "Learning-to-Cache", "a learned table of layers to reuse", Status.NOT_YET, "-"),
    System(
        "steps",
        "Fewer steps",
        "the same sampler with fewer steps",
        Status.WORKS,
        "any model",
        note="steps:N among the methods of a comparison, --steps elsewhere",
    ),
)
"""All systems, the main ones first. The command line takes its names from here."""


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
    tokens = [k for k in kinds if k in (SiTo, ToMeSD, CATPruning, ATEDM)]
    caching = [k for k in kinds if k in (DeepCache, FORA)]
    if len(kinds) > 2 or not tokens or not caching:
        raise ValueError(
            f"method: {name!r} is not allowed; one side of the '+' must be deepcache or fora, the other "
            "sito, tome, cat or atedm"
        )
    return product(
        caching[0].space(calls), tokens[0].space(calls), lambda c, t: Combined(caching=c, tokens=t)
    )


def config_from(data: Mapping[str, Any]) -> MethodConfig:
    """The configuration that `MethodConfig.model_dump` gave.

    Raises:
        ValueError: if it is of no method, or a field is not allowed.
    """
    kinds: tuple[type[MethodConfig], ...] = (*(s.config for s in SYSTEMS if s.config is not None), Combined)
    for kind in kinds:
        if data.get("method") == kind.model_fields["method"].default:
            return kind.model_validate(data)
    known = [kind.model_fields["method"].default for kind in kinds]
    given = data.get("method")
    raise ValueError(
        f"method: {shown(given)} is not known; allowed: {', '.join(known)}{offer(given, known)}"
    )


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
    for system in SYSTEMS:
        if system.name == name and system.config is not None:
            return system.config
    working = [s.name for s in SYSTEMS if s.config is not None]
    if any(system.name == name for system in SYSTEMS):
        raise ValueError(f"method: {shown(name)} is not built yet; allowed: {', '.join(working)}")
    raise ValueError(
        f"method: {shown(name)} is not known; allowed: {', '.join(working)}{offer(name, working)}"
    )


def default_of(name: str) -> MethodConfig:
    """What the name of a system alone means, where it has one obvious configuration.

    Raises:
        ValueError: if there is no such system, it does not work yet, or something must be chosen.
    """
    kind = configured(name)
    default = next(system.default for system in SYSTEMS if system.name == name)
    if default is not None:
        return kind.preset(default)
    if kind.presets():
        choices = ", ".join(f"{name}:{preset}" for preset in kind.presets())
        raise ValueError(f"method: {name!r} alone is not allowed, it needs a choice such as {choices}")
    return kind()
