"""Read prompt sets in their public formats, from a file or from the hub."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from regrow.fields import MOST_COUNT, check_within
from regrow.files import PROMPTS, FileError, check_file, read_json, read_text, said
from regrow.words import shown

# Columns of the published tables: PartiPrompts, DrawBench.
_COLUMNS = ("Prompt", "Prompts", "prompt", "caption")


@dataclass(frozen=True)
class PromptUse:
    """The usual use of a prompt set's texts.

    Args:
        template: template that each text is put into.
        each: number of pictures of each text.
    """

    template: str = "{}"
    each: int = 1


CLASSES = PromptUse("a photo of a {}", 2)
"""The usual use of ImageNet's classes."""


@dataclass(frozen=True)
class Source:
    """The place of a prompt set on the hub.

    Args:
        repository: name of a dataset.
        file: file in it.
        revision: revision of the repository; None for its main branch.
    """

    repository: str
    file: str
    revision: str | None = None


class PromptSet(Enum):
    """A prompt set on the hub.

    COCO has the first caption of each of the 5,000 pictures of 2017's validation; read other years from
    their ``captions_*.json``. DrawBench is the Parquet file that the hub makes from a copy of its table.
    """

    COCO = Source("merve/coco", "annotations/captions_val2017.json")
    PARTI = Source("nateraw/parti-prompts", "PartiPrompts.tsv")
    DRAWBENCH = Source("sayakpaul/drawbench", "default/train/0000.parquet", revision="refs/convert/parquet")
    IMAGENET = Source("huggingface/label-files", "imagenet-1k-id2label.json")


def named(text: str) -> PromptSet | None:
    """Look up a prompt set by name, in upper or lower case; None if there is none."""
    return PromptSet.__members__.get(text.upper())


def fetch(which: PromptSet) -> Path:
    """Get a prompt set's file, from the hub's cache or the hub.

    Raises:
        OSError: if the hub can't be reached and the file is not in the cache.
    """
    from huggingface_hub import hf_hub_download

    source = which.value
    try:
        return Path(
            hf_hub_download(source.repository, source.file, repo_type="dataset", revision=source.revision)
        )
    except OSError as error:
        where = source.repository + (f" at {source.revision}" if source.revision else "")
        raise OSError(
            f"prompts: {which.name.lower()} could not be fetched ({source.file} of the hub's dataset "
            f"{where}); download this file and give its name ({str(error).splitlines()[0]})"
        ) from error


def read_prompts(
    file: Path, template: str | None = None, each: int | None = None, first: int | None = None
) -> list[str]:
    """Read the prompts of a file, in its order.

    A ``.txt`` has one on each line (also ImageNet's class names). A ``.json`` has COCO's captions (the
    first of each picture), a list of texts, or ImageNet's classes by number (the first name):
    ``{"0": "tench, Tinca tinca"}`` or ``{"0": ["n01440764", "tench"]}``, see `CLASSES`. A ``.tsv``,
    ``.csv`` or ``.parquet`` has a column ``Prompt`` (PartiPrompts) or ``Prompts`` (DrawBench).

    Args:
        file: the file.
        template: template that each text is put into; None for the usual one.
        each: number of times that each prompt is repeated, in a row; None for the usual one.
        first: number of prompts from the beginning; None for all.

    Raises:
        ValueError: if the file holds no prompts, or fewer than ``first``, or is not of these kinds.
        OSError: if it can't be read.
        ImportError: if it is a ``.parquet`` and pyarrow is not installed.
    """
    if template is not None and "{}" not in template:
        raise ValueError(f"template: {shown(template)} is not allowed, it must contain {{}}")
    for name, value in (("each", each), ("first", first)):
        if value is not None:
            check_within(name, value, 1, MOST_COUNT)
    readers = {
        ".txt": _of_text,
        ".json": _of_json,
        ".tsv": _of_table,
        ".csv": _of_table,
        ".parquet": _of_parquet,
    }
    if file.suffix not in readers:
        allowed = " ".join(readers)
        raise ValueError(
            f"prompts: {shown(file.suffix or said(file))} is not allowed; allowed are {allowed}"
        )
    check_file(file, PROMPTS)
    found, usual = readers[file.suffix](file)
    texts = filter(None, (prompt.strip() for prompt in found))
    template, each = usual.template if template is None else template, usual.each if each is None else each
    prompts = [template.replace("{}", prompt) for prompt in texts for _ in range(each)]
    if not prompts:
        raise ValueError(f"prompts: {said(file)} holds no prompts")
    if first is not None and first > len(prompts):
        raise ValueError(f"first: {first} is not allowed, {said(file)} holds only {len(prompts)} prompts")
    return prompts[:first]


