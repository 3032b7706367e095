"""Read files of others: they are checked before they are opened, and before they are parsed."""

from __future__ import annotations

import json
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from regrow.words import one_line, shown

PLAN = 1 << 18
"""Bytes of a schedule or a method's configuration."""
KEPT = 1 << 26
"""Bytes of what regrow keeps beside its own results."""
PROMPTS = 1 << 29
"""Bytes of a set of prompts; all captions of COCO have 90 MB."""
DEEPEST = 32
"""Lists and mappings inside each other."""

# A string, closed or not, or a bracket.
_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)|[\[\]{}]', re.DOTALL)


class FileError(ValueError):
    """A file that can't be used; the message is ``file: what is wrong`` or ``file:line: what is wrong``."""


def check_file(file: Path, most: int) -> None:
    """Refuse what is no readable file, without opening it: a pipe or device may never answer.

    Args:
        file: the file.
        most: bytes that it may have.

    Raises:
        OSError: naming it, if it is not there, or no plain file.
        FileError: if it is larger.
    """
    try:
        found = file.stat()
    except (OSError, ValueError) as error:
        raise _unreadable(file, error) from error
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(f"{said(file)}: it is a folder, it must be a file")
    if not stat.S_ISREG(found.st_mode):
        raise OSError(f"{said(file)}: it is a pipe or device, it must be a file")
    if found.st_size > most:
        raise FileError(f"{said(file)}: it has {found.st_size:,} bytes, it must have <= {most:,}")


def read_text(file: Path, most: int = KEPT) -> str:
    """The text of a file in UTF-8, without a byte order mark.

    Args:
        file: the file.
        most: bytes that it may have.

    Raises:
        OSError: naming it, if it can't be read.
        FileError: if it is larger, or no UTF-8.
    """
    check_file(file, most)
    try:
        content = file.read_bytes()
    except OSError as error:
        raise _unreadable(file, error) from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise FileError(f"{said(file)}:{line}: it is no text in UTF-8; save it as UTF-8") from error


def read_json(file: Path, most: int = KEPT) -> Any:
    """The content of a JSON file, as `read_text` and `parse_json`."""
    return parse_json(read_text(file, most), said(file))


def read_kept(file: Path, hint: str) -> dict[str, Any]:
    """The fields of a JSON file that regrow wrote.

    Args:
        file: the file.
        hint: what to do if it is damaged.

    Raises:
        OSError: naming it, if it can't be read.
        FileError: if it is damaged.
    """
    try:
        found = read_json(file)
    except FileError as error:
        raise FileError(f"{error}; {hint}") from error
    if not isinstance(found, dict):
        raise damaged(file, hint)
    return found


def damaged(file: Path, hint: str) -> FileError:
    """The error of a file that regrow wrote, and that now holds something else."""
    return FileError(f"{said(file)}: it is damaged or of another program; {hint}")


def parse_json(text: str, name: str) -> Any:
    """What a JSON text holds.

    Args:
        text: of not more than `DEEPEST` lists and mappings inside each other, without a key twice.
        name: of the file.

    Raises:
        FileError: if it is no JSON, or goes deeper.
    """
    depth = 0
    for token in _TOKEN.finditer(text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(token[0], 0)
        if depth > DEEPEST:
            raise _too_deep(name)

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            [(twice, _)] = Counter(key for key, _ in pairs).most_common(1)
            raise FileError(f"{name}: the key {shown(twice)} is there twice")
        return found

    try:
        return json.loads(text, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise FileError(f"{name}: it is no JSON, look at {where}{_near(text, error.lineno)}") from error
    except FileError:
        raise
    except ValueError as error:
        raise FileError(f"{name}: it is no JSON, a number has thousands of digits") from error


def parse_yaml(text: str, name: str) -> Any:
    """What a YAML text holds, in ruamel's containers, which know their lines. JSON is YAML.

    Args:
        text: of not more than `DEEPEST` lists and mappings inside each other, without a key twice,
            anchors, aliases or tags: few letters with these are a document without end.
        name: of the file.

    Raises:
        FileError: if it is no YAML, or has what it must not.
    """
    try:
        _check_events(text, name)
        return YAML(typ="rt", pure=True).load(text)
    except DuplicateKeyError as error:
        line = _line(error)
        raise FileError(f"{name}:{line}: a key is there twice{_near(text, line)}") from error
    except MarkedYAMLError as error:
        line = _line(error)
        raise FileError(f"{name}:{line}: it is no YAML or JSON{_near(text, line)}") from error
    except FileError:
        raise
    except (YAMLError, ValueError) as error:
        raise FileError(
            f"{name}:1: it is no YAML or JSON, it has a character or number that can't be"
        ) from error


def said(file: Path | str) -> str:
    """The name of a file in a message."""
    return one_line(str(file), 300)


def _check_events(text: str, name: str) -> None:
    depth = 0
    events: Iterable[Any] = YAML(typ="rt", pure=True).parse(text)
    for event in events:
        kind, line = type(event).__name__, event.start_mark.line + 1
        depth += {"Start": 1, "End": -1}.get(kind.removeprefix("Sequence").removeprefix("Mapping")[:-5], 0)
        if depth > DEEPEST:
            raise _too_deep(f"{name}:{line}")
        if kind == "AliasEvent" or getattr(event, "anchor", None):
            raise FileError(
                f"{name}:{line}: anchors (&) and aliases (*) are not allowed, write the values out"
            )
        if getattr(event, "tag", None):
            raise FileError(f"{name}:{line}: tags (!) are not allowed, write plain values")


def _too_deep(place: str) -> FileError:
    return FileError(
        f"{place}: it has more than {DEEPEST} lists or mappings inside each other, "
        f"it must have <= {DEEPEST}"
    )


def _line(error: MarkedYAMLError) -> int:
    mark = error.problem_mark
    return mark.line + 1 if mark else 1


def _near(text: str, line: int) -> str:
    """The line of a text, as it is shown."""
    lines = text.splitlines()[line - 1 : line]
    return f": {shown(lines[0].strip())}" if lines else ""


def _unreadable(file: Path, error: Exception) -> OSError:
    """An error of the system in our words, of the same kind."""
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(f"{said(file)}: there is no such file; check its name and folder")
    if isinstance(error, PermissionError):
        return PermissionError(f"{said(file)}: it can't be read, this user may not")
    reason = (
        os.strerror(error.errno).lower() if isinstance(error, OSError) and error.errno else "a wrong name"
    )
    return OSError(f"{said(file)}: it can't be read ({reason})")
