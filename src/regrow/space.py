"""What a method leaves open: the choices a plan is made of, and how they become a configuration."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError

from regrow.fields import explain
from regrow.recover.time import REUSE, Chebyshev, Taylor, recovery_from
from regrow.schedule import FULL, Schedule, depth_from, used_recoveries
from regrow.words import offer, shown


@dataclass(frozen=True)
class Variable:
    """One choice of a plan.

    Args:
        name: of its kind, such as ``"depth"``; the same for all calls.
        choices: what may be chosen, in an order in which neighbours are alike.
        read: makes a choice of what a user gives, such as the name of a recovery, or raises a ValueError
            that says what is allowed; None if it is the choice itself.
    """

    name: str
    choices: tuple[Any, ...]
    read: Callable[[Any], Any] | None = None

    def with_choices(self, given: Iterable[Any]) -> Variable:
        """The same with other choices.

        Raises:
            ValueError: if there is none, or one can't be read, naming it.
        """
        allowed = tuple(dict.fromkeys(self._choice(value) for value in given))
        if not allowed:
            raise ValueError(f"choices: {self.name} must have at least one choice")
        return replace(self, choices=allowed)

    def _choice(self, value: Any) -> Any:
        try:
            return value if self.read is None else self.read(value)
        except ValidationError as error:
            why = explain(error)
        except ValueError as error:
            why = str(error)
        raise ValueError(f"choices: {self.name}={shown(value)} is not allowed, {why}")


@dataclass(frozen=True)
class Searched:
    """What a search may choose of a field, said beside its type: ``Annotated[int, Searched((2, 3, 4))]``.

    Args:
        choices: in an order in which neighbours are alike; or a function that gives them, of the calls of a
            generation.
        read: as of `Variable`.
    """

    choices: Sequence[Any] | Callable[[int], Iterable[Any]]
    read: Callable[[Any], Any] | None = None

    def variable(self, name: str, calls: int) -> Variable:
        """The choice of a field in a generation of so many calls."""
        choices = self.choices(calls) if callable(self.choices) else self.choices
        return Variable(name, tuple(choices), self.read)


RECOVERIES = Searched((REUSE, Taylor(order=1), Taylor(order=2)), recovery_from)
"""How what is not computed follows from earlier calls: the last value, a line, or a parabola.

They need no recording of the model. Others that need none, such as ``"chebyshev"``, can be chosen.
"""
INTERVALS = Searched(range(2, 11))
"""Every second to every tenth call is full."""
RATIOS = Searched((0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7))
"""A tenth to seven tenths of the tokens are pruned, in all calls."""


@dataclass(frozen=True)
class Space:
    """All plans of a method.

    Args:
        variables: the choices.
        decode: from a value of each variable to the method's configuration.
        regular: plans that are the same at every step, as values; those that the choices don't allow come
            in when they are widened.
    """

    variables: tuple[Variable, ...]
    decode: Callable[[tuple[Any, ...]], Any]
    regular: tuple[tuple[Any, ...], ...] = ()

    @property
    def uniform(self) -> tuple[tuple[Any, ...], ...]:
        """The regular plans that the choices allow; a search may begin with some of them."""
        return tuple(
            plan
            for plan in self.regular
            if all(v in var.choices for v, var in zip(plan, self.variables, strict=True))
        )

    @property
    def names(self) -> tuple[str, ...]:
        """The kinds of variables, in their order."""
        return tuple(dict.fromkeys(v.name for v in self.variables))

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many choices each variable has."""
        return tuple(len(v.choices) for v in self.variables)

    def config(self, genes: Sequence[int]) -> Any:
        """The configuration of a plan, given as the index of each variable's choice."""
        return self.decode(tuple(v.choices[g] for v, g in zip(self.variables, genes, strict=True)))

    def genes(self, values: Sequence[Any]) -> tuple[int, ...]:
        """The indices of values.

        Raises:
            ValueError: if one is not among its variable's choices.
        """
        return tuple(v.choices.index(value) for v, value in zip(self.variables, values, strict=True))

    def with_choices(self, name: str, choices: Iterable[Any]) -> Space:
        """The same with other choices for the variables of a kind.

        Raises:
            ValueError: if there is no such kind, no choice, or one that can't be read.
        """
        if name not in self.names:
            raise ValueError(
                f"choices: {shown(name)} is not known, it must be one of {', '.join(self.names)}"
                f"{offer(name, self.names)}"
            )
        # Variables of a kind are equal, so that what they are given is read once.
        changed = next(v for v in self.variables if v.name == name).with_choices(choices)
        return replace(self, variables=tuple(changed if v.name == name else v for v in self.variables))

    def extended(self, variable: Variable, decode: Callable[[Any, Any], Any]) -> Space:
        """The plans with one more choice each, which comes last.

        Args:
            variable: the choice; uniform plans are made with each of its values.
            decode: from the configuration and the chosen value to what is decoded then.
        """
        inner = self.decode
        return Space(
            (*self.variables, variable),
            lambda values: decode(inner(values[:-1]), values[-1]),
            tuple((*plan, value) for plan in self.regular for value in variable.choices),
        )


