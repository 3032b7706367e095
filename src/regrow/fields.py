"""Fields of configurations: the bounds that they share, and in words what is allowed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError
from typing_extensions import Self

from regrow.words import offer, one_line, shown

MOST_CALLS = 4000
"""Calls of a generation: denoisers are trained on 1,000 steps, and samplers make several calls a step."""
MOST_BLOCKS = 1000
"""More blocks, or up-path layers, than any denoiser has."""
MOST_SIDE = 64
"""Side of a patch, in tokens."""
MOST_WEIGHT = 1000
"""Factor on a score; half precision holds numbers to 65,504."""
MOST_SEED = 2**63 - 1
"""Seed that a generator of torch and one of numpy take."""
MOST_COUNT = 1_000_000
"""Prompts, pictures or rounds."""
MOST_PIXELS = 2**16
"""Side of a picture."""
MOST_GUIDANCE = 1000
"""Guidance scale."""

Seed = Annotated[int, Field(ge=0, le=MOST_SEED)]
"""Seed of a generator."""
Calls = Annotated[int, Field(ge=1, le=MOST_CALLS)]
"""Number of calls, or of steps."""
Count = Annotated[int, Field(ge=1, le=MOST_COUNT)]
"""Number of prompts, pictures or rounds."""
Pixels = Annotated[int, Field(ge=1, le=MOST_PIXELS)]
"""Side of a picture."""
Guidance = Annotated[float, Field(ge=-MOST_GUIDANCE, le=MOST_GUIDANCE, allow_inf_nan=False)]
"""Guidance scale."""
Block = Annotated[int, Field(ge=0, lt=MOST_BLOCKS)]
"""Index of a block, or of a branch."""
Side = Annotated[int, Field(ge=2, le=MOST_SIDE)]
"""Side of a patch, in tokens."""
Ratio = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
"""Share of tokens that is left out."""
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
"""Part of a whole."""
Weight = Annotated[float, Field(ge=0, le=MOST_WEIGHT, allow_inf_nan=False)]
"""Factor, or size of a noise."""

# Of what is said: about a value, which is shown with it, or about fields and how they go together.
_VALUE, _RULE = "not_allowed", "rule"
SHOWN = 4
"""Errors that are shown of one configuration."""
_SIGNS = {"ge": ">=", "gt": ">", "lt": "<", "le": "<="}
_WHAT = {
    "int": "a whole number",
    "float": "a number",
    "finite": "a finite number",
    "bool": "true or false",
    "string": "text",
    "tuple": "a list",
    "list": "a list",
    "dict": "fields with values",
    "mapping": "fields with values",
    "model": "fields with values",
}


class Checked(BaseModel):
    """A frozen configuration that says of a field that can't be what it must be, in plain words.

    Raises:
        pydantic.ValidationError: naming the field, the value and what is allowed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="wrap")
    @classmethod
    def _in_plain_words(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return handler(data)
        except ValidationError as error:
            found = error.errors(include_url=False)
            issues = [
                InitErrorDetails(type=_worded(cls, issue), loc=issue["loc"], input=issue["input"])
                for issue in found
                if not _follows(issue, found)
            ]
            raise ValidationError.from_exception_data(cls.__name__, issues) from None


def check_within(name: str, value: float, least: float, most: float) -> None:
    """Refuse a number outside of bounds, and what is no number.

    Raises:
        ValueError: naming it, its value and what is allowed.
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (number and least <= value <= most):
        raise ValueError(f"{name}: {shown(value)} is not allowed, it must be >= {least} and <= {most}")


def not_allowed(message: str) -> PydanticCustomError:
    """The error of a validator that refuses a value: ``it must be ...``."""
    return PydanticCustomError(_VALUE, message)


def explain(error: ValidationError) -> str:
    """A validation error in one line: field, value and what is allowed."""
    issues = error.errors(include_url=False)
    more = len(issues) - SHOWN
    lines = [explained(issue) for issue in issues[:SHOWN]]
    return one_line("; ".join([*lines, f"and {more} more"] if more > 0 else lines))


def explained(issue: Any) -> str:
    """One issue of a `Checked` model's error: ``ratio: 2 is not allowed, it must be >= 0 and < 1``."""
    field = ".".join(str(part) for part in issue["loc"])
    message = issue["msg"].removeprefix("Value error, ")
    if not field:
        return message
    value = f"{shown(issue['input'])} is not allowed, " if issue["type"] == _VALUE else ""
    return f"{one_line(field, 100)}: {value}{message}"


def _follows(issue: Any, found: Sequence[Any]) -> bool:
    """Whether an issue only follows from another one: a list is too short without its refused entries."""
    where = issue["loc"]
    inside = (one["loc"][: len(where)] == where != one["loc"] for one in found)
    return issue["type"] == "too_short" and any(inside)


def _worded(model: type[BaseModel], issue: Any) -> PydanticCustomError:
    """An issue in our words; one that a model inside has put into them stays."""
    kind, message = issue["type"], issue["msg"]
    if kind == "value_error":
        return PydanticCustomError(_RULE, message.removeprefix("Value error, "))
    if kind in (_VALUE, _RULE):
        return PydanticCustomError(kind, message)
    if kind == "missing":
        return PydanticCustomError(_RULE, "is required")
    if kind == "extra_forbidden":
        fields = model.model_fields
        meant = offer(issue["loc"][-1], fields)
        return PydanticCustomError(_RULE, f"not permitted, the fields are {', '.join(fields)}{meant}")
    return PydanticCustomError(_VALUE, f"it must {_allowed(model, issue)}")


def _allowed(model: type[BaseModel], issue: Any) -> str:
    """What a value must be, or have."""
    kind, context = issue["type"], issue.get("ctx", {})
    if kind in ("enum", "literal_error"):
        return f"be {context['expected']}{offer(issue['input'], _quoted(context['expected']))}"
    if kind == "too_short":
        return f"have >= {context['min_length']} entries"
    if kind == "too_long":
        return f"have <= {context['max_length']} entries"
    if kind.startswith("union_tag"):
        names = _quoted(context.get("expected_tags", ""))
        return f"be one of {', '.join(names)}{offer(context.get('tag'), names)}" if names else "be a method"
    limits = [*_limits(model, issue["loc"])] or [
        f"{sign} {context[name]}" for name, sign in _SIGNS.items() if name in context
    ]
    what = _WHAT.get(kind.split("_")[0])
    return f"be {' '.join(filter(None, (what, ' and '.join(limits)))) or 'of another form'}"


def _quoted(text: str) -> list[str]:
    """The names in a list such as ``'a', 'b' or 'c'``."""
    return re.findall(r"'([^']*)'", text)


def _limits(model: type[BaseModel], where: Sequence[int | str]) -> Iterator[str]:
    """The bounds of a field of a model, or of the entries of a list in it."""
    field = model.model_fields.get(str(where[0])) if where else None
    if field is None:
        return
    found = [*field.metadata, *_metadata(field.annotation)]
    for name, sign in _SIGNS.items():
        for one in found:
            if getattr(one, name, None) is not None:
                yield f"{sign} {getattr(one, name)}"


def _metadata(annotation: Any) -> Iterator[Any]:
    """What annotations inside a type say of its values."""
    for one in getattr(annotation, "__metadata__", ()):
        yield from getattr(one, "metadata", [one])
    for inner in get_args(annotation):
        yield from _metadata(inner)
