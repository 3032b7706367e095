"""The plan of a run: how deep each call of the denoiser goes, and how many tokens it prunes.

A schedule is data. It is read from and written to YAML or JSON, checked field by field, and
resampled to as many calls as a sampler makes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from io import StringIO
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, Protocol

from pydantic import BeforeValidator, Field, ValidationError, model_validator
from ruamel.yaml import YAML

from regrow.fields import (
    MOST_BLOCKS,
    MOST_CALLS,
    SHOWN,
    Checked,
    Ratio,
    check_within,
    explained,
    not_allowed,
)
from regrow.files import PLAN, FileError, parse_yaml, read_text, said
from regrow.origin import Origin
from regrow.recover.time import REUSE, RecoveryField, TimeRecovery
from regrow.words import offer, shown

# Deeper than any model: a call at this depth computes everything.
FULL = 1_000_000
# A call of all blocks in which every attention and feed-forward reuses its last output.
LAYERS = FULL - 1
# A call of the layers behind the last block alone.
HEAD = FULL - 2
# A call in which each site does what the method decides for it.
SITES = FULL - 3


class ScheduleError(FileError):
    """A schedule file that can't be used; the message is ``file:line: field: what is wrong``."""


@dataclass(frozen=True)
class Step:
    """What one call of the denoiser does.

    Args:
        depth: number of up-path layers computed, counted from the output; `FULL` computes the whole
            denoiser and stores its deep features, 0 reuses the last output whole.
        ratio: share of tokens pruned in the layers where the method prunes.
        recovery: how what is not computed follows from earlier calls.
    """

    depth: int
    ratio: float
    recovery: TimeRecovery = REUSE

    @property
    def full(self) -> bool:
        return self.depth >= FULL

    @property
    def of_sites(self) -> bool:
        """Whether a method that decides for single sites does so in the call."""
        return self.depth in (SITES, LAYERS)


class _OneRatio(Checked):
    """The ratio of all calls."""

    ratio: Ratio


class Plan(Protocol):
    """Says what each call does, for any number of calls."""

    @property
    def calls(self) -> int | None:
        """The number of calls that were planned one by one; None if the plan is for any number."""
        return None

    def kinds(self) -> frozenset[Step]:
        """Every step that may occur."""
        ...

    def resample(self, calls: int) -> Schedule:
        """The steps of a generation of so many calls.

        Raises:
            ValueError: if ``calls < 1``.
        """
        ...


NAMES: Mapping[int, str] = MappingProxyType({FULL: "full", LAYERS: "layers", HEAD: "head", SITES: "sites"})
"""What depths that are no number of layers are called."""
_NAMED = {name: depth for depth, name in NAMES.items()}


def depth_from(value: Any) -> int:
    """A depth from itself or its name.

    Raises:
        ValueError: if it is none.
    """
    depth: Any = _NAMED.get(value, value) if isinstance(value, str) else value
    whole = isinstance(depth, int) and not isinstance(depth, bool)
    if whole and (0 <= depth <= MOST_BLOCKS or depth in _NAMED.values()):
        return int(depth)
    raise not_allowed(
        f"it must be a whole number >= 0 and <= {MOST_BLOCKS}, 'full', 'layers', 'head' or 'sites'"
        f"{offer(value, _NAMED)}"
    )


Depth = Annotated[int, BeforeValidator(depth_from)]


def _listed(value: Any) -> Any:
    """One recovery as a list of it."""
    return value if isinstance(value, (list, tuple)) else (value,)


