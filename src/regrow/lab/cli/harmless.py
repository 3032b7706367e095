"""What the command line says of errors of others: one line, in our words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from pydantic import ValidationError

from regrow.fields import explain
from regrow.words import one_line, shown

# What typer says of a value, and what regrow says instead.
_SAID = (
    (r"Input should be greater than or equal to (.*)", r"it must be >= \1"),
    (r"Input should be less than or equal to (.*)", r"it must be <= \1"),
    (r"Input should be a valid integer.*", "it must be a whole number"),
    (r"Input should be a valid number.*", "it must be a number"),
    (r"Input should be (.*)", r"it must be \1"),
    (r"(?:Value error, )?'.*' is not one of (.*)", r"it must be one of \1"),
)


def in_one_line(error: BaseException) -> str:
    """What an error says, in one line of at most 1,000 characters."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror is not None:
        return one_line(f"{error.filename}: {error.strerror}")
    text = explain(error) if isinstance(error, ValidationError) else str(error)
    return one_line("; ".join(line for line in text.splitlines() if line) or type(error).__name__)


def in_plain_words(error: Any, words: Sequence[str]) -> str:
    """What typer says of a wrong option, in one line: ``--seed: '-1' is not allowed, it must be >= 0``.

    Args:
        error: a usage error of typer.
        words: of the command line, which hold the value.
    """
    message = " ".join(error.format_message().split()).rstrip(".")
    found = re.fullmatch(r"Invalid value for '(?:[^']* / )?(\S+)'(?: \([^)]*\))?: (.*)", message)
    if found is None:
        return one_line(message[:1].lower() + message[1:])
    option, reason = found.groups()
    for said, ours in _SAID:
        reason = re.sub(f"^{said}$", ours, reason)
    after = [value for name, value in pairwise(words) if name == option]
    joined = [word.partition("=")[2] for word in words if word.startswith(f"{option}=")]
    given = [f"{shown(value)} is not allowed, " for value in (*after, *joined)]
    return one_line(f"{option}: {given[-1] if len(given) == 1 else ''}{reason}")
