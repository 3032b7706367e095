"""The computed values that one guidance branch keeps of each site, for recovery in later calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from regrow.recover.time import TimeRecovery, Weights, cached_split

Value = Any
"""A tensor, or tensors in tuples, lists and mappings; other entries are taken from the last value."""


Method = TypeVar("Method", bound=Callable[..., Any])


def _uncompiled(method: Method) -> Method:
    """Have compiled code call a method as it is: what depends on the step would be compiled for each."""
    return cast(Method, torch.compiler.disable(method))


@dataclass
class _History:
    """The computed values of a site.

    Args:
        times: the steps of all values.
        values: the last values, the newest last.
        sums: by recovery, the sums that are kept instead of all values.
    """

    times: list[int] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    sums: dict[TimeRecovery, list[Value]] = field(default_factory=dict)


class Store:
    """The computed values of sites, by key.

    Args:
        recoveries: recoveries of the plan; they set the number of values that are kept.
        total: number of steps of the run.
    """

    def __init__(self, recoveries: Iterable[TimeRecovery], total: int) -> None:
        self._recoveries, self._total = tuple(dict.fromkeys(recoveries)), total
        self._window = max([1, *(r.window for r in self._recoveries)])
        self._kept: dict[str, _History] = {}
        self._step = 0
        self._again: frozenset[str] = frozenset()
        self._new: dict[str, None] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._kept

    def __iter__(self) -> Iterator[str]:
        """The keys of the sites that have values."""
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, key: str, value: Value) -> None:
        """Keep one value, and drop the earlier values of its site."""
        self._kept[key] = _History([0], [value])

    def begin(self, step: int) -> None:
        """Note that a call of a step begins; values of an interrupted call are dropped."""
        self.drop(*list(self._new))
        self._step = step
        # A step that was computed before begins a new run, or is another call of the same step.
        self._again = frozenset(key for key, kept in self._kept.items() if kept.times[-1] >= step)

    def add(self, key: str, value: Value) -> None:
        """Keep a value that the present call computed.

        Earlier values of other shapes are dropped; all are, if the last is of this step or a later one.
        Nothing here depends on the step itself, so that it is compiled only once.
        """
        history = self._kept.get(key)
        again = key in self._again or key in self._new
        if history is None or again or _shapes(history.values[-1]) != _shapes(value):
            history = self._kept[key] = _History()
        history.values = [*history.values, value][-self._window :]
        self._new[key] = None

    def end(self) -> None:
        """End the call: note the step of its values."""
        for key in self._new:
            history = self._kept[key]
            history.times.append(self._step)
            for recovery in self._recoveries:
                factors = recovery.basis(self._step, self._total)
                if factors:
                    history.sums[recovery] = _added(history.sums.get(recovery), history.values[-1], factors)
        self._new = {}

    def last(self, key: str) -> Value:
        """Return the last computed value itself, not a copy: writing to it changes the stored value."""
        return self._kept[key].values[-1]

    def amend(self, key: str, value: Value) -> None:
        """Replace the last value of a site."""
        self._kept[key].values[-1] = value

    @_uncompiled
    def at(self, key: str, step: int, recovery: TimeRecovery) -> Value:
        """Recover the value of a step from the computed values.

        With weight 1 for the last value and 0 for the others, it is the last value itself.
        """
        history = self._kept[key]
        of_sums, of_values = cached_split(recovery, tuple(history.times), step, self._total)
        if not any(of_sums) and of_values[-1] == 1 and not any(of_values[:-1]):
            return history.values[-1]
        sums = history.sums.get(recovery, [])
        values = history.values[-len(of_values) :]
        return combine([*values, *sums], [*of_values, *of_sums], like=values[-1])

    @_uncompiled
    def deviation(self, key: str, step: int, recovery: TimeRecovery, value: Value) -> Tensor | None:
        """Measure how far a recovered value is from the computed one: ``|value - recovered| / |value|``.

        Args:
            key: key of the site.
            step: step of the computed value, which is not kept yet.
            recovery: the recovery to test.
            value: the computed value.

        Returns:
            a number on the value's device; None if no earlier step computed a value of this form.
        """
        history = self._kept.get(key)
        if history is None or key in self._new or _shapes(history.values[-1]) != _shapes(value):
            return None
        if history.times[-1] >= step:
            return None
        own, made = flatten(value)[0], flatten(self.at(key, step, recovery))[0]
        return _norm([one - other for one, other in zip(own, made, strict=True)]) / _norm(own)

    def knows(self, key: str, step: int, recovery: TimeRecovery) -> bool:
        """Whether a recovery has its own weights for this step and the values that exist."""
        return recovery.knows(self._kept[key].times, step, self._total)

    def used(self, key: str, step: int, recovery: TimeRecovery) -> str:
        """Name what recovers this step, in words."""
        return recovery.used(self._kept[key].times, step, self._total)

    def begins(self, key: str, step: int, recovery: TimeRecovery) -> bool:
        """Whether there are enough values for a recovery in a run that began late."""
        return recovery.begins(self._kept[key].times, step, self._total)

    def drop(self, *keys: str) -> None:
        """Forget the values of sites, if there are any."""
        for key in keys:
            self._kept.pop(key, None)
            self._new.pop(key, None)


def _added(sums: Sequence[Value] | None, value: Value, factors: Weights) -> list[Value]:
    """Add a value to sums, with a factor for each sum."""
    if sums is None:
        return [combine([value], [factor]) for factor in factors]
    return [combine([before, value], [1.0, f]) for before, f in zip(sums, factors, strict=True)]


def combine(values: Sequence[Value], weights: Weights | Sequence[float], like: Value = None) -> Value:
    """Compute the weighted sum of values; tensors of less than 32 bits are summed in float32.

    Args:
        values: values of one form.
        weights: a weight for each value.
        like: a value whose types the sum gets; without it, sums in float32 stay float32.
    """
    pairs = [(value, weight) for value, weight in zip(values, weights, strict=True) if weight]
    if not pairs:
        pairs = [(values[-1], 0.0)]
    leaves = [flatten(value)[0] for value, _ in pairs]
    types, rebuild = flatten(values[-1] if like is None else like)
    summed = []
    for i, model in enumerate(types):
        total = _weighted([(leaf[i], weight) for leaf, (_, weight) in zip(leaves, pairs, strict=True)])
        summed.append(total if like is None else total.to(model.dtype))
    return rebuild(summed)


def _weighted(pairs: Sequence[tuple[Tensor, float]]) -> Tensor:
    """Compute the weighted sum of tensors."""
    first, weight = pairs[0]
    wide = first.dtype if first.dtype in (torch.float32, torch.float64) else torch.float32
    total = first.to(wide) * weight
    for tensor, factor in pairs[1:]:
        total.add_(tensor.to(wide), alpha=factor)
    return total


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    """Compute the Euclidean norm of all elements together, at least in float32."""
    wide = [torch.promote_types(tensor.dtype, torch.float32) for tensor in tensors]
    norms = [torch.linalg.vector_norm(t, dtype=w) for t, w in zip(tensors, wide, strict=True)]
    whole: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return whole


def flatten(value: Value) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], Value]]:
    """Split a value into its floating-point tensors and a function that puts others in their place.

    Args:
        value: tensors in tuples, lists and mappings, such as the outputs of diffusers.
    """
    if isinstance(value, Tensor) and value.is_floating_point():
        return [value], lambda tensors: tensors[0]
    if isinstance(value, dict):
        names, parts = list(value), [flatten(v) for v in value.values()]
        kind: Any = type(value)
        return _joined(parts, lambda made: kind(**dict(zip(names, made, strict=True))))
    if isinstance(value, (tuple, list)):
        sequence: Any = type(value)
        make = sequence._make if hasattr(sequence, "_make") else sequence
        return _joined([flatten(v) for v in value], make)
    return [], lambda tensors: value


def _joined(
    parts: Sequence[tuple[list[Tensor], Callable[[Sequence[Tensor]], Value]]],
    make: Callable[[list[Value]], Value],
) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], Value]]:
    """Join several flattened values to one."""
    counts = [len(tensors) for tensors, _ in parts]

    def rebuild(tensors: Sequence[Tensor]) -> Value:
        rest, made = list(tensors), []
        for count, (_, part) in zip(counts, parts, strict=True):
            made.append(part(rest[:count]))
            rest = rest[count:]
        return make(made)

    return [tensor for tensors, _ in parts for tensor in tensors], rebuild


def copied(value: Value) -> Value:
    """Copy the tensors of a value, so that nobody else holds them."""
    tensors, rebuild = flatten(value)
    return rebuild([tensor.clone() for tensor in tensors])


def _shapes(value: Value) -> list[torch.Size]:
    return [tensor.shape for tensor in flatten(value)[0]]