class Schedule(Checked):
    """Depth, pruning ratio and recovery of every call.

    Args:
        depth: a depth for each call: a whole number from 0 to 1000, ``"full"``; ``"layers"``, a call of
            all blocks in which every attention and feed-forward reuses its last output; ``"head"``, a
            call of what lies behind the last block alone; or ``"sites"``, one in which a method that
            decides for single sites does so (TokenCache). Depths at or above the number of up-path layers
            of a model are full there (12 for Stable Diffusion 1.5).
        ratio: a pruning ratio for each call, 0 <= ratio < 1; as many as depths.
        recovery: how what a call does not compute follows from earlier calls: one for all calls, or as many
            as depths; each a recovery, its fields, or its name (``"taylor"``).
        name: a name for tables.
        note: where the schedule comes from.
        origin: what it was searched on; None if it was not. Where it is applied to something else, there is
            a warning.

    Raises:
        pydantic.ValidationError: with the field and the value, if one is not allowed.
    """

    format: Literal["regrow-schedule"] = "regrow-schedule"
    version: Literal[2] = 2
    name: str = ""
    note: str = ""
    depth: tuple[Depth, ...] = Field(min_length=1, max_length=MOST_CALLS)
    ratio: tuple[Ratio, ...] = Field(min_length=1, max_length=MOST_CALLS)
    recovery: Annotated[
        tuple[RecoveryField, ...], BeforeValidator(_listed), Field(min_length=1, max_length=MOST_CALLS)
    ] = (REUSE,)
    origin: Origin | None = None

    @model_validator(mode="before")
    @classmethod
    def _of_version_1(cls, data: Any) -> Any:
        """Version 1 has no recovery: every call reuses."""
        if not isinstance(data, Mapping) or data.get("version") != 1 or isinstance(data["version"], bool):
            return data
        if "recovery" in data:
            raise ValueError("recovery: it is not allowed in version 1, it needs version: 2")
        return {**data, "version": 2}

    @model_validator(mode="after")
    def _same_length(self) -> Schedule:
        if len(self.depth) != len(self.ratio):
            raise ValueError(
                f"ratio: {len(self.ratio)} entries, but depth has {len(self.depth)}; "
                "every call needs one of each"
            )
        if len(self.recovery) not in (1, len(self.depth)):
            raise ValueError(
                f"recovery: {len(self.recovery)} entries, but depth has {len(self.depth)}; "
                "it must be one for all calls, or one for each"
            )
        return self

    @classmethod
    def constant(cls, ratio: float = 0.0, *, name: str = "") -> Schedule:
        """Full calls only, all with the same ratio."""
        return cls(depth=(FULL,), ratio=(ratio,), name=name)

    @classmethod
    def every(cls, interval: int, calls: int, *, depth: int = 1, ratio: float = 0.0) -> Schedule:
        """A full call every ``interval`` calls and calls of ``depth`` between, for ``calls`` calls."""
        check_within("interval", interval, 1, MOST_CALLS)
        depths = tuple(FULL if i % interval == 0 else depth for i in range(calls))
        return cls(depth=depths, ratio=(ratio,) * calls, name=f"every {interval}")

    def __len__(self) -> int:
        return len(self.depth)

    def steps(self) -> Iterator[Step]:
        """The steps in order."""
        return (Step(*each) for each in zip(self.depth, self.ratio, self.recoveries, strict=True))

    @property
    def recoveries(self) -> tuple[TimeRecovery, ...]:
        """The recovery of each call."""
        return self.recovery if len(self.recovery) == len(self) else self.recovery * len(self)

    @property
    def calls(self) -> int | None:
        """Its number of calls; None if they are all the same, as in `constant`."""
        return len(self) if len(set(self.steps())) > 1 else None

    def kinds(self) -> frozenset[Step]:
        """Every step that may occur; the first one is always full."""
        first, *others = self.steps()
        return frozenset((replace(first, depth=FULL), *others))

    @property
    def max_ratio(self) -> float:
        """The highest ratio of all calls."""
        return max(self.ratio)

    def with_recovery(self, recovery: TimeRecovery) -> Schedule:
        """The same depths and ratios with one recovery for all calls; no longer the plan that was found."""
        return Schedule.model_validate(dict(self) | {"recovery": (recovery,), "origin": None})

    def with_ratio(self, ratio: float) -> Schedule:
        """The same depths with one ratio for all calls; no longer the plan that was found.

        Raises:
            pydantic.ValidationError: if it is no share below 1.
        """
        given = _OneRatio(ratio=ratio).ratio
        return Schedule.model_validate(dict(self) | {"ratio": (given,) * len(self), "origin": None})

    def resample(self, calls: int) -> Schedule:
        """The same plan for another number of calls.

        The first call is always full, since nothing is cached before it. Every depth
        keeps its share of the calls to within one call (largest remainders), and its place in the run:
        the j-th of m calls of a depth takes the place, and the ratio, of that depth's occurrence at
        quantile (j + 1/2) / m. For as many calls as the plan has, it is the plan itself.

        Args:
            calls: number of calls of the denoiser in a generation, >= 1.
        """
        check_within("calls", calls, 1, MOST_CALLS)
        depth = (FULL, *self.depth[1:])
        places: dict[int, list[int]] = {}
        for place, d in enumerate(depth):
            places.setdefault(d, []).append(place)
        counts = _shares([len(p) for p in places.values()], calls)
        if counts[0] == 0:
            # `FULL` comes first in `places`: it keeps at least the first call.
            counts[counts.index(max(counts))] -= 1
            counts[0] = 1
        chosen: list[tuple[float, int]] = []
        for occurrences, count in zip(places.values(), counts, strict=True):
            for j in range(count):
                quantile = (j + 0.5) * len(occurrences) / count
                source = occurrences[int(quantile)]
                chosen.append((source + quantile % 1, source))
        order = [source for _, source in sorted(chosen)]
        first = next(source for source in order if depth[source] == FULL)
        order.remove(first)
        order.insert(0, first)
        each: dict[str, tuple[Any, ...]] = {"depth": depth, "ratio": self.ratio}
        if len(self.recovery) > 1:
            each["recovery"] = self.recovery
        return self.model_copy(update={k: tuple(v[source] for source in order) for k, v in each.items()})

    @classmethod
    def load(cls, path: str | Path) -> Schedule:
        """Read a schedule from a YAML or JSON file.

        Raises:
            ScheduleError: with file, line, field and reason.
            OSError: if the file can't be read.
        """
        try:
            text = read_text(Path(path), PLAN)
        except FileError as error:
            raise ScheduleError(str(error)) from error
        return cls.parse(text, said(path))

    @classmethod
    def parse(cls, text: str, file: str = "schedule") -> Schedule:
        """As `load`, from a text; ``file`` is the name errors carry."""
        try:
            data = parse_yaml(text, file)
        except FileError as error:
            raise ScheduleError(str(error)) from error
        if not isinstance(data, dict):
            raise ScheduleError(f"{file}:1: expected fields such as 'depth' and 'ratio'")
        try:
            return cls.model_validate(_plain(data))
        except ValidationError as error:
            issues = error.errors(include_url=False)
            lines = [f"{file}:{_line(data, one['loc'])}: {explained(one)}" for one in issues[:SHOWN]]
            more = [f"{file}: and {len(issues) - SHOWN} more"] if len(issues) > SHOWN else []
            raise ScheduleError("\n".join(lines + more)) from error

    def dump(self, *, as_json: bool = False) -> str:
        """The schedule as YAML (or JSON) text that `parse` reads back."""
        fields = self.model_dump(exclude={"origin"} if self.origin is None else None)
        fields["depth"] = [NAMES.get(d, d) for d in self.depth]
        fields["ratio"] = list(self.ratio)
        if self.recovery == (REUSE,):
            del fields["recovery"]
        elif len(self.recovery) == 1:
            fields["recovery"] = fields["recovery"][0]
        if as_json:
            return json.dumps(fields, indent=1) + "\n"
        writer: Any = YAML(typ="safe")
        writer.default_flow_style = None
        writer.sort_base_mapping_type_on_output = False
        stream = StringIO()
        writer.dump(fields, stream)
        return stream.getvalue()

    def save(self, path: str | Path) -> None:
        """Write a YAML file, or a JSON file if the name ends in ``.json``."""
        path = Path(path)
        path.write_text(self.dump(as_json=path.suffix == ".json"), encoding="utf-8")

    @classmethod
    def bundled(cls, name: str) -> Schedule:
        """One of the schedules that come with the package, such as ``"dato-b1"``."""
        file = resources.files("regrow") / "presets" / f"{name}.yaml"
        return cls.parse(file.read_text(encoding="utf-8"), f"{name}.yaml")


