"""Prompt sets in their public formats."""

from __future__ import annotations

import csv
import json
from pathlib import Path

# Columns of the published tables: PartiPrompts, DrawBench.
_COLUMNS = ("Prompt", "Prompts", "prompt", "caption")


def read_prompts(file: Path, template: str = "{}") -> list[str]:
    """The prompts of a file, in its order.

    A ``.txt`` has one a line (also ImageNet's class names), a ``.json`` is COCO's captions (one for each
    picture, the first) or a list of texts, a ``.tsv`` or ``.csv`` has a column ``Prompt`` (PartiPrompts) or
    ``Prompts`` (DrawBench).

    Args:
        file: the file.
        template: what each text is put into, such as ``"a photo of a {}"``.

    Raises:
        ValueError: if the file holds no prompts, or is of another kind.
        OSError: if it can't be read.
    """
    text = file.read_text(encoding="utf-8")
    if "{}" not in template:
        raise ValueError(f"template: {template!r} is not allowed, it must hold {{}}")
    match file.suffix:
        case ".txt":
            found = [line.strip() for line in text.splitlines()]
        case ".json":
            found = _of_json(file, text)
        case ".tsv" | ".csv":
            found = _of_table(file, text)
        case other:
            raise ValueError(
                f"prompts: {other or file.name!r} is not allowed; allowed are .txt .json .tsv .csv"
            )
    prompts = [template.format(prompt) for prompt in found if prompt]
    if not prompts:
        raise ValueError(f"prompts: {file} holds none")
    return prompts


def _of_json(file: Path, text: str) -> list[str]:
    try:
        data = json.loads(text)
        if isinstance(data, list):
            return [str(prompt).strip() for prompt in data]
        first: dict[int, str] = {}
        for entry in data["annotations"]:
            first.setdefault(entry["image_id"], str(entry["caption"]).strip())
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"prompts: {file} is neither a list nor COCO's captions ({error!r})") from error
    return list(first.values())


def _of_table(file: Path, text: str) -> list[str]:
    rows = csv.DictReader(text.splitlines(), delimiter="\t" if file.suffix == ".tsv" else ",")
    column = next((c for c in _COLUMNS if c in (rows.fieldnames or ())), None)
    if column is None:
        raise ValueError(f"prompts: {file} has no column {' or '.join(_COLUMNS)}")
    return [(row[column] or "").strip() for row in rows]