def product(one: Space, other: Space, decode: Callable[[Any, Any], Any]) -> Space:
    """The plans of two methods together.

    Args:
        one: variables that come first.
        other: variables that come after them.
        decode: from both configurations to that of the combination.
    """
    count = len(one.variables)
    return Space(
        (*one.variables, *other.variables),
        lambda values: decode(one.decode(values[:count]), other.decode(values[count:])),
        tuple((*a, *b) for a in one.uniform for b in other.uniform),
    )


def free(variables: Sequence[Variable], decode: Callable[..., Any]) -> Space:
    """The plans of a method without steps of its own: every one is uniform.

    Args:
        variables: each named as the field of the configuration that it sets.
        decode: makes the configuration of these fields, given by name.
    """
    plans: list[tuple[Any, ...]] = [()]
    for variable in variables:
        plans = [(*plan, value) for plan in plans for value in variable.choices]
    names = [v.name for v in variables]
    return Space(
        tuple(variables), lambda values: decode(**dict(zip(names, values, strict=True))), tuple(plans)
    )


def schedules(calls: int, decode: Callable[[Schedule], Any]) -> Space:
    """For each call a depth of 0, 1 or full, a ratio of 0 or .3 to .7, and a recovery of `RECOVERIES`.

    The first call is full. A call of depth 0 computes nothing, and so its ratio is 0. A recovery holds
    for what a call does not compute, and so a full call has none; plans that do the same are the same
    schedule. Plans that are the same at every step: every N-th call full, N up to 10, the others
    of one depth, one ratio, and one recovery.

    With a ratio of 0 alone these are forecasts of the output at depth 0, for any denoiser.

    Args:
        calls: of the denoiser in a generation.
        decode: from a schedule to a method's configuration.
    """
    after, by = calls - 1, RECOVERIES.variable("recovery", calls)
    ratios, recoveries = (0.0, 0.3, 0.4, 0.5, 0.6, 0.7), (*by.choices, Chebyshev())
    regular = (
        (*depth[1:], *(ratio,) * calls, *own * after)
        for depth in _every_nth(calls)
        for own in dict.fromkeys(used_recoveries(depth, (one,) * calls) for one in recoveries)
        for ratio in ratios
    )

    def schedule(values: tuple[Any, ...]) -> Any:
        depth, ratio = (FULL, *values[:after]), values[after : after + calls]
        pruned = tuple(r if d else 0.0 for d, r in zip(depth, ratio, strict=True))
        used = used_recoveries(depth, (REUSE, *values[after + calls :]))
        return decode(Schedule(depth=depth, ratio=pruned, recovery=used))

    variables = (
        *(Variable("depth", (0, 1, FULL), depth_from),) * after,
        *(Variable("ratio", ratios),) * calls,
        *(by,) * after,
    )
    return Space(variables, schedule, tuple(regular))


def _every_nth(calls: int) -> Iterator[tuple[int, ...]]:
    """Depths of plans in which every N-th call is full, N up to 10, and the others are of depth 0 or 1."""
    for interval in range(1, min(calls, 10) + 1):
        for depth in (FULL,) if interval == 1 else (0, 1):
            yield tuple(FULL if i % interval == 0 else depth for i in range(calls))