@dataclass(frozen=True)
class Spaced(Plan):
    """A plan of full calls with calls of one lesser depth between, for any number of calls.

    Args:
        interval: one call in so many is full; 1 makes all of them full.
        depth: of the others.
        full: the indices of the full calls among so many calls; every ``interval``-th if None.
        recovery: how what the other calls do not compute follows from earlier calls.
    """

    interval: int
    depth: int
    full: Callable[[int], set[int]] | None = None
    recovery: TimeRecovery = REUSE

    def kinds(self) -> frozenset[Step]:
        """Full calls and the others."""
        full = {Step(FULL, 0.0)}
        return frozenset(full if self.interval == 1 else full | {Step(self.depth, 0.0, self.recovery)})

    def resample(self, calls: int) -> Schedule:
        """The schedule of a generation."""
        check_within("calls", calls, 1, MOST_CALLS)
        full = set(range(0, calls, self.interval))
        if self.full is not None and self.interval > 1:
            full = self.full(calls)
        depth = tuple(FULL if i in full else self.depth for i in range(calls))
        return Schedule(
            depth=depth, ratio=(0.0,) * calls, recovery=(self.recovery,), name=f"1:{self.interval}"
        )


@dataclass(frozen=True)
class Both(Plan):
    """The depths of one plan with the pruning ratios of another.

    Args:
        depths: how deep calls go; its ratios do not count.
        ratios: how much they prune; its depths do not count.
    """

    depths: Plan
    ratios: Plan

    @property
    def calls(self) -> int | None:
        """The larger of both numbers, if there is one."""
        return max((n for n in (self.depths.calls, self.ratios.calls) if n is not None), default=None)

    def kinds(self) -> frozenset[Step]:
        """Every depth with every ratio."""
        depths, ratios = self.depths.kinds(), self.ratios.kinds()
        return frozenset(replace(d, ratio=r.ratio) for d in depths for r in ratios)

    def resample(self, calls: int) -> Schedule:
        """The schedule of a generation."""
        depths = self.depths.resample(calls)
        return depths.model_copy(update={"ratio": self.ratios.resample(calls).ratio})