def _text(file: Path) -> str:
    return read_text(file, PROMPTS)


def _of_text(file: Path) -> tuple[list[str], PromptUse]:
    return _text(file).split("\n"), PromptUse()


def _of_json(file: Path) -> tuple[list[str], PromptUse]:
    data = read_json(file, PROMPTS)
    if isinstance(data, list):
        if not all(isinstance(prompt, str) for prompt in data):
            raise FileError(f"prompts: {said(file)} is not a list of texts only")
        return data, PromptUse()
    try:
        if data and all(key.isdecimal() for key in data):
            return [_class_name(data[key]) for key in sorted(data, key=int)], CLASSES
        first: dict[int, str] = {}
        for entry in data["annotations"]:
            first.setdefault(entry["image_id"], str(entry["caption"]))
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        raise FileError(
            f"prompts: {said(file)} is neither a list of texts nor COCO's captions nor ImageNet's classes"
        ) from error
    return list(first.values()), PromptUse()


def _class_name(entry: str | list[str]) -> str:
    """Read the first name of a class, from names with commas between, or after a WordNet number."""
    return entry.split(",")[0] if isinstance(entry, str) else entry[1].replace("_", " ")


def _of_table(file: Path) -> tuple[list[str], PromptUse]:
    delimiter = "\t" if file.suffix == ".tsv" else ","
    # In PartiPrompts quotes are part of a prompt, even at its beginning.
    raw = file.suffix == ".tsv"
    quoting: Any = csv.QUOTE_NONE if raw else csv.QUOTE_MINIMAL
    rows = csv.DictReader(io.StringIO(_text(file), newline=""), delimiter=delimiter, quoting=quoting)
    column = _column(file, rows.fieldnames or ())
    texts = []
    for row in _rows(file, rows):
        if None in row:
            raise ValueError(
                f"prompts: line {rows.line_num} of {said(file)} has more fields than its header; a prompt "
                f"with {delimiter!r} in it " + ("is not allowed in a .tsv" if raw else "must be in quotes")
            )
        if row[column] is None:
            raise ValueError(f"prompts: line {rows.line_num} of {said(file)} ends before its {column}")
        texts.append(_unquoted(row[column]) if raw else row[column])
    return texts, PromptUse()


def _rows(file: Path, rows: csv.DictReader[str]) -> Iterator[dict[Any, Any]]:
    """Read the rows of a table; errors name the file, unlike those of csv."""
    try:
        yield from rows
    except csv.Error as error:
        raise FileError(f"prompts: line {rows.line_num} of {said(file)} can't be read") from error


def _unquoted(text: str) -> str:
    """Remove the quotes around a text if all quotes inside are doubled; if not, keep the text."""
    inside = text[1:-1]
    quoted = len(text) > 1 and text[0] == text[-1] == '"' and '"' not in inside.replace('""', "")
    return inside.replace('""', '"') if quoted else text


def _of_parquet(file: Path) -> tuple[list[str], PromptUse]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ImportError(f"prompts: {file.name} needs pyarrow: pip install 'regrow[prompts]'") from error
    try:
        table = parquet.read_table(file)
    except ArrowException as error:
        raise FileError(f"prompts: {said(file)} can't be read as a Parquet file") from error
    name = _column(file, table.column_names)
    texts = table[name].to_pylist()
    if not all(text is None or isinstance(text, str) for text in texts):
        raise ValueError(f"prompts: the column {name} of {said(file)} must hold texts only")
    return [text or "" for text in texts], PromptUse()


def _column(file: Path, names: Sequence[str]) -> str:
    """Find the column of a table that holds the prompts."""
    column = next((c for c in _COLUMNS if c in names), None)
    if column is None:
        raise ValueError(f"prompts: {said(file)} has no column {' or '.join(_COLUMNS)}")
    return column
