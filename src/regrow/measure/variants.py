"""What is compared: a method, or fewer steps of the same sampler, by a short name."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from regrow import hub
from regrow.apply import Run, apply
from regrow.fields import MOST_CALLS
from regrow.methods import ATEDM, FORA, CATPruning, Combined, DaTo, DeepCache, SiTo, ToCa, ToMeSD
from regrow.methods.catalogue import configured
from regrow.methods.parts import MethodConfig
from regrow.schedule import Schedule
from regrow.words import shown

PLANS = (".json", ".yaml", ".yml")


@dataclass(frozen=True)
class Variant:
    """One row of a comparison. What is not regrow's own is a subclass.

    Args:
        name: as it was asked for.
        config: a method's configuration; None for the pipeline as it is.
        steps: sampler steps.
    """

    name: str
    config: Any
    steps: int

    def applied(self, pipeline: Any) -> AbstractContextManager[Run | None]:
        """The pipeline with the method on it for one generation; the run tells what it computed.

        Raises:
            Exception: whatever keeps the method off this pipeline.
        """
        return nullcontext() if self.config is None else apply(pipeline, self.config)

    def check(self, pipeline: Any) -> None:
        """Look whether the method goes on a pipeline. What it warns of is said when it is applied for good.

        Raises:
            ValueError: if it does not, naming it and the reason.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                with self.applied(pipeline):
                    pass
            except Exception as error:
                raise ValueError(f"methods: {self.name} can't be applied: {error}") from error

    def settings(self) -> Any:
        """What tells it from another of its name, as plain data."""
        return None if self.config is None else self.config.model_dump(mode="json")


def variant(spec: str, steps: int) -> Variant:
    """A row by its name.

    ``steps:25`` is the same sampler with 25 steps; ``sito:d``, ``dato:b1`` and ``atedm:reuse`` are presets,
    ``sito:0.5``, ``tome:0.5`` and ``atedm:0.5`` ratios, ``cat:0.3`` the share computed, ``dato:FILE`` a
    schedule, ``deepcache:5``, ``fora:3`` and ``toca:3`` intervals, ``dato:5`` the same with ``ratio=0.5``
    of the tokens pruned, and ``deepcache:5+tome:0.5`` or ``cat:0.3+deepcache:2`` both at once, in any
    order. Further fields follow after colons: ``sito:d:base=V:patch=4``,
    ``dato:b1:ratio=0.5:alignment=off``.

    ``steps:25+sito:d`` is a method, or two, in 25 steps.

    ``FILE.json`` is the configuration in a file such as a search writes, ``FILE.yaml`` a schedule for DaTo;
    either may be on the hub: ``hub:owner/name/FILE.json``.

    Args:
        spec: the name.
        steps: sampler steps where no ``steps:N`` says otherwise.

    Raises:
        ValueError: if the name is none of these, or the file is not what it should be.
        OSError: if a schedule can't be read.
    """
    parts = spec.split("+")
    own = [part for part in parts if part.startswith("steps:")]
    if len(own) > 1:
        raise ValueError(f"methods: {spec!r} is not allowed; steps: comes once")
    for part in own:
        steps = _whole(part, part.partition(":")[2])
        parts.remove(part)
    if not parts:
        return Variant(spec, None, steps)
    if len(parts) > 2:
        raise ValueError(
            f"methods: {spec!r} is not allowed; at most two methods, as in deepcache:5+tome:0.5"
        )
    configs = [_config(part, steps) for part in parts]
    if len(configs) == 1:
        return Variant(spec, configs[0], steps)
    # Both together were not found anywhere.
    configs = [config.model_copy(update={"found": None}) for config in configs]
    tokens = [c for c in configs if isinstance(c, (SiTo, ToMeSD, CATPruning, ATEDM))]
    caching = [c for c in configs if isinstance(c, (DeepCache, FORA, DaTo))]
    if not tokens or not caching:
        raise ValueError(
            f"methods: {spec!r} is not allowed; one side of the '+' must be deepcache, fora or dato, the "
            "other sito, tome, cat or atedm"
        )
    if isinstance(caching[0], DaTo) and caching[0] != DaTo(schedule=caching[0].schedule):
        raise ValueError(
            f"methods: {spec!r} is not allowed; of dato only its schedule goes with another method, "
            "without further fields"
        )
    plan = caching[0].schedule if isinstance(caching[0], DaTo) else caching[0]
    return Variant(spec, Combined(caching=plan, tokens=tokens[0]), steps)


def _config(spec: str, steps: int) -> Any:
    """The configuration of one method in a run of so many steps."""
    kind, _, rest = spec.partition(":")
    if kind not in _METHODS and (kind == "hub" or spec.endswith(PLANS)):
        plan = hub.load(spec)
        return DaTo(schedule=plan) if isinstance(plan, Schedule) else plan
    if kind not in _METHODS:
        known = ", ".join(("steps", *_METHODS))
        raise ValueError(f"methods: {spec!r} is not known; before the colon comes one of {known}")
    value, *fields = rest.split(":")
    changes: dict[str, Any] = {}
    for field in fields:
        name, equals, text = field.partition("=")
        if not equals:
            raise ValueError(f"methods: {spec!r} is not allowed; {field!r} is not of the form field=value")
        if name in changes:
            raise ValueError(f"methods: {spec!r} is not allowed; {name} is there twice")
        changes[name] = plain(text)
    config = _preset(kind, value) or _METHODS[kind](spec, value, steps)
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
            f"methods: {shown(spec)} is not allowed; after the colon comes a whole number >= 1 and <= "
            f"{MOST_CALLS}"
        )
    return number


def _share(spec: str, value: str) -> float:
    try:
        return float(value)
    except ValueError as error:
        raise ValueError(f"methods: {spec!r} is not allowed; after the colon comes a ratio") from error