@dataclass(frozen=True)
class After(Plan):
    """A plan with first calls that are full and prune nothing.

    Args:
        full: number of these calls.
        plan: what the others do, each as it would be without them.
    """

    full: int
    plan: Plan

    @property
    def calls(self) -> int | None:
        """Those of the plan."""
        return self.plan.calls

    def kinds(self) -> frozenset[Step]:
        """Full calls and those of the plan."""
        return self.plan.kinds() | {Step(FULL, 0.0)}

    def resample(self, calls: int) -> Schedule:
        """The schedule of a generation."""
        rest = self.plan.resample(calls)
        full = min(self.full, calls)
        return rest.model_copy(
            update={
                "depth": (FULL,) * full + rest.depth[full:],
                "ratio": (0.0,) * full + rest.ratio[full:],
                "name": f"{rest.name} from {full}".strip(),
            }
        )


def used_recoveries(depth: Sequence[int], recoveries: Sequence[TimeRecovery]) -> tuple[TimeRecovery, ...]:
    """The recoveries of a plan without those that change nothing: one for all calls, or one for each.

    A full call has no use for one. Where a single value was computed before, the recoveries of the plan are
    all the same if each takes it as it is.

    Args:
        depth: of each call.
        recoveries: as many.
    """
    kinds = {one for d, one in zip(depth, recoveries, strict=True) if d < FULL}
    used: dict[int, TimeRecovery] = {}
    for call, own in enumerate(depth):
        # Calls that go deeper computed what this one lacks; two of them are enough to know.
        computed = [*islice((before for before in range(call) if depth[before] > own), 2)]
        alike = len(computed) == 1 and all(r.weights(computed, call, len(depth)) == (1,) for r in kinds)
        if own < FULL and not alike:
            used[call] = recoveries[call]
    if len(set(used.values())) < 2:
        return (next(iter(used.values()), REUSE),)
    return tuple(used.get(call, REUSE) for call in range(len(depth)))


def _shares(weights: Sequence[int], total: int) -> list[int]:
    """Whole numbers in proportion to ``weights`` that sum to ``total`` (largest remainders)."""
    exact = [w * total / sum(weights) for w in weights]
    counts = [math.floor(e) for e in exact]
    by_remainder = sorted(range(len(weights)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def _plain(value: Any) -> Any:
    """ruamel's containers as dict and list."""
    if isinstance(value, dict):
        return {k if isinstance(k, str) else shown(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    if isinstance(value, str):
        # JSON writes a character beyond 16 bits as two, which YAML does not join.
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return value


def _line(document: Any, where: Sequence[int | str]) -> int:
    """The line (from 1) of a field in a document read by ruamel's round-trip loader."""
    data, line = document, 0
    for part in where:
        try:
            marks = data.lc
            line = marks.value(part)[0] if isinstance(data, dict) else marks.item(part)[0]
            data = data[part]
        except (AttributeError, KeyError, TypeError, IndexError):
            break
    return line + 1
